"""Retrieval over the full gallery, by counting: the rank of a positive is 1 more than the negatives that score higher.

Nothing is sorted and no row of the similarity matrix is kept: blocks of it are made, compared with each query's best
positive and each gallery item's, and thrown away, so both directions come from one product. Blocks are shared out over
ranks. Scores within `TIE` of each other are a tie.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medclip_lab.distributed import all_sum, rank, world_size
from medclip_lab.evaluation.metrics import Bools, Floats, interval

ROWS, COLUMNS = 1024, 4096
"""Of a block: 16 MiB of similarities, and counts along a side that fit 16 bits."""
HELD = 2**24
"""Similarities held at once where whole rows are needed."""
TIE = 1e-6
"""What rounding can do to the product of two unit-norm float32 features."""
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Ranks:
    """Where the best positive of each query stands, [Q] each."""

    greater: Counts
    """Negatives with a greater score."""
    tied: Counts
    """Negatives with the same score."""
    tied_positives: Counts
    """Positives with the same score, itself among them."""
    positives: Counts
    """Positives in the gallery; a query with none is not asked."""
    gallery: int
    """Items it is searched among, itself left out."""

    @property
    def asked(self) -> Bools:
        return self.positives > 0

    def pessimistic(self) -> Counts:
        """[asked] rank from 1, every tie lost."""
        return (1 + self.greater + self.tied)[self.asked]

    def expected(self) -> Floats:
        """[asked] mean rank from 1 over all orders of what is tied."""
        return (1 + self.greater + self.tied / (self.tied_positives + 1))[self.asked]

    def hit(self, k: int, ties: str = "pessimistic") -> Floats:
        """[asked] whether a positive is among the first k; with "expected" ties the chance of it."""
        if ties == "pessimistic":
            return (self.pessimistic() <= k).astype(np.float64)
        places = np.clip(k - self.greater, 0, None)[self.asked]  # of the k, those left for what is tied
        return 1 - _no_hit(self.tied[self.asked], self.tied_positives[self.asked], places)

    def chance(self, k: int) -> Floats:
        """[asked] whether a positive is among the first k of a random order."""
        positives = self.positives[self.asked]
        return 1 - _no_hit(self.gallery - positives, positives, np.minimum(k, self.gallery))


def _no_hit(negatives: Counts, positives: Counts, drawn: Any) -> Floats:
    """Chance that none of the positives is among so many drawn: C(n, d) / C(n + p, d), factor by factor."""
    chance = np.ones(len(negatives))
    for already in range(int(np.max(drawn, initial=0))):
        left = np.clip(negatives - already, 0, None)
        chance *= np.where(already < drawn, left / np.maximum(left + positives, 1), 1.0)
    return chance


@dataclass(frozen=True)
class Retrieval:
    """One direction over the full gallery; ties are lost unless a name says otherwise."""

    recall: dict[int, float]
    """R@K: share of queries with a positive among the first K (hit rate)."""
    recall_interval: dict[int, tuple[float, float]] | None
    """Its 95 % interval, queries drawn by patient and the gallery left as it is; None if no draws were given."""
    recall_ties_shared: dict[int, float]
    """The same, averaged over all orders of what is tied."""
    chance: dict[int, float]
    """Expected R@K of a random order."""
    precision: dict[int, float]
    """P@K: mean share of positives among the first K, averaged over all orders of what is tied."""
    median_rank: float
    median_rank_chance: float
    mrr: float
    """Mean of 1 / rank."""
    tied_queries: int
    """Queries whose best positive is tied with a negative."""
    queries: int
    """Those with a positive in the gallery."""
    without_positive: int
    gallery: int


def retrieval(
    left: Floats,
    right: Floats,
    left_group: Sequence[str],
    right_group: Sequence[str],
    ks: Sequence[int] = (1, 5, 10),
    exclude_self: bool = False,
    weights: tuple[Floats | None, Floats | None] = (None, None),
) -> tuple[Retrieval, Retrieval]:
    """Left as queries for right, and right as queries for left; a positive has the query's group (study, or text).

    Args:
        left: [Q, D], right: [G, D], unit norm; the same on every rank.
        exclude_self: left and right are the same items, and an item is no answer to itself.
        weights: of the queries of each direction in every bootstrap draw, [R, Q] and [R, G], for intervals.

    Raises:
        ValueError: no query has a positive.
    """
    codes = _codes(left_group, right_group)
    ranks = both_ways(left, right, *codes, exclude_self=exclude_self)
    precision = (
        _precision(ranks[0], ks, left, right, *codes, exclude_self),
        _precision(ranks[1], ks, right, left, *codes[::-1], exclude_self),
    )
    return _summary(ranks[0], ks, precision[0], weights[0]), _summary(ranks[1], ks, precision[1], weights[1])


def _summary(ranks: Ranks, ks: Sequence[int], precision: dict[int, float], weights: Floats | None) -> Retrieval:
    place = ranks.pessimistic()
    drawn = None if weights is None else weights[:, ranks.asked]
    return Retrieval(
        recall={k: float(ranks.hit(k).mean()) for k in ks},
        recall_interval=None if drawn is None else {k: interval(drawn @ ranks.hit(k) / drawn.sum(1)) for k in ks},
        recall_ties_shared={k: float(ranks.hit(k, "expected").mean()) for k in ks},
        chance={k: float(ranks.chance(k).mean()) for k in ks},
        precision=precision,
        median_rank=float(np.median(place)),
        median_rank_chance=float(np.median((ranks.gallery + 1) / (ranks.positives[ranks.asked] + 1))),
        mrr=float((1 / place).mean()),
        tied_queries=int((ranks.tied[ranks.asked] > 0).sum()),
        queries=len(place),
        without_positive=len(ranks.asked) - len(place),
        gallery=ranks.gallery,
    )


def both_ways(
    left: Floats, right: Floats, of_left: Counts, of_right: Counts, *, exclude_self: bool = False
) -> tuple[Ranks, Ranks]:
    """Ranks of the best positives, left in right and right in left.

    Args:
        of_left: [Q] numbers of groups, of_right: [G].
    """
    shape = (len(left), len(right))
    best, tied_positives = _best_positives(left, right, of_left, of_right, exclude_self)
    greater = tuple(np.zeros(size, np.int64) for size in shape)
    at_least = tuple(np.zeros(size, np.int64) for size in shape)
    mask = np.empty(ROWS * COLUMNS, bool)
    for rows, columns, scores in _blocks(left, right, exclude_self):
        held = mask[: scores.size].reshape(scores.shape)
        np.greater(scores, best[0][rows, None] + TIE, out=held)
        greater[0][rows] += held.view(np.uint8).sum(1, dtype=np.uint16)
        np.greater_equal(scores, best[0][rows, None] - TIE, out=held)
        at_least[0][rows] += held.view(np.uint8).sum(1, dtype=np.uint16)
        np.greater(scores, best[1][columns] + TIE, out=held)
        greater[1][columns] += held.view(np.uint8).sum(0, dtype=np.uint16)
        np.greater_equal(scores, best[1][columns] - TIE, out=held)
        at_least[1][columns] += held.view(np.uint8).sum(0, dtype=np.uint16)
    for counts in (*greater, *at_least):
        all_sum(torch.from_numpy(counts))  # in place
    found = []
    for side, (mine, others) in enumerate(((of_left, of_right), (of_right, of_left))):
        tied = np.clip(at_least[side] - greater[side] - tied_positives[side], 0, None)
        positives = np.bincount(others, minlength=int(mine.max()) + 1)[mine] - exclude_self
        found.append(Ranks(greater[side], tied, tied_positives[side], positives, shape[1 - side] - exclude_self))
    return found[0], found[1]


def _codes(left: Sequence[str], right: Sequence[str]) -> tuple[Counts, Counts]:
    numbers = {group: number for number, group in enumerate(dict.fromkeys([*left, *right]))}
    return np.array([numbers[group] for group in left]), np.array([numbers[group] for group in right])


Block = tuple[Any, Any, Floats]
"""Rows, columns, and the scores of each with each; -inf where an item meets itself."""


def _blocks(left: Floats, right: Floats, exclude_self: bool) -> Iterator[Block]:
    """This rank's share of the similarity matrix; a block is gone when the next one is asked for."""
    buffer = np.empty(ROWS * COLUMNS, np.result_type(left, right))
    for top in list(range(0, len(left), ROWS))[rank() :: world_size()]:
        rows = slice(top, min(top + ROWS, len(left)))
        for start in range(0, len(right), COLUMNS):
            columns = slice(start, min(start + COLUMNS, len(right)))
            height, width = rows.stop - top, columns.stop - start
            scores = buffer[: height * width].reshape(height, width)
            np.matmul(left[rows], right[columns].T, out=scores)
            if exclude_self:
                own = np.arange(max(top, start), min(rows.stop, columns.stop))
                scores[own - top, own - start] = -np.inf
            yield rows, columns, scores


def _best_positives(
    left: Floats, right: Floats, of_left: Counts, of_right: Counts, exclude_self: bool
) -> tuple[tuple[Floats, Floats], tuple[Counts, Counts]]:
    """Score of each item's best positive on the other side (-inf if none), and how many positives have it."""
    best = tuple(np.full(len(side), -np.inf, np.result_type(left, right)) for side in (left, right))
    tied = tuple(np.zeros(len(side), np.int64) for side in (left, right))
    order = np.argsort(of_left, kind="stable"), np.argsort(of_right, kind="stable")
    groups = np.intersect1d(of_left, of_right)
    starts, ends = (
        [np.searchsorted(of[rows], groups, side=end) for of, rows in zip((of_left, of_right), order, strict=True)]
        for end in ("left", "right")
    )
    alone = (ends[0] - starts[0] == 1) & (ends[1] - starts[1] == 1)
    if not exclude_self:
        rows, columns = (items[start[alone]] for items, start in zip(order, starts, strict=True))
        for at in range(0, len(rows), ROWS):
            part = rows[at : at + ROWS], columns[at : at + ROWS]
            best[0][part[0]] = best[1][part[1]] = np.einsum("nd,nd->n", left[part[0]], right[part[1]])
        tied[0][rows] = tied[1][columns] = 1

    def blocks(group: int) -> Iterator[Block]:
        rows, columns = (
            items[start[group] : end[group]] for items, start, end in zip(order, starts, ends, strict=True)
        )
        step = max(HELD // len(columns), 1)
        for at in range(0, len(rows), step):
            part = rows[at : at + step]
            scores = left[part] @ right[columns].T
            if exclude_self:
                scores[part[:, None] == columns] = -np.inf
            yield part, columns, scores

    for group in np.flatnonzero(~alone).tolist():
        for rows, columns, scores in blocks(group):
            best[0][rows] = scores.max(1)
            best[1][columns] = np.maximum(best[1][columns], scores.max(0))
        for rows, columns, scores in blocks(group):
            tied[0][rows] = (scores >= best[0][rows, None] - TIE).sum(1)
            tied[1][columns] += (scores >= best[1][columns] - TIE).sum(0)
    return (best[0], best[1]), (tied[0], tied[1])


def _precision(
    ranks: Ranks, ks: Sequence[int], query: Floats, gallery: Floats, of_query: Counts, of_gallery: Counts, same: bool
) -> dict[int, float]:
    """P@K. A query with one positive has 1 / K if it is hit; the rows of the others are looked at whole."""
    if not ranks.asked.any():
        raise ValueError("no query has a positive in the gallery")
    single, several = ranks.positives == 1, np.flatnonzero(ranks.positives > 1)
    kept = {k: np.minimum(k, ranks.gallery) for k in ks}
    totals = {k: float(ranks.hit(k, "expected")[single[ranks.asked]].sum() / kept[k]) for k in ks}
    for rows, scores in _rows(query, gallery, several, same):
        gains = (of_query[rows, None] == of_gallery).astype(np.float32)
        first = _first_gains(scores, gains, max(kept.values()))
        for k in ks:
            totals[k] += float(first[:, : kept[k]].sum() / kept[k])
    return {k: total / int(ranks.asked.sum()) for k, total in totals.items()}


def overlap_retrieval(
    query: Floats,
    gallery: Floats,
    query_findings: Bools,
    gallery_findings: Bools,
    ks: Sequence[int] = (1, 5, 10),
    exclude_self: bool = False,
) -> dict[str, Any]:
    """nDCG@K by findings: the gain of an item is the Jaccard index of its findings and the query's.

    An exact match says little where a hundred reports say the same thing in other words. Two studies without findings
    agree (gain 1). Gains are linear, discounts 1 / log2(rank + 1), ties share their gains (Järvelin and Kekäläinen,
    2002; McSherry and Najork, 2008).

    Args:
        query: [Q, D], gallery: [G, D], unit norm. query_findings: [Q, L], gallery_findings: [G, L].
        exclude_self: query and gallery are the same items, and an item is no answer to itself.
    """
    searched = len(gallery) - exclude_self
    kept = {k: min(k, searched) for k in ks}
    discounts = 1 / np.log2(np.arange(2, max(kept.values()) + 2))
    sums = np.zeros((4, len(ks)))  # nDCG, its chance, mean gain, queries
    share = np.arange(len(query))[rank() :: world_size()]
    mean_gain = 0.0
    for rows, scores in _rows(query, gallery, share, exclude_self):
        gains = _jaccard(query_findings[rows], gallery_findings)
        if exclude_self:
            gains[np.arange(len(rows)), rows] = 0
        first = _first_gains(scores, gains, len(discounts))
        best = -np.sort(-np.partition(gains, -len(discounts), axis=1)[:, -len(discounts) :], axis=1)
        average = gains.sum(1) / searched
        mean_gain += float(average.sum())
        for column, k in enumerate(ks):
            weights = discounts[: kept[k]]
            ideal = best[:, : kept[k]] @ weights
            can = ideal > 0
            sums[0, column] += ((first[:, : kept[k]] @ weights)[can] / ideal[can]).sum()
            sums[1, column] += (average[can] * weights.sum() / ideal[can]).sum()
            sums[2, column] += first[:, : kept[k]].mean(1).sum()
            sums[3, column] += can.sum()
    totals = all_sum(torch.from_numpy(np.append(sums.ravel(), mean_gain))).numpy()
    sums, mean_gain = totals[:-1].reshape(sums.shape), float(totals[-1])
    asked = int(sums[3, 0])
    if not asked:
        raise ValueError("no query shares a finding with the gallery")
    return {
        "gain": "Jaccard index of the findings",
        "ndcg": {k: float(value) for k, value in zip(ks, sums[0] / sums[3], strict=True)},
        "chance": {k: float(value) for k, value in zip(ks, sums[1] / sums[3], strict=True)},
        "mean_gain": {k: float(value) for k, value in zip(ks, sums[2] / len(query), strict=True)},
        "mean_gain_chance": mean_gain / len(query),
        "queries": asked,
        "without_overlap": len(query) - asked,
        "gallery": searched,
    }


def _rows(query: Floats, gallery: Floats, wanted: Counts, same: bool) -> Iterator[tuple[Counts, Floats]]:
    """Whole rows of the similarity matrix, some at a time."""
    step = max(HELD // len(gallery), 1)
    for start in range(0, len(wanted), step):
        rows = wanted[start : start + step]
        scores = query[rows] @ gallery.T
        if same:
            scores[np.arange(len(rows)), rows] = -np.inf
        yield rows, scores


def _first_gains(scores: Floats, gains: Floats, k: int) -> Floats:
    """[Q, k] gain at each of the first k places, averaged over all orders of equal scores."""
    top = torch.topk(torch.from_numpy(scores), k, dim=1)
    values, places = top.values.numpy(), top.indices.numpy()
    found = np.take_along_axis(gains, places, axis=1).astype(np.float64)
    last = values[:, -1:]
    # A tie that reaches beyond the first k: each place of it is worth the mean of all that are tied.
    for row in np.flatnonzero((scores >= last).sum(1) > k):
        tied = scores[row] == last[row]
        found[row, values[row] == last[row]] = gains[row, tied].mean()
    for row in np.flatnonzero((values[:, 1:] == values[:, :-1]).any(1)):
        _, run, size = np.unique(-values[row], return_inverse=True, return_counts=True)
        found[row] = (np.bincount(run, found[row]) / size)[run]
    return found


def _jaccard(one: Bools, other: Bools) -> Floats:
    both = one.astype(np.float32) @ other.astype(np.float32).T
    either = one.sum(1, dtype=np.float32)[:, None] + other.sum(1, dtype=np.float32) - both
    return np.where(either > 0, both / np.maximum(either, 1), np.float32(1))
