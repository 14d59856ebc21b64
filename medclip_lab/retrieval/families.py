"""Kinds of FAISS index: their factory strings, the memory they take, and how they are filled without taking more.

Bytes of a vector of D dimensions: Flat 4 D, SQfp16 2 D, SQ8 D; a graph adds 8 M and levels; lists add an id of 8; PQ of
D/2 codes of 4 bits D/4, RaBitQ D/8 + 8. A refined index holds its coarse codes and the finer ones it reranks with.
"""

import math
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import numpy as np

from medclip_lab.errors import UserError
from medclip_lab.retrieval.embeddings import BLOCK_BYTES, Floats

EXACT = ("Flat", "SQfp16", "SQ8", "SQ8,Refine(Flat)")
"""Kinds that compare a query with every vector; of the last 8 bits are read, and in float32 what they put first."""
LINKS = 32
PER_CENTROID = 48
"""Vectors that a cluster centre is trained on; faiss warns below 39."""
TRAINING = 32_768
"""Vectors that any other training sees, at most."""
WORKSPACE = 10 * BLOCK_BYTES
"""Blocks on their way, scores of queries against a block."""


def import_faiss() -> Any:
    """The faiss module.

    Raises:
        UserError: it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise UserError("faiss is not installed: pip install 'medclip_lab[cpu]', or [gpu] for CUDA 13") from None
    return faiss


def approximate(size: int, dim: int) -> list[str]:
    """Factory strings for a large corpus, in the order in which they are tried where nothing else decides.

    A scan over 4-bit codes (PQ fast scan) reads every vector's sketch, so that it does not care from which cone of the
    sphere a query comes: where texts and images lie apart, lists and graphs lose recall that it keeps.
    """
    codes = dim // 2 if dim % 2 == 0 else dim
    lists = list_count(size)
    sketch = f"PQ{codes}x4fs"
    return [
        f"{sketch},Refine(SQfp16)",
        f"{sketch},Refine(SQ8)",
        f"IVF{lists},{sketch}r,Refine(SQfp16)",
        f"IVF{lists},{sketch}r,Refine(SQ8)",
        f"IVF{lists},SQ8,Refine(SQfp16)",
        f"IVF{lists},SQ8",
        f"HNSW{LINKS}_SQfp16",
        f"HNSW{LINKS}_SQ8",
        f"IVF{lists},RaBitQfs,Refine(SQ8)",
        f"{sketch},Refine(SQ4)",
        f"IVF{lists},RaBitQfs,Refine(SQ4)",
    ]


def list_count(size: int) -> int:
    """How many lists suit a corpus: about 4 times the root of its size, and no more than can be trained on it."""
    return 1 << max(0, int(math.log2(min(4 * math.sqrt(size), max(1.0, size / 8)))))


def on_disk(lists: int) -> list[str]:
    """Factory strings of which only the centres of the lists need be in memory.

    Lists of 8 bits are half as long to read; those of 16 lose nothing, so that any recall can be reached.
    """
    return [f"IVF{lists},SQ8", f"IVF{lists},SQfp16"]


def make(key: str, dim: int) -> Any:
    """An empty index for inner products.

    Raises:
        UserError: faiss knows no such factory string, or it does not fit the width.
    """
    faiss = import_faiss()
    try:
        index = faiss.index_factory(dim, key, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError:
        raise UserError(f"factory: faiss {faiss.__version__} makes no index of {key!r} for {dim} dimensions") from None
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise UserError(f"factory: {key!r} does not compare by inner product")
    return index


def parts(index: Any) -> list[Any]:
    """An index and those inside of it, from the outside inwards; of a refined one the base before the finer one."""
    faiss = import_faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexRefine):
        return [index, *parts(index.base_index), *parts(index.refine_index)]
    if isinstance(index, faiss.IndexPreTransform | faiss.IndexIDMap):
        return [index, *parts(index.index)]
    if isinstance(index, faiss.IndexHNSW):
        return [index, *parts(index.storage)]
    return [index]


def part_of(index: Any, kind: str) -> Any:
    """The part that is a faiss class of this name, or None."""
    wanted = getattr(import_faiss(), kind)
    return next((part for part in parts(index) if isinstance(part, wanted)), None)


def index_bytes(index: Any, size: int) -> int:
    """What `size` vectors take in an index made for them."""
    faiss = import_faiss()
    total = 0.0
    for part in parts(index):
        if isinstance(part, faiss.IndexRefine | faiss.IndexPreTransform | faiss.IndexIDMap):
            continue
        if isinstance(part, faiss.IndexHNSW):
            links = (part.hnsw.nb_neighbors(0) + 2) * 4
            total += size * (links + 16)  # a 1/M of the vertices has upper levels
        elif isinstance(part, faiss.IndexIVF):
            fast = isinstance(part, faiss.IndexIVFFastScan)
            # Blocks of 32 codes in tables that double: half of them is room.
            total += size * (part.code_size * (2 if fast else 1) + 8) + part.nlist * part.d * 4
        elif isinstance(part, faiss.IndexFastScan):
            total += 2 ** np.ceil(np.log2(max(1, size) * part.code_size))
        elif isinstance(part, faiss.IndexFlatCodes):
            total += size * part.code_size
        else:
            total += size * 4 * part.d
    return int(total)


def build_bytes(index: Any, size: int) -> int:
    """Memory that building takes beyond the process itself at its peak: training or filling, blocks on their way."""
    filling = index_bytes(index, size)
    fast = part_of(index, "IndexFastScan")
    if fast is not None:  # it keeps its former half while it doubles, which is before its refinement is filled
        filling = max(filling, index_bytes(fast, size) * 3 // 2)
    if part_of(index, "IndexIVF") is not None:
        filling += size * 4  # each vector's list
    if part_of(index, "IndexHNSW") is not None:
        filling += size * 9  # a lock and a mark for each
    return WORKSPACE + int(max(filling, training_bytes(index, size)))


def training_bytes(index: Any, size: int) -> int:
    """Memory that training takes: its vectors, and those of lists as residuals."""
    residuals = 2 if part_of(index, "IndexIVF") is not None else 1
    return training_rows(index, size) * int(index.d) * 4 * (1 + residuals)


def training_rows(index: Any, size: int) -> int:
    """How many vectors an index is trained on."""
    if index.is_trained:
        return 0
    lists = part_of(index, "IndexIVF")
    return min(size, max(TRAINING, PER_CENTROID * lists.nlist if lists is not None else 0))


def train(index: Any, sample: Floats) -> None:
    """Train on a sample; the clusters of lists on a GPU where faiss has one.

    Raises:
        UserError: too few vectors for this kind of index.
    """
    if index.is_trained:
        return
    faiss = import_faiss()
    lists = part_of(index, "IndexIVF")
    on_gpus = lists is not None and getattr(faiss, "get_num_gpus", lambda: 0)() > 0
    if on_gpus:
        lists.clustering_index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(lists.d))
    try:
        index.train(sample)
    except RuntimeError:
        raise UserError(
            f"factory: {len(sample)} vectors are too few to train this index: ask for a smaller one"
        ) from None
    finally:
        if on_gpus:
            lists.clustering_index = None


def reserve(index: Any, size: int) -> None:
    """Room for `size` vectors at once: filled block by block, arrays would double and be copied on the way."""
    faiss = import_faiss()
    for part in parts(index):
        if isinstance(part, faiss.IndexHNSW):
            _room(part.hnsw.neighbors, int(size * part.hnsw.nb_neighbors(0) * 1.05))
            _room(part.hnsw.offsets, size + 1, part.hnsw.offsets.size())
        elif isinstance(part, faiss.IndexFlatCodes) and not isinstance(part, faiss.IndexFastScan):
            _room(part.codes, size * part.code_size)


def _room(array: Any, count: int, used: int = 0) -> None:
    array.resize(count)
    array.resize(used)  # the memory stays


class _List:
    """One inverted list as an array."""

    def __init__(self, lists: Any, number: int) -> None:
        self.lists, self.number = lists, number

    def resize(self, count: int) -> None:
        self.lists.resize(self.number, count)


Blocks = Callable[[], Iterable[Floats]]


def add(index: Any, rows: Blocks, later: Blocks, size: int, check: Callable[[], None]) -> None:
    """Fill a trained, empty index.

    Args:
        rows: gives the blocks, float32 [n, D], from the first; called twice where there are lists.
        later: those that will be added afterwards, for which room is left.
        size: vectors of both.
        check: called after each block.
    """
    if isinstance(index, import_faiss().IndexRefine):
        # One after the other: the tables of the first grow before the second, which is larger, takes its room.
        for part in [*parts(index)[1:2], import_faiss().downcast_index(index.refine_index)]:
            add(part, rows, later, size, check)
        index.ntotal = part.ntotal
        return
    reserve(index, size)
    lists = part_of(index, "IndexIVF")
    fast = part_of(index, "IndexFastScan") is not None or part_of(index, "IndexIVFFastScan") is not None
    if lists is not None and not fast and part_of(index, "IndexPreTransform") is None:
        counts = np.zeros(lists.nlist, np.int64)
        for block in chain(rows(), later()):
            assigned = lists.quantizer.search(block, 1)[1].ravel()
            counts += np.bincount(assigned, minlength=lists.nlist)
            check()
        for number, count in enumerate(counts.tolist()):
            _room(_List(lists.invlists, number), count)
    for block in rows():
        index.add(block)
        check()
