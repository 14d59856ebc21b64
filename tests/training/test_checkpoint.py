"""Checkpoints on disk: whole or not there, kept as asked, copied elsewhere, read without executing anything."""

import errno
import json
import os
import pickle
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medclip_lab.errors import UserError
from medclip_lab.training import checkpoint_files, resume
from medclip_lab.training.checkpoint import CheckpointConfig, Store, open_checkpoint, room
from medclip_lab.training.checkpoint_files import DamagedError, SaveError, join, read_tensors, split, verify, write
from medclip_lab.training.ranks import RanksConfig, refuse_odd_ranks
from medclip_lab.training.run import RunConfig, train
from medclip_lab.training.survival import SurvivalConfig

from .helpers import weights

Config = Callable[..., RunConfig]
Usage = namedtuple("Usage", "total used free")

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers() | st.just("!"), inner)
    ),
    max_leaves=12,
)


@given(VALUES)
@settings(max_examples=60, deadline=None)
def test_a_state_comes_back_from_json(value: Any) -> None:
    said, tensors = split({"state": value, "tensor": torch.arange(3)})
    assert list(tensors) == ["tensor"]
    back = join(json.loads(json.dumps(said)), tensors)
    assert back["state"] == value
    assert repr(back["state"]) == repr(value), "tuples stay tuples, and numbers of kind"


def test_what_a_checkpoint_cannot_hold_is_named() -> None:
    with pytest.raises(TypeError, match="cannot hold callbacks/Mine, a set"):
        split({"callbacks": {"Mine": {1}}})


def save(folder: Path, step: int, **metrics: float) -> Path:
    """A small checkpoint."""
    said, tensors = split({"state_dict": {"w": torch.full((2, 3), float(step)), "n": torch.tensor(step)}})
    path = folder / f"step-{step:08d}"
    facts = {"step": step, "batch": step, "metrics": metrics, "shards": {}}
    write(path, said, tensors, facts, "seed: 0\n")
    return path


def test_whole_and_damaged(tmp_path: Path) -> None:
    path = save(tmp_path, 4)
    assert verify(path)["step"] == 4
    assert {name: value.tolist() for name, value in read_tensors(path).items()} == {
        "state_dict/w": [[4.0] * 3] * 2,
        "state_dict/n": 4,
    }
    assert {file.suffix for file in path.iterdir()} == {".json", ".yaml", ".safetensors"}
    for name in (next(path.glob("*.safetensors")).name, "state.json"):
        copy = Path(shutil.copytree(path, tmp_path / f"damaged {name}"))
        content = bytearray((copy / name).read_bytes())
        content[-2] ^= 1
        (copy / name).write_bytes(content)
        with pytest.raises(DamagedError, match=f"{name} is not the file that was written"):
            verify(copy)
        (copy / name).unlink()
        with pytest.raises(DamagedError, match=f"{name} is missing"):
            verify(copy)
        (copy / "manifest.json").write_text("{")
        with pytest.raises(DamagedError, match="cannot read"):
            verify(copy)
        with pytest.raises(UserError, match="is no whole checkpoint"):
            open_checkpoint(str(copy.rename(tmp_path / "step-00000005")))
        shutil.rmtree(tmp_path / "step-00000005")


def test_a_manifest_names_no_file_outside(tmp_path: Path) -> None:
    path = save(tmp_path / "run", 4)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../outside"] = manifest["files"].pop("state.json")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedError, match="outside is missing"):
        verify(path)


def test_a_damaged_one_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path, CheckpointConfig())
    assert store.newest_whole() is None
    first, second = save(tmp_path, 4), save(tmp_path, 8)
    (tmp_path / ".step-00000012.tmp").mkdir()
    assert store.newest_whole() == second
    assert capsys.readouterr().err == ""
    assert not (tmp_path / ".step-00000012.tmp").exists(), "what a killed save left goes"
    (second / "state.json").write_text("{}")
    assert store.newest_whole() == first
    (line,) = capsys.readouterr().err.splitlines()
    assert "step-00000008 is damaged and passed over: state.json is not the file that was written" in line
    shutil.rmtree(first)
    assert store.newest_whole() is None


def test_what_is_kept(tmp_path: Path) -> None:
    store = Store(tmp_path, CheckpointConfig(keep_last=2, keep_every=6, keep_best=True))
    for step, loss in ((2, 5.0), (4, 1.0), (6, 2.0), (8, 3.0), (10, 4.0), (11, 4.0)):
        save(tmp_path, step, val_loss=loss)
        store.settle()
    assert store.here() == [4, 6, 10, 11]
    assert store.best() == (1.0, 4)


def test_a_copy_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = "memory://bucket/run"
    store = Store(tmp_path / "here", CheckpointConfig(remote=there, keep_last=1))
    for step in (4, 8):
        save(tmp_path / "here", step)
        store.settle()
    system = fsspec.filesystem("memory")
    assert [name.rpartition("/")[2] for name in system.ls("/bucket/run", detail=False)] == ["step-00000008"]
    shutil.rmtree(tmp_path / "here")
    assert store.newest_whole() == store.path(8)
    assert verify(store.path(8))["step"] == 8
    # What is damaged here is fetched again; what is damaged there too is passed over.
    (store.path(8) / "state.json").write_text("{}")
    assert store.newest_whole() == store.path(8)
    assert "passed over" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "here")
    system.pipe_file("/bucket/run/step-00000008/state.json", b"{}")
    assert store.newest_whole() is None
    with pytest.raises(UserError, match=r"checkpoint\.remote: cannot list nowhere://x"):
        Store(tmp_path, CheckpointConfig(remote="nowhere://x")).newest_whole()
    (tmp_path / "here").mkdir(exist_ok=True)
    save(tmp_path / "here", 9)
    Store(tmp_path / "here", CheckpointConfig(remote="nowhere://x")).settle()
    assert "step-00000009 was not copied to nowhere://x" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where torch's writer meets it, in the middle of a file."""
    first = save(tmp_path, 4)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fails(*arguments: Any, **named: Any) -> None:
        raise full

    for owner, name in ((os, "fsync"), (checkpoint_files, "write_json"), (checkpoint_files, "described")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            with pytest.raises(SaveError, match="No space left on device"):
                save(tmp_path, 8)
        assert [path.name for path in tmp_path.iterdir()] == [first.name]
    verify(first)


def test_a_run_goes_on_when_its_disk_is_full(
    toy_run: Path,
    toy_config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fsync, many = os.fsync, [0]

    def full_once(file: int) -> None:
        many[0] += 1
        if many[0] == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_once)
        out = train(toy_config(tmp_path / "run", "--checkpoint.keep_last=3"))
    told = capsys.readouterr().err
    assert (
        "checkpoint of step 20 was not written: No space left on device. The run goes on; the newest whole one" in told
    )
    assert Store(out / "checkpoints", CheckpointConfig()).here() == [10, 30]
    assert all(torch.equal(value, weights(toy_run)[name]) for name, value in weights(out).items())

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 10**9 - 10**5, 10**5))
        with pytest.raises(
            UserError, match=r"3 checkpoints of about [\d.]+ GB must fit .* lower checkpoint\.keep_last"
        ):
            train(toy_config(tmp_path / "small"))
        assert not (tmp_path / "small" / "metrics.jsonl").exists(), "before the first batch"

    free = iter([10**10, 10**10, 0])  # at the start, at step 6, at step 12

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: Usage(10**10, 0, next(free)))
        with pytest.raises(UserError, match=r"checkpoint of step 12, the last, was not written: it needs .* Make room"):
            train(toy_config(tmp_path / "late", "--trainer.steps=12", "--checkpoint.every=6"))
    assert not (tmp_path / "late" / resume.DONE).exists()
    done = train(toy_config(tmp_path / "late", "--trainer.steps=12", "--checkpoint.every=6")) / resume.DONE
    assert json.loads(done.read_text())["resumed_at"] == 6


def test_room_counts_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(100, 70, 30))
    assert room(tmp_path, 10, CheckpointConfig()) is None
    told = room(tmp_path, 11, CheckpointConfig())
    assert told is not None
    assert "3 checkpoints" in told
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "shard").write_bytes(b"0" * 3)
    assert room(tmp_path, 11, CheckpointConfig()) is None


def test_going_on_reads_no_pickle_and_begins_from_others(
    toy_run: Path, toy_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A branch begins with another run's checkpoint, and goes on from its own afterwards."""

    def refused(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("a pickle was read")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, refused)
    out = tmp_path / "run"
    settings = [f"--branch_from={toy_run / 'checkpoints' / 'step-00000020'}", "--trainer.log_every=1"]
    train(toy_config(out, *settings))
    assert json.loads((out / resume.DONE).read_text())["resumed_at"] == 20
    assert all(torch.equal(value, weights(toy_run)[name]) for name, value in weights(out).items())
    (out / resume.DONE).unlink()
    train(toy_config(out, *settings))
    assert json.loads((out / resume.DONE).read_text())["resumed_at"] == 30, "its own are newer"
    shutil.copytree(toy_run / "checkpoints" / "step-00000020", tmp_path / "mixed" / "checkpoints" / "step-00000020")
    with pytest.raises(UserError, match=r"step-00000020 is of another run: optim\.lr is 0\.005 there and 0\.1 here"):
        train(toy_config(tmp_path / "mixed", "--optim.lr=0.1"))


def test_other_settings_of_saving_are_no_other_run(toy_run: Path, toy_config: Config, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(toy_run, tmp_path / "moved"))
    changed = ["--checkpoint.keep_last=5", "--survival.not_finite=skip", "--ranks.timeout_minutes=3"]
    assert train(toy_config(moved, *changed)) == moved
    with pytest.raises(UserError, match=r"another config \(optim\.lr is 0\.005 there and 1e-05 here\)"):
        train(toy_config(moved, "--optim.lr=1e-5"))


def test_odd_ranks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(*answers: tuple[dict[str, Any], str | None]) -> None:
        monkeypatch.setattr("medclip_lab.distributed.everyones", lambda mine: list(answers))
        refuse_odd_ranks(*answers[0])

    same = ({"seed": 1, "loss": "a"}, None)
    of(same, same, same)
    with pytest.raises(UserError, match="ranks disagree on loss: rank 2 has 'b', unlike 3 others with 'a'"):
        of(same, same, ({"seed": 1, "loss": "b"}, None), same)
    with pytest.raises(UserError, match="rank 0 has 1, unlike 2 others with 2"):
        of(same, ({"seed": 2, "loss": "a"}, None), ({"seed": 2, "loss": "a"}, None))
    with pytest.raises(UserError, match="disagree on extra: rank 1 has None, unlike rank 0 with 3"):
        of(({"extra": 3}, None), ({}, None))
    with pytest.raises(UserError, match="on rank 1: no such folder"):
        of(same, ({}, "no such folder"))


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (CheckpointConfig, {"every": 0}, "must be at least 1, got 0 and 2"),
        (CheckpointConfig, {"minutes": -1.0}, "cannot be negative"),
        (CheckpointConfig, {"remote": "bucket"}, "a URL such as"),
        (SurvivalConfig, {"spike": -1.0}, "cannot be negative"),
        (SurvivalConfig, {"patience": 0}, "at least 1"),
        (RanksConfig, {"timeout_minutes": 0.0}, "must be positive"),
    ],
)
def test_settings_that_cannot_be(kind: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**values)
