"""Every reader that is registered: what it is called, what it takes, what it says of a folder that holds nothing."""

import dataclasses
import re
from pathlib import Path

import pytest

from medclip_lab.data.sources import SOURCES, source_class
from medclip_lab.errors import UserError
from tests.data.sources.helpers import write

DOCS = Path(__file__).parents[3] / "docs" / "datasets.md"
OLDER = ("phantom", "nih-cxr14", "openi", "csv")  # these have tests of their own
READERS = [name for name in SOURCES if name not in OLDER]


@pytest.mark.parametrize("name", READERS)
def test_a_reader_is_a_frozen_dataclass_whose_fields_are_explained(name: str) -> None:
    cls = source_class(name)
    first, *others = dataclasses.fields(cls)
    assert cls.name == name
    assert cls.__dataclass_params__.frozen
    assert first.name == "folder"
    assert first.default is dataclasses.MISSING
    assert all(field.default is not dataclasses.MISSING for field in others)
    assert all(field.metadata["help"] for field in (first, *others))
    assert cls(Path("anywhere")).license
    assert not cls.__doc__.startswith(cls.__name__)  # a text for people, not the signature that dataclass makes


@pytest.mark.parametrize("name", READERS)
def test_a_reader_is_documented_with_its_command(name: str) -> None:
    text = DOCS.read_text(encoding="utf-8")
    commands = re.findall(r"^medclip-lab prepare (\S+) \S+ .*--out (\S+)$", text, re.MULTILINE)
    assert (name, f"shards/{name}") in commands


@pytest.mark.parametrize("name", READERS)
def test_options_in_the_documented_command_are_those_of_the_reader(name: str) -> None:
    text = DOCS.read_text(encoding="utf-8")
    fields = {field.name.replace("_", "-") for field in dataclasses.fields(source_class(name))}
    (command,) = re.findall(rf"^medclip-lab prepare {name} .*$", text, re.MULTILINE)
    assert {*re.findall(r"--([\w-]+)", command)} <= fields | {"out"}


@pytest.mark.parametrize("name", READERS)
def test_folders_that_hold_nothing_are_named_in_one_line(name: str, tmp_path: Path) -> None:
    empty, other = tmp_path / "empty", tmp_path / "other"
    empty.mkdir()
    write(other / "readme.txt", "no data")
    options = {"key_file": write(tmp_path / "key", "0123456789abcdef")} if name == "dicom-folder" else {}
    for folder in (tmp_path / "nowhere", empty, other):
        with pytest.raises(UserError) as caught:
            source_class(name)(folder, **options).records()
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)
