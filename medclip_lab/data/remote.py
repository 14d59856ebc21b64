"""Shards that lie elsewhere: fetched whole, in order, into a bounded cache on this machine, and checked there.

`MEDCLIP_LAB_CACHE` names the folder (default: `~/.cache/medclip_lab`), `MEDCLIP_LAB_CACHE_GIB` its size (default: 64).
It holds copies of the data and is as private as they are. Nothing is read from the network unless a remote path is
named.
"""

import contextlib
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
STALE = 24 * 3600.0  # seconds
MAX_MANIFEST_BYTES = 2**30
REFUSALS = (401, 403, 404, 410)
"""HTTP answers that another attempt will not change."""

log = logging.getLogger(__name__)


class FetchError(OSError):
    """What lies elsewhere could not be read; the message names no file."""


class MissingError(FetchError):
    """It is not there, as whoever has it says; anything else may pass."""


def is_remote(url: str) -> bool:
    """Whether this is no path of this machine."""
    return "://" in url and not url.startswith("file://")


def is_pattern(url: str) -> bool:
    """Whether braces or wildcards name several. In a URL a question mark begins the query."""
    return any(sign in url for sign in ("*[{" if is_remote(url) else "*?[{"))


def shown(url: str) -> str:
    """A path or URL for messages and lists: without password and query, which may be a key to it."""
    if not is_remote(url):
        return url
    kind, _, rest = url.partition("://")
    host, slash, path = rest.partition("?")[0].partition("/")
    return f"{kind}://{host.rpartition('@')[2]}{slash}{path}"


def join(folder: str, name: str) -> str:
    """A file of a folder, here or elsewhere."""
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else str(Path(folder).expanduser() / name)


def expand(pattern: str) -> list[str]:
    """The paths or URLs that a pattern with braces and wildcards names, each once, in order.

    Raises:
        UserError: braces that do not match, or a server that cannot be asked.
    """
    found: dict[str, None] = {}
    try:
        urls = list(braceexpand(pattern)) if "{" in pattern else [pattern]
    except ValueError:
        raise UserError(f"shards: braces that do not match in {shown(pattern)!r}") from None
    for url in urls:
        if is_remote(url):
            found |= dict.fromkeys(_matches(url) if is_pattern(url) else [url])
            continue
        path = str(Path(url).expanduser())
        found |= dict.fromkeys(sorted(glob.glob(path)) if is_pattern(path) else [path])  # noqa: PTH207 - of any root
    return list(found)


def _matches(url: str) -> list[str]:
    system, path = _open(url)
    try:
        return sorted(system.unstrip_protocol(match) for match in _patiently(partial(system.glob, path)))
    except FetchError as error:
        raise UserError(f"shards: cannot list {shown(url)}: {error}") from None


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
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (folder / "room.lock").touch()
    except OSError as error:
        raise UserError(f"MEDCLIP_LAB_CACHE: cannot write to {folder}: {error.strerror}") from None
    mark = expected or _patiently(partial(_stamp, *_open(url)))  # whoever knows no hash must not get yesterday's
    copy = folder / f"{hashlib.sha256(f'{url} {mark}'.encode()).hexdigest()[:32]}.tar"
    # Other processes of this machine that want the same wait for the one that came first.
    with FileLock(copy.with_suffix(".lock")):
        with contextlib.suppress(FileNotFoundError):  # others make room whenever they want
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
            status = getattr(cause, "status", 0)
            if isinstance(cause, FileNotFoundError | PermissionError) or status in REFUSALS:
                kind = MissingError if isinstance(cause, FileNotFoundError) or status in (404, 410) else FetchError
                raise kind("it is not there, or may not be read") from None
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


def _limit() -> float:
    """Bytes of the cache."""
    named = os.environ.get("MEDCLIP_LAB_CACHE_GIB") or "64"
    try:
        limit = float(named)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < 2**30:
        raise UserError(f"MEDCLIP_LAB_CACHE_GIB: a number of GiB expected, got {named!r}")
    return limit * 2**30


def _stamp(system: Any, path: str) -> str:
    """What changes when a file does, as far as its server says."""
    info = system.info(path)
    return " ".join(str(info.get(name)) for name in ("ETag", "mtime", "LastModified", "size"))


def _make_room(folder: Path, keep: Path) -> None:
    """Remove what was not used for longest. Who has such a file open can go on reading it."""
    limit = _limit()
    with FileLock(folder / "room.lock"):
        for left in folder.glob(".*.tmp"):  # of a download that was killed
            with contextlib.suppress(FileNotFoundError):  # it was whole just now
                if time.time() - left.stat().st_mtime > STALE:
                    left.unlink()
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
