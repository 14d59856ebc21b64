from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from medclip_lab.evaluation.metrics import auroc, interval, patient_weights, retrieval, weighted_auroc


@given(st.data())
def test_auroc_equals_scikit_learn(data: Any) -> None:
    size = data.draw(st.integers(2, 40))
    scores = np.array(data.draw(st.lists(st.integers(0, 6), min_size=size, max_size=size)), dtype=np.float64)  # ties
    positive = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    if positive.all() or not positive.any():
        with pytest.raises(ValueError, match="both classes"):
            auroc(scores, positive)
    else:
        assert auroc(scores, positive) == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)


def test_weighted_auroc_equals_repeated_samples() -> None:
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 8, 50).astype(np.float64), rng.random(50) < 0.4
    weights = rng.integers(0, 4, (5, 50))
    for row, value in zip(weights, weighted_auroc(scores, positive, weights.astype(np.float64)), strict=True):
        repeated = roc_auc_score(np.repeat(positive, row), np.repeat(scores, row))
        assert value == pytest.approx(repeated, abs=1e-12)


def test_auroc_refuses_what_is_no_number() -> None:
    with pytest.raises(ValueError, match="not finite"):
        auroc(np.array([0.1, np.nan]), np.array([True, False]))


def test_patients_are_drawn_whole() -> None:
    patients = ["a", "a", "b", "c", "c", "c"]
    weights = patient_weights(patients, 200, seed=0)
    assert weights.shape == (200, 6)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 3] == weights[:, 5]).all()
    assert (weights[:, [0, 2, 3]].sum(1) == 3).all()
    assert (patient_weights(patients, 200, seed=0) == weights).all()
    assert (patient_weights(patients, 200, seed=1) != weights).any()


def test_interval_covers() -> None:
    """Over many samples the 95 % interval holds the true AUROC about 95 times in 100."""
    rng, covered = np.random.default_rng(0), 0
    truth = 0.760250  # P(N(1, 1) > N(0, 1)), the standard normal at 1 / sqrt(2)
    for draw in range(150):
        positive = np.arange(120) < 50
        scores = rng.normal(size=120) + positive
        weights = patient_weights([str(i) for i in range(120)], 300, seed=draw)
        low, high = interval(weighted_auroc(scores, positive, weights))
        covered += low <= truth <= high
    assert 0.88 <= covered / 150 <= 0.99


def test_retrieval_by_hand() -> None:
    gallery = np.eye(4)
    query = np.array([[0.9, 0.1, 0.0, 0.0], [0.9, 0.1, 0.0, 0.0], [0.0, 0.3, 0.2, 0.1]])
    found = retrieval(query, gallery, ["a", "b", "d"], ["a", "b", "c", "d"], ks=(1, 2, 3))
    assert found.recall == {1: 1 / 3, 2: 2 / 3, 3: 1.0}  # ranks 1, 2, 3
    assert found.median_rank == 2
    assert found.chance == pytest.approx({1: 0.25, 2: 0.5, 3: 0.75})


def test_ties_count_against() -> None:
    same = np.ones((5, 2)) / np.sqrt(2)
    groups = [str(number) for number in range(5)]
    assert retrieval(same, same, groups, groups, ks=(1, 5)).recall == {1: 0.0, 5: 1.0}


def test_same_text_is_a_positive() -> None:
    features = np.eye(3)
    found = retrieval(features[[1, 0, 2]], features, ["normal", "normal", "x"], ["normal", "normal", "x"], ks=(1,))
    assert found.recall[1] == 1.0
    assert found.chance[1] == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3)


def test_retrieval_does_not_depend_on_the_order_of_the_gallery() -> None:
    rng = np.random.default_rng(0)
    query, gallery = rng.normal(size=(30, 6)), rng.normal(size=(30, 6))
    groups = [str(number // 2) for number in range(30)]
    order = rng.permutation(30)
    shuffled = retrieval(query, gallery[order], groups, [groups[row] for row in order])
    assert shuffled.recall == retrieval(query, gallery, groups, groups).recall
