"""Weighted k-nearest neighbours on frozen features: what the geometry of the embedding says without any fit."""

from typing import Any

import numpy as np

from medclip_lab.evaluation.gather import Labelled, refuse_shared_patients
from medclip_lab.evaluation.metrics import Floats
from medclip_lab.evaluation.table import auroc_table

CHUNK = 1024


def knn_scores(train: Labelled, column: int, queries: Floats, k: int = 20, temperature: float = 0.07) -> Floats:
    """[N] share of positives among the k nearest training studies by cosine, each weighted by exp(cosine / T).

    The rule of Wu et al. (CVPR 2018, section 3.4), with its temperature. A study that a label says nothing of is
    nobody's neighbour for that label; where fewer than k are left, all of them vote.
    """
    used = train.used[:, column]
    bank, positive = train.features[used].astype(np.float64), train.positive[used, column].astype(np.float64)
    k = min(k, len(bank))
    scores = np.empty(len(queries))
    for start in range(0, len(queries), CHUNK):
        cosines = queries[start : start + CHUNK].astype(np.float64) @ bank.T
        near = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
        nearest = np.take_along_axis(cosines, near, axis=1)
        weights = np.exp((nearest - nearest.max(1, keepdims=True)) / temperature)
        scores[start : start + CHUNK] = (weights * positive[near]).sum(1) / weights.sum(1)
    return scores


def knn(train: Labelled, test: Labelled, *, k: int = 20, draws: int = 1000, seed: int = 0) -> dict[str, Any]:
    """AUROC by label with 95 % intervals bootstrapped by patient; a label without both classes gives its reason.

    Raises:
        UserError: a patient stands in both.
    """
    refuse_shared_patients(train=train, test=test)
    reasons = {column: f"train: {lack}" for column in range(len(train.names)) if (lack := train.lacks(column))}
    scores = np.zeros(test.positive.shape)
    for column in set(range(len(train.names))) - set(reasons):
        scores[:, column] = knn_scores(train, column, test.features, k)
    return {"k": k, **auroc_table(test, scores, draws=draws, seed=seed, reasons=reasons)}
