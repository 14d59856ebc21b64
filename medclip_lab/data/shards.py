"""WebDataset shards of studies, and the manifest beside them.

A shard is a tar. A study is a group of members that share a key: its images (`KEY.png`, `KEY.1.png`, ...) and
`KEY.json` with everything else. `manifest.json` lists the shards with their size, sample count and hash.
"""

import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from webdataset.tariterators import group_by_keys

from medclip_lab.data.quarantine import Quarantine
from medclip_lab.data.sample import IMAGE_SUFFIXES, MAX_MEMBER_BYTES, Sample
from medclip_lab.data.writing import FORMAT, MANIFEST, write_all
from medclip_lab.errors import UserError
from medclip_lab.files import read_json


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
    write_all(samples, folder, source, samples_per_shard, **facts)
    return Manifest.load(folder)
