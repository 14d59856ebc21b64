"""What is measured, on what, and with which inputs."""

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from medclip_lab.errors import UserError
from medclip_lab.losses import ClipLoss, MultiPositiveClipLoss, SigLipLoss, SoftTargetClipLoss
from medclip_lab.losses.base import PairLoss

LABELS, MANY_LABELS, PRESENT = 14, 40, 0.1
SPREAD = 100
"""Dimensions of trained features."""
Call = Callable[[dict[str, Tensor]], Tensor]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    correct: Sequence[tuple[int, int]] = ((1, 8), (127, 96), (4039, 520), (4096, 512), (4096, 768), (4096, 1152))
    speed: Sequence[tuple[int, int]] = (
        (8192, 512),
        (8192, 768),
        (8192, 1152),
        (32768, 512),
        (32768, 768),
        (32768, 1152),
        (32711, 768),
        (131072, 768),
    )
    peers: Sequence[tuple[int, int]] = ((8192, 768), (32768, 768))
    memory: Sequence[tuple[int, int]] = ((32768, 768), (131072, 768))
    largest: tuple[int, int] | None = (2**20, 768)
    rate: int = 8192
    repeats: int = 30
    seconds: float = 2.0
    """For the repetitions of one call, at most."""
    only: Sequence[str] = ()
    """Names of losses; empty takes all."""

    @classmethod
    def of(cls, batch: int | None, dim: int | None, repeats: int | None, only: Sequence[str]) -> Self:
        """One batch and dim where they are given.

        Raises:
            UserError: sizes below 1.
        """
        given = {"batch": batch, "dim": dim, "repeats": repeats}
        if wrong := {name: value for name, value in given.items() if value is not None and value < 1}:
            raise UserError(f"sizes must be at least 1, got {', '.join(f'{n} {value}' for n, value in wrong.items())}")
        sizes = cls(only=only, repeats=repeats or cls.repeats)
        if batch is None and dim is None:
            return sizes
        one = ((batch or 32768, dim or 768),)
        return replace(sizes, speed=one, peers=one, memory=one)


TINY = Sizes(
    correct=((5, 8), (40, 24)),
    speed=((64, 16),),
    peers=((64, 16),),
    memory=((64, 16),),
    largest=(128, 16),
    rate=64,
    repeats=2,
)


@dataclass
class Machine:
    """Where it runs: a CUDA device, or the CPU for a rehearsal."""

    device: str
    impl: str
    flush: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.device == "cuda":
            # Larger than any level-two cache: what a call finds there is not what the last one left.
            self.flush = torch.empty(2**28, dtype=torch.int8, device="cuda")

    def seconds(self, call: Callable[[], object]) -> float:
        if self.flush is None:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        self.flush.zero_()
        torch.cuda._sleep(5_000_000)  # type: ignore[no-untyped-call] # 2.5 ms, in which Python queues what is timed
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record()
        call()
        last.record()
        torch.cuda.synchronize()
        return float(first.elapsed_time(last)) / 1e3

    def peak(self, call: Callable[[], object]) -> int | None:
        """Bytes allocated at the peak beyond those before; None where nobody counts."""
        if self.device != "cuda":
            call()
            return None
        clear()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)


def clear() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def losses(impl: str, only: Sequence[str] = ()) -> dict[str, PairLoss]:
    """The losses that have fused kernels.

    Raises:
        UserError: one of `only` is none of them.
    """
    known = {
        "SigLipLoss": SigLipLoss(impl=impl),
        "SigLipLoss, ids": SigLipLoss("text", "patient", impl=impl),
        "ClipLoss": ClipLoss(impl=impl),
        "MultiPositiveClipLoss": MultiPositiveClipLoss("text", impl=impl),
        "SoftTargetClipLoss": SoftTargetClipLoss(target_temperature=0.1, impl=impl),
        "SoftTargetClipLoss, ignore": SoftTargetClipLoss(target_temperature=0.1, unmentioned="ignore", impl=impl),
        f"SoftTargetClipLoss, {MANY_LABELS} labels": SoftTargetClipLoss(target_temperature=0.1, impl=impl),
    }
    if unknown := [name for name in only if name not in known]:
        raise UserError(f"no loss is named {'; '.join(unknown)}; there are {'; '.join(known)}")
    return {name: known[name] for name in only or known}


def products(name: str) -> int:
    """Products of N x N x D that value and gradients need at least."""
    return 3 if name.startswith("SigLip") else 4


def make_inputs(
    rows: int, dim: int, machine: Machine, name: str, trained: bool = False, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Features of unit norm rounded to `dtype`, scale, bias, ids and labels; the same every time.

    Args:
        trained: pairs have a cosine near 0.3, others 0 give or take 0.1, and the scale is 100; else features are
            independent, as at the start.
    """
    generator = torch.Generator(device=machine.device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=machine.device)

    image, text = F.normalize(draw(rows, dim), dim=1), F.normalize(draw(rows, dim), dim=1)
    if trained and dim > SPREAD:
        # Unit vectors of a subspace: cosines of strangers spread by 0.1, and the loss is not nothing.
        basis = torch.linalg.qr(draw(dim, SPREAD)).Q.T
        image, text = (F.normalize(draw(rows, SPREAD), dim=1) @ basis for _ in range(2))
    sigmoid = name.startswith("SigLip")
    scale, bias = (10.0, -10.0) if sigmoid else (1 / 0.07, 0.0)
    if trained:
        text = F.normalize(0.3 * image + math.sqrt(1 - 0.3**2) * text, dim=1)
        scale, bias = 100.0, -12.0 if sigmoid else 0.0
    given = {"image_features": image, "text_features": text}
    given = {key: value.to(dtype).requires_grad_() for key, value in given.items()}
    for key, number in (("logit_scale", scale), ("logit_bias", bias)):
        given[key] = torch.tensor(number, device=machine.device, requires_grad=True)
    for key in ("text_ids", "patient_ids"):
        given[key] = torch.randint(0, max(2, rows // 2), (rows,), generator=generator, device=machine.device)
    for key in ("image_labels", "text_labels"):
        many = MANY_LABELS if name.endswith(" labels") else LABELS
        chance = torch.rand(rows, many, generator=generator, device=machine.device)
        given[key] = torch.where(chance < PRESENT, 1.0, torch.where(chance > 0.6, math.nan, 0.0))
    return given


def arguments(loss: PairLoss, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of the inputs a loss takes."""
    names = ("image_features", "text_features", "logit_scale", "logit_bias", *loss.inputs)
    return {name: given[name] for name in names}


def step(loss: PairLoss, given: dict[str, Tensor], grad_output: float = 1.0) -> Tensor:
    for value in given.values():
        value.grad = None
    found: Tensor = loss(**arguments(loss, given))
    torch.autograd.backward(found, torch.full_like(found, grad_output))
    return found.detach()
