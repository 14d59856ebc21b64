"""bench index: what is compared, and what is written of it."""

import json
from pathlib import Path

import numpy as np
import pytest

from medclip_lab.bench.index import bench_index
from medclip_lab.bench.vectors import Corpus
from medclip_lab.cli import main
from medclip_lab.errors import UserError
from medclip_lab.retrieval.choose import Goals


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
