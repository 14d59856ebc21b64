"""Shards to embeddings: a folder for each shard, there as a whole or not at all, by any number of processes."""

import json
import shutil
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from medclip_lab import progress
from medclip_lab.data.manifest import Manifest, Shard, check_names
from medclip_lab.data.quarantine import Quarantine
from medclip_lab.distributed import launched_world
from medclip_lab.errors import UserError
from medclip_lab.files import atomic_file, atomic_folder, read_json, write_json
from medclip_lab.inference.encoder import Encoder
from medclip_lab.retrieval.embeddings import (
    FORMAT,
    MANIFEST,
    SHARD,
    STATUS,
    STATUS_SCHEMA,
    TOLERANCE,
    table_schema,
    write_part,
)
from medclip_lab.retrieval.parts import EmbedConfig, Part, ShardParts

T = TypeVar("T")
QUARANTINE, LOCKS = "quarantine.jsonl", ".locks"


@dataclass
class Timing:
    """Where the seconds of this process went."""

    waiting: float = 0.0
    """For batches that were not decoded yet."""
    model: float = 0.0
    writing: float = 0.0
    rows: Counter[str] = field(default_factory=Counter)


def embed(
    encoder: Encoder,
    shards: str | Path,
    out: str | Path,
    split: str | None = None,
    config: EmbedConfig | None = None,
    max_bad: float = 0.01,
    workers: int = 0,
) -> dict[str, Any]:
    """Embed what the shards hold, images and texts; what an earlier call finished is kept.

    Several processes may work on one folder, under torchrun or not: each takes a shard that is neither finished nor
    another's. The result is the same to the byte for any number of processes and loader processes, and after any
    interruption.

    Args:
        split: one split only; None takes all.
        max_bad: share of unusable studies past which it stops.
        workers: loader processes that decode ahead of the model; 0 decodes in this process.

    Returns:
        The manifest, and under "run" what this process did.

    Raises:
        UserError: `out` holds embeddings of another bundle, other shards or other settings; two shards have one name;
            too much is unusable.
    """
    config = config or EmbedConfig()
    manifest, out = Manifest.load(shards), Path(out).expanduser()
    wanted = manifest.shards if split is None else manifest.of_split(split)
    check_names(wanted)
    facts = {
        "format": FORMAT,
        "bundle": encoder.fingerprint,
        "source": {shard.name: shard.sha256 for shard in wanted},
        "samples": sum(shard.samples for shard in wanted),
        **json.loads(json.dumps(asdict(config))),
    }
    if (out / MANIFEST).exists():
        if read_json(out / MANIFEST, "embeddings") != facts:
            raise UserError(
                f"out: {out} holds embeddings of another bundle, other shards or other settings: choose another folder"
            )
    else:
        write_json(out / MANIFEST, facts)
    timing, before = Timing(), _finished(out, wanted)
    quarantine = Quarantine(facts["samples"], max_bad)
    for shard in before:
        _count(quarantine, out, shard)
    _work(encoder, wanted, out, config, quarantine, workers, timing)
    if len(_finished(out, wanted)) == len(wanted):
        _finish(out, wanted, quarantine)
    run = {
        "device": str(encoder.model.mean.device),
        "rows": dict(timing.rows),
        "seconds": {name: round(getattr(timing, name), 3) for name in ("waiting", "model", "writing")},
        "shards_before": len(before),
        "unusable": quarantine.summary(),
    }
    return facts | {"run": run}


def _finished(out: Path, wanted: Sequence[Shard]) -> list[Shard]:
    return [shard for shard in wanted if (_folder(out, shard) / SHARD).exists()]


def _folder(out: Path, shard: Shard) -> Path:
    return out / Path(shard.name).stem


def _count(quarantine: Quarantine, out: Path, shard: Shard) -> None:
    """Bad studies of a finished shard, each once."""
    for row in pq.read_table(_folder(out, shard) / STATUS).to_pylist():
        if row["status"] != "ok":
            quarantine.add(shard.name, row["key"], row["status"], row["reason"], number=row["number"])


def _work(
    encoder: Encoder,
    wanted: Sequence[Shard],
    out: Path,
    config: EmbedConfig,
    quarantine: Quarantine,
    workers: int,
    timing: Timing,
) -> None:
    rank, world = launched_world()
    first = rank * len(wanted) // world  # ranks start apart, so that they seldom want the same shard
    total = sum(shard.samples for shard in wanted) - sum(shard.samples for shard in _finished(out, wanted))
    name = "embed shards" if world == 1 else f"embed shards, rank {rank}"
    with ExitStack() as locks:

        def begun() -> Iterator[tuple[Shard, FileLock, Iterator[Part]]]:
            for shard in [*wanted[first:], *wanted[:first]]:
                lock = _claim(out, shard)
                if lock is not None:
                    locks.callback(lock.release)
                    yield shard, lock, loader(encoder, shard, config, workers)

        def finished() -> Iterator[Shard]:
            # The next shard's loader processes begin while the model is still at this one.
            for shard, lock, parts in _ahead(begun(), 1 if workers else 0):
                embed_shard(encoder, shard, parts, out, config, quarantine, timing)
                lock.release()
                yield shard

        for _ in progress.track(finished(), name, total, weight=lambda shard: shard.samples):
            pass


def _ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """The items, each when `count` of those that follow it have been made."""
    waiting: deque[T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def _claim(out: Path, shard: Shard) -> FileLock | None:
    """A lock on a shard that nobody has finished or is at; the system frees it when its process ends."""
    if (_folder(out, shard) / SHARD).exists():
        return None
    (out / LOCKS).mkdir(exist_ok=True)
    lock = FileLock(out / LOCKS / f"{Path(shard.name).stem}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return None
    if (_folder(out, shard) / SHARD).exists():  # finished between the two looks
        lock.release()
        return None
    return lock


def loader(encoder: Encoder, shard: Shard, config: EmbedConfig, workers: int) -> Iterator[Part]:
    """The batches of a shard, decoded and tokenized."""
    parts = ShardParts(shard, encoder.preprocess, encoder.tokenizer, config)
    return iter(DataLoader(parts, batch_size=None, num_workers=min(workers, len(parts))))


def embed_shard(
    encoder: Encoder,
    shard: Shard,
    parts: Iterator[Part],
    out: Path,
    config: EmbedConfig,
    quarantine: Quarantine,
    timing: Timing,
) -> None:
    """Encode the batches of a shard and put its folder into place."""
    width = 0
    features: dict[str, list[NDArray[Any]]] = {name: [] for name in config.modalities}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in config.modalities}
    status: list[dict[str, Any]] = []
    while True:
        start = time.perf_counter()
        part = next(parts, None)
        got = time.perf_counter()
        timing.waiting += got - start
        if part is None:
            break
        found = {
            name: _encode(encoder, name, given, config)
            for name, given in (("image", part.pixels), ("text", part.tokens))
            if given is not None
        }
        timing.model += time.perf_counter() - got
        for name, values in found.items():
            good = _usable(values)
            if not good.all():
                _mark_bad(part, name, good)
            features[name].append(values[good])
            rows[name] += [row for row, is_good in zip(part.rows[name], good, strict=True) if is_good]
            width = values.shape[1]
        for row in part.status:
            if row["status"] != "ok":
                quarantine.add(shard.name, row["key"], row["status"], row["reason"], number=row["number"])
        status += part.status
    start = time.perf_counter()
    arrays = {name: np.concatenate([np.zeros((0, width), config.dtype), *features[name]]) for name in features}
    tables = {name: pa.Table.from_pylist(rows[name], table_schema(name, config.include_text)) for name in rows}
    folder = _folder(out, shard)
    if not (folder / SHARD).exists():  # where locks do not hold, another process may have been faster, with equal bytes
        with atomic_folder(folder) as temporary:
            write_part(temporary, arrays, tables, pa.Table.from_pylist(status, STATUS_SCHEMA))
    timing.writing += time.perf_counter() - start
    timing.rows.update({name: len(values) for name, values in arrays.items()})


@torch.inference_mode()
def _encode(encoder: Encoder, modality: str, given: Tensor, config: EmbedConfig) -> NDArray[Any]:
    """[N, D] of a batch. One with many images or sentences a study goes through the tower in pieces of `batch_size`."""
    tower, device = encoder.model.towers[modality], encoder.model.mean.device
    pieces = [tower(piece.to(device)).cpu().numpy() for piece in torch.split(given, config.batch_size)]
    return np.concatenate(pieces).astype(config.dtype)


def _usable(values: NDArray[Any]) -> NDArray[np.bool_]:
    norms = np.linalg.norm(values.astype(np.float32), axis=1)
    return np.asarray(np.abs(norms - 1) <= TOLERANCE)  # NaN compares as false


def _mark_bad(part: Part, modality: str, good: NDArray[np.bool_]) -> None:
    ok = (row for row in part.status if row["modality"] == modality and row["status"] == "ok")
    for row, is_good in zip(list(ok), good, strict=True):
        if not is_good:
            row |= {"status": "bad embedding", "reason": "not finite with norm 1"}


def _finish(out: Path, wanted: Sequence[Shard], quarantine: Quarantine) -> None:
    """When all shards are there: the list of what was unusable, and nothing left over. Whoever does it writes the same.

    Raises:
        UserError: all processes together met more than the ceiling.
    """
    left_over = [*out.glob(".*.tmp"), *([out / LOCKS] if (out / LOCKS).exists() else [])]
    lines = []
    for shard in wanted:
        _count(quarantine, out, shard)
        for row in pq.read_table(_folder(out, shard) / STATUS).to_pylist():
            if row["status"] != "ok":
                line = {"shard": shard.name, "key": row["key"], "cause": row["status"], "reason": row["reason"]}
                lines.append(json.dumps(line) + "\n")
    with atomic_file(out / QUARANTINE) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    for path in left_over:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
