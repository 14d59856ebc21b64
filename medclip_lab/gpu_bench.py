"""The fused losses on a GPU: are they right, how fast are they, how much memory do they take.

Every figure is measured in the run that tells it; a peer that is not installed is said to be so. Needs no
more than torch and Triton.
"""

import gc
import importlib
import importlib.metadata
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from medclip_lab.doctor import commit
from medclip_lab.errors import UserError
from medclip_lab.losses import ClipLoss, MultiPositiveClipLoss, SigLipLoss, SoftTargetClipLoss
from medclip_lab.losses.base import Batch, PairLoss

LABELS, PRESENT = 14, 0.1
SPREAD = 100
"""Dimensions of trained features."""
TOLERANCES = {"loss": 1e-6, "gradient": 3e-3, "row": 1e-2, "cosine": 0.99999, "scalar": 1e-5}
"""Relative error of the loss; relative L2 of both towers' gradients; worst row; least cosine of the gradients; error of
the gradients of scale and bias over the sum of the absolute values of their terms. Asked of bfloat16; features of
float16 are rounded once more before the products with the slopes, and a pair alone has no others to average with."""
SLACK = 10
"""What misses its tolerance by less is rounding; by more, a fault."""
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
        chance = torch.rand(rows, LABELS, generator=generator, device=machine.device)
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


def correctness(machine: Machine, sizes: Sizes, say: Say) -> list[dict[str, Any]]:
    """Each loss against the dense formula in float64 on the same rounded features."""
    rows: list[dict[str, Any]] = []
    for name, loss in losses(machine.impl, sizes.only).items():
        for batch, dim in sizes.correct:
            for trained in (False, True):
                for dtype in (torch.bfloat16, torch.float16):
                    given = make_inputs(batch, dim, machine, name, trained, dtype)
                    entry: dict[str, Any] = {"loss": name, "batch": batch, "dim": dim}
                    entry["dtype"] = str(dtype).removeprefix("torch.")
                    entry["inputs"] = "trained" if trained else "initial"
                    try:
                        rows.append(entry | _errors(loss, given))
                    except Exception as error:  # what else there is to learn should still be learnt
                        rows.append(entry | _failed(error))
        mine = [row for row in rows if row["loss"] == name]
        fine = all(row["right"] for row in mine)
        say(f"{name}: {'right' if fine else 'WRONG'}, gradients within {max(row['gradient'] for row in mine):.1e}")
        clear()
    return rows


def _failed(error: Exception) -> dict[str, Any]:
    numbers = dict.fromkeys(("loss_error", "gradient", "row", "scalar"), math.inf)
    return {
        **numbers,
        "cosine": -1.0,
        "holds": False,
        "right": False,
        "error": f"{type(error).__name__}: {error}"[:500],
    }


def _errors(loss: PairLoss, given: dict[str, Tensor]) -> dict[str, Any]:
    found = step(loss, given)
    got = {name: value.grad.double() for name, value in given.items() if value.grad is not None}
    features = ("image_features", "text_features")
    wide = {name: value.detach().double() if value.is_floating_point() else value for name, value in given.items()}
    leaves = {name: wide[name].requires_grad_() for name in (*features, "logit_scale", "logit_bias")}
    image, text, scale, bias = leaves.values()
    cosines = image @ text.T
    logits = scale * cosines + (bias if loss.uses_bias else 0.0)
    inputs = {name: wide[name] for name in loss.inputs}
    batch = Batch(image, text, scale, bias, inputs, [len(image)], [len(text)])
    value = loss.reference(logits, batch)["contrastive_loss"]
    (slopes,) = torch.autograd.grad(value, logits, retain_graph=True)
    truth = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values()), allow_unused=True), strict=True))
    value = value.detach()
    scale = scale.detach()
    errors: dict[str, Any] = {"loss_error": float(abs(found - value) / abs(value).clamp_min(1e-12))}
    size = {name: float(truth[name].norm()) for name in features}
    # Of a batch of one a softmax has no gradient: then what is left is rounding.
    floor = 1e-7 * float(scale)
    errors["gradient"] = max(float((got[n] - truth[n]).norm()) / max(size[n], floor) for n in features)
    row = max(float(truth[n].norm(dim=1).max()) for n in features)
    errors["row"] = max(float((got[n] - truth[n]).norm(dim=1).max()) for n in features) / max(row, floor)
    errors["cosine"] = min(
        float(F.cosine_similarity(got[n].flatten(), truth[n].flatten(), dim=0)) if size[n] > floor else 1.0
        for n in features
    )
    terms = {"logit_scale": float((slopes * cosines.detach()).abs().sum()), "logit_bias": float(slopes.abs().sum())}
    errors["scalar"] = max(abs(float(got[n] - truth[n])) / max(terms[n], 1e-12) for n in terms if truth[n] is not None)
    finite = all(bool(gradient.isfinite().all()) for gradient in got.values())
    small = abs(float(value)) < 1e-3  # a loss of nearly nothing is the difference of two large numbers
    limits = {"loss_error": "loss", "gradient": "gradient", "row": "row", "scalar": "scalar"}
    worst = max(errors[name] / TOLERANCES[limit] for name, limit in limits.items())
    if small and abs(float(found - value)) <= TOLERANCES["loss"]:
        worst = max(errors[name] / TOLERANCES[limit] for name, limit in limits.items() if name != "loss_error")
    worst = max(worst, (1 - errors["cosine"]) / (1 - TOLERANCES["cosine"]))
    errors["holds"], errors["right"] = finite and worst <= 1, finite and worst <= SLACK
    return errors


def behaviour(machine: Machine, sizes: Sizes, repeats: int = 20) -> dict[str, dict[str, bool]]:
    """What must hold whatever the size: the same bits every run, gradients that scale, frozen towers, NaN comes out."""
    found = {}
    for name, loss in losses(machine.impl, sizes.only).items():
        try:
            found[name] = _behaviour(name, loss, machine, *sizes.correct[-1], repeats)
        except Exception as error:
            found[name] = {f"{type(error).__name__}: {error}"[:200]: False}
    return found


def _behaviour(name: str, loss: PairLoss, machine: Machine, batch: int, dim: int, repeats: int) -> dict[str, bool]:
    given = make_inputs(batch, dim, machine, name)
    leaves = [given[key] for key in ("image_features", "text_features", "logit_scale")]
    first = step(loss, given)
    kept = [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]
    same = True
    for _ in range(repeats):
        again = step(loss, given)
        same &= torch.equal(first, again) and all(map(torch.equal, kept, (leaf.grad for leaf in leaves)))  # type: ignore[arg-type]
    scaled = True
    for factor in (1e-3, 65536.0):
        step(loss, given, factor)
        pairs = zip(leaves, kept, strict=True)
        scaled &= all(torch.allclose(a.grad.float(), factor * b.float(), rtol=1e-2) for a, b in pairs)  # type: ignore[union-attr]
    with torch.no_grad():
        value = loss(**arguments(loss, given))
    frozen = make_inputs(batch, dim, machine, name)
    frozen["image_features"] = frozen["image_features"].detach()
    step(loss, frozen)
    thawed = frozen["text_features"].grad
    broken = {key: value.detach() for key, value in make_inputs(batch, dim, machine, name).items()}
    broken["text_features"][batch // 2, dim // 2] = math.nan
    return {
        "same bits": same,
        "gradients scale": scaled,
        "value without gradients": bool((value - first).abs() <= 1e-6 * first.abs()),
        "frozen tower": thawed is not None and torch.equal(thawed, kept[1]),
        "NaN comes out": not bool(loss(**arguments(loss, broken)).isfinite()),
    }


def matrix_rate(machine: Machine, size: int) -> float:
    """FLOP/s of a square product of random bfloat16 matrices, warm: the ceiling of this run."""
    a, b = (torch.randn(size, size, device=machine.device).bfloat16() for _ in range(2))
    repeats = 500 if machine.device == "cuda" else 10  # on a GPU long enough for its clocks to settle
    times = [machine.seconds(lambda: a @ b) for _ in range(repeats)]
    return 2 * size**3 / statistics.median(times[repeats // 2 :])


def peers() -> dict[str, dict[str, Call | str]]:
    """Other implementations of SigLIP and InfoNCE by name; a word in place of one that is not there."""

    def dense(loss: str) -> Call:
        def call(given: dict[str, Tensor]) -> Tensor:
            images, texts = given["image_features"], given["text_features"]
            logits = given["logit_scale"].to(images.dtype) * images @ texts.T
            if loss == "SigLipLoss":
                signs = 2 * torch.eye(len(logits), device=logits.device, dtype=logits.dtype) - 1
                return -F.logsigmoid(signs * (logits + given["logit_bias"].to(logits.dtype))).sum() / len(logits)
            target = torch.arange(len(logits), device=logits.device)
            return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

        return call

    def theirs(loss: str) -> Call | str:
        try:
            module = importlib.import_module("open_clip.loss")
        except ImportError:
            return "not installed"
        made = getattr(module, "SigLipLoss" if loss == "SigLipLoss" else "ClipLoss")()

        def call(given: dict[str, Tensor]) -> Tensor:
            dtype = given["image_features"].dtype
            scalars = [given["logit_scale"].to(dtype)]
            if loss == "SigLipLoss":
                scalars.append(given["logit_bias"].to(dtype))
            value: Tensor = made(given["image_features"], given["text_features"], *scalars)
            return value

        return call

    table: dict[str, dict[str, Call | str]] = {}
    for loss in ("SigLipLoss", "ClipLoss"):
        table[loss] = {}
        for maker, name in ((theirs, "open_clip"), (dense, "dense torch")):
            made = maker(loss)
            table[loss][name] = made
            table[loss][f"{name}, compiled"] = made if isinstance(made, str) else torch.compile(made, dynamic=False)
    return table


def _timed(machine: Machine, calls: dict[str, Callable[[], object]], sizes: Sizes) -> dict[str, dict[str, float] | str]:
    """Median, 10th and 90th percentile in seconds of interleaved repetitions; a word for what cannot run."""
    found: dict[str, dict[str, float] | str] = {}
    able = {}
    for name, call in calls.items():
        try:
            for _ in range(3):
                call()
            once = machine.seconds(call)
            able[name] = call, max(3, min(sizes.repeats, int(sizes.seconds / max(once, 1e-6))))
        except torch.OutOfMemoryError:
            found[name] = "out of memory"
        except Exception as error:  # a peer's fault is no reason to lose the other figures
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}" if str(error) else repr(error)
        if isinstance(found.get(name), str):
            clear()
    times: dict[str, list[float]] = {name: [] for name in able}
    for turn in range(max((many for _, many in able.values()), default=0)):
        for name, (call, many) in able.items():
            if turn < many:
                times[name].append(machine.seconds(call))
    for name, values in times.items():
        ordered = sorted(values)
        tenth = len(ordered) // 10
        found[name] = {
            "median": statistics.median(ordered),
            "p10": ordered[tenth],
            "p90": ordered[-1 - tenth],
            "repeats": len(ordered),
        }
    return found


def speed(machine: Machine, sizes: Sizes, say: Say) -> list[dict[str, Any]]:
    """Forward and backward of each loss; peers at some sizes; the library's products alone, which are the floor."""
    rows = []
    others = peers()
    for batch, dim in sizes.speed:
        for name, loss in losses(machine.impl, sizes.only).items():
            if "ignore" in name and (batch, dim) not in sizes.peers:
                continue
            given = make_inputs(batch, dim, machine, name)
            calls: dict[str, Callable[[], object]] = {"ours": lambda loss=loss, given=given: step(loss, given)}  # type: ignore[misc]
            words: dict[str, str] = {}
            if name in others and (batch, dim) in sizes.peers:
                for peer, call in others[name].items():
                    if peer.endswith("compiled") and (batch, dim) != sizes.peers[-1]:
                        continue  # compiling takes longer than all that is timed
                    if isinstance(call, str):
                        words[peer] = call
                    else:
                        calls[peer] = lambda call=call, given=given: _step_peer(call, given)  # type: ignore[misc]
            row: dict[str, Any] = {"loss": name, "batch": batch, "dim": dim, "products": products(name)}
            row["seconds"] = _timed(machine, calls, sizes) | words
            ours = row["seconds"]["ours"]
            if isinstance(ours, dict):
                row["flops"] = 2 * products(name) * batch * batch * dim / ours["median"]
                say(f"{name} {batch:,} x {dim}: {1e3 * ours['median']:.3g} ms, {row['flops'] / 1e12:.3g} TFLOP/s")
            else:
                say(f"{name} {batch:,} x {dim}: {ours}")
            rows.append(row)
            del given, calls
            clear()
    return rows


def _step_peer(call: Call, given: dict[str, Tensor]) -> None:
    for value in given.values():
        value.grad = None
    torch.autograd.backward(call(given))


def memory(machine: Machine, sizes: Sizes, say: Say) -> list[dict[str, Any]]:
    """Bytes at the peak of a step beyond the inputs; the gradients that are returned are among them."""
    rows = []
    others = peers()
    for batch, dim in sizes.memory:
        for name, loss in losses(machine.impl, sizes.only).items():
            if "," in name:
                continue
            given = make_inputs(batch, dim, machine, name)
            calls: dict[str, Callable[[], object]] = {"ours": lambda loss=loss, given=given: step(loss, given)}  # type: ignore[misc]
            eager = others.get(name, {}).get("dense torch")
            if eager is not None and not isinstance(eager, str):
                calls["dense torch"] = lambda call=eager, given=given: _step_peer(call, given)  # type: ignore[misc]
            row: dict[str, Any] = {"loss": name, "batch": batch, "dim": dim, "bytes": {}}
            for who, run in calls.items():
                try:
                    run()  # what a first call allocates for good is not counted
                    for value in given.values():
                        value.grad = None
                    peak = machine.peak(run)
                    row["bytes"][who] = peak
                except torch.OutOfMemoryError:
                    row["bytes"][who] = "out of memory"
                clear()
            rows.append(row)
            say(f"{name} {batch:,} x {dim}: {row['bytes']}")
            del given, calls
            clear()
    return rows


def largest(machine: Machine, sizes: Sizes, say: Say) -> dict[str, Any] | None:
    """One step of the sigmoid loss of a batch no matrix of pairs would fit."""
    if sizes.largest is None:
        return None
    batch, dim = sizes.largest
    loss = losses(machine.impl)["SigLipLoss"]
    given = make_inputs(batch, dim, machine, "SigLipLoss")
    found: dict[str, Any] = {"loss": "SigLipLoss", "batch": batch, "dim": dim}
    try:
        start = time.perf_counter()
        found["peak_bytes"] = machine.peak(lambda: step(loss, given))
        found["seconds"] = time.perf_counter() - start
        gradient = given["image_features"].grad
        found["finite"] = gradient is not None and bool(gradient.isfinite().all())
    except torch.OutOfMemoryError:
        found["seconds"] = "out of memory"
    say(f"largest: {found}")
    return found


def _commit() -> str | None:
    try:
        return commit()
    except OSError:  # no git here
        return None


def facts(machine: Machine) -> dict[str, Any]:
    """Hardware and versions."""

    def installed(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    told: dict[str, Any] = {
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": machine.device,
        "impl": machine.impl,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "versions": {name: installed(name) for name in ("torch", "triton", "open_clip_torch")},
    }
    if machine.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        told["gpu"] = properties.name
        told["capability"] = f"{properties.major}.{properties.minor}"
        told["memory_gib"] = round(properties.total_memory / 2**30, 1)
        told["processors"] = properties.multi_processor_count
        told["cuda"] = torch.version.cuda
    return told


def measure(
    device: str = "cuda", impl: str = "fused", sizes: Sizes | None = None, say: Say = print, parts: Sequence[str] = ()
) -> Iterator[tuple[str, Any]]:
    """Each part of the report as soon as it is there: "facts", "correctness", "behaviour", "matrix_rate", "speed", ...

    Args:
        device: "cuda", or "cpu" for a rehearsal with another `impl`.
        parts: which; all by default.

    Raises:
        UserError: no such device.
    """
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"no device {device!r} on this machine")
    sizes = sizes or Sizes()
    machine = Machine(device, impl)
    makers: dict[str, Callable[[], Any]] = {
        "correctness": lambda: correctness(machine, sizes, say),
        "behaviour": lambda: behaviour(machine, sizes),
        "matrix_rate": lambda: matrix_rate(machine, sizes.rate),
        "speed": lambda: speed(machine, sizes, say),
        "memory": lambda: memory(machine, sizes, say),
        "largest": lambda: largest(machine, sizes, say),
    }
    if unknown := [part for part in parts if part not in makers]:
        raise UserError(f"no part is named {', '.join(unknown)}; there are {', '.join(makers)}")
    yield "facts", facts(machine)
    for name, make in makers.items():
        if not parts or name in parts:
            start = time.perf_counter()
            yield name, make()
            say(f"{name}: {time.perf_counter() - start:.0f} s")
            clear()


def markdown(result: dict[str, Any]) -> str:
    """The report as tables."""
    told = result["facts"]
    where = told.get("gpu", told["device"])
    lines = [f"# Fused losses on {where}", ""]
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    lines += [f"Commit {told['commit']}, {told['date']}; {versions}, Python {told['python']}.", ""]
    rate = result.get("matrix_rate")
    if rate:
        lines += [f"Matrix rate of this run: {rate / 1e12:.4g} TFLOP/s (square product, {told['device']}).", ""]
    if "correctness" in result:
        lines += ["## Right?", "", "| loss | cases | loss error | gradient | worst row | scale and bias | holds |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for name in dict.fromkeys(row["loss"] for row in result["correctness"]):
            rows = [row for row in result["correctness"] if row["loss"] == name]
            worst = [max(row[key] for row in rows) for key in ("loss_error", "gradient", "row", "scalar")]
            holds = sum(row["holds"] for row in rows)
            lines.append(
                f"| {name} | {len(rows)} | {' | '.join(f'{value:.1e}' for value in worst)} | {holds} of {len(rows)} |"
            )
        lines.append("")
    if "behaviour" in result:
        names = list(next(iter(result["behaviour"].values())))
        lines += [f"| loss | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        for loss, checks in result["behaviour"].items():
            marks = ["yes" if checks.get(name) else "NO" for name in names]
            failed = "" if set(checks) == set(names) else " " + "; ".join(checks)
            lines.append(f"| {loss}{failed} | {' | '.join(marks)} |")
        lines.append("")
    if "speed" in result:
        lines += ["## Forward and backward", "", "| loss | batch x dim | ms (p10-p90) | TFLOP/s | of the matrix rate |"]
        lines += ["|---|---|---|---|---|"]
        for row in result["speed"]:
            ours = row["seconds"]["ours"]
            head = f"| {row['loss']} | {row['batch']:,} x {row['dim']} |"
            if isinstance(ours, str):
                lines.append(f"{head} {ours} | | |")
                continue
            share = f"{row['flops'] / rate:.0%}" if rate else ""
            lines.append(
                f"{head} {1e3 * ours['median']:.3g} ({1e3 * ours['p10']:.3g}-{1e3 * ours['p90']:.3g}) | "
                f"{row['flops'] / 1e12:.3g} | {share} |"
            )
        lines += ["", "| loss | batch x dim | peer | ms | times slower than ours |", "|---|---|---|---|---|"]
        for row in result["speed"]:
            ours = row["seconds"]["ours"]
            for peer, value in row["seconds"].items():
                if peer == "ours":
                    continue
                head = f"| {row['loss']} | {row['batch']:,} x {row['dim']} | {peer} |"
                if isinstance(value, str) or isinstance(ours, str):
                    lines.append(f"{head} {value if isinstance(value, str) else ''} | |")
                else:
                    ratio = value["median"] / ours["median"]
                    lines.append(f"{head} {1e3 * value['median']:.3g} | {ratio:.2f} |")
        lines.append("")
    if "memory" in result:
        lines += [
            "## Memory at the peak beyond the inputs",
            "",
            "| loss | batch x dim | ours | dense torch |",
        ]
        lines += ["|---|---|---|---|"]
        for row in result["memory"]:
            cells = [_gib(row["bytes"].get(who)) for who in ("ours", "dense torch")]
            lines.append(f"| {row['loss']} | {row['batch']:,} x {row['dim']} | {' | '.join(cells)} |")
        lines.append("")
    if result.get("largest"):
        top = result["largest"]
        seconds = top["seconds"] if isinstance(top["seconds"], str) else f"{top['seconds']:.3g} s"
        lines += [f"Largest batch tried: {top['batch']:,} x {top['dim']}, {top['loss']}: {seconds}.", ""]
    return "\n".join(lines)


def _gib(value: Any) -> str:
    if isinstance(value, int):
        return f"{value / 2**30:.3g} GiB"
    return "" if value is None else str(value)
