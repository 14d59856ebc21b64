"""What an index is built of: vectors of a modality, those held out as queries, and copies told from originals."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from medclip_lab.errors import UserError
from medclip_lab.retrieval.embeddings import MODALITIES, TOLERANCE, Embeddings, Files, Floats, Rows, Vectors
from medclip_lab.retrieval.recall import Queries
from medclip_lab.retrieval.withdrawn import Withdrawn

HELD_OUT = 1000
"""Queries of each direction, at most."""


class Chosen:
    """Some rows of vectors, in ascending order."""

    def __init__(self, vectors: Vectors, rows: Rows) -> None:
        self.vectors, self.rows = vectors, rows
        self.dim = vectors.dim

    def __len__(self) -> int:
        return len(self.rows)

    def blocks(self, first: int = 0, last: int | None = None) -> Iterator[tuple[int, Floats]]:
        rows = self.rows[first:last]
        if not len(rows):
            return
        for start, block in self.vectors.blocks(int(rows[0]), int(rows[-1]) + 1):
            here, there = np.searchsorted(rows, (start, start + len(block)))
            if there > here:
                yield first + int(here), np.ascontiguousarray(block[rows[here:there] - start])

    def take(self, rows: Rows) -> Floats:
        return self.vectors.take(self.rows[rows])


class Joined:
    """Vectors of several folders, one after the other."""

    def __init__(self, several: Sequence[Vectors]) -> None:
        self.several = list(several)
        self.dim = self.several[0].dim
        self.starts = np.cumsum([0, *(len(vectors) for vectors in self.several)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def blocks(self, first: int = 0, last: int | None = None) -> Iterator[tuple[int, Floats]]:
        last = len(self) if last is None else last
        for here, vectors in zip(self.starts.tolist(), self.several, strict=False):
            begin, end = max(first - here, 0), min(last - here, len(vectors))
            if begin < end:
                for start, block in vectors.blocks(begin, end):
                    yield here + start, block

    def take(self, rows: Rows) -> Floats:
        numbers = np.searchsorted(self.starts, rows, "right") - 1
        found = np.empty((len(rows), self.dim), np.float32)
        for number in np.unique(numbers):
            chosen = numbers == number
            found[chosen] = self.several[number].take(rows[chosen] - self.starts[number])
        return found


@dataclass(frozen=True)
class Groups:
    """Rows that share a vector. A search finds vectors; what it answers with are their rows."""

    starts: Rows
    """[U + 1] where the members of each vector begin."""
    members: Rows
    """[N] rows of the table, by vector."""

    def of(self, vector: int) -> Rows:
        return self.members[self.starts[vector] : self.starts[vector + 1]]

    @classmethod
    def each_alone(cls, order: Rows) -> "Groups":
        return cls(np.arange(len(order) + 1), order)


def joined(folders: Sequence[Embeddings], modality: str) -> Vectors:
    """The vectors of several embeddings folders.

    Raises:
        UserError: folders of different bundles or widths, or one without this modality.
    """
    for folder in folders[1:]:
        if folder.manifest["bundle"] != folders[0].manifest["bundle"]:
            raise UserError(f"embeddings: {folder.folder} is of another bundle than {folders[0].folder}: embed again")
    if len(folders) > 1:
        digests = [digest for folder in folders for digest in folder.digests(modality)]
        if len(set(digests)) < len(digests):
            raise UserError("embeddings: two of the folders hold the same shard: name each once, or all is found twice")
    several: list[Files] = [folder.vectors(modality) for folder in folders]
    for folder, vectors in zip(folders, several, strict=True):
        if vectors.dim != several[0].dim:
            raise UserError(f"embeddings: {folder.folder} has {vectors.dim} dimensions, not {several[0].dim}")
    return several[0] if len(several) == 1 else Joined(several)


def keys(folders: Sequence[Embeddings], modality: str, vectors: Vectors) -> NDArray[np.int64]:
    """[N] numbers that are equal for copies: of the words of a text, of the bytes of an image's vector."""
    if modality == "text":
        files = [path for folder in folders for path in folder.paths(modality, "parquet")]
        return np.concatenate([pq.read_table(path, columns=["text_key"])["text_key"].to_numpy() for path in files])
    found = np.empty(len(vectors), np.int64)
    for start, block in vectors.blocks():
        for row, vector in enumerate(block, start):
            found[row] = int.from_bytes(hashlib.blake2b(vector.tobytes(), digest_size=8).digest(), "big", signed=True)
    return found


def copies(found: NDArray[np.int64], vectors: Vectors) -> Rows:
    """[N] the row each row is a copy of; an original is its own.

    A row is a copy of the first with its key, if their vectors agree as well as float16 does: texts that differ in case
    or punctuation alone are copies where the model sees no difference.
    """
    _, firsts, inverse = np.unique(found, return_index=True, return_inverse=True)
    original = firsts[inverse]
    repeated = np.flatnonzero(original != np.arange(len(original)))
    size = max(1, 2**22 // vectors.dim)
    for start in range(0, len(repeated), size):
        rows = repeated[start : start + size]
        distance = np.linalg.norm(vectors.take(rows) - vectors.take(original[rows]), axis=1)
        original[rows] = np.where(distance <= TOLERANCE, original[rows], rows)
    return np.asarray(original, np.int64)


@dataclass
class Gallery:
    """Vectors in the order in which an index will hold them, those that ask while it is measured at the end."""

    main: Chosen
    held_out: Chosen
    groups: Groups
    queries: dict[str, Queries]

    @property
    def size(self) -> int:
        return len(self.main) + len(self.held_out)

    @property
    def dim(self) -> int:
        return self.main.dim


def make_gallery(
    folders: Sequence[Embeddings],
    modality: str,
    directions: Sequence[str] | None,
    dedup: bool,
    seed: int,
    withdrawn: Withdrawn | None = None,
) -> Gallery:
    """The vectors of a modality, with queries of every direction held out.

    Some studies leave the index while it is measured, and ask: their vectors train nothing, cannot find themselves, and
    what asks from the other modality does not find its own pair, which is nearer than anything a stranger finds.

    Args:
        directions: modalities that will ask; None takes those that the embeddings hold.
        dedup: hold one vector for copies.
        withdrawn: studies none of whose rows is in it, nor asks.

    Raises:
        UserError: no such vectors, or none but those of withdrawn studies; a direction without vectors, different
            bundles.
    """
    vectors, studies = joined(folders, modality), _studies(folders, modality)
    copied = keys(folders, modality, vectors) if dedup else None
    if withdrawn:
        staying = np.flatnonzero(withdrawn.stays(studies.to_pylist()))
        if not len(staying):
            raise UserError("index: all rows of the embeddings are of studies that were removed from this index")
        vectors, studies = Chosen(vectors, staying), studies.take(pa.array(staying))
        copied = None if copied is None else copied[staying]
    original = np.arange(len(vectors)) if copied is None else copies(copied, vectors)
    unique = np.flatnonzero(original == np.arange(len(original)))
    rng = np.random.default_rng(seed)
    names, held = _hold_out(studies, unique, rng)
    main = np.setdiff1d(unique, held, assume_unique=True)
    queries = {}
    for direction in _directions(folders, directions):
        asked = vectors if direction == modality else joined(folders, direction)
        rows = held if direction == modality else np.flatnonzero(pc.is_in(_studies(folders, direction), names))
        if not len(rows):  # a corpus of fewer than ten has nobody to spare, and modalities may have no study in common
            rows = np.arange(len(asked))
            if withdrawn:
                rows = np.flatnonzero(withdrawn.stays(_studies(folders, direction).to_pylist()))
        rows = np.sort(rng.choice(rows, min(HELD_OUT, len(rows)), replace=False))
        queries[direction] = Queries(direction, asked.take(rows))
    order = np.concatenate([main, held])
    place = np.empty(len(vectors), np.int64)
    place[order] = np.arange(len(order))
    vector_of = place[original]
    members = np.argsort(vector_of, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(vector_of, minlength=len(order)))])
    return Gallery(Chosen(vectors, main), Chosen(vectors, held), Groups(starts, members), queries)


def _studies(folders: Sequence[Embeddings], modality: str) -> pa.Array:
    paths = [path for folder in folders for path in folder.paths(modality, "parquet")]
    return pa.concat_tables(pq.read_table(path, columns=["study_id"]) for path in paths)["study_id"].combine_chunks()


def _hold_out(studies: pa.Array, unique: Rows, rng: np.random.Generator) -> tuple[pa.Array, Rows]:
    """Some studies, and those of the unique rows that are theirs: about `HELD_OUT`, at most a tenth of all."""
    chosen = rng.choice(unique, min(HELD_OUT, len(unique) // 10), replace=False)
    names = studies.take(pa.array(chosen)).unique()
    held = unique[np.asarray(pc.is_in(studies, names))[unique]]
    # Where a few studies are most of a corpus, their rows go one by one.
    return names, held if len(held) <= len(unique) // 5 else np.sort(chosen)


def _directions(folders: Sequence[Embeddings], directions: Sequence[str] | None) -> list[str]:
    there = [name for name in MODALITIES if all(folder.count(name) for folder in folders)]
    for name in directions or ():
        if name not in MODALITIES:
            raise UserError(f"queries: {name!r} is no modality, one of {', '.join(MODALITIES)} expected")
        if name not in there:
            raise UserError(
                f"queries: the embeddings hold no {name} vectors to measure with: embed {name}s too, or leave it out"
            )
    return list(directions or there)
