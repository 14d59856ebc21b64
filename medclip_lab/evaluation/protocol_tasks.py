"""What a protocol asks, answered: several labels, one class of several, a class by text or image, the own report."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from medclip_lab.data.manifest import Manifest
from medclip_lab.errors import UserError
from medclip_lab.evaluation import compare, protocol_page
from medclip_lab.evaluation.gather import Gathered, Labelled, gather, read_records
from medclip_lab.evaluation.labels_from import LabelsFrom, lines_of_labels
from medclip_lab.evaluation.metrics import Floats, patient_weights
from medclip_lab.evaluation.protocol import paired_retrieval
from medclip_lab.evaluation.protocols import ProtocolConfig, Selection, load_protocol, select
from medclip_lab.evaluation.scored import lines_of_classes, measure_classes
from medclip_lab.evaluation.table import lines_of
from medclip_lab.evaluation.zero_shot import Scoring, scores_of, zero_shot
from medclip_lab.files import digest
from medclip_lab.inference.bundle import versions
from medclip_lab.inference.classifier import ScoreType, too_long
from medclip_lab.inference.encoder import Encoder
from medclip_lab.inference.labelset import LabelSet
from medclip_lab.inference.prompts import PromptTooLongError

Answers = tuple[Labelled, Floats, list[str]]
"""Truth, scores [N, K] and ids of the studies that a result rests on."""
CLASS_SCORES = ("mean_embedding", "mean_similarity", "max_similarity")


def run_protocol(
    encoder: Encoder,
    shards: str | Path,
    name: str | Path | ProtocolConfig,
    *,
    draws: int = 1000,
    seed: int = 0,
    listed: Sequence[str] | None = None,
    max_bad: float = 0.01,
    truncate: bool = False,
    keep: Path | None = None,
    page: Path | None = None,
    command: str = "",
) -> dict[str, Any]:
    """One protocol on the user's shards, as a JSON-like dict that names all it was computed from.

    Args:
        listed: study ids of a list of the user's own.
        truncate: cut prompts that are longer than the context instead of refusing them.
        keep: the file that the result is written to; scores and truth are written beside it, for `compare`.
        page: an HTML page to write, with the command that it tells.

    Raises:
        UserError: no such protocol or label set, or data that cannot fill it.
    """
    protocol = name if isinstance(name, ProtocolConfig) else load_protocol(name)
    labelset = protocol.label_set()
    chosen = select(protocol, read_records(shards, protocol.split, max_bad), listed)
    texts = protocol.task == "report_retrieval"
    found = gather(encoder, shards, protocol.split, images=chosen.images, texts=texts, max_bad=max_bad)
    told: dict[str, Any] | None = None
    if not texts:
        labels, told = LabelsFrom(protocol.labels_from).label(found.records, labelset.names)
        found.held_out = replace(found.held_out, labels=labels)
    task: dict[str, Any]
    answers: Answers | None = None
    if protocol.task == "multi_label":
        task, answers = _multi_label(encoder, found, labelset, protocol, draws, seed, truncate)
    elif protocol.task == "exclusive":
        task, answers = _exclusive(encoder, found, labelset, protocol, chosen, draws, seed, truncate)
    elif protocol.task == "class_retrieval":
        task = _class_retrieval(encoder, found, labelset, protocol, chosen, truncate)
    else:
        retrieval = paired_retrieval(found.held_out)
        if retrieval is None:
            raise UserError(f"protocol {protocol.name}: split {protocol.split!r} has fewer than two reports")
        task = {"retrieval": retrieval}
    counts = {"studies": len(found.records), "patients": len(set(found.held_out.patient_ids))}
    differs = {
        name: {"expected": expected, "found": counts.get(name)}
        for name, expected in protocol.expected.items()
        if counts.get(name) != expected
    }
    if keep is not None and answers is not None:
        compare.save_scores(keep, *answers)
    result = {
        "protocol": asdict(protocol),
        "list_hash": chosen.hash,
        "bundle": encoder.fingerprint,
        "shards": digest([shard.sha256 for shard in Manifest.load(shards).of_split(protocol.split)]),
        "labelset_hash": labelset.hash,
        "prompts": {label.name: {"positive": label.positive, "negative": label.negative} for label in labelset.labels},
        **counts,
        "labels_from": told,
        "left_out": chosen.left_out,
        "unusable": found.unusable,
        "differs_from_the_original": differs,
        "versions": versions(),
        **task,
    }
    if page is not None:
        protocol_page.write_page(
            page, result, answers[0] if answers else None, answers[1] if answers else None, command
        )
    return result


def _multi_label(
    encoder: Encoder,
    found: Gathered,
    labelset: LabelSet,
    protocol: ProtocolConfig,
    draws: int,
    seed: int,
    truncate: bool,
) -> tuple[dict[str, Any], Answers]:
    scoring = Scoring(cast(ScoreType, protocol.score) if protocol.score else None, truncate=truncate)
    shot = zero_shot(encoder, found.held_out, labelset, draws, seed, scoring)
    scores = scores_of([(encoder, found.held_out)], labelset, scoring)[1].astype(np.float64)
    return {"score": shot["score"], "zero_shot": shot}, (
        Labelled.of(found.held_out, labelset.names),
        scores,
        found.held_out.study_ids,
    )


def _positive(encoder: Encoder, labelset: LabelSet, truncate: bool) -> list[Floats]:
    """[P, D] features of the positive prompts of each label."""
    texts = [text for label in labelset.labels for text in label.positive]
    try:
        features = encoder.encode_prompts(texts, truncate).astype(np.float64)
    except PromptTooLongError as error:
        raise too_long(labelset, error) from None
    return np.split(features, np.cumsum([len(label.positive) for label in labelset.labels])[:-1])


def class_scores(encoder: Encoder, labelset: LabelSet, features: Floats, rule: str, truncate: bool = False) -> Floats:
    """[N, K] cosines of images to classes by their positive prompts.

    - mean_embedding: with the unit-norm mean of the prompts' features (CLIP's ensemble);
    - mean_similarity: the mean of the cosines (MedCLIP's ensemble);
    - max_similarity: the largest (GLoRIA).

    Raises:
        UserError: another rule, or a prompt that is longer than the context and not to be cut.
    """
    if rule not in CLASS_SCORES:
        raise UserError(f"score: {rule!r} does not order classes; one of {', '.join(CLASS_SCORES)}")
    columns = []
    for prompts in _positive(encoder, labelset, truncate):
        if rule == "mean_embedding":
            mean = prompts.mean(0)
            columns.append(features @ (mean / np.linalg.norm(mean)))
        else:
            cosines = features @ prompts.T
            columns.append(cosines.mean(1) if rule == "mean_similarity" else cosines.max(1))
    return np.stack(columns, axis=1)


def _exclusive(
    encoder: Encoder,
    found: Gathered,
    labelset: LabelSet,
    protocol: ProtocolConfig,
    chosen: Selection,
    draws: int,
    seed: int,
    truncate: bool,
) -> tuple[dict[str, Any], Answers]:
    """The class with the highest score; of equal ones the first in the order of the label set."""
    names, rule = labelset.names, protocol.score or "mean_embedding"
    if chosen.classes:
        truth = np.array([names.index(chosen.classes[study]) for study in found.held_out.study_ids])
        rows = np.arange(len(truth))
    else:
        present = [[name for name in names if row.get(name) == 1] for row in found.held_out.labels]
        rows = np.array([row for row, of in enumerate(present) if len(of) == 1], dtype=int)
        truth = np.array([names.index(present[row][0]) for row in rows], dtype=int)
    if len(rows) == 0:
        raise UserError(f"protocol {protocol.name}: no study has exactly one of {', '.join(names)}")
    scores = class_scores(encoder, labelset, found.held_out.features[rows].astype(np.float64), rule, truncate)
    weights = patient_weights([found.held_out.patient_ids[row] for row in rows], draws, seed)
    told = {
        "score": rule,
        "ties": "the first class of the label set",
        "exclusive": one_of(scores, truth, names, weights),
        "bootstrap": {"draws": draws, "by": "patient", "seed": seed, "level": 0.95},
    }
    part = found.rows(rows).held_out
    positive = truth[:, None] == np.arange(len(names))
    return told, (
        Labelled(names, part.features, positive, np.ones_like(positive), part.patient_ids),
        scores,
        part.study_ids,
    )


def one_of(scores: Floats, truth: NDArray[np.int64], names: list[str], weights: Floats) -> dict[str, Any]:
    """`measure_classes`, precision, recall and F1 of each class, and the chance: that of the largest class."""
    told = measure_classes(scores, truth, names, weights)
    matrix = np.array(told["confusion"]["counts"])
    classes = []
    for number, name in enumerate(names):
        hits, there, said = (int(n) for n in (matrix[number, number], matrix[number].sum(), matrix[:, number].sum()))
        row: dict[str, Any] = {"name": name, "studies": there, "recall": None, "precision": None, "f1": None}
        row |= {"recall": hits / there} if there else {"reason": "no study of this class"}
        if said:
            row["precision"] = hits / said
        elif there:
            row["reason"] = "never said: no precision"
        if there or said:
            row["f1"] = 2 * hits / (there + said)
        classes.append(row)
    return told | {"chance": float(matrix.sum(1).max() / matrix.sum()), "classes": classes}


def precision_at(scores: Floats, relevant: NDArray[np.bool_], ks: Sequence[int]) -> dict[int, float | None]:
    """Mean over queries [Q] of the share of relevant among the first K of the gallery [G].

    Ties share a place: of equal scores every order is as likely, and the expected share is taken. None where the
    gallery has fewer than K.
    """
    found: dict[int, float | None] = {}
    for k in ks:
        if k > scores.shape[1]:
            found[k] = None
            continue
        border = -np.partition(-scores, k - 1, axis=1)[:, k - 1 : k]
        above, level = scores > border, scores == border
        sure = (above & relevant).sum(1)
        lucky = (level & relevant).sum(1) / level.sum(1) * (k - above.sum(1))
        found[k] = float(((sure + lucky) / k).mean())
    return found


def _class_retrieval(
    encoder: Encoder, found: Gathered, labelset: LabelSet, protocol: ProtocolConfig, chosen: Selection, truncate: bool
) -> dict[str, Any]:
    """Precision at K of images found by a prompt and by an image of the class; an image counts if it has the label."""
    names, studies = labelset.names, found.held_out.study_ids
    features = found.held_out.features.astype(np.float64)
    gallery = np.array([study in chosen.classes for study in studies])
    has = np.array([[row.get(name) == 1 for name in names] for row in found.held_out.labels])[gallery]
    prompts = _positive(encoder, labelset, truncate)
    by_text = np.concatenate(prompts) @ features[gallery].T
    asked = np.repeat(np.arange(len(names)), [len(rows) for rows in prompts])
    result = {
        "text_to_image": {"queries": len(asked), "precision": precision_at(by_text, has[:, asked].T, protocol.ks)}
    }
    of_query = np.array([names.index(chosen.queries[study]) for study in studies if study in chosen.queries], dtype=int)
    if len(of_query):
        by_image = features[~gallery] @ features[gallery].T
        precision = precision_at(by_image, has[:, of_query].T, protocol.ks)
        result["image_to_image"] = {"queries": len(of_query), "precision": precision}
    return {
        "score": "cosine of each prompt alone",
        "gallery": int(gallery.sum()),
        "chance": float(has.mean(0)[asked].mean()),
        "self": "image queries are no part of the gallery",
        "ties": "the expected share over all orders",
        "class_retrieval": result,
    }


def summary(result: dict[str, Any]) -> str:
    """The result as lines for people."""
    protocol = result["protocol"]
    lines = [
        f"protocol {protocol['name']}: {result['studies']} studies of {result['patients']} patients, split "
        f"{protocol['split']}, list {result['list_hash'][:12]}"
    ]
    for name, told in result["differs_from_the_original"].items():
        lines.append(f"  not the original list: {told['found']} {name}, there {told['expected']}")
    if result["labels_from"]:
        lines += lines_of_labels(result["labels_from"])
    if "zero_shot" in result:
        lines += [f"zero-shot AUROC ({result['zero_shot']['rule']}; 95 % interval, bootstrap by patient):"]
        lines += lines_of(result["zero_shot"])
    if "exclusive" in result:
        told = result["exclusive"]
        lines.append(
            f"one class of {len(told['classes'])} ({result['score']}; always the largest class: {told['chance']:.3f}; "
            "95 % interval, bootstrap by patient):"
        )
        lines += lines_of_classes(told)
    for direction, told in result.get("class_retrieval", {}).items():
        shown = "  ".join(f"P@{k} {'-' if v is None else format(v, '.3f')}" for k, v in told["precision"].items())
        lines.append(
            f"{direction.replace('_', ' ')}: {shown}  ({told['queries']} queries, chance {result['chance']:.3f})"
        )
    for direction in ("image_to_text", "text_to_image") if "retrieval" in result else ():
        told = result["retrieval"][direction]
        shown = "  ".join(f"R@{k} {v:.3f} (chance {told['chance'][k]:.3f})" for k, v in told["recall"].items())
        lines.append(
            f"{direction.replace('_', ' ')}: {shown}  median rank {told['median_rank']:.0f} of {told['gallery']}"
        )
    return "\n".join(lines)
