"""Zero-shot classification of an embedded split: what the scores of a label set are worth, and beside another model."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medclip_lab.data.findings import PRESENT
from medclip_lab.errors import UserError
from medclip_lab.evaluation.held_out import HeldOut, label_truth
from medclip_lab.evaluation.metrics import Floats, patient_weights
from medclip_lab.evaluation.scored import (
    DECIDING,
    RANKING,
    Measured,
    Scored,
    compare_models,
    mean_over,
    measure,
    measure_classes,
)
from medclip_lab.inference.classifier import ScoreType, ZeroShotClassifier
from medclip_lab.inference.encoder import Encoder
from medclip_lab.inference.ensemble import Average, ClassifierEnsemble
from medclip_lab.inference.labelset import LabelSet, means_nothing


@dataclass(frozen=True)
class Scoring:
    """How a classifier is made of a bundle; see `Encoder.zero_shot_classifier`."""

    score_type: ScoreType | None = None
    temperature: float | None = None
    batch_zscore: bool = False
    truncate: bool = False
    calibrated: bool = True

    def classifier(self, encoder: Encoder, labelset: str | Path | LabelSet) -> ZeroShotClassifier:
        return encoder.zero_shot_classifier(labelset, **asdict(self))


Embedded = tuple[Encoder, HeldOut]
"""A model and a split as it embeds it."""


def zero_shot(
    encoder: Encoder,
    held_out: HeldOut,
    labelset: str | Path | LabelSet,
    draws: int = 1000,
    seed: int = 0,
    scoring: Scoring = Scoring(),
    ensemble: Sequence[Embedded] = (),
    average: Average = "scores",
    compare: Embedded | None = None,
) -> dict[str, Any]:
    """Metrics of every label of a set with 95 % intervals bootstrapped by patient, and their means.

    A metric that cannot be had has the value None and a reason: one class only, not labelled, not calibrated.

    Args:
        ensemble: further models whose scores are averaged with this one's.
        compare: another model for paired tests on the same patients.

    Raises:
        UserError: no label of the set is known here, or patients that the calibration was made with.
    """
    if draws < 1:
        raise UserError(f"evaluate: at least one bootstrap draw is needed, got {draws}")
    prompts = labelset if isinstance(labelset, LabelSet) else encoder.labelset(labelset)
    classifier, scores = scores_of([(encoder, held_out), *ensemble], labelset, scoring, average)
    joint = joint_features([held_out, *(split for _, split in ensemble)])
    weights = patient_weights(held_out.patient_ids, draws, seed)
    measured = measure(_scored(classifier, scores, held_out), weights, held_out.patient_ids)
    if all(row["auroc"] is None for row in measured.rows):
        names = ", ".join(classifier.names[:5])
        raise UserError(
            f"evaluate: no label of set {classifier.labelset!r} ({names}, ...) has both classes in this data"
        )
    result = {
        "labelset": classifier.labelset,
        "labelset_hash": classifier.labelset_hash,
        "score": classifier.score_type,
        "rule": classifier.rule,
        "calibration": _calibration(classifier, joint, held_out),
        "policy": "uncertain left out, not mentioned counts as absent; first image of each study",
        "no_finding": _no_finding(prompts),
        "macro": _macro(measured, classifier.names),
        "groups": {name: _macro(measured, members) for name, members in prompts.groups.items()},
        "labels": measured.rows,
        "bootstrap": {"draws": draws, "by": "patient", "seed": seed, "level": 0.95},
    }
    if classifier.exclusive:
        result["exclusive"] = measure_classes(scores, _class_of(held_out, classifier.names), classifier.names, weights)
    if compare is not None:
        other = scoring.classifier(compare[0], labelset)
        assert compare[1].study_ids == held_out.study_ids, "both models read the same shards"
        beside = measure(_scored(other, other.scores(compare[1].features), compare[1]), weights, held_out.patient_ids)
        result["comparison"] = {
            "with": compare[0].fingerprint,
            "rule": other.rule,
            "calibration": _calibration(other, compare[1].features, compare[1]),
            **compare_models(measured, beside, classifier.names),
        }
    return result


def scores_of(
    models: Sequence[Embedded], labelset: str | Path | LabelSet, scoring: Scoring, average: Average = "scores"
) -> tuple[ZeroShotClassifier | ClassifierEnsemble, Floats]:
    """The classifier of a model, or of several averaged, and its scores [N, K] of their split."""
    classifier = classifier_of([model for model, _ in models], labelset, scoring, average)
    return classifier, scores_by(classifier, [split for _, split in models])


def classifier_of(
    models: Sequence[Encoder], labelset: str | Path | LabelSet, scoring: Scoring, average: Average = "scores"
) -> ZeroShotClassifier | ClassifierEnsemble:
    """The classifier of a model, or of several averaged."""
    members = [scoring.classifier(model, labelset) for model in models]
    return members[0] if len(members) == 1 else ClassifierEnsemble(members, average, scoring.calibrated)


def scores_by(classifier: ZeroShotClassifier | ClassifierEnsemble, splits: Sequence[HeldOut]) -> Floats:
    """[N, K] scores of a split as each model of the classifier embeds it."""
    if isinstance(classifier, ClassifierEnsemble):
        return classifier.scores([split.features for split in splits])
    return classifier.scores(splits[0].features)


def joint_features(splits: Sequence[HeldOut]) -> NDArray[np.float32]:
    """[N, sum of D]: features of one split by several models, side by side."""
    return np.concatenate([split.features for split in splits], axis=1)


def _scored(classifier: ZeroShotClassifier | ClassifierEnsemble, scores: Floats, held_out: HeldOut) -> list[Scored]:
    known = sorted({name for row in held_out.labels for name, value in row.items() if value is not None})
    calibration = classifier.calibration
    labels = []
    for column, name in enumerate(classifier.names):
        positive, used = label_truth(held_out.labels, name)
        label = Scored(name, scores[:, column], positive, used)
        near = get_close_matches(name, [other for other in known if other not in classifier.names], n=1)
        if near:
            label.unlabelled += f"; did you mean {near[0]!r}?"
        if calibration is not None:
            label.probabilities = calibration.probabilities(name, scores[:, column])
            label.threshold = calibration.threshold(name)
            label.reason = calibration.labels[name].get("reason", label.reason)
        labels.append(label)
    return labels


def _calibration(
    classifier: ZeroShotClassifier | ClassifierEnsemble, features: NDArray[np.float32], held_out: HeldOut
) -> dict[str, Any] | None:
    """What the probabilities rest on, after a look whether they were fitted on these very patients."""
    calibration = classifier.calibration
    if calibration is None:
        return None
    patients = set(held_out.patient_ids)
    shared = calibration.overlap(patients)
    if shared:
        raise UserError(
            f"evaluate: {shared} of {len(patients)} patients are those the calibration was made with, which would "
            "flatter it: take another split, or --no-calibration"
        )
    facts = calibration.facts
    told = {name: facts[name] for name in ("method", "threshold_rule", "split", "shards", "images")}
    flags = calibration.distances(features) > facts["out_of_domain"]["threshold"]
    domain = {"flagged": float(flags.mean()), "aimed_at": facts["out_of_domain"]["aimed_at"]}
    return {"hash": calibration.hash, **told, "shared_patients": 0, "out_of_domain": domain}


def _no_finding(labelset: LabelSet) -> dict[str, str]:
    """How the labels that say there is nothing are scored: never by denying them."""
    return {
        label.name: f"1 - the greatest score of {', '.join(label.none_of)}" if label.none_of else "prompts of its own"
        for label in labelset.labels
        if label.none_of or means_nothing(label.name)
    }


def _macro(measured: Measured, names: Sequence[str]) -> dict[str, Any]:
    means = {metric: mean_over(measured, names, metric)[0] for metric in (*RANKING, *DECIDING)}
    first = means["auroc"]
    ends = {end: first.get(end) for end in ("low", "high")}
    return {"auroc": first["value"], **ends, "labels": first["labels"], "metrics": means}


def _class_of(held_out: HeldOut, names: Sequence[str]) -> NDArray[np.int64]:
    """[N] number of the one label of an exclusive set that a study has; -1 if it has none of them, or several."""
    present = [[number for number, name in enumerate(names) if row.get(name) == PRESENT] for row in held_out.labels]
    return np.array([found[0] if len(found) == 1 else -1 for found in present])
