"""Shards without what is bad in them, written anew beside the old ones."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from medclip_lab import progress
from medclip_lab.data.check import Finding, studies_of
from medclip_lab.data.manifest import Manifest, Shard, check_names
from medclip_lab.data.quarantine import Quarantine
from medclip_lab.data.reader import Study
from medclip_lab.data.sample import Sample
from medclip_lab.data.sources.base import Record
from medclip_lab.data.writing import (
    Written,
    check_studies,
    named_disk_errors,
    start_folder,
    write_manifest,
    write_shard,
)
from medclip_lab.errors import UserError

QUARANTINE = "quarantine.jsonl"


def repair(shards: str | Path, out: Path, decode: bool = True, command: str = "") -> dict[str, Any]:
    """Copy the good samples of shards to `out`, each shard to one of the same name, and list what was left out.

    A study keeps those of its images that can be decoded, and is left out if none of several can. Shards of other tools
    come out as ours. The old shards stay as they are.

    Args:
        decode: decode the images; else only what cannot be read is left out.

    Returns:
        The new manifest, with "left_out": how many samples and images, by cause.

    Raises:
        UserError: no shards there, `out` is not empty, not one good sample, a full disk; two samples of one study id,
            or a patient in two splits: then there is no manifest.
    """
    manifest = Manifest.load(shards)
    out = out.expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out: {out} exists and is not empty: choose another folder")
    check_names(manifest.shards)
    with named_disk_errors(out):
        start_folder(out)
    quarantine = Quarantine(sum(shard.samples for shard in manifest.shards), 1.0, out / QUARANTINE)
    causes: Counter[str] = Counter()
    written: list[Written] = []
    kept: list[Record] = []
    for shard in progress.track(manifest.shards, "repair shards", len(manifest.shards)):
        findings: list[Finding] = []
        made = write_shard(out / shard.name, shard.split, _samples(shard, decode, findings, kept))
        if made is not None:
            written.append(made)
        for finding in findings:
            causes[finding.fault.cause] += 1
            quarantine.note(shard.name, finding.key, *finding.fault)
    check_studies(kept)
    source = str(manifest.facts.get("source") or "shards")
    with named_disk_errors(out):
        return write_manifest(out, source, written, command=command, left_out=dict(causes.most_common()))


def _samples(shard: Shard, decode: bool, findings: list[Finding], kept: list[Record]) -> Iterator[Sample]:
    for study, bad in studies_of(shard, decode, findings):
        if not study.images or len(bad) < len(study.images):
            sample = _sample(study, shard.split, bad)
            kept.append(Record(study_id=sample.study_id, patient_id=sample.patient_id, split=sample.split))
            yield sample


def _sample(study: Study, split: str, without: set[int]) -> Sample:
    """The study as it was, but for some of its images."""
    known = {option.name for option in fields(Sample)} - {"images", "extra", "split", "view"}
    good = [number for number in range(len(study.images)) if number not in without]
    views = study.record.get("view") or []
    return Sample(
        images=[study.images[number] for number in good],
        view=[views[number] for number in good] if len(views) == len(study.images) else views,
        split=split,
        extra={name: value for name, value in study.record.items() if name not in {*known, "split", "view"}},
        **{name: study.record[name] for name in known if study.record.get(name) is not None},
    )


def summary(out: Path, manifest: dict[str, Any]) -> str:
    """The result for people."""
    line = f"{out}: {manifest['samples']} samples in {len(manifest['shards'])} shards"
    left = [f"{count:>8}  {cause}" for cause, count in manifest["left_out"].items()]
    return "\n".join([line, *left, *([f"listed in {out / QUARANTINE}"] if left else [])])
