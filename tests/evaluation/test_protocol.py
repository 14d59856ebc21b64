import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medclip_lab.data.manifest import Manifest
from medclip_lab.errors import UserError
from medclip_lab.evaluation.protocol import (
    HeldOut,
    Scoring,
    blur,
    encode_split,
    evaluate,
    label_truth,
    paired_retrieval,
    shuffle_labels,
    summary,
    zero_shot,
)
from medclip_lab.inference.encoder import Encoder, load
from medclip_lab.inference.labelset import LabelPrompts, LabelSet


@pytest.fixture(scope="module")
def encoder(toy_bundle: Path) -> Encoder:
    return load(toy_bundle, device="cpu")


@pytest.fixture(scope="module")
def results(encoder: Encoder, toy_shards: Manifest) -> dict[str, Any]:
    return evaluate(encoder, toy_shards.folder, draws=100)


def every(value: Any, path: str = "") -> Any:
    """Each place in a JSON-like value with what stands there."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    yield path, value
    for name, part in inner:
        yield from every(part, f"{path}.{name}")


def test_toy_task_is_solved_and_controls_are_not(
    results: dict[str, Any], encoder: Encoder, toy_shards: Manifest
) -> None:
    rows = {row["name"]: row for row in results["zero_shot"]["labels"]}
    heart = rows["Cardiomegaly"]
    assert heart["auroc"] > 0.9
    assert heart["low"] <= heart["auroc"] <= heart["high"]
    assert heart["metrics"]["auprc"]["value"] > 0.9
    assert heart["prevalence"] == pytest.approx(heart["positives"] / (heart["positives"] + heart["negatives"]))
    edema = rows["Edema"]
    assert (edema["auroc"], edema["low"], edema["high"], edema["positives"], edema["negatives"]) == (None,) * 3 + (0, 0)
    assert edema["reason"] == "not labelled in this data"
    assert results["studies"] == toy_shards.count("test")
    assert "Cardiomegaly" in summary(results)
    shuffled = evaluate(encoder, toy_shards.folder, draws=20, control=True)
    assert shuffled["zero_shot"]["macro"]["auroc"] < 0.85
    assert shuffled["shuffled_labels"]


def test_a_result_names_what_it_rests_on(results: dict[str, Any], encoder: Encoder) -> None:
    shot = results["zero_shot"]
    assert results["bundle"] == encoder.fingerprint
    assert (shot["score"], shot["rule"], shot["labelset"]) == ("sigmoid", "sigmoid", "chexpert14")
    assert len(shot["labelset_hash"]) == len(results["shards"]) == 64
    assert shot["no_finding"] == {"No Finding": "prompts of its own"}
    assert shot["groups"]["competition"]["labels"] == 1
    assert shot["calibration"] is None
    assert results["versions"]["medclip_lab"]
    assert "no threshold, no probability" in summary(results)


def test_what_is_missing_has_its_reason(results: dict[str, Any]) -> None:
    json.loads(json.dumps(results, allow_nan=False))
    for path, value in every(results):
        if isinstance(value, dict) and "value" in value and value["value"] is None:
            assert value["reason"], path
    heart = next(row for row in results["zero_shot"]["labels"] if row["name"] == "Cardiomegaly")
    assert heart["metrics"]["f1"] == {"value": None, "reason": "not calibrated: no threshold, no probability"}
    assert "nan" not in summary(results).lower()


def test_blur_changes_the_image_and_nothing_else(encoder: Encoder, toy_shards: Manifest) -> None:
    sharp, _ = encode_split(encoder, toy_shards.folder, "test")
    soft, _ = encode_split(encoder, toy_shards.folder, "test", change=blur(0.2))
    assert sharp.study_ids == soft.study_ids
    assert np.abs(sharp.features - soft.features).max() > 1e-3
    np.testing.assert_array_equal(sharp.text_features, soft.text_features)


def test_states_of_labels() -> None:
    labels: list[dict[str, int | None]] = [{"a": 1}, {"a": 0}, {"a": -1}, {"a": None, "c": 0}, {"a": None}, {}]
    positive, used = label_truth(labels, "a")
    assert positive.tolist() == [True, False, False, False, False, False]
    assert used.tolist() == [True, True, False, True, False, False], "a study without a single label is not labelled"
    assert not label_truth(labels, "b")[1].any()


def test_shuffling_keeps_the_labels(encoder: Encoder, toy_shards: Manifest) -> None:
    held_out, _ = encode_split(encoder, toy_shards.folder, "test")
    other = shuffle_labels(held_out, 0)
    assert other.labels != held_out.labels
    assert sorted(map(str, other.labels)) == sorted(map(str, held_out.labels))


def test_a_set_that_does_not_fit_the_data(encoder: Encoder, toy_shards: Manifest) -> None:
    with pytest.raises(UserError, match="no label of set 'pneumonia'"):
        evaluate(encoder, toy_shards.folder, labelset="pneumonia")


def test_the_rule_is_a_choice(encoder: Encoder, toy_shards: Manifest) -> None:
    scoring = Scoring("pair_softmax", temperature=0.5)
    shot = evaluate(encoder, toy_shards.folder, draws=10, scoring=scoring)["zero_shot"]
    assert (shot["score"], shot["rule"]) == ("pair_softmax", "pair_softmax(T=0.5)")
    shot = evaluate(encoder, toy_shards.folder, draws=10, scoring=Scoring("max_similarity", batch_zscore=True))[
        "zero_shot"
    ]
    assert "transductive" in shot["rule"]


def test_two_models_on_the_same_patients(encoder: Encoder, toy_shards: Manifest) -> None:
    same = evaluate(encoder, toy_shards.folder, draws=20, compare=encoder)
    test = same["zero_shot"]["comparison"]["macro"]["auroc"]
    assert (test["difference"], test["p"]) == (0.0, 1.0)
    assert f"auroc less that of {encoder.fingerprint[:12]}" in summary(same)


def test_an_ensemble_with_itself_is_itself(encoder: Encoder, toy_shards: Manifest, results: dict[str, Any]) -> None:
    both = evaluate(encoder, toy_shards.folder, draws=10, ensemble=[encoder])
    assert both["ensemble"] == [encoder.fingerprint]
    assert both["zero_shot"]["rule"] == "mean scores of 2 checkpoints, sigmoid"
    assert both["zero_shot"]["macro"]["auroc"] == results["zero_shot"]["macro"]["auroc"]


@pytest.fixture
def exclusive(tmp_path: Path) -> Path:
    path = tmp_path / "size.yaml"
    path.write_text(
        "name: size\nexclusive: true\nlabels:\n"
        "  - {name: Cardiomegaly, positive: [The heart is enlarged.]}\n"
        "  - {name: Edema, positive: [Heart size is normal.]}\n"
    )
    return path


def test_exclusive_sets_have_an_accuracy(encoder: Encoder, toy_shards: Manifest, exclusive: Path) -> None:
    result = evaluate(encoder, toy_shards.folder, labelset=exclusive, draws=20)
    told = result["zero_shot"]["exclusive"]
    heart = next(row for row in result["zero_shot"]["labels"] if row["name"] == "Cardiomegaly")
    assert told["images"] == heart["positives"], "the other images have no label of the set"
    assert told["left_out"] == heart["negatives"]
    assert told["accuracy"]["value"] > 0.8
    assert np.sum(told["confusion"]["counts"]) == told["images"]


def test_labels_under_another_name_are_told(encoder: Encoder, toy_shards: Manifest) -> None:
    labels = [
        LabelPrompts("Cardiomegaly", ["The heart is enlarged."], ["Heart size is normal."]),
        LabelPrompts("Effusion", ["Effusion."], ["No effusion."]),
    ]
    held_out, _ = encode_split(encoder, toy_shards.folder, "test")
    for row in held_out.labels:
        row["Pleural Effusion"] = 0
    shot = zero_shot(encoder, held_out, LabelSet("own", labels), draws=5)
    assert shot["labels"][1]["reason"] == "not labelled in this data; did you mean 'Pleural Effusion'?"


def test_duplicate_reports_collapse_or_count_together() -> None:
    rng = np.random.default_rng(0)
    texts = ["normal", "normal", "normal", "a", "b", ""]
    features = rng.normal(size=(6, 8)).astype(np.float32)
    of_text = {text: rng.normal(size=8) for text in texts}
    held_out = HeldOut(
        features,
        np.stack([of_text[text] for text in texts if text]).astype(np.float32),
        [str(number) for number in range(6)],
        [str(number) for number in range(6)],
        [{"Edema": number % 2} for number in range(6)],
        texts,
    )
    together, collapsed = paired_retrieval(held_out), paired_retrieval(held_out, collapse=True)
    assert together is not None
    assert collapsed is not None
    for found in (together, collapsed):
        assert found["distinct_texts"] == 3
        assert found["image_to_text"]["queries"] == 5
    assert (together["text_to_image"]["queries"], together["image_to_text"]["gallery"]) == (5, 5)
    assert (collapsed["text_to_image"]["queries"], collapsed["image_to_text"]["gallery"]) == (3, 3)
    ranks = [
        1
        + sum(features[row] @ of_text[other] >= features[row] @ of_text[texts[row]] for other in ("normal", "a", "b"))
        - 1
        for row in range(5)
    ]
    assert collapsed["image_to_text"]["median_rank"] == np.median(ranks)
    assert together["by_findings"]["image_to_image"]["gallery"] == 4
