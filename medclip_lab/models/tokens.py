"""What a tower knows of each patch and each word, for losses that match them."""

from typing import Any

import torch
from torch import Tensor, nn

from medclip_lab.errors import UserError
from medclip_lab.models.hf_text import HuggingFaceText, TextOutput

TOKENS = ("image_tokens", "text_tokens", "text_mask")
"""Names under which a loss asks for them."""


def image_tokens(visual: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features [N, D] of normalised images, and those of their patches [N, P, D], row by row, without class token; each
    projected as the features are, not normalised.

    Raises:
        UserError: a tower whose patches have no such projection.
    """
    try:
        out = visual.forward_intermediates(images, indices=1, normalize_intermediates=True)
        maps: Tensor = out["image_intermediates"][0]
        tokens = _project(visual, maps.flatten(2).transpose(1, 2))
    except (AssertionError, AttributeError, TypeError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the loss wants image_tokens, and {type(getattr(visual, 'trunk', visual)).__name__} gives none: {first}. "
            "Take a ViT, or a timm tower with timm_pool avg and timm_proj linear, without patch_dropout"
        ) from None
    return out["image_features"], tokens


def text_tokens(text: Any, ids: Tensor) -> TextOutput:
    """Features and tokens of texts [N, L] in a text tower of open_clip or of ours."""
    if isinstance(text, HuggingFaceText):
        return text.with_tokens(ids)
    out = text.forward_intermediates(ids, indices=1, normalize_intermediates=True, output_fmt="NLC")
    tokens, projection = out["text_intermediates"][0], text.text_projection
    if isinstance(projection, nn.Module):
        tokens = projection(tokens)
    elif projection is not None:
        tokens = tokens @ projection
    mask = ids != text.pad_id
    return TextOutput(out["text_features"], tokens, mask | (~mask.any(1, keepdim=True) & _first(ids)))


def _project(visual: Any, tokens: Tensor) -> Tensor:
    projection = getattr(visual, "proj", None)
    if isinstance(projection, Tensor):
        return tokens @ projection
    if not {"proj", "mlp"} & {name for name, _ in visual.head.named_children()}:
        raise TypeError("its projection is part of its pooling")
    projected: Tensor = visual.head(tokens)
    return projected


def _first(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1], device=ids.device) == 0
