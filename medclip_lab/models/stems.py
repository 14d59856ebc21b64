"""Stems that take greyscale as the single channel it is, with the weights of stems that take it three times."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medclip_lab.errors import UserError


@dataclass(frozen=True)
class Normalisation:
    """By what the pixels of each channel, in [0, 1], are shifted and divided before the tower."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def find_stem(visual: Any) -> tuple[str, nn.Conv2d]:
    """Name and module of the convolution that meets the pixels, in an image tower of open_clip.

    Raises:
        UserError: there is no such convolution.
    """
    trunk = getattr(visual, "trunk", None)
    name = f"trunk.{trunk.default_cfg.get('first_conv')}" if trunk is not None else "conv1"
    try:
        conv = visual.get_submodule(name)
    except AttributeError:
        conv = None
    if not isinstance(conv, nn.Conv2d) or conv.groups != 1 or conv.in_channels not in (1, 3):
        raise UserError(
            f"model.spec.vision_cfg.in_chans: {type(trunk or visual).__name__} has no plain first convolution to "
            "change: leave in_chans out, greyscale is then repeated over three channels"
        )
    return name, conv


def make_single_channel(visual: Any) -> None:
    """Let an image tower take [N, 1, H, W], in place: its stem's weights are summed over the channels.

    Raises:
        UserError: the tower has no stem that this could be done to.
    """
    _, conv = find_stem(visual)
    conv.weight = nn.Parameter(conv.weight.detach().sum(1, keepdim=True))
    conv.in_channels = 1
    visual.in_chans = 1


def channels_of(visual: Any) -> int:
    """1 after `make_single_channel`, else 3."""
    return int(getattr(visual, "in_chans", 3))


def adapt_stem(weight: Tensor, source: Normalisation, target: Normalisation) -> tuple[Tensor, Tensor]:
    """A single-channel stem that answers greyscale as a three-channel stem answers it repeated, but for a constant.

    With the channels' x_c = (g - m_c) / s_c and the one x = (g - m) / s of the same grey value g,
    sum_c W_c x_c = (sum_c W_c s / s_c) x + sum_c W_c (m - m_c) / s_c, whose second term is that constant.

    Args:
        weight: [O, 3, H, W].
        source, target: how pixels were normalised for these weights, and how they will be.

    Returns:
        Weight [O, 1, H, W], and the constant [O].
    """
    means, stds = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (source.mean, source.std))
    wide = weight.double()
    summed = (wide * (target.std[0] / stds)).sum(1, keepdim=True)
    constant = (wide * ((target.mean[0] - means) / stds)).sum((1, 2, 3))
    return summed.to(weight.dtype), constant.to(weight.dtype)


def add_constant(visual: Any, state: dict[str, Tensor], stem: str, constant: Tensor) -> dict[str, Tensor]:
    """What of an image tower's weights takes up a constant that its stem should add: its bias, or in a vision
    transformer without one the position embedding of every patch. Nothing where neither can."""
    if f"{stem}.bias" in state:
        return {f"{stem}.bias": state[f"{stem}.bias"] + constant}
    trunk = getattr(visual, "trunk", visual)
    name, prefix = ("positional_embedding", 1) if trunk is visual else ("trunk.pos_embed", _prefix_tokens(trunk))
    if name not in state or state[name].shape[-1] != len(constant):
        return {}
    positions = state[name].clone()
    positions[..., prefix:, :] += constant
    return {name: positions}


def is_exact(conv: nn.Conv2d, constant: Tensor, taken: bool) -> bool:
    """Whether the single-channel stem answers as the other did everywhere.

    Not where it pads (zeros were another grey value in each channel), where the constant went nowhere, or where it
    standardises its weights (a sum of standardised ones is no standardised sum).
    """
    if "Std" in type(conv).__name__:
        return False
    return bool(constant.abs().max() < 1e-6) or (taken and conv.padding in (0, (0, 0), "valid"))


def _prefix_tokens(trunk: Any) -> int:
    return 0 if getattr(trunk, "no_embed_class", False) else int(getattr(trunk, "num_prefix_tokens", 0))
