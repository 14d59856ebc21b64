"""Studies to a folder of shards, as they come: for tests and small things; `prepare` does it in parallel."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from medclip_lab.data.manifest import Manifest
from medclip_lab.data.sample import Sample
from medclip_lab.data.writing import write_all


def write_shards(
    samples: Iterable[Sample], folder: Path, source: str, samples_per_shard: int = 256, **facts: Any
) -> Manifest:
    """Write all `samples` and the manifest; returns the manifest."""
    write_all(samples, folder, source, samples_per_shard, **facts)
    return Manifest.load(folder)
