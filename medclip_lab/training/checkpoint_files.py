"""A checkpoint on disk: a folder that is whole or not there, which any number of ranks can read, and no pickle in it.

    step-00000500/
      manifest.json          format, step, next batch, ranks, code, metrics; bytes and sha256 of every other file
      state.json             the state as Lightning keeps it, with a name in the place of every tensor
      config.yaml            the settings of the run
      shard-00001-*.safetensors ...   the tensors, a file for each rank that wrote

The tensors go through `torch.distributed.checkpoint` in its safetensors layout: sharded ones are written by every rank
and read by whatever number of them. Reading parses JSON and safetensors, and executes nothing.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from medclip_lab import distributed
from medclip_lab.errors import UserError
from medclip_lab.files import read_json, sha256, write_json

FORMAT = "medclip_lab checkpoint 1"
MANIFEST, STATE, CONFIG = "manifest.json", "state.json", "config.yaml"


class DamagedError(ValueError):
    """A folder is no whole checkpoint; the message says why."""


class SaveError(OSError):
    """A checkpoint could not be written, on this rank or on another; what was there before is untouched."""


def split(tree: Any, path: tuple[str, ...] = ()) -> tuple[Any, dict[str, Tensor]]:
    """A nested state as something that JSON can say, and its tensors by name."""
    tensors: dict[str, Tensor] = {}

    def inner(value: Any, *name: object) -> Any:
        said, found = split(value, (*path, *map(str, name)))
        tensors.update(found)
        return said

    if isinstance(tree, Tensor):
        name = "/".join(path)
        return {"!tensor": name}, {name: tree}
    if isinstance(tree, Mapping):
        if all(isinstance(key, str) and not key.startswith("!") for key in tree):
            return {key: inner(value, key) for key, value in tree.items()}, tensors
        return {"!pairs": [[inner(key, "key"), inner(value, key)] for key, value in tree.items()]}, tensors
    if isinstance(tree, list | tuple):
        items = [inner(value, number) for number, value in enumerate(tree)]
        return (items if isinstance(tree, list) else {"!tuple": items}), tensors
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree, tensors
    raise TypeError(f"a checkpoint cannot hold {'/'.join(path)}, a {type(tree).__name__}")


def join(said: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `split` took apart."""
    if isinstance(said, list):
        return [join(value, tensors) for value in said]
    if not isinstance(said, dict):
        return said
    if "!tensor" in said:
        return tensors[said["!tensor"]]
    if "!tuple" in said:
        return tuple(join(value, tensors) for value in said["!tuple"])
    if "!pairs" in said:
        return {join(key, tensors): join(value, tensors) for key, value in said["!pairs"]}
    return {key: join(value, tensors) for key, value in said.items()}


def write(
    folder: Path, state: Any, tensors: dict[str, Tensor], facts: dict[str, Any], config: str, group: Any = None
) -> None:
    """Write a checkpoint; every rank calls this with its own tensors, and `folder` appears when all have written.

    Args:
        folder: what it will be called; it does not exist yet, and all ranks see its parent.
        state: of rank 0, as `split` gives it.
        tensors: of this rank: shards that every rank has a part of, and whole ones that no other rank writes.
        facts: for the manifest.
        group: of the ranks, over gloo.

    Raises:
        SaveError: on every rank, if one could not write.
    """
    rank = distributed.rank()
    temporary = folder.with_name(f".{folder.name}.tmp")  # one name, so that ranks need not tell each other

    def begin() -> None:
        if rank == 0:
            remove(temporary)
            temporary.mkdir(parents=True)

    def put() -> dict[str, Any]:
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        flat = {name: value if isinstance(value, DTensor) else value.contiguous() for name, value in tensors.items()}
        save(flat, storage_writer=writer, process_group=group, no_dist=group is None)
        return {path.name: described(path) for path in sorted(temporary.glob(f"shard-{rank + 1:05d}-*"))}

    def finish() -> None:
        if rank == 0:
            (temporary / CONFIG).write_text(config, encoding="utf-8")
            write_json(temporary / STATE, state, indent=None)
            files = {name: described(temporary / name) for name in (CONFIG, STATE)}
            for part in parts:
                files |= part
            write_json(temporary / MANIFEST, {"format": FORMAT, **facts, "files": files})
            temporary.rename(folder)

    try:
        _all(begin, group)
        parts = _all(put, group)
        _all(finish, group)
    finally:
        if rank == 0:
            remove(temporary)


def described(path: Path) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _all(act: Callable[[], Any], group: Any) -> list[Any]:
    """What every rank's `act` gave, after all have acted; a failure of one is raised on all."""
    value, problem = None, None
    try:
        value = act()
    except (OSError, CheckpointException, ValueError, RuntimeError) as error:
        if distributed.lost_another(error):
            raise
        problem = cause_of(error)
    answers = distributed.everyones((value, problem), group)
    for index, (_, trouble) in enumerate(answers):
        if trouble is not None:
            raise SaveError(trouble if len(answers) == 1 else f"on rank {index}: {trouble}")
    return [value for value, _ in answers]


def cause_of(error: BaseException) -> str:
    """One line on why writing failed, without the traceback that torch wraps it in."""
    if isinstance(error, CheckpointException):
        for failure in error.failures.values():
            error = failure[0] if isinstance(failure, tuple) else failure
            break
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def remove(folder: Path) -> None:
    """Take a folder away, first from where others look for it."""
    if not folder.exists():
        return
    retired = folder.with_name(f".{folder.name.strip('.')}.gone")
    shutil.rmtree(retired, ignore_errors=True)
    folder.rename(retired)
    shutil.rmtree(retired, ignore_errors=True)


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, its files unread.

    Raises:
        DamagedError: there is none, or another's.
    """
    try:
        manifest = read_json(folder / MANIFEST, "checkpoint")
    except UserError as error:
        raise DamagedError(str(error)) from None
    if manifest.get("format") != FORMAT:
        raise DamagedError(f"its format is {manifest.get('format')!r}, not {FORMAT!r}")
    return manifest


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint that has all its files, byte for byte.

    Raises:
        DamagedError: which file is missing or other than it was written.
    """
    manifest = manifest_of(folder)
    for name, facts in manifest["files"].items():
        path = folder / name
        if os.sep in name or not path.is_file():
            raise DamagedError(f"{name} is missing")
        if path.stat().st_size != facts["bytes"] or sha256(path) != facts["sha256"]:
            raise DamagedError(f"{name} is not the file that was written")
    return manifest


def tensors_in(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Name -> shape and dtype of what a checkpoint holds."""
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: meta for name, meta in found.items() if isinstance(meta, TensorStorageMetadata)}


def read_tensors(
    folder: Path, wanted: Iterable[str] | None = None, like: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Tensors of a checkpoint, each whole and on the CPU, or laid out as the one of the same name in `like`."""
    found = tensors_in(folder)
    targets: dict[str, Tensor] = {}
    for name in found if wanted is None else wanted:
        meta = found[name]
        if like is not None and name in like:
            targets[name] = torch.zeros_like(like[name], dtype=meta.properties.dtype)
        else:
            targets[name] = torch.zeros(meta.size, dtype=meta.properties.dtype)
    # Every rank reads for itself: there is nothing to wait for.
    load(targets, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return targets
