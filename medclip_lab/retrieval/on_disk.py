"""Indexes of corpora that fit in no memory: trained once, filled part by part by several processes, merged on the disk.

A part is a stretch of the vectors, which one process adds to the trained index and writes. faiss merges the parts, list
by list in their order, so that the lists are those of a process that adds one vector after the other: to the byte.
Filling and merging are left to processes of their own. What they take goes with them, and a full disk under a mapped
file, which ends a process at once, ends none but those.
"""

import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from medclip_lab.errors import UserError
from medclip_lab.retrieval.embeddings import Vectors
from medclip_lab.retrieval.families import import_faiss
from medclip_lab.retrieval.gallery import Chosen
from medclip_lab.retrieval.mapped_lists import attach, entry_bytes, lengths
from medclip_lab.retrieval.memory import peak, show_size
from medclip_lab.retrieval.store import LOCK, changing, save_array, save_index

T = TypeVar("T")
PART_BYTES = 64 * 2**20
"""Of the lists of a part; a process holds up to twice that, while arrays double."""
PROCESS_BYTES = 200 * 2**20
"""That a process takes beside them: python, faiss, a block on its way and its nearest centres."""


@dataclass(frozen=True)
class Part:
    """Vectors that one process adds, with the numbers they have in the index."""

    trained: Path
    vectors: Vectors
    first: int
    path: Path
    threads: int


@dataclass(frozen=True)
class Lists:
    """Files of an index whose lists lie on the disk."""

    trained: Path
    """The index without a vector."""
    lists: Path
    lengths: Path

    def roles(self) -> dict[str, Path]:
        """As a manifest names them."""
        return {"vectors": self.trained, "lists": self.lists, "lengths": self.lengths}


def open_lists(files: Lists) -> Any:
    """The index, its lists mapped.

    Raises:
        UserError: the files do not belong together.
    """
    index = import_faiss().read_index(str(files.trained))
    attach(index, files.lists, np.load(files.lengths, allow_pickle=False))
    return index


class Workshop:
    """A folder beside an index, in which its lists are filled and merged; see `workshop`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.taken = folder, 0
        """Bytes of all processes at once, at the most."""
        self._trained = folder / "trained.faiss"
        self._parts: list[Path] = []
        self._entry = self._merges = self._processes = 0

    def start(self, index: Any, processes: int) -> None:
        """Begin with a trained, empty index, which so many processes are to fill; what was made of another goes."""
        _empty(self.folder)
        self._parts, self._entry, self._processes = [], entry_bytes(index), processes
        save_index(self._trained, index)

    def add(self, vectors: Vectors, first: int) -> None:
        """Add vectors, numbered from `first`, in parts.

        Raises:
            UserError: no room on the disk; a process died.
        """
        self._refuse_full(2 * len(vectors) * self._entry)  # as parts, and merged
        size = _part_rows(self._entry)
        starts = range(0, len(vectors), size)
        processes = max(1, min(self._processes, len(starts)))
        threads = max(1, (os.cpu_count() or 1) // processes)

        def part(start: int) -> Part:
            path = self.folder / f"part-{len(self._parts):05d}.faiss"
            self._parts.append(path)
            return Part(self._trained, _stretch(vectors, start, start + size), first + start, path, threads)

        self._note(processes, self._run(_fill, (part(start) for start in starts), processes))

    def merge(self, old: Lists | None = None) -> Lists:
        """Merge the lists of all parts, behind those of an index that was there; what was merged before goes.

        Raises:
            UserError: no room on the disk; a process died.
        """
        sizes = [path.stat().st_size for path in [*self._parts, *([old.lists] if old else [])]]
        for path in self.folder.glob("lists-*"):
            path.unlink()  # who has it open still, reads it still
        self._refuse_full(sum(sizes))
        self._merges += 1
        made = Lists(
            self._trained, self.folder / f"lists-{self._merges}.ivfdata", self.folder / f"lengths-{self._merges}.npy"
        )
        self._run(_merge, [(old, tuple(self._parts), made)], 1)
        return made

    def _run(self, work: Callable[[Any], T], jobs: Iterable[Any], processes: int) -> list[T]:
        pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=_start)
        try:
            return list(pool.map(work, jobs))
        except BrokenProcessPool:
            raise UserError(
                "index: a process that fills the lists died, for want of memory or of room on the disk: "
                f"ask for fewer --processes than {processes}, or make room"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)

    def _note(self, processes: int, taken: list[int]) -> None:
        self.taken = max(self.taken, sum(sorted(taken)[-processes:]))

    def _refuse_full(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"index: {self.folder.parent} has {show_size(free)} left on its disk, and {show_size(needed)} are "
                "needed at once: make room, or build elsewhere"
            )


@contextmanager
def workshop(out: Path) -> Iterator[Workshop]:
    """A folder beside `out`, for one build of it at a time, which goes at the end; what a kill left is used by nobody.

    Raises:
        UserError: another process builds the same index.
    """
    out = out.absolute()
    folder = out.with_name(f".{out.name}.parts")
    folder.mkdir(parents=True, exist_ok=True)
    with changing(folder):
        try:
            yield Workshop(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != LOCK:
            path.unlink()


def process_bytes(index: Any, size: int) -> int:
    """Memory that a process takes to fill its part of `size` vectors."""
    part = min(PART_BYTES, size * entry_bytes(index))
    return PROCESS_BYTES + 2 * part + 2 * int(index.nlist) * int(index.d) * 4


def part_count(index: Any, size: int) -> int:
    """Parts of `size` vectors."""
    return len(range(0, size, _part_rows(entry_bytes(index))))


def _part_rows(entry: int) -> int:
    return max(1, PART_BYTES // entry)


def _stretch(vectors: Vectors, first: int, last: int) -> Vectors:
    """Rows from `first` to before `last`, of which no more is sent to a process than their own numbers."""
    last = min(last, len(vectors))
    if isinstance(vectors, Chosen):
        return Chosen(vectors.vectors, vectors.rows[first:last])
    return Chosen(vectors, np.arange(first, last))


def _start() -> None:
    """In a new process: faiss tells of files on standard output, which belongs to results; Ctrl-C is for the caller."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _fill(part: Part) -> int:
    """Fill a part; returns the most bytes this process took."""
    faiss = import_faiss()
    faiss.omp_set_num_threads(part.threads)
    index = faiss.read_index(str(part.trained))
    for start, block in part.vectors.blocks():
        index.add_with_ids(block, np.arange(len(block)) + part.first + start)
    save_index(part.path, index)
    return peak()


def _merge(job: tuple[Lists | None, tuple[Path, ...], Lists]) -> None:
    old, parts, made = job
    faiss = import_faiss()
    opened: list[Any] = [] if old is None else [open_lists(old)]
    opened += [faiss.read_index(str(path), faiss.IO_FLAG_MMAP) for path in parts]
    pointers = faiss.InvertedListsPtrVector()
    for index in opened:
        pointers.push_back(index.invlists)
    merged = faiss.OnDiskInvertedLists(opened[0].nlist, opened[0].code_size, str(made.lists))
    merged.merge_from_multiple(pointers.data(), pointers.size(), False)
    found = lengths(merged)
    del merged  # unmapped: what was written is in the file
    save_array(made.lengths, found)
