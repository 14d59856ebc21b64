"""Samples a second of our loader beside plain webdataset and open_clip's, on the same images, each on one core."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from medclip_lab.bench.data_shards import KINDS, Study, given, made, write
from medclip_lab.bench.machine import facts
from medclip_lab.bench.processes import why_failed
from medclip_lab.errors import UserError

SIDES = ("ours", "webdataset", "open_clip")
PACKAGES = ("torch", "torchvision", "open_clip_torch", "webdataset", "pillow", "numpy")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def bench_data(
    shards: Sequence[str | Path] = (),
    make: Sequence[str] = (),
    size: int = 224,
    batch: int = 64,
    samples: int = 512,
    repeats: int = 5,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Training batches of every set: samples a second, milliseconds of CPU a sample in each stage, peak memory, ratios.

    A process of its own for every repetition, the sides in turn, bound to the first core that this one may use.
    Both read the same shards from disk, decode, crop at random (area 0.9 to 1, aspect 3/4 to 4/3), resize, tokenize the
    same texts with the same tokenizer and batch; reading starts within the measured time. What is deeper than 8 bits is
    read as it is by ours and as 8-bit PNG by open_clip.

    Args:
        shards: folders of shards, read whatever their split.
        make: names of KINDS, sets of enlarged phantoms with grain.
        size: side of the square the tower would see.
        batch: samples of a batch.
        samples: of each set, at most; whole batches are counted.
        repeats: of each side.
        say: told of each result as it comes.

    Raises:
        UserError: nothing to read, sizes that make no batch, or a package that open_clip's loader needs is missing.
    """
    if not shards and not make:
        raise UserError(f"bench data: name --shards FOLDER or --make {'|'.join(KINDS)}")
    if unknown := [name for name in make if name not in KINDS]:
        raise UserError(f"bench data: no set is named {', '.join(unknown)}; there are {', '.join(KINDS)}")
    if min(size, batch, repeats) < 1 or samples < batch:
        raise UserError(
            f"bench data: sizes must be at least 1 and samples at least a batch, got size {size}, batch {batch}, "
            f"samples {samples}, repeats {repeats}"
        )
    if missing := [name for name in ("pandas", "ftfy") if find_spec(name) is None]:
        raise UserError(
            f"bench data: open_clip's loader needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )
    cases: dict[str, Any] = {}
    for name, studies in _sets(shards, make, samples):
        with tempfile.TemporaryDirectory(prefix="medclip-lab-bench-") as folder:
            cases[name] = _case(studies, Path(folder), size, batch, repeats)
        if say is not None:
            say(line(name, cases[name]))
    return {
        "size": size,
        "batch": batch,
        "repeats": repeats,
        **facts(PACKAGES),
        "cores": 1,
        "cases": cases,
    }


def line(name: str, case: dict[str, Any]) -> str:
    """One line of what was measured."""
    speed, low_high = case["samples_per_second"], case["ratio_spread"]
    return (
        f"{name:<12} {speed['ours']:8.0f} samples/s, open_clip {speed['open_clip']:6.0f}: "
        f"{case['ratio']:.2f} times ({low_high[0]:.2f} to {low_high[1]:.2f}), "
        f"by CPU time {case['ratio_of_cpu_time']:.2f}; plain webdataset with our decoding {speed['webdataset']:.0f} "
        f"({case['ratio_to_plain_webdataset']:.3f}); "
        f"peak {case['peak_mib']['ours']:.0f} and {case['peak_mib']['open_clip']:.0f} MiB"
    )


def table(result: dict[str, Any]) -> str:
    """Every set's line, and the stages of both sides beneath."""
    lines = []
    for name, case in result["cases"].items():
        lines.append(line(name, case))
        for side, spent in case["stage_ms"].items():
            stages = ", ".join(f"{stage} {value:.2f}" for stage, value in spent.items())
            lines.append(f"  CPU ms a sample, {side:<10} {stages}")
    return "\n".join(lines)


def _sets(shards: Sequence[str | Path], make: Sequence[str], samples: int) -> Iterator[tuple[str, Iterator[Study]]]:
    for name in make:
        yield name, made(KINDS[name], samples)
    for folder in shards:
        yield Path(folder).name, given(folder, samples)


def _case(studies: Iterator[Study], folder: Path, size: int, batch: int, repeats: int) -> dict[str, Any]:
    paths = {"ours": folder / "ours", "webdataset": folder / "ours", "open_clip": folder / "open_clip"}
    samples, image_bytes, copied = write(studies, paths["ours"], paths["open_clip"])
    if samples < batch:
        raise UserError(f"bench data: {samples} images do not fill a batch of {batch}: lower --batch")
    job = {"size": size, "batch": batch, "samples": samples}
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number in range(repeats):
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            own = {"side": side, "shards": str(paths[side]), "seed": number, "stages": number == 0}
            runs[side].append(_run(job | own))
    speeds = {side: [run["samples"] / run["seconds"] for run in runs[side]] for side in SIDES}
    ratios = [ours / theirs for ours, theirs in zip(speeds["ours"], speeds["open_clip"], strict=True)]
    plain = [ours / theirs for ours, theirs in zip(speeds["ours"], speeds["webdataset"], strict=True)]
    return {
        "samples": samples,
        "image_bytes": round(image_bytes),
        "open_clip_reads": "8-bit PNG copies" if copied else "the same shards",
        "batches": {side: runs[side][0]["batch"] for side in SIDES},
        "runs": {side: [round(speed, 1) for speed in values] for side, values in speeds.items()},
        "samples_per_second": {side: round(statistics.median(values), 1) for side, values in speeds.items()},
        "ratio": round(statistics.median(ratios), 2),
        "ratio_spread": [round(min(ratios), 2), round(max(ratios), 2)],
        "ratio_of_cpu_time": round(_cpu(runs["open_clip"]) / _cpu(runs["ours"]), 2),
        "ratio_to_plain_webdataset": round(statistics.median(plain), 3),
        "ratio_to_plain_webdataset_of_cpu_time": round(_cpu(runs["webdataset"]) / _cpu(runs["ours"]), 3),
        "stage_ms": {side: run[0]["stage_ms"] for side, run in runs.items() if "stage_ms" in run[0]},
        "peak_mib": {side: max(run["peak_mib"] for run in runs[side]) for side in SIDES},
    }


def _cpu(runs: list[dict[str, Any]]) -> float:
    """Seconds of CPU a sample, which other work on the same core disturbs less than the clock's."""
    return float(statistics.median(run["cpu_seconds"] / run["samples"] for run in runs))


def _run(job: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "medclip_lab.bench.loaders", json.dumps(job)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | ONE_THREAD)  # noqa: S603 - our own
    if run.returncode:
        raise RuntimeError(f"{job['side']}: {why_failed(run)}")
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result
