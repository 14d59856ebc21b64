"""Filtered search in FAISS: few rows are compared with one by one, many are selected while the index is searched.

An index walks to where the nearest vectors are; where a filter leaves few of them it comes back with less than there is
(faiss #4727). Up to `NARROW` vectors it is therefore left aside, and their stored codes are compared with each query.
"""

import math
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medclip_lab.retrieval.embeddings import Floats, Rows, block_rows
from medclip_lab.retrieval.families import import_faiss, part_of
from medclip_lab.retrieval.gallery import Groups
from medclip_lab.retrieval.parameters import Parameters

NARROW = 65_536
"""Vectors that are compared with one by one: about as long as an index of a million takes, and never wrong."""
_direct_map = Lock()


@dataclass(frozen=True)
class Selection:
    """Rows that may be answered with."""

    rows: NDArray[np.bool_]
    """[N] of the table."""
    vectors: Rows
    """Numbers of the vectors that stand for at least one of them, ascending."""
    total: int
    """Vectors in the index."""

    @property
    def narrow(self) -> bool:
        return len(self.vectors) <= NARROW

    @property
    def share(self) -> float:
        return len(self.vectors) / max(1, self.total)

    def selector(self, index: Any) -> Any:
        """faiss's own object, a bit for each vector; None for an index that cannot leave vectors out."""
        if not selects(index):
            return None
        bits = np.zeros(self.total, np.bool_)
        bits[self.vectors] = True
        return import_faiss().IDSelectorBitmap(np.packbits(bits, bitorder="little"))


def select(rows: NDArray[np.bool_], groups: Groups) -> Selection:
    total = len(groups.starts) - 1
    by_vector = np.logical_or.reduceat(rows[groups.members], groups.starts[:-1]) if total else np.zeros(0, np.bool_)
    return Selection(rows, np.flatnonzero(by_vector), total)


def selects(index: Any) -> bool:
    """Whether an index takes a selector: product codes without lists do not."""
    if part_of(index, "IndexIVF") is not None or part_of(index, "IndexHNSW") is not None:
        return True
    return part_of(index, "IndexFastScan") is None and part_of(index, "IndexPQ") is None


def harder(parameters: Parameters, share: float) -> Parameters:
    """Of k answers under a filter the last is the (k / share)th without it: lists and vertices as for so many."""

    def more(value: int | None) -> int | None:
        return None if value is None else math.ceil(value / share)

    return replace(parameters, nprobe=more(parameters.nprobe), ef_search=more(parameters.ef_search))


def nearest_of(index: Any, queries: Floats, k: int, vectors: Rows) -> tuple[Floats, Rows]:
    """Exact: scores and numbers [Q, min(k, n)] of the nearest among n vectors, best first, ties in order."""
    k = min(k, len(vectors))
    best = np.empty((len(queries), 0), np.float32)
    found = np.empty((len(queries), 0), np.int64)
    size = block_rows(index.d)
    for start in range(0, len(vectors), size):
        chosen = vectors[start : start + size]
        scores = queries @ decoded(index, chosen).T
        best = np.concatenate([best, scores], axis=1)
        found = np.concatenate([found, np.broadcast_to(chosen, scores.shape)], axis=1)
        order = np.argsort(-best, axis=1, kind="stable")[:, :k]
        best, found = np.take_along_axis(best, order, 1), np.take_along_axis(found, order, 1)
    return best, found


def decoded(index: Any, vectors: Rows) -> Floats:
    """float32 [n, D] as the index holds them: of fewer bits, if its codes are."""
    lists = part_of(index, "IndexIVF")
    refined = isinstance(index, import_faiss().IndexRefine)
    if lists is not None and not refined and lists.direct_map.no():
        with _direct_map:  # where each vector lies in the lists; searching does not look at it
            if lists.direct_map.no():
                lists.make_direct_map()
    return np.asarray(index.reconstruct_batch(np.ascontiguousarray(vectors, np.int64)), np.float32)
