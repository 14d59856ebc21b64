from pathlib import Path

import numpy as np
import pytest

from medclip_lab.data.manifest import Manifest
from medclip_lab.errors import UserError
from medclip_lab.evaluation.protocol import blur, encode_split, evaluate, label_truth, shuffle_labels, summary
from medclip_lab.inference.encoder import load


def test_toy_task_is_solved_and_controls_are_not(toy_bundle: Path, toy_shards: Manifest) -> None:
    encoder = load(toy_bundle, device="cpu")
    results = evaluate(encoder, toy_shards.folder, draws=100)
    rows = {row["name"]: row for row in results["zero_shot"]["labels"]}
    assert rows["Cardiomegaly"]["auroc"] > 0.9
    assert rows["Edema"] == {
        "name": "Edema",
        "auroc": None,
        "low": None,
        "high": None,
        "positives": 0,
        "negatives": 0,
        "reason": "not labelled in this data",
    }
    assert results["studies"] == toy_shards.count("test")
    assert "Cardiomegaly" in summary(results)
    assert "nan" not in summary(results).lower()
    shuffled = evaluate(encoder, toy_shards.folder, draws=20, control=True)
    assert shuffled["zero_shot"]["macro"]["auroc"] < 0.85
    assert shuffled["shuffled_labels"]


def test_blur_changes_the_image_and_nothing_else(toy_bundle: Path, toy_shards: Manifest) -> None:
    encoder = load(toy_bundle, device="cpu")
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


def test_shuffling_keeps_the_labels(toy_bundle: Path, toy_shards: Manifest) -> None:
    held_out, _ = encode_split(load(toy_bundle, device="cpu"), toy_shards.folder, "test")
    other = shuffle_labels(held_out, 0)
    assert other.labels != held_out.labels
    assert sorted(map(str, other.labels)) == sorted(map(str, held_out.labels))


def test_a_set_that_does_not_fit_the_data(toy_bundle: Path, toy_shards: Manifest) -> None:
    with pytest.raises(UserError, match="no label of set 'pneumonia'"):
        evaluate(load(toy_bundle, device="cpu"), toy_shards.folder, labelset="pneumonia")
