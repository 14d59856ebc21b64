"""Reports for a generator: whether they fit the study they were retrieved for, and the file that hands them over."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medclip_lab.errors import UserError
from medclip_lab.files import atomic_file
from medclip_lab.progress import track
from medclip_lab.retrieval.build import Folders, open_all
from medclip_lab.retrieval.gallery import joined
from medclip_lab.retrieval.policies import Policy
from medclip_lab.retrieval.risk import Answered, Risk, Signal, calibrate, loss, save_calibration
from medclip_lab.retrieval.search import Hit, Store

BATCH = 256
Labels = Mapping[str, int]


def contradicts(study: Labels, report: Labels) -> bool:
    """A finding is present in one and absent in the other; what is uncertain or not mentioned contradicts nothing."""
    return any({study[name], report[name]} == {0, 1} for name in study.keys() & report.keys())


def supports(study: Labels, report: Labels) -> bool:
    """Shares a finding that is present; for a study without any, a report without any."""
    mine, its = _present(study), _present(report)
    return bool(mine & its) if mine else not its


def overlap(study: Labels, report: Labels) -> float:
    """Jaccard index of the findings that are present; 1 if both have none."""
    mine, its = _present(study), _present(report)
    return len(mine & its) / len(mine | its) if mine | its else 1.0


def _present(labels: Labels) -> set[str]:
    return {name for name, value in labels.items() if value == 1}


@dataclass(frozen=True)
class Query:
    """A study that asks."""

    row: dict[str, Any]
    labels: Labels


@dataclass(frozen=True)
class Ask:
    """Which studies ask, what, and under which conditions."""

    modality: str = "image"
    """Of the queries."""
    k: int = 10
    """Reports that are looked at."""
    where: tuple[str, ...] = ()
    labels: tuple[str, ...] | None = None
    """Findings that are compared; None compares all."""
    other_patients: bool = True
    """Never answer with the query's own patient. Queries without a patient are then left out, and counted."""
    one_a_patient: bool = False
    """Ask one query of each patient: a calibration wants exchangeable ones."""


def ask(
    store: Store, embeddings: Folders, given: Ask, policy: Policy | None = None, with_text: bool = False
) -> Iterator[tuple[Query, list[Hit]]]:
    """The answer to every study of some embeddings.

    Raises:
        UserError: embeddings of another bundle, or none to ask with.
    """
    folders = open_all(embeddings)
    if folders[0].manifest["bundle"] != store.manifest["bundle"]:
        raise UserError("rag: the index was built with another bundle than the embeddings: embed again")
    vectors = joined(folders, given.modality)
    rows = [row for folder in folders for row in folder.table(given.modality).to_pylist()]
    chosen = _chosen(rows, given)
    if not len(chosen):
        raise UserError("rag: no query has a patient_id, without which its own patient cannot be left out")
    starts = range(0, len(chosen), BATCH)
    for start in track(starts, "ask", total=len(chosen), weight=lambda first: min(BATCH, len(chosen) - first)):
        numbers = chosen[start : start + BATCH]
        queries = [Query(row, kept_labels(row["labels"], given.labels)) for row in (rows[n] for n in numbers)]
        answers = store.search(
            vectors.take(numbers),
            given.k,
            where=given.where,
            not_patients=[query.row["patient_id"] for query in queries] if given.other_patients else None,
            direction=given.modality,
            policy=policy,
            with_text=with_text,
        )
        yield from zip(queries, answers, strict=True)


def _chosen(rows: Sequence[dict[str, Any]], given: Ask) -> Any:
    """Rows that ask. Of a patient that one whose study hashes lowest: an accident of order favours none."""
    usable = [n for n, row in enumerate(rows) if row["patient_id"] is not None or not given.other_patients]
    if not given.one_a_patient:
        return np.array(usable, np.int64)
    best: dict[str, tuple[bytes, int]] = {}
    for number in usable:
        study = rows[number]["study_id"]
        key = (hashlib.blake2b(f"{study}/{number}".encode(), digest_size=8).digest(), number)
        patient = rows[number]["patient_id"] or f"study {study}"
        best[patient] = min(best.get(patient, key), key)
    return np.array(sorted(number for _, number in best.values()), np.int64)


def kept_labels(labels: Any, names: Sequence[str] | None) -> dict[str, int]:
    """Labels of a row as a dict, those of other names left out."""
    return {name: int(value) for name, value in dict(labels or ()).items() if names is None or name in names}


def answered(query: Query, hits: Sequence[Hit], names: Sequence[str] | None) -> Answered:
    found = [kept_labels(hit.row["labels"], names) for hit in hits]
    return Answered(
        [hit.score for hit in hits],
        [contradicts(query.labels, labels) for labels in found],
        [supports(query.labels, labels) for labels in found],
    )


def calibrate_index(
    store: Store, embeddings: Folders, given: Ask, risk: Risk, alpha: float, signal: Signal, out: Path
) -> dict[str, Any]:
    """Ask with held-out studies, one of each patient, find the threshold, write it; returns what was written.

    Raises:
        UserError: see `risk.calibrate` and `ask`; no label to compare.
    """
    answers, labelled = [], False
    for query, hits in ask(store, embeddings, replace(given, one_a_patient=True)):
        answers.append(answered(query, hits, given.labels))
        labelled |= bool(query.labels)
    if not labelled:
        raise UserError("calibrate: no query has a label to compare: embed shards that hold labels, or name others")
    calibrated = calibrate(answers, risk, alpha, signal, given.k)
    sizes = [calibrated.keep(found.scores) for found in answers]
    losses = [loss(found, size, risk, given.k) for found, size in zip(answers, sizes, strict=True)]
    facts = {
        "vectors": store.fingerprint(),
        "where": list(given.where),
        "labels": None if given.labels is None else list(given.labels),
        "modality": given.modality,
        "other_patients": given.other_patients,
        "measured": {"risk": float(np.mean(losses)), "kept": float(np.mean(sizes))},
    }
    return save_calibration(out, calibrated, facts)


def measures(pairs: Sequence[tuple[Query, list[Hit]]], names: Sequence[str] | None = None) -> dict[str, float]:
    """What the answers to studies with labels are worth, over all queries.

    kept: reports a query. empty: queries without any. contradiction: queries with a report that contradicts them.
    contradictions: such reports among those kept. miss: queries that no report supports. label_overlap: mean Jaccard
    index of a query's findings and a kept report's.
    """
    if not pairs:
        raise UserError("rag: there are no queries to measure")
    found = [answered(query, hits, names) for query, hits in pairs]
    shared = [overlap(query.labels, kept_labels(hit.row["labels"], names)) for query, hits in pairs for hit in hits]
    total = len(shared)
    return {
        "queries": len(pairs),
        "kept": total / len(pairs),
        "empty": sum(not hits for _, hits in pairs) / len(pairs),
        "contradiction": sum(any(given.contradicts) for given in found) / len(pairs),
        "contradictions": sum(sum(given.contradicts) for given in found) / max(1, total),
        "miss": sum(not any(given.supports) for given in found) / len(pairs),
        "label_overlap": float(np.mean(shared)) if shared else 0.0,
    }


def export(store: Store, embeddings: Folders, given: Ask, policy: Policy | None, out: Path) -> dict[str, float]:
    """Write a line for each query in the layout that MMed-RAG's generators read; returns the measures.

    {"id", "report", "image", "reference_reports": [text, ...], "retrieve_k"}; "report" is the query's own if its
    embeddings hold text. Embeddings know no image paths: "image" is study and number, to be joined with yours.

    Raises:
        UserError: the index holds no report text; see `ask`.
    """
    pairs = []
    with atomic_file(out) as temporary, temporary.open("w", encoding="utf-8") as file:
        for query, hits in ask(store, embeddings, given, policy, with_text=True):
            number = query.row.get("image")
            line = {
                "id": query.row["study_id"],
                "report": query.row.get("text") or "",
                "image": query.row["study_id"] if number is None else f"{query.row['study_id']}/{number}",
                "reference_reports": [hit.row["text"] for hit in hits],
                "retrieve_k": len(hits),
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            pairs.append((query, hits))
    return measures(pairs, given.labels)
