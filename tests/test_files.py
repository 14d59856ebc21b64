"""What is replaced is whole at every moment, before or after."""

from pathlib import Path

import pytest

from medclip_lab import files
from medclip_lab.files import atomic_folder, write_json


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


def test_the_folder_one_stands_in(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(old)
    replace(Path())
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
