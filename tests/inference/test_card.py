"""The model card: read back by Hugging Face's own parser, and true to what it was made of."""

import json
import re
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from medclip_lab.cli import main
from medclip_lab.config import load_config
from medclip_lab.data.manifest import Manifest
from medclip_lab.errors import UserError
from medclip_lab.inference.bundle import describe, open_bundle
from medclip_lab.inference.card import CardFacts, cell
from medclip_lab.inference.encoder import load

ROOT = Path(__file__).parents[2]


def card_of(bundle: Path) -> ModelCard:
    """As the Hub reads it: metadata that cannot be parsed are an error."""
    return ModelCard.load(bundle / "README.md", ignore_metadata_errors=False)


@pytest.fixture
def copy(toy_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_bundle, tmp_path / "toy-model"))


@pytest.fixture(scope="module")
def results(toy_bundle: Path, toy_shards: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of `evaluate --out`, of all splits together, with subgroups."""
    path = tmp_path_factory.mktemp("results") / "results.json"
    arguments = ["evaluate", str(toy_bundle), str(toy_shards.folder), "--subgroups", "view", "--draws", "50"]
    assert main([*arguments, "--split", "train+val+test", "--out", str(path)]) == 0
    return path


def test_the_card_of_an_export_states_what_is_known_and_no_more(toy_bundle: Path, toy_run: Path) -> None:
    card = card_of(toy_bundle)
    data = card.data.to_dict()
    assert data["license"] == "unknown"
    assert data["library_name"] == "open_clip"
    assert data["pipeline_tag"] == "zero-shot-image-classification"
    assert not {"model-index", "datasets", "language", "metrics", "base_model"} & set(data)
    text = card.text
    assert "**Not a medical device.** It must not be used for diagnosis" in text
    assert open_bundle(toy_bundle)[1]["fingerprint"] in text
    shards = json.loads((toy_run / "run.json").read_text())["shards"]["toy"]
    assert f"| shards of toy, SHA-256 of their hashes | `{shards}` |" in text
    for heading in ("Intended use", "Out of scope", "Limits", "Training", "Evaluation", "Subgroups"):
        assert re.search(rf"#+ {heading}\n\nNot stated\.", text), heading
    assert "scores are no probabilities" in text
    assert "| license of the weights | not stated |" in text


def test_what_people_state_and_what_was_measured(
    copy: Path, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = tmp_path / "card.yaml"
    facts.write_text(
        "license: other\nlicense_name: hospital-1\nlicense_link: LICENSE\nlanguages: [en, de]\n"
        "datasets: [someone/films]\nintended_use: Research | on films\nlimits: One site.\nname: toy one\n"
    )
    before = load(copy, device="cpu").fingerprint
    assert main(["card", str(copy), "--facts", str(facts), "--evaluation", f"Toy films={results}"]) == 0
    assert "README.md: with 1 evaluations" in capsys.readouterr().out
    assert load(copy, device="cpu").fingerprint == before, "a card is no part of what an embedding is"
    card, measured = card_of(copy), json.loads(results.read_text())
    data = card.data
    assert (data.license, data.license_name, data.license_link) == ("other", "hospital-1", "LICENSE")
    assert (data.language, data.datasets, data.model_name) == (["en", "de"], ["someone/films"], "toy one")
    assert data.metrics == ["roc_auc"]
    found = {result.metric_type: result for result in data.eval_results if "text to" not in result.metric_name}
    macro = measured["zero_shot"]["macro"]
    assert found["roc_auc"].metric_value == macro["auroc"]
    assert found["roc_auc"].metric_args == {"low": macro["low"], "high": macro["high"], "level": 0.95}
    assert (found["roc_auc"].dataset_name, found["roc_auc"].dataset_type) == ("Toy films", "toy-films")
    assert found["roc_auc"].dataset_revision == measured["shards"]
    recall = measured["retrieval"]["image_to_text"]["recall"]
    assert {f"recall_at_{k}": value for k, value in recall.items()}.items() <= {
        name: result.metric_value for name, result in found.items()
    }.items()
    text = card.text
    assert "Research | on films" in text
    assert "| train" not in text
    (group,) = measured["subgroups"]["columns"]["view"]["groups"]
    row = f"| PA | {group['studies']} | {group['patients']} | {group['auroc']:.3f} | "
    assert row in text
    heart = next(row for row in measured["zero_shot"]["labels"] if row["name"] == "Cardiomegaly")
    assert f"| Cardiomegaly | {heart['auroc']:.3f} | {heart['low']:.3f} to {heart['high']:.3f} |" in text
    edema = next(row for row in measured["zero_shot"]["labels"] if row["name"] == "Edema")
    assert f"| Edema | - | {edema['reason']} |" in text
    assert str(results.parent) not in card.content


def test_a_calibration_of_the_bundle_stands_in_its_card(copy: Path, toy_shards: Manifest) -> None:
    from medclip_lab.evaluation.calibrate import calibrate

    calibration = calibrate(load(copy, device="cpu"), toy_shards.folder, "chexpert14", "train")
    calibration.save(copy)
    path = describe(copy, CardFacts(), {})
    text = path.read_text()
    heart = calibration.labels["Cardiomegaly"]
    assert f"| Cardiomegaly | {heart['threshold']:.3f} | {heart['sensitivity']:.3f} | " in text
    assert "scores are no probabilities" not in text
    assert not any(hashed in text for hashed in calibration.facts["patients"]["hashes"])
    assert load(copy, device="cpu").zero_shot_classifier().calibration is not None


def test_a_former_card_makes_room(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "README.md").rename(copy / "MODEL_CARD.md")
    manifest["files"]["MODEL_CARD.md"] = manifest["files"].pop("README.md")
    (copy / "manifest.json").write_text(json.dumps(manifest))
    describe(copy, CardFacts(), {})
    assert not (copy / "MODEL_CARD.md").exists()
    assert "MODEL_CARD.md" not in open_bundle(copy)[1]["files"]


def test_nothing_leaves_its_cell() -> None:
    assert cell("a | b\n| c <img>") == "a \\| b \\| c &lt;img>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bundle": "0" * 64}, "is of model 000000000000, not of"),
        ({"shuffled_labels": True}, "shuffled_labels"),
        ({"blur": 0.1}, "blur"),
        ({"ensemble": ["a"]}, "a card shows the model itself"),
        ({"zero_shot": None, "retrieval": None}, "neither zero-shot nor retrieval"),
    ],
)
def test_results_that_are_not_of_the_model(
    copy: Path, results: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    before = (copy / "README.md").read_bytes()
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(json.loads(results.read_text()) | change))
    with pytest.raises(UserError, match=message):
        describe(copy, CardFacts(), {path: None})
    assert (copy / "README.md").read_bytes() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("license: other\n", "needs a license_name"),
        ("license: mit\nlicense_name: x\n", "belong to the license 'other'"),
        ("languages: [English]\n", "no ISO 639 code"),
        ("licence: mit\n", "license"),
    ],
)
def test_facts_that_cannot_be(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "card.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(CardFacts, tmp_path / "card.yaml")


def test_the_shipped_facts_name_every_one_and_state_none() -> None:
    path = ROOT / "configs" / "deploy" / "card.yaml"
    assert load_config(CardFacts, path) == CardFacts()
    assert re.findall(r"^(\w+):", path.read_text(), re.M) == [field.name for field in fields(CardFacts)]
