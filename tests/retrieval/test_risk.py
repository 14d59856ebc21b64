"""Conformal risk control: the guarantee, measured over random splits, and what it buys."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medclip_lab.bench.risk import curve, equal_k, over_splits
from medclip_lab.errors import UserError
from medclip_lab.retrieval.policies import FixedK, Ratio
from medclip_lab.retrieval.risk import (
    RISKS,
    SIGNALS,
    Answered,
    Calibrated,
    Risk,
    Signal,
    calibrate,
    load_calibration,
    loss,
    save_calibration,
    signals_of,
)

K = 12


def draw(count: int, seed: int, informative: bool = True) -> list[Answered]:
    """Queries of very different difficulty: the score of a report says how probably it fits."""
    rng = np.random.default_rng(seed)
    answers = []
    for difficulty in rng.uniform(-3, 3, count):
        scores = np.sort(np.tanh(difficulty / 3 + rng.normal(0, 0.5, K)) * 0.5 + 0.4)[::-1]
        right = 1 / (1 + np.exp(-12 * (scores - 0.4)))
        fits = rng.random(K) < (right if informative else right.mean())
        answers.append(Answered(scores.tolist(), (~fits & (rng.random(K) < 0.5)).tolist(), fits.tolist()))
    return answers


def of(answers: list[Answered], calibrated: Calibrated) -> tuple[float, float]:
    """Mean loss and mean reports kept."""
    sizes = [calibrated.keep(found.scores) for found in answers]
    losses = [loss(found, size, calibrated.risk, K) for found, size in zip(answers, sizes, strict=True)]
    return float(np.mean(losses)), float(np.mean(sizes))


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize(
    ("risk", "alpha"), [("contradiction", 0.1), ("contradiction", 0.3), ("contradictions", 0.05), ("miss", 0.45)]
)
@pytest.mark.parametrize("informative", [True, False])
def test_risk_stays_under_alpha(risk: Risk, alpha: float, signal: Signal, informative: bool) -> None:
    """At most alpha + 2 standard errors over 200 random splits, whether or not scores mean anything."""
    pool = draw(1200, seed=1, informative=informative)
    rng = np.random.default_rng(2)
    risks = []
    for _ in range(200):
        order = rng.permutation(len(pool))
        held = [pool[place] for place in order[:60]]
        try:
            calibrated = calibrate(held, risk, alpha, signal, K)
        except UserError:  # a split of which no threshold is good enough: nothing is promised then
            assert risk == "miss"
            continue
        risks.append(of([pool[place] for place in order[60:360]], calibrated)[0])
    assert len(risks) > 100
    error = np.std(risks, ddof=1) / math.sqrt(len(risks))
    assert np.mean(risks) <= alpha + 2 * error
    if signal == "score":
        assert np.mean(risks) > 0.6 * alpha


def test_without_its_correction_the_risk_would_be_above_alpha() -> None:
    """The test of the guarantee has teeth: the empirical threshold of as few queries fails it."""
    pool = draw(1200, seed=1)
    rng = np.random.default_rng(2)
    risks = []
    for _ in range(200):
        order = rng.permutation(len(pool))
        held = [pool[place] for place in order[:60]]
        naive = calibrate(held, "contradiction", (0.1 * 60 + 1 + 1e-6) / 61, "score", K)  # mean loss <= alpha, no more
        risks.append(of([pool[place] for place in order[60:]], naive)[0])
    assert np.mean(risks) > 0.1 + 2 * np.std(risks, ddof=1) / math.sqrt(len(risks))


def two_kinds(count: int, seed: int) -> list[Answered]:
    """Half of the queries have one report that stands out and fits; of the others any of the twelve may."""
    rng = np.random.default_rng(seed)
    answers = []
    for easy in rng.random(count) < 0.5:
        scores = np.sort(rng.normal(0.5, 0.1 if easy else 0.02, K))[::-1] + (0.4 if easy else 0.1) * (np.arange(K) < 1)
        place = 0 if easy and rng.random() < 0.98 else rng.integers(K)
        answers.append(Answered(scores.tolist(), [False] * K, (np.arange(K) == place).tolist()))
    return answers


def test_at_equal_risk_of_a_miss_fewer_reports_than_a_fixed_k() -> None:
    """One k for all is as large as the hard queries want it; what stands out needs no company."""
    held, asked = two_kinds(2000, seed=3), two_kinds(2000, seed=4)
    calibrated = calibrate(held, "miss", 0.1, "ratio", K)
    risk, kept = of(asked, calibrated)
    by_chance = of(asked, calibrate(held, "miss", 0.1, "chance", K))
    assert max(abs(risk - 0.1), abs(by_chance[0] - 0.1)) < 0.03
    assert by_chance[1] < 1.05 * kept
    fixed = next(k for k in range(1, K + 1) if np.mean([loss(a, k, "miss", K) for a in asked]) <= risk)
    assert kept < 0.75 * fixed
    assert kept < 0.75 * of(asked, calibrate(held, "miss", 0.1, "rank", K))[1]


def test_at_equal_risk_of_a_contradiction_more_reports_than_a_fixed_k() -> None:
    """Fewer reports cannot be had at the same risk where each can only do harm; more of them can."""
    held, asked = draw(3000, seed=5), draw(3000, seed=6)
    rank_risk, rank_k = of(asked, calibrate(held, "contradiction", 0.3, "rank", K))
    signals: tuple[Signal, ...] = ("score", "chance")
    for signal in signals:
        risk, kept = of(asked, calibrate(held, "contradiction", 0.3, signal, K))
        assert max(risk, rank_risk) < 0.33
        assert kept > 1.3 * rank_k
        as_many = max(1, round(kept))
        assert np.mean([loss(found, as_many, "contradiction", K) for found in asked]) > 1.2 * risk


@pytest.mark.parametrize("informative", [True, False])
def test_over_splits_a_fixed_k_of_the_same_risk_is_never_much_better(informative: bool) -> None:
    """Fewer reports against misses, more where each can only do harm: and no worse where scores say nothing at all."""
    harm = draw(800, seed=7, informative=informative)
    help_ = two_kinds(800, seed=7) if informative else harm
    cases: tuple[tuple[list[Answered], Risk, float], ...] = (
        (harm, "contradiction", 0.3), (harm, "contradictions", 0.05), (help_, "miss", 0.1 if informative else 0.45),
    )  # fmt: skip
    for pool, risk, alpha in cases:
        run = over_splits(pool, risk, "chance", alpha, 12, K)
        gained = run["mean_kept"] / run["fixed_k_of_equal_risk"]
        gained = 1 / gained if risk == "miss" else gained
        assert gained > (1.15 if informative else 0.95), run


def test_fewer_reports_at_the_same_contradictions_would_be_the_worse_policy() -> None:
    """A k drawn by lot, whatever the scores, keeps more than the fixed k of its risk: the curve is concave (Jensen).

    And of misses, whose curve is convex, it keeps more too: there it is the worse policy.
    """
    pool, rng = draw(3000, seed=8, informative=False), np.random.default_rng(9)
    both: tuple[Risk, ...] = ("contradiction", "miss")
    for risk in both:
        risks = curve(pool, risk, K)
        bends = np.diff(risks, 2) if risk == "miss" else -np.diff(risks, 2)
        assert bends.min() > -0.01
        sizes = rng.integers(0, K + 1, len(pool))
        lost = np.mean([loss(found, size, risk, K) for found, size in zip(pool, sizes, strict=True)])
        assert sizes.mean() > equal_k(risks, float(lost)) + 0.5


def test_the_fixed_k_of_a_risk_is_found_on_its_curve() -> None:
    assert equal_k(np.array([0.0, 0.2, 0.4]), 0.3) == pytest.approx(1.5)
    assert equal_k(np.array([1.0, 0.5, 0.25]), 0.75) == pytest.approx(0.5)
    assert equal_k(np.array([1.0, 0.5, 0.25]), 0.1) == 2


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000), count=st.integers(20, 60), risk=st.sampled_from(RISKS), signal=st.sampled_from(SIGNALS)
)
def test_the_threshold_is_the_infimum(seed: int, count: int, risk: Risk, signal: Signal) -> None:
    """By definition: over all cuts that any threshold makes, the laxest whose corrected risk is at most alpha."""
    answers = draw(count, seed)
    alpha = 0.5
    try:
        calibrated = calibrate(answers, risk, alpha, signal, K)
    except UserError:
        assert risk == "miss"
        return

    if signal == "chance":  # every third query fitted its model
        answers = [found for place, found in enumerate(answers) if place % 3]
        count = len(answers)

    def corrected(value: float) -> float:
        policy = replace(calibrated, threshold=value)
        return count / (count + 1) * of(answers, policy)[0] + 1 / (count + 1)

    sign = -1 if risk == "miss" else 1
    of_each = (signals_of(found.scores, signal, risk, calibrated.chance) for found in answers)
    places = sorted({sign * value for signals in of_each for value in signals})
    assert corrected(calibrated.threshold) <= alpha + 1e-9
    lower = [place for place in places if place < calibrated.threshold]
    if lower and calibrated.threshold > -math.inf:
        assert corrected(lower[-1]) > alpha


@given(
    scores=st.lists(st.floats(-1, 1), max_size=20).map(lambda found: sorted(found, reverse=True)),
    risk=st.sampled_from(RISKS),
    wrong=st.lists(st.booleans(), min_size=20, max_size=20),
    thresholds=st.tuples(st.floats(-1, 1), st.floats(-1, 1)),
)
def test_losses_never_grow_with_the_threshold(
    scores: list[float], risk: Risk, wrong: list[bool], thresholds: tuple[float, float]
) -> None:
    answer = Answered(scores, wrong[: len(scores)], [not bad for bad in wrong[: len(scores)]])
    low, high = (Calibrated(risk, 0.1, "score", value, 20, 9) for value in sorted(thresholds))
    assert loss(answer, high.keep(scores), risk, 20) <= loss(answer, low.keep(scores), risk, 20)


def test_too_few_queries_are_refused_with_the_number_that_is_enough() -> None:
    with pytest.raises(UserError, match=r"8 queries are too few for alpha 0.1: at least 9 are needed"):
        calibrate(draw(8, 0), "contradiction", 0.1, "score", K)
    calibrate(draw(9, 0), "contradiction", 0.1, "score", K)


def test_a_risk_that_nothing_meets_is_refused() -> None:
    answers = [Answered([0.5], [True], [False])] * 50
    with pytest.raises(UserError, match=r"100.0% of the queries have no supporting report among 12"):
        calibrate(answers, "miss", 0.1, "score", K)
    assert calibrate(answers, "contradiction", 0.1, "score", K).keep([0.5]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 0.0}, "between 0 and 1"), ({"alpha": 1.0}, "between 0 and 1"), ({"k": 0}, "k must be at least 1"),
        ({"risk": "harm"}, "risk is one of"), ({"signal": "length"}, "signal one of"),
    ],
)  # fmt: skip
def test_mistakes(changes: dict[str, object], message: str) -> None:
    options = {"risk": "miss", "alpha": 0.5, "signal": "score", "k": K} | changes
    with pytest.raises(UserError, match=message):
        calibrate(draw(30, 0), **options)  # type: ignore[arg-type]


ASKED = {"where": ["view=PA"], "modality": "image", "labels": ["B", "A"], "other_patients": True}


def test_a_calibration_is_of_its_index_and_of_how_it_was_asked(tmp_path: Path) -> None:
    made = calibrate([Answered([0.5], [False], [True])] * 30, "contradiction", 0.1, "score", K)
    assert made.threshold == -math.inf
    path = tmp_path / "c.json"
    save_calibration(path, made, {"vectors": "abc", **ASKED})
    for asked in (None, {}, ASKED, ASKED | {"labels": ("A", "B"), "k": 1}):
        assert load_calibration(path, "abc", asked) == made
    with pytest.raises(UserError, match="another index"):
        load_calibration(path, "abd", ASKED)
    for other, message in (
        ({"where": []}, "holds for answers with view=PA, not for answers with no filter"),
        ({"modality": "text"}, "holds for image queries, not for text queries"),
        ({"labels": None}, "holds for the labels A, B, not for all labels"),
        ({"labels": ["A"]}, "holds for the labels A, B, not for the labels A"),
        ({"other_patients": False}, "holds for answers of other patients alone, not for answers of the query's own"),
    ):
        with pytest.raises(UserError, match=message):
            load_calibration(path, "abc", ASKED | other)
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | {"risk": "x"}))
    with pytest.raises(UserError, match="is damaged"):
        load_calibration(path, "abc", ASKED)
    wrong = ({"signal": "chance"}, {"chance": {"means": [0.0]}}, {"alpha": 7}, {"alpha": 0}, {"k": 0}, {"queries": -1})
    for broken in (*wrong, {"threshold": "nan"}):
        path.write_text(json.dumps(value | broken))
        with pytest.raises(UserError, match="is damaged"):
            load_calibration(path, "abc", ASKED)
    for name in value.keys() - {"format", "measured"}:
        path.write_text(json.dumps({key: value[key] for key in value if key != name}))
        with pytest.raises(UserError, match="is damaged"):
            load_calibration(path, "abc", ASKED)
    path.write_text(json.dumps(value | {"format": "medclip-lab-calibration/1"}))  # of a bundle
    with pytest.raises(UserError, match="format 'medclip-lab-calibration/1'"):
        load_calibration(path, "abc", ASKED)


def test_a_model_of_chances_is_kept_to_the_bit(tmp_path: Path) -> None:
    answers = draw(60, seed=10)
    made = calibrate(answers, "contradiction", 0.3, "chance", K)
    assert made.queries == 40
    save_calibration(tmp_path / "c.json", made, {"vectors": "abc", **ASKED})
    assert load_calibration(tmp_path / "c.json", "abc", ASKED) == made
    nothing = calibrate([Answered([0.5, 0.4], [False, False], [True, True])] * 60, "contradiction", 0.1, "chance", 2)
    assert nothing.keep([0.9, 0.1]) == 2
    assert nothing.keep([]) == 0
    with pytest.raises(UserError, match=r"8 queries are too few for alpha 0.1: at least 9 are needed beside the 4"):
        calibrate(answers[:12], "contradiction", 0.1, "chance", K)


def test_fewer_reports_than_were_calibrated_may_miss_more_and_contradict_less(tmp_path: Path) -> None:
    for risk, least in (("miss", K), ("contradiction", 1), ("contradictions", 1)):
        made = calibrate([Answered([0.5] * K, [False] * K, [True] * K)] * 30, risk, 0.1, "score", K)  # type: ignore[arg-type]
        save_calibration(tmp_path / "c.json", made, {"vectors": "abc", **ASKED})
        assert load_calibration(tmp_path / "c.json", "abc", {"k": least}) == made
        assert load_calibration(tmp_path / "c.json", "abc", {"k": 2 * K}) == made
    save_calibration(tmp_path / "c.json", replace(made, risk="miss"), {"vectors": "abc", **ASKED})
    with pytest.raises(UserError, match=f"holds for -k {K} or more, not for {K - 1}: fewer reports miss more often"):
        load_calibration(tmp_path / "c.json", "abc", {"k": K - 1})


def test_chances_are_told_by_whole_answers(tmp_path: Path) -> None:
    """Of the first reports alone the model says something else, and more may be kept: nothing is promised."""
    held, asked = draw(3000, seed=11), draw(3000, seed=12)
    made = calibrate(held, "contradiction", 0.1, "chance", K)
    short = replace(made, k=2)
    more = [found for found in asked if short.keep(found.scores) > made.keep(found.scores)]
    assert more, "the case is worth a refusal"
    save_calibration(tmp_path / "c.json", made, {"vectors": "abc", **ASKED})
    with pytest.raises(UserError, match=f"holds for -k {K} or more, not for 2: the scores of fewer reports tell other"):
        load_calibration(tmp_path / "c.json", "abc", {"k": 2})
    assert load_calibration(tmp_path / "c.json", "abc", {"k": 2 * K}) == made


def test_ratio_is_that_of_mmed_rag() -> None:
    policy = Ratio(1.5)
    assert policy.keep([0.9, 0.7, 0.61, 0.6, 0.5]) == 3  # 0.9 / 0.6 is 1.5, and not below it
    assert policy.keep([0.2, -0.1, -0.2]) == 1  # its quotient is below 1.5, and means nothing
    assert policy.keep([-0.1, -0.2]) == 1
    assert policy.keep([]) == 0
    with pytest.raises(UserError, match="ratio must be above 1"):
        Ratio(1.0)


def test_fixed_k() -> None:
    assert [FixedK(3).keep([0.5] * count) for count in (0, 2, 5)] == [0, 2, 3]
    with pytest.raises(UserError, match="at least 1"):
        FixedK(0)
