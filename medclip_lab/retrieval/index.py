"""An opened index: the nearest vectors to a query, and the rows they stand for."""

import math
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from medclip_lab.errors import UserError
from medclip_lab.retrieval.build import Folders, strictest
from medclip_lab.retrieval.embeddings import Floats, Rows
from medclip_lab.retrieval.fields import Field, fields_of
from medclip_lab.retrieval.filters import Where, mask
from medclip_lab.retrieval.gallery import Groups
from medclip_lab.retrieval.parameters import Parameters
from medclip_lab.retrieval.recall import search as found
from medclip_lab.retrieval.search import Hit, Store
from medclip_lab.retrieval.selection import Selection, decoded, harder, nearest_of, select
from medclip_lab.retrieval.store import Opened

__all__ = ["Hit", "Index", "open_index"]


class Index(Store):
    """An opened index folder. `open_index` makes one. Any number of threads may search it."""

    def __init__(self, opened: Opened) -> None:
        self.folder, self.manifest = opened.folder, opened.manifest
        self.index, self.table = opened.index, opened.rows
        self.groups = Groups(opened.starts, opened.members)
        self.removed = opened.removed
        self.dim = int(self.index.d)
        self._alone = len(self.groups.members) == self.index.ntotal
        """Every row has a vector of its own."""
        self._ids: Rows = self.table["id"].to_numpy()
        self._dead = np.isin(self._ids, self.removed) if len(self.removed) else None
        # What is not asked for is not read.
        self._textless = self.table.drop_columns([name for name in self.table.column_names if name == "text"])

    def __len__(self) -> int:
        """Rows that can be found."""
        return int(self.table.num_rows) - len(self.removed)

    def fingerprint(self) -> str:
        """Of the vectors and of what is removed among them."""
        files = self.manifest["files"]
        return "-".join(str(files[role]["sha256"]) for role in ("vectors", "lists", "removed") if role in files)

    def parameters(self, direction: str | None = None) -> Parameters:
        """How thoroughly queries of a direction have to be searched; None is for all.

        Raises:
            UserError: the index was not measured with such queries.
        """
        known = self.manifest["parameters"]
        if direction is None:
            return strictest(known)
        if direction not in known:
            raise UserError(f"search: {self.folder} was measured with {', '.join(known)} queries, not with {direction}")
        return Parameters(**known[direction])

    def near(
        self, vectors: Floats, k: int, where: Where, direction: str | None, parameters: Parameters | None
    ) -> tuple[list[list[float]], list[list[int]]]:
        """As `Store.near`."""
        chosen = self._select(where) if where else None
        scores, rows = self.nearest(vectors, k, parameters or self.parameters(direction), chosen)
        return scores, [[int(self._ids[row]) for row in those] for those in rows]

    def _select(self, where: Where) -> Selection:
        met = mask(self.table, where)
        return select(met if self._dead is None else met & ~self._dead, self.groups)

    def nearest(
        self, vectors: Floats, k: int, parameters: Parameters, chosen: Selection | None = None
    ) -> tuple[list[list[float]], list[list[int]]]:
        """Scores and rows of the table for each query, best first, k or all that may be found."""
        scores: list[list[float]] = [[] for _ in vectors]
        rows: list[list[int]] = [[] for _ in vectors]
        left = len(self) if chosen is None else int(chosen.rows.sum())
        k, total, selector = min(k, left), self.index.ntotal, None
        waiting = np.arange(len(vectors)) if k else np.empty(0, np.int64)
        wanted = min(k, total)
        narrow = chosen is not None and chosen.narrow
        if chosen is not None and k and not narrow:
            selector = chosen.selector(self.index)
            parameters = harder(parameters, chosen.share)
            wanted = wanted if selector is not None else min(total, math.ceil(k / chosen.share))
        while len(waiting) and not narrow:
            near = found(self.index, vectors[waiting], wanted, parameters, selector)
            at_once = len(waiting) == len(vectors) and chosen is None and self._alone and self._dead is None
            if at_once and (near[1] >= 0).all():
                return near[0].tolist(), self.groups.members[near[1]].tolist()
            for query, near_scores, near_vectors in zip(waiting, *near, strict=True):
                scores[query], rows[query] = self._expand(near_scores, near_vectors, k, chosen)
            # Rows that are no answers took places, or the lists that were read hold fewer than k: look further.
            waiting = np.array([query for query in waiting if len(rows[query]) < k], np.int64)
            before, wanted = (wanted, parameters), min(2 * wanted, total)
            parameters = parameters.wider(self.index)
            if before == (wanted, parameters):
                break  # a graph has corners that no search comes to
        if len(waiting):
            among = np.arange(total) if chosen is None else chosen.vectors
            # A vector that stands for removed rows alone takes a place and gives nothing.
            places = k if chosen is not None else k + len(self.removed)
            near = nearest_of(self.index, vectors[waiting], places, among)
            for query, near_scores, near_vectors in zip(waiting, *near, strict=True):
                scores[query], rows[query] = self._expand(near_scores, near_vectors, k, chosen)
        return scores, rows

    def _expand(self, scores: Floats, vectors: Rows, k: int, chosen: Selection | None) -> tuple[list[float], list[int]]:
        """The rows that vectors stand for, those of a vector in the order of their ids."""
        of_rows: list[float] = []
        found_rows: list[int] = []
        for score, vector in zip(scores, vectors, strict=True):
            if vector < 0:
                continue
            for row in self.groups.of(int(vector)):
                if (self._dead is None or not self._dead[row]) and (chosen is None or chosen.rows[row]):
                    found_rows.append(int(row))
                    of_rows.append(float(score))
            if len(found_rows) >= k:
                break
        return of_rows[:k], found_rows[:k]

    def ids(self, where: Where) -> Rows:
        """Ids of all rows that meet the conditions, ascending."""
        met = mask(self.table, where)
        return np.asarray(self._ids[met if self._dead is None else met & ~self._dead])

    def vectors(self, ids: Sequence[int]) -> Floats:
        """float32 [len(ids), D] of some rows, as the index holds them.

        Raises:
            UserError: there is no such id.
        """
        return decoded(self.index, self._vector_of[[self._place(number) for number in ids]])

    def rows(self, ids: Sequence[int], text: bool = False) -> list[dict[str, Any]]:
        """Rows of the table, read from the disk when they are asked for.

        Raises:
            UserError: there is no such id.
        """
        return [self.row(self._place(number), text) for number in ids]

    def fields(self) -> list[Field]:
        """As `Store.fields`; of the rows as they were indexed, those that were removed since included."""
        return fields_of(self._textless)

    def add(self, embeddings: Folders) -> dict[str, Any]:
        """Add embeddings to the folder: see `update.add_to_index`. This object goes on with what it opened."""
        from medclip_lab.retrieval.update import add_to_index

        return add_to_index(self.folder, embeddings)

    @cached_property
    def _vector_of(self) -> Rows:
        """[N] number of the vector that stands for each row."""
        vector_of = np.empty(len(self.groups.members), np.int64)
        vector_of[self.groups.members] = np.repeat(np.arange(self.index.ntotal), np.diff(self.groups.starts))
        return vector_of

    def row(self, number: int, text: bool = False) -> dict[str, Any]:
        """A row by its place in the table."""
        row: dict[str, Any] = (self.table if text else self._textless).slice(number, 1).to_pylist()[0]
        return row | {"labels": dict(row.get("labels") or ())}

    def _place(self, identifier: int) -> int:
        place = int(np.searchsorted(self._ids, identifier))
        if place == len(self._ids) or self._ids[place] != identifier or (self._dead is not None and self._dead[place]):
            raise UserError(f"index: {self.folder} holds no id {identifier}")
        return place


def open_index(folder: str | os.PathLike[str], bundle_fingerprint: str | None = None) -> Index:
    """Open an index folder after checking its hashes; vectors and rows stay on the disk until they are needed.

    Args:
        bundle_fingerprint: of the encoder that will ask; embeddings of another model do not compare.

    Raises:
        UserError: no index, files changed, a newer faiss wrote it, or another bundle built it.
    """
    return Index(Opened(Path(folder), bundle_fingerprint))
