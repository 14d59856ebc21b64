import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medclip_lab.inference.calibration import (
    Calibration,
    Curve,
    hash_patients,
    logit,
    mahalanobis,
    operating,
    patient_hash,
)

CURVES = [
    Curve("platt", {"slope": 2.0, "intercept": -1.0}, True),
    Curve("platt", {"slope": 30.0, "intercept": -4.0}, False),
    Curve("temperature", {"temperature": 0.5}, True),
    Curve("isotonic", {"scores": [0.1, 0.4, 0.9], "probabilities": [0.0, 0.3, 1.0]}, True),
]


@pytest.mark.parametrize("curve", CURVES, ids=lambda curve: f"{curve.method}-{curve.of_logit}")
def test_a_probability_never_falls_as_the_score_rises(curve: Curve) -> None:
    scores = np.r_[0.0, np.geomspace(1e-30, 1, 200)]
    probabilities = curve.probability(scores)
    assert np.isfinite(probabilities).all()
    assert (np.diff(probabilities) >= 0).all()
    assert (probabilities >= 0).all()
    assert (probabilities <= 1).all()


def test_curves_by_hand() -> None:
    assert CURVES[0].probability(np.array([0.5]))[0] == pytest.approx(1 / (1 + np.e))
    assert CURVES[1].probability(np.array([0.2]))[0] == pytest.approx(1 / (1 + np.exp(-2)))
    assert CURVES[2].probability(np.array([0.8]))[0] == pytest.approx(16 / 17)  # odds 4 become 4 ** 2
    np.testing.assert_allclose(CURVES[3].probability(np.array([0.0, 0.25, 0.65, 1.0])), [0.0, 0.15, 0.65, 1.0])
    assert np.isfinite(logit(np.array([0.0, 1.0]))).all()


@given(st.floats(0, 1), st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_the_operating_point_is_a_half(threshold: float, values: list[float]) -> None:
    probabilities = np.sort(np.array([*values, threshold]))
    mapped = operating(probabilities, threshold)
    assert operating(np.array([threshold]), threshold)[0] == 0.5
    np.testing.assert_array_equal(mapped >= 0.5, probabilities >= threshold)
    assert (np.diff(mapped) >= 0).all()
    assert (mapped >= 0).all()
    assert (mapped <= 1).all()


def test_operating_by_hand() -> None:
    np.testing.assert_allclose(operating(np.array([0.0, 0.1, 0.2, 0.6, 1.0]), 0.2), [0.0, 0.25, 0.5, 0.75, 1.0])


def test_distance_is_in_deviations() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(4000, 3)) * [1, 2, 5] + [3, 0, 0]
    values, vectors = np.linalg.eigh(np.cov(features.T))
    found = mahalanobis(np.array([[3.0, 0, 0], [3, 4, 0], [3, 0, 15]]), features.mean(0), vectors / np.sqrt(values))
    np.testing.assert_allclose(found, [0, 2, 3], atol=0.15)


def test_patients_are_hashed_with_a_salt() -> None:
    one, other = hash_patients(["p1", "p2", "p1"]), hash_patients(["p1", "p2"])
    assert len(one["hashes"]) == 2
    assert not set(one["hashes"]) & set(other["hashes"]), "two files cannot be joined"
    assert patient_hash("p1", one["salt"]) in one["hashes"]
    assert "p1" not in str(one)


def test_a_score_at_the_threshold_is_a_finding() -> None:
    threshold = float(CURVES[0].probability(np.array([0.5]))[0])
    rows = [
        {"name": "a", "parameters": CURVES[0].parameters, "threshold": threshold},
        {"name": "b", "parameters": None, "threshold": None, "reason": "too few"},
    ]
    made = Calibration({"method": "platt", "of_logit": True, "labels": rows}, {})
    at = made.answer("a", 0.5)
    assert (at["decision"], at["operating"], at["threshold"]) == (True, 0.5, threshold)
    assert made.answer("a", 0.4999)["decision"] is False
    assert made.answer("b", 0.5) == {"reason": "too few"}
