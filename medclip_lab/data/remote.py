"""Shards that lie elsewhere: fetched whole, in order, into a bounded cache on this machine, and checked there.

`MEDCLIP_LAB_CACHE` names the folder (default: `~/.cache/medclip_lab`), `MEDCLIP_LAB_CACHE_GIB` its size (default: 64).
It holds copies of the data and is as private as they are. Nothing is read from the network unless a remote path is
named.
"""

import glob
import hashlib
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
from braceexpand import braceexpand
from filelock import FileLock

from medclip_lab.errors import UserError
from medclip_lab.files import atomic_file, sha256

BLOCK_BYTES = 16 * 2**20
ATTEMPTS = 6
"""In a row without a single byte; whatever arrives is kept."""
FIRST_PAUSE = 0.5  # seconds; twice as long after each failure
TIMEOUT = 60.0  # seconds without a byte
MAX_MANIFEST_BYTES = 2**30
REFUSALS = (401, 403, 404, 410)
"""HTTP answers that another attempt will not change."""

log = logging.getLogger(__name__)


class FetchError(OSError):
    """What lies elsewhere could not be read; the message names no file."""


def is_remote(url: str) -> bool:
    """Whether this is no path of this machine."""
    return "://" in url and not url.startswith("file://")


def is_pattern(url: str) -> bool:
    """Whether braces or wildcards name several."""
    return any(sign in url for sign in "*?[{")


def join(folder: str, name: str) -> str:
    """A file of a folder, here or elsewhere."""
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else str(Path(folder).expanduser() / name)


def expand(pattern: str) -> list[str]:
    """The paths or URLs that a pattern with braces and wildcards names, each once, in order."""
    found: dict[str, None] = {}
    for url in braceexpand(pattern) if "{" in pattern else [pattern]:
        if not any(sign in url for sign in "*?["):
            found[url] = None
        elif is_remote(url):
            system, path = _open(url)
            found |= dict.fromkeys(sorted(system.unstrip_protocol(match) for match in system.glob(path)))
        else:
            found |= dict.fromkeys(sorted(glob.glob(str(Path(url).expanduser()))))  # noqa: PTH207 - of any root
    return list(found)


def read_bytes(url: str) -> bytes:
    """A small file from elsewhere.

    Raises:
        FetchError: it cannot be read, or it is large.
    """
    system, path = _open(url)
    size = _patiently(partial(_size, system, path))
    if size is not None and size > MAX_MANIFEST_BYTES:
        raise FetchError(f"{size} bytes, more than a manifest has")
    data: bytes = _patiently(partial(system.cat_file, path))
    return data


def fetch(url: str, size: int | None = None, expected: str = "") -> Path:
    """A copy on this machine of a file that lies elsewhere; the one of an earlier call if it is still there.

    Args:
        size, expected: bytes and sha256 that it must have; None and empty if nobody knows.

    Raises:
        FetchError: it cannot be read after several attempts, or is not what it should be.
    """
    folder = Path(os.environ.get("MEDCLIP_LAB_CACHE") or "~/.cache/medclip_lab").expanduser() / "shards"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    copy = folder / f"{hashlib.sha256(f'{url} {expected}'.encode()).hexdigest()[:32]}.tar"
    # Other processes of this machine that want the same wait for the one that came first.
    with FileLock(copy.with_suffix(".lock")):
        if copy.exists():
            os.utime(copy)
            return copy
        with atomic_file(copy) as temporary:
            _download(url, size, temporary)
            if expected and sha256(temporary) != expected:
                raise FetchError("not the bytes that the manifest tells of")
    _make_room(folder, keep=copy)
    return copy


def _download(url: str, size: int | None, target: Path) -> None:
    system, path = _open(url)
    found = _patiently(partial(_size, system, path))
    if size is not None and found not in (None, size):
        raise FetchError(f"{found} bytes, and the manifest tells of {size}")
    total, have = found if size is None else size, 0
    with target.open("wb") as file:
        if total is None:  # a server that does not say how long its file is
            file.write(_patiently(partial(system.cat_file, path)))
            return
        while have < total:
            start, end = have, min(have + BLOCK_BYTES, total)
            data = _patiently(partial(system.cat_file, path, start=start, end=end))
            if len(data) > end - start:
                data = data[start:end]  # a server that knows no ranges gave the whole file
            file.write(data)
            have += len(data)


def _patiently(read: Callable[[], Any]) -> Any:
    for attempt in range(ATTEMPTS):
        try:
            found = read()
            if found != b"":
                return found
            cause: BaseException = FetchError("nothing arrived")
        except Exception as error:  # each file system has failures of its own
            # fsspec calls it not found too when a server did not answer, and tells why.
            cause = error.__cause__ or error
            if isinstance(cause, FileNotFoundError | PermissionError) or getattr(cause, "status", 0) in REFUSALS:
                raise FetchError("it is not there, or may not be read") from None
        if attempt < ATTEMPTS - 1:
            log.warning("reading failed (%s), attempt %d of %d", type(cause).__name__, attempt + 1, ATTEMPTS)
            time.sleep(FIRST_PAUSE * 2**attempt)
    raise FetchError(f"{type(cause).__name__} after {ATTEMPTS} attempts") from None


def _open(url: str) -> tuple[Any, str]:
    options: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):
        from aiohttp import ClientTimeout

        options = {"client_kwargs": {"timeout": ClientTimeout(total=None, connect=TIMEOUT, sock_read=TIMEOUT)}}
    elif url.startswith("s3://"):
        options = {"config_kwargs": {"connect_timeout": TIMEOUT, "read_timeout": TIMEOUT}}
    try:
        system, path = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        kind = url.partition("://")[0]
        raise UserError(f"shards: cannot read {kind}:// here: {error}; pip install 'medclip_lab[remote]'") from None
    return system, path


def _size(system: Any, path: str) -> int | None:
    size = system.info(path).get("size")
    return None if size is None else int(size)


def _make_room(folder: Path, keep: Path) -> None:
    """Remove what was not used for longest. Who has such a file open can go on reading it."""
    limit = float(os.environ.get("MEDCLIP_LAB_CACHE_GIB") or 64) * 2**30
    with FileLock(folder / "room.lock"):
        found = []
        for path in folder.glob("*.tar"):
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            found.append((stat.st_mtime_ns, stat.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= limit:
                return
            if path != keep:
                path.unlink(missing_ok=True)
                total -= size
