"""Going on in the middle of a long epoch: seconds to the first batch, memory of a worker, what is lost or repeated."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

from medclip_lab.bench.machine import facts, memory_mib
from medclip_lab.bench.processes import why_failed
from medclip_lab.errors import UserError

SAMPLES_PER_SHARD = 1000
SIDE = 32  # small images: what is measured is finding them
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def bench_resume(samples: int = 1_000_000, batch: int = 64, say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Make shards of so many samples, and start a loader in the middle of their second epoch.

    A process of its own measures from the making of the stream to its first batch; the libraries are loaded before.
    Then the plan is asked for every row of that epoch, before and after the resume: each sample must come once.

    Args:
        samples: whole thousands, in shards of 1,000, beneath the folder for temporary files; 2.4 KB each.
        batch: samples of a batch.

    Raises:
        UserError: samples that fill no shard, or less than two batches.
    """
    if batch < 1 or samples < 2 * batch or samples % SAMPLES_PER_SHARD:
        raise UserError(
            f"bench resume: samples must be whole thousands and at least two batches, got {samples} and {batch}"
        )
    with tempfile.TemporaryDirectory(prefix="medclip-lab-bench-") as folder:
        start = time.perf_counter()
        _write(Path(folder), samples)
        if say is not None:
            say(f"{samples:,} samples written in {time.perf_counter() - start:.0f} s")
        job = json.dumps({"shards": folder, "samples": samples, "batch": batch})
        command = [sys.executable, "-W", "ignore", "-m", "medclip_lab.bench.resume", job]
        run = subprocess.run(command, capture_output=True, text=True, env=os.environ | ONE_THREAD)  # noqa: S603 - our own
        if run.returncode:
            raise RuntimeError(why_failed(run))
        found = json.loads(run.stdout.splitlines()[-1])
    return {
        "samples": samples,
        "batch": batch,
        **facts(("torch", "webdataset")),
        **found,
    }


def _write(folder: Path, samples: int) -> None:
    from PIL import Image

    from medclip_lab.data.index import index_path
    from medclip_lab.data.sample import Sample
    from medclip_lab.data.writing import shard_name, write_manifest, write_shard

    encoded = BytesIO()
    Image.linear_gradient("L").resize((SIDE, SIDE)).save(encoded, "PNG")
    images = [("png", encoded.getvalue())]
    names = [shard_name("train", number) for number in range(samples // SAMPLES_PER_SHARD)]
    first = folder / names[0]
    studies = (
        Sample(study_id=f"s{number}", patient_id=f"p{number}", split="train", images=images, text="No finding.")
        for number in range(SAMPLES_PER_SHARD)
    )
    written = write_shard(first, "train", studies)
    assert written is not None
    for name in names[1:]:  # what a sample is called is no matter here: it is told by its place
        shutil.copy(first, folder / name)
        shutil.copy(index_path(first), index_path(folder / name))
    write_manifest(folder, "bench", [replace(written, name=name) for name in names])


def main() -> None:
    """Measure what the JSON of the first argument asks for and print the result as JSON."""
    job = json.loads(sys.argv[1])
    import torch

    from medclip_lab.data.pipeline import BatchStream, DataConfig, SourceConfig
    from medclip_lab.data.preprocess import PreprocessConfig

    torch.set_num_threads(1)
    config = DataConfig(
        sources={"bench": SourceConfig(job["shards"])},
        batch_size=job["batch"],
        preprocess=PreprocessConfig(size=SIDE),
        workers=0,
    )
    epoch = job["samples"] // job["batch"]
    middle = epoch + epoch // 2

    def tokenizer(texts: list[str]) -> torch.Tensor:
        return torch.zeros(len(texts), 1, dtype=torch.int64)

    loaded = round(memory_mib(peak=True), 1)
    start = time.perf_counter()
    stream = BatchStream(config, tokenizer, 3 * epoch, start=middle)
    batches = iter(stream)
    first = next(batches)
    seconds = time.perf_counter() - start
    for _ in range(200):
        next(batches)
    peak = round(memory_mib(peak=True), 1)
    resumed = BatchStream(config, tokenizer, 3 * epoch, start=middle)
    order = resumed.plan.orders["bench"]
    # The rows of the second epoch: those of the run until the resume, and those of the resumed one after it.
    seen = bytearray(job["samples"])
    begin, end = order.per_lane, 2 * order.per_lane
    for step in range(begin // job["batch"], -(-end // job["batch"])):
        plan = (stream if step < middle else resumed).plan
        for row, index in zip(plan.rows(step), range(step * job["batch"], (step + 1) * job["batch"]), strict=True):
            if begin <= index < end:
                seen[row.place.shard * SAMPLES_PER_SHARD + row.place.sample] += 1
    result = {
        "window": config.shuffle_size,
        "first_batch_seconds": round(seconds, 3),
        "rows_of_the_first_batch": len(first["image"]),
        "peak_mib": peak,
        "peak_mib_before": loaded,
        "lost": seen.count(0),
        "repeated": sum(value > 1 for value in seen),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
