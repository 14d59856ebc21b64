"""Two towers from an open_clip model config, keyed by modality."""

import contextlib
import io
import json
import logging
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medclip_lab.data.preprocess import PreprocessConfig, normalise
from medclip_lab.errors import UserError

Features = dict[str, Tensor]


@dataclass
class ModelConfig:
    """Which towers, and which words they know."""

    spec: dict[str, Any] | str = field(default_factory=dict)
    """An open_clip model config ("embed_dim", "vision_cfg", "text_cfg"), or a model by open_clip name, "local-dir:PATH"
    or "hf-hub:NAME" (the last needs a network)."""
    pretrained: str | None = None
    """Weights for a model given by name: an open_clip tag or a file."""
    tokenizer: str = "train"
    """"train" makes a byte-level BPE from the training reports; "spec" takes the one the spec names; else a folder."""
    vocab_size: int = 4096
    """Size of a trained tokenizer."""
    logit_scale: float | None = None
    """Start of the (exponentiated) scale; None takes the loss's own."""
    logit_bias: float | None = None
    """Start of the bias; None takes the loss's own. SigLIP's -10 is minus the logarithm of its batch of 32,768 and far
    from the optimum of a small batch."""
    channels_last: bool = True
    """Memory format of the image tower; faster for convolutions."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """open_clip logs every step of building a model to the root logger; nobody asked."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def build_spec(spec: dict[str, Any]) -> nn.Module:
    """A randomly initialised open_clip model of an inline model config.

    Raises:
        UserError: keys open_clip does not know, an unknown timm or Hugging Face tower.
    """
    with tempfile.TemporaryDirectory() as folder:
        # The very path an exported bundle takes, so that what trains is what will be loaded.
        (Path(folder) / "open_clip_config.json").write_text(json.dumps({"model_cfg": spec, "preprocess_cfg": {}}))
        return _create(f"local-dir:{folder}", load_weights=False, pretrained_text=False)


def load_named(name: str, pretrained: str | None) -> nn.Module:
    """A model by open_clip name, `local-dir:` or `hf-hub:`, with its weights."""
    return _create(name, pretrained=pretrained)


def _create(name: str, **options: Any) -> nn.Module:
    try:
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            model: nn.Module = open_clip.create_model(name, **options)
    except (RuntimeError, TypeError, ValueError, KeyError, AssertionError, OSError) as error:
        first = str(error).strip().splitlines()
        raise UserError(
            f"model.spec: open_clip cannot build it: {first[0] if first else type(error).__name__}"
        ) from None
    return model


class DualEncoder(nn.Module):
    """An open_clip model whose towers are called by modality.

    Args:
        model: an open_clip CLIP or CustomTextCLIP.
        preprocess: what the image tower expects; its mean and std are applied here.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, preprocess: PreprocessConfig, channels_last: bool = True) -> None:
        super().__init__()
        self.model: Any = model
        self.channels_last = channels_last
        if channels_last:
            self.model.visual.to(memory_format=torch.channels_last)
        self.register_buffer("mean", torch.tensor(preprocess.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocess.std).view(3, 1, 1), persistent=False)
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
        normalised = normalise(pixels, self.mean, self.std)
        if self.channels_last:
            normalised = normalised.contiguous(memory_format=torch.channels_last)
        return F.normalize(self.model.encode_image(normalised).float(), dim=-1)

    def encode_text(self, ids: Tensor) -> Tensor:
        """[M, D] unit norm from int64 [M, L]."""
        return F.normalize(self.model.encode_text(ids).float(), dim=-1)

    def towers_of(self, batch: dict[str, Any]) -> dict[str, Callable[[Tensor], Tensor]]:
        """Name in the batch -> its tower: modalities, and second views such as "second_text"."""
        names = {f"{view}{name}": tower for view in ("", "second_") for name, tower in self.towers.items()}
        return {name: tower for name, tower in names.items() if name in batch}

    def forward(self, batch: dict[str, Any]) -> Features:
        """Features of every modality, and second view of one, that the batch holds."""
        return {name: tower(batch[name]) for name, tower in self.towers_of(batch).items()}
