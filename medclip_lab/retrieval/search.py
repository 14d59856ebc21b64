"""Search over anything that keeps vectors with rows: filters, exclusions and policies are the same for every store."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medclip_lab.errors import UserError
from medclip_lab.retrieval.build import Folders
from medclip_lab.retrieval.embeddings import Floats, Rows, check_unit
from medclip_lab.retrieval.fields import Field
from medclip_lab.retrieval.filters import Condition, Where, conditions
from medclip_lab.retrieval.parameters import Parameters
from medclip_lab.retrieval.policies import Policy


@dataclass(frozen=True)
class Hit:
    """One answer of a search."""

    rank: int
    score: float
    """Cosine similarity; of the index's codes, if those are fewer bits than the vectors were."""
    id: int
    study_id: str
    row: dict[str, Any]
    """What the table knows of it; report text only if the index holds it and the call asked for it."""


class Store(Protocol):
    """Vectors with rows. A row has an id that is never given to another. Stores share how they are searched."""

    dim: int
    manifest: dict[str, Any]
    """What it was built of: modality, bundle, text_included, ..."""

    def __len__(self) -> int:
        """Rows that can be found."""
        ...

    def fingerprint(self) -> str:
        """Another for other vectors: what is calibrated holds for one."""
        ...

    def near(
        self, vectors: Floats, k: int, where: Where, direction: str | None, parameters: Parameters | None
    ) -> tuple[list[list[float]], list[list[int]]]:
        """Scores and ids of the k rows nearest to each vector that meet the conditions, best first; k or all."""
        ...

    def ids(self, where: Where) -> Rows:
        """Ids of all rows that meet the conditions, ascending."""
        ...

    def vectors(self, ids: Sequence[int]) -> Floats:
        """float32 [len(ids), D], as they are stored."""
        ...

    def rows(self, ids: Sequence[int], text: bool = False) -> list[dict[str, Any]]:
        """What is known of some rows; report text only if asked for."""
        ...

    def fields(self) -> list[Field]:
        """What conditions it can be asked with."""
        ...

    def add(self, embeddings: Folders) -> dict[str, Any]:
        """Add folders of embeddings; returns the new manifest."""
        ...

    def search(
        self,
        queries: NDArray[np.float32],
        k: int = 10,
        *,
        where: Sequence[str | Condition] | None = None,
        not_patients: Sequence[str | None] | None = None,
        not_ids: Sequence[int | None] | None = None,
        policy: Policy | None = None,
        with_text: bool = False,
        direction: str | None = None,
        parameters: Parameters | None = None,
    ) -> list[list[Hit]]:
        """The k nearest of each query by cosine, best first; fewer if fewer are left.

        Args:
            queries: [Q, D] or [D], unit norm, of the bundle the index was built with.
            where: conditions that every answer meets, as "view=PA"; see `filters`.
            not_patients: for each query a patient none of whose rows is an answer, or None.
            not_ids: for each query a row that is no answer, itself for example, or None.
            policy: how many of the k are kept; None keeps all.
            with_text: give report text too, from an index that holds it.
            direction: what the queries are, "image" or "text"; None is as thorough as the harder of them needs.
            parameters: to search otherwise than the index was tuned; they go with this call alone.

        Raises:
            UserError: wrong width, vectors not finite or not unit norm, k below 1, a filter that cannot be, text that
                is not held.
        """
        vectors = np.ascontiguousarray(np.atleast_2d(queries), dtype=np.float32)
        if vectors.shape[1] != self.dim:
            raise UserError(f"search: queries have {vectors.shape[1]} dimensions, the index has {self.dim}")
        if k < 1:
            raise UserError(f"search: k must be at least 1, got {k}")
        if with_text and not self.manifest["text_included"]:
            raise UserError("search: the index holds no report text: index again with --include-text")
        check_unit(vectors, "search: a query", "normalise them")
        without = _left_out(self, len(vectors), not_patients, not_ids)
        # As many more as may have to go: what stays are the k nearest of the others.
        more = max((len(ids) for ids in without), default=0)
        found = self.near(vectors, k + more, conditions(where), direction, parameters)
        answers = []
        for scores, ids, gone in zip(*found, without, strict=True):
            kept = [(score, number) for score, number in zip(scores, ids, strict=True) if number not in gone][:k]
            if policy is not None:
                kept = kept[: policy.keep([score for score, _ in kept])]
            rows = self.rows([number for _, number in kept], with_text)
            answers.append(
                [
                    Hit(rank, score, number, row["study_id"], row)
                    for rank, ((score, number), row) in enumerate(zip(kept, rows, strict=True), 1)
                ]
            )
        return answers


def _left_out(
    store: Store, count: int, patients: Sequence[str | None] | None, ids: Sequence[int | None] | None
) -> list[set[int]]:
    """For each query the rows that are no answers to it."""
    for name, given in (("not_patients", patients), ("not_ids", ids)):
        if given is not None and (isinstance(given, str) or len(given) != count):
            raise UserError(f"search: {name} must name one for each of {count} queries")
    of_patient: dict[str | None, set[int]] = {None: set()}
    for patient in set(patients or ()):
        if patient is not None:
            of_patient[patient] = set(store.ids((Condition("patient_id", "=", (patient,)),)).tolist())
    without = [set(of_patient[patient]) for patient in patients or [None] * count]
    for gone, number in zip(without, ids or [None] * count, strict=True):
        if number is not None:
            gone.add(int(number))
    return without
