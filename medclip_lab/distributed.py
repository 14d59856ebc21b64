"""Ranks and the collectives between them: the only file that knows of other processes."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def world_size() -> int:
    """Number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def launched_world() -> tuple[int, int]:
    """(rank, world size) as torchrun announces them, also before the process group exists."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(timeout: timedelta, cuda: bool) -> Iterator[None]:
    """The group of all launched processes for the length of the block; nothing for one process, or inside a group.

    Args:
        timeout: how long a rank waits in a collective for the others before it fails.
        cuda: whether tensors travel between GPUs too; this process takes the one of its local rank.
    """
    number, world = launched_world()
    if world == 1 or dist.is_initialized():
        yield
        return
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, rank=number, world_size=world, timeout=timeout)
    yield
    # Not after an error: ranks that are gone would be waited for.
    dist.destroy_process_group()


def side_group(timeout: timedelta) -> Any:
    """A group of all ranks over gloo, whose collectives may run in a thread beside those of the others; None alone."""
    return dist.new_group(backend="gloo", timeout=timeout) if world_size() > 1 else None


def everyones(value: Any, group: Any = None) -> list[Any]:
    """What every rank has for `value`, in the order of ranks; a few facts, not tensors."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group)
    return values


def vote(flags: Sequence[bool], group: Any) -> Any:
    """Say something to all ranks without waiting for them; `outcome` tells later what any of them said."""
    said = torch.tensor(flags, dtype=torch.int32)
    return dist.all_reduce(said, dist.ReduceOp.MAX, group=group, async_op=True), said


def outcome(voted: Any) -> list[bool]:
    """For each flag of a `vote` whether any rank raised it."""
    work, said = voted
    work.wait()
    return [bool(flag) for flag in said]


def lost_another(error: BaseException) -> bool:
    """Whether an error says that another rank went away, or did not answer in time."""
    if world_size() == 1:
        return False
    told = str(error)
    return isinstance(error, dist.DistError) or any(
        sign in told for sign in ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "NCCL")
    )


def agree(counts: Sequence[int], what: str, device: torch.device, problem: str | None = None) -> list[list[int]]:
    """Every rank's `counts`, after all ranks have found that they are about to do the same thing.

    Args:
        counts: two at most, as many on every rank.
        what: a description of what is to be done, equal on all ranks.
        problem: what keeps this rank from doing it. To raise it here alone would leave the others waiting.

    Raises:
        ValueError: on every rank, if one has a problem or the descriptions differ.
    """
    if world_size() == 1:
        if problem is not None:
            raise ValueError(problem)
        return [list(counts)]
    mark = int.from_bytes(hashlib.sha256(what.encode()).digest()[:8], "big", signed=True)
    # Of one length, whatever each rank is about to do: else a disagreement would be a hang.
    padded = [*counts, 0, 0][:2]
    mine = torch.tensor([*padded, mark, problem is not None], dtype=torch.int64, device=device)
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    rows: list[list[int]] = torch.stack(parts).tolist()
    if any(row[-1] or row[-2] != mark for row in rows):
        said: list[Any] = [None] * len(rows)
        dist.all_gather_object(said, (what, problem))
        for index, (_, trouble) in enumerate(said):
            if trouble is not None:
                raise ValueError(trouble if index == rank() else f"on rank {index}: {trouble}")
        other = next(index for index, (text, _) in enumerate(said) if text != said[0][0])
        raise ValueError(f"ranks disagree: rank 0 has {said[0][0]}; rank {other} has {said[other][0]}")
    return [row[: len(counts)] for row in rows]


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
    @once_differentiable  # a second derivative would have to pass through the sum over ranks, and would be 1 / W of it
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Every rank computed the loss of the whole batch. The sum over ranks is W times the gradient of that loss,
        # and averaging over ranks, as DDP does with the parameters, takes the W away again.
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # autograd may hand it to others too
        dist.all_reduce(gradient)
        return torch.split(gradient, ctx.sizes)[dist.get_rank()], None


def gather(local: Tensor, sizes: list[int] | None = None) -> Tensor:
    """Rows of all ranks in the order of ranks, [sum of B, ...] from [B, ...] each; differentiable.

    Args:
        sizes: rows of each rank, where they are known already. Without a process group the tensor itself comes back.
    """
    if world_size() == 1:
        return local
    if sizes is None:
        sizes = [row[0] for row in agree([len(local)], "gather", local.device)]
    gathered: Tensor = _Gather.apply(local.contiguous(), sizes)
    return gathered


class _Total(torch.autograd.Function):
    """Sum over ranks whose backward is W times the rank's own share, which an average over ranks makes exact."""

    @staticmethod
    def forward(_: Any, share: Tensor) -> Tensor:
        total = share.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return gradient * dist.get_world_size()


def total(share: Tensor) -> Tensor:
    """The sum of every rank's share of a loss, on all ranks; its gradients follow the convention of `gather`."""
    if world_size() == 1:
        return share
    value: Tensor = _Total.apply(share)
    return value


def all_sum(value: Tensor) -> Tensor:
    """The sum over ranks, in place; no gradient."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def all_max(value: Tensor) -> Tensor:
    """The largest of all ranks, element by element, in place; no gradient."""
    if world_size() > 1:
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value


def all_logsumexp(value: Tensor) -> Tensor:
    """log(sum over ranks of exp(value)), element by element; no gradient."""
    if world_size() == 1:
        return value
    top = value.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX)
    finite = torch.where(top.isfinite(), top, torch.zeros_like(top))
    part = (value - finite).exp()
    dist.all_reduce(part)
    return part.log() + finite


class Shares:
    """The rows of every rank, each as soon as it has arrived; no gradient.

    Args:
        local: [B, ...] of this rank.
        sizes: rows of each rank.
    """

    def __init__(self, local: Tensor, sizes: Sequence[int]) -> None:
        self.sizes = sizes
        self._parts: list[tuple[Tensor, Any]] = []
        for source, size in enumerate(sizes):
            part = local.contiguous() if source == rank() else local.new_empty(size, *local.shape[1:])
            # All are under way before the first is used: work on the own rows hides the others' journey.
            moving = len(sizes) > 1 and size > 0
            self._parts.append((part, dist.broadcast(part, source, async_op=True) if moving else None))

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """(rank, its rows), own rows first."""
        me = rank()
        for source in (me, *(other for other in range(len(self.sizes)) if other != me)):
            part, work = self._parts[source]
            if work is not None and source != me:
                work.wait()
            yield source, part

    def close(self) -> None:
        """Wait until the own rows have left."""
        work = self._parts[rank()][1]
        if work is not None:
            work.wait()


class Returns:
    """What all ranks computed for each other's rows, summed where the rows are; no gradient."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes
        self._waiting: dict[int, Tensor] = {}
        self._next = 0
        self._under_way: list[tuple[Any, Tensor]] = []
        self._own: Tensor | None = None

    def send(self, owner: int, part: Tensor) -> None:
        """Hand over this rank's part for the rows of `owner`; every rank sends one to each."""
        self._waiting[owner] = part
        if owner == rank():
            self._own = part
        # Collectives must meet in one order, and every rank begins with its own rows: so the parts queue here.
        while self._next in self._waiting:
            part = self._waiting.pop(self._next)
            if len(self._sizes) > 1 and self._sizes[self._next] > 0:
                self._under_way.append((dist.reduce(part, self._next, async_op=True), part))
            self._next += 1

    def own(self) -> Tensor:
        """The sum over ranks for this rank's rows, when every part has been sent."""
        for work, _ in self._under_way:
            work.wait()
        assert self._own is not None
        return self._own
