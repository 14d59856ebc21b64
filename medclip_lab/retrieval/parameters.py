"""Search parameters as values: they go with each call, so that threads share an index and nobody sets it."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from medclip_lab.errors import UserError
from medclip_lab.retrieval.families import import_faiss, part_of, parts

STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


@dataclass(frozen=True)
class Parameters:
    """How thoroughly a search looks; None where an index has no such setting."""

    nprobe: int | None = None
    """Lists that are read."""
    ef_search: int | None = None
    """Vertices of a graph that are kept in view."""
    k_factor: int | None = None
    """Candidates that are reranked by the finer codes, for each answer."""

    def __post_init__(self) -> None:
        for name, value in self.given().items():
            if value < 1:
                raise UserError(f"search: {name} must be at least 1, got {value}")

    def given(self) -> dict[str, int]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    def wider(self, index: Any) -> "Parameters":
        """Twice the lists or vertices, up to all there are."""
        lists = part_of(index, "IndexIVF")
        return replace(
            self,
            nprobe=self.nprobe and min(2 * self.nprobe, lists.nlist if lists is not None else 1),
            ef_search=self.ef_search and min(2 * self.ef_search, max(index.ntotal, 1)),
        )

    def for_faiss(self, index: Any, k: int, selector: Any = None) -> Any:
        """faiss's own object, or None where an index takes none.

        Args:
            selector: of the vectors that may be found, for an index that takes one.
        """
        faiss = import_faiss()
        chosen = {} if selector is None else {"sel": selector}
        base = faiss.SearchParameters(**chosen) if chosen else None
        if part_of(index, "IndexIVF") is not None:
            kind = part_of(index, "IndexIVFRaBitQFastScan") or part_of(index, "IndexIVFRaBitQ")
            settings = faiss.IVFRaBitQSearchParameters if kind is not None else faiss.SearchParametersIVF
            base = settings(nprobe=self.nprobe or 1, **chosen)
        elif part_of(index, "IndexHNSW") is not None:
            base = faiss.SearchParametersHNSW(efSearch=max(self.ef_search or 16, k), **chosen)
        outer = parts(index)
        for part in outer:
            if isinstance(part, faiss.IndexPreTransform) and base is not None:
                base = faiss.SearchParametersPreTransform(index_params=base)
        if isinstance(outer[0], faiss.IndexRefine):
            options = {} if base is None else {"base_index_params": base}
            return faiss.IndexRefineSearchParameters(k_factor=float(self.k_factor or 1), **options)
        return base


def ladders(index: Any, size: int, at: int) -> dict[str, list[int]]:
    """Setting -> its values from the quickest to the most thorough; empty for an index that reads everything anyway."""
    faiss = import_faiss()
    found: dict[str, list[int]] = {}
    lists = part_of(index, "IndexIVF")
    if lists is not None:
        found["nprobe"] = _up_to(lists.nlist)
    if part_of(index, "IndexHNSW") is not None:
        found["ef_search"] = [step for step in _up_to(min(size, 4096)) if step >= 16] or [size]
    if isinstance(parts(index)[0], faiss.IndexRefine):
        found["k_factor"] = _up_to(max(1, min(256, size // max(at, 1))))
    return found


def _up_to(largest: int) -> list[int]:
    steps = [*STEPS, *(step * scale for scale in (1024, 1024 * 32) for step in STEPS[1:10])]
    return [*sorted(step for step in set(steps) if step < largest), largest]
