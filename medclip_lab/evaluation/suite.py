"""One evaluation with all that is asked for beside AUROC and retrieval, from features that are made once."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medclip_lab import progress
from medclip_lab.data.manifest import Manifest
from medclip_lab.errors import UserError
from medclip_lab.evaluation import compare, localisation
from medclip_lab.evaluation.corruptions import KINDS, SEVERITIES, corruption, robustness
from medclip_lab.evaluation.gather import Gathered, Labelled, gather
from medclip_lab.evaluation.held_out import ImageChange, encode_split, shuffle_labels
from medclip_lab.evaluation.knn import knn
from medclip_lab.evaluation.labels_from import LABELS, LabelsFrom, lines_of_labels
from medclip_lab.evaluation.leaks import leaks
from medclip_lab.evaluation.metrics import Floats, auroc
from medclip_lab.evaluation.probe import k_shot, linear_probe
from medclip_lab.evaluation.prompt_learning import learn_prompts
from medclip_lab.evaluation.protocol import report
from medclip_lab.evaluation.subgroups import subgroups
from medclip_lab.evaluation.zero_shot import Embedded, Scoring, scores_of
from medclip_lab.files import read_json
from medclip_lab.inference.bundle import versions
from medclip_lab.inference.encoder import Encoder
from medclip_lab.inference.ensemble import Average
from medclip_lab.losses.diagnostics import effective_rank

PROBES = ("linear", "few", "knn", "prompts")


@dataclass(frozen=True)
class Extras:
    """What is measured beside the zero-shot table."""

    subgroups: Sequence[str] = ()
    """Columns of the records."""
    probes: Sequence[str] = ()
    """Of `PROBES`: fitted on split train, chosen on val."""
    corruptions: bool = False
    baseline: Path | None = None
    """Results of another model with corruptions on the same shards, for mCE."""
    against: str | None = None
    """Shards of the training, for leaks."""
    pointing: bool = False
    """Where maps point, on studies whose records tell regions."""


@dataclass(frozen=True)
class Models:
    """How the model is asked, and which others stand beside it."""

    scoring: Scoring = field(default_factory=Scoring)
    ensemble: Sequence[Encoder] = ()
    """Their scores are averaged with the model's."""
    average: Average = "scores"
    compare: Encoder | None = None
    """Another one, for paired tests."""


@dataclass
class Evaluated:
    """Results, and what a page and a comparison need beside them."""

    results: dict[str, Any]
    found: Gathered
    data: Labelled
    scores: Floats
    """[N, K]."""


def run(
    encoder: Encoder,
    shards: str | Path,
    split: str,
    labelset: str | Path,
    extras: Extras,
    models: Models = Models(),
    *,
    collapse: bool = False,
    draws: int = 1000,
    seed: int = 0,
    change: ImageChange | None = None,
    control: bool = False,
    max_bad: float = 0.01,
    labels_from: str = LABELS,
) -> Evaluated:
    """Zero-shot AUROC, retrieval and effective rank of a split, and the extras.

    Args:
        collapse: see `paired_retrieval`.
        change: a control that changes the images.
        control: shuffle the labels between studies.
        labels_from: see `LabelsFrom`.

    Raises:
        UserError: a split, column or file that an extra needs is not there.
    """
    truth = LabelsFrom(labels_from)
    if unknown := set(extras.probes) - set(PROBES):
        raise UserError(f"probe: {min(unknown)!r} is none of {', '.join(PROBES)}")
    found = gather(encoder, shards, split, change=change, max_bad=max_bad)
    names = encoder.labelset(labelset).names
    labels, told = truth.label(found.records, names)
    found.held_out = replace(found.held_out, labels=labels)
    if control:
        found.held_out = shuffle_labels(found.held_out, seed)

    def embedded(other: Encoder) -> Embedded:
        held_out = encode_split(other, shards, split, change, max_bad, texts=False)[0]
        assert held_out.study_ids == found.held_out.study_ids, "all models read the same shards"
        return other, replace(held_out, labels=found.held_out.labels)

    ensemble = [embedded(other) for other in models.ensemble]
    results = report(
        encoder,
        found.held_out,
        shards,
        split,
        labelset,
        draws=draws,
        seed=seed,
        scoring=models.scoring,
        ensemble=ensemble,
        average=models.average,
        compare=None if models.compare is None else embedded(models.compare),
        collapse=collapse,
    )
    results |= {"unusable": found.unusable, "shuffled_labels": control, "versions": versions(), "labels_from": told}
    classifier, scores = scores_of([(encoder, found.held_out), *ensemble], labelset, models.scoring, models.average)
    data = Labelled.of(found.held_out, classifier.names)
    scores = scores.astype(np.float64)
    results["effective_rank"] = ranks(found)
    results["studies_hash"] = compare.studies_hash(found.held_out.study_ids)
    if extras.subgroups:
        results["subgroups"] = subgroups(data, scores, found.records, extras.subgroups, draws=draws, seed=seed)
    if extras.probes:
        results["probes"] = probes(encoder, shards, split, data, extras.probes, draws, seed, max_bad, truth)
    if extras.corruptions:
        features = found.held_out.features
        results["corruptions"] = corrupted(
            encoder, shards, split, labelset, models.scoring, data, features, extras.baseline, seed, max_bad
        )
    if extras.pointing:
        results["localisation"] = localisation.localisation(encoder, shards, split, max_bad=max_bad)
    if extras.against:
        results["leaks"] = leaks(extras.against, shards, "train", split, max_bad) | {"study_ids": None}
    return Evaluated(results, found, data, scores)


def ranks(found: Gathered) -> dict[str, Any]:
    """Effective rank: exp of the entropy of the features' normalised singular values (Roy & Vetterli, EUSIPCO 2007)."""
    width = int(found.held_out.features.shape[1])
    values: dict[str, Any] = {"image": None, "text": None, "of": width}
    for name, features in (("image", found.held_out.features), ("text", found.held_out.text_features)):
        if len(features) > 1:
            values[name] = float(effective_rank(torch.from_numpy(features)))
    return values


def probes(
    encoder: Encoder,
    shards: str | Path,
    split: str,
    test: Labelled,
    wanted: Sequence[str],
    draws: int,
    seed: int,
    max_bad: float,
    truth: LabelsFrom,
) -> dict[str, Any]:
    """The probes named in `wanted`, learned on split train and chosen on val."""
    parts = {}
    for part in ("train", "val"):
        if part in split.split("+"):
            raise UserError(f"probe: split {split!r} is what probes are fitted on: evaluate another one")
        there = gather(encoder, shards, part, texts=False, max_bad=max_bad)
        labels = truth.label(there.records, test.names)[0]
        parts[part] = Labelled.of(replace(there.held_out, labels=labels), test.names)
    train, val = parts["train"], parts["val"]
    results: dict[str, Any] = {}
    if "linear" in wanted:
        results["linear"] = linear_probe(train, val, test, draws=draws, seed=seed)
    if "few" in wanted:
        results["few"] = k_shot(train, val, test, seed=seed)
    if "knn" in wanted:
        results["knn"] = knn(train, test, draws=draws, seed=seed)
    if "prompts" in wanted:
        results["prompts"] = learn_prompts(encoder, train, val, test)[1]
    return results


def corrupted(
    encoder: Encoder,
    shards: str | Path,
    split: str,
    labelset: str | Path,
    scoring: Scoring,
    data: Labelled,
    clean_features: NDArray[np.float32],
    baseline: Path | None,
    seed: int,
    max_bad: float,
) -> dict[str, Any]:
    """Mean AUROC of the model alone under seven corruptions in five severities, and what they cost."""
    columns = [column for column in range(len(data.names)) if not data.lacks(column)]
    identity = [shard.sha256 for shard in Manifest.load(shards).of_split(split)]
    other = None
    if baseline is not None:
        other = read_json(baseline, "baseline").get("corruptions")
        if other is None or other["shards"] != identity or other["labels"] != [data.names[c] for c in columns]:
            raise UserError(f"baseline: {baseline} has no corruptions of the same shards and labels")
    classifier = scoring.classifier(encoder, labelset)
    errors: dict[str, list[float]] = {kind: [] for kind in KINDS}
    jobs = [(kind, severity) for kind in KINDS for severity in SEVERITIES]
    for kind, severity in progress.track(jobs, "corruptions", len(jobs)):
        change = corruption(kind, severity, seed)
        features = gather(encoder, shards, split, change=change, texts=False, max_bad=max_bad).held_out.features
        errors[kind].append(1 - _mean_auroc(data, classifier.scores(features).astype(np.float64), columns))
    facts = {"shards": identity, "labels": [data.names[column] for column in columns], "seed": seed}
    clean = _mean_auroc(data, classifier.scores(clean_features).astype(np.float64), columns)
    return facts | robustness(clean, errors, other)


def _mean_auroc(data: Labelled, scores: Floats, columns: Sequence[int]) -> float:
    used = data.used
    return float(np.mean([auroc(scores[used[:, c], c], data.positive[used[:, c], c]) for c in columns]))


def summary(results: dict[str, Any]) -> list[str]:
    """The extras as lines for people; the zero-shot table has its own."""
    rank = results["effective_rank"]
    told = [f"{name} {rank[name]:.1f}" for name in ("image", "text") if rank[name] is not None]
    lines = [*lines_of_labels(results["labels_from"]), f"effective rank of {rank['of']}: {', '.join(told)}"]
    for column, table in results.get("subgroups", {}).get("columns", {}).items():
        lines.append(f"by {column}:")
        for row in table["groups"]:
            value = "-" if row["auroc"] is None else f"{row['auroc']:.3f}  {row['low']:.3f}-{row['high']:.3f}"
            lines.append(f"  {row['group']:<28} {value}  ({row.get('reason') or str(row['studies']) + ' studies'})")
        if table["gap"]:
            gap = table["gap"]
            span = f"{gap['low']:.3f}-{gap['high']:.3f}; {table['gap_expected']:.3f} by luck alone"
            lines.append(f"  worst: {table['worst']}, gap {gap['value']:.3f} ({span})")
    probed = results.get("probes", {})
    for name in ("linear", "knn", "prompts"):
        if name in probed:
            macro = probed[name]["macro"]
            value = "-" if macro["auroc"] is None else f"{macro['auroc']:.3f}"
            lines.append(f"probe {name}: mean AUROC {value} over {macro['labels']} labels")
    for row in probed.get("few", []):
        name = f"{row['shots']} shots" if "shots" in row else f"{row['share']:.0%} of the patients"
        value = "-" if row["auroc"] is None else f"{row['auroc']:.3f}  {row['low']:.3f}-{row['high']:.3f}"
        lines.append(f"probe, {name:<20} {value}  ({row['labels']} labels, {row['seeds']} seeds)")
    if "corruptions" in results:
        told_of = results["corruptions"]
        alone = ", of the first model alone" if results["ensemble"] else ""
        lines.append(f"corruptions{alone} (clean {told_of['clean_auroc']:.3f}; AUROC at severities 1 to 5):")
        for kind, errors in told_of["errors"].items():
            lines.append(f"  {kind:<16} " + "  ".join(f"{1 - error:.3f}" for error in errors))
        drop, mce = told_of["relative_drop"]["mean"], told_of["mce"]
        lines.append(f"  relative drop {'-' if drop is None else format(drop, '.3f')}, mCE {mce if mce else '-'}")
        lines += [f"  ({reason})" for reason in told_of["reasons"]]
    if "localisation" in results:
        lines.append(localisation.summary(results["localisation"]))
    if "leaks" in results:
        from medclip_lab.evaluation.leaks import summary as leak_lines

        lines.append(leak_lines(results["leaks"]))
    return lines
