"""Has a model been trained on what it is tested on? Patients, images and reports that stand in both."""

from pathlib import Path
from typing import Any

import numpy as np

from medclip_lab import progress
from medclip_lab.data.manifest import Manifest
from medclip_lab.data.prepare.duplicates import MAX_DISTANCE, close_pairs
from medclip_lab.data.prepare.fingerprints import Fingerprint, fingerprint
from medclip_lab.data.quarantine import Quarantine
from medclip_lab.data.reader import Study, read_split
from medclip_lab.data.sample import Sample

Seen = tuple[str, str, Fingerprint]
"""Study id, patient id and fingerprint."""


def leaks(
    train: str | Path, test: str | Path, train_split: str = "train", test_split: str = "test", max_bad: float = 0.01
) -> dict[str, Any]:
    """What of the test studies stands in the training data too.

    "patients" have the same id (ids of other origin do not compare: then it says nothing); "images" are equal byte by
    byte; "near_images" have perceptual hashes that differ in at most 15 of 256 bits, which compression, resizing and
    windowing leave alike, and count where bytes differ; "reports" have the same words, which short normal reports often
    do without being a leak. "study_ids" lists the test studies with a patient, image or near image in training.

    Raises:
        UserError: no such split, or too much that cannot be read.
    """
    ours, theirs = _read(test, test_split, max_bad), _read(train, train_split, max_bad)
    patients = {patient for _, patient, _ in theirs}
    images = {image for _, _, marks in theirs for image in marks.images}
    reports = {marks.report for _, _, marks in theirs} - {""}
    near = _near(theirs, ours)
    leaked = {
        "patients": {study for study, patient, _ in ours if patient in patients},
        "images": {study for study, _, marks in ours if images.intersection(marks.images)},
    }
    leaked["near_images"] = near - leaked["images"]
    found = {name: len(studies) for name, studies in leaked.items()}
    return {
        "train": {"shards": _identity(train, train_split), "split": train_split, "studies": len(theirs)},
        "test": {"shards": _identity(test, test_split), "split": test_split, "studies": len(ours)},
        "test_studies_with": found | {"reports": sum(marks.report in reports for _, _, marks in ours)},
        "shared_patients": len(patients & {patient for _, patient, _ in ours}),
        "distance": MAX_DISTANCE,
        "images_not_compared": sum(not look for _, _, marks in (*theirs, *ours) for look in marks.looks),
        "leaks": bool(set.union(*leaked.values())),
        "study_ids": sorted(set.union(*leaked.values())),
    }


def _identity(shards: str | Path, split: str) -> list[str]:
    return [shard.sha256 for shard in Manifest.load(shards).of_split(split)]


def _read(shards: str | Path, split: str, max_bad: float) -> list[Seen]:
    manifest = Manifest.load(shards)
    total = manifest.count(split)
    studies = read_split(manifest, split, Quarantine(total, max_bad))
    return [_seen(study) for study in progress.track(studies, f"fingerprints of {split}", total)]


def _seen(study: Study) -> Seen:
    record = study.record
    ids = {name: record[name] for name in ("study_id", "patient_id")}
    marks = fingerprint(Sample(**ids, split="test", images=study.images, text=record.get("text") or ""))
    return record["study_id"], record["patient_id"], marks


def _near(theirs: list[Seen], ours: list[Seen]) -> set[str]:
    """Test studies with an image that looks like a training image."""
    rows = [(study, look) for study, _, marks in (*theirs, *ours) for look in marks.looks if look]
    border = sum(bool(look) for _, _, marks in theirs for look in marks.looks)
    if border in (0, len(rows)):
        return set()
    hashes = np.frombuffer(b"".join(bytes.fromhex(look) for _, look in rows), dtype=np.uint16).reshape(len(rows), -1)
    return {
        rows[late][0]
        for early_rows, late_rows in close_pairs(hashes)
        for late in late_rows[(early_rows < border) & (late_rows >= border)]
    }


def summary(result: dict[str, Any]) -> str:
    """The result as lines for people; ids stay in the JSON."""
    found, studies = result["test_studies_with"], result["test"]["studies"]
    lines = [
        f"{studies} test studies against {result['train']['studies']} training studies",
        f"  {found['patients']} with a patient of the training ({result['shared_patients']} patients)",
        f"  {found['images']} with an image of the training, byte by byte",
        f"  {found['near_images']} more with an image that looks like one ({result['distance']} of 256 bits)",
        f"  {found['reports']} with the words of a training report (short normal reports repeat by themselves)",
    ]
    if result["images_not_compared"]:
        lines.append(
            f"  {result['images_not_compared']} images have no perceptual hash and were compared by bytes only"
        )
    return "\n".join([*lines, "the test set leaks" if result["leaks"] else "no leak was found"])
