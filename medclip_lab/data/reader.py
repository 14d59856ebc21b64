"""Studies of shards by their number, or one after the other.

Nothing in a shard is executed and nothing is written: members are read by the index, images stay bytes, and what a
study's record says is looked at before anyone uses it.
"""

import errno
import json
import re
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from medclip_lab.data.index import Entry, Fault, ShardIndex, labels_of, read_index, scan
from medclip_lab.data.manifest import Manifest, Shard
from medclip_lab.data.quarantine import Quarantine
from medclip_lab.data.remote import is_remote
from medclip_lab.data.sample import IMAGE_SUFFIXES


@dataclass(frozen=True)
class Study:
    """A study as a shard holds it."""

    key: str
    shard: str
    """Name of the shard, for lists of what is wrong."""
    number: int = field(compare=False)
    """Its place in the shard."""
    record: dict[str, Any]
    """What stands in its JSON."""
    images: list[tuple[str, bytes]]
    """Encoded images as (suffix, bytes)."""


class BadSampleError(ValueError):
    """A sample that cannot be used; neither cause nor reason holds anything of its content."""

    def __init__(self, key: str, fault: Fault) -> None:
        super().__init__(fault.reason)
        self.key, self.fault = key, fault


OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
ATTEMPTS = 20
"""To open a copy that was fetched: another process may need its place in the cache meanwhile."""


class Reader:
    """Reads studies by shard and number, with at most `limit` files open; the one unused for longest is closed.

    Args:
        quarantine: told what is wrong with a shard itself when it is opened.
    """

    def __init__(self, shards: Sequence[Shard], quarantine: Quarantine, limit: int = 64) -> None:
        self.shards, self.quarantine, self.limit = shards, quarantine, limit
        self._open: OrderedDict[int, tuple[BinaryIO, ShardIndex]] = OrderedDict()

    def study(self, shard: int, number: int) -> Study:
        """One study.

        Raises:
            BadSampleError: it cannot be used, or the shard cannot be read.
        """
        name = self.shards[shard].name
        unknown = f"sample {number}"
        try:
            file, index = self._get(shard)
            if number >= len(index.entries):
                raise BadSampleError(unknown, Fault("truncated shard", "the shard ends before it"))
            entry = index.entries[number]
            if entry.fault:
                raise BadSampleError(entry.key, entry.fault)
            members = dict(_members(file, entry))
        except OSError as error:
            if error.errno in OUT_OF_RESOURCES:
                raise  # this machine's trouble, not the shard's
            reason = error.strerror or str(error) or type(error).__name__
            raise BadSampleError(unknown, Fault("unreadable shard", reason)) from None
        try:
            return Study(entry.key, name, number, _record(entry.key, members), _images(members))
        except (ValueError, RecursionError) as error:
            raise BadSampleError(entry.key, Fault("bad metadata", str(error)[:200])) from None

    def faults(self, shard: int) -> tuple[Fault, ...]:
        """What is wrong with a shard itself, as far as its headers tell; empty if it cannot be opened."""
        try:
            return self._get(shard)[1].faults
        except OSError:
            return ()

    def _get(self, shard: int) -> tuple[BinaryIO, ShardIndex]:
        if shard not in self._open:
            facts = self.shards[shard]
            while len(self._open) >= self.limit:
                self._open.popitem(last=False)[1][0].close()
            file, path = _opened(facts)
            index = (read_index(path, facts.sha256) if facts.sha256 else None) or scan(file)
            for fault in index.faults:
                # What a shard that breaks off lacks is counted sample by sample.
                tell = self.quarantine.note if fault.cause == "unreadable shard" else self.quarantine.add
                tell(facts.name, "", *fault)
            self._open[shard] = file, index
        self._open.move_to_end(shard)
        return self._open[shard]

    def count(self, shard: int) -> int:
        """How many samples a shard holds, usable or not; 0 if it cannot be opened."""
        try:
            return len(self._get(shard)[1].entries)
        except OSError:
            return 0

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1][0].close()


def _opened(shard: Shard) -> tuple[BinaryIO, Path]:
    for attempt in range(ATTEMPTS):
        path = shard.local()
        try:
            return path.open("rb"), path
        except FileNotFoundError:
            if attempt == ATTEMPTS - 1 or not is_remote(shard.url):
                raise
    raise AssertionError("never")


def _members(file: BinaryIO, entry: Entry) -> Iterator[tuple[str, bytes]]:
    for member in entry.members:
        file.seek(member.offset)
        data = file.read(member.size)
        if len(data) < member.size:
            raise BadSampleError(entry.key, Fault("truncated shard", "the shard ends within it"))
        if member.crc32 is not None and zlib.crc32(data) != member.crc32:
            raise BadSampleError(entry.key, Fault("damaged sample", "not the bytes that were written"))
        yield member.suffix, data


def _record(key: str, members: dict[str, bytes]) -> dict[str, Any]:
    """The record of a study. Shards of other tools have no ids and their text apart: the key serves as both ids."""
    record = json.loads(members["json"]) if "json" in members else {}
    if not isinstance(record, dict):
        raise ValueError("the record is no object")
    if "txt" in members and "text" not in record:
        record["text"] = members["txt"].decode("utf-8")
        record.setdefault("study_id", key)
        record.setdefault("patient_id", key)
    if not all(isinstance(record.get(name), str) for name in ("study_id", "patient_id")):
        raise ValueError("no study_id and patient_id")
    for name in ("study_id", "patient_id", "text"):
        str(record.get(name) or "").encode()  # half a surrogate pair is text to JSON and to nobody else
    views = record.get("view") or []
    if not isinstance(views, list) or not all(isinstance(view, str | None) for view in views):
        raise ValueError("views that are no list of names")
    if not isinstance(record.get("text") or "", str) or not _labelled(record.get("labels") or {}, None):
        raise ValueError("a text that is no text, or labels that are none of 1, 0, -1, null")
    sentences = record.get("sentences") or []
    if not isinstance(sentences, list) or not all(
        isinstance(part, dict) and isinstance(part.get("text"), str) and _labelled(part.get("labels"))
        for part in sentences
    ):
        raise ValueError("sentences that are not a text with labels each")
    sections = record.get("sections") or {}
    if not isinstance(sections, dict) or not all(isinstance(text, str) for text in sections.values()):
        raise ValueError("sections that are no texts")
    return record


def _labelled(labels: Any, *also: None) -> bool:
    return isinstance(labels, dict) and all(
        value in (1, 0, -1, *also) and not isinstance(value, bool | float) for value in labels.values()
    )


def _images(members: dict[str, bytes]) -> list[tuple[str, bytes]]:
    images = {}
    for suffix, data in members.items():
        match = re.fullmatch(r"(?:(\d{1,6})\.)?(\w[\w.]*)", suffix)
        if match and match[2] in IMAGE_SUFFIXES:
            images[int(match[1] or 0)] = (match[2], data)
    return [images[number] for number in sorted(images)]


def read_shard(shard: Shard, quarantine: Quarantine) -> Iterator[Study]:
    """The studies of a shard in order; whatever cannot be used goes to `quarantine`."""
    reader = Reader([shard], quarantine, limit=1)
    try:
        for number in range(shard.samples):
            try:
                yield reader.study(0, number)
            except BadSampleError as error:
                quarantine.add(shard.name, error.key, *error.fault, number=number)
    finally:
        reader.close()


def read_split(manifest: Manifest, split: str, quarantine: Quarantine) -> Iterator[Study]:
    """Every study of a split, in the order of the shards."""
    return (study for shard in manifest.of_split(split) for study in read_shard(shard, quarantine))


def labels_in(shard: Shard, quarantine: Quarantine) -> list[dict[str, int]]:
    """What is stated about each sample of a shard, by number: from its index if that knows, else from the records."""
    try:
        index = read_index(shard.local(), shard.sha256) if shard.sha256 else None
    except OSError:
        index = None  # whoever reads the samples will say so
    if index is not None and len(index.entries) >= shard.samples:
        return [entry.labels or {} for entry in index.entries[: shard.samples]]
    reader = Reader([shard], quarantine, limit=1)
    found: list[dict[str, int]] = []
    for number in range(shard.samples):
        try:
            found.append(labels_of(reader.study(0, number).record))
        except BadSampleError:
            found.append({})
    reader.close()
    return found
