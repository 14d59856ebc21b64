"""Held-out evaluation of a bundle on shards: zero-shot AUROC with intervals, and retrieval both ways."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from medclip_lab import progress
from medclip_lab.data.decode import DecodeError, decode_image
from medclip_lab.data.findings import ABSENT, PRESENT
from medclip_lab.data.manifest import Manifest
from medclip_lab.data.quarantine import Quarantine
from medclip_lab.data.reader import read_split
from medclip_lab.errors import UserError
from medclip_lab.evaluation.metrics import auroc, interval, patient_weights, retrieval, weighted_auroc
from medclip_lab.files import digest
from medclip_lab.inference.encoder import Encoder

ImageChange = Callable[[Image.Image], Image.Image]


@dataclass
class HeldOut:
    """The studies of a split as arrays: one image a study, the first."""

    features: NDArray[np.float32]
    """[N, D] of the images."""
    text_features: NDArray[np.float32]
    """[M, D] of the reports of the studies that have one."""
    study_ids: list[str] = field(default_factory=list)
    patient_ids: list[str] = field(default_factory=list)
    labels: list[dict[str, int | None]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    """Report of each study, empty where there is none."""
    images: list[bytes] = field(default_factory=list)
    """Encoded first image of each study, kept only on request."""


def blur(share: float) -> ImageChange:
    """A Gaussian blur whose radius is this share of the image's side: what is left is exposure and rough shape."""
    return lambda image: image.filter(ImageFilter.GaussianBlur(share * max(image.size)))


def encode_split(
    encoder: Encoder,
    shards: str | Path,
    split: str,
    change: ImageChange | None = None,
    max_bad: float = 0.01,
    keep_images: bool = False,
    texts: bool = True,
) -> tuple[HeldOut, Quarantine]:
    """Embed a split through a bundle.

    Args:
        change: applied to every decoded image (a control such as `blur`).
        keep_images: keep the encoded images, for a page that shows some.
        texts: embed the reports too.
    """
    manifest = Manifest.load(shards)
    total = manifest.count(split)
    quarantine = Quarantine(total, max_bad)
    held_out = HeldOut(np.empty(0, np.float32), np.empty(0, np.float32))

    def images() -> Iterator[Image.Image]:
        for study in progress.track(read_split(manifest, split, quarantine), f"encode {split}", total):
            if not study.images:
                continue
            suffix, data = study.images[0]
            try:
                image = encoder.preprocess.window(decode_image(data, suffix))
            except DecodeError as error:
                quarantine.add(study.shard, study.key, "unreadable image", str(error))
                continue
            record = study.record
            held_out.study_ids.append(record["study_id"])
            held_out.patient_ids.append(record["patient_id"])
            held_out.labels.append(record.get("labels") or {})
            held_out.texts.append(record.get("text") or "")
            if keep_images:
                held_out.images.append(data)
            yield change(image) if change else image

    held_out.features = encoder.encode_images(images())
    if not held_out.study_ids:
        raise UserError(f"evaluate: split {split!r} of {manifest.folder} has no images")
    if texts:
        held_out.text_features = encoder.encode_texts([text for text in held_out.texts if text])
    return held_out, quarantine


def label_truth(labels: list[dict[str, int | None]], name: str) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(positive, used) of each study for one label: uncertain is left out, not mentioned counts as absent.

    A study without a single label is not labelled, and a source that never speaks of a label leaves nothing to use.
    """
    values = [row.get(name) for row in labels]
    if all(value is None for value in values):
        return np.zeros(len(values), bool), np.zeros(len(values), bool)
    positive = np.array([value == PRESENT for value in values])
    labelled = np.array([any(value is not None for value in row.values()) for row in labels])
    used = labelled & np.array([value in (PRESENT, ABSENT, None) for value in values])
    return positive, used


def zero_shot(
    encoder: Encoder, held_out: HeldOut, labelset: str | Path, draws: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """AUROC of every label of a set with 95 % intervals bootstrapped by patient, and their mean.

    A label with one class only has the value None and a reason.
    """
    if draws < 1:
        raise UserError(f"evaluate: at least one bootstrap draw is needed, got {draws}")
    classifier = encoder.zero_shot_classifier(labelset)
    scores = classifier.scores(held_out.features).astype(np.float64)
    weights = patient_weights(held_out.patient_ids, draws, seed)
    labels: list[dict[str, Any]] = []
    sampled = []
    for column, name in enumerate(classifier.names):
        positive, used = label_truth(held_out.labels, name)
        counts = {"positives": int(positive[used].sum()), "negatives": int((used & ~positive).sum())}
        row: dict[str, Any] = {"name": name, "auroc": None, "low": None, "high": None, **counts}
        if min(counts.values()) == 0:
            row["reason"] = "one class only" if sum(counts.values()) else "not labelled in this data"
        else:
            row["auroc"] = auroc(scores[used, column], positive[used])
            sampled.append(weighted_auroc(scores[used, column], positive[used], weights[:, used]))
            row["low"], row["high"] = interval(sampled[-1])
        labels.append(row)
    measured = [row["auroc"] for row in labels if row["auroc"] is not None]
    if not measured:
        names = ", ".join(classifier.names[:5])
        raise UserError(
            f"evaluate: no label of set {classifier.labelset!r} ({names}, ...) has both classes in this data"
        )
    # A label with few positives has none in some draws: those draws are the mean of the others.
    low, high = interval(np.nanmean(sampled, axis=0))
    return {
        "labelset": classifier.labelset,
        "labelset_hash": classifier.labelset_hash,
        "score": classifier.score_type,
        "policy": "uncertain left out, not mentioned counts as absent; first image of each study",
        "macro": {"auroc": float(np.mean(measured)), "low": low, "high": high, "labels": len(measured)},
        "labels": labels,
        "bootstrap": {"draws": draws, "by": "patient", "seed": seed},
    }


def paired_retrieval(held_out: HeldOut) -> dict[str, Any] | None:
    """R@K both ways over the full gallery; studies with word-identical reports are positives of each other."""
    rows = [row for row, text in enumerate(held_out.texts) if text]
    if len(rows) < 2:
        return None
    groups = [digest(held_out.texts[row]) for row in rows]
    images = held_out.features[rows]
    return {
        "positives": "studies with the same report text",
        "distinct_texts": len(set(groups)),
        "image_to_text": asdict(retrieval(images, held_out.text_features, groups, groups)),
        "text_to_image": asdict(retrieval(held_out.text_features, images, groups, groups)),
    }


def shuffle_labels(held_out: HeldOut, seed: int) -> HeldOut:
    """The control in which every study has the labels of another one: whatever is measured then is chance."""
    order = np.random.default_rng(seed).permutation(len(held_out.labels))
    return replace(held_out, labels=[held_out.labels[row] for row in order])


def evaluate(
    encoder: Encoder,
    shards: str | Path,
    split: str = "test",
    labelset: str | Path = "chexpert14",
    *,
    draws: int = 1000,
    seed: int = 0,
    change: ImageChange | None = None,
    control: bool = False,
    max_bad: float = 0.01,
) -> dict[str, Any]:
    """Everything above on one split, as a JSON-like dict that names what it was computed from.

    Args:
        change: a control that changes the images.
        control: shuffle the labels between studies.
    """
    held_out, quarantine = encode_split(encoder, shards, split, change, max_bad)
    if control:
        held_out = shuffle_labels(held_out, seed)
    results = report(encoder, held_out, shards, split, labelset, draws=draws, seed=seed)
    return results | {"unusable": dict(quarantine.causes), "shuffled_labels": control}


def report(
    encoder: Encoder,
    held_out: HeldOut,
    shards: str | Path,
    split: str,
    labelset: str | Path,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """The results of an embedded split."""
    manifest = Manifest.load(shards)
    return {
        "bundle": encoder.fingerprint,
        "shards": digest([shard.sha256 for shard in manifest.of_split(split)]),
        "split": split,
        "studies": len(held_out.study_ids),
        "patients": len(set(held_out.patient_ids)),
        "zero_shot": zero_shot(encoder, held_out, labelset, draws, seed),
        "retrieval": paired_retrieval(held_out),
    }


def summary(results: dict[str, Any]) -> str:
    """The results as lines for people."""
    shot = results["zero_shot"]
    macro = shot["macro"]
    lines = [
        f"split {results['split']}: {results['studies']} studies of {results['patients']} patients",
        f"zero-shot AUROC, label set {shot['labelset']} ({shot['score']}; 95 % interval, bootstrap by patient):",
    ]
    for row in shot["labels"]:
        if row["auroc"] is None:
            lines.append(f"  {row['name']:<28} -      ({row['reason']})")
        else:
            span = f"{row['low']:.3f}-{row['high']:.3f}"
            counts = f"({row['positives']} of {row['positives'] + row['negatives']})"
            lines.append(f"  {row['name']:<28} {row['auroc']:.3f}  {span}  {counts}")
    lines.append(
        f"  {'mean of ' + str(macro['labels']):<28} {macro['auroc']:.3f}  {macro['low']:.3f}-{macro['high']:.3f}"
    )
    for direction in ("image_to_text", "text_to_image"):
        if results["retrieval"]:
            found = results["retrieval"][direction]
            recall = "  ".join(f"R@{k} {v:.3f} (chance {found['chance'][k]:.3f})" for k, v in found["recall"].items())
            lines.append(
                f"{direction.replace('_', ' ')}: {recall}  median rank {found['median_rank']:.0f} of {found['gallery']}"
            )
    return "\n".join(lines)
