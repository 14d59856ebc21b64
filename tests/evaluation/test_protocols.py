"""Protocols: the shipped files load, lists are drawn by rule and nothing else, and results are what they are called."""

import json
from collections import Counter
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    matthews_corrcoef,
    precision_recall_fscore_support,
)

from medclip_lab.config import load_config, shipped
from medclip_lab.data.manifest import Manifest
from medclip_lab.errors import UserError
from medclip_lab.evaluation.compare import compare
from medclip_lab.evaluation.labels_from import LabelsFrom
from medclip_lab.evaluation.protocol_tasks import class_scores, one_of, precision_at, run_protocol, summary
from medclip_lab.evaluation.protocols import ProtocolConfig, Sampling, load_protocol, select
from medclip_lab.evaluation.suite import Extras, run
from medclip_lab.files import write_json
from medclip_lab.inference.encoder import Encoder, load

SHIPPED = sorted(path.stem for path in shipped("protocols").glob("*.yaml"))
FIVE = ["Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion"]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_protocol_is_well_formed(name: str) -> None:
    protocol = load_protocol(name)
    assert protocol.name == name
    assert protocol.source
    assert protocol.description
    labelset = protocol.label_set()
    assert set(protocol.sampling.labels if protocol.sampling else []) <= set(labelset.names)


def records(studies: int = 400, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    found = []
    for number in range(studies):
        states = {
            name: int(value) for name, value in zip(FIVE, rng.choice([1, 0, -1], 5, p=[0.3, 0.5, 0.2]), strict=True)
        }
        view = [["LATERAL", "PA"], ["AP"], ["LATERAL"], ["PA", "AP"]][number % 4]
        found.append({"study_id": f"s{number}", "patient_id": f"p{number // 2}", "labels": states, "view": view})
    return found


def protocol(**changes: Any) -> ProtocolConfig:
    base = ProtocolConfig(
        name="mine",
        task="exclusive",
        views=["PA", "AP"],
        sampling=Sampling(labels=FIVE, per_label=5),
    )
    return replace(base, **changes)


def test_drawn_studies_have_one_finding_and_a_frontal_view() -> None:
    data = {record["study_id"]: record for record in records()}
    chosen = select(protocol(), list(data.values()))
    assert Counter(chosen.classes.values()) == dict.fromkeys(FIVE, 5)
    for study, name in chosen.classes.items():
        assert [label for label, state in data[study]["labels"].items() if state == 1] == [name]
        assert data[study]["view"][chosen.images[study]] in ("PA", "AP")
    assert chosen.left_out["no image of the views"] == 100
    assert chosen.images[next(s for s in chosen.images if data[s]["view"][0] == "LATERAL")] == 1


@given(order=st.permutations(list(range(60))))
def test_a_list_does_not_depend_on_the_order_of_the_records(order: list[int]) -> None:
    data = records(60, seed=1)
    one = protocol(sampling=Sampling(labels=FIVE[:2], per_label=2))
    assert select(one, data) == select(one, [data[number] for number in order])


def test_another_seed_is_another_list_and_another_hash() -> None:
    first = select(protocol(), records())
    second = select(protocol(sampling=Sampling(labels=FIVE, per_label=5, seed=1)), records())
    assert first.hash != second.hash
    assert first.classes != second.classes
    whole = protocol(sampling=None)
    assert select(whole, records(401)[:400]).hash != select(whole, records(398)).hash


def test_too_few_of_a_class_are_said_and_not_filled_up() -> None:
    with pytest.raises(UserError, match=r"200 studies of Atelectasis \(exclusive\) are needed, split 'test' has"):
        select(protocol(sampling=Sampling(labels=FIVE, per_label=200)), records())
    with pytest.raises(UserError, match="has no images of the views OBLIQUE"):
        select(protocol(views=["OBLIQUE"]), records())


def test_a_table_of_images_draws_by_the_image_that_is_taken(tmp_path: Path) -> None:
    found = [record | {"image_id": [f"{record['study_id']}-{n}" for n in range(2)]} for record in records(8)]
    lines = [f"s{number}-{image},{int(image == 1)}\n" for number in range(8) for image in range(2)]
    (tmp_path / "labels.csv").write_text("image_id,Edema\n" + "".join(lines))
    asked = protocol(
        views=["PA"], labels_from=str(tmp_path / "labels.csv"), sampling=Sampling(labels=["Edema"], per_label=2)
    )
    chosen = select(asked, found)
    assert set(chosen.images.values()) == {1}, "the frontal image is the second one, and has the finding"
    with pytest.raises(UserError, match="3 studies of Edema"):
        select(replace(asked, sampling=Sampling(labels=["Edema"], per_label=3)), found)


def test_a_list_of_ones_own() -> None:
    chosen = select(protocol(sampling=None), records(), listed=["s3", "s1"])
    assert set(chosen.images) == {"s1", "s3"}
    with pytest.raises(UserError, match="1 of 2 studies are not in split 'test'"):
        select(protocol(sampling=None), records(), listed=["s1", "s9999"])


def test_no_finding_is_not_negated() -> None:
    pairs = protocol(
        sampling=None, labels=["No Finding", "Edema"], positive_template="{}", negative_template="no {}"
    ).label_set()
    normal, edema = pairs.labels
    assert (edema.positive, edema.negative) == (["edema"], ["no edema"])
    assert not any("no no" in text.lower() for text in normal.positive + normal.negative)
    assert len(normal.negative) > 1


def test_names_and_keys_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither a \.yaml file nor the name of a shipped one: 'chexpert_6x200'"):
        load_protocol("chexpert_6x200")
    path = tmp_path / "p.yaml"
    path.write_text("name: x\ntask: exclusive\nlabelsets: chexpert14\n")
    with pytest.raises(UserError, match="unknown key labelsets; did you mean labelset"):
        load_protocol(path)
    path.write_text("name: x\ntask: class_retrieval\n")
    with pytest.raises(UserError, match="class_retrieval needs sampling"):
        load_config(ProtocolConfig, path)
    with pytest.raises(UserError, match="label set chexpert14 has no 'Flu'"):
        protocol(sampling=None, labels=["Flu"]).label_set()


@pytest.fixture
def nothing_else(tmp_path: Path) -> Path:
    """A label set with a label that has no prompts."""
    path = tmp_path / "nothing_else.yaml"
    path.write_text(
        "name: nothing_else\nlabels:\n"
        "  - {name: Cardiomegaly, positive: [The heart is enlarged.], negative: [Heart size is normal.]}\n"
        "  - {name: Edema, positive: [Edema.], negative: [No edema.]}\n"
        "  - {name: No Finding, none_of: [Cardiomegaly, Edema]}\n"
    )
    return path


def test_a_class_needs_prompts(nothing_else: Path) -> None:
    """Its score would be NaN, which is the greatest of all for argmax."""
    with pytest.raises(UserError, match="asks by positive prompts, and No Finding of label set nothing_else has none"):
        protocol(sampling=None, labelset=str(nothing_else)).label_set()
    drawn = Sampling(labels=["No Finding"], per_label=1)
    with pytest.raises(UserError, match="task class_retrieval asks by positive prompts"):
        protocol(task="class_retrieval", labelset=str(nothing_else), sampling=drawn).label_set()
    assert protocol(task="multi_label", sampling=None, labelset=str(nothing_else)).label_set().labels[2].none_of


def test_part_of_a_label_set_is_one_too(nothing_else: Path, tmp_path: Path) -> None:
    part = protocol(task="multi_label", sampling=None, labelset=str(nothing_else), labels=["Edema", "No Finding"])
    with pytest.raises(UserError, match=r"protocol mine: label set .* none_of of No Finding names 'Cardiomegaly'"):
        part.label_set()
    with pytest.raises(UserError, match="a name stands twice"):
        protocol(sampling=None, labels=["Edema", "Edema"]).label_set()
    path = tmp_path / "size.yaml"
    path.write_text("name: size\nexclusive: true\nlabels:\n  - {name: Edema, positive: [Edema.]}\n")
    assert protocol(sampling=None, labelset=str(path)).label_set().exclusive, "without negative prompts"


def test_one_of_several_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    scores, truth, names = rng.normal(size=(60, 3)), rng.integers(0, 3, 60), ["a", "b", "c"]
    told = one_of(scores, truth, names, np.ones((10, 60)))
    said = scores.argmax(1)
    accuracy = pytest.approx(accuracy_score(truth, said), abs=1e-12)
    assert told["accuracy"] == {"value": accuracy, "low": accuracy, "high": accuracy}
    assert told["macro_f1"]["value"] == pytest.approx(f1_score(truth, said, average="macro"), abs=1e-12)
    assert told["mcc"]["value"] == pytest.approx(matthews_corrcoef(truth, said), abs=1e-12)
    each = precision_recall_fscore_support(truth, said)
    found = [[row[key] for row in told["classes"]] for key in ("precision", "recall", "f1", "studies")]
    np.testing.assert_allclose(found, each, atol=1e-12)
    assert told["confusion"]["counts"] == confusion_matrix(truth, said).tolist()


def test_a_class_that_is_said_and_not_there_costs_macro_f1() -> None:
    truth, said = np.array([0, 0, 1]), np.array([0, 2, 1])
    told = one_of(np.eye(3)[said], truth, ["a", "b", "c"], np.ones((10, 3)))
    assert told["macro_f1"]["value"] == pytest.approx(f1_score(truth, said, average="macro"), abs=1e-12)
    assert told["classes"][2] == {
        "name": "c",
        "studies": 0,
        "recall": None,
        "precision": 0.0,
        "f1": 0.0,
        "reason": "no study of this class",
    }
    assert told["chance"] == pytest.approx(2 / 3)
    assert "NaN" not in json.dumps(told)


def test_precision_at_k_with_ties_is_the_mean_over_all_orders() -> None:
    scores, relevant = np.array([[3.0, 2.0, 2.0, 2.0, 1.0]]), np.array([[True, True, False, False, True]])
    orders = [[0, *middle, 4] for middle in permutations([1, 2, 3])]
    for k in (1, 2, 3, 4, 5):
        expected = np.mean([relevant[0, order[:k]].mean() for order in orders])
        assert precision_at(scores, relevant, [k])[k] == pytest.approx(expected)
    assert precision_at(scores, relevant, [6]) == {6: None}


@pytest.fixture(scope="module")
def encoder(toy_bundle: Path) -> Encoder:
    return load(toy_bundle, device="cpu")


def test_scores_of_classes_by_hand(encoder: Encoder) -> None:
    labelset = protocol(sampling=None, labels=["Cardiomegaly"]).label_set()
    prompts = encoder.encode_texts(labelset.labels[0].positive).astype(float)
    image = encoder.encode_texts(["The heart is enlarged."]).astype(float)
    cosines = prompts @ image[0]
    assert class_scores(encoder, labelset, image, "max_similarity")[0, 0] == pytest.approx(cosines.max())
    assert class_scores(encoder, labelset, image, "mean_similarity")[0, 0] == pytest.approx(cosines.mean())
    mean = prompts.mean(0)
    expected = mean @ image[0] / np.linalg.norm(mean)
    assert class_scores(encoder, labelset, image, "mean_embedding")[0, 0] == pytest.approx(expected)
    with pytest.raises(UserError, match="'softmax' does not order classes"):
        class_scores(encoder, labelset, image, "softmax")


def test_a_prompt_too_long_is_refused_or_cut(encoder: Encoder, toy_shards: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "long.yaml"
    long = "The heart is " + "very " * 100 + "large."
    path.write_text(
        f"name: long\nlabels:\n  - {{name: Cardiomegaly, positive: [{long}], negative: [Heart size is normal.]}}\n"
    )
    drawn = Sampling(labels=["Cardiomegaly"], per_label=2)
    for task in ("multi_label", "exclusive", "class_retrieval"):
        asked = protocol(task=task, labelset=str(path), sampling=drawn if task != "multi_label" else None)
        with pytest.raises(UserError, match="label set long by mine: a prompt of Cardiomegaly has 160 tokens"):
            run_protocol(encoder, toy_shards.folder, asked, draws=5)
        run_protocol(encoder, toy_shards.folder, replace(asked, queries_per_label=1), draws=5, truncate=True)


def test_results_of_protocols_compare(encoder: Encoder, toy_shards: Manifest, tmp_path: Path) -> None:
    for task, scores in (("multi_label", ["", "mean_embedding"]), ("exclusive", ["mean_embedding", "max_similarity"])):
        paths = []
        for rule in scores:
            asked = protocol(task=task, sampling=None, labels=["Cardiomegaly", "Edema"], score=rule)
            paths.append(tmp_path / f"{task}-{rule}.json")
            result = run_protocol(encoder, toy_shards.folder, asked, draws=20, keep=paths[-1])
            write_json(paths[-1], result)
            assert result["versions"]["medclip_lab"]
            assert len(result["shards"]) == 64
            if task == "multi_label":
                heart = result["zero_shot"]["labels"][0]["metrics"]
                assert heart["auprc"]["low"] <= heart["auprc"]["value"] <= heart["auprc"]["high"]
                assert result["zero_shot"]["rule"].startswith(rule or "sigmoid")
        told = compare(*paths, draws=10)
        assert told["studies_hash"]
        assert [row["name"] for row in told["labels"]] == ["Cardiomegaly", "Edema"]
    asked = protocol(task="report_retrieval", sampling=None)
    write_json(tmp_path / "r.json", run_protocol(encoder, toy_shards.folder, asked, keep=tmp_path / "r.json"))
    with pytest.raises(UserError, match="has no scores of labels"):
        compare(tmp_path / "r.json", tmp_path / "r.json")


def test_nothing_to_score_is_no_result(encoder: Encoder, toy_shards: Manifest) -> None:
    with pytest.raises(UserError, match="has both classes in this data"):
        run_protocol(encoder, toy_shards.folder, protocol(task="multi_label", sampling=None, labels=["Edema"]), draws=5)


def test_what_is_not_mentioned_is_absent_as_in_an_evaluation(
    encoder: Encoder, toy_shards: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A study of which only labels outside the set are told counts, or one number would mean two things."""
    told = LabelsFrom.of

    def silent(self: LabelsFrom, record: Any, names: Any) -> dict[str, int | None]:
        states = told(self, record, names)
        return states if states.get("Cardiomegaly") == 1 else {"Fracture": 1}

    monkeypatch.setattr(LabelsFrom, "of", silent)
    asked = protocol(task="multi_label", sampling=None, labels=["Cardiomegaly"])
    (row,) = run_protocol(encoder, toy_shards.folder, asked, draws=5)["zero_shot"]["labels"]
    assert row["negatives"] > 0
    evaluated = run(encoder, toy_shards.folder, "test", asked.labelset, Extras(), draws=5).results
    same = next(one for one in evaluated["zero_shot"]["labels"] if one["name"] == "Cardiomegaly")
    assert (row["positives"], row["negatives"], row["auroc"]) == (same["positives"], same["negatives"], same["auroc"])


def test_tasks_on_the_toy_data(encoder: Encoder, toy_shards: Manifest) -> None:
    """Every kind of task, with its summary, on images whose brightness is their label."""
    two = ["Cardiomegaly", "No Finding"]
    multi = protocol(task="multi_label", sampling=None, labels=["Cardiomegaly", "Edema"], views=["PA"])
    result = run_protocol(encoder, toy_shards.folder, multi, draws=20)
    assert result["zero_shot"]["labels"][0]["auroc"] > 0.9
    assert result["zero_shot"]["labels"][1]["reason"] == "not labelled in this data"
    assert result["studies"] == toy_shards.count("test")
    one = protocol(sampling=None, labels=two, expected={"studies": 7})
    result = run_protocol(encoder, toy_shards.folder, one, draws=20)
    assert result["exclusive"]["classes"][1]["reason"] == "no study of this class"
    assert result["differs_from_the_original"]["studies"]["expected"] == 7
    assert "not the original list" in summary(result)
    images = protocol(
        task="class_retrieval",
        sampling=Sampling(labels=["Cardiomegaly"], per_label=4),
        queries_per_label=2,
        ks=[1, 100],
    )
    result = run_protocol(encoder, toy_shards.folder, images, draws=20)
    assert result["class_retrieval"]["image_to_image"] == {"queries": 2, "precision": {1: 1.0, 100: None}}
    reports = protocol(task="report_retrieval", sampling=None)
    result = run_protocol(encoder, toy_shards.folder, reports, draws=20)
    assert result["retrieval"]["image_to_text"]["gallery"] == toy_shards.count("test")
    for told in (result,):
        assert "NaN" not in json.dumps(told)
        assert told["list_hash"][:12] in summary(told)
