import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medclip_lab.bench.data import bench_data
from medclip_lab.bench.data_shards import Kind, given, made, write
from medclip_lab.cli import main
from medclip_lab.data.decode import decode_image
from medclip_lab.data.manifest import Manifest
from medclip_lab.data.quarantine import Quarantine
from medclip_lab.data.reader import read_shard
from medclip_lab.errors import UserError


def test_both_loaders_read_the_same(tmp_path: Path) -> None:
    """A ratio between two different things would be none: the same studies, and the same ids of the same texts."""
    pytest.importorskip("pandas")
    from medclip_lab.bench.loaders import our_batches, plain_batches, their_batches

    assert write(made(Kind(96, "jpg"), 20), tmp_path / "ours", tmp_path / "theirs")[::2] == (20, False)
    ours = list(our_batches(tmp_path / "ours", 32, 10, 20, 0))
    theirs = list(their_batches(tmp_path / "theirs", 32, 10, 20, 0))
    assert [batch["image"].shape for batch in ours] == [(10, 1, 32, 32)] * 2
    assert [image.shape for image, _ in theirs] == [(10, 3, 32, 32)] * 2
    plain = list(plain_batches(tmp_path / "ours", 32, 10, 20, 0))
    assert sorted(study for batch in plain for study in batch["image_id"]) == sorted(
        study for batch in ours for study in batch["image_id"]
    )
    our_texts = sorted(torch.cat([batch["text"] for batch in ours]).tolist())
    assert our_texts == sorted(torch.cat([text for _, text in theirs]).tolist())
    # Crops differ; the mean brightness of the whole set does not.
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    their_mean = torch.cat([image for image, _ in theirs]).mean((0, 2, 3)) * std + mean
    our_mean = torch.cat([batch["image"] for batch in ours]).float().mean() / 255
    assert (their_mean - our_mean).abs().max() < 0.03


def test_sixteen_bits_and_their_copies(tmp_path: Path) -> None:
    assert write(made(Kind(64, "png", deep=True), 3), tmp_path / "ours", tmp_path / "theirs")[2]
    images = {}
    for side, named in (("ours", tmp_path / "ours"), ("theirs", f"{tmp_path}/theirs/*.tar")):
        (shard,) = Manifest.load(named).shards
        studies = list(read_shard(shard, Quarantine(3, 0.0)))
        images[side] = [decode_image(study.images[0][1], "png") for study in studies]
    for deep, copy in zip(images["ours"], images["theirs"], strict=True):
        assert (deep.image.mode, copy.image.mode) == ("I;16", "L")
        assert (np.asarray(deep.eight_bits()) == np.asarray(copy.image)).all()


def test_shards_that_exist(toy_shards: Manifest, tmp_path: Path) -> None:
    studies = list(given(toy_shards.folder, 7))
    assert len(studies) == 7
    assert all(study.suffix == "png" and study.text for study in studies)


@pytest.mark.slow
def test_bench_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pandas")
    out = tmp_path / "new" / "data.json"
    sizes = ["--samples", "8", "--batch", "4", "--size", "32", "--repeats", "1"]
    assert main(["bench", "data", "--make", "320-jpeg", *sizes, "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(out.read_text())
    case = told["cases"]["320-jpeg"]
    assert case["samples"] == 8
    ours_like = "uint8 [4, 1, 32, 32]"
    assert case["batches"] == {"ours": ours_like, "webdataset": ours_like, "open_clip": "float32 [4, 3, 32, 32]"}
    ours, theirs = case["runs"]["ours"][0], case["runs"]["open_clip"][0]
    assert case["ratio"] == pytest.approx(ours / theirs, abs=0.02)
    for side, stages in case["stage_ms"].items():
        assert set(stages) >= {"read", "decode", "geometry", "to_float", "tokenize", "collate"}, side
        assert 100 < case["peak_mib"][side] < 4000


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "name --shards FOLDER or --make 1024-jpeg"),
        ({"make": ["2048-jpeg"]}, "no set is named 2048-jpeg; there are 1024-jpeg"),
        ({"make": ["320-jpeg"], "samples": 10}, "samples at least a batch, got size 224, batch 64, samples 10"),
    ],
)
def test_bad_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        bench_data(**settings)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medclip_lab.bench.data.find_spec", lambda name: None if name == "pandas" else object())
    with pytest.raises(UserError, match="needs pandas: pip install pandas"):
        bench_data(make=["320-jpeg"])


def test_a_resume_loses_and_repeats_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "resume.json"
    assert main(["bench", "resume", "--samples", "3000", "--batch", "8", "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(out.read_text())
    assert (told["lost"], told["repeated"], told["rows_of_the_first_batch"]) == (0, 0, 8)
    assert told["first_batch_seconds"] > 0
    assert main(["bench", "resume", "--samples", "100"]) == 2
    assert "whole thousands" in capsys.readouterr().err
