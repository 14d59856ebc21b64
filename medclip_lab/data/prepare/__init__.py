"""A source of studies to shards: planned in full first, then made in parallel, interrupted as often as may be."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from medclip_lab import progress
from medclip_lab.data.prepare.duplicates import Known, count_duplicates, in_precedence, repeated_studies
from medclip_lab.data.prepare.executors import EXECUTORS, outcomes
from medclip_lab.data.prepare.job import IN_PROGRESS, Fault, Job, Outcome, records_digest
from medclip_lab.data.quarantine import Quarantine
from medclip_lab.data.sample import SPLITS, make_key
from medclip_lab.data.sources.base import Record, Source
from medclip_lab.data.writing import (
    LEFT_BEHIND,
    MANIFEST,
    QUARANTINE,
    check_studies,
    named_disk_errors,
    shard_name,
    start_folder,
    write_manifest,
)
from medclip_lab.errors import UserError
from medclip_lab.files import atomic_file, digest, read_json

DUPLICATES = ("report", "drop", "ignore")
TOLD = {"images": "images", "near_images": "nearly equal images of different patients", "reports": "reports"}


def prepare(
    source: Source,
    out: Path,
    *,
    samples_per_shard: int = 256,
    max_bad: float = 0.01,
    duplicates: str = "report",
    workers: int | None = None,
    executor: str = "processes",
    command: str = "",
) -> tuple[dict[str, Any], str]:
    """Write the shards of a source to `out`; a folder that holds just these already is left as it is.

    The records of each split are cut into shards in their order, and a shard is a function of its records alone: the
    files are the same for any number of workers and after any interruption. Called again after one, shards that are
    whole are kept.

    Args:
        max_bad: share of unusable studies past which it stops.
        duplicates: "report" counts images and reports that stand there twice, within and across splits; "drop" also
            leaves out each study with an image that an earlier one has byte by byte (test before val before train, so
            that nothing leaks); "ignore" does not look.
        workers: processes, by default one a core. They are spawned, so a script needs the usual
            `if __name__ == "__main__":`.
        executor: "processes", or "ray" for the cluster that RAY_ADDRESS names.

    Returns:
        The manifest as a dict, and lines for people.

    Raises:
        UserError: a source that cannot be read, a study twice, a patient in several splits, too many unusable studies,
            a full disk; `out` holds something else.
    """
    _check_settings(samples_per_shard, duplicates, workers, executor)
    records = source.records()
    check_studies(records)
    out = out.expanduser()
    settings = {"samples_per_shard": samples_per_shard, "duplicates": duplicates}
    request = digest(settings | {"records": records_digest(source, records)})
    if manifest := _prepared_before(out, request):
        return manifest, f"{out}: {manifest['samples']} studies, prepared before"
    jobs = _plan(source, records, out, samples_per_shard, duplicates != "ignore")
    quarantine = Quarantine(len(records), max_bad, out / QUARANTINE)
    run = _Run(jobs, quarantine, executor, workers or _cores())
    facts: dict[str, Any] = {"request": request, "command": command}
    with named_disk_errors(out):
        start_folder(out, keep=frozenset(job.name for job in jobs))
        (out / QUARANTINE).unlink(missing_ok=True)
    run.make(jobs, f"prepare {source.name}")
    dropped: dict[str, str] = {}
    if duplicates != "ignore":
        dropped, facts["duplicates"] = _look_for_duplicates(run, duplicates == "drop")
    shards = [run.done[job.name].written for job in jobs]
    with named_disk_errors(out):
        _write_quarantine(out / QUARANTINE, run, dropped)
        manifest = write_manifest(out, source.name, [shard for shard in shards if shard], **facts)
        shutil.rmtree(out / IN_PROGRESS)
    return manifest, _summary(out, manifest, run)


class _Run:
    """The jobs of a data set and what has become of them."""

    def __init__(self, jobs: list[Job], quarantine: Quarantine, executor: str, workers: int) -> None:
        self.jobs, self.quarantine = jobs, quarantine
        self.executor, self.workers = executor, workers
        self.done: dict[str, Outcome] = {}

    def make(self, jobs: list[Job], description: str) -> None:
        """Have jobs done, listing what is wrong as it comes to light.

        Raises:
            UserError: what `outcomes` raises, and past the ceiling of bad studies.
        """
        sizes = {job.name: len(job.records) for job in jobs}
        with closing(outcomes(jobs, self.executor, self.workers)) as made:
            total = sum(sizes.values())
            for outcome in progress.track(made, description, total, weight=lambda outcome: sizes[outcome.name]):
                self.done[outcome.name] = outcome
                with named_disk_errors(jobs[0].folder):
                    self._list(outcome)

    def _list(self, outcome: Outcome) -> None:
        for fault in outcome.faults:
            add = self.quarantine.add if fault.counted else self.quarantine.note
            add(outcome.name, fault.key, fault.cause, fault.reason)


def _check_settings(samples_per_shard: int, duplicates: str, workers: int | None, executor: str) -> None:
    if samples_per_shard < 1:
        raise UserError(f"--samples-per-shard must be at least 1, got {samples_per_shard}")
    if workers is not None and workers < 1:
        raise UserError(f"--workers must be at least 1, got {workers}")
    if duplicates not in DUPLICATES:
        raise UserError(f"--duplicates: one of {', '.join(DUPLICATES)} expected, got {duplicates!r}")
    if executor not in EXECUTORS:
        raise UserError(f"--executor: one of {', '.join(EXECUTORS)} expected, got {executor!r}")


def _cores() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepared_before(out: Path, request: str) -> dict[str, Any] | None:
    """The manifest, if `out` holds just what is asked for; None if it is free.

    Raises:
        UserError: it holds something else.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"out: {out} is a file: choose a folder")
    if not (out / MANIFEST).exists():
        foreign = sorted(path.name for path in out.iterdir() if not _ours(path.name)) if out.exists() else []
        if foreign:
            raise UserError(f"out: {out} holds other files, such as {foreign[0]!r}: choose another folder")
        return None
    recorded = read_json(out / MANIFEST, "shards")
    if recorded.get("request") != request:
        raise UserError(f"out: {out} holds other shards: choose another folder, or remove it")
    if any(not (out / str(shard["name"])).is_file() for shard in recorded["shards"]):
        return None  # one was removed since: all are made again
    shutil.rmtree(out / IN_PROGRESS, ignore_errors=True)  # left by who was killed right after writing the manifest
    return recorded


def _ours(name: str) -> bool:
    return name in (QUARANTINE, IN_PROGRESS) or LEFT_BEHIND.fullmatch(name) is not None


def _plan(
    source: Source, records: Sequence[Record], out: Path, samples_per_shard: int, fingerprints: bool
) -> list[Job]:
    """The records of each split, in their order, cut into shards."""
    jobs = []
    for split in SPLITS:
        of_split = [record for record in records if record.split == split]
        for number, start in enumerate(range(0, len(of_split), samples_per_shard)):
            jobs.append(
                Job(
                    source=source,
                    folder=out,
                    name=shard_name(split, number),
                    split=split,
                    records=tuple(of_split[start : start + samples_per_shard]),
                    fingerprints=fingerprints,
                )
            )
    return jobs


def _look_for_duplicates(run: _Run, drop: bool) -> tuple[dict[str, str], dict[str, Any]]:
    """Study id -> split of the original, of studies that were left out of their shards; and how many stay."""
    studies = in_precedence(
        Known(record, run.done[job.name].fingerprints[record.study_id])
        for job in run.jobs
        for record in job.records
        if record.study_id in run.done[job.name].fingerprints
    )
    dropped = repeated_studies(studies) if drop else {}
    stale = []
    for job in run.jobs:
        without = frozenset(record.study_id for record in job.records if record.study_id in dropped)
        if without != set(run.done[job.name].without):
            stale.append(replace(job, without=without))
    if stale:
        run.make(stale, "leave out duplicates")
    staying = [study for study in studies if study.record.study_id not in dropped]
    return dropped, count_duplicates(staying) | {"studies_dropped": len(dropped)}


def _write_quarantine(path: Path, run: _Run, dropped: dict[str, str]) -> None:
    """The list in the order of the records, whatever came first; no file if there is nothing to list."""
    path.unlink(missing_ok=True)
    lines = [(name, fault.key, fault.cause, fault.reason) for name, fault in _faults(run, dropped)]
    if lines:
        with atomic_file(path) as temporary:
            quarantine = Quarantine(run.quarantine.total, path=temporary)
            for line in lines:
                quarantine.note(*line)


def _faults(run: _Run, dropped: dict[str, str]) -> Iterator[tuple[str, Fault]]:
    for job in run.jobs:
        for fault in run.done[job.name].faults:
            yield job.name, fault
        for record in job.records:
            if record.study_id in dropped:
                reason = f"it has an image of an earlier study of split {dropped[record.study_id]}"
                yield job.name, Fault(key=make_key(record.study_id), cause="duplicate", reason=reason, counted=False)


def _summary(out: Path, manifest: dict[str, Any], run: _Run) -> str:
    counts = ", ".join(f"{split} {number}" for split, number in manifest["splits"].items())
    lines = [f"{out}: {manifest['samples']} studies in {len(manifest['shards'])} shards ({counts})"]
    if run.quarantine.causes:
        lines.append(run.quarantine.summary())
    if found := manifest.get("duplicates"):
        lines.append(f"standing there twice: {', '.join(_twice(found, name) for name in TOLD)}")
        if found["studies_dropped"]:
            lines.append(f"{found['studies_dropped']} studies that have an image of another were left out")
    if (out / QUARANTINE).exists():
        lines.append(f"listed in {out / QUARANTINE}")
    checks = [pair for job in run.jobs for pair in run.done[job.name].mesh]
    if checks:
        from medclip_lab.data.mesh import agreement, agreement_table

        lines += ["our label rules against the MeSH terms of the reports:", agreement_table(agreement(checks))]
    return "\n".join(lines)


def _twice(found: dict[str, Any], name: str) -> str:
    within, across = found[name]["within"], found[name]["across"]
    return f"{within + across} {TOLD[name]} ({across} across splits)"
