"""A folder of embeddings: a finished shard is a folder in it, vectors and what their rows are side by side.

embeddings/manifest.json            what was embedded, by which bundle, how
embeddings/<shard>/shard.json       rows, statuses, sha256 of the files beside it
embeddings/<shard>/<modality>.npy   float16 or float32 [N, D], unit norm
embeddings/<shard>/<modality>.parquet   N rows: study, patient, which image or sentence
embeddings/<shard>/status.parquet   a row for everything that should have been embedded: "ok", or why not
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from medclip_lab.errors import UserError
from medclip_lab.files import LFS, read_json, sha256, write_json

FORMAT = "medclip-lab-embeddings/2"
MANIFEST, SHARD, STATUS = "manifest.json", "shard.json", "status.parquet"
MODALITIES = ("image", "text")
KEPT = ("study_id", "patient_id", "split", "sex", "age", "study_date")
"""Of a study's record: whatever of it is there, as text."""
STATUS_SCHEMA = pa.schema(
    [
        ("number", pa.int32()),
        ("key", pa.string()),
        ("modality", pa.string()),
        ("part", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
    ]
)
"""Place in the shard; key; then which image or text of it, by the same name as in the tables."""
BLOCK_BYTES = 16 * 2**20
"""Of float32 vectors that are in memory at a time."""
TOLERANCE = 2e-3
"""How far from 1 a norm may be: that of float16."""
Floats = NDArray[np.float32]
Rows = NDArray[np.int64]


class Vectors(Protocol):
    """Rows of unit vectors that need not fit in memory."""

    @property
    def dim(self) -> int: ...
    def __len__(self) -> int: ...

    def blocks(self, first: int = 0, last: int | None = None) -> Iterator[tuple[int, Floats]]:
        """(number of the first row, float32 [n, D]) of the rows from `first` to before `last`; None means all."""
        ...

    def take(self, rows: Rows) -> Floats:
        """float32 [len(rows), D] of some rows, in the order asked for."""
        ...


def block_rows(dim: int) -> int:
    return max(1, BLOCK_BYTES // (4 * dim))


class Arrays:
    """Vectors in memory."""

    def __init__(self, values: Floats) -> None:
        self.values = values
        self.dim = int(values.shape[1])

    def __len__(self) -> int:
        return len(self.values)

    def blocks(self, first: int = 0, last: int | None = None) -> Iterator[tuple[int, Floats]]:
        size, last = block_rows(self.dim), len(self) if last is None else last
        for start in range(first, last, size):
            yield start, self.values[start : min(start + size, last)]

    def take(self, rows: Rows) -> Floats:
        return np.asarray(self.values[rows], np.float32)


class Files:
    """Vectors in `.npy` files, one after the other. They are read, not mapped: mapped pages count as memory taken.

    Raises:
        UserError: a file is no matrix of float16 or float32, or widths differ.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        headers = [_header(path) for path in self.paths]
        self.starts = np.cumsum([0, *(rows for rows, _, _, _ in headers)])
        self.dim = headers[0][1]
        self._layout = [(dtype, offset) for _, _, dtype, offset in headers]
        for path, (_, dim, _, _) in zip(self.paths, headers, strict=True):
            if dim != self.dim:
                raise UserError(f"embeddings: {path} has {dim} dimensions, {self.paths[0]} has {self.dim}")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def blocks(self, first: int = 0, last: int | None = None) -> Iterator[tuple[int, Floats]]:
        """As `Vectors.blocks`.

        Raises:
            UserError: vectors that are not finite or not of norm 1.
        """
        size, last = block_rows(self.dim), len(self) if last is None else last
        for number, path in enumerate(self.paths):
            here = int(self.starts[number])
            begin, end = max(first, here), min(last, int(self.starts[number + 1]))
            if begin >= end:
                continue
            dtype, offset = self._layout[number]
            with path.open("rb") as file:
                file.seek(offset + (begin - here) * self.dim * dtype.itemsize)
                for start in range(begin, end, size):
                    count = (min(start + size, end) - start) * self.dim
                    values = np.fromfile(file, dtype, count).reshape(-1, self.dim)
                    block = np.ascontiguousarray(values, np.float32)
                    check_unit(block, f"embeddings: {path}", "embed again")
                    yield start, block

    def take(self, rows: Rows) -> Floats:
        found = np.empty((len(rows), self.dim), np.float32)
        numbers = np.searchsorted(self.starts, rows, "right") - 1
        for number in np.unique(numbers):
            dtype, offset = self._layout[number]
            chosen = np.flatnonzero(numbers == number)
            values = np.empty((len(chosen), self.dim), dtype)
            with self.paths[number].open("rb", buffering=0) as file:
                places = offset + (rows[chosen] - self.starts[number]) * (self.dim * dtype.itemsize)
                for value, place in zip(values, places.tolist(), strict=True):
                    file.seek(place)
                    file.readinto(value.data)
            found[chosen] = values
        return found


def _header(path: Path) -> tuple[int, int, np.dtype[Any], int]:
    """(rows, dimensions, dtype, offset of the first value)."""
    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        raise UserError(f"embeddings: {path} is no .npy file of numbers: embed again") from None
    if mapped.ndim != 2 or mapped.dtype not in (np.float16, np.float32) or not mapped.flags.c_contiguous:
        raise UserError(f"embeddings: {path} holds {mapped.dtype} {mapped.shape}, no float16 or float32 [N, D]")
    return mapped.shape[0], mapped.shape[1], mapped.dtype, getattr(mapped, "offset", 0)


def check_unit(vectors: Floats, what: str, way_out: str) -> None:
    """Refuse vectors that are not finite or not of norm 1: faiss takes both in silence.

    Raises:
        UserError: there are such.
    """
    norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    if not (np.abs(norms - 1) <= TOLERANCE).all():
        raise UserError(f"{what} has vectors that are not finite with norm 1: {way_out}")


class Embeddings:
    """Finished embeddings whose files are those that were written.

    Raises:
        UserError: no embeddings, another format, an unfinished folder, a file missing or changed since.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.manifest = read_json(self.folder / MANIFEST, "embeddings")
        if self.manifest.get("format") != FORMAT:
            raise UserError(
                f"embeddings: {self.folder} has format {self.manifest.get('format')!r}, not {FORMAT!r}: embed again"
            )
        self.stems = sorted(Path(name).stem for name in self.manifest["source"])
        missing = [stem for stem in self.stems if not (self.folder / stem / SHARD).exists()]
        if missing:
            raise UserError(
                f"embeddings: {self.folder} is not finished ({missing[0]} is missing): call embed again to go on"
            )
        self.shards = {stem: read_json(self.folder / stem / SHARD, "embeddings") for stem in self.stems}
        for stem, facts in self.shards.items():
            for name, expected in facts["sha256"].items():
                check_file(self.folder / stem / name, expected, "embeddings", "embed again")

    def count(self, modality: str) -> int:
        return sum(int(facts["rows"].get(modality, 0)) for facts in self.shards.values())

    def paths(self, modality: str, suffix: str) -> list[Path]:
        """Files of one modality that have rows, in the order of the shards."""
        stems = [stem for stem in self.stems if self.shards[stem]["rows"].get(modality)]
        return [self.folder / stem / f"{modality}.{suffix}" for stem in stems]

    def vectors(self, modality: str) -> Files:
        """
        Raises:
            UserError: there are none of this modality.
        """
        paths = self.paths(modality, "npy")
        if not paths:
            raise UserError(f"embeddings: {self.folder} has no {modality} embeddings")
        return Files(paths)

    def digests(self, modality: str) -> list[str]:
        """SHA-256 of the files of `vectors`."""
        return [str(self.shards[path.parent.name]["sha256"][path.name]) for path in self.paths(modality, "npy")]

    def table(self, modality: str) -> pa.Table:
        """What the rows of `vectors` are, in the same order."""
        return pa.concat_tables(pq.read_table(path) for path in self.paths(modality, "parquet"))


def check_file(path: Path, expected: str, what: str, way_out: str, size: int | None = None) -> None:
    """Refuse a file that is not the one that was written, before anyone reads it.

    Raises:
        UserError: missing, a pointer of Git LFS, or of another size or content.
    """
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(LFS)) == LFS.encode():
                raise UserError(f"{what}: {path} is a pointer of Git LFS, not the file itself: run git lfs pull")
    if not path.is_file() or size not in (None, path.stat().st_size) or sha256(path) != expected:
        raise UserError(f"{what}: {path} is missing or was changed since it was written: {way_out}")


def write_part(
    folder: Path, arrays: dict[str, NDArray[Any]], tables: dict[str, pa.Table], status: pa.Table
) -> dict[str, Any]:
    """Fill the folder of a shard; returns what its `shard.json` says."""
    for modality, values in arrays.items():
        assert len(values) == tables[modality].num_rows
        np.save(folder / f"{modality}.npy", values, allow_pickle=False)
        pq.write_table(tables[modality], folder / f"{modality}.parquet")
    pq.write_table(status, folder / STATUS)
    causes = [cause for cause in status["status"].to_pylist() if cause != "ok"]
    facts = {
        "rows": {modality: len(values) for modality, values in arrays.items()},
        "quarantined": {cause: causes.count(cause) for cause in sorted(set(causes))},
        "sha256": {path.name: sha256(path) for path in sorted(folder.iterdir())},
    }
    write_json(folder / SHARD, facts)
    return facts


def table_schema(modality: str, include_text: bool) -> pa.Schema:
    """Of the table beside the vectors of a modality."""
    columns: list[tuple[str, pa.DataType]] = [(name, pa.string()) for name in KEPT]
    columns.append(("labels", pa.map_(pa.string(), pa.int8())))
    if modality == "image":
        columns += [("image", pa.int32()), ("view", pa.string())]
    else:
        columns += [("part", pa.string()), ("text_key", pa.int64())]
    if include_text:
        columns.append(("text", pa.string()))
    return pa.schema(columns)
