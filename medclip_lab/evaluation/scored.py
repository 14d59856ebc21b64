"""Metrics of scored labels with intervals by patient: one row a label, each value with its interval or its reason."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medclip_lab.errors import UserError
from medclip_lab.evaluation.bootstrap import auroc_interval, compare, freedom, mean_freedom, rarer, sample
from medclip_lab.evaluation.metrics import (
    Bools,
    Classes,
    Confusion,
    Floats,
    Ranked,
    brier,
    calibration_error,
    error_if_perfect,
    interval,
    mean_of_draws,
    reliability,
)

AT = 0.9
"""The specificity, or sensitivity, at which the other is told."""
RANKING = ("auroc", "auprc", f"sensitivity_at_specificity_{AT}", f"specificity_at_sensitivity_{AT}")
DECIDING = ("accuracy", "sensitivity", "specificity", "f1", "mcc", "brier", "ece")
"""They need a threshold or a probability, which only a calibration on other patients gives."""
CLASSES = ("accuracy", "balanced_accuracy", "macro_f1", "mcc")
"""Of the decision between the labels of an exclusive set."""
NO_THRESHOLD = "not calibrated: no threshold, no probability"


@dataclass
class Scored:
    """One label of one model on a split, and what is known of it."""

    name: str
    scores: Floats
    """[N]"""
    positive: Bools
    """[N]"""
    used: Bools
    """[N] whether the label is known."""
    probabilities: Floats | None = None
    """[N], if calibrated."""
    threshold: float | None = None
    """The probability from which on a finding is called present."""
    reason: str = NO_THRESHOLD
    """Why there are none."""
    unlabelled: str = "not labelled in this data"
    """Why nothing is known, where nothing is."""


@dataclass
class Measured:
    """What was measured, and the same in every draw of patients."""

    rows: list[dict[str, Any]]
    draws: dict[str, dict[str, Floats]] = field(default_factory=dict)
    """Label -> metric -> [R]."""
    rare: dict[str, NDArray[np.intp]] = field(default_factory=dict)
    """Label -> numbers of the patients of its rarer class."""


def measure(labels: Sequence[Scored], weights: Floats, patients: Sequence[str]) -> Measured:
    """Every metric of every label.

    Args:
        weights: [R, N] of `patient_weights`.
        patients: [N], those whose weights they are.
    """
    measured = Measured([])
    numbers = np.unique(np.asarray(patients), return_inverse=True)[1]
    for label in labels:
        row, draws = _label(label, weights)
        measured.rows.append(row)
        if draws:
            measured.draws[label.name] = draws
            rare = measured.rare[label.name] = rarer(numbers[label.used], label.positive[label.used])
            row["low"], row["high"] = auroc_interval(row["auroc"], draws["auroc"], freedom(rare))
            row["metrics"]["auroc"] |= {"low": row["low"], "high": row["high"]}
    return measured


def _label(label: Scored, weights: Floats) -> tuple[dict[str, Any], dict[str, Floats]]:
    used, positive = label.used, label.positive[label.used]
    counts = {"positives": int(positive.sum()), "negatives": int((~positive).sum())}
    row: dict[str, Any] = {"name": label.name, "auroc": None, "low": None, "high": None, **counts}
    if min(counts.values()) == 0:
        row["reason"] = "one class only" if len(positive) else label.unlabelled
        row["prevalence"] = counts["positives"] / len(positive) if len(positive) else None
        row["metrics"] = {name: {"value": None, "reason": row["reason"]} for name in (*RANKING, *DECIDING)}
        return row, {}
    row["prevalence"] = counts["positives"] / len(positive)
    ranked = Ranked(label.scores[used], positive)
    probabilities = None if label.probabilities is None else label.probabilities[used]
    decided = None if probabilities is None or label.threshold is None else probabilities >= label.threshold

    def metrics(block: Floats) -> dict[str, Floats]:
        found = ranked.under(block)
        values = [found.auroc(), found.average_precision(), found.sensitivity_at(AT), found.specificity_at(AT)]
        told = dict(zip(RANKING, values, strict=True))
        if probabilities is not None and decided is not None:
            told |= _deciding(decided, probabilities, positive, block)
        return told

    point = metrics(np.ones((len(positive), 1)))
    draws = sample(metrics, weights, used)
    row["metrics"] = {name: _told(float(value[0]), draws[name]) for name, value in point.items()}
    row["metrics"] |= {name: {"value": None, "reason": label.reason} for name in DECIDING if name not in point}
    row["auroc"] = float(point["auroc"][0])
    if probabilities is not None:
        row["threshold"] = label.threshold
        row["reliability"] = reliability(probabilities, positive)
        row["metrics"]["ece"]["if_perfect"] = error_if_perfect(probabilities)
    return row, draws


def _deciding(decided: Bools, probabilities: Floats, positive: Bools, weights: Floats) -> dict[str, Floats]:
    cells = Confusion.of(decided, positive, weights)
    values = [cells.accuracy(), cells.sensitivity(), cells.specificity(), cells.f1(), cells.mcc()]
    values += [brier(probabilities, positive, weights), calibration_error(probabilities, positive, weights)]
    return dict(zip(DECIDING, values, strict=True))


def _told(value: float, draws: Floats) -> dict[str, Any]:
    if np.isnan(value):
        return {"value": None, "reason": "undefined: nothing is positive and nothing was called so"}
    low, high = interval(draws)
    return {"value": value, "low": low, "high": high}


def mean_over(measured: Measured, names: Sequence[str], metric: str) -> tuple[dict[str, Any], Floats | None]:
    """The mean of a metric over the labels that have it, with its interval, and the same in every draw.

    A label with few positives has none in some draws: those draws are the mean of the others.
    """
    rows = [row for row in measured.rows if row["name"] in names and row["metrics"][metric]["value"] is not None]
    if not rows:
        return {"value": None, "reason": "no label has it", "labels": 0}, None
    drawn = [measured.draws[row["name"]][metric] for row in rows]
    draws = mean_of_draws(drawn)
    value = float(np.mean([row["metrics"][metric]["value"] for row in rows]))
    if metric == "auroc":
        low, high = auroc_interval(value, draws, mean_freedom(drawn, [measured.rare[row["name"]] for row in rows]))
    else:
        low, high = interval(draws)
    return {"value": value, "low": low, "high": high, "labels": len(rows)}, draws


def measure_classes(scores: Floats, truth: NDArray[np.int64], names: Sequence[str], weights: Floats) -> dict[str, Any]:
    """Of an exclusive set, where the greatest score decides: accuracy, balanced accuracy, macro F1, MCC, confusion.

    Args:
        scores: [N, K]; of equal scores the label that stands first in the set is taken.
        truth: [N] number of the class, -1 for images that are left out because they have none or several.
    """
    used = truth >= 0
    if not used.any():
        raise UserError(f"evaluate: no image has just one label of {', '.join(names)}, as an exclusive set needs")
    decided, classes = scores[used].argmax(1), len(names)

    def metrics(block: Floats) -> dict[str, Floats]:
        cells = Classes.of(decided, truth[used], classes, block)
        values = (cells.accuracy(), cells.balanced_accuracy(), cells.macro_f1(), cells.mcc())
        return dict(zip(CLASSES, values, strict=True))

    point, draws = metrics(np.ones((int(used.sum()), 1))), sample(metrics, weights, used)
    return {
        "decision": "the greatest score",
        "images": int(used.sum()),
        "left_out": int((~used).sum()),
        **{name: _told(float(value[0]), draws[name]) for name, value in point.items()},
        "confusion": {
            "rows": "truth",
            "names": list(names),
            "counts": Classes.of(decided, truth[used], classes).counts[:, :, 0].astype(int).tolist(),
        },
    }


def lines_of_classes(told: dict[str, Any]) -> list[str]:
    """What `measure_classes` found, as lines for people."""
    found = {name: told[name] for name in CLASSES}
    return [f"  {name:<28} {v['value']:.3f}  {v['low']:.3f}-{v['high']:.3f}" for name, v in found.items()]


def compare_models(one: Measured, other: Measured, names: Sequence[str]) -> dict[str, Any]:
    """Paired tests of two models on the same patients, for every metric both have: by label, and of the mean."""
    labels = []
    for row, beside in zip(one.rows, other.rows, strict=True):
        assert row["name"] == beside["name"], "two models are compared label by label"
        tests = {}
        for metric, said in row["metrics"].items():
            against = beside["metrics"][metric]
            if said["value"] is not None and against["value"] is not None:
                drawn = (model.draws[row["name"]][metric] for model in (one, other))
                tests[metric] = compare(said["value"], against["value"], *drawn)
        labels.append({"name": row["name"], **({"reason": row["reason"]} if "reason" in row else {}), "tests": tests})
    mean = {}
    for metric in (*RANKING, *DECIDING):
        both = [label["name"] for label in labels if label["name"] in names and metric in label["tests"]]
        (said, draws), (against, others) = mean_over(one, both, metric), mean_over(other, both, metric)
        if draws is not None and others is not None:
            mean[metric] = compare(said["value"], against["value"], draws, others) | {"labels": len(both)}
    return {"test": "paired bootstrap by patient, two-sided", "labels": labels, "macro": mean}
