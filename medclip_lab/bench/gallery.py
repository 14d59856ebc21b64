"""Ranks over a full gallery in a process of its own, which holds the features and nothing else that is large."""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medclip_lab.bench.processes import why_failed

KS = (1, 5, 10)
NOISE = 0.25
"""Of each dimension of a text, beside its image's: about every second query then finds its own first."""


def features(samples: int, dim: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Images and texts [N, D] of unit norm; a text is its image and noise."""
    rng = np.random.default_rng(0)
    images = _unit(rng.standard_normal((samples, dim), dtype=np.float32))
    return images, _unit(images + NOISE * rng.standard_normal((samples, dim), dtype=np.float32))


def bench_gallery(samples: int = 100_000, dim: int = 512) -> dict[str, Any]:
    """R@1, 5, 10 both ways of so many images and texts: seconds, and peak memory beyond the features."""
    with tempfile.TemporaryDirectory(prefix="medclip-lab-bench-") as folder:
        for name, rows in zip(("images", "texts"), features(samples, dim), strict=True):
            np.save(Path(folder) / f"{name}.npy", rows)
        command = [sys.executable, "-W", "ignore", "-m", "medclip_lab.bench.gallery", folder]
        run = subprocess.run(command, capture_output=True, text=True, env=os.environ)  # noqa: S603 - our own
        if run.returncode:
            raise RuntimeError(why_failed(run))
        found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return {"samples": samples, "dim": dim, **found}


def main() -> None:
    """Rank the features in the folder of the first argument and print the result as JSON."""
    from medclip_lab.bench.machine import memory_mib
    from medclip_lab.evaluation.retrieval import retrieval

    images, texts = (np.load(Path(sys.argv[1]) / f"{name}.npy") for name in ("images", "texts"))
    groups = [str(number) for number in range(len(images))]
    before = memory_mib()
    start = time.perf_counter()
    found = retrieval(images, texts, groups, groups, KS)
    seconds = time.perf_counter() - start
    result = {
        "seconds": round(seconds, 2),
        "features_gib": round((images.nbytes + texts.nbytes) / 2**30, 3),
        "peak_gib_beyond_features": round((memory_mib(peak=True) - before) / 1024, 3),
        "image_to_text": asdict(found[0]),
        "text_to_image": asdict(found[1]),
    }
    print(json.dumps(result))


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


if __name__ == "__main__":
    main()
