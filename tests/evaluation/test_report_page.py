"""One evaluation with everything, its curves against scikit-learn's, and its page: closed, escaped, and honest."""

import copy
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from sklearn.metrics import auc, precision_recall_curve, roc_curve

from medclip_lab.cli import main
from medclip_lab.data.manifest import Manifest
from medclip_lab.errors import UserError
from medclip_lab.evaluation import charts
from medclip_lab.evaluation.curves import confusion_of_one, precision_recall_points, roc_points
from medclip_lab.evaluation.localisation import localisation
from medclip_lab.evaluation.metrics import auroc
from medclip_lab.evaluation.protocol import summary as protocol_summary
from medclip_lab.evaluation.report_page import render, write_page
from medclip_lab.evaluation.suite import Evaluated, Extras, Models, run, summary
from medclip_lab.evaluation.zero_shot import Scoring
from medclip_lab.inference.encoder import Encoder, load
from medclip_lab.training.export import export


def random_case(seed: int = 0, ties: bool = True) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=80)
    return np.round(scores, 1) if ties else scores, rng.random(80) < 0.4


@pytest.mark.parametrize("ties", [True, False])
def test_curves_are_scikit_learns(ties: bool) -> None:
    scores, positive = random_case(ties=ties)
    x, y = zip(*roc_points(scores, positive), strict=True)
    assert auc(x, y) == pytest.approx(auroc(scores, positive), abs=1e-12)
    false, true, _ = roc_curve(positive, scores, drop_intermediate=False)
    np.testing.assert_allclose(x, false, atol=1e-12)
    np.testing.assert_allclose(y, true, atol=1e-12)
    precision, recall, _ = precision_recall_curve(positive, scores)
    ours = set(precision_recall_points(scores, positive))
    theirs = [(r, p) for r, p in zip(recall[:-1], precision[:-1], strict=True)]
    assert all(any(abs(a - r) < 1e-12 and abs(b - p) < 1e-12 for a, b in ours) for r, p in theirs)


def test_curves_of_one_class_are_refused() -> None:
    with pytest.raises(ValueError, match="both classes"):
        roc_points(np.zeros(3), np.ones(3, bool))
    with pytest.raises(ValueError, match="a positive"):
        precision_recall_points(np.zeros(3), np.zeros(3, bool))
    with pytest.raises(ValueError, match="unit square"):
        charts.unit_curves(
            [charts.Line(name="a", points=[(0, 2.0)], css="c1")], width=100, x_label="", y_label="", description=""
        )


def test_confusion_by_hand() -> None:
    positive = np.array([[1, 0], [0, 1], [1, 1], [0, 0]], bool)
    scores = np.array([[2.0, 1.0], [2.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    told = confusion_of_one(scores, positive, np.ones((4, 2), bool))
    assert told == {"studies": 2, "counts": [[1, 0], [1, 0]]}


@pytest.fixture(scope="module")
def encoder(toy_bundle: Path) -> Encoder:
    return load(toy_bundle, device="cpu")


@pytest.fixture(scope="module")
def evaluated(encoder: Encoder, toy_shards: Manifest) -> Evaluated:
    extras = Extras(
        subgroups=["view"],
        probes=["linear", "knn"],
        corruptions=True,
        against=str(toy_shards.folder),
    )
    return run(encoder, toy_shards.folder, "test", "chexpert14", extras, draws=20)


def test_everything_at_once(evaluated: Evaluated, toy_shards: Manifest) -> None:
    results = evaluated.results
    assert "NaN" not in json.dumps(results)
    assert results["probes"]["linear"]["labels"][2]["auroc"] > 0.9
    assert 1 <= results["effective_rank"]["image"] <= 16
    assert results["leaks"]["leaks"] is False
    assert results["leaks"]["study_ids"] is None
    told = results["corruptions"]
    assert told["labels"] == ["Cardiomegaly"]
    assert len(told["errors"]) == 7
    assert told["mce"] is None
    lines = "\n".join(summary(results))
    assert "no leak was found" in lines
    assert "no baseline was named, hence no mCE" in lines
    assert "fewer than two groups" in results["subgroups"]["columns"]["view"]["reason"]


def test_brightness_is_what_the_toy_task_cannot_do_without(evaluated: Evaluated) -> None:
    """Its label is the brightness of the image: over- and underexposure must hurt most, a mosaic not at all."""
    errors = evaluated.results["corruptions"]["errors"]
    assert errors["brightness"][4] > errors["pixelate"][4] + 0.1
    clean = 1 - evaluated.results["corruptions"]["clean_auroc"]
    assert errors["pixelate"][0] == pytest.approx(clean, abs=0.05)


def test_mce_against_a_baseline(encoder: Encoder, toy_shards: Manifest, evaluated: Evaluated, tmp_path: Path) -> None:
    from medclip_lab.evaluation.suite import corrupted

    path = tmp_path / "base.json"
    worse = {kind: [error + 0.1 for error in row] for kind, row in evaluated.results["corruptions"]["errors"].items()}
    facts = evaluated.results["corruptions"] | {"errors": worse}
    path.write_text(json.dumps({"corruptions": facts}))
    features = evaluated.found.held_out.features
    settings = ("chexpert14", Scoring(), evaluated.data, features, path, 0, 0.01)
    told = corrupted(encoder, toy_shards.folder, "test", *settings)
    assert told["errors"] == evaluated.results["corruptions"]["errors"], "the same seed gives the same corruptions"
    assert 0 <= told["mce"] < 1
    path.write_text(json.dumps({"corruptions": facts | {"shards": ["other"]}}))
    with pytest.raises(UserError, match="no corruptions of the same shards and labels"):
        corrupted(encoder, toy_shards.folder, "test", *settings)


class Parts(HTMLParser):
    """Open tags, addresses, and whether every tag is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_closed_and_asks_for_nothing(
    encoder: Encoder, evaluated: Evaluated, toy_shards: Manifest, tmp_path: Path
) -> None:
    path = tmp_path / "page.html"
    write_page(path, encoder, evaluated, "chexpert14", "medclip-lab evaluate <b> & 'c'", toy_shards.folder)
    html = path.read_text()
    parts = Parts()
    parts.feed(html)
    assert parts.open == []
    assert all(address.startswith(("#", "data:")) for address in parts.addresses)
    assert "&lt;b&gt; &amp;" in html
    assert not re.search(r"\bnan\b|\binf\b", html.lower())
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(svg)
    assert evaluated.results["bundle"] in html
    assert evaluated.results["zero_shot"]["labelset_hash"] in html
    assert "Mild mediastinal widening." in html
    assert html.count("data:image/jpeg") == 9, "three of each kind for the one label that has both classes"
    assert not any(study in html for study in evaluated.found.held_out.study_ids)


@pytest.fixture(scope="module")
def carrying(toy_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    """A bundle with a label set that is not shipped."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "hearts.yaml").write_text(
        "name: hearts\nlabels:\n"
        "  - {name: Cardiomegaly, positive: [A large heart indeed.], negative: [Heart size is normal.]}\n"
    )
    export(toy_run, folder / "bundle", [str(folder / "hearts.yaml")], "pytest")
    return load(folder / "bundle", device="cpu")


def test_the_page_of_a_label_set_that_only_the_bundle_has(carrying: Encoder, toy_shards: Manifest) -> None:
    html = render(carrying, run(carrying, toy_shards.folder, "test", "hearts", Extras(), draws=5), "hearts", "")
    assert "A large heart indeed." in html
    with pytest.raises(UserError, match="label set hearts has no 'Edema': Cardiomegaly"):
        localisation(carrying, toy_shards.folder, labels=["Edema"], labelset="hearts")


def test_the_page_says_how_it_was_scored(
    encoder: Encoder, carrying: Encoder, toy_shards: Manifest, tmp_path: Path
) -> None:
    path = tmp_path / "size.yaml"
    path.write_text(
        "name: size\nexclusive: true\nlabels:\n"
        "  - {name: Cardiomegaly, positive: [The heart is enlarged.]}\n"
        "  - {name: Edema, positive: [Heart size is normal.]}\n"
    )
    models = Models(Scoring("max_similarity", batch_zscore=True), [encoder], compare=carrying)
    told = run(encoder, toy_shards.folder, "test", str(path), Extras(), models, draws=5)
    told.results["blur"] = 0.2
    html = render(encoder, told, str(path), "")
    assert told.results["zero_shot"]["rule"] in html
    assert "transductive" in html
    assert "mean of 2 checkpoints" in html
    assert "images were blurred by 0.2" in html
    parts = Parts()
    parts.feed(html)
    assert parts.open == []
    assert "Beside another model" in html
    assert "Cardiomegaly, AUROC" in html
    assert "Macro F1" in html
    assert f"{told.results['zero_shot']['exclusive']['accuracy']['value']:.3f}" in html
    told.results["shuffled_labels"] = True
    lines = protocol_summary(told.results)
    assert "control: labels were shuffled" in lines
    assert "control: images were blurred by 0.2" in lines


def test_without_images_there_are_none_and_a_calibrated_model_has_reliability(
    encoder: Encoder, evaluated: Evaluated
) -> None:
    html = render(encoder, evaluated, "chexpert14", "")
    assert "data:image/jpeg" not in html
    assert "its scores are no probabilities" in html
    results = copy.deepcopy(evaluated.results)
    bins = [{"count": 3, "probability": 0.1, "positives": 0.0}, {"count": 1, "probability": 0.8, "positives": 1.0}]
    results["zero_shot"]["labels"][0]["reliability"] = bins
    results["zero_shot"]["labels"][0]["metrics"]["ece"] = {"value": 0.125, "if_perfect": 0.061}
    html = render(encoder, replace(evaluated, results=results), "chexpert14", "")
    name = results["zero_shot"]["labels"][0]["name"]
    assert f"{name}: expected calibration error 0.125 (by chance alone 0.061)" in html
    assert "its scores are no probabilities" not in html


def test_the_command_writes_page_and_scores(
    toy_bundle: Path, toy_shards: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page = tmp_path / "r.json", tmp_path / "r.html"
    command = ["evaluate", str(toy_bundle), str(toy_shards.folder), "--draws", "20", "--out", str(out)]
    assert main([*command, "--page", str(page)]) == 0
    assert "effective rank of 16" in capsys.readouterr().out
    assert page.read_text().startswith("<!doctype html>")
    assert json.loads(out.read_text())["command"].startswith("medclip-lab evaluate")
    assert main(["evaluate", "--compare", str(out), str(out), "--draws", "10"]) == 0
    assert "p 1.000" in capsys.readouterr().out
    assert main(["evaluate", str(toy_bundle), str(toy_shards.folder), "--protocol", "report_retrieval"]) == 0
    assert "protocol report_retrieval" in capsys.readouterr().out
