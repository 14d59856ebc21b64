"""Inverted lists that are read where they lie on the disk.

The file holds the lists one after the other, the codes of each and then the ids, as faiss's `OnDiskInvertedLists` has
them. faiss's own record of such a file names a path and a place for each list, which nothing checks. Ours is how long
each list is: places follow from that, and the sum is checked against the file before any of it is mapped.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medclip_lab.errors import UserError
from medclip_lab.retrieval.families import import_faiss

ID_BYTES = 8


def entry_bytes(index: Any) -> int:
    """What a vector takes in the lists of an index."""
    return int(index.code_size) + ID_BYTES


def can_be_mapped(index: Any) -> bool:
    """Whether the lists of an index are plain arrays: those of fast scans are tables, and others have no lists."""
    faiss = import_faiss()
    if not isinstance(index, faiss.IndexIVF) or isinstance(index, faiss.IndexIVFPQR):
        return False
    return isinstance(faiss.downcast_InvertedLists(index.invlists), faiss.ArrayInvertedLists)


def lengths(lists: Any) -> NDArray[np.int64]:
    """[lists] vectors in each list of faiss's `InvertedLists`."""
    return np.array([lists.list_size(number) for number in range(lists.nlist)], np.int64)


def attach(index: Any, path: Path, lengths: NDArray[np.int64]) -> None:
    """Give the lists in a file to a trained index that has none of its own.

    Raises:
        UserError: the lengths are not those of this file, or the index is of a kind that maps no lists.
    """
    faiss = import_faiss()
    size = path.stat().st_size
    fit = can_be_mapped(index) and index.ntotal == 0 and lengths.shape == (index.nlist,)
    # One by one first: a sum of absurd numbers may come round to anything.
    fit = fit and bool(((lengths >= 0) & (lengths <= size // entry_bytes(index))).all())
    if not fit or int(lengths.sum()) * entry_bytes(index) != size or not size:
        raise UserError(f"index: {path} holds lists that do not belong to the index beside it: index again")
    mapped = faiss.OnDiskInvertedLists(index.nlist, index.code_size, str(path))
    mapped.read_only, mapped.totsize = True, size
    mapped.prefetch_nthread = 0  # threads that are started for each query take ten times as long as the query
    sizes = np.ascontiguousarray(lengths, np.uint64)
    mapped.set_all_lists_sizes(faiss.swig_ptr(sizes))
    mapped.do_mmap()
    index.replace_invlists(mapped, True)
    mapped.this.disown()
    index.ntotal = int(lengths.sum())
