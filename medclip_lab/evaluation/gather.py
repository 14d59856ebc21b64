"""Features once: the studies of a split that are wanted, embedded in one pass, with what their records say."""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medclip_lab import progress
from medclip_lab.data.decode import decode_image
from medclip_lab.data.manifest import Manifest
from medclip_lab.data.quarantine import Quarantine
from medclip_lab.data.reader import read_split
from medclip_lab.errors import UserError
from medclip_lab.evaluation.held_out import HeldOut, ImageChange, label_truth, read_and_encode
from medclip_lab.inference.encoder import Encoder

FRONTAL = ("PA", "AP", "AP SUPINE", "FRONTAL")
"""Views that count as frontal."""


@dataclass
class Gathered:
    """A split as arrays, and the record of each study beside them."""

    held_out: HeldOut
    records: list[dict[str, Any]]
    """Of each study, without its text and sentences."""
    unusable: dict[str, int]

    def rows(self, keep: NDArray[np.bool_] | NDArray[np.intp]) -> Self:
        """Some of the studies, in the order of `keep`."""
        index = np.arange(len(self.records))[keep]
        old = self.held_out
        with_text = np.cumsum([bool(text) for text in old.texts]) - 1
        texts = [with_text[row] for row in index if old.texts[row]]
        held_out = replace(
            old,
            features=old.features[index],
            text_features=old.text_features[texts] if len(old.text_features) else old.text_features,
            study_ids=[old.study_ids[row] for row in index],
            patient_ids=[old.patient_ids[row] for row in index],
            labels=[old.labels[row] for row in index],
            texts=[old.texts[row] for row in index],
        )
        return replace(self, held_out=held_out, records=[self.records[row] for row in index])


def read_records(shards: str | Path, split: str, max_bad: float = 0.01) -> list[dict[str, Any]]:
    """The records of a split, no image decoded; those without an image are left out."""
    manifest = Manifest.load(shards)
    total = manifest.count(split)
    studies = read_split(manifest, split, Quarantine(total, max_bad))
    return [study.record for study in progress.track(studies, f"read {split}", total) if study.images]


def gather(
    encoder: Encoder,
    shards: str | Path,
    split: str,
    *,
    images: Mapping[str, int] | None = None,
    change: ImageChange | None = None,
    max_bad: float = 0.01,
    texts: bool = True,
) -> Gathered:
    """Embed studies of a split through an encoder.

    Args:
        images: study id to the number of its image that is taken; others are left out. None takes the first of every
            study.
        change: applied to every decoded image of 8 bits, before its geometry.
        texts: embed the reports too.

    Raises:
        UserError: nothing is left to embed, or too much of it cannot be read.
    """
    held_out, quarantine, records = read_and_encode(
        encoder, shards, split, images=images, change=change, max_bad=max_bad, texts=texts
    )
    return Gathered(held_out, records, dict(quarantine.causes))


def pictures(
    encoder: Encoder, shards: str | Path, split: str, wanted: Mapping[str, int], side: int
) -> dict[str, bytes]:
    """Study id to its image as PNG of 8 bits, at most `side` px a side, for a page that shows a few.

    Args:
        wanted: study id to the number of its image.
    """
    manifest = Manifest.load(shards)
    found: dict[str, bytes] = {}
    for study in read_split(manifest, split, Quarantine(manifest.count(split), 1.0)):
        number = wanted.get(study.record["study_id"])
        if number is None or number >= len(study.images):
            continue
        picture = encoder.preprocess.window(decode_image(study.images[number][1], study.images[number][0]))
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        found[study.record["study_id"]] = buffer.getvalue()
    return found


@dataclass(frozen=True)
class Labelled:
    """Features with the truth of some labels, all that probes need."""

    names: list[str]
    features: NDArray[np.float32]
    """[N, D], unit norm."""
    positive: NDArray[np.bool_]
    """[N, K]."""
    used: NDArray[np.bool_]
    """[N, K]: False where a label says nothing of a study."""
    patients: list[str]

    @classmethod
    def of(cls, held_out: HeldOut, names: list[str]) -> Self:
        """The labels `names` of embedded studies, by the rule of `label_truth`."""
        truth = [label_truth(held_out.labels, name) for name in names]
        positive = np.stack([pair[0] for pair in truth], axis=1)
        return cls(names, held_out.features, positive, np.stack([pair[1] for pair in truth], 1), held_out.patient_ids)

    def lacks(self, column: int) -> str:
        """Why a label cannot be learned or scored here; empty if it can."""
        used, positive = self.used[:, column], self.positive[:, column]
        if not used.any():
            return "not labelled in this data"
        return "" if len(set(positive[used].tolist())) == 2 else "one class only"


def refuse_shared_patients(**parts: Labelled) -> None:
    """Learning, choosing and testing take place on different patients.

    Raises:
        UserError: a patient stands in two of the parts.
    """
    names = list(parts)
    for number, first in enumerate(names):
        for second in names[number + 1 :]:
            shared = set(parts[first].patients) & set(parts[second].patients)
            if shared:
                raise UserError(
                    f"evaluate: {len(shared)} patients stand in {first} and in {second}: divide the data by patient"
                )


Scorer = Callable[[NDArray[np.float32]], NDArray[np.float64]]
"""Features [N, D] to scores [N]."""
