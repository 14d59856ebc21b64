"""What is replaced is whole at every moment, before or after."""

import errno
from pathlib import Path
from typing import Any

import pytest

from medclip_lab import files
from medclip_lab.errors import UserError
from medclip_lab.files import atomic_file, atomic_folder, write_json


class Killed(BaseException):
    pass


@pytest.fixture
def old(tmp_path: Path) -> Path:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "old").write_text("old")
    return tmp_path / "bundle"


def replace(path: Path) -> None:
    with atomic_folder(path) as folder:
        (folder / "new").write_text("new")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("at_once", [True, False])
def test_a_folder_is_replaced(old: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool) -> None:
    if not at_once:
        monkeypatch.setattr(files, "_rename_exchange", lambda one, other: False)
    replace(old)
    assert (names(old), names(old.parent)) == (["new"], ["bundle"])
    replace(old.parent / "another")
    assert names(old.parent) == ["another", "bundle"]


def test_where_names_are_exchanged_none_is_missing_meanwhile(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one rename of the folder to another name: a kill finds the old folder or the new one."""
    if not files._rename_exchange(old, old):
        pytest.skip("this disk exchanges no names")

    def rename(self: Path, target: Path) -> Path:
        raise AssertionError(f"{self} renamed to {target}")

    monkeypatch.setattr(Path, "rename", rename)
    replace(old)
    assert names(old) == ["new"]


def test_a_rename_that_fails_brings_the_old_folder_back(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_rename_exchange", lambda one, other: False)
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if target == old and (self / "new").exists():
            raise Killed
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(Killed):
        replace(old)
    assert (names(old), names(old.parent)) == (["old"], ["bundle"])


@pytest.mark.parametrize("new_too", [True, False])
def test_a_kill_between_two_renames_is_told_of(old: Path, monkeypatch: pytest.MonkeyPatch, new_too: bool) -> None:
    """Where names cannot be exchanged: a process that is killed there brings nothing back."""
    monkeypatch.setattr(files, "_rename_exchange", lambda one, other: False)
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if (self / "new").exists() or (self.name.endswith(".old") and target == old):
            raise Killed
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(Killed):
            replace(old)
    with pytest.raises(UserError, match=r"bundle; a kill left it at .*\.bundle\.old: rename that back"):
        files.existing_folder(old, "bundle")
    (old.parent / ".bundle.old").rename(old)
    assert names(files.existing_folder(old, "bundle")) == ["old"]
    if new_too:  # what an earlier kill left is no hindrance
        (old.parent / ".bundle.old").mkdir()
        (old.parent / ".bundle.old" / "older").touch()
    replace(old)
    assert (names(old), names(old.parent)) == (["new"], ["bundle"])


def test_the_folder_one_stands_in(
    old: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(old)
    replace(Path())
    assert 'type cd "$PWD"' in capsys.readouterr().err
    assert names(Path()) == ["new"]
    assert Path.cwd() == old
    with files.atomic_file(Path("a.json")) as temporary:
        temporary.write_text("{}")
    write_json(Path("b.json"), {})
    assert names(old) == ["a.json", "b.json", "new"]


def test_a_link_to_a_folder_stays_one(old: Path) -> None:
    (old.parent / "link").symlink_to(old)
    replace(old.parent / "link")
    assert (old.parent / "link").is_symlink()
    assert (names(old), names(old.parent)) == (["new"], ["bundle", "link"])


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), OSError("65536 requested and 0 written")]
)
@pytest.mark.parametrize("atomic", [atomic_file, atomic_folder])
def test_a_full_disk_is_told_with_its_folder(tmp_path: Path, atomic: Any, error: OSError) -> None:
    """Neither a write to an open file nor numpy's says where it was."""
    with pytest.raises(OSError, match="No space left on device") as told, atomic(tmp_path / "out"):
        raise error
    assert (told.value.errno, told.value.filename) == (errno.ENOSPC, str(tmp_path))
    assert names(tmp_path) == []
    elsewhere = OSError(errno.ENOENT, "No such file or directory", "source")
    with pytest.raises(OSError, match="source") as told, atomic(tmp_path / "out"):
        raise elsewhere
    assert told.value is elsewhere, "what a block reads may lie anywhere"
