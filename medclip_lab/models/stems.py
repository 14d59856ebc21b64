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


def adapt_stem(
    weight: Tensor, bias: Tensor | None, conv: nn.Conv2d, source: Normalisation, target: Normalisation
) -> tuple[Tensor, Tensor | None, bool]:
    """Weights of a single-channel stem that answers greyscale as the three-channel stem answers it repeated.

    With the channels' x_c = (g - m_c) / s_c and the one x = (g - m) / s of the same grey value g,
    sum_c W_c x_c = (sum_c W_c s / s_c) x + sum_c W_c (m - m_c) / s_c, whose second term is a constant: it goes into the
    bias.

    Args:
        weight: [O, 3, H, W].
        bias: [O], or None.
        conv: the stem they are for.
        source, target: how pixels were normalised for these weights, and how they will be.

    Returns:
        Weight [O, 1, H, W], bias, and whether the answer is the same. It is not where the constant has no bias to go
        to, where the stem pads (with 0, which was another grey value in each channel), or where the stem standardises
        its weights.
    """
    means, stds = (torch.tensor(values, dtype=torch.float64) for values in (source.mean, source.std))
    wide = weight.double()
    summed = (wide * (target.std[0] / stds).view(1, 3, 1, 1)).sum(1, keepdim=True)
    shift = (wide * ((target.mean[0] - means) / stds).view(1, 3, 1, 1)).sum((1, 2, 3))
    same = bool(shift.abs().max() < 1e-6)
    padded = conv.padding not in (0, (0, 0), "valid")
    exact = (same or (bias is not None and not padded)) and "Std" not in type(conv).__name__
    if bias is not None:
        bias = (bias.double() + shift).to(bias.dtype)
    return summed.to(weight.dtype), bias, exact
