"""Studies from a table of images and reports."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medclip_lab.data.decode import decode_image
from medclip_lab.data.quarantine import Quarantine
from medclip_lab.data.sample import Sample
from medclip_lab.data.shards import write_shards
from medclip_lab.data.sources.common import split_by_hash
from medclip_lab.data.sources.csv_pairs import CsvPairs
from medclip_lab.data.sources.reading import read_all
from medclip_lab.errors import UserError

from .test_sources import DICOM, PNG, encoded


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Path]:
    """Writes a table, and images for the names in `images`, beside each other."""

    def make(text: str, images: dict[str, bytes] | None = None, name: str = "table.csv") -> Path:
        for image, data in (images or {}).items():
            (tmp_path / image).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / image).write_bytes(data)
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return make


def read(path: Path, **options: Any) -> list[Sample]:
    return list(read_all(CsvPairs(path, **options)))


def test_csv_pairs_of_image_and_text(table: Callable[..., Path]) -> None:
    path = table(
        'image,text\na.png,"FINDINGS: Small effusion. IMPRESSION: No edema."\nsub/b.jpg,Normal chest.\n',
        {"a.png": PNG, "sub/b.jpg": encoded("JPEG")},
    )
    assert len(CsvPairs(path).records()) == 2
    first, second = read(path, license="CC0-1.0")
    assert first.images == [("png", PNG)]
    assert first.sections == {"findings": "Small effusion.", "impression": "No edema."}
    assert first.text == "Small effusion. No edema."
    assert (first.labels["Pleural Effusion"], first.labels["Edema"], first.labels["Fracture"]) == (1, 0, None)
    assert len(first.sentences) == 2
    assert (first.study_id, first.patient_id, first.license) == ("a.png", "a.png", "CC0-1.0")
    assert first.split == split_by_hash("a.png")
    assert second.study_id == "sub/b.jpg"
    assert second.images[0][0] == "jpg"
    assert second.labels["No Finding"] == 1
    assert first.key != second.key


def test_csv_takes_images_for_what_they_are_not_for_what_they_are_called(table: Callable[..., Path]) -> None:
    path = table("image,text\na.jpg,Normal chest.\nb.tif,Normal chest.\n", {"a.jpg": PNG, "b.tif": encoded("JPEG")})
    samples = read(path)
    assert [sample.images[0][0] for sample in samples] == ["png", "jpg"]
    for sample in samples:
        decode_image(sample.images[0][1], sample.images[0][0])


def test_csv_never_repeats_a_long_cell(table: Callable[..., Path]) -> None:
    path = table("image,text,Edema\na.png,Normal.,no edema and no pneumothorax\n", {"a.png": PNG})
    with pytest.raises(UserError, match="'Edema' holds a text of 28 characters, one of 1, 0, -1 or blank"):
        read(path)
    path = table("image,text\n~nobody-of-this-name/a.png,Normal chest.\n", {})
    assert read(path) == []


def test_csv_rows_of_a_study_are_one_study(table: Callable[..., Path], tmp_path: Path) -> None:
    path = table(
        "study_id,patient_id,image,view,text,split\n"
        "s1,p1,a.png,pa,Small effusion.,train\n"
        "s2,p1,c.dcm,,Clear lungs.,Training\n"
        "s1,p1,b.png,lateral,Small effusion.,train\n"
        "s1,p1,a.png,pa,Unchanged since yesterday.,train\n",
        {"pictures/a.png": PNG, "pictures/b.png": encoded(shade=10), "pictures/c.dcm": DICOM},
    )
    assert len(CsvPairs(path).records()) == 2
    one, two = read(path, image_folder=tmp_path / "pictures")
    assert (one.study_id, one.patient_id, one.view) == ("s1", "p1", ["PA", "LATERAL"])
    assert one.images == [("png", PNG), ("png", encoded(shade=10))]
    assert one.text == "Small effusion. Unchanged since yesterday."
    assert (two.images, two.view, two.split) == ([("dcm", DICOM)], [""], "train")


def test_csv_label_columns(table: Callable[..., Path]) -> None:
    text = "image,text,pleural_effusion,Edema,tumour\na.png,Small effusion.,0.0,-1,1.0\nb.png,,1,,0\n"
    path = table(text, {"a.png": PNG, "b.png": PNG})
    first, second = read(path)
    assert first.labels == {"Edema": -1, "Pleural Effusion": 0}
    assert second.labels == {"Edema": None, "Pleural Effusion": 1}
    assert first.sentences[0]["labels"] == {"Pleural Effusion": 1}  # a sentence is labelled by what it says
    assert [sample.labels for sample in read(path, labels=("tumour",))] == [{"tumour": 1}, {"tumour": 0}]
    assert second.text == ""


def test_csv_texts_that_are_no_chest_reports(table: Callable[..., Path]) -> None:
    (sample,) = read(table("text\nA mass in the left breast.\n"), image="", label_text=False, modality="MG")
    assert (sample.labels, sample.sentences, sample.modality) == ({}, [], "MG")
    assert sample.text == "A mass in the left breast."


def test_csv_text_only_and_image_only_tables(table: Callable[..., Path]) -> None:
    (text_only,) = read(table("report\nClear lungs.\n"), image="", text="report")
    assert (text_only.images, text_only.text) == ([], "Clear lungs.")
    (image_only,) = read(table("image\na.png\n", {"a.png": PNG}), text="")
    assert (image_only.text, image_only.labels, image_only.sections) == ("", {}, {})


def test_csv_preamble_is_text_where_nothing_else_is(table: Callable[..., Path]) -> None:
    (sample,) = read(table("text\nClear lungs. COMPARISON: None seen.\n"), image="")
    assert sample.text == "Clear lungs."


def test_csv_counts_bad_images_and_empty_rows(table: Callable[..., Path], tmp_path: Path) -> None:
    path = table(
        "study_id,image,text\n1,a.png,Clear.\n2,missing.png,Clear.\n3,cut.png,Clear.\n4,,\n5,note.txt,Clear.\n6,a.png,Clear.\n"
        "6,cut.png,Clear.\n7,,Clear.\n8,fake.dcm,Clear.\n9,a.png,INDICATION: Cough.\n",
        {"a.png": PNG, "cut.png": PNG[:-30], "note.txt": b"x", "fake.dcm": b"x" * 200},
    )
    listed = tmp_path / "bad.jsonl"
    quarantine = Quarantine(9, ceiling=1.0, path=listed)
    samples = list(read_all(CsvPairs(path), quarantine))
    assert [sample.study_id for sample in samples] == ["1", "6", "7", "9"]
    assert samples[1].images == [("png", PNG)]
    assert samples[2].images == []
    assert samples[3].text == ""
    assert quarantine.causes == {
        "missing image": 1, "unreadable image": 3, "neither image nor text": 1, "unknown image format": 1
    }  # fmt: skip
    assert "cut.png" not in listed.read_text()
    with pytest.raises(UserError, match="unusable"):
        read(path)


def test_csv_absolute_paths_do_not_name_studies(table: Callable[..., Path], tmp_path: Path) -> None:
    images = {"one/a.png": PNG, "two/a.png": PNG}
    (tmp_path / "one").mkdir()
    path = table("image,text\n" + "".join(f"{tmp_path / name},Clear.\n" for name in images), images)
    first, second = read(path)
    assert first.study_id.startswith("a.png-")
    assert first.study_id != second.study_id
    assert str(tmp_path) not in first.study_id


@pytest.mark.parametrize(
    "text, options, message",
    [
        ("", {}, "the file is empty"),
        ("image,text\n", {}, "no row"),
        ("picture,text\na.png,b\n", {}, "no column 'image'.*'picture', 'text'"),
        ("image,report\na.png,b\n", {"text": "reports"}, r"no column 'reports' \(did you mean 'report'\?\)"),
        ("image,text\na.png,b\n", {"patient": "pat"}, "no column 'pat'"),
        ("image,text\na.png,b\n", {"labels": ("Edema",)}, "no column 'Edema'"),
        ("image,text\na.png,b\n", {"image": "", "text": ""}, "neither an image nor a text column"),
        ("image,text,Edema\na.png,b,yes\n", {}, "line 2: label column 'Edema' holds 'yes', one of 1, 0, -1 or blank"),
        ("image,text,split\na.png,b,all\n", {}, "line 2: column 'split' holds 'all'"),
        ("image,text,split\na.png,b,\n", {}, "line 2: column 'split' is empty"),
        ("image,text,study_id\na.png,b,\n", {}, "line 2: the study column 'study_id' is empty"),
        ("image,text,study_id,split\na.png,b,1,val\n\na.png,b,1,test\n", {}, "line 4: another split than on line 2"),
        ("image,text,study_id,patient_id\na.png,b,1,x\na.png,b,1,y\n", {}, "line 3: another patient than on line 2"),
        ("image,text,study_id,Edema\na.png,b,1,1\na.png,b,1,0\n", {}, "line 3: other labels than on line 2"),
        ("image,text\na.png,b,c\n", {}, "line 2: 3 cells, but 2 columns"),
        ('image,text\na.png,"b\n', {}, "line 2: unexpected end of data"),
    ],
)
def test_csv_says_what_is_wrong(table: Callable[..., Path], text: str, options: dict[str, Any], message: str) -> None:
    path = table(text, {"a.png": PNG})
    with pytest.raises(UserError, match=message) as caught:
        read(path, **options)
    assert str(path) in str(caught.value)


def test_csv_needs_a_utf8_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "nowhere.csv")
    (tmp_path / "latin.csv").write_bytes("image,text\na.png,caf\xe9\n".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8 at byte"):
        read(tmp_path / "latin.csv")


def test_csv_reaches_shards(table: Callable[..., Path], tmp_path: Path) -> None:
    rows = "".join(f"s{n},p{n // 2},a.png,Case {n}: small effusion.\n" for n in range(30))
    path = table("study_id,patient_id,image,text\n" + rows, {"a.png": PNG})
    manifest = write_shards(read_all(CsvPairs(path)), tmp_path / "shards", "csv")
    assert manifest.facts["samples"] == 30
