"""Is what lies in a folder of shards what was written there?"""

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from medclip_lab import progress
from medclip_lab.data.decode import DecodeError, decode_image
from medclip_lab.data.index import Fault, index_path, read_index
from medclip_lab.data.manifest import Manifest, Shard
from medclip_lab.data.quarantine import Quarantine
from medclip_lab.data.reader import BadSampleError, Reader, Study
from medclip_lab.errors import UserError
from medclip_lab.files import sha256

BYTES_OF_A_PROCESS = 128 * 2**20
"""For fewer it takes longer to start one than it saves."""


class Finding(NamedTuple):
    """Something bad in a shard; the key is empty if it is the shard itself."""

    key: str
    fault: Fault


class ShardReport(NamedTuple):
    """What was found in a shard."""

    name: str
    good: int
    findings: list[Finding]


def check(shards: str | Path, decode: bool = True, listed: Path | None = None) -> dict[str, Any]:
    """Look at every shard (size, hash, index) and every sample (record, images), with all cores.

    Args:
        decode: decode the images too.
        listed: a JSONL file for shard, key, cause and reason of everything bad; replaced.

    Returns:
        "samples", "good", "bad" (samples and shards) and "causes" with their counts.

    Raises:
        UserError: no shards there.
    """
    manifest = Manifest.load(shards)
    total = sum(shard.samples for shard in manifest.shards)
    if listed is not None:
        if listed.is_dir():
            raise UserError(f"--out: {listed} is a folder; name a JSONL file")
        listed.unlink(missing_ok=True)
    quarantine = Quarantine(total, 1.0, listed)
    causes: Counter[str] = Counter()
    good = 0
    for report in reports(manifest.shards, decode):
        good += report.good
        for finding in report.findings:
            causes[finding.fault.cause] += 1
            quarantine.note(report.name, finding.key, *finding.fault)
    return {
        "shards": len(manifest.shards),
        "samples": total,
        "good": good,
        "bad": sum(causes.values()),
        "causes": dict(causes.most_common()),
    }


def reports(shards: tuple[Shard, ...], decode: bool) -> Iterator[ShardReport]:
    """What is found in each shard, in order, by as many processes as there are cores and work for them."""
    work = sum(shard.bytes for shard in shards) // BYTES_OF_A_PROCESS
    workers = min(os.cpu_count() or 1, len(shards), work)
    if workers < 2:
        yield from progress.track((check_shard(shard, decode) for shard in shards), "check shards", len(shards))
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        found = pool.map(partial(check_shard, decode=decode), shards)
        yield from progress.track(found, "check shards", len(shards))


def check_shard(shard: Shard, decode: bool = True) -> ShardReport:
    """Everything that is wrong with one shard."""
    findings: list[Finding] = []
    try:
        path = shard.local()
        if shard.sha256 and sha256(path) != shard.sha256:
            findings.append(Finding("", Fault("changed shard", "its hash is not that of the manifest")))
        if shard.sha256 and index_path(path).exists() and read_index(path, shard.sha256) is None:
            findings.append(Finding("", Fault("bad index", "the index beside it is not of this shard")))
    except OSError as error:
        return ShardReport(shard.name, 0, [Finding("", Fault("unreadable shard", error.strerror or str(error)))])
    good = sum(not bad for _, bad in studies_of(shard, decode, findings))
    return ShardReport(shard.name, good, findings)


def studies_of(shard: Shard, decode: bool, findings: list[Finding]) -> Iterator[tuple[Study, set[int]]]:
    """The studies of a shard that can be read, each with the numbers of those images that cannot be decoded.

    Everything bad is appended to `findings`.
    """
    reader = Reader([shard], Quarantine(shard.samples, 1.0), limit=1)
    for number in range(shard.samples):
        try:
            study = reader.study(0, number)
        except BadSampleError as error:
            findings.append(Finding(error.key, error.fault))
            continue
        bad = _bad_images(study) if decode else {}
        if bad:
            told = "; ".join(f"image {place}: {reason}" for place, reason in bad.items())
            findings.append(Finding(study.key, Fault("unreadable image", told)))
        yield study, set(bad)
    if (found := reader.count(0)) > shard.samples:
        reason = f"{found} samples, and the manifest tells of {shard.samples}"
        findings.append(Finding("", Fault("wrong count", reason)))
    findings += [Finding("", fault) for fault in reader.faults(0)]
    reader.close()


def _bad_images(study: Study) -> dict[int, str]:
    """What is wrong with those images of a study that cannot be decoded, by number."""
    faults = {}
    for number, (suffix, data) in enumerate(study.images):
        if suffix == "nii.gz":
            continue  # volumes have no decoder here
        try:
            decode_image(data, suffix).eight_bits()
        except DecodeError as error:
            faults[number] = str(error)
    return faults


def summary(result: dict[str, Any]) -> str:
    """The result for people."""
    line = f"{result['shards']} shards, {result['samples']} samples, {result['good']} good"
    return "\n".join([line, *(f"{count:>8}  {cause}" for cause, count in result["causes"].items())])
