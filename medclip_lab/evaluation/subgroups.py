"""The same figure for parts of the test set: by sex, age band, view, site, or any column of the records."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medclip_lab.errors import UserError
from medclip_lab.evaluation.bootstrap import auroc_interval, mean_freedom, rarer
from medclip_lab.evaluation.gather import Labelled
from medclip_lab.evaluation.metrics import Floats, auroc, interval, mean_of_draws, patient_weights, weighted_auroc

AGE_BANDS = (18, 40, 60, 80)
"""Ages at which a band begins; below the first is a band of its own."""
MIN_CASES = 10
"""Patients with, and as many without, that a group needs for an AUROC: fewer tell nothing but their own luck."""
UNKNOWN = "unknown"


def group_of(record: Mapping[str, Any], column: str) -> str:
    """The group of a study: ages in bands, of the views that of its image, else the value as it stands."""
    value = record.get(column)
    if column == "view" and isinstance(value, list):
        number = int(record.get("image") or 0)
        value = value[number] if number < len(value) else None
    if value is None or value == "" or isinstance(value, list | dict):
        return UNKNOWN
    if column == "age":
        return _age_band(value)
    return str(value)


def _age_band(value: Any) -> str:
    try:
        age = float(value)
    except (TypeError, ValueError):
        return UNKNOWN
    begun = [start for start in AGE_BANDS if start <= age]
    later = [start for start in AGE_BANDS if start > age]
    if not begun:
        return f"under {AGE_BANDS[0]}"
    return f"{begun[-1]}-{later[0] - 1}" if later else f"{begun[-1]} and over"


def subgroups(
    data: Labelled,
    scores: Floats,
    records: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    *,
    draws: int = 1000,
    seed: int = 0,
    min_cases: int = MIN_CASES,
) -> dict[str, Any]:
    """AUROC of each label and of their mean in each group, the worst group, and the gap to the best.

    The mean over labels takes in every group those labels that can be scored in all groups that are compared; a group
    in which few can be is not, and says so. The gap is the best group's mean minus the worst's; its interval comes from
    the same bootstrap draws of patients, in each of which the best and the worst are found anew. A gap of finite groups
    is above zero also where none exists: "gap_expected" is the mean gap when the groups are dealt out to the patients
    by lot.

    Args:
        scores: [N, K].
        records: of each study, as in `Gathered`.

    Raises:
        UserError: a column that no record has.
    """
    weights = patient_weights(data.patients, draws, seed)
    tables = {}
    for column in columns:
        groups = np.array([group_of(record, column) for record in records])
        if set(groups.tolist()) == {UNKNOWN}:
            known = sorted(
                {name for record in records for name, value in record.items() if isinstance(value, str | int)}
            )
            raise UserError(f"subgroups: no record has {column!r}; there are {', '.join(known)}, and view")
        tables[column] = _table(data, scores, groups, weights, min_cases, seed)
    return {"columns": tables, "min_cases": min_cases, "bootstrap": {"draws": draws, "by": "patient", "seed": seed}}


def _table(
    data: Labelled, scores: Floats, groups: NDArray[np.str_], weights: Floats, min_cases: int, seed: int
) -> dict[str, Any]:
    names = sorted(set(groups.tolist()) - {UNKNOWN})
    columns = range(len(data.names))
    reasons = {name: [_reason(data, groups == name, column, min_cases) for column in columns] for name in names}
    able, common = _comparable({name: [c for c in columns if not reasons[name][c]] for name in names})
    rows, sampled = [], {}
    for name in names:
        member = groups == name
        labels = []
        for column, label in enumerate(data.names):
            row: dict[str, Any] = {"name": label, "auroc": None}
            if reasons[name][column]:
                labels.append(row | {"reason": reasons[name][column]})
            else:
                used = member & data.used[:, column]
                labels.append(row | {"auroc": auroc(scores[used, column], data.positive[used, column])})
        group = {
            "group": name,
            "studies": int(member.sum()),
            "patients": len({patient for patient, is_member in zip(data.patients, member, strict=True) if is_member}),
            "auroc": None,
            "low": None,
            "high": None,
            "labels": labels,
        }
        if name in able and common:
            value = float(np.mean([labels[column]["auroc"] for column in common]))
            sampled[name], degrees = _draws(data, scores, member, common, weights)
            low, high = auroc_interval(value, sampled[name], degrees)
            group |= {"auroc": value, "low": low, "high": high}
        else:
            group["reason"] = _why(reasons[name])
        rows.append(group)
    table = {"groups": rows, "compared_on": [data.names[column] for column in common]}
    return table | _gap(rows, sampled) | _expected(data, scores, groups, common, sampled, seed)


def _comparable(scorable: dict[str, list[int]]) -> tuple[list[str], list[int]]:
    """Groups that are compared, and the columns that they are compared on.

    A group with less than half the labels of the best one, and then the poorest until there is a label in common, would
    take labels from all the others: it is left out.
    """
    most = max(map(len, scorable.values()), default=0)
    able = sorted((name for name in scorable if scorable[name]), key=lambda name: -len(scorable[name]))
    able = [name for name in able if 2 * len(scorable[name]) >= most]
    while able:
        common = sorted(set.intersection(*(set(scorable[name]) for name in able)))
        if common:
            return able, common
        able.pop()
    return [], []


def _why(reasons: list[str]) -> str:
    if all(reasons):
        return reasons[0] if len(set(reasons)) == 1 else "no label has enough patients of both classes in this group"
    return f"only {reasons.count('')} of {len(reasons)} labels can be scored in this group: not compared"


def _reason(data: Labelled, member: NDArray[np.bool_], column: int, min_cases: int) -> str:
    used = member & data.used[:, column]
    patients = np.asarray(data.patients)
    if not used.any():
        return "not labelled in this group"
    for name, wanted in (("with", True), ("without", False)):
        count = len(set(patients[used & (data.positive[:, column] == wanted)].tolist()))
        if count < max(1, min_cases):
            return f"{count} patients {name} it, {max(1, min_cases)} are needed"
    return ""


def _draws(
    data: Labelled, scores: Floats, member: NDArray[np.bool_], common: list[int], weights: Floats
) -> tuple[Floats, float]:
    """[draws] mean AUROC over the common labels, and the degrees of freedom of its error."""
    numbers = np.unique(np.asarray(data.patients), return_inverse=True)[1]
    drawn, rare = [], []
    for column in common:
        used = member & data.used[:, column]
        positive = data.positive[used, column]
        drawn.append(weighted_auroc(scores[used, column], positive, weights[:, used]))
        rare.append(rarer(numbers[used], positive))
    return mean_of_draws(drawn), mean_freedom(drawn, rare)


def _gap(rows: list[dict[str, Any]], sampled: dict[str, Floats]) -> dict[str, Any]:
    scored = [row for row in rows if row["auroc"] is not None]
    if len(scored) < 2:
        return {"worst": None, "gap": None, "reason": "fewer than two groups can be scored"}
    worst, best = min(scored, key=lambda row: row["auroc"]), max(scored, key=lambda row: row["auroc"])
    drawn = np.stack(list(sampled.values()))
    low, high = interval(np.nanmax(drawn, axis=0) - np.nanmin(drawn, axis=0))
    gap = {"value": best["auroc"] - worst["auroc"], "low": low, "high": high, "best": best["group"]}
    return {"worst": worst["group"], "gap": gap}


def _expected(
    data: Labelled,
    scores: Floats,
    groups: NDArray[np.str_],
    common: list[int],
    sampled: dict[str, Floats],
    seed: int,
    deals: int = 50,
) -> dict[str, Any]:
    """The mean gap over deals in which patients swap their groups: what luck alone makes of groups of these sizes."""
    if len(sampled) < 2:
        return {}
    patients, index = np.unique(np.asarray(data.patients), return_inverse=True)
    first = np.zeros(len(patients), dtype=int)
    first[index[::-1]] = np.arange(len(index))[::-1]
    rng = np.random.default_rng(seed)
    gaps = []
    for _ in range(deals):
        dealt = groups[first][rng.permutation(len(patients))][index]
        values = []
        for name in sampled:
            of_group = []
            for column in common:
                used = (dealt == name) & data.used[:, column]
                positive = data.positive[used, column]
                if positive.any() and not positive.all():
                    of_group.append(auroc(scores[used, column], positive))
            if of_group:
                values.append(np.mean(of_group))
        if len(values) > 1:
            gaps.append(max(values) - min(values))
    return {"gap_expected": float(np.mean(gaps)) if gaps else None}
