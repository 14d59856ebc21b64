"""Metrics as short pure functions of numpy arrays, each under R sets of sample weights at once.

Integer weights mean repetition: a metric under weights is the metric of the samples repeated so often, which is all
that a bootstrap asks for. Shapes: N samples, R sets of weights, G distinct scores of positives, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medclip_lab.errors import UserError

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]
BINS = 15
"""Bins of equal width of the calibration error (Guo et al., ICML 2017)."""


def known(scores: Floats, labels: Floats) -> tuple[Floats, Bools]:
    """(scores, positive) of the samples that have a label; `labels` holds 1, 0, or NaN where nothing is known.

    Raises:
        ValueError: another value among the labels.
    """
    used = ~np.isnan(labels)
    if not np.isin(labels[used], (0, 1)).all():
        raise ValueError(f"labels are 1, 0 or NaN, got {np.setdiff1d(labels[used], (0, 1))[0]:g}")
    return scores[used], labels[used] == 1


@dataclass(frozen=True)
class Thresholds:
    """What lies above each distinct score of a positive, from the highest score down, under R sets of weights."""

    hits: Floats
    """[G, R] weight of the positives with just this score."""
    above: Floats
    """[G, R] weight of the negatives with a greater score."""
    false_positives: Floats
    """[G, R] weight of the negatives with this score or a greater one."""
    positives: Floats
    """[R]"""
    negatives: Floats
    """[R]"""

    def auroc(self) -> Floats:
        """[R] how often a positive outranks a negative, ties counting one half; NaN where one class has no weight."""
        below = self.negatives - (self.above + self.false_positives) / 2
        return _ratio((self.hits * below).sum(0, dtype=np.float64), self.positives * self.negatives)

    def average_precision(self) -> Floats:
        """[R] area under the precision-recall curve as a sum of steps, as scikit-learn has it."""
        hits = np.cumsum(self.hits, axis=0)
        precision = _ratio(hits, hits + self.false_positives)
        # A score whose positives have no weight, and nothing above it either, is no step.
        steps = np.where(self.hits > 0, self.hits * precision, 0)
        return _ratio(steps.sum(0, dtype=np.float64), self.positives)

    def sensitivity_at(self, specificity: float) -> Floats:
        """[R] the greatest sensitivity of a threshold with at least this specificity."""
        allowed = self.false_positives <= _slack((1 - specificity) * self.negatives)
        return _ratio((self.hits * allowed).sum(0, dtype=np.float64), self.positives * (self.negatives > 0))

    def specificity_at(self, sensitivity: float) -> Floats:
        """[R] the greatest specificity of a threshold with at least this sensitivity."""
        reached = np.cumsum(self.hits, axis=0) >= -_slack(-sensitivity * self.positives)
        wrong = np.where(reached, self.false_positives, np.inf).min(0)
        wrong = np.where(sensitivity > 0, wrong, 0)  # to call nobody is enough for a sensitivity of 0
        return 1 - _ratio(wrong, self.negatives * (self.positives > 0))


class Ranked:
    """Samples of one label in the order of their scores: sorted once, for any number of weightings.

    Args:
        scores, positive: [N].

    Raises:
        ValueError: a score that is not finite, or one class only.
    """

    def __init__(self, scores: Floats, positive: Bools) -> None:
        if not np.isfinite(scores).all():
            raise ValueError("scores that are not finite cannot be ranked")
        if positive.all() or not positive.any():
            raise ValueError(f"ranking needs both classes: {int(positive.sum())} positives among {len(positive)}")
        hits, misses = np.flatnonzero(positive), np.flatnonzero(~positive)
        self._hits = hits[np.argsort(-scores[hits], kind="stable")]
        self._misses = misses[np.argsort(-scores[misses], kind="stable")]
        ranked, negatives = -scores[self._hits], -scores[self._misses]  # ascending
        self._starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
        self._above = np.searchsorted(negatives, ranked[self._starts], side="left")
        self._at_least = np.searchsorted(negatives, ranked[self._starts], side="right")
        self.values = scores[self._hits][self._starts]
        """[G] distinct scores of positives, descending: the thresholds that can be best."""

    def under(self, weights_NR: Floats) -> Thresholds:
        """Counts at every threshold under weights [N, R], in their precision."""
        hits = weights_NR[self._hits]
        if len(self._starts) < len(hits):
            hits = np.add.reduceat(hits, self._starts, axis=0)
        passed = np.zeros((len(self._misses) + 1, weights_NR.shape[1]), weights_NR.dtype)
        np.cumsum(weights_NR[self._misses], axis=0, out=passed[1:])
        return Thresholds(hits, passed[self._above], passed[self._at_least], hits.sum(0), passed[-1])

    def plain(self) -> Thresholds:
        """Counts at every threshold, each sample once; float64 [G, 1]."""
        return self.under(np.ones((len(self._hits) + len(self._misses), 1)))


def auroc(scores: Floats, positive: Bools) -> float:
    """Area under the ROC curve: how often a positive outranks a negative, ties counting one half.

    Args:
        scores, positive: [N].

    Raises:
        ValueError: only one class, or a score that is not finite.
    """
    return float(Ranked(scores, positive).plain().auroc()[0])


def weighted_auroc(scores: Floats, positive: Bools, weights_RN: Floats) -> Floats:
    """AUROC under R sets of sample weights, [R]; NaN where a set leaves one class without weight."""
    return Ranked(scores, positive).under(weights_RN.T).auroc()


def average_precision(scores: Floats, positive: Bools) -> float:
    """Area under the precision-recall curve; arguments and errors as those of `auroc`."""
    return float(Ranked(scores, positive).plain().average_precision()[0])


def patient_weights(patients: Sequence[str], draws: int, seed: int) -> NDArray[np.float32]:
    """[draws, N] how often each sample occurs when whole patients are drawn with replacement.

    Studies of a patient resemble each other; drawing studies would make intervals too narrow. float32 holds the counts,
    and their sums up to 16 million, exactly.
    """
    _, index = np.unique(np.asarray(patients), return_inverse=True)
    number = int(index.max()) + 1
    counts = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=draws)
    weights: NDArray[np.float32] = counts.astype(np.float32).T[index]
    return weights.T  # a sample's draws side by side: that is how they are summed


def mean_of_draws(values: Sequence[Floats] | Floats) -> Floats:
    """[R] means over labels [K, R] that have a value in a draw; NaN, and no warning, where none has."""
    table = np.asarray(values, dtype=np.float64)
    return _ratio(np.nansum(table, axis=0), np.isfinite(table).sum(0))


def interval(values: Floats, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of bootstrap values; draws without a value (one class) do not count.

    Raises:
        UserError: no draw has a value.
    """
    if np.isnan(values).all():
        raise UserError("evaluate: no bootstrap draw has both classes of a label: take more of them (--draws)")
    tail = (1 - level) / 2 * 100
    low, high = np.nanpercentile(values, [tail, 100 - tail])
    return float(low), float(high)


@dataclass(frozen=True)
class Confusion:
    """The four counts of a decision, [R] each."""

    tp: Floats
    fp: Floats
    fn: Floats
    tn: Floats

    @classmethod
    def of(cls, decided: Bools, positive: Bools, weights_NR: Floats | None = None) -> "Confusion":
        """Of decisions [N] against the truth [N]."""
        cells = np.stack([decided & positive, decided & ~positive, ~decided & positive, ~decided & ~positive])
        weights = np.ones((len(positive), 1)) if weights_NR is None else weights_NR
        tp, fp, fn, tn = (cells.astype(weights.dtype) @ weights).astype(np.float64)
        return cls(tp, fp, fn, tn)

    def accuracy(self) -> Floats:
        return _ratio(self.tp + self.tn, self.tp + self.fp + self.fn + self.tn)

    def sensitivity(self) -> Floats:
        return _ratio(self.tp, self.tp + self.fn)

    def specificity(self) -> Floats:
        return _ratio(self.tn, self.tn + self.fp)

    def f1(self) -> Floats:
        """NaN where nothing is positive and nothing was called so."""
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    def mcc(self) -> Floats:
        """Matthews correlation; 0, as everywhere, where one side is constant."""
        margins = (self.tp + self.fp) * (self.tp + self.fn) * (self.tn + self.fp) * (self.tn + self.fn)
        over = self.tp * self.tn - self.fp * self.fn
        return np.where(margins > 0, over / np.sqrt(np.maximum(margins, 1)), 0.0)


def brier(probabilities: Floats, positive: Bools, weights_NR: Floats | None = None) -> Floats:
    """[R] mean squared distance of probabilities [N] from the truth [N]."""
    error = (probabilities - positive) ** 2
    return np.array([error.mean()]) if weights_NR is None else _ratio(error @ weights_NR, weights_NR.sum(0))


def calibration_error(probabilities: Floats, positive: Bools, weights_NR: Floats | None = None) -> Floats:
    """[R] expected calibration error: over 15 bins of equal width, |mean probability - share of positives|, weighted.

    Of the probability of the finding itself, not of the likelier class; a bin holds its lower edge.
    """
    edges = np.linspace(0, 1, BINS + 1)
    index = np.clip(np.searchsorted(edges, probabilities, side="right") - 1, 0, BINS - 1)
    member = np.zeros((BINS, len(index)))
    # Weights cancel against the size of the bin: sum over bins of n_b / n * |sum(p - y) / n_b|.
    member[index, np.arange(len(index))] = probabilities - positive
    weights = np.ones((len(index), 1)) if weights_NR is None else weights_NR
    return _ratio(np.abs(member @ weights).sum(0), weights.sum(0, dtype=np.float64))


def error_if_perfect(probabilities: Floats, draws: int = 50) -> float:
    """The calibration error that a perfect model would show, by chance: of labels drawn by its probabilities [N]."""
    rng = np.random.default_rng(0)
    drawn = (rng.random(len(probabilities)) < probabilities for _ in range(draws))
    return float(np.mean([calibration_error(probabilities, labels)[0] for labels in drawn]))


def reliability(probabilities: Floats, positive: Bools) -> list[dict[str, float]]:
    """The bins of `calibration_error` that hold samples: count, mean probability, share of positives."""
    index = np.clip(np.searchsorted(np.linspace(0, 1, BINS + 1), probabilities, side="right") - 1, 0, BINS - 1)
    return [
        {
            "count": int((index == number).sum()),
            "probability": float(probabilities[index == number].mean()),
            "positives": float(positive[index == number].mean()),
        }
        for number in np.unique(index)
    ]


@dataclass(frozen=True)
class Classes:
    """Confusion of exclusive classes, [C, C, R]: truth, decision, weights."""

    counts: Floats

    @classmethod
    def of(cls, decided: NDArray[np.integer[Any]], truth: NDArray[np.integer[Any]], classes: int,
           weights_NR: Floats | None = None) -> "Classes":  # fmt: skip
        """Of class numbers [N]."""
        weights = np.ones((len(truth), 1)) if weights_NR is None else weights_NR
        cells = np.zeros((classes * classes, len(truth)))
        cells[truth * classes + decided, np.arange(len(truth))] = 1
        return cls((cells @ weights).reshape(classes, classes, -1))

    def accuracy(self) -> Floats:
        """[R] share of right decisions (top 1)."""
        return _ratio(np.trace(self.counts), self.counts.sum((0, 1)))

    def balanced_accuracy(self) -> Floats:
        """[R] mean over the classes that occur of the share found (ACA)."""
        share: Floats = np.nanmean(_ratio(self._right(), self.counts.sum(1)), axis=0)
        return share

    def macro_f1(self) -> Floats:
        """[R] mean F1 over the classes that occur in the truth or among the decisions."""
        mean: Floats = np.nanmean(_ratio(2 * self._right(), self.counts.sum(0) + self.counts.sum(1)), axis=0)
        return mean

    def mcc(self) -> Floats:
        """[R] Matthews correlation of many classes (Gorodkin, 2004); 0 where one side is constant."""
        decided, truth, total = self.counts.sum(0), self.counts.sum(1), self.counts.sum((0, 1))
        over = np.trace(self.counts) * total - (decided * truth).sum(0)
        spread = (total**2 - (decided**2).sum(0)) * (total**2 - (truth**2).sum(0))
        return np.where(spread > 0, over / np.sqrt(np.maximum(spread, 1)), 0.0)

    def _right(self) -> Floats:
        right: Floats = np.einsum("iir->ir", self.counts)
        return right


def _ratio(over: Floats, under: Floats) -> Floats:
    """NaN where nothing is divided by nothing."""
    with np.errstate(invalid="ignore", divide="ignore"):
        value: Floats = over / under
    return np.where(np.asarray(under) > 0, value, np.nan)


def _slack(count: Floats) -> Floats:
    """A bound on whole numbers, raised by what rounding may have taken from it."""
    return count + 1e-6
