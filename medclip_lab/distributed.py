"""Ranks and the collectives between them: the only file that knows of other processes."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def launched_world() -> tuple[int, int]:
    """(rank, world size) as torchrun announces them, also before the process group exists."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class _Gather(torch.autograd.Function):
    """All-gather along the first axis whose backward hands every rank the sum of the gradients of its rows."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        # Collectives want equal shapes: pad to the longest share, and cut again.
        padded = local.new_zeros(max(sizes), *local.shape[1:])
        padded[: len(local)] = local
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Every rank computed the loss of the whole batch. The sum over ranks is W times the gradient of that loss,
        # and averaging over ranks, as DDP does with the parameters, takes the W away again.
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return torch.split(gradient, ctx.sizes)[dist.get_rank()], None


def gather(local: Tensor) -> Tensor:
    """Rows of all ranks in the order of ranks, [sum of B, ...] from [B, ...] each; differentiable.

    Shares may differ in B. Without a process group the tensor itself comes back.
    """
    if world_size() == 1:
        return local
    sizes = [torch.zeros(1, dtype=torch.int64, device=local.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(local)], device=local.device))
    gathered: Tensor = _Gather.apply(local.contiguous(), [int(size) for size in sizes])
    return gathered
