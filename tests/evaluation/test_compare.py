"""Two models on the same studies: paired by patient, and refused where they are not the same."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from medclip_lab.cli import main
from medclip_lab.errors import UserError
from medclip_lab.evaluation.compare import compare, save_scores, scores_path, summary
from medclip_lab.evaluation.gather import Labelled
from medclip_lab.evaluation.metrics import auroc
from medclip_lab.files import write_json


def written(folder: Path, name: str, noise: float, seed: int = 1, studies: int = 200, patient: str = "p") -> Path:
    rng = np.random.default_rng(0)
    positive = rng.random((studies, 2)) < 0.5
    positive[:, 1] = True
    common = rng.normal(size=(studies, 2))
    scores = positive + common + noise * np.random.default_rng(seed).normal(size=(studies, 2))
    ids = [f"{patient}{number // 2}" for number in range(studies)]
    data = Labelled(["a", "b"], np.zeros((studies, 2), np.float32), positive, np.ones((studies, 2), bool), ids)
    out = folder / f"{name}.json"
    write_json(out, {"bundle": name * 20})
    save_scores(out, data, scores, [f"study-{patient}-{number}" for number in range(studies)])
    return out


def test_a_difference_is_that_of_the_aurocs_and_pairing_makes_it_sure(tmp_path: Path) -> None:
    good, bad = written(tmp_path, "good", 0.1), written(tmp_path, "bad", 1.5)
    result = compare(good, bad, draws=500)
    row, single = result["labels"]
    with safe_open(scores_path(bad), framework="numpy") as file:
        expected = auroc(file.get_tensor("scores")[:, 0], file.get_tensor("positive")[:, 0] > 0)
    assert row["second"] == pytest.approx(expected, abs=1e-12)
    assert row["difference"] == pytest.approx(row["second"] - row["first"], abs=1e-12)
    assert row["high"] < 0
    assert row["p"] < 0.05
    assert single["reason"] == "one class only"
    assert result["macro"]["difference"] == pytest.approx(row["difference"])
    assert "NaN" not in json.dumps(result)
    back = compare(bad, good, draws=500)["labels"][0]
    assert (back["difference"], back["low"]) == pytest.approx((-row["difference"], -row["high"]))


def test_the_same_model_does_not_differ(tmp_path: Path) -> None:
    one, two = written(tmp_path, "one", 0.5), written(tmp_path, "two", 0.5)
    row = compare(one, two, draws=100)["labels"][0]
    assert (row["difference"], row["low"], row["high"], row["p"]) == (0, 0, 0, 1)


def test_equal_models_with_other_luck_are_seldom_told_apart(tmp_path: Path) -> None:
    """Twenty pairs of equally noisy scores: a test at 5 % may take one or two for different, not half of them."""
    low = []
    for number in range(20):
        one, two = written(tmp_path, "one", 1.0, seed=2 * number), written(tmp_path, "two", 1.0, seed=2 * number + 1)
        low.append(compare(one, two, draws=200, seed=number)["labels"][0]["p"] < 0.05)
    assert sum(low) <= 4


def test_the_file_holds_no_id(tmp_path: Path) -> None:
    out = written(tmp_path, "one", 0.5, patient="secret")
    assert b"secret" not in scores_path(out).read_bytes()


def test_other_studies_are_refused(tmp_path: Path) -> None:
    one, other = written(tmp_path, "one", 0.5), written(tmp_path, "other", 0.5, patient="q")
    with pytest.raises(UserError, match="are of different studies"):
        compare(one, other)
    scores_path(other).write_bytes(b"nothing")
    with pytest.raises(UserError, match="evaluate --out writes it"):
        compare(one, other)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = written(tmp_path, "one", 0.5), written(tmp_path, "two", 0.9)
    assert main(["evaluate", "--compare", str(one), str(two), "--draws", "50", "--out", str(tmp_path / "c.json")]) == 0
    told = capsys.readouterr().out
    assert "mean of 1" in told
    result = json.loads((tmp_path / "c.json").read_text())
    assert summary(result) == told.strip()
