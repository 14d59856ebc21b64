"""Recall as it is meant: held-out queries of each direction against their exact answers, ties as right."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medclip_lab.retrieval.embeddings import Floats, Vectors
from medclip_lab.retrieval.parameters import Parameters

TIE = 1e-6
"""Scores this near are equal: identical reports have identical embeddings, and sums of floats have an order."""
BATCH = 256
SINGLES = 40
"""Queries that are timed one by one."""


@dataclass
class Queries:
    """Held-out queries of one direction."""

    direction: str
    vectors: Floats
    """[Q, D]; see `part`."""
    worst_right: Floats = field(default_factory=lambda: np.empty(0, np.float32))
    """[Q] exact score of the k-th answer: whatever scores as much is right."""
    k: int = 0

    def part(self, number: int) -> NDArray[np.int64]:
        """Rows for tuning (0), for confirming (1), or for the recall that is told (2); fewer than three are for all."""
        few = len(self.vectors) < 3
        return self.all if few else np.arange(number, len(self.vectors), 3)

    @property
    def all(self) -> NDArray[np.int64]:
        return np.arange(len(self.vectors))


def find_truth(queries: Mapping[str, Queries], blocks: Iterable[tuple[int, Floats]], size: int, at: int) -> None:
    """Exact k-th best scores of all queries, in one pass over the vectors they are asked of.

    Args:
        blocks: the vectors, as `Vectors.blocks` gives them; `size` of them.
        at: k; fewer if there are fewer.
    """
    k = min(at, size)
    best = {name: np.full((len(given.vectors), k), -np.inf, np.float32) for name, given in queries.items()}
    for _, block in blocks:
        for name, given in queries.items():
            for start in range(0, len(given.vectors), BATCH):
                chosen = slice(start, start + BATCH)
                scores = given.vectors[chosen] @ block.T
                if scores.shape[1] > k:
                    scores = np.partition(scores, -k, axis=1)[:, -k:]
                both = np.concatenate([best[name][chosen], scores], axis=1)
                best[name][chosen] = np.partition(both, -k, axis=1)[:, -k:]
    for name, given in queries.items():
        given.k, given.worst_right = k, best[name].min(axis=1)


def search(
    index: Any, vectors: Floats, k: int, parameters: Parameters, selector: Any = None
) -> tuple[Floats, NDArray[np.int64]]:
    """faiss's answer for [Q, D], in batches that bound its memory: scores and rows [Q, k], -1 where there is none."""
    settings = parameters.for_faiss(index, k, selector)
    options = {} if settings is None else {"params": settings}
    found = [index.search(vectors[start : start + BATCH], k, **options) for start in range(0, len(vectors), BATCH)]
    return np.concatenate([scores for scores, _ in found]), np.concatenate([rows for _, rows in found])


def right(queries: Queries, chosen: NDArray[np.int64], found: NDArray[np.int64], vectors: Vectors) -> Floats:
    """[len(chosen)] share of the k found rows of each query that are right.

    Args:
        found: [len(chosen), k] rows of `vectors`, -1 for none.
    """
    rows = np.unique(found[found >= 0])
    places = np.searchsorted(rows, np.maximum(found, 0))
    shares = np.zeros(len(chosen), np.float32)
    exact = vectors.take(rows)
    for number, query in enumerate(chosen):
        good = found[number] >= 0
        scores = exact[places[number][good]] @ queries.vectors[query]
        shares[number] = (scores >= queries.worst_right[query] - TIE).sum() / queries.k
    return shares


@dataclass(frozen=True)
class Measured:
    """Recall of one direction with one set of parameters."""

    recall: float
    error: float
    """Standard error of the mean over queries."""
    seconds: float
    """A query, in batches."""


def measure(
    index: Any, queries: Queries, chosen: NDArray[np.int64], parameters: Parameters, vectors: Vectors
) -> Measured:
    """Ask the chosen queries."""
    asked = np.ascontiguousarray(queries.vectors[chosen])
    start = time.perf_counter()
    found = search(index, asked, queries.k, parameters)[1]
    seconds = (time.perf_counter() - start) / len(chosen)
    shares = right(queries, chosen, found, vectors)
    error = float(shares.std(ddof=1) / np.sqrt(len(shares))) if len(shares) > 1 else 0.0
    return Measured(float(shares.mean()), error, seconds)


def single_seconds(index: Any, queries: Queries, parameters: Parameters) -> float:
    """Median time of a query that comes alone."""
    seconds = []
    settings = parameters.for_faiss(index, queries.k)
    options = {} if settings is None else {"params": settings}
    for row in range(min(SINGLES, len(queries.vectors))):
        start = time.perf_counter()
        index.search(queries.vectors[row : row + 1], queries.k, **options)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))
