"""How probably a report fits, by the scores of its answer alone: what is worth keeping at a stated risk.

A cosine is no chance: how near a right report lies differs from model to model, and along an answer. A logistic
regression on queries whose studies are known tells it. The promise of conformal risk control holds however wrong the
model is, as long as it was fitted on other queries than those of the calibration: it decides only how much is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FEATURES = 5


@dataclass(frozen=True)
class Chance:
    """Of each report of an answer to have a property."""

    means: tuple[float, ...]
    scales: tuple[float, ...]
    weights: tuple[float, ...]
    """Of the standardised features, and the intercept."""

    def __post_init__(self) -> None:
        if not len(self.means) == len(self.scales) == len(self.weights) - 1 == FEATURES:
            raise ValueError(f"a model of {FEATURES} features, got {len(self.means)}")

    def of(self, scores: Sequence[float]) -> NDArray[np.float64]:
        """[len(scores)] between 0 and 1."""
        standard = (features(scores) - self.means) / self.scales
        logits = standard @ np.array(self.weights[:-1]) + self.weights[-1]
        return np.asarray(1 / (1 + np.exp(-np.clip(logits, -30, 30))))


def features(scores: Sequence[float]) -> NDArray[np.float64]:
    """[len(scores), 5]: the score, the best, the place, and how the score stands in its answer."""
    given = np.asarray(scores, np.float64)
    if not len(given):
        return np.zeros((0, FEATURES))
    places = np.log1p(np.arange(len(given)))
    best, spread = np.full(len(given), given[0]), np.full(len(given), given[0] - given[-1])
    return np.stack([given, best, places, given - given.mean(), spread], axis=1)


def fit(answers: Sequence[Sequence[float]], having: Sequence[Sequence[bool]]) -> Chance:
    """
    Args:
        answers: scores, best first.
        having: for each of them whether its report has the property.
    """
    from sklearn.linear_model import LogisticRegression

    found = np.concatenate([np.zeros((0, FEATURES)), *(features(scores) for scores in answers)])
    has = np.array([one for given in having for one in given], np.bool_)
    means, scales = (found.mean(axis=0), found.std(axis=0) + 1e-9) if len(found) else (np.zeros(5), np.ones(5))
    if has.all() or not has.any():  # nothing tells them apart: only the place counts
        share = (has.sum() + 0.5) / (len(has) + 1)
        weights = [*np.zeros(FEATURES), np.log(share / (1 - share))]
    else:
        model = LogisticRegression(max_iter=1000).fit((found - means) / scales, has)
        weights = [*model.coef_[0], model.intercept_[0]]
    return Chance(*(tuple(float(value) for value in given) for given in (means, scales, weights)))
