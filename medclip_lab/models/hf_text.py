"""A text tower of Hugging Face's transformers: any encoder or decoder that has a config, with a choice of poolers.

open_clip has such a tower for five families of models and three poolers. This one has its parameters under the same
names and gives the same features there, so that open_clip loads what it knows.
"""

import inspect
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from medclip_lab.errors import UserError

POOLERS = ("mean_pooler", "cls_pooler", "cls_last_hidden_state_pooler", "max_pooler", "last_pooler")
"""The first three under the names that open_clip gives them."""
PROJECTIONS = ("mlp", "linear")


class TextOutput(NamedTuple):
    """What a tower makes of texts [N, L]."""

    features: Tensor
    """[N, D], projected, not normalised."""
    tokens: Tensor
    """[N, L, D], each projected as the features are, not normalised."""
    mask: Tensor
    """bool [N, L]: which of them are words."""


class HuggingFaceText(nn.Module):
    """A transformer, a pooler and a projection.

    Features do not depend on the padding: every pooler sees the words only.

    Args:
        config: a transformers config as a dict, `model_type` among its keys; without pretrained weights.
        output_dim: D, of the features.
        pooler: one of `POOLERS`. "cls_pooler" takes the transformer's own pooler where it has one, as open_clip does;
            "last_pooler" the last word, which alone has seen all others in a causal transformer.
        proj: "linear" or "mlp", as in open_clip; None only where the transformer is as wide as the features.
        layers: indices of hidden states whose mean is pooled, 0 the embeddings, -1 the last: GLoRIA (Huang et al.,
            ICCV 2021) takes the last four, [-4, -3, -2, -1]. None pools the last one.

    Raises:
        UserError: settings that do not fit the config.
    """

    def __init__(
        self,
        config: dict[str, Any],
        output_dim: int,
        pooler: str = "mean_pooler",
        proj: str | None = "mlp",
        layers: list[int] | None = None,
    ) -> None:
        super().__init__()
        if pooler not in POOLERS:
            raise UserError(
                f"model.spec.text_cfg.hf_pooler_type: unknown pooler {pooler!r}; known: {', '.join(POOLERS)}"
            )
        self.config = text_config(config)
        if self.config.pad_token_id is None:
            raise UserError(
                "model.spec.text_cfg.hf_config.pad_token_id is not set: without it words and padding look alike"
            )
        self.transformer = build_transformer(self.config, with_pooler=pooler == "cls_pooler")
        depth = int(self.config.num_hidden_layers)
        if layers is not None and (not layers or not all(-depth - 1 <= layer <= depth for layer in layers)):
            raise UserError(
                f"model.spec.text_cfg.hf_layers: hidden states 0 to {depth} or -1 to {-depth - 1}, got {layers}"
            )
        self.pooler, self.layers = pooler, layers
        self.vocab_size = int(self.config.vocab_size)
        self.context_length = positions(self.config)
        self.output_dim = output_dim
        self.proj = _projection(int(self.config.hidden_size), output_dim, proj)

    def forward(self, ids: Tensor) -> Tensor:
        """[N, D] of int64 [N, L]."""
        _, pooled, _ = self._pooled(ids)
        features: Tensor = self.proj(pooled)
        return features

    def with_tokens(self, ids: Tensor) -> TextOutput:
        """Features and those of each token."""
        hidden, pooled, mask = self._pooled(ids)
        return TextOutput(self.proj(pooled), self.proj(hidden), mask)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep the layers' inputs only, and run each layer again in the backward pass."""
        if enable:
            with warnings.catch_warnings():
                # transformers 5 has a new name for it, and only its later versions know that.
                warnings.simplefilter("ignore", FutureWarning)
                self.transformer.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            self.transformer.gradient_checkpointing_disable()

    def _pooled(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mask = ids != self.config.pad_token_id
        mask = mask | (_at(ids, 0) & ~mask.any(1, keepdim=True))  # a text without words is its first token
        out = self.transformer(
            input_ids=ids, attention_mask=mask.long(), output_hidden_states=self.layers is not None, return_dict=True
        )
        hidden: Tensor = out.last_hidden_state
        if self.layers is not None:
            hidden = torch.stack([out.hidden_states[layer] for layer in self.layers]).mean(0)
        elif self.pooler == "cls_pooler" and getattr(out, "pooler_output", None) is not None:
            return hidden, out.pooler_output, mask
        return hidden, pool(hidden, mask, self.pooler), mask


def pool(hidden: Tensor, mask: Tensor, pooler: str) -> Tensor:
    """[N, C] of hidden states [N, L, C] and bool [N, L], in each row of which at least one is True."""
    rows = torch.arange(hidden.shape[0], device=hidden.device)  # len() would fix the batch of an exported graph
    if pooler == "mean_pooler":
        words = mask.unsqueeze(-1)
        return (hidden * words).sum(1) / words.sum(1)
    if pooler == "max_pooler":
        return hidden.masked_fill(~mask.unsqueeze(-1), -torch.inf).amax(1)
    if pooler == "last_pooler":
        return hidden[rows, mask.shape[1] - 1 - mask.flip(1).int().argmax(1)]
    return hidden[rows, mask.int().argmax(1)]  # the first word, wherever the padding is


def text_config(values: dict[str, Any]) -> Any:
    """A transformers config of its dict.

    Raises:
        UserError: an unknown family, or values that its config refuses.
    """
    from transformers import CONFIG_MAPPING

    kind = values.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise UserError(f"model.spec.text_cfg.hf_config: transformers knows no model_type {kind!r}")
    try:
        return CONFIG_MAPPING[kind].from_dict(values)
    except Exception as error:  # each config checks its values in its own way
        first = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise UserError(f"model.spec.text_cfg.hf_config: {kind}: {first}") from None


def build_transformer(config: Any, with_pooler: bool) -> Any:
    """A randomly initialised transformer in float32, without its head; of an encoder-decoder the encoder."""
    from transformers import AutoModel

    options = {"add_pooling_layer": with_pooler} if takes_pooling_layer(config) else {}
    try:
        model = AutoModel.from_config(config, dtype=torch.float32, **options)
    except (ValueError, TypeError, ImportError, AttributeError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"model.spec.text_cfg: transformers cannot build {config.model_type}: {first}") from None
    model.config.use_cache = False  # nothing is generated
    return model.encoder if config.is_encoder_decoder else model


def takes_pooling_layer(config: Any) -> bool:
    """Whether the family's model can do without a pooling layer of its own."""
    from transformers import MODEL_MAPPING

    return "add_pooling_layer" in inspect.signature(MODEL_MAPPING[type(config)].__init__).parameters


def positions(config: Any) -> int:
    """Tokens that a text may have; 0 if the config sets no bound."""
    bound = getattr(config, "max_position_embeddings", None) or 0
    return bound - reserved(config) if bound else 0


def reserved(config: Any) -> int:
    """Rows of the position embedding that no token takes: RoBERTa and its kin count from the padding's id on."""
    families = ("roberta", "xlm-roberta", "camembert", "roberta-prelayernorm", "xlm-roberta-xl", "longformer", "mpnet")
    return int(config.pad_token_id) + 1 if config.model_type in families else 0


def _projection(width: int, output_dim: int, kind: str | None) -> nn.Module:
    if kind == "linear":
        return nn.Linear(width, output_dim, bias=False)
    if kind == "mlp":
        hidden = (width + output_dim) // 2
        return nn.Sequential(nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, output_dim, bias=False))
    if kind is not None:
        raise UserError(f"model.spec.text_cfg.hf_proj_type: {kind!r} is none of {', '.join(PROJECTIONS)}, null")
    if width != output_dim:
        raise UserError(
            f"model.spec.text_cfg.hf_proj_type is null, but the transformer is {width} wide and embed_dim is "
            f"{output_dim}: take linear or mlp"
        )
    return nn.Identity()


def _at(ids: Tensor, position: int) -> Tensor:
    return torch.arange(ids.shape[1], device=ids.device) == position
