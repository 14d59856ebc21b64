"""How sure a metric is: intervals and paired tests over patients drawn with replacement."""

from collections.abc import Callable
from typing import Any

import numpy as np

from medclip_lab.evaluation.metrics import Bools, Floats, interval

BLOCK = 2**18
"""Weights held at once: few enough to stay in the caches of a core."""


def sample(metrics: Callable[[Floats], dict[str, Floats]], weights_RN: Floats, used: Bools) -> dict[str, Floats]:
    """Every metric in every draw, [R] each.

    Args:
        metrics: from a block of weights [n, r] of the samples used to values [r].
        weights_RN: of `patient_weights`.
        used: [N] samples that are measured.
    """
    width = max(BLOCK // len(used), 16)
    parts = [metrics(weights_RN[at : at + width].T[used]) for at in range(0, len(weights_RN), width)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def compare(value: float, other: float, values: Floats, others: Floats) -> dict[str, Any]:
    """Paired test of two models by the same draws of patients: the difference, its interval and two-sided p.

    p is the share of draws on the far side of no difference, twice, with one added to numerator and denominator so that
    it is never 0 (Davison and Hinkley, 1997, 4.2).

    Args:
        value, other: the metric of each model on the samples themselves.
        values, others: [R] in the draws; draw r of one is draw r of the other.
    """
    differences = values - others
    differences = differences[~np.isnan(differences)]
    low, high = interval(differences)
    extreme = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return {
        "difference": value - other,
        "low": low,
        "high": high,
        "p": min(1.0, 2 * (extreme + 1) / (len(differences) + 1)),
        "draws": len(differences),
    }
