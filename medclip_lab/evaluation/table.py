"""AUROC by label as one table, whatever gave the scores."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medclip_lab.evaluation.bootstrap import auroc_interval, freedom, mean_freedom, rarer
from medclip_lab.evaluation.gather import Labelled
from medclip_lab.evaluation.metrics import Floats, auroc, mean_of_draws, patient_weights, weighted_auroc


def auroc_table(
    data: Labelled, scores: Floats, *, draws: int = 1000, seed: int = 0, reasons: Mapping[int, str] | None = None
) -> dict[str, Any]:
    """AUROC of every label and their mean, with 95 % intervals bootstrapped by patient.

    Args:
        scores: [N, K]; the columns of `reasons` are not looked at.
        reasons: columns without scores, and why. A label without both classes gets its reason here.
    """
    weights = patient_weights(data.patients, draws, seed)
    numbers = np.unique(np.asarray(data.patients), return_inverse=True)[1]
    labels, sampled, rare = [], [], []
    for column, name in enumerate(data.names):
        used = data.used[:, column]
        positive = data.positive[used, column]
        counts = {"positives": int(positive.sum()), "negatives": int((~positive).sum())}
        row: dict[str, Any] = {"name": name, "auroc": None, "low": None, "high": None, **counts}
        reason = (reasons or {}).get(column) or data.lacks(column)
        if reason:
            row["reason"] = reason
        else:
            row["auroc"] = auroc(scores[used, column], positive)
            sampled.append(weighted_auroc(scores[used, column], positive, weights[:, used]))
            rare.append(rarer(numbers[used], positive))
            row["low"], row["high"] = auroc_interval(row["auroc"], sampled[-1], freedom(rare[-1]))
        labels.append(row)
    bootstrap = {"draws": draws, "by": "patient", "seed": seed}
    return {"labels": labels, "macro": _macro(labels, sampled, rare), "bootstrap": bootstrap}


def _macro(labels: list[dict[str, Any]], sampled: list[Floats], rare: list[NDArray[np.intp]]) -> dict[str, Any]:
    measured = [row["auroc"] for row in labels if row["auroc"] is not None]
    if not measured:
        return {"auroc": None, "low": None, "high": None, "labels": 0, "reason": "no label can be scored"}
    mean = float(np.mean(measured))
    low, high = auroc_interval(mean, mean_of_draws(sampled), mean_freedom(sampled, rare))
    return {"auroc": mean, "low": low, "high": high, "labels": len(measured)}


def lines_of(table: Mapping[str, Any]) -> list[str]:
    """The table as lines for people."""
    lines = []
    for row in table["labels"]:
        if row["auroc"] is None:
            lines.append(f"  {row['name']:<28} -      ({row['reason']})")
        else:
            counts = f"({row['positives']} of {row['positives'] + row['negatives']})"
            lines.append(f"  {row['name']:<28} {row['auroc']:.3f}  {row['low']:.3f}-{row['high']:.3f}  {counts}")
    macro = table["macro"]
    if macro["auroc"] is not None:
        name = f"mean of {macro['labels']}"
        lines.append(f"  {name:<28} {macro['auroc']:.3f}  {macro['low']:.3f}-{macro['high']:.3f}")
    return lines
