"""From features to answers, whichever way labels are asked about. The only file that knows a classifier's inside."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medclip_lab.inference.classifier import ZeroShotClassifier

Floats = NDArray[np.float32]


class Scorer(Protocol):
    """Answers for a set of labels."""

    score_type: str
    names: list[str]
    labelset: str
    labelset_hash: str
    calibration_hash: str | None

    def answers(self, features: Floats) -> list[dict[str, Any]]:
        """For each of [N, D] {"labels": name -> {"score", "probability", "threshold", "decision"}, "out_of_domain"}."""
        ...


class PerLabel:
    """Each label judged apart from the others (multi-label), by the classifier's own rule."""

    calibration_hash: str | None = None

    def __init__(self, classifier: ZeroShotClassifier) -> None:
        self._classifier = classifier
        self.score_type: str = classifier.score_type
        self.names = classifier.names
        self.labelset, self.labelset_hash = classifier.labelset, classifier.labelset_hash

    def answers(self, features: Floats) -> list[dict[str, Any]]:
        scores = self._classifier.scores(features)
        return [_answer(self.names, row) for row in scores]


@dataclass
class OneOfAll:
    """Which one of the labels: softmax of logit_scale x m(p), m(p) the unit-norm mean of a label's prompts (CLIP).

    Scores sum to 1 and say nothing about findings that occur together.
    """

    names: list[str]
    means: Floats
    """[K, D], unit norm."""
    logit_scale: float
    labelset: str
    labelset_hash: str
    score_type: str = "softmax"
    calibration_hash: str | None = None

    @classmethod
    def of(cls, classifier: ZeroShotClassifier) -> "OneOfAll":
        means = np.stack([np.asarray(rows, dtype=np.float32).mean(0) for rows in classifier.positive])
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        return cls(classifier.names, means, classifier.logit_scale, classifier.labelset, classifier.labelset_hash)

    def answers(self, features: Floats) -> list[dict[str, Any]]:
        # In double precision: then it does not matter which other rows a product is taken with.
        logits = self.logit_scale * (features.astype(np.float64) @ self.means.T.astype(np.float64))
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return [_answer(self.names, row) for row in odds / odds.sum(axis=1, keepdims=True)]


def _answer(names: list[str], scores: NDArray[Any]) -> dict[str, Any]:
    nothing = {"probability": None, "threshold": None, "decision": None}
    return {
        "labels": {name: {"score": float(score), **nothing} for name, score in zip(names, scores, strict=True)},
        "out_of_domain": None,
    }
