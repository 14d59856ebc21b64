"""Two towers from an open_clip model config, keyed by modality."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medclip_lab.data.preprocess import PreprocessConfig, normalise
from medclip_lab.errors import UserError
from medclip_lab.models.lora import LoraConfig, add_lora, merged_state
from medclip_lab.models.stems import channels_of
from medclip_lab.models.tokens import TOKENS, image_tokens, text_tokens
from medclip_lab.models.warm_start import WarmStartConfig

Features = dict[str, Tensor]
LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in a grey value, ITU-R BT.601, as Pillow has them."""


@dataclass
class ModelConfig:
    """Which towers, and which words they know."""

    spec: dict[str, Any] | str = field(default_factory=dict)
    """An open_clip model config ("embed_dim", "vision_cfg", "text_cfg") with a few keys of our own (docs/training.md);
    or a model by open_clip name, "local-dir:PATH" or "hf-hub:NAME" (the last needs a network)."""
    pretrained: str | None = None
    """Weights for a model given by open_clip name: a tag or a file."""
    warm_start: list[WarmStartConfig] = field(default_factory=list)
    """Weights that towers begin with, one after the other. A text tower whose folder `hf_model_name` names begins with
    the weights there anyhow, unless `hf_model_pretrained` is false."""
    tokenizer: str = "train"
    """"train" makes a byte-level BPE from the training reports; "spec" takes the one the spec names; else a folder."""
    vocab_size: int = 4096
    """Size of a trained tokenizer."""
    truncation: Literal["refuse", "end"] = "refuse"
    """Texts longer than `text_cfg.context_length`: "refuse" tries some of each source and stops before the first batch
    if one is; "end" cuts them there."""
    lora: dict[str, LoraConfig] = field(default_factory=dict)
    """Adapters by tower, "image" or "text". A bundle has them merged."""
    gradient_checkpointing: bool = False
    """Run each layer twice in place of keeping what it made: the same gradients in far less memory. The running
    statistics of a batch norm move twice a step."""
    logit_scale: float | None = None
    """Start of the (exponentiated) scale; None takes the loss's own."""
    logit_bias: float | None = None
    """Start of the bias; None takes the loss's own. SigLIP's -10 is minus the logarithm of its batch of 32,768 and far
    from the optimum of a small batch."""
    channels_last: bool = True
    """Memory format of the image tower; faster for convolutions."""

    def __post_init__(self) -> None:
        if unknown := set(self.lora) - {"image", "text"}:
            raise ValueError(f"model.lora: towers are image and text, got {', '.join(sorted(unknown))}")


class DualEncoder(nn.Module):
    """An open_clip model whose towers are called by modality.

    Args:
        model: an open_clip CustomTextCLIP, as `medclip_lab.models.spec` builds them.
        preprocess: what the image tower expects; its mean and std are applied here.

    Raises:
        UserError: a tower of one channel and several means.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, preprocess: PreprocessConfig, channels_last: bool = True) -> None:
        super().__init__()
        self.model: Any = model
        self.channels_last = channels_last
        self.tokens: frozenset[str] = frozenset()
        """Which of "image_tokens", "text_tokens" and "text_mask" `forward` gives."""
        if channels_last:
            self.model.visual.to(memory_format=torch.channels_last)
        self.channels = channels_of(self.model.visual)
        means, stds = preprocess.mean[: self.channels], preprocess.std[: self.channels]
        if self.channels == 1 and (len(set(preprocess.mean)) > 1 or len(set(preprocess.std)) > 1):
            raise UserError(
                f"data.preprocess: an image tower of one channel has one mean and one std, got {list(preprocess.mean)} "
                f"and {list(preprocess.std)}: give the same number three times"
            )
        self.register_buffer("mean", torch.tensor(means).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(stds).view(-1, 1, 1), persistent=False)
        # A third modality is a third entry.
        self.towers: dict[str, Callable[[Tensor], Tensor]] = {"image": self.encode_image, "text": self.encode_text}

    def start_temperature(self, logit_scale: float, logit_bias: float | None) -> None:
        """Set the initial (exponentiated) scale and the bias, which a loss knows best; None removes the bias."""
        with torch.no_grad():
            self.model.logit_scale.fill_(math.log(logit_scale))
        if logit_bias is None:
            self.model.logit_bias = None
        else:
            self.model.logit_bias = nn.Parameter(torch.full_like(self.model.logit_scale, logit_bias))

    def adapt(self, lora: dict[str, LoraConfig]) -> None:
        """Put adapters into the towers named "image" and "text"."""
        for name, config in lora.items():
            add_lora(self.model.visual if name == "image" else self.model.text, config, name)

    def checkpoint_activations(self) -> None:
        """Gradient checkpointing in both towers.

        Raises:
            UserError: a tower that cannot.
        """
        visual = self.model.visual
        try:
            # open_clip only logs that a trunk of timm cannot.
            getattr(visual, "trunk", visual).set_grad_checkpointing(True)
            self.model.text.set_grad_checkpointing(True)
        except (AssertionError, AttributeError, ValueError) as error:
            raise UserError(f"model.gradient_checkpointing: a tower cannot: {error}; set it to false") from None

    def weights(self) -> dict[str, Tensor]:
        """State dict of the open_clip model on the CPU, adapters merged: what a bundle holds."""
        return {name: value.detach().cpu().contiguous() for name, value in merged_state(self.model).items()}

    @property
    def logit_scale(self) -> Tensor:
        """Scalar, exponentiated."""
        scale: Tensor = self.model.logit_scale.exp()
        return scale

    @property
    def logit_bias(self) -> Tensor | None:
        bias: Tensor | None = getattr(self.model, "logit_bias", None)
        return bias

    def encode_image(self, pixels: Tensor) -> Tensor:
        """[N, D] unit norm from [N, 1 or 3, H, W], uint8 or float in [0, 1]."""
        return F.normalize(self.model.encode_image(self.normalised(pixels)).float(), dim=-1)

    def encode_text(self, ids: Tensor) -> Tensor:
        """[M, D] unit norm from int64 [M, L]."""
        return F.normalize(self.model.encode_text(ids).float(), dim=-1)

    def normalised(self, pixels: Tensor) -> Tensor:
        """[N, C, H, W] for the image tower, C being its channels, from [N, 1 or 3, H, W]."""
        normalised = normalise(self.fitted(pixels), self.mean, self.std)
        return normalised.contiguous(memory_format=torch.channels_last) if self.channels_last else normalised

    def fitted(self, pixels: Tensor) -> Tensor:
        """Colour made grey, float in [0, 1], where the image tower has one channel; other pixels as they are."""
        if pixels.shape[1] <= self.channels:
            return pixels
        luma = torch.tensor(LUMA, device=pixels.device).view(3, 1, 1)
        return (pixels.float() / (255 if pixels.dtype == torch.uint8 else 1) * luma).sum(1, keepdim=True)

    def towers_of(self, batch: dict[str, Any]) -> dict[str, Callable[[Tensor], Tensor]]:
        """Name in the batch -> its tower: modalities, and second views such as "second_text"."""
        names = {f"{view}{name}": tower for view in ("", "second_") for name, tower in self.towers.items()}
        return {name: tower for name, tower in names.items() if name in batch}

    def forward(self, batch: dict[str, Any]) -> Features:
        """Features of every modality, and second view of one, that the batch holds, and the tokens asked for."""
        features: Features = {}
        if "image" in batch and "image_tokens" in self.tokens:
            pooled, tokens = image_tokens(self.model.visual, self.normalised(batch["image"]))
            features |= {"image": F.normalize(pooled.float(), dim=-1), "image_tokens": tokens.float()}
        if "text" in batch and self.tokens & {"text_tokens", "text_mask"}:
            pooled, tokens, mask = text_tokens(self.model.text, batch["text"])
            features |= {"text": F.normalize(pooled.float(), dim=-1), "text_tokens": tokens.float(), "text_mask": mask}
        rest = {name: tower for name, tower in self.towers_of(batch).items() if name not in features}
        features |= {name: tower(batch[name]) for name, tower in rest.items()}
        return {name: value for name, value in features.items() if name not in TOKENS or name in self.tokens}
