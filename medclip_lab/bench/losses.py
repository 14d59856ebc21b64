"""Losses beside named peers: forward and backward, seconds and memory, in one run on one machine."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medclip_lab.bench.drawing import draw
from medclip_lab.bench.machine import facts
from medclip_lab.bench.processes import why_failed
from medclip_lab.errors import UserError
from medclip_lab.evaluation.charts import BarRow
from medclip_lab.inference.bundle import versions
from medclip_lab.losses import ClipLoss, SigLipLoss, SoftTargetClipLoss, functional

LABELS, PRESENT = 14, 0.1
TARGET_TEMPERATURE = 0.1
Call = Callable[[dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Contest:
    """One loss, ours and a peer's."""

    ours: Call
    peer: Call
    peer_name: str
    scale: float
    bias: float


def contests() -> dict[str, Contest]:
    """What is compared, by the name of our loss."""
    import open_clip
    from open_clip.loss import ClipLoss as OpenClip
    from open_clip.loss import SigLipLoss as OpenSigLip

    named = f"open_clip {open_clip.__version__}"
    clip, siglip = ClipLoss(impl="chunked"), SigLipLoss(impl="chunked")
    soft = SoftTargetClipLoss(impl="chunked", target_temperature=TARGET_TEMPERATURE)
    their_clip, their_siglip = OpenClip(), OpenSigLip()

    def features(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return given["image"], given["text"], given["scale"]

    def dense(given: dict[str, Tensor]) -> Tensor:
        similar = functional.label_similarity(given["image_labels"], given["text_labels"], "cosine")
        scores = functional.logits(*features(given))
        return functional.soft_target_loss(scores, similar, TARGET_TEMPERATURE)[0]

    def labelled(given: dict[str, Tensor]) -> Tensor:
        labels = {name: given[name] for name in ("image_labels", "text_labels")}
        value: Tensor = soft(*features(given), **labels)
        return value

    def pairs(loss: Any, with_bias: bool) -> Call:
        def call(given: dict[str, Tensor]) -> Tensor:
            value: Tensor = loss(*features(given), given["bias"]) if with_bias else loss(*features(given))
            return value

        return call

    return {
        "SigLipLoss": Contest(pairs(siglip, True), pairs(their_siglip, True), f"{named} SigLipLoss", 10.0, -10.0),
        "ClipLoss": Contest(pairs(clip, False), pairs(their_clip, False), f"{named} ClipLoss", 1 / 0.07, 0.0),
        "SoftTargetClipLoss": Contest(labelled, dense, "dense formula in torch", 1 / 0.07, 0.0),
    }


def _inputs(contest: Contest, batch: int, dim: int, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    given = {name: F.normalize(torch.randn(batch, dim, generator=generator), dim=1) for name in ("image", "text")}
    given |= {"scale": torch.tensor(contest.scale), "bias": torch.tensor(contest.bias)}
    leaves = {name: value.to(device).requires_grad_() for name, value in given.items()}
    labels = {
        name: (torch.rand(batch, LABELS, generator=generator) < PRESENT).float().to(device)
        for name in ("image_labels", "text_labels")
    }
    return leaves | labels


def _step(call: Call, given: dict[str, Tensor]) -> None:
    for value in given.values():
        value.grad = None
    torch.autograd.backward(call(given))


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def bench_losses(
    batch: int = 8192,
    dim: int = 768,
    device: str = "cpu",
    repeats: int = 5,
    only: Sequence[str] | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Forward and backward of each loss beside its peer: interleaved repetitions, median seconds, peak memory.

    Memory is what a step takes at its peak beyond inputs and gradients: on the CPU of a process of its own (Linux),
    on a GPU as torch's allocator counts it.

    Args:
        batch, dim: N and D of float32 features of unit norm.
        device: "cpu" or "cuda".
        repeats: timed repetitions of each, after one that is not counted.
        only: names of losses; None takes all.
        say: told of each result as it comes.

    Raises:
        UserError: no such loss or device, or sizes below 1.
    """
    known = contests()
    chosen = list(only or known)
    if unknown := [name for name in chosen if name not in known]:
        raise UserError(f"no loss is named {', '.join(unknown)}; there are {', '.join(known)}")
    if min(batch, dim, repeats) < 1:
        raise UserError(f"sizes must be at least 1, got batch {batch}, dim {dim}, repeats {repeats}")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"no device {device!r} on this machine")
    results: dict[str, Any] = {}
    for name in chosen:
        contest = known[name]
        given = _inputs(contest, batch, dim, device)
        seconds: dict[str, list[float]] = {"ours": [], "peer": []}
        for number in range(repeats + 1):
            for side in seconds:
                start = time.perf_counter()
                _step(getattr(contest, side), given)
                _wait(device)
                if number:
                    seconds[side].append(time.perf_counter() - start)
        del given
        memory = {side: _peak(name, side, batch, dim, device) for side in seconds}
        medians = {side: statistics.median(values) for side, values in seconds.items()}
        results[name] = {
            "peer": contest.peer_name,
            "seconds": {side: [round(value, 4) for value in values] for side, values in seconds.items()},
            "median_seconds": {side: round(value, 4) for side, value in medians.items()},
            "speed_ratio": round(medians["peer"] / medians["ours"], 2),
            "peak_mib": memory,
            "memory_share": round(memory["ours"] / memory["peer"], 4) if memory["peer"] else None,
        }
        line = (
            f"{name}: {medians['ours']:.3g} s, {contest.peer_name} {medians['peer']:.3g} s "
            f"({results[name]['speed_ratio']:.2f} times its speed); {memory['ours']:.0f} and {memory['peer']:.0f} MiB"
        )
        if say is not None:
            say(line)
    return {
        "batch": batch,
        "dim": dim,
        "device": device,
        **facts(),
        **({"machine": torch.cuda.get_device_name()} if device == "cuda" else {}),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "losses": results,
    }


def _peak(name: str, side: str, batch: int, dim: int, device: str) -> float:
    """MiB at the peak of a step beyond its inputs and gradients, measured in a process of its own."""
    code = f"from medclip_lab.bench.losses import _measure; _measure({name!r}, {side!r}, {batch}, {dim}, {device!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)  # noqa: S603 - our own words
    if run.returncode:
        raise RuntimeError(why_failed(run))
    return float(json.loads(run.stdout))


def _measure(name: str, side: str, batch: int, dim: int, device: str) -> None:
    contest = contests()[name]
    call = getattr(contest, side)
    _step(call, _inputs(contest, 32, dim, device))  # libraries are loaded and threads started
    given = _inputs(contest, batch, dim, device)
    outputs = 2 * batch * dim * 4
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _step(call, given)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the highest mark so far
        _step(call, given)
        peak = _status("VmHWM") - before
    print(json.dumps(round(max(0, peak - outputs) / 2**20, 1)))


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def draw_losses(result: dict[str, Any], path: Path) -> None:
    """Write a drawing of `bench_losses`' result, SVG: seconds and memory, ours and the peer's."""
    title = f"Forward and backward, {result['batch']:,} x {result['dim']} float32 features, {result['device']}"
    wanted = (
        ("Seconds, median", "median_seconds", "{:.2f} s"),
        ("Memory at the peak, beyond inputs and gradients", "peak_mib", "{:,.0f} MiB"),
    )
    panels = []
    for head, key, form in wanted:
        rows = []
        for name, entry in result["losses"].items():
            for css, side, label in (("c1", "ours", name), ("c2", "peer", entry["peer"])):
                value = entry[key][side]
                note = form.format(value)
                rows.append(BarRow(name=label, parts=[(css, value, f"{label}: {note}")], note=note))
        panels.append((head, rows))
    draw(title, panels, path)
