"""How fast are they, and how much memory do they take, beside others?"""

import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medclip_lab.gpu_bench.cases import Call, Machine, Say, Sizes, clear, losses, make_inputs, products, step


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
    """Forward and backward of each loss; peers at some sizes."""
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
                    row["bytes"][who] = machine.peak(run)
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
