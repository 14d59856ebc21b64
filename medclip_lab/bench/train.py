"""Samples a second of our trainer beside a bare loop over the same parts and beside open_clip's trainer."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from medclip_lab.bench.data_shards import KINDS, given, made, write
from medclip_lab.bench.machine import facts
from medclip_lab.bench.processes import why_failed
from medclip_lab.errors import UserError

SIDES = ("train", "bare", "open_clip")
PACKAGES = ("torch", "torchvision", "open_clip_torch", "lightning", "webdataset", "pillow")
WARM_UP = 11  # steps that are not counted: buffers fill, memory is taken, the first reading (step 10) opens its logs


@dataclass(frozen=True)
class Case:
    """What is trained, on what."""

    spec: dict[str, Any]
    kind: str
    batch: int
    steps: int
    save_every: int = 10**6
    """Steps between checkpoints."""


def _spec(width: int, layers: int, patch: int, text_layers: int) -> dict[str, Any]:
    """An open_clip model config that both sides take as it is: a ViT and CLIP's text tower."""
    vision = {"image_size": 224, "layers": layers, "width": width, "head_width": 64, "patch_size": patch}
    text = {"context_length": 77, "vocab_size": 49408, "width": width, "heads": width // 64, "layers": text_layers}
    return {"embed_dim": width, "vision_cfg": vision, "text_cfg": text}


CASES = {
    "data-bound": Case(_spec(64, 2, 32, 1), "1024-jpeg", 64, 71),
    "compute-bound": Case(_spec(384, 12, 16, 12), "320-jpeg", 8, 31),
}
"""A tower so small that it waits for its images, and ViT-S/16 as open_clip has it."""
SAVING = Case(_spec(384, 12, 16, 12), "320-jpeg", 4, 41, save_every=10)
"""What a checkpoint costs: of ViT-S/16 with a few rows a step, so that there are steps enough."""


def bench_train(
    only: Sequence[str] = (),
    shards: str | Path | None = None,
    samples: int = 512,
    repeats: int = 3,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train the same model on the same images with the same loss on the CPU, in float32; samples a second and ratios.

    A process of its own for every repetition, the sides in turn, each with one loader process. Counted is the time
    from the twelfth step to the last: whole rounds of ten, with their readings.

    The case "saving" is ours alone: what a checkpoint, written in the background, costs the steps beside it.

    Args:
        only: names of CASES, or "saving"; all if empty.
        shards: a folder of shards for the compute-bound case; else enlarged phantoms of the same size are made.
        samples: in the shards of a case; steps that want more go round.
        repeats: of each side.
        say: told of each result as it comes.

    Raises:
        UserError: an unknown case, too few samples, or a package that open_clip's trainer needs is missing.
    """
    known = (*CASES, "saving")
    if unknown := [name for name in only if name not in known]:
        raise UserError(f"bench train: no case is named {', '.join(unknown)}; there are {', '.join(known)}")
    if repeats < 1 or samples < max(case.batch for case in CASES.values()):
        raise UserError(f"bench train: repeats must be at least 1 and samples a batch, got {repeats} and {samples}")
    if missing := [name for name in ("pandas", "ftfy") if find_spec(name) is None]:
        raise UserError(
            f"bench train: open_clip's loader needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )
    cases = {}
    for name in only or known:
        with tempfile.TemporaryDirectory(prefix="medclip-lab-bench-") as folder:
            if name == "saving":
                cases[name] = _saving(Path(folder), repeats)
            else:
                given_too = shards if name == "compute-bound" else None
                kind = KINDS[CASES[name].kind]
                own = given(given_too, samples) if given_too else made(kind, samples)
                cases[name] = _measure(CASES[name], own, Path(folder), repeats)
            if say is not None:
                say(line(name, cases[name]))
    return {
        "repeats": repeats,
        **facts(PACKAGES),
        "cases": cases,
    }


def line(name: str, case: dict[str, Any]) -> str:
    """One line of what was measured."""
    if name == "saving":
        return (
            f"{name:<14} {case['seconds_a_save']:.2f} s a checkpoint of {case['mib']:.0f} MiB, steps of "
            f"{case['seconds_a_step']:.2f} s: {case['share_at_100_steps']:.2%} at one every 100 steps"
        )
    speed, cpu = case["samples_per_second"], case["cpu_seconds_a_step"]
    return (
        f"{name:<14} {speed['train']:7.2f} samples/s, bare loop {speed['bare']:.2f} "
        f"({case['ratio_to_bare']:.3f}), open_clip's trainer {speed['open_clip']:.2f} "
        f"({case['ratio_to_open_clip']:.2f} times); by CPU time of a step, loader apart, "
        f"{cpu['bare'] / cpu['train']:.3f} and {cpu['open_clip'] / cpu['train']:.2f}"
    )


def table(result: dict[str, Any]) -> str:
    """Every case's line."""
    return "\n".join(line(name, case) for name, case in result["cases"].items())


def _measure(case: Case, studies: Any, folder: Path, repeats: int) -> dict[str, Any]:
    samples, image_bytes, _ = write(studies, folder / "ours", folder / "theirs")
    write_model(case.spec, folder / "model")
    speeds: dict[str, list[float]] = {side: [] for side in SIDES}
    spent: dict[str, list[float]] = {side: [] for side in SIDES}
    peaks: dict[str, float] = dict.fromkeys(SIDES, 0.0)
    for number in range(repeats):
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            run = run_side(side, case, folder)
            counted = len(run["moments"]) - 1 - WARM_UP
            seconds, cpu = (
                last - first for first, last in zip(run["moments"][WARM_UP], run["moments"][-1], strict=True)
            )
            speeds[side].append(case.batch * counted / seconds)
            spent[side].append(cpu / counted)
            peaks[side] = max(peaks[side], run["peak_mib"])
    to_bare, to_theirs = (
        [ours / other for ours, other in zip(speeds["train"], speeds[side], strict=True)]
        for side in ("bare", "open_clip")
    )
    return {
        "samples": samples,
        "image_bytes": round(image_bytes),
        "batch": case.batch,
        "steps": case.steps,
        "runs": {side: [round(speed, 2) for speed in values] for side, values in speeds.items()},
        "samples_per_second": {side: round(statistics.median(values), 2) for side, values in speeds.items()},
        "ratio_to_bare": round(statistics.median(to_bare), 3),
        "ratio_to_open_clip": round(statistics.median(to_theirs), 2),
        "spread": {
            name: [round(min(ratios), 3), round(max(ratios), 3)]
            for name, ratios in (("bare", to_bare), ("open_clip", to_theirs))
        },
        "cpu_seconds_a_step": {side: round(statistics.median(values), 4) for side, values in spent.items()},
        "peak_mib": peaks,
    }


def _saving(folder: Path, repeats: int) -> dict[str, Any]:
    write(made(KINDS[SAVING.kind], 8 * SAVING.batch), folder / "ours", folder / "theirs")
    write_model(SAVING.spec, folder / "model")
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    for number in range(repeats):
        for side in ("with", "without") if number % 2 == 0 else ("without", "with"):
            case = SAVING if side == "with" else replace(SAVING, save_every=10**6)
            moments = run_side("train", case, folder)["moments"]
            seconds[side].append((moments[-1][0] - moments[WARM_UP][0]) / (len(moments) - 1 - WARM_UP))
    step = statistics.median(seconds["without"])
    a_save = statistics.median(
        SAVING.save_every * (with_it - without) for with_it, without in zip(*seconds.values(), strict=True)
    )
    weights = (folder / "model" / "open_clip_model.safetensors").stat().st_size
    return {
        "batch": SAVING.batch,
        "steps": SAVING.steps,
        "save_every": SAVING.save_every,
        "mib": round(3 * weights / 2**20, 1),  # and two moments of each
        "runs": {side: [round(value, 4) for value in values] for side, values in seconds.items()},
        "seconds_a_step": round(step, 4),
        "seconds_a_save": round(a_save, 3),
        "share_at_100_steps": round(a_save / (100 * step), 4),
    }


def write_model(spec: dict[str, Any], folder: Path) -> None:
    """A random model as a folder that both sides open, with the same weights and open_clip's own tokenizer."""
    from safetensors.torch import save_model

    from medclip_lab.data.preprocess import PreprocessConfig
    from medclip_lab.files import write_json
    from medclip_lab.models.spec import build_spec

    folder.mkdir()
    preprocess = PreprocessConfig(size=spec["vision_cfg"]["image_size"]).open_clip()
    write_json(
        folder / "open_clip_config.json", {"model_cfg": spec | {"custom_text": True}, "preprocess_cfg": preprocess}
    )
    save_model(build_spec(spec), str(folder / "open_clip_model.safetensors"))


def run_side(side: str, case: Case, folder: Path) -> dict[str, Any]:
    """What one contestant measured, in a process of its own, on the shards and the model in a folder."""
    job = {
        "side": side,
        "shards": str(folder / "ours"),
        "their_shards": str(folder / "theirs"),
        "model": str(folder / "model"),
        "size": case.spec["vision_cfg"]["image_size"],
        "batch": case.batch,
        "steps": case.steps,
        "save_every": case.save_every,
    }
    command = [sys.executable, "-W", "ignore", "-m", "medclip_lab.bench.trainers", json.dumps(job)]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)  # noqa: S603 - our own
    if run.returncode:
        raise RuntimeError(f"{side}: {why_failed(run)}")
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result
