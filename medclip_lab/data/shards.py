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

from webdataset.tariterators import group_by_keys

from medclip_lab.data.quarantine import Quarantine
from medclip_lab.errors import UserError
from medclip_lab.files import atomic_file, read_json, sha256, write_json
from medclip_lab.version import __version__

MANIFEST = "manifest.json"
FORMAT = "medclip-lab-shards/1"
LEFT_BEHIND = re.compile(r"(train|val|test)-\d{5}\.tar|\.(train|val|test)-\d{5}\.tar\.[0-9a-f]{8}\.tmp")
"""Names that an interrupted writer leaves in its folder."""
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


@dataclass(frozen=True)
class Shard:
    """One tar of a manifest."""

    path: Path
    split: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The contents of a shard folder, as its `manifest.json` tells them."""

    folder: Path
    shards: tuple[Shard, ...]
    facts: dict[str, Any]

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read `folder/manifest.json`.

        Raises:
            UserError: no manifest, another format, or or a shard it lists is missing.
        """
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise UserError(f"shards: no such folder: {folder}")
        facts = read_json(folder / MANIFEST, "shards")
        if facts.get("format") != FORMAT:
            raise UserError(f"shards: {folder / MANIFEST} has format {facts.get('format')!r}, not {FORMAT!r}")
        shards = tuple(
            Shard(folder / str(entry["name"]), entry["split"], entry["samples"], entry["bytes"], entry["sha256"])
            for entry in facts["shards"]
        )
        for shard in shards:
            if not shard.path.is_file():
                raise UserError(f"shards: {shard.path} is listed in the manifest and missing: prepare again")
        return cls(folder, shards, facts)

    def of_split(self, split: str) -> tuple[Shard, ...]:
        """The shards of one split, or of several: "train+val".

        Raises:
            UserError: there is no such split.
        """
        known = {shard.split for shard in self.shards}
        for name in split.split("+"):
            if name not in known:
                raise UserError(f"shards: {self.folder} has no split {name!r} (it has {', '.join(sorted(known))})")
        return tuple(shard for shard in self.shards if shard.split in split.split("+"))

    def count(self, split: str) -> int:
        """Number of studies in a split."""
        return sum(shard.samples for shard in self.of_split(split))


def read_shard(shard: Shard, quarantine: Quarantine) -> Iterator[dict[str, Any]]:
    """The studies of a shard as {"__key__", "__shard__", "json": dict, "images": [(suffix, bytes)]}.

    Nothing in a shard is executed and nothing is written: members are read by name and by an allow-list of suffixes.
    Whatever cannot be used, also a shard that ends early, goes to `quarantine`.
    """
    seen = 0

    def twice(error: Exception) -> bool:
        quarantine.add(shard.path.name, "", "member twice", str(error.args[0]))
        return True

    for group in group_by_keys(_tar_members(shard, quarantine), handler=twice):
        key = str(group["__key__"])
        seen += 1
        try:
            yield _study(group) | {"__shard__": shard.path.name}
        except (KeyError, ValueError) as error:
            quarantine.add(shard.path.name, key, "bad metadata", str(error))
    if seen < shard.samples:
        quarantine.add(
            shard.path.name, "", "truncated shard", f"{shard.samples - seen} studies missing", shard.samples - seen
        )


def _tar_members(shard: Shard, quarantine: Quarantine) -> Iterator[dict[str, Any]]:
    name = shard.path.name
    try:
        with tarfile.open(shard.path, "r:") as tar:
            for info in tar:
                if not info.isfile() or info.name.startswith(("/", "_")) or ".." in info.name or "/" in info.name:
                    quarantine.add(name, "", "unsafe member", "not a plain file at the top of the tar")
                    continue
                suffix = info.name.partition(".")[2]
                if suffix != "json" and re.sub(r"^\d+\.", "", suffix) not in IMAGE_SUFFIXES:
                    continue  # other tools may add members of their own
                if info.size > MAX_MEMBER_BYTES:
                    quarantine.add(name, info.name.partition(".")[0], "member too large", f"{info.size} bytes")
                    continue
                member = tar.extractfile(info)
                assert member is not None  # isfile() was true
                yield {"__url__": name, "fname": info.name, "data": member.read()}
    except (tarfile.TarError, EOFError, OSError) as error:
        # The studies that are missing are counted by the caller, against the manifest.
        quarantine.note(name, "", "unreadable shard", type(error).__name__)


def _study(group: dict[str, Any]) -> dict[str, Any]:
    record = json.loads(group["json"])
    if not isinstance(record, dict) or "study_id" not in record or "patient_id" not in record:
        raise ValueError("no study_id and patient_id")
    images = {}
    for suffix, data in group.items():
        match = re.fullmatch(r"(?:(\d+)\.)?(\w[\w.]*)", suffix)
        if match and match[2] in IMAGE_SUFFIXES:
            images[int(match[1] or 0)] = (match[2], data)
    return {"__key__": group["__key__"], "json": record, "images": [images[number] for number in sorted(images)]}


def read_split(manifest: Manifest, split: str, quarantine: Quarantine) -> Iterator[dict[str, Any]]:
    """Every study of a split, in the order of the shards."""
    return (study for shard in manifest.of_split(split) for study in read_shard(shard, quarantine))


def write_shards(
    samples: Iterable[Sample], folder: Path, source: str, samples_per_shard: int = 256, **facts: Any
) -> Manifest:
    """Write all `samples` and the manifest; returns the manifest."""
    with ShardWriter(folder, source, samples_per_shard, **facts) as writer:
        for sample in samples:
            writer.write(sample)
    return Manifest.load(folder)
