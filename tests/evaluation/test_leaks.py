"""Leaks: patients, copies and near copies are found across folders, reports alone are no leak."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from medclip_lab.cli import main
from medclip_lab.data.sample import Sample
from medclip_lab.data.shards import write_shards
from medclip_lab.data.sources.phantom import Phantom
from medclip_lab.evaluation.leaks import leaks, summary


def drawn(studies: int, seed: int, split: str) -> list[Sample]:
    source = Phantom(studies=studies, seed=seed, size=96)
    samples = [source.read(record, lambda *_: None) for record in source.records()]  # type: ignore[arg-type]
    return [replace(sample, split=split, images=sample.images[:1], view=sample.view[:1]) for sample in samples]


def jpeg(data: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).resize((80, 80)).save(buffer, "JPEG", quality=70)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("leaks") / "train"
    write_shards(iter(drawn(12, 0, "train")), out, "train", samples_per_shard=8)
    return out


def test_strangers_do_not_leak(train: Path, tmp_path: Path) -> None:
    others = drawn(8, 1, "test")
    others[0].text = drawn(12, 0, "train")[0].text
    others[5].images = [("jpg", jpeg(others[6].images[0][1]))]  # twice within the test set, which is no leak
    write_shards(iter(others), tmp_path / "test", "test", samples_per_shard=8)
    result = leaks(train, tmp_path / "test")
    assert result["test_studies_with"] == {"patients": 0, "images": 0, "near_images": 0, "reports": 1}
    assert not result["leaks"]
    assert summary(result).endswith("no leak was found")
    assert main(["shards", "leaks", str(train), str(tmp_path / "test")]) == 0


def test_each_kind_of_leak_is_found_and_named(train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen, others = drawn(12, 0, "train"), drawn(8, 1, "test")
    others[1].patient_id = seen[3].patient_id
    others[2].images = seen[4].images
    others[3].images = [("jpg", jpeg(seen[5].images[0][1]))]
    write_shards(iter(others), tmp_path / "test", "test", samples_per_shard=8)
    out = tmp_path / "leaks.json"
    assert main(["shards", "leaks", str(train), str(tmp_path / "test"), "--out", str(out)]) == 1
    told = capsys.readouterr()
    result = json.loads(out.read_text())
    same_patient = sum(sample.patient_id == seen[3].patient_id for sample in others)
    assert result["test_studies_with"] == {"patients": same_patient, "images": 1, "near_images": 1, "reports": 0}
    assert result["study_ids"] == sorted(others[number].study_id for number in (1, 2, 3))
    assert "the test set leaks" in told.out
    assert others[1].study_id not in told.out + told.err
