"""How many answers are kept: policies for retrieval-augmented generation, where a wrong report does harm."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from medclip_lab.errors import UserError


class Policy(Protocol):
    """Decides by the scores of one answer."""

    def keep(self, scores: Sequence[float]) -> int:
        """How many of the scores, which descend, are kept: always the first ones."""
        ...


@dataclass(frozen=True)
class FixedK:
    """The k best of every query."""

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError(f"policy: k must be at least 1, got {self.k}")

    def keep(self, scores: Sequence[float]) -> int:
        return min(self.k, len(scores))


@dataclass(frozen=True)
class Ratio:
    """While best / score < ratio, as in MMed-RAG (Xia et al., 2025).

    The first is always kept. Multiplied out, so that a score that is not positive ends the answer, though its quotient
    would be small: report and query point away from each other.
    """

    ratio: float = 1.5

    def __post_init__(self) -> None:
        if not self.ratio > 1:
            raise UserError(f"policy: ratio must be above 1, got {self.ratio}")

    def keep(self, scores: Sequence[float]) -> int:
        for place, score in enumerate(scores[1:], 1):
            if scores[0] >= self.ratio * score:
                return place
        return len(scores)


@dataclass(frozen=True)
class AtLeast:
    """Answers whose score is at least this, of those that another policy keeps.

    A cosine: what is near depends on the model, so choose it on queries whose answers are known.
    """

    score: float
    policy: Policy | None = None

    def __post_init__(self) -> None:
        if not -1 <= self.score <= 1:
            raise UserError(f"policy: a score is a cosine, between -1 and 1, got {self.score}")

    def keep(self, scores: Sequence[float]) -> int:
        near = sum(1 for score in scores if score >= self.score)
        return near if self.policy is None else min(near, self.policy.keep(scores))
