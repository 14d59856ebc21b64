"""A split of shards through a bundle: features, labels and texts of its studies."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
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
    held_out, quarantine, _ = read_and_encode(
        encoder, shards, split, change=change, max_bad=max_bad, keep_images=keep_images, texts=texts
    )
    return held_out, quarantine


def read_and_encode(
    encoder: Encoder,
    shards: str | Path,
    split: str,
    *,
    images: Mapping[str, int] | None = None,
    change: ImageChange | None = None,
    max_bad: float = 0.01,
    keep_images: bool = False,
    texts: bool = True,
) -> tuple[HeldOut, Quarantine, list[dict[str, Any]]]:
    """The split, what of it could not be read, and the record of each study without its text, with its "image".

    Args:
        images: study id to the number of its image that is taken; others are left out. None takes the first of every
            study.
    """
    manifest = Manifest.load(shards)
    total = manifest.count(split)
    quarantine = Quarantine(total, max_bad)
    held_out = HeldOut(np.empty(0, np.float32), np.empty(0, np.float32))
    records: list[dict[str, Any]] = []

    def pixels() -> Iterator[Image.Image]:
        for study in progress.track(read_split(manifest, split, quarantine), f"encode {split}", total):
            record = study.record
            number = 0 if images is None else images.get(record["study_id"], -1)
            if not 0 <= number < len(study.images):
                continue
            suffix, data = study.images[number]
            try:
                image = encoder.preprocess.window(decode_image(data, suffix))
            except DecodeError as error:
                quarantine.add(study.shard, study.key, "unreadable image", str(error))
                continue
            held_out.study_ids.append(record["study_id"])
            held_out.patient_ids.append(record["patient_id"])
            held_out.labels.append(record.get("labels") or {})
            held_out.texts.append(record.get("text") or "")
            if keep_images:
                held_out.images.append(data)
            kept = {name: value for name, value in record.items() if name not in ("text", "sections", "sentences")}
            records.append(kept | {"image": number})
            yield change(image) if change else image

    held_out.features = encoder.encode_images(pixels())
    if not records:
        asked = "has no images" if images is None else "has no images that are asked for"
        raise UserError(f"evaluate: split {split!r} of {manifest.folder} {asked}")
    if texts:
        held_out.text_features = encoder.encode_texts([text for text in held_out.texts if text])
    return held_out, quarantine, records


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


def shuffle_labels(held_out: HeldOut, seed: int) -> HeldOut:
    """The control in which every study has the labels of another one: whatever is measured then is chance."""
    order = np.random.default_rng(seed).permutation(len(held_out.labels))
    return replace(held_out, labels=[held_out.labels[row] for row in order])
