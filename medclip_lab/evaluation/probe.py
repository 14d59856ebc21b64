"""Linear probes: logistic regression on frozen features, with all training patients, a share of them, or k of a class.

The protocol of CLIP (Radford et al., ICML 2021, section 3.2 and appendix A.3): L2-penalised logistic regression by
L-BFGS on the features as they are, its strength chosen on validation data; here each label is a task of its own, and
patients, not images, are drawn and kept apart.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medclip_lab import progress
from medclip_lab.evaluation.gather import Labelled, Scorer, refuse_shared_patients
from medclip_lab.evaluation.metrics import Floats, auroc, interval, mean_of_draws, patient_weights, weighted_auroc
from medclip_lab.evaluation.table import auroc_table

STRENGTHS = (1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e4)
"""Inverse penalties C that are tried; features have unit norm, so the useful ones are large."""
Rows = NDArray[np.intp]
SHOTS = (1, 2, 4, 8, 16)
SHARES = (0.01, 0.1, 1.0)


def linear_probe(train: Labelled, val: Labelled, test: Labelled, *, draws: int = 1000, seed: int = 0) -> dict[str, Any]:
    """AUROC on the test patients of a probe of all training patients, by label, with 95 % intervals by patient.

    A label that cannot be learned, chosen or tested has the value None and a reason.

    Raises:
        UserError: a patient stands in two parts, or scikit-learn is missing.
    """
    refuse_shared_patients(train=train, val=val, test=test)
    scores, reasons, strengths = np.zeros(test.positive.shape), {}, {}
    for column, name in enumerate(train.names):
        if reason := _reason(train, val, column):
            reasons[column] = reason
            continue
        rows = np.flatnonzero(train.used[:, column])
        scorer, strengths[name] = _chosen(train, rows, val, np.flatnonzero(val.used[:, column]), column)
        scores[:, column] = scorer(test.features)
    table = auroc_table(test, scores, draws=draws, seed=seed, reasons=reasons)
    return table | {"C": strengths, "chosen_by": f"val AUROC among {', '.join(map('{:g}'.format, STRENGTHS))}"}


def k_shot(
    train: Labelled,
    val: Labelled,
    test: Labelled,
    *,
    shots: Sequence[int] = SHOTS,
    shares: Sequence[float] = SHARES,
    seeds: int = 5,
    draws: int = 200,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Probes of few: k positive and k negative patients of a label, or a share of all training patients.

    The strength of a k-shot probe is chosen on k positive and k negative validation patients, as more of them would be
    more shots. The mean is over labels and seeds. The interval covers both kinds of luck: which patients taught, and
    which were tested (bootstrap by test patient, all seeds pooled).

    Returns:
        For each setting {"shots" or "share", "auroc", "low", "high", "seeds", "labels", "left_out": {label: reason}}.
    """
    refuse_shared_patients(train=train, val=val, test=test)
    weights = patient_weights(test.patients, draws, seed)
    settings: list[tuple[str, float]] = [("shots", k) for k in shots] + [("share", share) for share in shares]
    results = []
    for kind, amount in progress.track(settings, "few-shot probes", len(settings)):
        repeats = 1 if kind == "share" and amount >= 1 else seeds
        values: dict[str, list[float]] = {}
        sampled: list[Floats] = []
        left_out: dict[str, str] = {}
        for number in range(repeats):
            drawn: list[Floats] = []
            for column, name in enumerate(train.names):
                rng = np.random.default_rng((seed, number, 0 if kind == "share" else column))
                reason = _reason(train, val, column) or test.lacks(column)
                rows, val_rows = _draw(train, val, column, kind, amount, rng) if not reason else (None, None)
                if rows is None or val_rows is None:
                    left_out[name] = reason or f"too few patients of a class for {kind} {amount:g}"
                    continue
                scorer, _ = _chosen(train, rows, val, val_rows, column)
                used = test.used[:, column]
                scores, positive = scorer(test.features[used]), test.positive[used, column]
                values.setdefault(name, []).append(auroc(scores, positive))
                drawn.append(weighted_auroc(scores, positive, weights[:, used]))
            if drawn:
                sampled.append(mean_of_draws(drawn))
        row: dict[str, Any] = {kind: amount, "auroc": None, "low": None, "high": None, "seeds": repeats}
        if values:
            row["auroc"] = float(np.mean([np.mean(found) for found in values.values()]))
            row["low"], row["high"] = interval(np.concatenate(sampled))
        results.append(row | {"labels": len(values), "left_out": left_out})
    return results


def _draw(
    train: Labelled, val: Labelled, column: int, kind: str, amount: float, rng: np.random.Generator
) -> tuple[Rows | None, Rows | None]:
    """Rows to learn from and rows to choose by; None where there are too few of a class."""
    if kind == "shots":
        return _shots(train, column, int(amount), rng), _shots(val, column, int(amount), rng)
    kept = _share(train, amount, rng)
    rows = kept[train.used[kept, column]]
    both = len(set(train.positive[rows, column].tolist())) == 2
    return rows if both else None, np.flatnonzero(val.used[:, column])


def _reason(train: Labelled, val: Labelled, column: int) -> str:
    for name, part in (("train", train), ("val", val)):
        if lack := part.lacks(column):
            return f"{name}: {lack}"
    return ""


def _chosen(train: Labelled, rows: Rows, val: Labelled, val_rows: Rows, column: int) -> tuple[Scorer, float]:
    """The probe with the best AUROC on the validation rows, and its strength; of equal ones the most penalised."""
    best: tuple[float, Scorer, float] | None = None
    for strength in STRENGTHS:
        scorer = fit(train.features[rows], train.positive[rows, column], strength)
        value = auroc(scorer(val.features[val_rows]), val.positive[val_rows, column])
        if best is None or value > best[0] + 1e-12:
            best = value, scorer, strength
    assert best is not None
    return best[1], best[2]


def fit(features: NDArray[np.float32], positive: NDArray[np.bool_], strength: float) -> Scorer:
    """Logistic regression with an intercept; scores are its logits."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a strength that does not converge loses on validation
        model = LogisticRegression(C=strength, max_iter=1000).fit(features.astype(np.float64), positive)
    weight, bias = model.coef_[0], float(model.intercept_[0])
    return lambda rows: np.asarray(rows.astype(np.float64) @ weight + bias)


def _shots(data: Labelled, column: int, k: int, rng: np.random.Generator) -> Rows | None:
    """Rows of k positive and k negative studies, no two of a patient within a class; None if there are not so many."""
    rows: list[int] = []
    for wanted in (True, False):
        taken: dict[str, int] = {}
        candidates = np.flatnonzero(data.used[:, column] & (data.positive[:, column] == wanted))
        for row in rng.permutation(candidates):
            taken.setdefault(data.patients[row], int(row))
            if len(taken) == k:
                break
        if len(taken) < k:
            return None
        rows += taken.values()
    return np.array(rows)


def _share(data: Labelled, share: float, rng: np.random.Generator) -> Rows:
    """Rows of a share of the patients, one patient at least."""
    patients = sorted(set(data.patients))
    count = max(1, round(share * len(patients)))
    kept = {patients[number] for number in rng.permutation(len(patients))[:count]}
    return np.array([row for row, patient in enumerate(data.patients) if patient in kept])
