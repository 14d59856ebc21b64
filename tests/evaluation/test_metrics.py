from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn
from torchmetrics.functional import classification as torchmetrics

from medclip_lab.evaluation.metrics import (
    Classes,
    Confusion,
    Ranked,
    auroc,
    average_precision,
    brier,
    calibration_error,
    error_if_perfect,
    interval,
    known,
    mean_of_draws,
    patient_weights,
    reliability,
    weighted_auroc,
)


@st.composite
def labelled(draw: Any) -> tuple[Any, Any]:
    """Scores in eighths, so that many are tied, with labels of any kind, a single class among them."""
    size = draw(st.integers(2, 40))
    scores = np.array(draw(st.lists(st.integers(0, 8), min_size=size, max_size=size))) / 8
    return scores, np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size)))


@given(labelled())
def test_ranking_metrics_equal_scikit_learn(case: Any) -> None:
    scores, positive = case
    if positive.all() or not positive.any():
        for metric in (auroc, average_precision):
            with pytest.raises(ValueError, match="both classes"):
                metric(scores, positive)
        return
    assert auroc(scores, positive) == pytest.approx(sklearn.roc_auc_score(positive, scores), abs=1e-12)
    expected = sklearn.average_precision_score(positive, scores)
    assert average_precision(scores, positive) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(labelled(), st.sampled_from([0.0, 0.5, 0.75, 0.8, 0.9, 0.95, 1.0]))
def test_sensitivity_at_specificity_equals_torchmetrics(case: Any, at: float) -> None:
    scores, positive = case
    if positive.all() or not positive.any():
        return
    found = Ranked(scores, positive).plain()
    pair = torch.from_numpy(scores), torch.from_numpy(positive.astype(np.int64))
    sensitivity = torchmetrics.binary_sensitivity_at_specificity(*pair, min_specificity=at)[0]
    specificity = torchmetrics.binary_specificity_at_sensitivity(*pair, min_sensitivity=at)[0]
    # torchmetrics divides in single precision, and so loses a bound that is met exactly now and then.
    fpr, tpr, _ = sklearn.roc_curve(positive, scores, drop_intermediate=False)
    assert found.sensitivity_at(at)[0] == pytest.approx(tpr[1 - fpr >= at - 1e-9].max(), abs=1e-12)
    assert found.specificity_at(at)[0] == pytest.approx((1 - fpr)[tpr >= at - 1e-9].max(), abs=1e-12)
    assert found.sensitivity_at(at)[0] >= float(sensitivity) - 1e-6
    assert found.specificity_at(at)[0] >= float(specificity) - 1e-6


@given(labelled(), st.integers(0, 8))
@settings(deadline=None)
def test_decisions_equal_scikit_learn(case: Any, at: int) -> None:
    scores, positive = case
    decided = scores >= at / 8
    cells = Confusion.of(decided, positive)
    assert cells.accuracy()[0] == pytest.approx(sklearn.accuracy_score(positive, decided), abs=1e-12)
    assert cells.mcc()[0] == pytest.approx(sklearn.matthews_corrcoef(positive, decided), abs=1e-12)
    for found, label in ((cells.sensitivity()[0], 1), (cells.specificity()[0], 0)):
        if (positive == label).any():
            assert found == pytest.approx(sklearn.recall_score(positive, decided, pos_label=label), abs=1e-12)
        else:
            assert np.isnan(found)
    if positive.any() or decided.any():
        assert cells.f1()[0] == pytest.approx(sklearn.f1_score(positive, decided), abs=1e-12)
    else:
        assert np.isnan(cells.f1()[0])


@given(labelled())
@settings(deadline=None)
def test_errors_of_probabilities_equal_peers(case: Any) -> None:
    scores, positive = case
    assert brier(scores, positive)[0] == pytest.approx(
        sklearn.brier_score_loss(positive, scores, labels=[0, 1]), abs=1e-12
    )
    pair = torch.from_numpy(scores), torch.from_numpy(positive.astype(np.int64))
    expected = float(torchmetrics.binary_calibration_error(*pair, n_bins=15, norm="l1"))
    assert calibration_error(scores, positive)[0] == pytest.approx(expected, abs=1e-6)  # theirs is single precision
    bins = reliability(scores, positive)
    assert sum(row["count"] for row in bins) == len(scores)
    by_bin = sum(row["count"] * abs(row["probability"] - row["positives"]) for row in bins) / len(scores)
    assert calibration_error(scores, positive)[0] == pytest.approx(by_bin, abs=1e-12)


@given(st.data())
@settings(deadline=None)
def test_exclusive_classes_equal_scikit_learn(data: Any) -> None:
    numbers = st.lists(st.integers(0, 3), min_size=30, max_size=30)
    truth, decided = np.array(data.draw(numbers)), np.array(data.draw(numbers))
    cells = Classes.of(decided, truth, 4)
    assert cells.accuracy()[0] == pytest.approx(sklearn.accuracy_score(truth, decided), abs=1e-12)
    assert cells.macro_f1()[0] == pytest.approx(sklearn.f1_score(truth, decided, average="macro"), abs=1e-12)
    assert cells.mcc()[0] == pytest.approx(sklearn.matthews_corrcoef(truth, decided), abs=1e-12)
    recalls = [(decided[truth == label] == label).mean() for label in np.unique(truth)]
    assert cells.balanced_accuracy()[0] == pytest.approx(np.mean(recalls), abs=1e-12)


def test_a_perfect_model_has_the_error_of_chance() -> None:
    rng = np.random.default_rng(1)
    probabilities = rng.random(200)
    found = [calibration_error(probabilities, rng.random(200) < probabilities)[0] for _ in range(400)]
    expected, deviation = np.mean(found), np.std(found)
    assert error_if_perfect(probabilities) == pytest.approx(expected, abs=3 * deviation * np.sqrt(1 / 50 + 1 / 400))
    assert error_if_perfect(rng.random(20_000)) < expected / 5
    assert error_if_perfect(np.array([0.0, 1.0, 1.0])) == 0.0


def test_weights_mean_repetition() -> None:
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 8, 60) / 8, rng.random(60) < 0.4
    weights = rng.integers(0, 4, (5, 60)).astype(np.float64)
    found = Ranked(scores, positive).under(weights.T)
    decided, truth = rng.integers(0, 3, 60), rng.integers(0, 3, 60)
    values = {
        "auroc": (weighted_auroc(scores, positive, weights), lambda i: auroc(scores[i], positive[i])),
        "auprc": (found.average_precision(), lambda i: average_precision(scores[i], positive[i])),
        "sensitivity": (
            found.sensitivity_at(0.8),
            lambda i: Ranked(scores[i], positive[i]).plain().sensitivity_at(0.8)[0],
        ),
        "specificity": (
            found.specificity_at(0.8),
            lambda i: Ranked(scores[i], positive[i]).plain().specificity_at(0.8)[0],
        ),
        "brier": (brier(scores, positive, weights.T), lambda i: brier(scores[i], positive[i])[0]),
        "ece": (
            calibration_error(scores, positive, weights.T),
            lambda i: calibration_error(scores[i], positive[i])[0],
        ),
        "mcc": (
            Confusion.of(scores > 0.5, positive, weights.T).mcc(),
            lambda i: Confusion.of(scores[i] > 0.5, positive[i]).mcc()[0],
        ),
        "macro f1": (
            Classes.of(decided, truth, 3, weights.T).macro_f1(),
            lambda i: Classes.of(decided[i], truth[i], 3).macro_f1()[0],
        ),
    }
    for name, (together, alone) in values.items():
        for row, value in zip(weights.astype(int), together, strict=True):
            repeated = np.repeat(np.arange(60), row)
            assert value == pytest.approx(alone(repeated), abs=1e-12), name


def test_a_draw_without_one_class_has_no_value() -> None:
    found = Ranked(np.array([0.1, 0.2, 0.3]), np.array([False, True, True])).under(np.array([[0.0], [1.0], [1.0]]))
    for value in (found.auroc(), found.sensitivity_at(0.9), found.specificity_at(0.9)):
        assert np.isnan(value).all()
    without = Ranked(np.array([0.1, 0.2]), np.array([False, True])).under(np.array([[1.0], [0.0]]))
    assert np.isnan(without.average_precision()).all()


def test_only_numbers_are_ranked() -> None:
    with pytest.raises(ValueError, match="not finite"):
        auroc(np.array([0.1, np.nan]), np.array([True, False]))


def test_labels_that_are_not_known_are_left_out() -> None:
    scores, positive = known(np.array([0.1, 0.2, 0.3]), np.array([1.0, np.nan, 0.0]))
    assert (scores.tolist(), positive.tolist()) == ([0.1, 0.3], [True, False])
    with pytest.raises(ValueError, match="labels are 1, 0 or NaN, got -1"):
        known(np.array([0.1]), np.array([-1.0]))


def test_patients_are_drawn_whole() -> None:
    patients = ["a", "a", "b", "c", "c", "c"]
    weights = patient_weights(patients, 200, seed=0)
    assert weights.shape == (200, 6)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 3] == weights[:, 5]).all()
    assert (weights[:, [0, 2, 3]].sum(1) == 3).all()
    assert (patient_weights(patients, 200, seed=0) == weights).all()
    assert (patient_weights(patients, 200, seed=1) != weights).any()


def test_interval_leaves_out_draws_without_a_value() -> None:
    assert interval(np.r_[np.linspace(0, 1, 101), np.nan]) == pytest.approx((0.025, 0.975))


@pytest.mark.filterwarnings("error")
def test_a_draw_in_which_no_label_has_both_classes_has_no_mean() -> None:
    draws = mean_of_draws(np.array([[0.5, np.nan, np.nan], [0.7, 0.9, np.nan]]))
    np.testing.assert_allclose(draws, [0.6, 0.9, np.nan])
