import math
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medclip_lab.errors import UserError
from medclip_lab.inference import classifier as rooms
from medclip_lab.inference.classifier import ScoreType, ZeroShotClassifier
from medclip_lab.inference.encoder import load
from medclip_lab.inference.ensemble import ClassifierEnsemble
from medclip_lab.inference.labelset import LabelPrompts, LabelSet

X = np.array([[0.6, 0.8], [1.0, 0.0]], dtype=np.float32)
POSITIVE, NEGATIVE = np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([[0.8, -0.6]])
ROOT = math.sqrt(0.5)  # the mean of both positive prompts is (ROOT, ROOT)


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def classifier(bias: float | None = None, rule: ScoreType | None = None, **more: Any) -> ZeroShotClassifier:
    return ZeroShotClassifier(["a"], [POSITIVE], [NEGATIVE], 10.0, bias, "set", "hash", rule, **more)


def random(rule: ScoreType, labels: int = 4, seed: int = 0, **more: Any) -> ZeroShotClassifier:
    rng = np.random.default_rng(seed)

    def rows() -> list[Any]:
        found = [rng.normal(size=(rng.integers(1, 6), 8)) for _ in range(labels)]
        return [part / np.linalg.norm(part, axis=1, keepdims=True) for part in found]

    names = [f"l{number}" for number in range(labels)]
    return ZeroShotClassifier(names, rows(), rows(), 20.0, -5.0, "set", "hash", rule, **more)


def features(count: int, seed: int = 1) -> Any:
    found = np.random.default_rng(seed).normal(size=(count, 8)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("made", "expected", "name"),
    [
        (classifier(rule="mean_embedding"), [1.4 * ROOT, ROOT], "mean_embedding"),
        (classifier(rule="mean_similarity"), [0.7, 0.5], "mean_similarity"),
        (classifier(rule="max_similarity"), [0.8, 1.0], "max_similarity"),
        (classifier(), [sigmoid(10 * (1.4 * ROOT - 0.0)), sigmoid(10 * (ROOT - 0.8))], "pair_softmax(T=0.1)"),
        (classifier(-5.0, "pair_softmax"), [sigmoid(14 * ROOT), sigmoid(10 * (ROOT - 0.8))], "pair_softmax(T=0.1)"),
        (classifier(temperature=1.0), [sigmoid(1.4 * ROOT), sigmoid(ROOT - 0.8)], "pair_softmax(T=1)"),
        (
            classifier(-5.0),
            [(sigmoid(8 - 5) + sigmoid(6 - 5)) / 2, (sigmoid(0 - 5) + sigmoid(10 - 5)) / 2],
            "sigmoid",
        ),
    ],
)
def test_rules_by_hand(made: ZeroShotClassifier, expected: list[float], name: str, tmp_path: Path) -> None:
    assert made.rule == name
    np.testing.assert_allclose(made.scores(X)[:, 0], expected, rtol=1e-6)
    made.save(tmp_path / "c.safetensors")
    again = ZeroShotClassifier.load(tmp_path / "c.safetensors")
    assert again.rule == made.rule
    np.testing.assert_array_equal(again.scores(X), made.scores(X))
    answers = made.answers(X)
    assert answers[0]["rule"] == name
    assert answers[0]["labels"]["a"]["score_type"] == made.score_type


@pytest.mark.parametrize("rule", get_args(ScoreType))
@given(st.integers(0, 1000), st.integers(1, 40))
@settings(deadline=None, max_examples=25)
def test_a_score_depends_on_its_own_image_alone(rule: ScoreType, seed: int, count: int) -> None:
    """Whatever batch it comes in, in whatever order: to the last bit."""
    made = random(rule, none_of={"l0": ["l1", "l2"]})
    rows = features(count, seed)
    whole = made.scores(rows)
    order = np.random.default_rng(seed).permutation(count)
    np.testing.assert_array_equal(made.scores(rows[order]), whole[order])
    np.testing.assert_array_equal(np.concatenate([made.scores(row[None]) for row in rows]), whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rooms, "BLOCK", 7)
        np.testing.assert_array_equal(made.scores(rows), whole)


def test_the_transductive_score_says_so() -> None:
    made = random("max_similarity", batch_zscore=True)
    assert made.rule == "max_similarity, z-scored over the batch (transductive)"
    scores = made.scores(features(50))
    np.testing.assert_allclose(scores.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(scores.std(0), 1, atol=1e-9)
    assert np.abs(made.scores(features(50)[:10]) - scores[:10]).max() > 0.01
    with pytest.raises(UserError, match="needs two images at least"):
        made.scores(features(1))
    np.testing.assert_array_equal(made.scores(np.repeat(features(1), 3, axis=0)), 0)


def test_no_finding_is_what_is_left() -> None:
    made = random("pair_softmax", none_of={"l3": ["l0", "l2"]})
    scores = made.scores(features(20))
    np.testing.assert_array_equal(scores[:, 3], 1 - np.maximum(scores[:, 0], scores[:, 2]))


def test_each_prompt_is_encoded_once() -> None:
    asked: list[list[str]] = []

    def encode(texts: list[str]) -> Any:
        asked.append(texts)
        return np.eye(4, dtype=np.float32)[[len(text) % 4 for text in texts]]

    labels = [LabelPrompts("a", ["x", "yy"], ["z z"]), LabelPrompts("b", ["yy", "x", "x"], ["z z"])]
    made = ZeroShotClassifier.from_prompts(LabelSet("s", labels), encode, 1.0)
    assert asked == [["x", "yy", "z z"]]
    np.testing.assert_array_equal(made.positive[1], np.eye(4)[[2, 1, 1]])


def test_rules_that_cannot_be_served() -> None:
    for kind, match in (
        (
            lambda: classifier(None, "sigmoid"),
            "'sigmoid' needs a model with a logit_bias; this one was trained without",
        ),
        (lambda: classifier(None, "mean_embeding"), "did you mean 'mean_embedding'"),  # type: ignore[arg-type]
        (lambda: classifier(None, "max_similarity", temperature=1.0), "a temperature is that of 'pair_softmax'"),
        (lambda: classifier(None, temperature=0.0), "above 0"),
        (
            lambda: ZeroShotClassifier(["a"], [POSITIVE], [np.zeros((0, 2))], 1.0, None, "s", "h"),
            "needs negative prompts; a of label set s has none",
        ),
    ):
        with pytest.raises(UserError, match=match) as error:
            kind()
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"\(2, 3\) do not fit the classifier: \[N, 2\]"):
        classifier().scores(np.zeros((2, 3), dtype=np.float32))
    with pytest.raises(ValueError, match="built without an encoder"):
        classifier().predict([])


def test_exclusive_sets_need_no_negative_prompts() -> None:
    labels = [LabelPrompts("a", ["x"]), LabelPrompts("b", ["yy"])]
    made = ZeroShotClassifier.from_prompts(
        LabelSet("s", labels, exclusive=True), lambda texts: np.eye(2, dtype=np.float32)[: len(texts)], 1.0, -1.0
    )
    assert (made.exclusive, made.rule) == (True, "mean_embedding")
    np.testing.assert_allclose(made.scores(X), X, rtol=1e-6)


def test_confident_scores_are_not_tied() -> None:
    """At the scale of a trained CLIP, float32 would call all of these 1."""
    made = ZeroShotClassifier(["a"], [np.array([[1.0, 0.0]])], [np.array([[-1.0, 0.0]])], 15.0, None, "s", "h")
    angles = np.linspace(0.1, 0.5, 9)
    scores = made.scores(np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32))[:, 0]
    assert (np.diff(scores) < 0).all()


def test_ensemble_of_checkpoints() -> None:
    members = [random("pair_softmax", seed=seed) for seed in (0, 1)]
    rows = [features(10, 1), features(10, 2)]
    tables = [member.scores(part) for member, part in zip(members, rows, strict=True)]
    both = ClassifierEnsemble(members)
    np.testing.assert_allclose(both.scores(rows), (tables[0] + tables[1]) / 2, rtol=1e-12)
    assert both.rule == "mean scores of 2 checkpoints, pair_softmax(T=0.05)"
    logits = [np.log(table / (1 - table)) for table in tables]
    expected = 1 / (1 + np.exp(-(logits[0] + logits[1]) / 2))
    np.testing.assert_allclose(ClassifierEnsemble(members, "logits").scores(rows), expected, rtol=1e-6)
    with pytest.raises(UserError, match="are cosines and have no logits"):
        ClassifierEnsemble([random("max_similarity")] * 2, "logits")
    with pytest.raises(UserError, match="its members differ"):
        ClassifierEnsemble([random("max_similarity"), random("sigmoid")])


def test_an_ensemble_reads_images(toy_bundle: Path, toy_image: Path) -> None:
    one = load(toy_bundle, device="cpu").zero_shot_classifier()
    answer = ClassifierEnsemble([one, one]).classify([toy_image])[0]
    alone = one.classify([toy_image])[0]
    assert answer["labels"]["Edema"]["score"] == pytest.approx(alone["labels"]["Edema"]["score"])
    assert answer["labels"]["Edema"]["decision"] is None


def test_stored_prompts_serve_every_rule(toy_bundle: Path, toy_image: Path) -> None:
    encoder = load(toy_bundle, device="cpu")
    rows = encoder.encode_images([toy_image])
    for rule in get_args(ScoreType):
        stored = encoder.zero_shot_classifier("chexpert14", rule)
        built = ZeroShotClassifier.from_prompts(
            encoder.labelset("chexpert14"), encoder.encode_texts, encoder.logit_scale, encoder.logit_bias, rule
        )
        np.testing.assert_allclose(stored.scores(rows), built.scores(rows), atol=1e-5)
        assert stored.rule == built.rule
