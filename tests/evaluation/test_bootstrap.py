from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from medclip_lab.errors import UserError
from medclip_lab.evaluation.bootstrap import auroc_interval, compare, freedom, mean_freedom, rarer, sample, wilson
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


def test_interval_covers_with_few_positives_where_percentiles_do_not() -> None:
    """Ten positive patients of eighty, an AUROC of 0.92: the percentiles miss it twice as often as they say."""
    rng, held, by_percentiles = np.random.default_rng(1), 0, 0
    positive, patients = np.arange(80) < 10, np.arange(80)
    names = [str(number) for number in patients]
    assert freedom(rarer(patients, positive)) == 9
    for draw in range(300):
        scores = rng.normal(size=80) + 2 * positive
        draws = weighted_auroc(scores, positive, patient_weights(names, 200, seed=draw))
        low, high = auroc_interval(auroc(scores, positive), draws, 9)
        held += low <= 0.92135 <= high  # the standard normal at sqrt(2)
        low, high = interval(draws)
        by_percentiles += low <= 0.92135 <= high
    assert 0.92 <= held / 300 <= 0.98
    assert by_percentiles / 300 < 0.9


def test_interval_of_many_patients_is_that_of_percentiles() -> None:
    rng = np.random.default_rng(0)
    positive = np.arange(4000) < 1600
    scores = positive + rng.normal(size=4000)
    draws = weighted_auroc(scores, positive, patient_weights([str(n) for n in range(4000)], 1000, 0))
    assert auroc_interval(auroc(scores, positive), draws, 1599) == pytest.approx(interval(draws), abs=2e-3)


def test_interval_where_nothing_is_ranked_wrongly() -> None:
    """No draw differs then, and yet ten patients do not show that nobody ever will be."""
    far = 2.262157  # Student's t with 9 degrees of freedom
    low, high = auroc_interval(1.0, np.ones(100), 9)
    assert (low, high) == pytest.approx((10 / (10 + far**2), 1.0), abs=1e-6)
    assert auroc_interval(0.0, np.zeros(100), 9) == pytest.approx((0.0, 1 - low))
    assert auroc_interval(0.7, np.full(5, np.nan), 9) == pytest.approx(wilson(7, 10, far), abs=1e-6)


@given(
    st.floats(0.001, 0.999),
    arrays(np.float64, st.integers(2, 30), elements=st.floats(0, 1)),
    st.integers(1, 100),
)
def test_interval_holds_its_value_and_stays_in_bounds(value: float, draws: Floats, degrees: int) -> None:
    low, high = auroc_interval(value, draws, degrees)
    assert 0 <= low <= value + 1e-12
    assert value - 1e-12 <= high <= 1


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(0, 9))
def test_freedom_of_a_mean_lies_between_that_of_the_least_and_of_all(freedoms: list[int], seed: int) -> None:
    drawn = list(np.random.default_rng(seed).normal(size=(len(freedoms), 50)))
    ends = np.cumsum([0, *(number + 1 for number in freedoms)])
    apart = [np.arange(*pair) for pair in pairwise(ends)]
    assert min(freedoms) - 1e-9 <= mean_freedom(drawn, apart) <= sum(freedoms) + 1e-9
    assert mean_freedom([np.ones(3)] * len(freedoms), apart) == min(freedoms)
    assert mean_freedom(drawn, [np.arange(number + 1) for number in freedoms]) <= max(freedoms) + 1e-9


def test_the_mean_of_labels_of_the_same_rare_patients_holds_as_often() -> None:
    """Ten labels of one set of ten patients: by Welch and Satterthwaite alone, 92 % of the intervals hold the truth."""
    rng, held, positive = np.random.default_rng(0), 0, np.arange(100) < 10
    names = [str(number) for number in range(100)]
    rare = rarer(np.arange(100), positive)
    for draw in range(400):
        shared, weights = rng.normal(size=100), patient_weights(names, 200, seed=draw)
        columns = [positive + (shared + rng.normal(size=100)) / np.sqrt(2) for _ in range(10)]
        sampled = [weighted_auroc(scores, positive, weights) for scores in columns]
        mean = float(np.mean([auroc(scores, positive) for scores in columns]))
        low, high = auroc_interval(mean, np.mean(sampled, axis=0), mean_freedom(sampled, [rare] * 10))
        held += low <= TRUTH <= high
    assert held / 400 >= 0.93


def test_an_interval_of_no_value_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"no bootstrap draw has both classes of a label: take more of them \(--draws\)"
    ):
        interval(np.full(3, np.nan))
    assert interval(np.array([np.nan, 0.5, 0.5])) == (0.5, 0.5)


def test_freedom_counts_patients() -> None:
    patients = np.array([0, 0, 0, 1, 1, 2, 3])
    assert freedom(rarer(patients, np.array([1, 1, 1, 1, 0, 0, 0], bool))) == 1  # two patients with, three without
    assert freedom(rarer(patients, np.array([1, 0, 0, 0, 0, 0, 0], bool))) == 1, "one patient tells nothing of others"


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
