"""The folder of an index: files named by their content, and a manifest that says which of them it is now.

A change writes new files beside the old ones and replaces the manifest, in one rename: whoever opens the folder sees
the index before or after it, never between. What the manifest no longer names goes last.

    index/manifest.json
    index/vectors-<hash>.faiss    the FAISS index; its ids are the numbers of its vectors
    index/rows-<hash>.arrow       what is found: id, study_id, ... (Arrow, read where it lies)
    index/starts-<hash>.npy, members-<hash>.npy    the rows of each vector: copies share one
    index/removed-<hash>.npy      ids that are no longer answered with
    index/lists-<hash>.ivfdata, lengths-<hash>.npy    where the lists stay on the disk: they, and how long each is
"""

import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from medclip_lab.errors import UserError
from medclip_lab.files import existing_folder, read_json, sha256, write_json
from medclip_lab.retrieval.embeddings import check_file
from medclip_lab.retrieval.families import import_faiss
from medclip_lab.retrieval.mapped_lists import attach
from medclip_lab.retrieval.parameters import Parameters

FORMAT = "medclip-lab-index/2"
FORMATS = ("medclip-lab-index/1", FORMAT)
"""Those that a build may replace."""
MANIFEST, LOCK = "manifest.json", ".lock"
ROLES = ("vectors", "rows", "starts", "members")
_OURS = re.compile(r"[a-z]+-[0-9a-f]{16}\.(faiss|arrow|npy|ivfdata)|\.manifest\.json\.[0-9a-f]{8}\.tmp")
"""Names that a change may leave behind; nothing else in the folder is ever deleted."""
ROWS_AT_ONCE = 65_536
SLACK = 2**20
ATTEMPTS = 5
"""To open an index that is replaced meanwhile."""


def commit(
    out: Path, write: Callable[[Path], dict[str, Path]], facts: dict[str, Any], keep: Iterable[str] = ()
) -> dict[str, Any]:
    """Put new files into an index folder and make its manifest name them; returns the manifest.

    Args:
        write: fills a temporary folder and tells the file of each role in it.
        facts: the manifest without "files".
        keep: roles whose files stay as they are.

    Raises:
        UserError: another process is changing the same index.
    """
    old: dict[str, Any] = read_json(out / MANIFEST, "index")["files"] if keep else {}
    out = out.absolute()  # "." has no name
    staging = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    staging.mkdir(parents=True)
    try:
        files = {role: old[role] for role in keep}
        for role, path in write(staging).items():
            digest = sha256(path)
            named = path.rename(staging / f"{role}-{digest[:16]}{path.suffix}")
            files[role] = {"name": named.name, "bytes": named.stat().st_size, "sha256": digest}
        manifest = {"format": FORMAT, **facts, "files": files}
        # The folder somebody stands in is filled, not replaced: they would be left standing in nothing.
        if not out.exists() or (not any(out.iterdir()) and out != Path.cwd()):
            write_json(staging / MANIFEST, manifest)
            staging.rename(out)
            return manifest
        first = (out / MANIFEST).exists() and read_json(out / MANIFEST, "index").get("format") == FORMATS[0]
        for path in staging.iterdir():
            path.replace(out / path.name)
        write_json(out / MANIFEST, manifest)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    named_now = {entry["name"] for entry in files.values()}
    for path in out.iterdir():
        ours = _OURS.fullmatch(path.name) or (first and path.name in ("index.faiss", "ids.parquet"))
        if ours and path.name not in named_now:
            path.unlink()
    return manifest


@contextmanager
def changing(out: Path) -> Iterator[None]:
    """Holds the index folder for one writer at a time.

    Raises:
        UserError: another process holds it.
    """
    try:
        with FileLock(out / LOCK, timeout=0):
            yield
    except Timeout:
        raise UserError(f"index: {out} is being changed by another process: try again when it is done") from None


class RowWriter:
    """Writes the table of rows, a batch at a time."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self._sink: Any = None
        self._stack: Any = None

    def __enter__(self) -> "RowWriter":
        self._sink = pa.OSFile(str(self.path), "wb")
        return self

    def write(self, table: pa.Table) -> None:
        if self._stack is None:
            self._stack = pa.ipc.new_file(self._sink, table.schema)
        self._stack.write_table(table.combine_chunks(), max_chunksize=ROWS_AT_ONCE)
        self.count += table.num_rows

    def __exit__(self, *_: object) -> None:
        if self._stack is not None:
            self._stack.close()
        self._sink.close()


def save_array(path: Path, values: NDArray[np.int64]) -> Path:
    np.save(path, np.ascontiguousarray(values, np.int64), allow_pickle=False)
    return path


def save_index(path: Path, index: Any) -> Path:
    """
    Raises:
        OSError: the disk is full, for example.
    """
    try:
        import_faiss().write_index(index, str(path))
    except RuntimeError as error:
        raise OSError(28, f"faiss could not write the index: {str(error).splitlines()[-1][:200]}", str(path)) from None
    return path


class Opened:
    """The files of an index, checked against the manifest before any of them is read.

    Raises:
        UserError: no index, another format, a file missing, cut off, changed, or a pointer of Git LFS; another bundle;
            written by a newer faiss than can read it.
    """

    def __init__(self, folder: str | Path, bundle: str | None = None) -> None:
        self.folder = existing_folder(folder, "index")
        for attempt in range(ATTEMPTS):
            self.manifest = _manifest(self.folder, bundle)
            try:
                self._read()
                return
            except UserError:
                if attempt + 1 == ATTEMPTS or _manifest(self.folder, bundle) == self.manifest:
                    raise  # else it was replaced while it was opened: the new one is whole

    def _read(self) -> None:
        files = self.manifest["files"]
        for role in files:
            entry = files[role]
            check_file(self.path(role), entry["sha256"], "index", "index again", entry["bytes"])
        self.index = read_faiss(self.path("vectors"), files["vectors"]["bytes"], self.manifest)
        if "lists" in files:
            attach(self.index, self.path("lists"), np.load(self.path("lengths"), allow_pickle=False))
        self.rows: pa.Table = pa.ipc.open_file(pa.memory_map(str(self.path("rows")))).read_all()
        self.starts, self.members = (np.load(self.path(role), mmap_mode="r") for role in ("starts", "members"))
        self.removed: NDArray[np.int64] = np.empty(0, np.int64)
        if "removed" in files:
            self.removed = np.load(self.path("removed"), allow_pickle=False)
        self._check()

    def path(self, role: str) -> Path:
        """File of a role."""
        name = str(self.manifest["files"][role]["name"])
        if "/" in name or "\\" in name or name.startswith("."):
            raise UserError(f"index: the manifest of {self.folder} names a file outside of it")
        return self.folder / name

    def _check(self) -> None:
        """The parts fit each other: a hash tells that a file is the one that was written, not by whom."""
        vectors, rows, ids = self.index.ntotal, self.rows.num_rows, self.rows["id"].to_numpy()
        fit = len(self.starts) == vectors + 1 and len(self.members) == rows and self.index.d == self.manifest["dim"]
        fit = fit and self.starts[0] == 0 and self.starts[-1] == rows and bool((np.diff(self.starts) > 0).all())
        if not fit or (rows and (self.members.min() < 0 or self.members.max() >= rows)):
            raise UserError(f"index: {self.folder} holds parts that do not belong together: index again")
        if (np.diff(ids) <= 0).any():
            raise UserError(f"index: {self.folder} has ids that repeat or do not ascend: index again")
        if not np.isin(self.removed, ids).all():
            raise UserError(f"index: {self.folder} lists removed ids that it does not hold: index again")


def _manifest(folder: Path, bundle: str | None) -> dict[str, Any]:
    manifest = read_json(folder / MANIFEST, "index")
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"index: {folder / MANIFEST} has format {manifest.get('format')!r}, not {FORMAT!r}: index again"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not set(ROLES) <= set(files) or ("lists" in files) != ("lengths" in files):
        raise UserError(f"index: {folder / MANIFEST} names no files: index again")
    types = {"name": str, "bytes": int, "sha256": str}
    whole = all(_holds(entry, types) for entry in files.values())
    known = {field.name for field in fields(Parameters)}
    given = manifest.get("parameters")
    whole = whole and isinstance(given, dict) and all(_are_settings(of_one, known) for of_one in given.values())
    if not whole or not _holds(manifest, {"bundle": str, "dim": int}):
        raise UserError(f"index: {folder / MANIFEST} is damaged: index again")
    if bundle is not None and manifest["bundle"] != bundle:
        raise UserError(
            f"index: {folder} was built with bundle {manifest['bundle'][:12]}, not with {bundle[:12]}: "
            "embed and index again with this bundle"
        )
    return manifest


def _holds(value: Any, types: dict[str, type]) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in types.items())


def _are_settings(value: Any, known: set[str]) -> bool:
    return isinstance(value, dict) and set(value) <= known and all(type(number) is int for number in value.values())


def read_faiss(path: Path, size: int, manifest: dict[str, Any]) -> Any:
    """The FAISS index, its codes mapped from the disk; no array in it may claim more bytes than the file has.

    Raises:
        UserError: this faiss cannot read it.
    """
    faiss = import_faiss()
    limit = faiss.get_deserialization_vector_byte_limit()
    faiss.set_deserialization_vector_byte_limit(size + SLACK)
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError:
        raise UserError(
            f"index: faiss {faiss.__version__} cannot read {path}, written by faiss {manifest['faiss']}: "
            + ("install that version or a newer one" if newer(manifest["faiss"], faiss.__version__) else "index again")
        ) from None
    finally:
        faiss.set_deserialization_vector_byte_limit(limit)


def newer(one: str, other: str) -> bool:
    """Whether version `one` comes after `other`."""

    def numbers(version: str) -> list[int]:
        return [int(part) for part in version.split(".") if part.isdigit()]

    return numbers(one) > numbers(other)
