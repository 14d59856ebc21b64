"""Ranks and the collectives between them: the only file that knows of other processes."""

import os

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
    def forward(ctx: torch.autograd.function.FunctionCtx, local: Tensor) -> Tensor:
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:  # type: ignore[override]
        # Every rank computed the loss of the whole batch. The sum over ranks is W times the gradient of that loss,
        # and averaging over ranks, as DDP does with the parameters, takes the W away again.
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(local: Tensor) -> Tensor:
    """Rows of all ranks in the order of ranks, [W * B, ...] from [B, ...] each; differentiable.

    All ranks must bring the same shape. Without a process group the tensor itself comes back.
    """
    if world_size() == 1:
        return local
    gathered: Tensor = _Gather.apply(local.contiguous())
    return gathered
