"""Files that are never half-written: write under a temporary name, rename when whole."""

import ctypes
import errno
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medclip_lab.errors import UserError

LFS = "version https://git-lfs"


def _beside(path: Path) -> Path:
    path = path.absolute()  # "." has no name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


@contextmanager
def _full_disk_named(path: Path) -> Iterator[None]:
    """A full disk is told with the folder that lies on it: a write to an open file knows no name.

    numpy counts the items it wrote and gives no number of an error.
    """
    try:
        yield
    except OSError as error:
        counted = error.errno is None and "requested and" in str(error)
        number = errno.ENOSPC if counted else error.errno
        if number in (errno.ENOSPC, errno.EDQUOT) and error.filename is None:
            raise OSError(number, os.strerror(number), str(path.absolute().parent)) from error
        raise


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it becomes `path` if the block succeeds and disappears if it raises."""
    temporary = _beside(path)
    try:
        with _full_disk_named(path):
            yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill; it replaces `path` if the block succeeds and disappears if it raises."""
    path = path.resolve()  # through a link, which stays one
    temporary = _beside(path)
    temporary.mkdir()
    try:
        with _full_disk_named(path):
            yield temporary
        if not path.exists():
            temporary.rename(path)
            return
        stood_in = path == Path.cwd()
        _exchange(temporary, path)
        if stood_in:  # or relative paths would lead into the folder that is deleted now
            os.chdir(path)
            print(f'{path} is another folder now: type cd "$PWD", or your shell stays in the old one', file=sys.stderr)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(new: Path, path: Path) -> None:
    """Two folders change names: a full one cannot be renamed over. Linux does it at once, on most disks.

    Elsewhere a kill between two renames leaves the old folder beside its own name: `existing_folder` tells of it.
    """
    if sys.platform == "linux" and _rename_exchange(new, path):
        return
    retired = _retired(path)
    shutil.rmtree(retired, ignore_errors=True)  # of a kill long ago: `path` is there again
    path.rename(retired)
    try:
        new.rename(path)
    except BaseException:
        retired.rename(path)
        raise
    retired.rename(new)


def _retired(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _rename_exchange(one: Path, other: Path) -> bool:
    """renameat2(2) with RENAME_EXCHANGE; False where the C library or the disk has no such thing."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """Hex digest of a JSON-like value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write `value` as JSON, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=indent, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object; `what` names it in the error ("manifest of the shards").

    Raises:
        UserError: the file is missing, unreadable or not a JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith(LFS):
            raise UserError(f"{what}: {path} is a pointer of Git LFS, not the file itself: run git lfs pull")
        value = json.loads(text)
    except FileNotFoundError:
        raise UserError(f"{what}: no such file: {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{what}: cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{what}: {path} holds a {type(value).__name__}, not an object")
    return value


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON lines file; a line that was cut off, as by a full disk, is passed over."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def refuse_to_replace(out: Path, manifest: str, formats: tuple[str, ...], what: str) -> None:
    """Stop before a folder is replaced that holds anything but `what`: an empty one, or one with its manifest, may go.

    Raises:
        UserError: `out` is a file, or a folder of something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    known = (out / manifest).is_file() and read_json(out / manifest, what).get("format") in formats
    if not known:
        raise UserError(f"out: {out} exists and is no {what}: it would be lost, choose another folder")


def existing_folder(path: str | os.PathLike[str], what: str) -> Path:
    """`path` as a folder that exists and is not empty.

    Raises:
        UserError: it is missing, a file, or empty.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        old = _retired(folder.absolute())
        left = f"; a kill left it at {old}: rename that back" if old.is_dir() else ""
        raise UserError(f"{what}: no such folder: {folder}{left}")
    if not folder.is_dir():
        raise UserError(f"{what}: not a folder: {folder}")
    if not any(folder.iterdir()):
        raise UserError(f"{what}: the folder is empty: {folder}")
    return folder
