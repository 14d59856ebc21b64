"""Source files to shards: which source, where the quarantine list lies, and what is reused."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medclip_lab import progress
from medclip_lab.data.manifest import MANIFEST, Manifest
from medclip_lab.data.quarantine import Quarantine
from medclip_lab.data.shards import LEFT_BEHIND, Sample, write_shards
from medclip_lab.errors import UserError
from medclip_lab.files import digest, read_json

QUARANTINE = "quarantine.jsonl"


def prepare(
    source: str, out: Path, samples_per_shard: int = 256, max_bad: float = 0.01, command: str = "", **options: Any
) -> tuple[dict[str, Any], str]:
    """Write the shards of a source to `out`; a folder that holds just these already is left as it is.

    Args:
        source: "phantom", "nih-cxr14", "openi" or "csv".
        options: what that source takes, see `medclip-lab prepare SOURCE --help`.

    Returns:
        The manifest as a dict, and lines for people.

    Raises:
        UserError: a source that cannot be read, too many unusable studies, `out` holds something else.
    """
    if samples_per_shard < 1:
        raise UserError(f"--samples-per-shard must be at least 1, got {samples_per_shard}")
    out = out.expanduser()
    request = digest({"source": source, "samples_per_shard": samples_per_shard, **options, **_state_of(options)})
    if (out / MANIFEST).exists():
        recorded = read_json(out / MANIFEST, "shards")
        if recorded.get("request") == request:
            Manifest.load(out)  # every shard is there
            return recorded, f"{out}: {recorded['samples']} studies, prepared before"
        raise UserError(f"out: {out} holds other shards: choose another folder, or remove it")
    if out.exists() and not out.is_dir():
        raise UserError(f"out: {out} is a file: choose a folder")
    foreign = [path.name for path in out.iterdir() if not _ours(path.name)] if out.exists() else []
    if foreign:
        raise UserError(f"out: {out} holds other files, such as {sorted(foreign)[0]!r}: choose another folder")
    (out / QUARANTINE).unlink(missing_ok=True)
    total, samples, quarantine = _open(source, max_bad, out / QUARANTINE, options)
    checks: list[tuple[dict[str, int | None], dict[str, int]]] = []

    def watched() -> Iterator[Sample]:
        for sample in progress.track(samples, f"prepare {source}", total):
            if "mesh_labels" in sample.extra:
                checks.append((sample.labels, sample.extra["mesh_labels"]))
            yield sample

    manifest = write_shards(watched(), out, source, samples_per_shard, request=request, command=command)
    counts = ", ".join(f"{split} {number}" for split, number in manifest.facts["splits"].items())
    lines = [f"{out}: {manifest.facts['samples']} studies in {len(manifest.shards)} shards ({counts})"]
    if quarantine.causes:
        lines.append(f"{quarantine.summary()}, listed in {out / QUARANTINE}")
    if checks:
        from medclip_lab.data.mesh import agreement, agreement_table

        lines += ["our label rules against the MeSH terms of the reports:", agreement_table(agreement(checks))]
    return manifest.facts, "\n".join(lines)


def _ours(name: str) -> bool:
    return name == QUARANTINE or LEFT_BEHIND.fullmatch(name) is not None


def _state_of(options: dict[str, Any]) -> dict[str, Any]:
    """Size and time of the input files: the same command on another table is another request."""
    state = {}
    for name, value in options.items():
        if isinstance(value, Path) and value.is_file():
            stat = value.stat()
            state[f"{name} state"] = [stat.st_size, stat.st_mtime_ns]
    return state


def _open(
    source: str, max_bad: float, listed: Path, options: dict[str, Any]
) -> tuple[int, Iterator[Sample], Quarantine]:
    """Number of studies, the studies, and the quarantine they go to."""
    if source == "phantom":
        from medclip_lab.data.phantom import phantom_samples

        studies, workers = options["studies"], os.cpu_count() or 1
        samples = phantom_samples(studies, options["seed"], options["size"], workers)
        return studies, samples, Quarantine(studies, max_bad, listed)
    if source == "nih-cxr14":
        from medclip_lab.data.sources.nih_cxr14 import nih_samples, nih_total

        total = nih_total(options["folder"])
        quarantine = Quarantine(total, max_bad, listed)
        return total, nih_samples(options["folder"], quarantine), quarantine
    if source == "openi":
        from medclip_lab.data.sources.openi import openi_samples, openi_total

        total = openi_total(options["path"])
        quarantine = Quarantine(total, max_bad, listed)
        return total, openi_samples(options["path"], quarantine), quarantine
    if source == "csv":
        from medclip_lab.data.sources.csv_pairs import csv_samples, csv_total

        total = csv_total(options["path"], options.get("study"))
        quarantine = Quarantine(total, max_bad, listed)
        samples = csv_samples(
            options["path"],
            quarantine,
            image_folder=options.get("image_folder"),
            image_column=options.get("image", "image"),
            text_column=options.get("text", "text"),
            study_column=options.get("study"),
            patient_column=options.get("patient"),
            split_column=options.get("split"),
            label_columns=options.get("labels"),
            license=options.get("license", "private"),
        )
        return total, samples, quarantine
    raise UserError(f"prepare: unknown source {source!r}, one of phantom, nih-cxr14, openi, csv expected")
