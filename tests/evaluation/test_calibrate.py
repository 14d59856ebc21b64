import json
import re
import shutil
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import matthews_corrcoef, roc_curve

from medclip_lab.data.manifest import Manifest
from medclip_lab.errors import UserError
from medclip_lab.evaluation.calibrate import (
    ThresholdRule,
    calibrate,
    fit_curve,
    fit_domain,
    fit_label,
    shuffle_tiles,
    summary,
    wilson,
)
from medclip_lab.evaluation.metrics import calibration_error
from medclip_lab.evaluation.protocol import Scoring, evaluate
from medclip_lab.inference.calibration import Calibration, Method, mahalanobis
from medclip_lab.inference.encoder import load


def sample(seed: int, size: int = 4000) -> tuple[Any, Any]:
    """Scores far from probabilities, as a SigLIP model gives them, of a finding in one of six."""
    rng = np.random.default_rng(seed)
    positive = rng.random(size) < 1 / 6
    return 1 / (1 + np.exp(8 - 2 * positive - rng.normal(size=size))), positive


@pytest.mark.parametrize("method", get_args(Method))
def test_probabilities_hold_on_other_patients(method: Method) -> None:
    curve = fit_curve(*sample(0), method, True)
    scores, positive = sample(1)
    before, after = (calibration_error(p, positive)[0] for p in (scores, curve.probability(scores)))
    assert before > 0.15
    if method == "temperature":
        assert after < before, "one number cannot move scores that are all far below one half to where they belong"
    else:
        assert after < 0.02


def test_temperature_mends_what_it_can() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=4000)
    positive = rng.random(4000) < 1 / (1 + np.exp(-z))
    curve = fit_curve(1 / (1 + np.exp(-5 * z)), positive, "temperature", True)
    assert curve.parameters["temperature"] == pytest.approx(5, rel=0.1)


def test_platt_is_finite_where_classes_are_apart() -> None:
    scores, positive = np.array([0.1] * 6 + [0.9] * 6), np.arange(12) >= 6
    probabilities = fit_curve(scores, positive, "platt", True).probability(scores)
    np.testing.assert_allclose(probabilities, np.where(positive, 7 / 8, 1 / 8), atol=1e-4)  # Platt's targets


def test_platt_equals_its_own_optimum() -> None:
    """The gradient of the smoothed likelihood is zero in slope and intercept."""
    scores, positive = sample(2, 500)
    curve = fit_curve(scores, positive, "platt", True)
    count = positive.sum()
    target = np.where(positive, (count + 1) / (count + 2), 1 / (500 - count + 2))
    off = curve.probability(scores) - target
    assert abs(off.mean()) < 1e-5
    assert abs((off * curve.feature(scores)).mean()) < 1e-4


@given(st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_thresholds_are_the_best(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probabilities, positive = rng.integers(0, 12, 40) / 12, rng.random(40) < 0.4
    if positive.all() or not positive.any():
        return
    fpr, tpr, at = roc_curve(positive, probabilities, drop_intermediate=False)

    def figures(threshold: float) -> tuple[float, float, float]:
        decided = probabilities >= threshold
        sensitivity, alarms = decided[positive].mean(), decided[~positive].mean()
        return sensitivity - alarms, matthews_corrcoef(positive, decided), sensitivity

    youden = ThresholdRule.parse("youden").choose(probabilities, positive)
    assert figures(youden)[0] == pytest.approx(max(tpr - fpr) if max(tpr - fpr) > 0 else figures(youden)[0])
    mcc = ThresholdRule.parse("mcc").choose(probabilities, positive)
    best = max(figures(value)[1] for value in at[1:])
    assert figures(mcc)[1] == pytest.approx(best) or best <= 0
    sensitive = ThresholdRule.parse("sensitivity=0.8").choose(probabilities, positive)
    assert figures(sensitive)[2] >= 0.8 - 1e-9
    higher = at[(at > sensitive) & np.isfinite(at)]
    assert all(figures(value)[2] < 0.8 for value in higher)


def test_labels_that_cannot_be_calibrated_have_a_reason() -> None:
    rule = ThresholdRule("youden")
    few = np.arange(50) < 3
    for scores, positive, reason in (
        (np.zeros(0), np.zeros(0, bool), "not labelled in the validation data"),
        (np.linspace(0, 1, 50), few, "3 of one class in the validation data; at least 5 are needed"),
        (np.linspace(0, 1, 50), np.arange(50) < 20, r"no better than chance \(AUROC 0.00\)"),
        (np.full(50, 0.5), np.arange(50) < 20, r"no better than chance \(AUROC 0.50\)"),
    ):
        row = fit_label("a", scores, positive, "platt", rule, True)
        assert row["parameters"] is None
        assert row["threshold"] is None
        assert re.search(reason, row["reason"]), row["reason"]
    row = fit_label("a", np.linspace(0.1, 0.9, 50), np.arange(50) > 30, "platt", rule, True)
    assert (row["n"], row["positives"], row["prevalence"]) == (50, 19, 0.38)
    assert (row["sensitivity"], row["specificity"]) == (1.0, 1.0)


@pytest.mark.parametrize("text", ["best", "sensitivity", "sensitivity=high", "sensitivity=1.5", "youden=1"])
def test_rules_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match=r"is none of youden, mcc, sensitivity=0\.95"):
        ThresholdRule.parse(text)


def test_the_domain_alarms_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(16, 16))
    features = (rng.normal(size=(3000, 16)) @ mix).astype(np.float32)
    domain, facts = fit_domain(features, [f"p{number // 2}" for number in range(3000)], 0.05)
    measured = facts["false_alarms"]
    assert measured["low"] < measured["value"] < measured["high"]
    assert measured["value"] == pytest.approx(0.05, abs=0.03)
    others = (rng.normal(size=(2000, 16)) @ mix).astype(np.float32)
    assert (mahalanobis(others, **domain) > facts["threshold"]).mean() == pytest.approx(0.05, abs=0.02)
    strange = rng.normal(size=(500, 16)).astype(np.float32) * 8
    assert (mahalanobis(strange, **domain) > facts["threshold"]).mean() > 0.9
    with pytest.raises(UserError, match="3 images of 3 patients are too few: take at least 20 of 8"):
        fit_domain(features[:3], ["a", "b", "c"], 0.05)


def test_wilson_by_hand() -> None:
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-3)
    assert wilson(10, 20) == pytest.approx((0.2993, 0.7007), abs=1e-3)


def test_shuffled_tiles_are_the_same_greys_elsewhere() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 80), dtype=np.uint8)
    mixed = np.asarray(shuffle_tiles(Image.fromarray(pixels)))
    assert sorted(mixed.ravel()) == sorted(pixels.ravel())
    assert (mixed != pixels).mean() > 0.9
    assert shuffle_tiles(Image.new("L", (5, 70))).size == (8, 64)


@pytest.fixture(scope="module")
def calibrated(toy_bundle: Path, toy_shards: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = Path(shutil.copytree(toy_bundle, tmp_path_factory.mktemp("calibrated") / "bundle"))
    calibration = calibrate(load(bundle, device="cpu"), toy_shards.folder, "chexpert14", "train", command="pytest")
    calibration.save(bundle)
    assert "Cardiomegaly" in summary(calibration)
    return bundle


def test_a_calibrated_bundle_decides(calibrated: Path, toy_bundle: Path, toy_shards: Manifest, toy_image: Path) -> None:
    encoder = load(calibrated, device="cpu")
    assert encoder.fingerprint == load(toy_bundle, device="cpu").fingerprint, "embeddings are the same"
    row = encoder.zero_shot_classifier().classify([toy_image])[0]
    heart, edema = row["labels"]["Cardiomegaly"], row["labels"]["Edema"]
    assert 0 < heart["probability"] < 1
    assert heart["decision"] == (heart["probability"] >= heart["threshold"]) == (heart["operating"] >= 0.5)
    assert (edema["probability"], edema["decision"]) == (None, None)
    assert edema["reason"] == "not labelled in the validation data"
    assert set(row["out_of_domain"]) == {"distance", "threshold", "flag"}
    result = evaluate(encoder, toy_shards.folder, draws=50)
    shot = result["zero_shot"]
    heart = next(label for label in shot["labels"] if label["name"] == "Cardiomegaly")
    assert heart["metrics"]["accuracy"]["value"] > 0.8
    assert heart["metrics"]["ece"]["value"] < 0.3
    assert 0 < heart["metrics"]["ece"]["if_perfect"] < 0.3
    assert sum(part["count"] for part in heart["reliability"]) == heart["positives"] + heart["negatives"]
    assert shot["calibration"]["shared_patients"] == 0
    assert shot["calibration"]["split"] == "train"
    assert 0 <= shot["calibration"]["out_of_domain"]["flagged"] <= 1
    json.dumps(result, allow_nan=False)


def test_another_rule_or_set_is_not_calibrated(calibrated: Path, toy_image: Path) -> None:
    encoder = load(calibrated, device="cpu")
    for classifier in (
        encoder.zero_shot_classifier("chexpert14", "pair_softmax"),
        encoder.zero_shot_classifier("rsna"),
        encoder.zero_shot_classifier("chexpert14", calibrated=False),
    ):
        row = classifier.classify([toy_image])[0]
        assert row["out_of_domain"] is None
        assert all(value["decision"] is None for value in row["labels"].values())


def test_patients_of_the_calibration_are_no_test(calibrated: Path, toy_shards: Manifest) -> None:
    encoder = load(calibrated, device="cpu")
    with pytest.raises(UserError, match=r"45 of 45 patients are those the calibration was made with"):
        evaluate(encoder, toy_shards.folder, "train", draws=5)
    scores = evaluate(encoder, toy_shards.folder, "train", draws=5, scoring=Scoring(calibrated=False))
    assert scores["zero_shot"]["calibration"] is None


def test_what_is_kept_of_patients(calibrated: Path, toy_shards: Manifest) -> None:
    facts = json.loads((calibrated / "calibration.json").read_text())["labelsets"]["chexpert14"]
    assert len(facts["patients"]["hashes"]) == 45
    assert "patient-" not in (calibrated / "calibration.json").read_text()
    tensors = (calibrated / "calibration.safetensors").read_bytes()
    width = 16
    assert len(tensors) < 4 * (width + width * width) + 1000, "mean and covariance, and no image's embedding"


def test_a_second_set_joins_and_a_second_time_replaces(calibrated: Path, toy_shards: Manifest, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(calibrated, tmp_path / "bundle"))
    own = tmp_path / "own.yaml"
    own.write_text(
        "name: own\nlabels:\n"
        "  - {name: Cardiomegaly, positive: [The heart is enlarged.], negative: [Heart size is normal.]}\n"
    )
    for method in ("platt", "isotonic"):
        calibrate(load(bundle, device="cpu"), toy_shards.folder, own, "train", method=method).save(bundle)  # type: ignore[arg-type]
    assert Calibration.load(bundle, "chexpert14") is not None
    again = Calibration.load(bundle, "own")
    assert again is not None
    assert again.facts["method"] == "isotonic"
    assert load(bundle, device="cpu").zero_shot_classifier(own).calibration is not None
    assert Calibration.load(bundle, "rsna") is None
    (bundle / "calibration.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="cannot read"):
        Calibration.load(bundle, "own")
    with pytest.raises(UserError, match=r"calibration.safetensors was changed after export"):
        load(bundle, device="cpu")


def test_a_save_that_breaks_off_leaves_the_bundle(
    calibrated: Path, toy_shards: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(shutil.copytree(calibrated, tmp_path / "bundle"))
    calibration = Calibration.load(bundle, "chexpert14")
    assert calibration is not None
    calibration.facts["command"] = "another"  # else what was half-written would be what stood there before

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("medclip_lab.inference.calibration.save_file", full)
    with pytest.raises(OSError, match="no space"):
        calibration.save(bundle)
    assert load(bundle, device="cpu").zero_shot_classifier().calibration is not None


def test_mistakes(toy_bundle: Path, toy_shards: Manifest) -> None:
    encoder = load(toy_bundle, device="cpu")

    def refused(match: str, split: str = "val", labelset: str = "chexpert14", **options: Any) -> None:
        with pytest.raises(UserError, match=match) as error:
            calibrate(encoder, toy_shards.folder, labelset, split, **options)
        assert "\n" not in str(error.value)

    refused("split 'test' is for evaluation alone", "test")
    refused("split 'val\\+test' is for evaluation alone", "val+test")
    refused("no method is called 'plat'; did you mean 'platt'", method="plat")
    refused("is none of youden", threshold="best")
    refused("a share between 0 and 1", false_alarm=1.5)
    refused("a temperature needs scores in", method="temperature", scoring=Scoring("max_similarity"))
    refused("depends on the other images", scoring=Scoring(batch_zscore=True))
    refused("no label of set 'pneumonia' can be calibrated; Pneumonia: not labelled", "train", "pneumonia")


def test_patients_that_are_test_patients_too(
    toy_bundle: Path, toy_shards: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medclip_lab.evaluation.calibrate._test_patients", lambda _: {"patient-0"})
    with pytest.raises(UserError, match="1 patients of split 'train' stand in split 'test' too"):
        calibrate(load(toy_bundle, device="cpu"), toy_shards.folder, "chexpert14", "train")
