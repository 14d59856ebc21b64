import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medclip_lab.data.manifest import Manifest, Shard, check_names
from medclip_lab.data.quarantine import Quarantine
from medclip_lab.data.reader import read_shard, read_split
from medclip_lab.data.sample import Sample, make_key
from medclip_lab.data.shards import write_shards
from medclip_lab.errors import UserError

from ..conftest import toy_samples


def test_round_trip(tmp_path: Path) -> None:
    samples = list(toy_samples(40))
    manifest = write_shards(samples, tmp_path / "shards", "toy", samples_per_shard=8, command="made here")
    assert manifest.facts["splits"] == {"train": 24, "val": 8, "test": 8}
    assert manifest.facts["labels"]["Cardiomegaly"].keys() == {"0", "1"}
    assert manifest.facts["labels"]["Edema"] == {"null": 40}
    assert manifest.facts["command"] == "made here"
    quarantine = Quarantine(40)
    read = {s.key: s for split in ("train", "val", "test") for s in read_split(manifest, split, quarantine)}
    assert not quarantine.causes
    assert read.keys() == {sample.key for sample in samples}
    for sample in samples:
        found = read[sample.key]
        assert found.images == sample.images
        assert found.record["text"] == sample.text
        assert found.record["labels"] == sample.labels
        assert found.record["sentences"] == sample.sentences


def test_same_studies_same_bytes(tmp_path: Path) -> None:
    hashes = [
        [shard.sha256 for shard in write_shards(toy_samples(30), tmp_path / name, "toy", 8).shards] for name in "ab"
    ]
    assert hashes[0] == hashes[1]


def test_several_images_keep_their_order(tmp_path: Path) -> None:
    images = [("png", bytes([number])) for number in range(12)]
    sample = Sample(study_id="s", patient_id="p", split="train", images=images)
    manifest = write_shards([sample], tmp_path, "toy")
    assert next(read_split(manifest, "train", Quarantine(1))).images == images


@given(st.lists(st.text(max_size=100), unique=True, max_size=30))
def test_keys_are_legal_and_distinct(identifiers: list[str]) -> None:
    keys = [make_key(identifier) for identifier in identifiers]
    assert len(set(keys)) == len(keys)
    assert all(key and set(key) <= set("0123456789abcdefghijklmnopqrstuvwxyz_-") for key in keys)


def test_uids_do_not_collapse() -> None:
    assert make_key("1.2.840.1") != make_key("1.2.840.2")
    assert make_key("plain-id_7") == "plain-id_7"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"study_id": "study-0"}, "1 of 5 studies have the id of another"),
        ({"split": "holdout"}, "unknown split 'holdout'"),
        ({"patient_id": "patient-0", "split": "test"}, r"1 of 2 patients .* \(1 in test and train\)"),
    ],
)
def test_writer_refuses(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    def samples() -> Iterator[Sample]:
        yield from toy_samples(4)
        facts = {"study_id": "new", "patient_id": "new", "split": "train"} | change
        yield Sample(**facts)

    with pytest.raises(UserError, match=message):
        write_shards(samples(), tmp_path / "shards", "toy", samples_per_shard=2)
    assert not (tmp_path / "shards" / "manifest.json").exists()
    assert not list((tmp_path / "shards").glob(".*.tmp"))


def test_nothing_to_write(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not one usable study"):
        write_shards([], tmp_path / "shards", "toy")


def test_interrupted_writing_leaves_no_half_shard(tmp_path: Path) -> None:
    def samples() -> Iterator[Sample]:
        yield from toy_samples(20)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(samples(), tmp_path, "toy", samples_per_shard=4)
    for path in tmp_path.glob("*.tar"):
        with tarfile.open(path) as tar:
            assert len(tar.getnames()) == 8  # 4 images, 4 records
    with pytest.raises(UserError, match=r"no such file.*manifest\.json"):
        Manifest.load(tmp_path)


def test_manifest_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        Manifest.load(tmp_path / "none")
    manifest = write_shards(toy_samples(20), tmp_path / "s", "toy", 4)
    with pytest.raises(UserError, match=r"no split 'holdout' \(it has test, train, val\)"):
        manifest.of_split("holdout")
    with pytest.raises(UserError, match="no split 'holdout'"):
        manifest.of_split("train+holdout")
    both = manifest.of_split("train+val")
    assert both == tuple(shard for shard in manifest.shards if shard.split != "test")
    assert manifest.count("train+val") == manifest.count("train") + manifest.count("val")
    Path(manifest.shards[0].url).unlink()
    with pytest.raises(UserError, match="listed in the manifest and missing"):
        Manifest.load(tmp_path / "s")
    (tmp_path / "s" / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(UserError, match="has format 'other'"):
        Manifest.load(tmp_path / "s")


def cut(shard: Shard, share: float) -> None:
    data = Path(shard.url).read_bytes()
    Path(shard.url).write_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize("share", [0.0, 0.2, 0.35, 0.5, 0.61])
def test_truncated_shard_is_counted(tmp_path: Path, share: float) -> None:
    manifest = write_shards(toy_samples(60), tmp_path / "s", "toy", 10)
    shard = manifest.of_split("train")[0]
    cut(shard, share)
    listed = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(60, ceiling=1.0, path=listed)
    delivered = sum(1 for _ in read_shard(shard, quarantine))
    assert delivered + sum(quarantine.causes.values()) == shard.samples
    assert delivered < shard.samples
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    assert {line["shard"] for line in lines} == {shard.name}
    with pytest.raises(UserError, match=r"more than the ceiling of 1\.0%"):
        list(read_shard(shard, Quarantine(60)))


def hostile(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Shard:
    with tarfile.open(path, "w") as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return Shard(str(path), "train", 1, path.stat().st_size, "")


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = target
    return info


def test_hostile_members_are_listed_and_never_used(tmp_path: Path) -> None:
    record = json.dumps({"study_id": "s", "patient_id": "p"}).encode()
    shard = hostile(
        tmp_path / "hostile.tar",
        [
            (member("ok.json"), record),
            (member("ok.pkl"), b"cos\nsystem\n(S'exit 1'\ntR."),
            (member("../escape.json"), record),
            (member("/etc/passwd.json"), record),
            (member("link.json", tarfile.SYMTYPE, "/etc/passwd"), b""),
            (member("device.json", tarfile.CHRTYPE), b""),
        ],
    )
    quarantine = Quarantine(10, ceiling=1.0)
    studies = list(read_shard(shard, quarantine))
    assert [study.key for study in studies] == ["ok"]
    assert quarantine.causes["unsafe member"] >= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hostile.tar"]


@pytest.mark.parametrize("record", [b"{", b"[]", b'{"study_id": "s"}', b"\xff"])
def test_bad_metadata_is_quarantined(tmp_path: Path, record: bytes) -> None:
    quarantine = Quarantine(10, ceiling=1.0)
    shard = hostile(tmp_path / "x.tar", [(member("a.json"), record)])
    assert list(read_shard(shard, quarantine)) == []
    assert quarantine.causes == {"bad metadata": 1}


def test_a_member_twice_is_quarantined(tmp_path: Path) -> None:
    record = json.dumps({"study_id": "s", "patient_id": "p"}).encode()
    quarantine = Quarantine(10, ceiling=1.0)
    shard = hostile(tmp_path / "x.tar", [(member("a.json"), record), (member("a.json"), record)])
    assert len(list(read_shard(shard, quarantine))) == 1
    assert quarantine.causes == {"member twice": 1}


def test_quarantine_counts_a_sample_once(tmp_path: Path) -> None:
    quarantine = Quarantine(1000, path=tmp_path / "q.jsonl")
    for _ in range(20):
        quarantine.add("s.tar", "a", "unreadable image", "broken")
    assert quarantine.causes == {"unreadable image": 1}
    assert len((tmp_path / "q.jsonl").read_text().splitlines()) == 1
    assert "1 of 1000" in quarantine.summary()


@pytest.mark.parametrize("identifier", ["_scan1", "__", "-_a", "Größe"])
def test_keys_never_start_as_unsafe_members_do(identifier: str) -> None:
    assert make_key(identifier)[0] not in "_-"


@pytest.mark.parametrize(
    "change",
    [
        {"shards": 5},
        {"shards": ["a"]},
        {"shards": [{"name": "train-00000.tar"}]},
        {"samples": "5"},
        {"samples": -5},
        {"samples": 10**30},
        {"samples": True},
        {"bytes": None},
        {"split": [1]},
        {"split": "holdout"},
        {"name": 7},
        {"labels": []},
        {"labels": {"Edema": {"1": "many"}}},
    ],
)
def test_a_manifest_that_makes_no_sense_is_one_line(tmp_path: Path, change: dict[str, Any]) -> None:
    write_shards(toy_samples(20), tmp_path, "toy", 4)
    facts = json.loads((tmp_path / "manifest.json").read_text())
    if change.keys() <= {"shards", "labels"}:
        facts |= change
    else:
        facts["shards"][0] |= change
    (tmp_path / "manifest.json").write_text(json.dumps(facts))
    for named in (tmp_path, f"{tmp_path}/*.tar"):
        with pytest.raises(UserError, match=r"^shards: the manifest of ") as error:
            Manifest.load(named)
        assert "\n" not in str(error.value)
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="cannot read"):
        Manifest.load(tmp_path)


def test_shards_of_one_name_are_not_written_over_each_other(tmp_path: Path) -> None:
    for name in "ab":
        write_shards(toy_samples(20), tmp_path / name, "toy", 20)
    manifest = Manifest.load(f"{tmp_path}/{{a,b}}/train-*.tar")
    assert len(manifest.shards) == 2
    with pytest.raises(UserError, match="two of them have the same name"):
        check_names(manifest.shards)
    check_names(Manifest.load(tmp_path / "a").shards)
