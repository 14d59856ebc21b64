"""Studies that stand in the data more than once, and above all those that leak from one split into another."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medclip_lab.data.prepare.fingerprints import Fingerprint
from medclip_lab.data.sources.base import Record

MAX_DISTANCE = 15
"""Bits of 256 in which two images that are nearly the same may differ.

Less than the rows of a hash, so that two such images agree in a whole row. On 1,000 NIH radiographs of 682 patients
the nearest two of different patients differ in 56; of 200 of them a JPEG of quality 30, 0.4 to 2 times the size or a
shift by a pixel changes at most 12 bits.
"""
# The first of equals keeps its place: what is held out is never thinned by what is trained on.
_PRECEDENCE = ("test", "val", "train")


@dataclass(frozen=True)
class Known:
    """A study and its fingerprint."""

    record: Record
    fingerprint: Fingerprint


def in_precedence(studies: Iterable[Known]) -> list[Known]:
    """Test, val, train; within a split as they came. Of equal studies the first is the original."""
    return sorted(studies, key=lambda study: _PRECEDENCE.index(study.record.split))


def repeated_studies(studies: list[Known]) -> dict[str, str]:
    """Study id -> split of the original, for studies with an image that an earlier one which stays has too, byte by
    byte. `studies` are in precedence."""
    first: dict[str, str] = {}
    repeated: dict[str, str] = {}
    for study in studies:
        original = next((first[image] for image in study.fingerprint.images if image in first), None)
        if original is not None:
            repeated[study.record.study_id] = original
        else:
            first |= dict.fromkeys(study.fingerprint.images, study.record.split)
    return repeated


def count_duplicates(studies: list[Known]) -> dict[str, Any]:
    """How much stands there twice; `studies` are in precedence.

    Returns:
        Under "images", "near_images" and "reports" how many of them an earlier study has too: "within" its split and
        "across" splits (an original in another one counts first). Images that are nearly the same count only between
        patients, as follow-ups look alike, and not where they are equal. "images_not_compared" have no perceptual hash.
    """
    near, without_hash = _near_images(studies)
    return {
        "images": _count((study.record.split, set(study.fingerprint.images)) for study in studies),
        "near_images": near | {"distance": MAX_DISTANCE},
        "images_not_compared": without_hash,
        "reports": _count((study.record.split, {study.fingerprint.report} - {""}) for study in studies),
    }


def _count(hashes: Iterable[tuple[str, set[str]]]) -> dict[str, int]:
    """Of (split, hashes of a study): how many hashes an earlier study has too, in its split and in another one."""
    first: dict[str, str] = {}
    counts = {"within": 0, "across": 0}
    for split, found in hashes:
        for value in found & first.keys():
            counts["within" if first[value] == split else "across"] += 1
        first.update(dict.fromkeys(found - first.keys(), split))
    return counts


def _near_images(studies: list[Known]) -> tuple[dict[str, int], int]:
    patients: dict[str, int] = {}
    contents: dict[str, int] = {}
    rows: list[tuple[int, int, int]] = []
    looks: list[bytes] = []
    without_hash = 0
    for study in studies:
        patient = patients.setdefault(study.record.patient_id, len(patients))
        for image, look in zip(study.fingerprint.images, study.fingerprint.looks, strict=True):
            if not look:
                without_hash += 1
                continue
            content = contents.setdefault(image, len(contents))
            rows.append((patient, content, _PRECEDENCE.index(study.record.split)))
            looks.append(bytes.fromhex(look))
    within, across = np.zeros(len(rows), dtype=bool), np.zeros(len(rows), dtype=bool)
    if rows:
        patient_of, content_of, split_of = np.array(rows).T
        for early, late in close_pairs(np.frombuffer(b"".join(looks), dtype=np.uint16).reshape(len(rows), -1)):
            other = (patient_of[early] != patient_of[late]) & (content_of[early] != content_of[late])
            same_split = split_of[early] == split_of[late]
            within[late[other & same_split]] = True
            across[late[other & ~same_split]] = True
    return {"within": int((within & ~across).sum()), "across": int(across.sum())}, without_hash


def close_pairs(hashes: NDArray[np.uint16]) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """All pairs of rows of [N, 16] hashes that differ in at most `MAX_DISTANCE` bits, some of them several times.

    Sixteen words cannot all differ by fifteen bits, so candidates are the rows that agree in a word: neighbours once
    they are sorted by it. Memory is that of a few arrays of N.

    Yields:
        Two arrays of row numbers, the smaller ones first.
    """
    assert hashes.shape[1] > MAX_DISTANCE
    for column in hashes.T:
        order = np.argsort(column, kind="stable")
        word = column[order]
        place = np.arange(len(order))
        for step in range(1, len(order)):
            place = place[place + step < len(order)]
            place = place[word[place] == word[place + step]]
            if not place.size:
                break
            early, late = order[place], order[place + step]
            close = np.bitwise_count(hashes[early] ^ hashes[late]).sum(axis=1) <= MAX_DISTANCE
            yield early[close], late[close]
