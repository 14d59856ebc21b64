"""`shards repair` keeps what is good as it was, and nothing else."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from medclip_lab.cli import main
from medclip_lab.data.check import check
from medclip_lab.data.manifest import Manifest
from medclip_lab.data.quarantine import Quarantine
from medclip_lab.data.reader import Study, read_split
from medclip_lab.data.repair import repair
from medclip_lab.data.shards import write_shards
from medclip_lab.errors import UserError

from ..conftest import png, toy_samples


def studies(folder: Path | str, split: str = "train") -> dict[str, Study]:
    manifest = Manifest.load(folder)
    return {study.key: study for study in read_split(manifest, split, Quarantine(100, 1.0))}


def test_what_is_good_stays_to_the_byte(tmp_path: Path) -> None:
    manifest = write_shards(toy_samples(60), tmp_path / "s", "toy", 10)
    repair(manifest.folder, tmp_path / "out")
    assert [shard.sha256 for shard in Manifest.load(tmp_path / "out").shards] == [s.sha256 for s in manifest.shards]
    assert not (tmp_path / "out" / "quarantine.jsonl").exists()


def test_what_is_bad_is_left_out_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = list(toy_samples(60))
    good = samples[0].images[0]
    samples[0].images, samples[0].view = [("png", b"no image"), good], ["PA", "LATERAL"]
    samples[1].images = [("png", b"no image")]
    manifest = write_shards(samples, tmp_path / "s", "toy", 10)
    before = studies(manifest.folder)
    first = Path(manifest.of_split("train")[1].url)
    first.write_bytes(first.read_bytes()[:9000])
    damaged = studies(manifest.folder)
    out = tmp_path / "out"
    assert main(["shards", "repair", manifest.folder, "--out", str(out), "--json"]) == 0
    left = json.loads(capsys.readouterr().out)["left_out"]
    assert left == {"truncated shard": len(before) - len(damaged), "unreadable image": 2}
    assert check(out)["bad"] == 0
    after = studies(out)
    assert after.keys() == damaged.keys() - {"study-1"}
    assert after["study-0"].images == [good]
    assert after["study-0"].record["view"] == ["LATERAL"]
    assert all(after[key] == damaged[key] for key in after.keys() - {"study-0"})
    lines = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert {line["key"] for line in lines} == before.keys() - damaged.keys() | {"study-0", "study-1"}
    facts = Manifest.load(out).facts
    assert facts["labels"]["Cardiomegaly"] == {
        state: sum(str(study.record["labels"]["Cardiomegaly"]) == state for study in _all(out)) for state in ("0", "1")
    }


def _all(folder: Path) -> list[Study]:
    return [study for split in ("train", "val", "test") for study in studies(folder, split).values()]


def test_shards_of_other_tools_come_out_as_ours(tmp_path: Path) -> None:
    image = png(toy_pixels())
    with tarfile.open(tmp_path / "val-0.tar", "w") as tar:
        for name, data in (("a.PNG", image), ("a.txt", b"Normal."), ("b.png", image), ("c.txt", b"\xff")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    repair(f"{tmp_path}/*.tar", tmp_path / "out")
    (study,) = studies(tmp_path / "out", "val").values()
    assert (study.record["study_id"], study.record["text"], study.images) == ("a", "Normal.", [("png", image)])


def toy_pixels():  # type: ignore[no-untyped-def]
    import numpy as np

    return np.zeros((8, 8), dtype=np.uint8)


def test_it_refuses(tmp_path: Path) -> None:
    manifest = write_shards(toy_samples(20), tmp_path / "s", "toy", 10)
    with pytest.raises(UserError, match="exists and is not empty"):
        repair(manifest.folder, tmp_path / "s")
    for shard in manifest.shards:
        Path(shard.url).write_bytes(b"")
    with pytest.raises(UserError, match="not one usable study"):
        repair(manifest.folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (("train-0.tar", "s1", "p1"), "1 of 2 studies have the id of another"),
        (("val-0.tar", "s2", "p1"), "1 of 1 patients stand in several splits"),
    ],
)
def test_what_would_leak_or_be_lost_is_refused(tmp_path: Path, members: tuple[str, str, str], message: str) -> None:
    name, study, patient = members
    for file, ids in ((f"0{name}", (study, patient)), ("train-1.tar", ("s1", "p1"))):
        record = json.dumps({"study_id": ids[0], "patient_id": ids[1], "text": "Normal."}).encode()
        with tarfile.open(tmp_path / file.removeprefix("0"), "w") as tar:
            info = tarfile.TarInfo("a.json")
            info.size = len(record)
            tar.addfile(info, io.BytesIO(record))
    with pytest.raises(UserError, match=message):
        repair(f"{tmp_path}/*.tar", tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
