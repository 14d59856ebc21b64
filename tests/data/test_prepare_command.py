"""Preparing as a command that is stopped, killed or runs out of disk, and is called again."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from medclip_lab.data.prepare.job import IN_PROGRESS

from .test_prepare import contents

SCRIPT = """
import signal
import sys
from medclip_lab.cli import main
from medclip_lab.data.sources import SOURCES

SOURCES["toy"] = "tests.data.toy_source:Toy"
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    sys.exit(main(sys.argv[1:]))
"""
COMMAND = (
    "prepare toy --studies 60 --broken 3 41 --remarked 4 20 --copies 9:1 25:24 30:7 --slow 0.1 --out shards "
    "--samples-per-shard 6 --max-bad 0.1 --duplicates drop --workers 2"
)


def start(folder: Path, **options: Any) -> "subprocess.Popen[str]":
    folder.mkdir(exist_ok=True)
    (folder / "run.py").write_text(SCRIPT)
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "run.py", *COMMAND.split()],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


@pytest.fixture(scope="module")
def whole_by_command(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("command")
    process = start(folder)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return contents(folder / "shards")


def group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def wait_until(true: Callable[[], bool]) -> None:
    for _ in range(6000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("never")


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_while_preparing_then_called_again(
    tmp_path: Path, whole_by_command: dict[str, str], kind: signal.Signals
) -> None:
    process = start(tmp_path)
    progress = tmp_path / "shards" / IN_PROGRESS
    wait_until(lambda: len(list(progress.glob("*.json"))) >= 2 or process.poll() is not None)
    if kind == signal.SIGINT:
        os.killpg(process.pid, kind)  # as a terminal does it: to the workers too
    else:
        process.kill()  # and the workers have to notice
    _, errors = process.communicate(timeout=60)
    wait_until(partial(group_is_gone, process.pid))
    assert not (tmp_path / "shards" / "manifest.json").exists()
    if kind == signal.SIGINT:
        assert process.returncode == 130
        assert errors.strip() == "medclip-lab prepare: interrupted; nothing is half-written, call it again"
        assert not list((tmp_path / "shards").glob("**/*.tmp"))
    finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "shards").glob("train-0000[0-1].tar")}
    assert finished
    process = start(tmp_path)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert contents(tmp_path / "shards") == whole_by_command


def test_a_full_disk_is_one_line_and_then_goes_on(tmp_path: Path, whole_by_command: dict[str, str]) -> None:
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (30_000, 30_000))  # a shard has about 60 kB
    process = start(tmp_path, preexec_fn=limit)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.strip() == (
        "medclip-lab prepare: out: cannot write to shards: File too large: mend it and call it again, it goes on"
    )
    assert [path.name for path in (tmp_path / "shards").iterdir() if path.name != IN_PROGRESS] == []
    process = start(tmp_path)
    process.communicate(timeout=120)
    assert contents(tmp_path / "shards") == whole_by_command
