"""Reading by number: what is intact comes, what is not is listed, and nothing in a shard is ever believed."""

import io
import json
import random
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path
from typing import Any

import pytest

from medclip_lab.data import index as indices
from medclip_lab.data.index import ShardIndex, index_path, read_index, scan, write_index
from medclip_lab.data.manifest import Manifest, Shard
from medclip_lab.data.quarantine import Quarantine
from medclip_lab.data.reader import BadSampleError, Reader, Study, labels_in, read_shard
from medclip_lab.data.shards import write_shards
from medclip_lab.errors import UserError

from ..conftest import toy_samples

RECORD = json.dumps({"study_id": "s", "patient_id": "p"}).encode()


def tar(path: Path, members: list[tuple[Any, bytes]], form: int = tarfile.USTAR_FORMAT) -> Shard:
    """A shard of members given as (name or TarInfo, bytes)."""
    with tarfile.open(path, "w", format=form) as out:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return Shard(str(path), "train", len({str(name).partition(".")[0] for name, _ in members}), 0, "")


def read(shard: Shard, quarantine: Quarantine | None = None) -> list[Study]:
    return list(read_shard(shard, quarantine or Quarantine(10, 1.0)))


def scanned(path: Path) -> ShardIndex:
    with path.open("rb") as file:
        return scan(file)


def typed(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


# ------------------------------------------------------------------------------------------------------- by number


def test_samples_come_by_number_with_few_files_open(tmp_path: Path) -> None:
    manifest = write_shards(toy_samples(60), tmp_path, "t", 5)
    shards = manifest.of_split("train")
    reader = Reader(shards, Quarantine(60), limit=2)
    by_number = {(n, i): study for n, shard in enumerate(shards) for i, study in enumerate(read(shard))}
    order = random.Random(0).sample(sorted(by_number), len(by_number))
    for place in order:
        assert reader.study(*place) == by_number[place]
        assert len(reader._open) <= 2
    with pytest.raises(BadSampleError) as error:
        reader.study(0, 5)
    assert error.value.fault.cause == "truncated shard"
    reader.close()


def test_an_index_says_what_headers_say(tmp_path: Path) -> None:
    shard = write_shards(toy_samples(12), tmp_path, "t", 100).of_split("train")[0]
    index, headers = read_index(Path(shard.url), shard.sha256), scanned(Path(shard.url))
    assert index is not None
    assert [(entry.key, [member[:3] for member in entry.members]) for entry in index.entries] == [
        (entry.key, [member[:3] for member in entry.members]) for entry in headers.entries
    ]
    states = labels_in(shard, Quarantine(10))
    index_path(Path(shard.url)).unlink()
    assert labels_in(shard, Quarantine(10)) == states
    assert {state["Cardiomegaly"] for state in states} == {0, 1}


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value | {"format": "other"},
        lambda value: value | {"sha256": "of another shard"},
        lambda value: value | {"samples": [["a", [["json", -1, 10, 0]], {}]]},
        lambda value: value | {"samples": [["a", [["json", 0, 2**40, 0]], {}]]},
        lambda value: value | {"samples": [["a", [["json", 0, 10]], {}]]},
        lambda value: value | {"samples": [["a", 5, {}]]},
        lambda value: value | {"samples": [["a", [["json", float("inf"), 10, 0]], {}]]},
        lambda value: value | {"samples": [["a", [["json", 10**30, 10, 0]], {}]]},
        lambda value: value | {"samples": [["a", [["png", 512, 900, 0], ["1.png", 512, 900, 0]], {}]]},
        lambda value: value | {"samples": [["a", [["json", 512, 10, 0]], None]]},
        lambda value: value | {"samples": [["\x1b[2J", [["json", 512, 10, 0]], {}]]},
        lambda value: {},
        lambda value: [],
    ],
)
def test_an_index_that_is_not_of_this_shard_is_not_believed(tmp_path: Path, change: Any) -> None:
    shard = write_shards(toy_samples(12), tmp_path, "t", 100).of_split("train")[0]
    expected = read(shard)
    path = index_path(Path(shard.url))
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    assert read_index(Path(shard.url), shard.sha256) is None
    assert read(shard) == expected


def test_shards_of_other_tools_are_read(tmp_path: Path) -> None:
    """Images and captions under one key, no record of ours."""
    members = [("0001.jpg", b"i"), ("0001.txt", "Größe normal.".encode()), ("0002.JPG", b"j"), ("0002.txt", b"b")]
    first, second = read(tar(tmp_path / "a.tar", members))
    assert first.record == {"text": "Größe normal.", "study_id": "0001", "patient_id": "0001"}
    assert (first.images, second.images) == ([("jpg", b"i")], [("jpg", b"j")])


@pytest.mark.parametrize(
    "record",
    [
        b"{",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b'{"study_id": "s"}',
        b'{"study_id": 1, "patient_id": "p"}',
        b'{"study_id": "s", "patient_id": "\\ud800"}',
        b'{"study_id": "s", "patient_id": "p", "view": 5}',
        b'{"study_id": "s", "patient_id": "p", "text": 7}',
        b'{"study_id": "s", "patient_id": "p", "labels": {"Edema": 2}}',
        b'{"study_id": "s", "patient_id": "p", "labels": {"Edema": true}}',
        b'{"study_id": "s", "patient_id": "p", "labels": ["Edema"]}',
        b'{"study_id": "s", "patient_id": "p", "sections": {"findings": 1}}',
        b'{"study_id": "s", "patient_id": "p", "sentences": "No edema."}',
        b'{"study_id": "s", "patient_id": "p", "sentences": [{"text": "No edema."}]}',
        b'{"study_id": "s", "patient_id": "p", "sentences": [{"text": "a", "labels": {"Edema": null}}]}',
    ],
)
def test_records_that_are_none(tmp_path: Path, record: bytes) -> None:
    quarantine = Quarantine(10, 1.0)
    assert read(tar(tmp_path / "x.tar", [("a.json", record)]), quarantine) == []
    assert quarantine.causes == {"bad metadata": 1}


# ---------------------------------------------------------------------------------------------------------- damage


def damaged(data: bytes, chance: random.Random) -> bytes:
    """A shard cut somewhere, or with up to eight bits flipped, or both."""
    changed = bytearray(data)
    for _ in range(chance.randrange(9)):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    if chance.random() < 0.5:
        del changed[chance.randrange(len(changed)) :]
    return bytes(changed)


@pytest.mark.parametrize("indexed", [True, False])
def test_whatever_happens_to_two_hundred_shards_the_intact_samples_come_and_the_bad_ones_are_listed(
    tmp_path: Path, indexed: bool
) -> None:
    shard = write_shards(toy_samples(20), tmp_path, "t", 20).of_split("train")[0]
    path = Path(shard.url)
    whole, expected, index = path.read_bytes(), {study.key: study for study in read(shard)}, scanned(path)
    if not indexed:
        index_path(path).unlink()
    chance = random.Random(5)
    for number in range(200):
        data = damaged(whole, chance)
        path.write_bytes(data)
        listed = tmp_path / f"{number}.jsonl"
        quarantine = Quarantine(20, 1.0, listed)
        found = {study.key: study for study in read(shard, quarantine)}
        intact = {
            entry.key
            for entry in index.entries
            # Without an index the headers must be whole too: 512 bytes before each member.
            if all(
                data[member.offset - (0 if indexed else 512) : member.offset + member.size]
                == whole[member.offset - (0 if indexed else 512) : member.offset + member.size]
                for member in entry.members
            )
        }
        for key in intact:
            assert found[key] == expected[key], "what is intact comes as it was written"
        lines = [json.loads(line) for line in listed.read_text().splitlines()] if listed.exists() else []
        if indexed:
            assert found.keys() == intact
            assert {line["key"] for line in lines} == expected.keys() - intact, "and no other, each by its key"
        else:
            bad = [line for line in lines if line["key"]]
            assert len(found) + len(bad) >= len(expected)


def test_a_shard_that_disappears_while_it_is_read(tmp_path: Path) -> None:
    shards = write_shards(toy_samples(60), tmp_path, "t", 6).of_split("train")
    reader = Reader(shards, Quarantine(60), limit=1)
    first = reader.study(0, 0)
    Path(shards[0].url).unlink()
    assert reader.study(0, 0) == first, "who has it open goes on"
    reader.study(1, 0)
    with pytest.raises(BadSampleError) as error:
        reader.study(0, 0)
    assert error.value.fault == ("unreadable shard", "No such file or directory")


def test_an_empty_shard_among_others(tmp_path: Path) -> None:
    write_shards(toy_samples(60), tmp_path, "t", 6)
    facts = json.loads((tmp_path / "manifest.json").read_text())
    with tarfile.open(tmp_path / "train-00099.tar", "w"):
        pass
    facts["shards"].insert(0, facts["shards"][0] | {"name": "train-00099.tar", "samples": 0})
    (tmp_path / "manifest.json").write_text(json.dumps(facts))
    manifest = Manifest.load(tmp_path)
    assert read(manifest.shards[0]) == []


# --------------------------------------------------------------------------------------------------------- hostile


HOSTILE = {
    "a pickle": [("ok.json", RECORD), ("ok.pkl", b"cos\nsystem\n(S'touch owned'\ntR."), ("ok.pyd", b"\x80\x04.")],
    "a pipe": [("ok.json", RECORD), ("pipe:touch owned.json", RECORD)],
    "an absolute name": [("ok.json", RECORD), ("/owned.json", RECORD)],
    "a name that climbs": [("ok.json", RECORD), ("../owned.json", RECORD), ("a/../../owned.json", RECORD)],
    "a symbolic link": [("ok.json", RECORD), (typed("l.json", tarfile.SYMTYPE, "/etc/passwd"), b"")],
    "a hard link": [("ok.json", RECORD), (typed("h.json", tarfile.LNKTYPE, "ok.json"), b"")],
    "a device": [("ok.json", RECORD), (typed("zero.json", tarfile.CHRTYPE), b"")],
    "a queue": [("ok.json", RECORD), (typed("fifo.json", tarfile.FIFOTYPE), b"")],
    "a folder": [("ok.json", RECORD), (typed("d.json", tarfile.DIRTYPE), b"")],
    "a key with control characters": [("ok.json", RECORD), ("\x1b[2Jowned\n.json", RECORD)],
    "a key without end": [("ok.json", RECORD), ("k" * 3000 + ".json", RECORD)],
}


@pytest.mark.parametrize("members", HOSTILE.values(), ids=HOSTILE.keys())
def test_nothing_is_executed_and_nothing_is_written(
    tmp_path: Path, members: list[tuple[Any, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "deep" / "work"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    listed = work / "q.jsonl"
    shard = tar(work / "x.tar", members, tarfile.GNU_FORMAT)
    studies = read(shard, Quarantine(100, 1.0, listed))
    assert [study.key for study in studies if not study.key.startswith("pipe")] == ["ok"]
    assert all(study.record == json.loads(RECORD) for study in studies)
    assert {path.name for path in tmp_path.rglob("*")} <= {"deep", "work", "x.tar", "q.jsonl"}
    assert not Path("/owned.json").exists()
    text = listed.read_text() if listed.exists() else ""
    assert text.isprintable() or text.replace("\n", "").isprintable()
    assert "owned" not in text.replace("pipe:touch owned", "")


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def sparse(path: Path, *parts: tuple[int, bytes]) -> Path:
    """A file of the given parts at their offsets, and no disk for what lies between."""
    with path.open("wb") as file:
        for offset, data in parts:
            file.seek(offset)
            file.write(data)
    return path


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory in use is read from /proc")
def test_memory_stays_bounded(tmp_path: Path) -> None:
    """Members of ten gigabytes, headers of one, thousands of empty ones, holes: all with 256 MiB to live on."""
    ten = 10 * 2**30
    small = header("ok.json", len(RECORD)) + RECORD.ljust(512, b"\0")
    sparse(tmp_path / "large.tar", (0, header("big.png", ten)), (512 + ten, small))
    sparse(tmp_path / "record.tar", (0, header("big.json", 2**30)), (512 + 2**30, small))
    sparse(tmp_path / "name.tar", (0, header("n", 2**30, tarfile.GNUTYPE_LONGNAME)), (512 + 2**30, small))
    sparse(tmp_path / "pax.tar", (0, header("n", 2**30, tarfile.XHDTYPE)), (512 + 2**30, small))
    sparse(tmp_path / "zeros.tar", (0, small), (ten, b"\0"))
    sparse(tmp_path / "holes.tar", (0, header("hole.json", 512, tarfile.GNUTYPE_SPARSE) + bytes(512) + small))
    with (tmp_path / "many.tar").open("wb") as file:
        for number in range(20_000):
            file.write(header(f"{number}.png", 0))
    code = """
        import resource
        import sys
        from pathlib import Path
        import webdataset  # before the limit: torch comes with it
        from medclip_lab.data import index
        from medclip_lab.data.manifest import Shard
        from medclip_lab.data.quarantine import Quarantine
        from medclip_lab.data.reader import read_shard
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + 2**28, now + 2**28))
        index.MAX_SAMPLES = 15_000
        for path in sorted(Path(sys.argv[1]).glob("*.tar")):
            quarantine = Quarantine(10, 1.0)
            shard = Shard(str(path), "train", 2, 0, "")
            print(path.stem, [study.key for study in read_shard(shard, quarantine)], sorted(quarantine.causes))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "holes ['ok'] ['truncated shard', 'unsafe member']",
        "large ['ok'] ['member too large']",
        "many [] ['bad metadata']",
        "name [] ['truncated shard']",
        "pax [] ['truncated shard']",
        "record ['ok'] ['member too large']",
        "zeros ['ok'] ['truncated shard']",
    ]


def test_too_many_samples_are_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indices, "MAX_SAMPLES", 3)
    tar(tmp_path / "x.tar", [(f"{number}.json", RECORD) for number in range(5)])
    found = scanned(tmp_path / "x.tar")
    assert len(found.entries) == 3
    assert found.faults == (("unreadable shard", "more than 3 samples"),)


def test_a_member_too_large_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indices, "MAX_MEMBER_BYTES", 1000)
    shard = tar(tmp_path / "x.tar", [("a.json", RECORD), ("a.png", b"1" * 1001), ("b.json", RECORD)])
    quarantine = Quarantine(10, 1.0)
    assert [study.key for study in read(shard, quarantine)] == ["b"]
    assert quarantine.causes == {"member too large": 1}


def test_writing_an_index_again_changes_nothing(tmp_path: Path) -> None:
    shard = write_shards(toy_samples(12), tmp_path, "t", 100).of_split("train")[0]
    path = index_path(Path(shard.url))
    before = path.read_bytes()
    index = read_index(Path(shard.url), shard.sha256)
    assert index is not None
    write_index(Path(shard.url), shard.sha256, index.entries)
    assert path.read_bytes() == before


@pytest.mark.parametrize("size", [-1, -5, -512, -1024, -(10**6)])
def test_members_of_negative_size_end_the_reading(tmp_path: Path, size: int) -> None:
    """Python's own reader goes backwards on them, and round for ever."""
    info = tarfile.TarInfo("z.png")
    info.size = size
    good = header("ok.json", len(RECORD)) + RECORD.ljust(512, b"\0")
    path = tmp_path / "x.tar"
    path.write_bytes(good + info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    index = scanned(path)
    assert [entry.key for entry in index.entries] == ["ok"]
    assert index.faults == (("unreadable shard", "ReadError"),)
    assert [study.key for study in read(Shard(str(path), "train", 1, 0, ""))] == ["ok"]


def test_a_study_of_many_large_images_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indices, "MAX_STUDY_BYTES", 1000)
    images = [(f"a.{number}.png", b"1" * 300) for number in range(4)]
    shard = tar(tmp_path / "x.tar", [("a.json", RECORD), *images, ("b.json", RECORD)])
    quarantine = Quarantine(10, 1.0)
    assert [study.key for study in read(shard, quarantine)] == ["b"]
    assert quarantine.causes == {"study too large": 1}


def test_repeated_keys_do_not_hide_bad_samples(tmp_path: Path) -> None:
    """Keys are what the shard says; the ceiling counts samples."""
    shard = tar(tmp_path / "x.tar", [(f"{'ab'[number % 2]}.json", b"{") for number in range(40)])
    with pytest.raises(UserError, match="more than the ceiling"):
        list(read_shard(Shard(shard.url, "train", 40, 0, ""), Quarantine(40, 0.1)))
