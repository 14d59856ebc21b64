"""Gradients of parameters of which some may be in shards: their norm, their clipping, their groups."""

from collections.abc import Collection, Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

T = TypeVar("T")


def separate(
    groups: Iterable[tuple[T, list[nn.Parameter]]], towers: Collection[nn.Parameter]
) -> list[tuple[T, list[nn.Parameter]]]:
    """Split groups of an optimizer so that none holds both parameters of the towers and others.

    An optimizer takes the tensors of a group in one go, which shards and whole ones cannot share. Done without shards
    too, the groups are the same ones whatever the strategy, and so is the checkpoint.
    """
    split = []
    for kind, parameters in groups:
        inside = [parameter for parameter in parameters if parameter in towers]
        others = [parameter for parameter in parameters if parameter not in towers]
        split += [(kind, part) for part in (inside, others) if part]
    return split


def global_norm(tensors: Iterable[Tensor]) -> Tensor:
    """2-norm of all tensors as one vector, on every rank that of the whole of those in shards."""
    whole: list[Tensor] = []
    shards: list[DTensor] = []
    for tensor in tensors:
        (shards if isinstance(tensor, DTensor) else whole).append(tensor)  # type: ignore[arg-type]
    norm = torch.nn.utils.get_total_norm(whole)
    if not shards:
        return norm
    square = torch.nn.utils.get_total_norm([tensor.to_local() for tensor in shards]).square()
    dist.all_reduce(square, group=shards[0].device_mesh.get_group())
    return (square + norm.to(square.device).square()).sqrt()


def clip(parameters: Iterable[nn.Parameter], norm: Tensor, largest: float) -> None:
    """Scale gradients whose global norm is `norm` down to at most `largest`."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    factor = torch.clamp(largest / (norm + 1e-6), max=1.0)
    for gradient in gradients:
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        local.mul_(factor)
