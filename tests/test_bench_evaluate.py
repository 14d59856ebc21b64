"""What the benchmark measures is the same on both sides; how fast it is, is no test."""

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from medclip_lab.bench.evaluate import bench_bootstrap, bench_classifier, bench_evaluate, bench_retrieval, table
from medclip_lab.bench.gallery import KS, bench_gallery, features
from medclip_lab.bench.machine import facts
from medclip_lab.bench.phantoms import Unseen, bench_calibration, bench_pointing
from medclip_lab.data.prepare import prepare
from medclip_lab.data.sources.phantom import Phantom
from medclip_lab.errors import UserError
from medclip_lab.evaluation.retrieval import retrieval
from medclip_lab.files import write_json
from medclip_lab.inference.encoder import load


def test_both_ways_of_ranking_agree() -> None:
    result = bench_retrieval(300, 16)  # asserts that the recalls are those of the peer
    assert 0.1 < result["image_to_text"]["recall"][1] < 0.99
    assert result["peer_seconds"] >= 0


def test_a_process_of_its_own_finds_the_same_and_tells_its_memory() -> None:
    result = bench_gallery(3000, 16)
    groups = [str(number) for number in range(3000)]
    here = retrieval(*features(3000, 16), groups, groups, KS)
    for told, found in zip((result["image_to_text"], result["text_to_image"]), here, strict=True):
        assert told["recall"] == {str(k): value for k, value in asdict(found)["recall"].items()}
    # A block of similarities is 16 MiB; libraries, of which there are more, were there before.
    assert 0.01 < result["peak_gib_beyond_features"] < 0.15
    assert result["features_gib"] == round(2 * 3000 * 16 * 4 / 2**30, 3)


MEMORY = """
import numpy as np
from medclip_lab.bench.machine import memory_mib
before = memory_mib()
rows = np.ones(2**23)  # 64 MiB
now = memory_mib()
del rows
print(before, now, memory_mib(), memory_mib(peak=True))
"""


def test_memory_is_told_now_and_at_most() -> None:
    """In a process of its own: in this one others come and go."""
    told = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    before, now, after, most = map(float, told.stdout.split())
    assert now - before > 60
    assert after - before < 30
    assert most - before > 60
    assert {"commit", "date", "machine", "cores", "memory_gib"} < facts().keys()


def test_both_builders_agree() -> None:
    result = bench_classifier(2)
    assert (result["classes"], result["templates"]) == (2, 80)
    assert result["largest_difference"] < 1e-5


def test_parts_by_name() -> None:
    assert bench_bootstrap(300, 2, 50)["samples"] == 300
    result = bench_evaluate(100, 8, only=["retrieval"])
    assert "bootstrap" not in result
    assert table(result).startswith("retrieval")
    with pytest.raises(UserError, match="at least 100 samples"):
        bench_evaluate(10)


def test_what_is_unseen_is_no_training_study() -> None:
    every, unseen = Phantom(200, 3).records(), Unseen(200, 3).records()
    assert unseen == [record for record in every if record.split != "train"]
    assert 0 < len(unseen) < len(every)


def test_parts_of_phantoms_want_a_demo(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--demo runs/demo"):
        bench_evaluate(only=["pointing"])
    with pytest.raises(UserError, match="holds no finished demo: medclip-lab demo --out"):
        bench_evaluate(demo=tmp_path)


@pytest.fixture(scope="module")
def toy_demo(tmp_path_factory: pytest.TempPathFactory, toy_bundle: Path) -> Path:
    """A demo's folder around a bundle that never saw a phantom."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "bundle").symlink_to(toy_bundle)
    prepare(Phantom(60, 5, 48), folder / "shards")
    write_json(folder / "settings.json", {"seed": 5, "studies": 60, "size": 48})
    return folder


def test_errors_of_probabilities_beside_those_of_chance(toy_demo: Path, toy_bundle: Path) -> None:
    result = bench_calibration(toy_demo, studies=400, draws=20)
    assert not (toy_bundle / "calibration.json").exists(), "the demo's own bundle is left as it was"
    assert result["bundle"] == load(toy_bundle).fingerprint
    scored = [row for row in result["labels"] if row["value"] is not None]
    assert len(scored) == result["mean"]["labels"] > 0
    assert result["mean"]["value"] == pytest.approx(np.mean([row["value"] for row in scored]))
    for row in scored:
        assert 0 < row["if_perfect"] < 0.3
        assert row["low"] <= row["high"]
    assert all(row["value"] is not None or row["reason"] for row in result["labels"])
    told = table({"calibration": result, "pointing": bench_pointing(toy_demo)})
    assert "a perfect one" in told
    assert "chance" in told
