"""Metrics as short pure functions of numpy arrays."""

from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]


def auroc(scores: Floats, positive: NDArray[np.bool_]) -> float:
    """Area under the ROC curve: how often a positive outranks a negative, ties counting one half.

    Args:
        scores, positive: [N].

    Raises:
        ValueError: only one class, or a score that is not finite.
    """
    return float(weighted_auroc(scores, positive, np.ones((1, len(scores))))[0])


def weighted_auroc(scores: Floats, positive: NDArray[np.bool_], weights_RN: Floats) -> Floats:
    """AUROC under R sets of sample weights, [R]; NaN where a set leaves one class without weight."""
    if not np.isfinite(scores).all():
        raise ValueError("AUROC of scores that are not finite")
    if positive.all() or not positive.any():
        raise ValueError(f"AUROC needs both classes: {int(positive.sum())} positives among {len(positive)}")
    order = np.argsort(scores, kind="stable")
    ranked, positive = scores[order], positive[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])  # first sample of each group of ties
    weights = weights_RN[:, order]
    positives = np.add.reduceat(weights * positive, starts, axis=1)
    negatives = np.add.reduceat(weights * ~positive, starts, axis=1)
    below = np.cumsum(negatives, axis=1) - negatives
    total = positives.sum(1) * negatives.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        area: Floats = (positives * (below + negatives / 2)).sum(1) / total
    return area


def patient_weights(patients: list[str], draws: int, seed: int) -> Floats:
    """[draws, N] how often each sample occurs when whole patients are drawn with replacement.

    Studies of a patient resemble each other; drawing studies would make intervals too narrow.
    """
    _, index = np.unique(np.asarray(patients), return_inverse=True)
    number = int(index.max()) + 1
    counts = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=draws)
    weights: Floats = counts[:, index].astype(np.float64)
    return weights


def interval(values: Floats, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of bootstrap values; draws without a value (one class) do not count."""
    tail = (1 - level) / 2 * 100
    low, high = np.nanpercentile(values, [tail, 100 - tail])
    return float(low), float(high)


@dataclass(frozen=True)
class Retrieval:
    """Recall of paired retrieval in one direction."""

    recall: dict[int, float]
    """R@K: share of queries with a positive among the first K."""
    chance: dict[int, float]
    """Expected R@K of a random order."""
    median_rank: float
    median_rank_chance: float
    queries: int
    gallery: int


def retrieval(
    query: Floats, gallery: Floats, query_group: list[str], gallery_group: list[str], ks: tuple[int, ...] = (1, 5, 10)
) -> Retrieval:
    """Recall over the full gallery; an item is a positive if it has the query's group (same study, or same text).

    A tie between a positive and a negative counts against the positive.

    Args:
        query: [Q, D], gallery: [G, D], unit norm.
    """
    groups = {group: number for number, group in enumerate(dict.fromkeys([*query_group, *gallery_group]))}
    of_query = np.array([groups[group] for group in query_group])
    of_gallery = np.array([groups[group] for group in gallery_group])
    ranks = np.empty(len(query), dtype=np.int64)
    for start in range(0, len(query), 1024):  # a block of rows at a time: the full matrix need not fit in memory
        rows = slice(start, start + 1024)
        scores = query[rows] @ gallery.T
        match = of_query[rows, None] == of_gallery[None]
        best = np.where(match, scores, -np.inf).max(1, keepdims=True)
        ranks[rows] = 1 + ((scores >= best) & ~match).sum(1)
    positives = (of_query[:, None] == np.unique(of_gallery)[None]) @ np.unique(of_gallery, return_counts=True)[1]
    total = len(gallery)
    chance = {
        k: float(np.mean([1 - comb(total - int(p), min(k, total)) / comb(total, min(k, total)) for p in positives]))
        for k in ks
    }
    return Retrieval(
        recall={k: float((ranks <= k).mean()) for k in ks},
        chance=chance,
        median_rank=float(np.median(ranks)),
        median_rank_chance=float(np.median((total + 1) / (positives + 1))),
        queries=len(query),
        gallery=total,
    )
