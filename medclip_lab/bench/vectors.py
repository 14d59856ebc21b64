"""Embeddings of images and reports that never were: two cones of clustered unit vectors, made block by block.

A study has a meaning, a point about the centre of its cluster; its image and its report are noisy views of it, each
moved to the side by what all of its modality share. That shift is the modality gap of CLIP-like models (Liang et al.
2022, "Mind the Gap"): a query of the other modality comes from where the index has nothing.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from medclip_lab.errors import UserError
from medclip_lab.files import atomic_folder, write_json
from medclip_lab.retrieval.embeddings import FORMAT, MANIFEST, MODALITIES, STATUS_SCHEMA, table_schema, write_part

BLOCK = 16_384


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What the vectors are like."""

    size: int
    dim: int
    seed: int = 0
    clusters: int = 500
    gap: float = 1.0
    """Length of a modality's shift, the views being of length 1."""
    spread: float = 1.0
    """Of meanings about the centre of their cluster, whose own length is 1."""
    noise: float = 0.8
    """Of a view about its meaning."""
    repeated: float = 0.0
    """Share of the studies whose report is that of an earlier one of their block, word for word."""

    def __post_init__(self) -> None:
        if min(self.size, self.dim, self.clusters) < 1 or not 0 <= self.repeated < 1:
            raise UserError(f"sizes must be at least 1 and repeated a share, got {self}")

    def blocks(self, size: int | None = None, part: int = 0) -> Iterator[dict[str, NDArray[np.float32]]]:
        """ "image" and "text", float32 [n, D] of unit norm, row by row of the same studies.

        Args:
            size: how many studies; None takes all.
            part: another number is other studies of the same clusters and cones, as fresh queries.
        """
        shared = np.random.default_rng([self.seed, 0])
        scale = 1 / np.sqrt(self.dim)

        def normal(rng: np.random.Generator, rows: int) -> NDArray[np.float32]:
            return rng.standard_normal((rows, self.dim), np.float32) * np.float32(scale)

        centres = normal(shared, self.clusters)
        shifts = {name: self.gap * normal(shared, 1) for name in MODALITIES}
        left = self.size if size is None else size
        for number in range(-(-left // BLOCK)):
            rng = np.random.default_rng([self.seed, 1 + part, number])
            rows = min(BLOCK, left - number * BLOCK)
            meaning = centres[rng.integers(self.clusters, size=rows)] + self.spread * normal(rng, rows)
            found = {
                name: _unit(_unit(meaning + self.noise * normal(rng, rows)) + shift) for name, shift in shifts.items()
            }
            copies = np.flatnonzero(rng.random(rows) < self.repeated)
            found["text"][copies] = found["text"][copies // 2]
            yield found

    def fresh(self, count: int) -> dict[str, NDArray[np.float32]]:
        """Queries that no index was built or tuned with."""
        return next(self.blocks(count, part=1))

    def write(self, folder: Path, bundle: str = "0" * 64) -> Path:
        """An embeddings folder with these vectors, a block a shard.

        Args:
            bundle: fingerprint of the one that made them, as it were.
        """
        empty = pa.Table.from_pylist([], STATUS_SCHEMA)
        with atomic_folder(folder) as made:
            names = []
            for number, arrays in enumerate(self.blocks()):
                stem = f"train-{number:05d}"
                names.append(f"{stem}.tar")
                (made / stem).mkdir()
                tables = {name: _table(name, number * BLOCK, values) for name, values in arrays.items()}
                write_part(made / stem, dict(arrays), tables, empty)
            facts = {"format": FORMAT, "bundle": bundle, "source": dict.fromkeys(names, ""), "samples": self.size}
            write_json(made / MANIFEST, facts | {"include_text": False, "texts": "report"})
        return folder


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def _table(modality: str, first: int, values: NDArray[np.float32]) -> pa.Table:
    rows: list[dict[str, Any]] = [
        {"study_id": f"study-{row}", "patient_id": f"patient-{row // 2}", "split": "train"}
        for row in range(first, first + len(values))
    ]
    for place, row in enumerate(rows):
        if modality == "image":
            row |= {"image": 0, "view": "PA"}
        else:
            key = hashlib.blake2b(values[place].tobytes(), digest_size=8).digest()
            row["text_key"] = int.from_bytes(key, "big", signed=True)
    return pa.Table.from_pylist(rows, table_schema(modality, False))
