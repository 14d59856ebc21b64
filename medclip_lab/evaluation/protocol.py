"""Held-out evaluation of a bundle on shards: zero-shot metrics with intervals and paired tests, and retrieval."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from medclip_lab.data.findings import PRESENT
from medclip_lab.data.manifest import Manifest
from medclip_lab.data.quarantine import Quarantine
from medclip_lab.evaluation.held_out import HeldOut, ImageChange, blur, encode_split, label_truth, shuffle_labels
from medclip_lab.evaluation.metrics import patient_weights
from medclip_lab.evaluation.retrieval import overlap_retrieval, retrieval
from medclip_lab.evaluation.scored import lines_of_classes
from medclip_lab.evaluation.zero_shot import Embedded, Scoring, zero_shot
from medclip_lab.files import digest
from medclip_lab.inference.bundle import versions
from medclip_lab.inference.encoder import Encoder
from medclip_lab.inference.ensemble import Average
from medclip_lab.inference.labelset import means_nothing

__all__ = [
    "HeldOut", "ImageChange", "Scoring", "blur", "encode_split", "evaluate", "label_truth", "paired_retrieval",
    "report", "shuffle_labels", "summary", "zero_shot",
]  # fmt: skip


def paired_retrieval(held_out: HeldOut, draws: int = 0, seed: int = 0, collapse: bool = False) -> dict[str, Any] | None:
    """R@K, P@K, ranks both ways over the full gallery; studies with word-identical reports are positives of each other.

    Args:
        draws: of the bootstrap by patient, for intervals of R@K; 0 leaves them out.
        collapse: a report that stands there several times is one item of the gallery and one query.
    """
    rows = [row for row, text in enumerate(held_out.texts) if text]
    if len(rows) < 2:
        return None
    groups = [digest(held_out.texts[row]) for row in rows]
    kept = list({group: number for number, group in reversed(list(enumerate(groups)))}.values()) if collapse else None
    of_text = groups if kept is None else [groups[number] for number in kept]
    images = held_out.features[rows]
    texts = held_out.text_features if kept is None else held_out.text_features[kept]
    drawn = patient_weights([held_out.patient_ids[row] for row in rows], draws, seed) if draws else None
    # A collapsed report may be that of several patients: no draw of patients says how often it is asked.
    found = retrieval(images, texts, groups, of_text, weights=(drawn, None if collapse else drawn))
    return {
        "positives": "studies with the same report text",
        "duplicate_texts": "collapsed" if collapse else "positives of each other",
        "ties": "lost; recall_ties_shared is the mean over their orders",
        "distinct_texts": len(set(groups)),
        "image_to_text": asdict(found[0]),
        "text_to_image": asdict(found[1]),
        "by_findings": _by_findings(held_out, rows),
    }


def _by_findings(held_out: HeldOut, rows: Sequence[int]) -> dict[str, Any]:
    """nDCG by shared findings, image to report and back, and image to image without itself."""
    labelled = [
        (place, row) for place, row in enumerate(rows) if any(v is not None for v in held_out.labels[row].values())
    ]
    names = sorted({name for _, row in labelled for name in held_out.labels[row] if not means_nothing(name)})
    findings = np.array([[held_out.labels[row].get(name) == PRESENT for name in names] for _, row in labelled])
    if len(labelled) < 2 or not findings.any():
        return {"value": None, "reason": "no finding is labelled in this data"}
    images = held_out.features[[row for _, row in labelled]]
    texts = held_out.text_features[[place for place, _ in labelled]]
    return {
        "image_to_text": overlap_retrieval(images, texts, findings, findings),
        "text_to_image": overlap_retrieval(texts, images, findings, findings),
        "image_to_image": overlap_retrieval(images, images, findings, findings, exclude_self=True),
    }


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
    scoring: Scoring = Scoring(),  # noqa: B008 - frozen
    ensemble: Sequence[Encoder] = (),
    average: Average = "scores",
    compare: Encoder | None = None,
    collapse: bool = False,
) -> dict[str, Any]:
    """Everything above on one split, as a JSON-like dict that names what it was computed from.

    Args:
        change: a control that changes the images.
        control: shuffle the labels between studies.
        ensemble, average, compare: see `zero_shot`.
        collapse: see `paired_retrieval`.
    """

    def embed(model: Encoder, texts: bool) -> tuple[HeldOut, Quarantine]:
        held_out, quarantine = encode_split(model, shards, split, change, max_bad, texts=texts)
        return (shuffle_labels(held_out, seed) if control else held_out), quarantine

    held_out, quarantine = embed(encoder, True)
    results = report(
        encoder,
        held_out,
        shards,
        split,
        labelset,
        draws=draws,
        seed=seed,
        scoring=scoring,
        ensemble=[(member, embed(member, False)[0]) for member in ensemble],
        average=average,
        compare=None if compare is None else (compare, embed(compare, False)[0]),
        collapse=collapse,
    )
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
    scoring: Scoring = Scoring(),  # noqa: B008 - frozen
    ensemble: Sequence[Embedded] = (),
    average: Average = "scores",
    compare: Embedded | None = None,
    collapse: bool = False,
) -> dict[str, Any]:
    """The results of an embedded split."""
    manifest = Manifest.load(shards)
    return {
        "bundle": encoder.fingerprint,
        "ensemble": [member.fingerprint for member, _ in ensemble],
        "shards": digest([shard.sha256 for shard in manifest.of_split(split)]),
        "split": split,
        "studies": len(held_out.study_ids),
        "patients": len(set(held_out.patient_ids)),
        "zero_shot": zero_shot(
            encoder, held_out, labelset, draws, seed, scoring, ensemble, average=average, compare=compare
        ),
        "retrieval": paired_retrieval(held_out, draws, seed, collapse),
        "versions": versions(),
    }


def summary(results: dict[str, Any]) -> str:
    """The results as lines for people."""
    shot = results["zero_shot"]
    macro = shot["macro"]
    lines = [
        f"split {results['split']}: {results['studies']} studies of {results['patients']} patients",
        *(["  control: labels were shuffled between studies"] if results.get("shuffled_labels") else []),
        *([f"  control: images were blurred by {results['blur']:g} of their side"] if results.get("blur") else []),
        f"zero-shot AUROC, label set {shot['labelset']} ({shot['rule']}; 95 % interval, bootstrap by patient):",
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
    means = {name: told for name, told in macro["metrics"].items() if name != "auroc" and told["value"] is not None}
    lines += [
        f"  mean {name:<35} {told['value']:.3f}  {told['low']:.3f}-{told['high']:.3f}  (of {told['labels']})"
        for name, told in means.items()
    ]
    if shot["calibration"] is None:
        lines.append("  no threshold, no probability: the bundle is not calibrated for these scores")
    if "exclusive" in shot:
        lines += lines_of_classes(shot["exclusive"])
    for name, test in shot.get("comparison", {}).get("macro", {}).items():
        lines.append(
            f"  {name + ' less that of ' + shot['comparison']['with'][:12]:<40} {test['difference']:+.3f}  "
            f"{test['low']:+.3f} to {test['high']:+.3f}  p = {test['p']:.3f}"
        )
    for direction in ("image_to_text", "text_to_image"):
        if results["retrieval"]:
            found = results["retrieval"][direction]
            recall = "  ".join(f"R@{k} {v:.3f} (chance {found['chance'][k]:.3f})" for k, v in found["recall"].items())
            lines.append(
                f"{direction.replace('_', ' ')}: {recall}  median rank {found['median_rank']:.0f} of {found['gallery']}"
            )
    return "\n".join(lines)
