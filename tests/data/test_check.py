"""`shards check` finds what is planted, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from medclip_lab.cli import main
from medclip_lab.data import check as checks
from medclip_lab.data.index import index_path
from medclip_lab.data.manifest import Manifest
from medclip_lab.data.shards import write_shards

from ..conftest import toy_samples


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    samples = list(toy_samples(60))
    samples[3].images = [("png", b"no image")]
    return write_shards(samples, tmp_path / "s", "toy", 10)


def check(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["shards", "check", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_each_kind_of_damage_is_told(manifest: Manifest, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    listed = tmp_path / "bad.jsonl"
    code, result = check(capsys, manifest.folder, "--out", str(listed))
    assert code == 1
    assert result["causes"] == {"unreadable image": 1}
    assert result["good"] == 59
    assert json.loads(listed.read_text())["key"] == "study-3"
    assert check(capsys, manifest.folder, "--no-decode") == (
        0,
        {"shards": len(manifest.shards), "samples": 60, "good": 60, "bad": 0, "causes": {}},
    )

    first, second, third = (Path(shard.url) for shard in manifest.of_split("train")[:3])
    data = bytearray(first.read_bytes())
    data[700] ^= 1
    first.write_bytes(bytes(data))
    second.write_bytes(second.read_bytes()[:9000])
    index_path(third).write_text("{}")
    code, result = check(capsys, manifest.folder, "--no-decode", "--out", str(listed))
    assert code == 1
    lost = result["causes"].pop("truncated shard")
    assert result["causes"] == {"changed shard": 2, "damaged sample": 1, "bad index": 1}
    assert result["good"] == 60 - 1 - lost
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    assert len(lines) == result["bad"], "the list of the call before is gone"
    assert {line["shard"] for line in lines} == {first.name, second.name, third.name}


def test_several_processes_find_the_same(
    manifest: Manifest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = check(capsys, manifest.folder)
    monkeypatch.setattr(checks, "BYTES_OF_A_PROCESS", 2**15)
    assert check(capsys, manifest.folder) == alone


def test_the_table_for_people(manifest: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "check", manifest.folder]) == 1
    text = capsys.readouterr().out
    assert "60 samples, 59 good" in text
    assert "1  unreadable image" in text
    assert main(["shards", "check", manifest.folder, "--out", manifest.folder]) == 2


def test_samples_that_the_manifest_does_not_count(manifest: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(manifest.folder) / "manifest.json"
    facts = json.loads(path.read_text())
    facts["shards"][0]["samples"] -= 3
    path.write_text(json.dumps(facts))
    code, result = check(capsys, manifest.folder, "--no-decode")
    assert (code, result["causes"]) == (1, {"wrong count": 1})
