"""Two evaluations of the same studies, side by side: paired, since an easy test set is easy for both."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from medclip_lab.errors import UserError
from medclip_lab.evaluation.gather import Labelled
from medclip_lab.evaluation.metrics import Floats, auroc, interval, patient_weights, weighted_auroc
from medclip_lab.files import atomic_file, digest, read_json


def studies_hash(study_ids: list[str]) -> str:
    """Of the studies and their order; no id can be read from it."""
    return digest(study_ids)


def scores_path(results: Path) -> Path:
    """The file of scores beside a JSON of results."""
    return results.with_suffix(".scores.safetensors")


def save_scores(results: Path, data: Labelled, scores: Floats, study_ids: list[str]) -> None:
    """Write scores and truth beside `results`: rows in the order of the shards, patients as numbers, no ids."""
    _, patients = np.unique(np.asarray(data.patients), return_inverse=True)
    arrays: dict[str, NDArray[Any]] = {
        "scores": scores.astype(np.float64),
        "positive": data.positive.astype(np.uint8),
        "used": data.used.astype(np.uint8),
        "patients": patients.astype(np.int64),
    }
    facts = {"names": json.dumps(data.names), "studies": studies_hash(study_ids)}
    with atomic_file(scores_path(results)) as temporary:
        save_file(arrays, temporary, metadata=facts)


def _load(results: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]], list[str], str]:
    value = read_json(results, "results")
    path = scores_path(results)
    task = value.get("protocol", {}).get("task")
    if task in ("class_retrieval", "report_retrieval"):
        raise UserError(f"compare: {results} is of a protocol that finds studies ({task}) and has no scores of labels")
    try:
        with safe_open(path, framework="numpy") as file:
            facts = file.metadata()
            arrays = {name: file.get_tensor(name) for name in ("scores", "positive", "used", "patients")}
            return value, arrays, json.loads(facts["names"]), str(facts["studies"])
    except Exception as error:  # safetensors raises its own kinds for every way a file can be broken
        raise UserError(f"compare: cannot read {path}: {type(error).__name__}; evaluate --out writes it") from None


def compare(first: Path, second: Path, *, draws: int = 1000, seed: int = 0) -> dict[str, Any]:
    """AUROC of the second less that of the first, by label and in the mean, paired over patients.

    Each bootstrap draw takes the same patients for both. "p" is twice the smaller share of draws on either side of
    zero, one draw added to each so that it is never 0.

    Raises:
        UserError: results of other studies, or without a label in common.
    """
    results_a, a, names_a, studies_a = _load(first)
    results_b, b, names_b, studies_b = _load(second)
    if studies_a != studies_b:
        raise UserError(
            f"compare: {first} and {second} are of different studies: evaluate both on the same shards and split"
        )
    names = [name for name in names_a if name in names_b]
    if not names:
        raise UserError(f"compare: {first} and {second} have no label in common")
    weights = patient_weights([str(number) for number in a["patients"]], draws, seed)
    rows, drawn = [], []
    for name in names:
        column_a, column_b = names_a.index(name), names_b.index(name)
        used = (a["used"][:, column_a] > 0) & (b["used"][:, column_b] > 0)
        positive = a["positive"][used, column_a] > 0
        if (positive != (b["positive"][used, column_b] > 0)).any():
            raise UserError(f"compare: the truth of {name} differs between {first} and {second}")
        row: dict[str, Any] = {
            "name": name,
            "first": None,
            "second": None,
            "difference": None,
            "low": None,
            "high": None,
        }
        if positive.all() or not positive.any():
            rows.append(row | {"p": None, "reason": "one class only" if len(positive) else "not labelled in this data"})
            continue
        pair = [(a["scores"][used, column_a], "first"), (b["scores"][used, column_b], "second")]
        row |= {key: auroc(scores, positive) for scores, key in pair}
        sampled = [weighted_auroc(scores, positive, weights[:, used]) for scores, _ in pair]
        drawn.append(sampled[1] - sampled[0])
        rows.append(row | _difference(row, drawn[-1]))
    mean: dict[str, Any] = {"name": f"mean of {len(drawn)}", "first": None, "second": None, "difference": None}
    if drawn:
        scored = [row for row in rows if row["difference"] is not None]
        mean |= {key: float(np.mean([row[key] for row in scored])) for key in ("first", "second")}
        mean |= _difference(mean, np.nanmean(drawn, axis=0))
    else:
        mean |= {"low": None, "high": None, "p": None, "reason": "no label can be scored"}
    facts = {"first": results_a.get("bundle"), "second": results_b.get("bundle"), "studies_hash": studies_a}
    return facts | {"labels": rows, "macro": mean, "bootstrap": {"draws": draws, "by": "patient", "seed": seed}}


def _difference(row: dict[str, Any], drawn: Floats) -> dict[str, Any]:
    drawn = drawn[np.isfinite(drawn)]
    low, high = interval(drawn)
    side = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    p = min(1.0, 2 * (side + 1) / (len(drawn) + 1))
    return {"difference": row["second"] - row["first"], "low": low, "high": high, "p": p}


def summary(result: dict[str, Any]) -> str:
    """The comparison as lines for people."""
    lines = [
        f"first {str(result['first'])[:12]}, second {str(result['second'])[:12]}; AUROC, difference, 95 % interval, p",
    ]
    for row in (*result["labels"], result["macro"]):
        if row["difference"] is None:
            lines.append(f"  {row['name']:<28} -      ({row['reason']})")
        else:
            values = f"{row['first']:.3f}  {row['second']:.3f}  {row['difference']:+.3f}"
            lines.append(f"  {row['name']:<28} {values}  {row['low']:+.3f} to {row['high']:+.3f}  p {row['p']:.3f}")
    return "\n".join(lines)
