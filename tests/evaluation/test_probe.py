"""Probes, neighbours and learned prompts: against scikit-learn, against the real prompt, and against no signal."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from medclip_lab.data.manifest import Manifest
from medclip_lab.errors import UserError
from medclip_lab.evaluation.gather import Labelled, gather
from medclip_lab.evaluation.knn import knn, knn_scores
from medclip_lab.evaluation.probe import _share, _shots, fit, k_shot, linear_probe
from medclip_lab.evaluation.prompt_learning import LearnedPrompts, PromptLearning, learn_prompts
from medclip_lab.inference.encoder import Encoder, load


def labelled(part: str, studies: int = 120, seed: int = 0, noise: float = 1.0) -> Labelled:
    """Two labels along the first two directions, a third that is always absent; two studies a patient."""
    rng = np.random.default_rng((seed, len(part)))
    features = rng.normal(size=(studies, 8)).astype(np.float32)
    positive = features[:, :3] + noise * rng.normal(size=(studies, 3)) > 0
    positive[:, 2] = False
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    patients = [f"{part}-{row // 2}" for row in range(studies)]
    return Labelled(["a", "b", "c"], features, positive, np.ones((studies, 3), bool), patients)


def test_fit_is_scikit_learns_logistic_regression() -> None:
    train, test = labelled("train"), labelled("test")
    direct = LogisticRegression(C=10.0, max_iter=1000).fit(train.features.astype(np.float64), train.positive[:, 0])
    expected = direct.decision_function(test.features.astype(np.float64))
    scores = fit(train.features, train.positive[:, 0], 10.0)(test.features)
    np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_linear_probe_finds_what_is_there_and_nothing_else() -> None:
    train, val, test = labelled("train", noise=0.2), labelled("val", noise=0.2), labelled("tests", noise=0.2)
    result = linear_probe(train, val, test, draws=100)
    a, b, c = result["labels"]
    assert a["auroc"] > 0.9
    assert a["low"] < a["auroc"] < a["high"]
    assert b["auroc"] > 0.9
    assert (c["auroc"], c["reason"]) == (None, "train: one class only")
    assert result["macro"]["labels"] == 2
    shuffled = replace(train, positive=np.random.default_rng(0).permutation(train.positive))
    assert linear_probe(shuffled, val, test, draws=10)["macro"]["auroc"] < 0.75


def test_strength_is_chosen_on_validation_patients_and_not_on_test() -> None:
    """With a validation set whose truth is turned round, the worst strength wins: the test set has no say."""
    train, val, test = labelled("train", noise=0.2), labelled("val", noise=0.2), labelled("tests", noise=0.2)
    right = linear_probe(train, val, test, draws=10)
    turned = linear_probe(train, replace(val, positive=~val.positive), test, draws=10)
    assert turned["macro"]["auroc"] <= right["macro"]["auroc"]
    assert turned["C"] != right["C"]


def test_shared_patients_are_refused() -> None:
    train = labelled("train")
    with pytest.raises(UserError, match="60 patients stand in train and in test"):
        linear_probe(train, labelled("val"), train)
    with pytest.raises(UserError, match="stand in train and in test"):
        knn(train, train)


def test_shots_are_k_of_each_class_from_different_patients() -> None:
    data = labelled("train")
    rows = _shots(data, 0, 8, np.random.default_rng(0))
    assert rows is not None
    for wanted in (True, False):
        of_class = [int(row) for row in rows if data.positive[row, 0] == wanted]
        assert len(of_class) == 8
        assert len({data.patients[row] for row in of_class}) == 8
    assert _shots(data, 0, 70, np.random.default_rng(0)) is None
    assert len({data.patients[row] for row in _share(data, 0.1, np.random.default_rng(0))}) == 6


def test_more_shots_are_better_and_settings_that_cannot_be_say_why() -> None:
    train, val, test = labelled("train", noise=0.2), labelled("val", noise=0.2), labelled("tests", noise=0.2)
    rows = k_shot(train, val, test, shots=(1, 16, 100), shares=(0.5, 1.0), seeds=3, draws=20)
    one, many, too_many, half, whole = rows
    assert one["auroc"] < many["auroc"]
    assert one["high"] - one["low"] > many["high"] - many["low"], "luck of the draw is part of the interval"
    assert too_many["auroc"] is None
    assert too_many["left_out"]["a"] == "too few patients of a class for shots 100"
    assert half["auroc"] == pytest.approx(whole["auroc"], abs=0.1)
    assert whole["seeds"] == 1


def test_neighbours_are_scikit_learns() -> None:
    train, test = labelled("train"), labelled("tests", 50)
    peer = KNeighborsClassifier(
        n_neighbors=7, metric="cosine", algorithm="brute", weights=lambda distances: np.exp((1 - distances) / 0.07)
    ).fit(train.features, train.positive[:, 1])
    scores = knn_scores(train, 1, test.features, k=7)
    np.testing.assert_allclose(scores, peer.predict_proba(test.features)[:, 1], atol=1e-4)
    one_by_one = [knn_scores(train, 1, row[None], k=7)[0] for row in test.features]
    np.testing.assert_allclose(scores, one_by_one, rtol=1e-12)
    assert knn(train, test, draws=10)["labels"][2]["reason"] == "train: one class only"


def test_neighbours_without_a_say_do_not_vote() -> None:
    train, test = labelled("train"), labelled("tests", 10)
    half = np.ones_like(train.used)
    half[::2] = False
    fewer = replace(
        train,
        features=train.features[1::2],
        positive=train.positive[1::2],
        used=train.used[1::2],
        patients=train.patients[1::2],
    )
    expected = knn_scores(fewer, 0, test.features, k=100)
    np.testing.assert_array_equal(knn_scores(replace(train, used=half), 0, test.features, k=100), expected)


@pytest.fixture(scope="module")
def encoder(toy_bundle: Path) -> Encoder:
    return load(toy_bundle, device="cpu")


def test_learned_context_of_real_words_is_the_prompt_of_these_words(encoder: Encoder) -> None:
    """With the embeddings of real tokens as context, the features are those of the whole sentence."""
    sentence, name = "the heart is enlarged", "enlarged"
    ids = encoder.tokenizer([f"{sentence}."])[0]
    words = encoder.tokenizer([f"{name}."])[0]
    count = int((ids != 0).sum() - (words != 0).sum())
    prompts = LearnedPrompts(encoder, [name], context=count, seed=0)
    with torch.no_grad():
        prompts.vectors[0] = prompts.embedding.weight[ids[1 : 1 + count]]
        present, absent = prompts.features()
    np.testing.assert_allclose(present.numpy(), encoder.encode_texts([f"{sentence}."]), atol=1e-6)
    assert np.abs(absent.numpy() - present.numpy()).max() > 1e-3
    plain = encoder.encode_texts([f"{name}."])
    np.testing.assert_array_equal(encoder.encode_texts([f"{name}."]), plain)
    assert not prompts.embedding._forward_hooks, "the tower is as it was"


def test_prompts_are_learned_and_no_weight_changes(encoder: Encoder, toy_shards: Manifest) -> None:
    parts = {
        split: Labelled.of(gather(encoder, toy_shards.folder, split, texts=False).held_out, ["Cardiomegaly", "Edema"])
        for split in ("train", "val", "test")
    }
    before = {name: value.clone() for name, value in encoder.model.state_dict().items()}
    prompts, result = learn_prompts(
        encoder, parts["train"], parts["val"], parts["test"], PromptLearning(steps=30, check_every=5)
    )
    assert result["labels"][0]["auroc"] > 0.9
    assert result["labels"][1] == {"name": "Edema", "auroc": None, "reason": "train: not labelled in this data"}
    assert prompts.names == ["Cardiomegaly"]
    for name, value in encoder.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.requires_grad for parameter in encoder.model.parameters())
    with pytest.raises(UserError, match="no label has both classes"):
        learn_prompts(encoder, labelled("x"), replace(labelled("yy"), used=np.zeros((120, 3), bool)), labelled("zzz"))


def test_a_context_that_does_not_fit_is_refused(encoder: Encoder) -> None:
    with pytest.raises(UserError, match="20 context vectors and the longest label do not fit"):
        LearnedPrompts(encoder, ["Enlarged Cardiomediastinum"], context=20, seed=0)
    with pytest.raises(ValueError, match="must be positive"):
        PromptLearning(context=0)


def test_gathering_chooses_images_and_keeps_rows_together(encoder: Encoder, toy_shards: Manifest) -> None:
    whole = gather(encoder, toy_shards.folder, "test")
    wanted = whole.held_out.study_ids[3:7]
    some = gather(encoder, toy_shards.folder, "test", images=dict.fromkeys(wanted, 0))
    rows = whole.rows(np.arange(3, 7))
    assert some.held_out.study_ids == rows.held_out.study_ids == wanted
    np.testing.assert_allclose(some.held_out.features, rows.held_out.features, atol=1e-6)
    np.testing.assert_allclose(some.held_out.text_features, rows.held_out.text_features, atol=1e-6)
    assert some.records[0]["study_id"] == wanted[0]
    assert "text" not in some.records[0]
    with pytest.raises(UserError, match="has no images that are asked for"):
        gather(encoder, toy_shards.folder, "test", images={wanted[0]: 1})
