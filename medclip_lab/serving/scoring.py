"""From features to answers, whichever way labels are asked about."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medclip_lab.inference.classifier import ZeroShotClassifier

Floats = NDArray[np.float32]
FACTS = ("score", "probability", "threshold", "decision", "operating", "reason")
"""What is said of one label of one image."""


class Scorer(Protocol):
    """Answers for a set of labels."""

    score_type: str
    rule: str
    names: list[str]
    labelset: str
    labelset_hash: str
    calibration_hash: str | None

    def answers(self, features: Floats) -> list[dict[str, Any]]:
        """For each of [N, D] {"labels": name -> all of `FACTS`, "out_of_domain"}; None where nothing is calibrated."""
        ...


class PerLabel:
    """Each label judged apart from the others (multi-label), as the classifier and its calibration do."""

    def __init__(self, classifier: ZeroShotClassifier) -> None:
        self._classifier = classifier
        self.score_type: str = classifier.score_type
        self.rule = classifier.rule
        self.names = classifier.names
        self.labelset, self.labelset_hash = classifier.labelset, classifier.labelset_hash
        self.calibration_hash = None if classifier.calibration is None else classifier.calibration.hash

    def answers(self, features: Floats) -> list[dict[str, Any]]:
        return [
            {
                "labels": {name: {fact: said.get(fact) for fact in FACTS} for name, said in row["labels"].items()},
                "out_of_domain": row["out_of_domain"],
            }
            for row in self._classifier.answers(features)
        ]


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
    rule: str
    score_type: str = "softmax"
    calibration_hash: str | None = None

    @classmethod
    def of(cls, classifier: ZeroShotClassifier) -> "OneOfAll":
        means = np.stack([np.asarray(rows, dtype=np.float32).mean(0) for rows in classifier.positive])
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        scale = classifier.logit_scale
        return cls(
            classifier.names,
            means,
            scale,
            classifier.labelset,
            classifier.labelset_hash,
            f"softmax(T={1 / scale:.4g})",
        )

    def answers(self, features: Floats) -> list[dict[str, Any]]:
        # In double precision: then it does not matter which other rows a product is taken with.
        logits = self.logit_scale * (features.astype(np.float64) @ self.means.T.astype(np.float64))
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        nothing = dict.fromkeys(FACTS)
        return [
            {
                "labels": {
                    name: nothing | {"score": float(score)} for name, score in zip(self.names, row, strict=True)
                },
                "out_of_domain": None,
            }
            for row in odds / odds.sum(axis=1, keepdims=True)
        ]
