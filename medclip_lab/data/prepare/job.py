"""One shard of a data set: a pure function of its records, whoever makes it and however often."""

import hashlib
import json
import multiprocessing.synchronize
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from medclip_lab.data.index import read_index
from medclip_lab.data.prepare.fingerprints import Fingerprint, fingerprint
from medclip_lab.data.sample import Sample, make_key
from medclip_lab.data.sources.base import BadStudyError, Record, Source
from medclip_lab.data.writing import Written, named_disk_errors, remove_shard, write_shard
from medclip_lab.files import sha256, write_json
from medclip_lab.version import __version__

IN_PROGRESS = ".in-progress"
"""Folder beside the shards, until the manifest is written: what is known of each shard that is done."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that whoever makes a shard has to know."""

    source: Source
    folder: Path
    name: str
    split: str
    records: tuple[Record, ...]
    fingerprints: bool
    """Whether studies are told by their content, to find duplicates."""
    without: frozenset[str] | None = None
    """Study ids to leave out; None leaves none out and takes a finished shard whatever it leaves out."""

    def digest(self) -> str:
        """Hex digest of what goes into the shard; equal ones give equal shards, but for `without`."""
        return records_digest((__version__, self.source, self.split, self.fingerprints), self.records)


def records_digest(settings: Any, records: Sequence[Record]) -> str:
    """Hex digest of records and of what else decides about their shards, by their repr."""
    digest = hashlib.sha256(repr(settings).encode(errors="surrogateescape"))
    for record in records:
        digest.update(repr(record).encode(errors="surrogateescape"))
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A line of the quarantine."""

    key: str
    cause: str
    reason: str
    counted: bool


@dataclass(kw_only=True)
class Outcome:
    """What became of the records of a shard; kept as JSON until all shards are done."""

    name: str
    digest: str
    written: Written | None = None
    """None if not one of its studies can be used."""
    faults: list[Fault] = field(default_factory=list)
    fingerprints: dict[str, Fingerprint] = field(default_factory=dict)
    """Study id -> fingerprint, also of studies that were left out since."""
    without: list[str] = field(default_factory=list)
    mesh: list[tuple[dict[str, int | None], dict[str, int]]] = field(default_factory=list)
    """Labels by our rules and by the MeSH terms, of studies that have such."""

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Outcome":
        value["written"] = Written(**value["written"]) if value["written"] else None
        value["faults"] = [Fault(**fault) for fault in value["faults"]]
        value["fingerprints"] = {study: Fingerprint(**found) for study, found in value["fingerprints"].items()}
        value["mesh"] = [(rules, mesh) for rules, mesh in value["mesh"]]
        return cls(**value)


class StoppedError(RuntimeError):
    """The shard was given up because the whole run stops."""


stop: multiprocessing.synchronize.Event | None = None
"""Set in a worker process, tells it to give up."""


def make_shard(job: Job) -> Outcome:
    """Write the shard of a job and what is known of it, unless both stand there whole from before.

    Raises:
        UserError: the folder cannot be written to.
        StoppedError: `stop` was set.
    """
    kept = job.folder / IN_PROGRESS / f"{job.name}.json"
    before = _finished(job, kept)
    if before and (job.without is None or job.without == set(before.without)):
        return before
    outcome = Outcome(name=job.name, digest=job.digest(), without=sorted(job.without or ()))
    if before:
        outcome.fingerprints = before.fingerprints
    path = job.folder / job.name
    with named_disk_errors(job.folder):
        remove_shard(path)
    outcome.written = write_shard(path, job.split, _samples(job, outcome))
    with named_disk_errors(job.folder):
        write_json(kept, asdict(outcome))
    return outcome


def _finished(job: Job, kept: Path) -> Outcome | None:
    """What is known of the shard if it is the one that `job` would write, and undamaged."""
    try:
        outcome = Outcome.from_json(json.loads(kept.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    path = job.folder / job.name
    if outcome.digest != job.digest() or path.is_file() != (outcome.written is not None):
        return None
    if outcome.written and (outcome.written.bytes, outcome.written.sha256) != (path.stat().st_size, sha256(path)):
        return None
    if outcome.written and read_index(path, outcome.written.sha256) is None:
        return None
    return outcome


def _samples(job: Job, outcome: Outcome) -> Iterator[Sample]:
    """The usable studies of a job, noting in `outcome` what there is to know of all."""
    for record in job.records:
        if stop is not None and stop.is_set():
            raise StoppedError
        if record.study_id in outcome.without:
            continue
        sample = _read(job.source, record, outcome.faults)
        if sample is None:
            continue
        if job.fingerprints and record.study_id not in outcome.fingerprints:
            outcome.fingerprints[record.study_id] = fingerprint(sample)
        if "mesh_labels" in sample.extra:
            outcome.mesh.append((sample.labels, sample.extra["mesh_labels"]))
        yield sample


def _read(source: Source, record: Record, faults: list[Fault]) -> Sample | None:
    key = make_key(record.study_id)

    def note(cause: str, reason: str, counted: bool = False) -> None:
        faults.append(Fault(key=key, cause=cause, reason=reason, counted=counted))

    try:
        sample = source.read(record, note)
    except BadStudyError as error:
        note(error.cause, error.reason, counted=True)
        return None
    except OSError as error:  # of the files of the source: none of ours is touched here
        note("unreadable file", error.strerror or type(error).__name__, counted=True)
        return None
    assert (sample.study_id, sample.patient_id, sample.split) == (record.study_id, record.patient_id, record.split)
    return sample
