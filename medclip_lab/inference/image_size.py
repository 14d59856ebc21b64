"""A loaded image tower at another image size: its position embeddings interpolated, its preprocessing to match."""

from dataclasses import replace
from typing import Any

import open_clip
import torch
from torch import nn

from medclip_lab.data.preprocess import Preprocess
from medclip_lab.errors import UserError
from medclip_lab.inference.encoder import Encoder
from medclip_lab.models.spec import quiet


def set_image_size(encoder: Encoder, size: int) -> None:
    """Set the image tower of an encoder, in place, to images of size x size pixels.

    Features of another size are others: the encoder's fingerprint no longer tells what it computes.

    Raises:
        UserError: a tower without position embeddings, or patches that do not fill such an image.
    """
    visual = encoder.model.model.visual
    trunk = getattr(visual, "trunk", None)
    if trunk is not None and not (hasattr(trunk, "set_input_size") and getattr(trunk, "pos_embed", None) is not None):
        raise UserError(
            f"image size: {type(trunk).__name__} has no position embeddings to interpolate: leave --image-size out"
        )
    if (trunk is None and not hasattr(visual, "conv1")) or hasattr(visual, "attnpool"):
        raise UserError(
            f"image size: {type(visual).__name__} has no position embeddings of patches: leave --image-size out"
        )
    patch = (visual.patch_size if trunk is None else trunk.patch_embed.patch_size)[0]
    if size < patch or size % patch:
        near = max(round(size / patch), 1) * patch
        raise UserError(f"image size: {size} is no multiple of the patches' {patch}: take {near}")
    if trunk is not None:
        with quiet():
            visual.set_input_size(size)
    else:
        _set_own(encoder.model.model, size, patch)
    encoder.preprocess = Preprocess(replace(encoder.preprocess.config, size=size))


def _set_own(model: Any, size: int, patch: int) -> None:
    """open_clip's own transformer, as it loads weights of another size."""
    visual = model.visual
    visual.image_size = (size, size)
    visual.grid_size = (size // patch, size // patch)
    name = "visual.positional_embedding"
    state = {name: visual.positional_embedding.detach()}
    with quiet():
        open_clip.model.resize_pos_embed(state, model)
    visual.positional_embedding = nn.Parameter(state[name].to(torch.float32), requires_grad=False)
