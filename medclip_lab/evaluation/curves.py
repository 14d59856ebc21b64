"""Points of the curves that a report draws, as pure functions."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from medclip_lab.evaluation.metrics import Floats

Points = list[tuple[float, float]]


def _counts(scores: Floats, positive: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """True and false positives at every threshold, from the strictest on; equal scores are one threshold."""
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], positive[order]
    ends = np.flatnonzero(np.r_[ranked[1:] != ranked[:-1], True])
    true = np.cumsum(hits)[ends].astype(np.float64)
    return true, (ends + 1) - true


def roc_points(scores: Floats, positive: NDArray[np.bool_]) -> Points:
    """(1 - specificity, sensitivity) at every threshold, from (0, 0) to (1, 1).

    Raises:
        ValueError: one class only.
    """
    if positive.all() or not positive.any():
        raise ValueError("a ROC curve needs both classes")
    true, false = _counts(scores, positive)
    return [(0.0, 0.0), *zip((false / false[-1]).tolist(), (true / true[-1]).tolist(), strict=True)]


def precision_recall_points(scores: Floats, positive: NDArray[np.bool_]) -> Points:
    """(recall, precision) at every threshold, in steps: between two thresholds precision is not interpolated.

    Raises:
        ValueError: no positive.
    """
    if not positive.any():
        raise ValueError("a precision-recall curve needs a positive")
    true, false = _counts(scores, positive)
    recall, precision = true / true[-1], true / (true + false)
    points = [(0.0, float(precision[0]))]
    for x, y in zip(recall.tolist(), precision.tolist(), strict=True):
        points += [(points[-1][0], y), (x, y)]
    return points


def confusion_of_one(scores: Floats, positive: NDArray[np.bool_], used: NDArray[np.bool_]) -> dict[str, Any]:
    """Which label scores highest in the "studies" with exactly one present label: rows truth, columns said.

    Of equal scores the first label is said.
    """
    rows = np.flatnonzero((positive & used).sum(1) == 1)
    labels = positive.shape[1]
    matrix = np.zeros((labels, labels), dtype=int)
    if len(rows):
        np.add.at(matrix, ((positive & used)[rows].argmax(1), scores[rows].argmax(1)), 1)
    return {"studies": len(rows), "counts": matrix.tolist()}
