"""WebDataset shards of studies, and the manifest beside them.

A shard is a tar. A study is a group of members that share a key: its images (`KEY.png`, `KEY.1.png`, ...) and
`KEY.json` with everything else. `manifest.json` lists the shards with their size, sample count and hash.
"""

import hashlib
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from medclip_lab.data.index import index_path, labels_of, write_index
from medclip_lab.data.manifest import FORMAT, MANIFEST, SPLITS, Manifest
from medclip_lab.errors import UserError
from medclip_lab.files import atomic_file, sha256, write_json
from medclip_lab.version import __version__

LEFT_BEHIND = re.compile(r"\.?(train|val|test)-\d{5}\.(tar|index\.json)(\.[0-9a-f]{8}\.tmp)?")
"""Names that an interrupted writer leaves in its folder."""


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


class ShardWriter:
    """Writes studies into shards of `samples_per_shard`, one series a split; each appears whole or not at all.

    Use as a context manager; the manifest is written last, when the block ends without an error.

    Raises (from `write`):
        UserError: a key twice, a patient in two splits, an unknown split.
    """

    def __init__(self, folder: Path, source: str, samples_per_shard: int = 256, **facts: Any) -> None:
        self.folder = folder
        self.samples_per_shard = samples_per_shard
        self.facts = {"source": source, **facts}
        self._pending: dict[str, list[Sample]] = {}
        self._shards: list[dict[str, Any]] = []
        self._keys: set[str] = set()
        self._split_of: dict[str, str] = {}
        self._labels: dict[str, Counter[str]] = {}
        self._splits: Counter[str] = Counter()

    def write(self, sample: Sample) -> None:
        if sample.split not in SPLITS:
            raise UserError(f"study {sample.key}: unknown split {sample.split!r}, one of {', '.join(SPLITS)} expected")
        if sample.key in self._keys:
            raise UserError(f"study {sample.key} appears twice")
        known = self._split_of.setdefault(sample.patient_id, sample.split)
        if known != sample.split:
            raise UserError(f"the patient of study {sample.key} is in split {known} and in split {sample.split}")
        self._keys.add(sample.key)
        self._splits[sample.split] += 1
        for name, value in sample.labels.items():
            self._labels.setdefault(name, Counter())["null" if value is None else str(value)] += 1
        pending = self._pending.setdefault(sample.split, [])
        pending.append(sample)
        if len(pending) == self.samples_per_shard:
            self._flush(sample.split)

    def _flush(self, split: str) -> None:
        samples = self._pending.pop(split, [])
        if not samples:
            return
        number = sum(shard["split"] == split for shard in self._shards)
        name = f"{split}-{number:05d}.tar"
        with atomic_file(self.folder / name) as temporary:
            with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
                for sample in samples:
                    for member, data in _members(sample):
                        info = tarfile.TarInfo(member)  # no time, no owner: the same studies give the same bytes
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
            entry = {"name": name, "split": split, "samples": len(samples), "bytes": temporary.stat().st_size}
            entry["sha256"] = sha256(temporary)
            labels = {sample.key: labels_of({"labels": sample.labels}) for sample in samples}
            write_index(temporary, str(entry["sha256"]), labels, index_path(self.folder / name))
        self._shards.append(entry)

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / MANIFEST).unlink(missing_ok=True)
        for stale in self.folder.iterdir():
            if LEFT_BEHIND.fullmatch(stale.name):
                stale.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            return
        for split in list(self._pending):
            self._flush(split)
        if not self._shards:
            raise UserError(f"{self.facts['source']}: not one usable study, so no shard was written")
        write_json(
            self.folder / MANIFEST,
            {
                "format": FORMAT,
                "tool": f"medclip_lab {__version__}",
                **self.facts,
                "samples": sum(self._splits.values()),
                "splits": dict(self._splits),
                "labels": {name: dict(sorted(count.items())) for name, count in self._labels.items()},
                "shards": sorted(self._shards, key=lambda shard: str(shard["name"])),
            },
        )


def _members(sample: Sample) -> Iterator[tuple[str, bytes]]:
    for number, (suffix, data) in enumerate(sample.images):
        yield f"{sample.key}.{suffix}" if number == 0 else f"{sample.key}.{number}.{suffix}", data
    record = {name: value for name, value in asdict(sample).items() if name not in ("images", "extra")} | sample.extra
    yield f"{sample.key}.json", json.dumps(record, ensure_ascii=False, sort_keys=True).encode()


def write_shards(
    samples: Iterable[Sample], folder: Path, source: str, samples_per_shard: int = 256, **facts: Any
) -> Manifest:
    """Write all `samples` and the manifest; returns the manifest."""
    with ShardWriter(folder, source, samples_per_shard, **facts) as writer:
        for sample in samples:
            writer.write(sample)
    return Manifest.load(folder)
