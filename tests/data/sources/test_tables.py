"""What readers share: tables, label cells, and names in tables that must never lead out of the data set."""

import gzip
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medclip_lab.data.findings import CHEXPERT14
from medclip_lab.data.sources.base import BadStudyError
from medclip_lab.data.sources.tables import (
    caption,
    files_by_name,
    find_image,
    frontal_first,
    label_value,
    map_findings,
    plain_path,
    read_images,
    read_rows,
    view_name,
)
from medclip_lab.errors import UserError
from tests.data.sources.helpers import image, write


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_rows_of_plain_and_compressed_tables(tmp_path: Path, suffix: str) -> None:
    text = '\ufeffa,b,c\r\n1, ,x\r\n\r\n2,"two\nlines, ""said""",\r\n3\r\n'
    path = write(tmp_path / f"table{suffix}", gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    assert list(read_rows(path, ("a", "b"), ("c", "d"))) == [
        (2, {"a": "1", "b": "", "c": "x", "d": ""}),
        (4, {"a": "2", "b": 'two\nlines, "said"', "c": "", "d": ""}),
        (6, {"a": "3", "b": "", "c": "", "d": ""}),
    ]


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "no column 'a'"),
        (b"b\n1\n", r"no column 'a'; the columns are 'b'"),
        (b"a,b\n1,2,3\n", "line 2: 3 cells, but 2 columns"),
        (b'a\n"open\n', "line 2: unexpected end of data"),
        (b"a\ncaf\xe9\n", "not UTF-8"),
        (gzip.compress(b"a\n" + b"1\n" * 5000)[:-20], "cannot be read: EOFError"),
        (gzip.compress(b"a\n1\n")[:10] + b"\xff" * 20, "cannot be read: error"),
    ],
)
def test_broken_tables_are_named_in_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    path = write(tmp_path / ("table.csv.gz" if data.startswith(b"\x1f\x8b") else "table.csv"), data)
    with pytest.raises(UserError, match=message) as caught:
        list(read_rows(path, ("a",)))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "cell, value",
    [
        ("", None),
        (" 1.0", 1),
        ("-1", -1),
        ("0.0", 0),
        (1, 1),
        (-1.0, -1),
        (0.0, 0),
        (None, None),
        (float("nan"), None),
        (True, 1),
    ],
)
def test_label_cells(cell: object, value: int | None) -> None:
    assert label_value(cell, "here", "Edema") == value


@pytest.mark.parametrize("cell", ["yes", "2", 0.5, "a patient's whole report in the wrong column"])
def test_what_is_no_label_is_refused_without_printing_a_text(cell: object) -> None:
    with pytest.raises(UserError, match="here: label column 'Edema' holds") as caught:
        label_value(cell, "here", "Edema")
    assert "patient" not in str(caught.value)


def test_findings_map_to_states() -> None:
    names = {"effusion": ["Pleural Effusion"], "empyema": ["Pleural Effusion", "Pneumonia"], "normal": ["No Finding"]}
    states = map_findings(names, ["effusion", "something else"], ["empyema"])
    # what a finding makes present is not made uncertain by another one
    assert {name: state for name, state in states.items() if state is not None} == {
        "Pleural Effusion": 1, "Pneumonia": -1, "No Finding": 0
    }  # fmt: skip
    assert list(states) == list(CHEXPERT14)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/passwd",
        "../a.png",
        "a/../../b.png",
        "a//b.png",
        "./a.png",
        "~/a.png/..",
        "a\\b.png",
        "C:a.png",
        "a\n.png",
        "a\0b",
    ],
)
def test_names_that_are_no_plain_paths(name: str) -> None:
    assert plain_path(name) is None


def test_a_plain_path_is_kept() -> None:
    assert plain_path("train/patient1/view 1.png") == PurePosixPath("train/patient1/view 1.png")


@given(st.text(st.sampled_from("ab./\\:~\0\n é"), max_size=30) | st.text(max_size=300))
def test_no_name_leads_out_of_the_folder(name: str) -> None:
    root = Path("/data/set")
    path = plain_path(name)
    if path is not None:
        joined = root / path
        assert joined.is_relative_to(root)
        assert ".." not in joined.parts
        assert joined != root
    find_image([root], name)  # whatever the name is, it is looked for or refused, but nothing is raised


def test_images_are_found_under_the_first_root_that_has_them(tmp_path: Path) -> None:
    write(tmp_path / "b/x/1.png", b"")
    write(tmp_path / "c/x/1.png", b"")
    assert find_image([tmp_path / name for name in "abc"], "x/1.png") == tmp_path / "b/x/1.png"
    assert find_image([tmp_path / "b"], "x") is None  # a folder
    assert find_image([tmp_path / "b"], "x" * 5000) is None
    assert files_by_name(tmp_path, (".png",)) == {"1.png": tmp_path / "b/x/1.png"}


def test_images_of_a_study(tmp_path: Path) -> None:
    notes: list[tuple[str, str, bool]] = []

    def note(cause: str, reason: str, counted: bool = False) -> None:
        notes.append((cause, reason, counted))

    good = write(tmp_path / "good.png", image())
    found = read_images([None, good, ("png", image(7)), ("png", b"no image")], note)
    assert found.images == [("png", image()), ("png", image(7))]
    assert found.places == [1, 2]
    assert notes == [("missing image", "2 of 4 images: no such file", True)]
    with pytest.raises(BadStudyError, match="2 of 2 images: not a JPEG") as caught:
        read_images([("png", b""), None], note)
    assert caught.value.cause == "unreadable image"
    assert read_images([], note) == ([], [])


def test_views() -> None:
    assert [view_name(view) for view in ("pa", "L", "LL", "AP_horizontal", "UNK", "nan", "COSTAL", "")] == [
        "PA", "LATERAL", "LATERAL", "AP", "", "", "COSTAL", ""
    ]  # fmt: skip
    assert frontal_first(["LATERAL", "", "PA", "AP"]) == [2, 3, 0, 1]


def test_a_caption_is_text_without_labels() -> None:
    assert caption(" A  CT\nscan. IMPRESSION: none ").text == "A CT scan. IMPRESSION: none"
    assert caption("  -- ").sections == {}
    assert caption("No effusion.").labels == {}


def test_class_numbers_of_chexbert_are_told_apart_from_states() -> None:
    with pytest.raises(UserError, match=r"one of 1, 0, -1 or blank expected \(class numbers of CheXbert\?"):
        label_value("3.0", "table.csv, line 2", "Edema")
    with pytest.raises(UserError, match=r"blank expected$"):
        label_value("yes", "table.csv, line 2", "Edema")
