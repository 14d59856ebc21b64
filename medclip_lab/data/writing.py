"""Writing shards: studies to tars and the manifest that lists them, the same studies always to the same bytes."""

import io
import json
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medclip_lab.data.index import Entry, Member, index_path, write_index
from medclip_lab.data.sample import SPLITS, Sample, make_key
from medclip_lab.data.sources.base import Record
from medclip_lab.errors import UserError
from medclip_lab.files import atomic_file, sha256, write_json
from medclip_lab.version import __version__

MANIFEST = "manifest.json"
QUARANTINE = "quarantine.jsonl"
FORMAT = "medclip-lab-shards/1"
_SHARD = r"(train|val|test)-\d{5,}\.(tar|index\.json)"
LEFT_BEHIND = re.compile(rf"{_SHARD}|\.({_SHARD}|manifest\.json|quarantine\.jsonl)\.[0-9a-f]{{8}}\.tmp")
"""Names that an interrupted writer leaves in its folder."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """What the manifest tells of a shard."""

    name: str
    split: str
    samples: int
    bytes: int
    sha256: str
    labels: dict[str, dict[str, int]]
    """Label -> state ("1", "0", "-1", "null") -> studies."""


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.tar"


def write_shard(path: Path, split: str, samples: Iterable[Sample]) -> Written | None:
    """Write a tar of studies, one in memory at a time; it appears whole or not at all.

    Args:
        samples: an `OSError` of theirs is taken for one of the disk that is written to.

    Returns:
        None if there are no samples; then there is no file either.

    Raises:
        UserError: the disk is full, or cannot be written to for another reason.
    """
    labels: dict[str, Counter[str]] = {}
    entries: list[Entry] = []
    with named_disk_errors(path.parent), atomic_file(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in samples:
                members = tuple(_add(tar, sample.key, suffix, data) for suffix, data in _members(sample))
                stated = {name: value for name, value in sample.labels.items() if value is not None}
                entries.append(Entry(sample.key, members, labels=stated))
                for name, value in sample.labels.items():
                    labels.setdefault(name, Counter())["null" if value is None else str(value)] += 1
        written = Written(
            name=path.name,
            split=split,
            samples=len(entries),
            bytes=temporary.stat().st_size,
            sha256=sha256(temporary),
            labels={name: dict(sorted(states.items())) for name, states in labels.items()},
        )
        # Before the shard appears: who finds a shard finds its index too.
        write_index(path, written.sha256, entries)
    if not entries:
        remove_shard(path)
        return None
    return written


def _add(tar: tarfile.TarFile, key: str, suffix: str, data: bytes) -> Member:
    info = tarfile.TarInfo(f"{key}.{suffix}")  # no time, no owner: the same studies give the same bytes
    info.size = len(data)
    place = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(info, io.BytesIO(data))
    return Member(suffix, place, len(data), zlib.crc32(data))


def remove_shard(path: Path) -> None:
    """Remove a shard and its index, if they are there."""
    path.unlink(missing_ok=True)
    index_path(path).unlink(missing_ok=True)


@contextmanager
def named_disk_errors(folder: Path) -> Iterator[None]:
    """Say in one line that `folder` cannot be written to; nothing else may fail inside.

    Raises:
        UserError: for any `OSError`: a full disk, no permission.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"out: cannot write to {folder}: {reason}: mend it and call it again, it goes on") from None


def _members(sample: Sample) -> Iterator[tuple[str, bytes]]:
    for number, (suffix, data) in enumerate(sample.images):
        yield suffix if number == 0 else f"{number}.{suffix}", data
    record = {name: value for name, value in asdict(sample).items() if name not in ("images", "extra")} | sample.extra
    yield "json", json.dumps(record, ensure_ascii=False, sort_keys=True).encode()


def check_studies(studies: Iterable[Record]) -> None:
    """Refuse what would make shards ambiguous or held-out figures worthless. No message holds an id.

    Raises:
        UserError: an unknown split, a study twice, a patient in several splits.
    """
    keys: set[str] = set()
    repeated = 0
    splits_of: dict[str, str | set[str]] = {}  # a set only for who has several: they are few, patients are many
    for study in studies:
        check_split(study.split)
        key = make_key(study.study_id)
        repeated += key in keys
        keys.add(key)
        known = splits_of.setdefault(study.patient_id, study.split)
        if isinstance(known, set):
            known.add(study.split)
        elif known != study.split:
            splits_of[study.patient_id] = {known, study.split}
    if repeated:
        raise UserError(f"{repeated} of {len(keys) + repeated} studies have the id of another: a study needs its own")
    crossing = Counter(tuple(sorted(splits)) for splits in splits_of.values() if isinstance(splits, set))
    if crossing:
        counts = ", ".join(f"{number} in {' and '.join(splits)}" for splits, number in sorted(crossing.items()))
        raise UserError(
            f"{crossing.total()} of {len(splits_of)} patients stand in several splits ({counts}): what is held out "
            "would have been trained on; give each patient one split"
        )


def check_split(split: str) -> None:
    """Refuse a split that shards do not have.

    Raises:
        UserError: it is none of `SPLITS`.
    """
    if split not in SPLITS:
        raise UserError(f"a study has the unknown split {split!r}, one of {', '.join(SPLITS)} expected")


def start_folder(folder: Path, keep: frozenset[str] = frozenset()) -> None:
    """A folder without a manifest and without what an interrupted writer left, but for the shards to `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    kept = keep | {index_path(folder / name).name for name in keep}
    for stale in folder.iterdir():
        if LEFT_BEHIND.fullmatch(stale.name) and stale.name not in kept:
            stale.unlink()


def write_manifest(folder: Path, source: str, shards: Iterable[Written], **facts: Any) -> dict[str, Any]:
    """Write the manifest, which makes a folder of shards a whole one; it comes last.

    Raises:
        UserError: there is not one shard.
    """
    splits: Counter[str] = Counter()
    labels: dict[str, Counter[str]] = {}
    shards = sorted(shards, key=lambda shard: shard.name)
    for shard in shards:
        splits[shard.split] += shard.samples
        for name, states in shard.labels.items():
            labels.setdefault(name, Counter()).update(states)
    if not splits:
        raise UserError(f"{source}: not one usable study, so no shard was written")
    manifest = {
        "format": FORMAT,
        "tool": f"medclip_lab {__version__}",
        "source": source,
        **facts,
        "samples": splits.total(),
        "splits": {split: splits[split] for split in SPLITS if split in splits},
        "labels": {name: dict(sorted(states.items())) for name, states in labels.items()},
        "shards": [{name: value for name, value in asdict(shard).items() if name != "labels"} for shard in shards],
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def write_all(samples: Iterable[Sample], folder: Path, source: str, samples_per_shard: int, **facts: Any) -> None:
    """Write studies as they come, then the manifest; a shard at a time of each split is held in memory.

    Raises:
        UserError: what `check_studies` refuses; then there is no manifest.
    """
    start_folder(folder)
    pending: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    shards: list[Written] = []
    seen: list[Record] = []

    def flush(split: str) -> None:
        number = sum(shard.split == split for shard in shards)
        written = write_shard(folder / shard_name(split, number), split, pending[split])
        if written is not None:
            shards.append(written)
        pending[split] = []

    for sample in samples:
        check_split(sample.split)
        seen.append(Record(study_id=sample.study_id, patient_id=sample.patient_id, split=sample.split))
        pending[sample.split].append(sample)
        if len(pending[sample.split]) == samples_per_shard:
            flush(sample.split)
    for split in SPLITS:
        flush(split)
    check_studies(seen)
    write_manifest(folder, source, shards, **facts)
