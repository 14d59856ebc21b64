"""A study on its way into a shard. Nothing heavy is imported here: this is all of a shard that a source has to know."""

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

SPLITS = ("train", "val", "test")
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "dcm", "nii.gz")
MAX_MEMBER_BYTES = 256 * 2**20  # a larger member is quarantined before a byte of it is read


@dataclass(kw_only=True)
class Sample:
    """One study as a source yields it and a shard holds it. Image-only and text-only studies are legal."""

    study_id: str
    patient_id: str
    split: str
    images: list[tuple[str, bytes]] = field(default_factory=list)
    """Encoded images as (suffix without dot, bytes)."""
    view: list[str] = field(default_factory=list)
    """View of each image (PA, AP, LATERAL), empty where unknown."""
    modality: str = "CR"
    sections: dict[str, str] = field(default_factory=dict)
    text: str = ""
    labels: dict[str, int | None] = field(default_factory=dict)
    sentences: list[dict[str, Any]] = field(default_factory=list)
    """Sentences of the report as {"text": str, "labels": {name: 1|0|-1}}, mentioned labels only."""
    source: str = ""
    license: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    """What only this source knows (age, sex, regions of the findings): kept, never needed."""

    @property
    def key(self) -> str:
        return make_key(self.study_id)


def make_key(identifier: str) -> str:
    """A WebDataset key for any identifier: `[0-9a-z_-]+`, never a dot, and injective in practice.

    WebDataset cuts keys at the first dot, so DICOM UIDs would all collapse into one sample; whatever has to be
    changed is therefore made unique again by a short hash.
    """
    slug = re.sub(r"[^0-9a-z_-]+", "-", identifier.lower()).strip("-_")[:80]
    if slug and slug == identifier:
        return slug
    suffix = hashlib.sha256(identifier.encode()).hexdigest()[:8]
    return f"{slug}-{suffix}" if slug else suffix
