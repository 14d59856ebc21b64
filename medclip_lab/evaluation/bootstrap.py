"""How sure a metric is: intervals and paired tests over patients drawn with replacement."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


def rarer(patients: NDArray[np.intp], positive: Bools) -> NDArray[np.intp]:
    """The patients of the rarer class: how many they are decides how well an AUROC's standard error is known.

    Args:
        patients: [n] number of each sample's patient. positive: [n].
    """
    return min((np.unique(patients[of]) for of in (positive, ~positive)), key=len)


def freedom(rare: NDArray[np.intp]) -> int:
    """Degrees of freedom of an AUROC's standard error: the patients of the rarer class, less one."""
    return max(1, len(rare) - 1)


def mean_freedom(drawn: Sequence[Floats], rare: Sequence[NDArray[np.intp]]) -> float:
    """Those of a mean over labels, by Welch and Satterthwaite: a label counts as much as it spreads.

    That takes the errors of the labels for independent. Where labels share their rare patients they are not: no more
    is known than all of these patients together tell.

    Args:
        drawn: [R] of each label.
        rare: of each label, see `rarer`.
    """
    freedoms = [freedom(patients) for patients in rare]
    spread = np.array([np.nanvar(values) for values in drawn])
    if not spread.any():
        return float(min(freedoms))
    together = freedom(np.unique(np.concatenate(rare)))
    return min(float(spread.sum() ** 2 / (spread**2 / np.array(freedoms)).sum()), float(together))


def auroc_interval(value: float, draws: Floats, degrees: float, level: float = 0.95) -> tuple[float, float]:
    """Interval of an AUROC, or of a mean of them: Student's t on the logit scale, with the standard error of the draws.

    Percentiles of the draws are too narrow where one class has few patients: a draw knows no case that was not seen,
    and they cannot reach past an end that lies near (Qin and Hotilovac, Statistical Methods in Medical Research 17,
    2008, on the logit scale; that the error itself is known from few patients is what Student's t is for).
    Where nothing was ever ranked wrongly, no draw differs, and the interval is that of as many patients of which none
    was wrong (Wilson, 1927).

    Args:
        draws: [R]; those without a value do not count.
        degrees: of freedom, see `freedom`.
    """
    from scipy.special import expit, logit, stdtrit

    far = float(stdtrit(degrees, (1 + level) / 2))
    known = draws[~np.isnan(draws)]
    error = float(known.std()) if len(known) else 0.0
    if error == 0 or not 0 < value < 1:
        return wilson(value * (degrees + 1), degrees + 1, far)
    half = far * error / (value * (1 - value))
    return float(expit(logit(value) - half)), float(expit(logit(value) + half))


def wilson(count: float, total: float, far: float = 1.959964) -> tuple[float, float]:
    """Interval of a share (Wilson, 1927), at 95 % unless `far` says how many standard errors it reaches."""
    share, more = count / total, far**2 / total
    center, half = share + more / 2, far * np.sqrt(share * (1 - share) / total + more / (4 * total))
    return max(0.0, float((center - half) / (1 + more))), min(1.0, float((center + half) / (1 + more)))


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
