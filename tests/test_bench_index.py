"""bench index: what is compared, and what is written of it."""

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medclip_lab.bench import risk, targets
from medclip_lab.bench.embedding import bench_embed
from medclip_lab.bench.index import bench_index
from medclip_lab.bench.vectors import Corpus
from medclip_lab.cli import main
from medclip_lab.errors import UserError
from medclip_lab.retrieval.choose import Goals
from medclip_lab.retrieval.embeddings import MODALITIES
from tests.retrieval.test_rag import cohort


def test_bench_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "index.json"
    sizes = ["--samples", "1500", "--dim", "16", "--queries", "20", "--target-recall", "0.9", "--max-memory", "4GB"]
    only = ["--only", "medclip_lab", "faiss Flat"]
    assert main(["bench", "index", *sizes, *only, "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(out.read_text())
    assert (told["size"], told["dim"], told["at"]) == (1500, 16, 10)
    ours, flat = told["index"]["medclip_lab"], told["index"]["faiss Flat"]
    assert ours["factory"] == "Flat"
    assert ours["tried"][0]["verdict"] == "chosen"
    for result in (ours, flat):
        assert result["recall"] == {"image": 1.0, "text": 1.0}
        assert result["bytes_per_vector"] == pytest.approx(64, abs=1)
        assert result["peak_mb"] > 20
        assert set(result["text"]["single_ms"]) == {"p50", "p95", "p99"}
    drawing = out.with_suffix(".svg").read_text()
    assert drawing.startswith("<svg xmlns=")
    assert "faiss Flat" in drawing
    assert drawing.count("medclip_lab: Flat") >= 6


@pytest.mark.parametrize(
    ("only", "queries", "said"),
    [(["annoy"], 5, "no contender is named annoy; there are medclip_lab"), (None, 0, "at least one query, got 0")],
)
def test_bad_settings(only: list[str] | None, queries: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        bench_index(Corpus(size=10, dim=4), Goals(), queries, only)


def test_corpora_that_cannot_be() -> None:
    with pytest.raises(UserError, match="sizes must be at least 1"):
        Corpus(size=0, dim=4)


def test_texts_and_images_lie_apart() -> None:
    """The gap between the modalities is there, pairs are nearer than strangers, and fresh queries are other studies."""
    corpus = Corpus(size=600, dim=64, clusters=30, gap=1.0)
    made = next(corpus.blocks())
    means = {name: vectors.mean(axis=0) for name, vectors in made.items()}
    assert np.linalg.norm(means["image"] - means["text"]) > 0.8
    scores = made["text"] @ made["image"].T
    assert np.diag(scores).mean() > scores.mean() + 0.1
    within = made["image"] @ made["image"].T
    assert within[~np.eye(600, dtype=bool)].mean() > scores.mean() + 0.2
    fresh = corpus.fresh(50)
    assert (fresh["image"] @ made["image"].T).max() < 0.999
    np.testing.assert_allclose(np.linalg.norm(fresh["text"], axis=1), 1, atol=1e-5)
    closer = next(Corpus(size=600, dim=64, clusters=30, gap=0.0).blocks())
    assert np.linalg.norm(closer["image"].mean(axis=0) - closer["text"].mean(axis=0)) < 0.2


SMALL = ["--dim", "16", "--queries", "20"]


def run(capsys: pytest.CaptureFixture[str], *given: str) -> Any:
    assert main(["bench", "index", *given, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_what_was_asked_stands_beside_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    told = run(capsys, "--case", "exact", "--samples", "900", *SMALL)
    assert told["target"] == 1.0
    assert [told["aims"][f"recall@10 of {name} queries against float32"]["measured"] for name in MODALITIES] == [1, 1]
    single = {name: entry["single_in_turn_p50_ms"]["text"] for name, entry in told["index"].items()}
    assert set(single) == {"medclip_lab", "faiss Flat", "faiss SQfp16", "faiss SQ8"}
    (aim,) = (aim for name, aim in told["aims"].items() if name.startswith("text query alone"))
    best = min(value for name, value in single.items() if name != "medclip_lab")
    assert aim["measured"] == pytest.approx(single["medclip_lab"] / best, rel=0.01)
    million = run(capsys, "--case", "million", "--samples", "900", *SMALL)
    assert million["max_memory"] == 10**9
    batched = [million["index"][name]["text"]["batched_ms"] for name in ("faiss Flat", "medclip_lab")]
    aim = million["aims"]["text queries a second in batches, times faiss Flat"]
    assert aim["measured"] == pytest.approx(batched[0] / batched[1], abs=0.02)


def test_targets_are_counted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that misses in one direction is no run that meets; the exact kinds come last."""
    asked: list[Goals] = []

    def found(corpus: Corpus, goals: Goals, *_: Any, modality: str) -> dict[str, Any]:
        asked.append(goals)
        recall = {"image": 0.995, "text": 0.97 if corpus.seed else 0.992}
        memory = {"peak": 110, "predicted": 100, "limit": 200}
        result = {"factory": "X", "parameters": {}, "recall": recall, "memory": memory, "build_seconds": 1.0}
        assert (modality == "text") == bool(corpus.repeated)
        return {"index": {"medclip_lab": result}}

    monkeypatch.setattr(targets, "bench_index", found)
    told = run(capsys, "--case", "targets", "--samples", "100", "--seeds", "2")
    assert [aim["measured"] for aim in told["aims"].values()] == ["4/8", 1.1, 0.55]
    assert {goals.exact_values for goals in asked} == {0}
    assert {goals.target_recall for goals in asked} == {0.99}
    assert [goals.seed for goals in asked] == [0] * 4 + [1] * 4


def test_embed_beside_the_towers(tmp_path: Path, toy_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = run(capsys, "--case", "embed", "--samples", "3", "--repeats", "1", "--bundle", str(toy_bundle))
    for name in ("seconds", "seconds_of_cores"):
        assert set(told[name]) == {"bare", "embed"}
        assert min(told[name].values()) > 0
    share = told["seconds"]["embed"] / told["seconds"]["bare"] - 1
    measured = told["aims"]["embed over the bare encoder on the same decoded batches"]["measured"]
    assert float(measured.removesuffix(" %")) == pytest.approx(100 * share, abs=0.5)
    with pytest.raises(UserError, match="at least one sample and one repeat"):
        bench_embed(None, 0, 1)


def test_a_contender_that_was_killed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory, a process says nothing at all."""
    dead = subprocess.CompletedProcess([], -signal.SIGKILL, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: dead)
    with pytest.raises(UserError, match="bench: faiss Flat failed: killed: out of memory"):
        bench_index(Corpus(size=100, dim=4), Goals(), 5, ["faiss Flat"])


@pytest.mark.parametrize("case", ["exact", "million", "embed", "risk"])
def test_a_case_that_is_measured_whole_takes_no_part(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "index", "--case", case, "--only", "faiss Flat"]) == 2
    assert f"--case {case} is measured whole" in capsys.readouterr().err


def test_risks_over_splits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(risk, "ASKING", 300)
    monkeypatch.setattr(risk, "CALIBRATION", 120)
    told = run(capsys, "--case", "risk", "--samples", "2000", "--dim", "16", "--repeats", "4")
    assert [(found["risk"], found["alpha"]) for found in told["runs"]] == [(case[0], case[2]) for case in risk.CASES]
    assert all(found["mean_risk"] < found["alpha"] + 0.1 for found in told["runs"])
    with pytest.raises(UserError, match="at least 600 studies and 2 splits, got 10 and 4"):
        risk.bench_risk(Corpus(size=10, dim=4), 4)


def test_risks_of_embeddings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a model's embeddings; a case that nothing meets ends none of the others."""
    folder = cohort(tmp_path / "embeddings", 300, 0)
    told = run(capsys, "--case", "risk", "--embeddings", str(folder), "--repeats", "4")
    assert told["queries"] == 150, "of two studies a patient one asks"
    runs = {(found["risk"], found["alpha"]): found for found in told["runs"]}
    assert runs["miss", 0.2]["mean_risk"] < 0.3
    assert 0 < runs["miss", 0.2]["mean_kept"] < risk.K
    (tmp_path / "few").mkdir()
    few = cohort(tmp_path / "few" / "embeddings", 30, 0)
    told = risk.bench_risk(few, 2)
    assert all("too few for alpha" in found["reason"] for found in told["runs"] if found["alpha"] <= 0.1)
    assert "too few" in risk.told(told)
