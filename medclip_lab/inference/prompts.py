"""Many short texts to embeddings, without the padding that fills a context of 77 tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

TOKENS = 2**14
"""Tokens of a batch: its size does not depend on how long the texts are."""
PROBES = 8
TOLERANCE = 1e-5
"""Of unit-norm features: what a tower may change by when padding is left out, before it is believed to read it."""


class PromptTooLongError(ValueError):
    """A text with more tokens than the context holds."""

    def __init__(self, prompt: str, tokens: int, context: int) -> None:
        super().__init__(f"{tokens} tokens in a context of {context}: {prompt!r}")
        self.prompt, self.tokens, self.context = prompt, tokens, context


@torch.inference_mode()
def encode_prompts(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], device: torch.device, truncate: bool = False
) -> NDArray[np.float32]:
    """Embeddings of prompts by an open_clip model: long ones last, each batch as wide as its longest.

    Towers differ in whether they read padding (SigLIP's do). So a few prompts are encoded both ways first, and padding
    is left out only where it changes nothing.

    Args:
        tokenizer: one of open_clip's.
        truncate: cut prompts that are longer than the context, the end token kept.

    Returns:
        float32 [N, D], unit norm, in the order of the prompts.

    Raises:
        PromptTooLongError: a prompt is, and may not be cut.
    """
    ids, lengths = _tokenize(tokenizer, prompts, truncate)
    order = torch.argsort(lengths, stable=True)
    tower = _Tower(model, ids.shape[1])
    trimmed = float(lengths.float().mean()) < 0.9 * ids.shape[1] and _may_trim(tower, ids, lengths, order, device)
    features: Tensor | None = None
    start = 0
    while start < len(order):
        width = int(lengths[order[start]]) if trimmed else ids.shape[1]
        rows = order[start : start + max(TOKENS // width, 1)]
        width = int(lengths[rows[-1]]) if trimmed else width
        part = tower(ids[rows, :width].to(device)).cpu()
        if features is None:
            features = torch.empty(len(order), part.shape[1])
        features[rows] = part
        start += len(rows)
    assert features is not None, "no prompts"
    return features.numpy()


def _tokenize(tokenizer: Any, prompts: Sequence[str], truncate: bool) -> tuple[Tensor, Tensor]:
    """Token ids [N, context], and how many of each row are no padding."""
    context = int(tokenizer.context_length)
    # Twice the context shows what the context itself would have cut off.
    wide = torch.cat(
        [tokenizer(list(prompts[at : at + 4096]), context_length=2 * context) for at in range(0, len(prompts), 4096)]
    )
    padding = tokenizer([""], context_length=2 * context)[0, -1]
    places = torch.arange(1, 2 * context + 1)
    lengths = torch.where(wide != padding, places, 0).amax(1)
    ids = wide[:, :context].clone()
    for row in torch.nonzero(lengths > context)[:, 0].tolist():
        if not truncate:
            raise PromptTooLongError(prompts[row], int(lengths[row]), context)
        ids[row] = tokenizer([prompts[row]], context_length=context)[0]
    return ids, lengths.clamp(1, context)


class _Tower:
    """The text tower of an open_clip model on ids of any width up to its context."""

    def __init__(self, model: nn.Module, context: int) -> None:
        self._module = _EncodeText(model)
        named = [*self._module.named_parameters(), *self._module.named_buffers()]
        self._positions = {
            name: value
            for name, value in named
            if name.rpartition(".")[2] in ("positional_embedding", "attn_mask")
            and ".visual." not in name
            and value.shape[0] == context
        }

    def __call__(self, ids: Tensor) -> Tensor:
        """[N, D] unit norm, float32."""
        width = ids.shape[1]
        # open_clip adds all positions to all tokens: fewer tokens need fewer positions, and a smaller mask.
        cut = {
            name: value[:width, :width] if name.endswith("attn_mask") else value[:width]
            for name, value in self._positions.items()
        }
        encoded: Tensor = functional_call(self._module, cut, (ids,))
        return F.normalize(encoded.float(), dim=-1)


class _EncodeText(nn.Module):
    """`functional_call` calls forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, ids: Tensor) -> Tensor:
        encoded: Tensor = self.model.encode_text(ids)
        return encoded


def _may_trim(tower: _Tower, ids: Tensor, lengths: Tensor, order: Tensor, device: torch.device) -> bool:
    rows = order[torch.linspace(0, len(order) - 1, min(PROBES, len(order))).long()]
    full = tower(ids[rows].to(device))
    try:
        alone = torch.cat([tower(ids[row : row + 1, : lengths[row]].to(device)) for row in rows])
    except RuntimeError:  # a tower of a shape that was not foreseen: it gets what it was made for
        return False
    return bool((full - alone).abs().max() <= TOLERANCE)
