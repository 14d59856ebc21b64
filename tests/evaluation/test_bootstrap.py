import numpy as np
import pytest

from medclip_lab.evaluation.bootstrap import compare, sample
from medclip_lab.evaluation.metrics import Floats, Ranked, auroc, interval, patient_weights, weighted_auroc

TRUTH = 0.760250  # P(N(1, 1) > N(0, 1)), the standard normal at 1 / sqrt(2)


def drawn(rng: np.random.Generator, patients: int, studies: int) -> tuple[Floats, "np.ndarray", list[str]]:
    """Studies of a patient share a class and half of their variance; the AUROC of a study is TRUTH."""
    positive = np.repeat(np.arange(patients) < patients * 0.4, studies)
    shared = np.repeat(rng.normal(size=patients), studies)
    own = rng.normal(size=patients * studies)
    scores = positive + (shared + own) / np.sqrt(2) if studies > 1 else positive + own
    return scores, positive, [str(number) for number in np.repeat(np.arange(patients), studies)]


@pytest.mark.parametrize("studies", [1, 4])
def test_interval_covers(studies: int) -> None:
    """Over many samples the 95 % interval holds the true AUROC about 95 times in 100, studies of a patient or not."""
    rng, covered, too_narrow = np.random.default_rng(0), 0, 0
    for draw in range(200):
        scores, positive, patients = drawn(rng, 120, studies)
        low, high = interval(weighted_auroc(scores, positive, patient_weights(patients, 300, seed=draw)))
        covered += low <= TRUTH <= high
        alone = [str(number) for number in range(len(patients))]
        low, high = interval(weighted_auroc(scores, positive, patient_weights(alone, 100, seed=draw)))
        too_narrow += not low <= TRUTH <= high
    assert 0.90 <= covered / 200 <= 0.985
    if studies > 1:
        assert too_narrow / 200 > 0.15, "drawing studies in place of patients is what this is to avoid"


def test_blocks_of_draws_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    scores, positive = rng.normal(size=50), rng.random(50) < 0.5
    used = rng.random(50) < 0.7
    weights = patient_weights([str(number) for number in range(50)], 100, 0)
    ranked = Ranked(scores[used], positive[used])
    whole = sample(lambda block: {"auroc": ranked.under(block).auroc()}, weights, used)["auroc"]
    monkeypatch.setattr("medclip_lab.evaluation.bootstrap.BLOCK", 50 * 17)
    parts = sample(lambda block: {"auroc": ranked.under(block).auroc()}, weights, used)["auroc"]
    np.testing.assert_array_equal(whole, parts)
    expected = weighted_auroc(scores[used], positive[used], weights[:, used].astype(np.float64))
    np.testing.assert_allclose(whole, expected, atol=1e-12)


def test_paired_test_finds_a_difference_that_intervals_apart_do_not() -> None:
    rng = np.random.default_rng(0)
    positive = np.arange(400) < 160
    one = positive + rng.normal(size=400)
    other = one - 0.25 * positive + 0.1 * rng.normal(size=400)  # nearly the same mistakes, a few more
    weights = patient_weights([str(number) for number in range(400)], 1000, 0)
    draws = weighted_auroc(one, positive, weights), weighted_auroc(other, positive, weights)
    assert interval(draws[0])[0] < interval(draws[1])[1], "the intervals overlap"
    test = compare(auroc(one, positive), auroc(other, positive), *draws)
    assert test["low"] > 0
    assert test["p"] < 0.01
    assert test["difference"] == pytest.approx(auroc(one, positive) - auroc(other, positive))
    assert compare(0.5, 0.5, draws[0], draws[0])["p"] == 1.0


def test_paired_test_is_honest_without_a_difference() -> None:
    rng, called = np.random.default_rng(1), 0
    for draw in range(100):
        positive = np.arange(120) < 50
        common = positive + rng.normal(size=120)
        one, other = (common + 0.5 * rng.normal(size=120) for _ in range(2))
        weights = patient_weights([str(number) for number in range(120)], 200, draw)
        draws = (weighted_auroc(scores, positive, weights) for scores in (one, other))
        called += compare(auroc(one, positive), auroc(other, positive), *draws)["p"] < 0.05
    assert called <= 12


def test_draws_without_a_value_do_not_count() -> None:
    test = compare(0.8, 0.7, np.array([0.8, 0.9, np.nan]), np.array([0.7, 0.7, 0.7]))
    assert test["draws"] == 2
    assert test["p"] == pytest.approx(2 / 3)
