"""From a source to shards: the same bytes for any number of workers and after any interruption."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medclip_lab.data import prepare as engine
from medclip_lab.data.manifest import Manifest
from medclip_lab.data.prepare import executors, prepare
from medclip_lab.data.prepare.job import IN_PROGRESS, Job, Outcome, make_shard
from medclip_lab.data.quarantine import Quarantine
from medclip_lab.data.reader import read_split
from medclip_lab.data.sources import SOURCES, source_class
from medclip_lab.data.sources.base import Record, Source
from medclip_lab.data.sources.csv_pairs import CsvPairs
from medclip_lab.errors import UserError
from medclip_lab.files import sha256

from .toy_source import Failing, Given, Toy

FAULTY = Toy(60, broken=(3, 41), remarked=(4, 20), copies=("9:1", "25:24", "30:7"))
"""Studies 1 and 9 are of train and test, 24 and 25 of one patient of train, 7 and 30 of val and train."""
settings: dict[str, Any] = {"samples_per_shard": 6, "max_bad": 0.1, "duplicates": "drop"}


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of an uninterrupted run in one process."""
    out = tmp_path_factory.mktemp("whole") / "shards"
    prepare(FAULTY, out, **settings, workers=1)
    return contents(out)


def test_what_is_written(tmp_path: Path) -> None:
    manifest, summary = prepare(FAULTY, tmp_path / "out", samples_per_shard=6, max_bad=0.1, workers=1)
    assert manifest["samples"] == 58
    assert manifest["splits"] == {"train": 34, "val": 12, "test": 12}
    assert manifest["labels"]["Pleural Effusion"] == {"1": 58}
    assert "2 of 60 samples unusable: 2 unreadable image" in summary
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["shard"], line["key"], line["cause"]) for line in lines] == [
        ("train-00000.tar", "s3", "unreadable image"),
        ("train-00000.tar", "s4", "missing report"),
        ("train-00002.tar", "s20", "missing report"),
        ("train-00004.tar", "s41", "unreadable image"),
    ]
    quarantine = Quarantine(60)
    studies = list(read_split(Manifest.load(tmp_path / "out"), "train", quarantine))
    numbers = [int(study.record["study_id"][1:]) for study in studies]
    assert numbers == [n for n in range(60) if n // 2 % 5 < 3 and n not in FAULTY.broken]
    assert not quarantine.causes
    assert sorted(path.name for path in (tmp_path / "out").glob(".*")) == []


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_change_nothing(tmp_path: Path, whole: dict[str, str], workers: int) -> None:
    prepare(FAULTY, tmp_path / "out", **settings, workers=workers)
    assert contents(tmp_path / "out") == whole


def test_a_shard_without_a_usable_study_is_left_out(tmp_path: Path) -> None:
    source = Toy(60, broken=tuple(range(20, 26)))  # the third shard of train
    for workers in (1, 2):
        manifest, _ = prepare(source, tmp_path / str(workers), samples_per_shard=6, max_bad=0.5, workers=workers)
        names = [shard["name"] for shard in manifest["shards"] if shard["split"] == "train"]
        assert names == [f"train-0000{number}.tar" for number in (0, 1, 3, 4, 5)]
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_not_one_usable_study(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not one usable study"):
        prepare(Toy(2, broken=(0, 1)), tmp_path / "out", max_bad=1.0)


# ------------------------------------------------------------------------------------------------------- interruptions


def interrupted(calls: int) -> Callable[[Job], Outcome]:
    """`make_shard` that is interrupted at call number `calls`, after half its work."""
    made = 0

    def make(job: Job) -> Outcome:
        nonlocal made
        made += 1
        if made == calls:
            for name in (job.name, "manifest.json", "quarantine.jsonl"):
                (job.folder / f".{name}.01234567.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        return make_shard(job)

    return make


def test_interrupted_at_any_shard_then_called_again(
    tmp_path: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    for calls in range(1, 20):
        out = tmp_path / str(calls)
        monkeypatch.setattr(executors, "make_shard", interrupted(calls))
        try:
            prepare(FAULTY, out, **settings, workers=1)
        except KeyboardInterrupt:
            assert not (out / "manifest.json").exists()
        else:
            break
        monkeypatch.setattr(executors, "make_shard", make_shard)
        prepare(FAULTY, out, **settings, workers=1)
        assert contents(out) == whole
    assert calls == 14  # ten shards, and three of them again without duplicates


def test_called_again_it_reads_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = Toy(60, log=tmp_path / "log"), tmp_path / "out"
    monkeypatch.setattr(executors, "make_shard", interrupted(4))
    with pytest.raises(KeyboardInterrupt):
        prepare(source, out, samples_per_shard=6, workers=1)
    monkeypatch.undo()
    prepare(source, out, samples_per_shard=6, workers=1)
    read = [int(line) for line in (tmp_path / "log").read_text().split()]
    assert sorted(read) == list(range(60))


def test_nothing_is_read_twice_if_only_the_manifest_is_missing(
    tmp_path: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "write_manifest", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(FAULTY, tmp_path, **settings, workers=1)
    monkeypatch.undo()
    monkeypatch.setattr(Toy, "read", stop)
    prepare(FAULTY, tmp_path, **settings, workers=1)
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "unknown"])
def test_a_damaged_shard_is_made_again(
    tmp_path: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(executors, "make_shard", interrupted(4))
    with pytest.raises(KeyboardInterrupt):
        prepare(FAULTY, tmp_path, **settings, workers=1)
    monkeypatch.undo()
    shard = tmp_path / "train-00001.tar"
    data = shard.read_bytes()
    if damage == "gone":
        shard.unlink()
    elif damage == "unknown":
        (tmp_path / IN_PROGRESS / "train-00001.tar.json").write_text('{"name": "train-00001.tar"')
    else:
        shard.write_bytes(data[:-512] if damage == "cut" else data[:600] + b"x" + data[601:])
    prepare(FAULTY, tmp_path, **settings, workers=1)
    assert contents(tmp_path) == whole


def test_what_an_interrupted_run_with_other_settings_left_is_not_used(
    tmp_path: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "make_shard", interrupted(12))
    with pytest.raises(KeyboardInterrupt):
        prepare(FAULTY, tmp_path, samples_per_shard=2, workers=1)
    monkeypatch.undo()
    prepare(FAULTY, tmp_path, **settings, workers=1)
    assert contents(tmp_path) == whole


def test_what_was_left_out_comes_back_when_it_is_not_to_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "write_manifest", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(FAULTY, tmp_path / "out", **settings, workers=1)
    monkeypatch.undo()
    report = settings | {"duplicates": "report"}
    for name in ("out", "again"):
        prepare(FAULTY, tmp_path / name, **report, workers=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_a_disk_that_is_full_at_last(tmp_path: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("medclip_lab.data.writing.write_json", full)
    with pytest.raises(UserError, match="No space left on device"):
        prepare(FAULTY, tmp_path, **settings, workers=1)
    monkeypatch.undo()
    prepare(FAULTY, tmp_path, **settings, workers=1)
    assert contents(tmp_path) == whole


# ------------------------------------------------------------------------------------------------------------ bad data


@pytest.mark.parametrize("workers", [1, 2])
def test_the_ceiling_stops_and_a_higher_one_goes_on(tmp_path: Path, workers: int) -> None:
    source = Toy(60, broken=tuple(range(0, 60, 7)), log=tmp_path / "log")
    with pytest.raises(UserError, match=r"of 60 samples are unusable .* more than the ceiling of 5.0%, listed in"):
        prepare(source, tmp_path / "out", samples_per_shard=6, max_bad=0.05, workers=workers)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert len((tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()) == 4
    before = len((tmp_path / "log").read_text().split())
    manifest, _ = prepare(source, tmp_path / "out", samples_per_shard=6, max_bad=0.2, workers=workers)
    assert manifest["samples"] == 60 - 9
    assert len((tmp_path / "log").read_text().split()) < before + 60
    prepare(source, tmp_path / "again", samples_per_shard=6, max_bad=0.2, workers=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_remarks_do_not_count_and_damage_does(tmp_path: Path) -> None:
    prepare(Toy(60, remarked=tuple(range(60))), tmp_path / "remarks", max_bad=0.0, workers=1)
    assert len((tmp_path / "remarks" / "quarantine.jsonl").read_text().splitlines()) == 60
    rows = "".join(f"s{n},a.png,Normal.\ns{n},gone.png,Normal.\n" for n in range(4))
    (tmp_path / "table.csv").write_text("study_id,image,text\n" + rows)
    (tmp_path / "a.png").write_bytes(b"")
    from .test_sources import PNG

    (tmp_path / "a.png").write_bytes(PNG)
    with pytest.raises(UserError, match="2 of 4 samples are unusable"):
        prepare(CsvPairs(tmp_path / "table.csv"), tmp_path / "csv", workers=1)


def test_a_file_that_cannot_be_read_is_bad_data_and_no_full_disk(tmp_path: Path) -> None:
    prepare(Failing(20, error="Input/output error"), tmp_path, workers=1)
    (line,) = map(json.loads, (tmp_path / "quarantine.jsonl").read_text().splitlines())
    assert (line["key"], line["cause"], line["reason"]) == ("s7", "unreadable file", "Input/output error")


def test_a_worker_that_dies_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a worker process died"):
        prepare(Failing(20, error="death"), tmp_path, samples_per_shard=5, workers=2)


# ----------------------------------------------------------------------------------------------------------- identities


def record(study: str, patient: str, split: str) -> Record:
    return Record(study_id=study, patient_id=patient, split=split, content=0)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([record("1.2.3", "a", "train")] * 3, "2 of 3 studies have the id of another"),
        ([record("a", "a", "dev")], "unknown split 'dev', one of train, val, test"),
        (
            [record(f"s{n}", f"zebra{n // 2}", ("train", "test")[n % 2]) for n in range(6)]
            + [record("x", "zebra9", "val"), record("y", "zebra9", "train"), record("z", "other", "val")],
            r"4 of 5 patients stand in several splits \(3 in test and train, 1 in train and val\)",
        ),
    ],
)
def test_a_study_twice_and_a_patient_in_two_splits_are_refused_before_anything_is_written(
    tmp_path: Path, records: list[Record], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        prepare(Given(given=tuple(records)), tmp_path / "out")
    assert "zebra" not in str(caught.value)
    assert "1.2.3" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_another_table_is_another_request(tmp_path: Path) -> None:
    prepare(Toy(20), tmp_path, workers=1)
    before = contents(tmp_path)
    _, summary = prepare(Toy(20), tmp_path, workers=2, max_bad=0.5)
    assert "prepared before" in summary
    for other in (Toy(21), Toy(20, broken=(1,))):
        with pytest.raises(UserError, match="holds other shards"):
            prepare(other, tmp_path)
    with pytest.raises(UserError, match="holds other shards"):
        prepare(Toy(20), tmp_path, samples_per_shard=5)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "--workers must be at least 1"),
        ({"samples_per_shard": 0}, "--samples-per-shard"),
        ({"executor": "dask"}, "--executor: one of processes, ray"),
        ({"duplicates": "delete"}, "--duplicates: one of report, drop, ignore"),
    ],
)
def test_bad_settings(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(Toy(4), tmp_path / "out", **options)


# -------------------------------------------------------------------------------------------------------- who makes it


def test_workers_import_no_torch() -> None:
    code = (
        "import sys; import medclip_lab.data.prepare.executors; from medclip_lab.data.sources import *; "
        f"[source_class(name) for name in {list(SOURCES)!r}]; import medclip_lab.data.phantom.study; "
        "sys.exit('torch' in sys.modules)"
    ).replace("import *", "import source_class")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_is_what_it_is_called(name: str) -> None:
    cls = source_class(name)
    assert cls.name == name
    assert all("help" in option.metadata for option in cls.__dataclass_fields__.values())


@pytest.mark.slow
def test_ray_gives_the_same(tmp_path: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("HOME", str(tmp_path))  # where it writes a token
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {"env_vars": {"PYTHONPATH": path}}
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    try:
        prepare(FAULTY, tmp_path / "out", **settings, executor="ray")
        assert contents(tmp_path / "out") == whole
        (tmp_path / "file").touch()
        job = next(iter(plan_of(Toy(4), tmp_path / "file")))
        with pytest.raises(UserError, match="cannot write to"):
            list(executors.outcomes([job], "ray", 1))
    finally:
        ray.shutdown()


def plan_of(source: Source, out: Path) -> list[Job]:
    return engine._plan(source, source.records(), out, 6, False)


def test_ray_that_is_not_installed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'medclip_lab\[ray\]'"):
        prepare(Toy(4), tmp_path, executor="ray")
