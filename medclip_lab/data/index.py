"""What a shard holds and where: made from the headers of the tar, or read from a file beside it.

Only headers are read to make an index; nothing is unpacked, and a member counts only if it is a plain file at the top
of the tar with a suffix we know. So what a shard holds besides is never looked at.
"""

import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from medclip_lab.data.sample import IMAGE_SUFFIXES, MAX_MEMBER_BYTES
from medclip_lab.files import write_json

FORMAT = "medclip-lab-shard-index/1"
SUFFIX = ".index.json"
TEXT_SUFFIXES = ("json", "txt")
MAX_TEXT_BYTES = 16 * 2**20
MAX_HEADER_BYTES = 64 * 2**10  # of a header that extends another: a name or a comment of any length is one
MAX_STUDY_BYTES = 2**30
MAX_INDEX_BYTES = 2**28
MAX_SAMPLES = 2**20
MAX_SEARCHED_BYTES = 64 * 2**20  # for the next header, where one is damaged


class Member(NamedTuple):
    """A file in a shard."""

    suffix: str
    """All behind the key's dot, "1.jpg"."""
    offset: int
    size: int
    crc32: int | None = None
    """Of its bytes, if the index knows."""


class Fault(NamedTuple):
    """What is wrong with a sample or a shard; holds no name of a file."""

    cause: str
    reason: str


@dataclass(frozen=True)
class Entry:
    """One sample: neighbouring members that share a key."""

    key: str
    members: tuple[Member, ...]
    fault: Fault | None = None
    """Why it cannot be used."""
    labels: dict[str, int] | None = None
    """What its report or table states, if the index knows."""


@dataclass(frozen=True)
class ShardIndex:
    """What a shard holds."""

    entries: tuple[Entry, ...]
    faults: tuple[Fault, ...] = ()
    """What is wrong with the shard itself."""


class _Headers:
    """A file of which tarfile reads headers, and no more than that."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.seek, self.tell = file.seek, file.tell
        self.searched = 0

    def read(self, size: int) -> bytes:
        self.searched += size
        if size > MAX_HEADER_BYTES or self.searched > MAX_SEARCHED_BYTES:
            raise tarfile.ReadError("headers that are too large, or none for long")
        return self.file.read(size)


def scan(file: BinaryIO) -> ShardIndex:
    """Index an open tar by its headers. One that ends early, or has a damaged header, gives what it holds besides."""
    from webdataset.tariterators import group_by_keys  # here, as it imports torch, which who writes can do without

    faults: dict[Fault, None] = {}  # each once, however often a hostile tar repeats it
    samples: list[dict[str, Any]] = []

    def twice(_: Exception) -> bool:
        faults[Fault("member twice", "two members of one name")] = None
        return True

    for group in group_by_keys(_members(file, faults), handler=twice):
        samples.append(group)
        if len(samples) == MAX_SAMPLES:
            faults[Fault("unreadable shard", f"more than {MAX_SAMPLES} samples")] = None
            break
    return ShardIndex(tuple(_entry(group) for group in samples), tuple(faults))


def _members(file: BinaryIO, faults: dict[Fault, None]) -> Iterator[dict[str, Any]]:
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    try:
        headers = _Headers(file)
        # Zeros are no end: behind a damaged header tarfile looks for the next one.
        with tarfile.open(fileobj=headers, mode="r:", ignore_zeros=True) as tar:  # type: ignore[call-overload]
            while (info := tar.next()) is not None:
                if info.size < 0:  # Python's reader would go backwards, and round for ever
                    raise tarfile.ReadError("a member of negative size")
                headers.searched = 0
                tar.members.clear()  # else a hostile tar of a million empty members is a million objects
                name = info.name
                if not _plain(info):
                    faults[Fault("unsafe member", "not a plain file at the top of the tar")] = None
                    continue
                suffix = name.partition(".")[2].lower()
                if suffix not in TEXT_SUFFIXES and re.sub(r"^\d+\.", "", suffix) not in IMAGE_SUFFIXES:
                    continue  # other tools may add members of their own
                fault = None
                if info.size > (MAX_TEXT_BYTES if suffix in TEXT_SUFFIXES else MAX_MEMBER_BYTES):
                    fault = Fault("member too large", f"{info.size} bytes")
                elif info.offset_data + info.size > size:
                    fault = Fault("truncated shard", "it ends within the sample")
                yield {"__url__": "", "fname": name, "data": (Member(suffix, info.offset_data, info.size), fault)}
    except (tarfile.TarError, EOFError, ValueError, OSError, OverflowError) as error:
        faults[Fault("unreadable shard", type(error).__name__)] = None


def _plain(info: tarfile.TarInfo) -> bool:
    """A sparse file says it is one too, but its bytes do not lie where they are said to."""
    return info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not info.issparse() and _plain_name(info.name)


def _plain_name(name: str) -> bool:
    return name.isprintable() and len(name) <= 512 and not name.startswith(("/", "_", ".")) and "/" not in name


def _entry(group: dict[str, Any]) -> Entry:
    found = [value for value in group.values() if isinstance(value, tuple)]
    fault = next((fault for _, fault in found if fault), None)
    if fault is None and sum(member.size for member, _ in found) > MAX_STUDY_BYTES:
        fault = Fault("study too large", f"its members together have more than {MAX_STUDY_BYTES} bytes")
    return Entry(str(group["__key__"]), tuple(member for member, _ in found), fault)


def index_path(shard: Path) -> Path:
    """Where the index of a shard lies."""
    return shard.with_name(shard.name.removesuffix(".tar") + SUFFIX)


def write_index(shard: Path, sha256: str, entries: Iterable[Entry]) -> None:
    """Write the index of a shard beside it; `sha256` is the shard's, so that the index of another is not believed."""
    samples = [[entry.key, entry.members, entry.labels or {}] for entry in entries]
    write_json(index_path(shard), {"format": FORMAT, "sha256": sha256, "samples": samples}, indent=None)


def read_index(shard: Path, sha256: str) -> ShardIndex | None:
    """The index beside a shard; None if there is none, or if it is not of this shard.

    It is believed no more than the shard itself, and tells of a shard that was damaged since what it should hold.

    Args:
        sha256: that the manifest gives the shard.
    """
    path = index_path(shard)
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            return None
        value = json.loads(path.read_bytes())
        if (value["format"], value["sha256"]) != (FORMAT, sha256):
            return None
        return ShardIndex(tuple(_believed(key, members, labels) for key, members, labels in value["samples"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def _believed(key: Any, members: Any, labels: Any) -> Entry:
    found = tuple(Member(str(suffix), *map(int, numbers)) for suffix, *numbers in members)
    end = 0
    for member in found:
        largest = MAX_TEXT_BYTES if member.suffix in TEXT_SUFFIXES else MAX_MEMBER_BYTES
        if not 0 <= member.size <= largest or not end <= member.offset < 2**62 or member.crc32 is None:
            raise ValueError("a member that cannot be")
        end = member.offset + member.size  # members lie behind each other: none is read twice
    if sum(member.size for member in found) > MAX_STUDY_BYTES or not _plain_name(str(key)):
        raise ValueError("a sample that cannot be")
    return Entry(str(key), found, labels={str(name): int(state) for name, state in labels.items()})


def labels_of(record: dict[str, Any]) -> dict[str, int]:
    """The labels a sample's record states: those that are present, absent or uncertain."""
    return {name: value for name, value in (record.get("labels") or {}).items() if value is not None}
