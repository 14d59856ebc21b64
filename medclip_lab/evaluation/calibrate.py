"""Fits what `inference.calibration` applies, on validation patients: probabilities, thresholds, a domain."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medclip_lab.data.manifest import Manifest
from medclip_lab.data.quarantine import Quarantine
from medclip_lab.data.reader import read_split
from medclip_lab.errors import UserError
from medclip_lab.evaluation.bootstrap import wilson
from medclip_lab.evaluation.gather import Gathered, gather
from medclip_lab.evaluation.held_out import HeldOut, ImageChange, label_truth
from medclip_lab.evaluation.labels_from import LABELS, LabelsFrom, lines_of_labels
from medclip_lab.evaluation.metrics import Bools, Floats, Ranked, auroc
from medclip_lab.evaluation.zero_shot import Scoring, classifier_of, joint_features, scores_by
from medclip_lab.files import digest
from medclip_lab.inference.bundle import versions
from medclip_lab.inference.calibration import FORMAT, Calibration, Curve, Method, hash_patients, mahalanobis
from medclip_lab.inference.classifier import PROBABILITY_LIKE
from medclip_lab.inference.encoder import Encoder
from medclip_lab.inference.ensemble import Average
from medclip_lab.inference.labelset import unknown

FEWEST = 5
"""Of positives, and of negatives: with fewer there is nothing to fit."""
FEWEST_IMAGES, FEWEST_PATIENTS = 20, 8
TILES = 8
"""Tiles along a side that are shuffled to make an image that is none of a patient."""


@dataclass(frozen=True)
class ThresholdRule:
    """How the probability is chosen from which on a finding is called present."""

    name: str
    at_least: float = 0.0
    """The sensitivity to be reached, for "sensitivity"."""

    @classmethod
    def parse(cls, text: str) -> "ThresholdRule":
        """From "youden", "mcc" or "sensitivity=0.95".

        Raises:
            UserError: anything else.
        """
        name, equals, value = text.partition("=")
        if name in ("youden", "mcc") and not equals:
            return cls(name)
        if name == "sensitivity" and equals:
            try:
                at_least = float(value)
            except ValueError:
                at_least = 0.0
            if 0 < at_least <= 1:
                return cls(name, at_least)
        raise UserError(f"--threshold: {text!r} is none of youden, mcc, sensitivity=0.95 (above 0, at most 1)")

    def choose(self, probabilities: Floats, positive: Bools) -> float:
        """The threshold on these samples; of equally good ones the highest."""
        ranked = Ranked(probabilities, positive)
        counts = ranked.plain()
        tp, fp = np.cumsum(counts.hits[:, 0]), counts.false_positives[:, 0]
        positives, negatives = counts.positives[0], counts.negatives[0]
        if self.name == "sensitivity":
            return float(ranked.values[np.argmax(tp >= self.at_least * positives - 1e-9)])
        if self.name == "youden":
            return float(ranked.values[np.argmax(tp / positives - fp / negatives)])
        over = tp * (negatives - fp) - fp * (positives - tp)
        margins = (tp + fp) * (positives + negatives - tp - fp)
        return float(ranked.values[np.argmax(np.where(margins > 0, over / np.sqrt(np.maximum(margins, 1)), -1))])


def fit_curve(scores: Floats, positive: Bools, method: Method, of_logit: bool) -> Curve:
    """A curve from scores [N] to probabilities, of the training samples [N] alone.

    Raises:
        ValueError: a curve that would have to fall.
    """
    from scipy.optimize import minimize_scalar
    from sklearn.isotonic import IsotonicRegression

    values = Curve(method, {}, of_logit).feature(scores)
    if method == "isotonic":
        fitted = IsotonicRegression(out_of_bounds="clip").fit(scores, positive.astype(np.float64))
        knots = {"scores": fitted.X_thresholds_.tolist(), "probabilities": fitted.y_thresholds_.tolist()}
        return Curve(method, knots, of_logit)
    if method == "platt":
        return Curve(method, _platt(values, positive), of_logit)

    def loss(log_temperature: float) -> float:
        z = values * np.exp(-log_temperature)
        return float(np.logaddexp(0, np.where(positive, -z, z)).mean())

    return Curve(
        method, {"temperature": float(np.exp(minimize_scalar(loss, bounds=(-7, 7), method="bounded").x))}, of_logit
    )


def _platt(values: Floats, positive: Bools) -> dict[str, float]:
    """Logistic regression on Platt's smoothed targets, which keep it finite where the classes are apart."""
    from sklearn.linear_model import LogisticRegression

    center, spread = values.mean(), max(float(values.std()), 1e-12)
    count = int(positive.sum())
    target = np.where(positive, (count + 1) / (count + 2), 1 / (len(positive) - count + 2))
    # A target of t is a positive of weight t and a negative of weight 1 - t.
    both = np.tile((values - center) / spread, 2)[:, None]
    sides = np.repeat([1, 0], len(values))
    model = LogisticRegression(C=1e10, tol=1e-8, max_iter=1000)
    model.fit(both, sides, sample_weight=np.concatenate([target, 1 - target]))
    slope, intercept = float(model.coef_[0, 0]) / spread, float(model.intercept_[0])
    if slope <= 0:
        raise ValueError("its probability would fall as the score rises")
    return {"slope": slope, "intercept": intercept - slope * float(center)}


def fit_label(
    name: str, scores: Floats, positive: Bools, method: Method, rule: ThresholdRule, of_logit: bool
) -> dict[str, Any]:
    """One row of a calibration: parameters and threshold, or the reason why there are none."""
    counts = {"n": len(positive), "positives": int(positive.sum()), "prevalence": None}
    row: dict[str, Any] = {"name": name, **counts, "parameters": None, "threshold": None}
    fewest = min(counts["positives"] or 0, len(positive) - int(positive.sum()))
    if not len(positive):
        return row | {"reason": "not labelled in the validation data"}
    row["prevalence"] = float(positive.mean())
    if fewest < FEWEST:
        return row | {"reason": f"{fewest} of one class in the validation data; at least {FEWEST} are needed"}
    row["auroc"] = auroc(scores, positive)
    if row["auroc"] <= 0.5:
        return row | {
            "reason": f"its scores order the validation images no better than chance (AUROC {row['auroc']:.2f})"
        }
    try:
        curve = fit_curve(scores, positive, method, of_logit)
    except ValueError as error:
        return row | {"reason": str(error)}
    probabilities = curve.probability(scores)
    threshold = rule.choose(probabilities, positive)
    decided = probabilities >= threshold
    return row | {
        "parameters": curve.parameters,
        "threshold": threshold,
        "sensitivity": float(decided[positive].mean()),
        "specificity": float((~decided[~positive]).mean()),
    }


def fit_domain(
    features: NDArray[np.float32], patients: Sequence[str], false_alarm: float
) -> tuple[dict[str, NDArray[np.float32]], dict[str, Any]]:
    """The limits of what the images were like: Mahalanobis distance, a limit, and how often it is wrong.

    Half of the patients give mean and covariance (shrunk by Ledoit and Wolf, 2004), a quarter the limit that lets this
    share of images pass it, and the last quarter measures the share that does. Mean and covariance are kept, and no
    embedding of a patient, as a search for nearest neighbours would need.

    Raises:
        UserError: too few images.
    """
    from sklearn.covariance import LedoitWolf

    # In the order of a hash, which is none of age, ward or date.
    order = sorted(set(patients), key=lambda patient: hashlib.sha256(patient.encode()).digest())
    if len(features) < FEWEST_IMAGES or len(order) < FEWEST_PATIENTS:
        raise UserError(
            f"calibrate: {len(features)} images of {len(order)} patients are too few: take at least {FEWEST_IMAGES} of "
            f"{FEWEST_PATIENTS}"
        )
    quarter = {patient: 4 * place // len(order) for place, patient in enumerate(order)}
    part = np.array([quarter[patient] for patient in patients])
    halves = part < 2, part == 2, part == 3
    model = LedoitWolf().fit(features[halves[0]].astype(np.float64))
    values, vectors = np.linalg.eigh(model.covariance_)
    whitening = vectors / np.sqrt(np.maximum(values, 1e-12))
    domain = {
        "mean": model.location_.astype(np.float32),
        "whitening": np.ascontiguousarray(whitening, dtype=np.float32),
    }
    for_limit, for_error = (mahalanobis(features[rows], domain["mean"], domain["whitening"]) for rows in halves[1:])
    limit = float(np.quantile(for_limit, 1 - false_alarm, method="higher"))
    alarms = int((for_error > limit).sum())
    low, high = wilson(alarms, len(for_error))
    measured = {"value": alarms / len(for_error), "low": low, "high": high, "images": len(for_error)}
    return domain, {"distance": "Mahalanobis", "threshold": limit, "aimed_at": false_alarm, "false_alarms": measured}


def shuffle_tiles(image: Image.Image) -> Image.Image:
    """The same grey values in another place: 8 x 8 tiles in an order of no anatomy."""
    image = image.resize((image.width // TILES * TILES or TILES, image.height // TILES * TILES or TILES))
    wide, high = image.width // TILES, image.height // TILES
    mixed = image.copy()
    for place, tile in enumerate(np.random.default_rng(0).permutation(TILES * TILES).tolist()):
        left, top = tile % TILES * wide, tile // TILES * high
        mixed.paste(image.crop((left, top, left + wide, top + high)), (place % TILES * wide, place // TILES * high))
    return mixed


def calibrate(
    encoder: Encoder,
    shards: str | Path,
    labelset: str | Path,
    split: str = "val",
    *,
    method: Method = "platt",
    threshold: str = "youden",
    false_alarm: float = 0.05,
    scoring: Scoring = Scoring(calibrated=False),  # noqa: B008 - frozen
    max_bad: float = 0.01,
    command: str = "",
    labels_from: str = LABELS,
    ensemble: Sequence[Encoder] = (),
    average: Average = "scores",
) -> Calibration:
    """Fit probabilities, thresholds and the domain on a validation split; `Calibration.save` puts them into the bundle.

    Args:
        method, threshold: see `Curve` and `ThresholdRule`.
        false_alarm: share of validation images that may be called out of domain.
        labels_from: see `LabelsFrom`.
        ensemble, average: further models whose scores are averaged with this one's: the calibration is then that of all
            of them together, and the domain that of their features side by side.

    Raises:
        UserError: test patients, or a rule, method or data that do not serve.
    """
    rule = ThresholdRule.parse(threshold)
    if method not in get_args(Method):
        raise UserError(f"calibrate: no method is called {unknown(method, get_args(Method))}")
    if not 0 < false_alarm < 1:
        raise UserError(f"calibrate: --false-alarm is a share between 0 and 1, got {false_alarm:g}")
    if "test" in split.split("+"):
        raise UserError(f"calibrate: split {split!r} is for evaluation alone; take 'val'")
    truth = LabelsFrom(labels_from)
    models = [encoder, *ensemble]
    classifier = classifier_of(models, labelset, scoring, average)
    if scoring.batch_zscore:
        raise UserError("calibrate: a score that depends on the other images of its batch cannot be calibrated")
    if method == "temperature" and classifier.score_type not in PROBABILITY_LIKE:
        raise UserError(
            f"calibrate: a temperature needs scores in (0, 1), not the cosines of {classifier.score_type!r}"
        )

    def embed(change: ImageChange | None = None) -> list[Gathered]:
        return [gather(model, shards, split, change=change, max_bad=max_bad, texts=False) for model in models]

    found = embed()
    held_out = found[0].held_out
    held_out.labels, told = truth.label(found[0].records, classifier.names)
    shared = _test_patients(shards) & set(held_out.patient_ids)
    if shared:
        raise UserError(
            f"calibrate: {len(shared)} patients of split {split!r} stand in split 'test' too: prepare again"
        )
    features, foreign = (joint_features([part.held_out for part in parts]) for parts in (found, embed(shuffle_tiles)))
    domain, out_of_domain = fit_domain(features, held_out.patient_ids, false_alarm)
    far = mahalanobis(foreign, domain["mean"], domain["whitening"]) > out_of_domain["threshold"]
    scores = scores_by(classifier, [part.held_out for part in found])
    labels = _fit_labels(classifier.names, scores, held_out, method, rule, classifier.score_type in PROBABILITY_LIKE)
    if all(row["parameters"] is None for row in labels):
        row = labels[0]
        raise UserError(
            f"calibrate: no label of set {classifier.labelset!r} can be calibrated; {row['name']}: {row['reason']}"
        )
    facts = {
        "format": FORMAT,
        "bundle": encoder.fingerprint,
        "members": [model.fingerprint for model in models],
        "labelset": classifier.labelset,
        "labelset_hash": classifier.labelset_hash,
        "rule": classifier.rule,
        "of_logit": classifier.score_type in PROBABILITY_LIKE,
        "method": method,
        "threshold_rule": threshold,
        "split": split,
        "shards": digest([shard.sha256 for shard in Manifest.load(shards).of_split(split)]),
        "images": len(held_out.study_ids),
        "labels_from": told,
        "labels": labels,
        "out_of_domain": out_of_domain | {"detected": {f"{TILES} x {TILES} tiles shuffled": float(far.mean())}},
        "patients": hash_patients(held_out.patient_ids),
        "versions": versions(),
        "command": command,
    }
    return Calibration(facts, domain)


def _fit_labels(
    names: Sequence[str], scores: Floats, held_out: HeldOut, method: Method, rule: ThresholdRule, of_logit: bool
) -> list[dict[str, Any]]:
    rows = []
    for column, name in enumerate(names):
        positive, used = label_truth(held_out.labels, name)
        rows.append(fit_label(name, scores[used, column], positive[used], method, rule, of_logit))
    return rows


def _test_patients(shards: str | Path) -> set[str]:
    manifest = Manifest.load(shards)
    total = sum(shard.samples for shard in manifest.shards if shard.split == "test")
    return (
        {study.record["patient_id"] for study in read_split(manifest, "test", Quarantine(total, 1.0))}
        if total
        else set()
    )


def summary(calibration: Calibration) -> str:
    """The calibration as lines for people."""
    facts = calibration.facts
    lines = [
        f"label set {facts['labelset']}, {facts['rule']}; {facts['method']}, threshold by {facts['threshold_rule']}; "
        f"{facts['images']} images of {len(facts['patients']['hashes'])} patients, split {facts['split']}",
        *([f"of {len(facts['members'])} models together"] if len(facts["members"]) > 1 else []),
        *lines_of_labels(facts["labels_from"]),
    ]
    for row in facts["labels"]:
        if row["parameters"] is None:
            lines.append(f"  {row['name']:<28} -      ({row['reason']})")
        else:
            lines.append(
                f"  {row['name']:<28} threshold {row['threshold']:.3f}  sensitivity {row['sensitivity']:.3f}  "
                f"specificity {row['specificity']:.3f}  prevalence {row['prevalence']:.3f}"
            )
    domain = facts["out_of_domain"]
    alarms, found = domain["false_alarms"], next(iter(domain["detected"].items()))
    lines.append(
        f"out of domain: false alarms {alarms['value']:.3f} ({alarms['low']:.3f}-{alarms['high']:.3f}, aimed at "
        f"{domain['aimed_at']:g}); of images with {found[0]} {found[1]:.3f} are found"
    )
    return "\n".join(lines)
