"""An opened index: the nearest vectors to a query, and the rows they stand for."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medclip_lab.errors import UserError
from medclip_lab.retrieval.build import strictest
from medclip_lab.retrieval.embeddings import Floats, Rows, check_unit
from medclip_lab.retrieval.gallery import Groups
from medclip_lab.retrieval.parameters import Parameters
from medclip_lab.retrieval.recall import search
from medclip_lab.retrieval.store import Opened


@dataclass(frozen=True)
class Hit:
    """One answer of a search."""

    rank: int
    score: float
    """Cosine similarity; of the index's codes, if those are fewer bits than the vectors were."""
    id: int
    study_id: str
    row: dict[str, Any]
    """Everything the table knows of it; report text only if the index holds it."""


class Index:
    """An opened index folder. `open_index` makes one. Any number of threads may search it."""

    def __init__(self, opened: Opened) -> None:
        self.folder, self.manifest = opened.folder, opened.manifest
        self.index, self.table = opened.index, opened.rows
        self.groups = Groups(opened.starts, opened.members)
        self.removed = opened.removed
        self._alone = len(self.groups.members) == self.index.ntotal
        """Every row has a vector of its own."""
        self._dead = np.isin(self.table["id"].to_numpy(), self.removed) if len(self.removed) else None

    def __len__(self) -> int:
        """Rows that can be found."""
        return int(self.table.num_rows) - len(self.removed)

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

    def search(
        self,
        queries: NDArray[np.float32],
        k: int = 10,
        *,
        direction: str | None = None,
        parameters: Parameters | None = None,
    ) -> list[list[Hit]]:
        """The k nearest of each query by cosine, best first; fewer if the index holds fewer.

        Args:
            queries: [Q, D] or [D], unit norm, of the bundle the index was built with.
            direction: what the queries are, "image" or "text"; None searches as thoroughly as the harder of them needs.
            parameters: to search otherwise than the index was tuned.

        Raises:
            UserError: wrong width, vectors not finite or not unit norm, k below 1.
        """
        vectors = np.ascontiguousarray(np.atleast_2d(queries), dtype=np.float32)
        if vectors.shape[1] != self.index.d:
            raise UserError(f"search: queries have {vectors.shape[1]} dimensions, the index has {self.index.d}")
        if k < 1:
            raise UserError(f"search: k must be at least 1, got {k}")
        check_unit(vectors, "search: a query", "normalise them")
        scores, rows = self.nearest(vectors, k, parameters or self.parameters(direction))
        return [self.hits(*found) for found in zip(scores, rows, strict=True)]

    def nearest(self, vectors: Floats, k: int, parameters: Parameters) -> tuple[list[list[float]], list[list[int]]]:
        """Scores and rows of the table for each query, best first, k at most, none of them removed."""
        scores: list[list[float]] = [[] for _ in vectors]
        rows: list[list[int]] = [[] for _ in vectors]
        waiting = np.arange(len(vectors))
        wanted = min(k, self.index.ntotal)
        while len(waiting) and wanted:
            found = search(self.index, vectors[waiting], wanted, parameters)
            if self._alone and self._dead is None and (found[1] >= 0).all():
                return found[0].tolist(), self.groups.members[found[1]].tolist()
            for query, near, vector in zip(waiting, *found, strict=True):
                scores[query], rows[query] = self._expand(near, vector, k)
            # Vectors of removed rows took places, or the lists that were read hold fewer than k: look further, until
            # there are k or all was looked at.
            waiting = np.array([query for query in waiting if len(rows[query]) < min(k, len(self))], np.int64)
            before, wanted = (wanted, parameters), min(2 * wanted, self.index.ntotal)
            parameters = parameters.wider(self.index)
            if before == (wanted, parameters):
                break
        return scores, rows

    def _expand(self, scores: Floats, vectors: Rows, k: int) -> tuple[list[float], list[int]]:
        """The rows that vectors stand for, those of a vector in the order of their ids."""
        found_scores: list[float] = []
        found: list[int] = []
        for score, vector in zip(scores, vectors, strict=True):
            if vector < 0:
                continue
            for row in self.groups.of(int(vector)):
                if self._dead is None or not self._dead[row]:
                    found.append(int(row))
                    found_scores.append(float(score))
            if len(found) >= k:
                break
        return found_scores[:k], found[:k]

    def hits(self, scores: Iterable[float], rows: Iterable[int]) -> list[Hit]:
        """Answers made of rows of the table."""
        found = []
        for rank, (score, number) in enumerate(zip(scores, rows, strict=True), 1):
            row = self.row(number)
            found.append(Hit(rank, score, row["id"], row["study_id"], row))
        return found

    def row(self, number: int) -> dict[str, Any]:
        """A row of the table, read from the disk when it is asked for."""
        row: dict[str, Any] = self.table.slice(number, 1).to_pylist()[0]
        return row | {"labels": dict(row.get("labels") or ())}

    def row_of(self, identifier: int) -> dict[str, Any]:
        """The row of an id.

        Raises:
            UserError: there is no such id.
        """
        ids = self.table["id"].to_numpy()
        place = int(np.searchsorted(ids, identifier))
        if place == len(ids) or ids[place] != identifier or identifier in self.removed:
            raise UserError(f"index: {self.folder} holds no id {identifier}")
        return self.row(place)


def open_index(folder: str | os.PathLike[str], bundle_fingerprint: str | None = None) -> Index:
    """Open an index folder after checking its hashes; vectors and rows stay on the disk until they are needed.

    Args:
        bundle_fingerprint: of the encoder that will ask; embeddings of another model do not compare.

    Raises:
        UserError: no index, files changed, a newer faiss wrote it, or another bundle built it.
    """
    return Index(Opened(Path(folder), bundle_fingerprint))
