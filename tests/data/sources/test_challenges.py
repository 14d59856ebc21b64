"""RSNA Pneumonia and SIIM-ACR Pneumothorax: made-up images in the layouts of the challenges."""

import json
from pathlib import Path
from typing import Any

import pytest

from medclip_lab.data.findings import CHEXPERT14
from medclip_lab.data.sources.common import split_by_hash
from medclip_lab.data.sources.rsna_pneumonia import RsnaPneumonia
from medclip_lab.data.sources.siim_acr import SiimAcr
from medclip_lab.errors import UserError
from tests.data.sources.helpers import dicom, run, write, write_csv

BLANK: dict[str, int | None] = dict.fromkeys(CHEXPERT14)

# --------------------------------------------------------------------------------------------------------------- RSNA

BOXES = ("patientId", "x", "y", "width", "height", "Target")
OPAQUE, NORMAL, OTHER = (f"{number:08d}-0000-4000-8000-000000000000" for number in range(3))


@pytest.fixture
def rsna(tmp_path: Path) -> Path:
    home = tmp_path / "rsna"
    boxes = [
        (NORMAL, "", "", "", "", 0),
        (OPAQUE, "264.0", "152.0", "213.0", "379.0", 1),
        (OPAQUE, "562.0", "152.0", "256.0", "453.0", 1),
        (OTHER, "", "", "", "", 0),
    ]
    write_csv(home / "stage_2_train_labels.csv", BOXES, boxes)
    classes = [
        (NORMAL, "Normal"), (OPAQUE, "Lung Opacity"), (OPAQUE, "Lung Opacity"), (OTHER, "No Lung Opacity / Not Normal")
    ]  # fmt: skip
    write_csv(home / "stage_2_detailed_class_info.csv", ("patientId", "class"), classes)
    for name in (OPAQUE, NORMAL, OTHER):
        data = dicom(ViewPosition="AP", PatientAge="051", PatientSex="F", PatientID=name)
        write(home / "stage_2_train_images" / f"{name}.dcm", data)
    return home


def mapping(home: Path, **patients: str) -> None:
    rows = [
        {"subset_img_id": name, "img_id": f"{patient}_004.png", "orig_labels": ["Pneumonia"], "StudyInstanceUID": "1.2"}
        for name, patient in patients.items()
    ]
    write(home / "pneumonia-challenge-dataset-mappings_2018.json", json.dumps(rows))


def test_rsna_classes_boxes_and_headers(rsna: Path, tmp_path: Path) -> None:
    outcome = run(RsnaPneumonia(rsna), tmp_path / "shards")
    assert list(outcome.samples) == [f"rsna-{name}" for name in (NORMAL, OPAQUE, OTHER)]
    normal, opaque, other = outcome.samples.values()
    assert normal.labels == BLANK | {"No Finding": 1, "Lung Opacity": 0, "Pneumonia": 0}
    assert opaque.labels == BLANK | {"No Finding": 0, "Lung Opacity": 1, "Pneumonia": 1}
    assert other.labels == BLANK | {"No Finding": 0, "Lung Opacity": 0, "Pneumonia": 0}
    assert opaque.view == ["AP"]
    assert opaque.extra == {
        "age": 51, "sex": "F", "class": "Lung Opacity",
        "boxes": [[264.0, 152.0, 213.0, 379.0], [562.0, 152.0, 256.0, 453.0]],
    }  # fmt: skip
    assert opaque.images == [("dcm", (rsna / "stage_2_train_images" / f"{OPAQUE}.dcm").read_bytes())]
    assert all(record.patient_id == record.study_id for record in outcome.records)


def test_rsna_patients_are_those_of_nih_where_the_mapping_is(rsna: Path) -> None:
    mapping(rsna, **{OPAQUE: "00004342", NORMAL: "00004342"})
    records = {record.study_id: record for record in RsnaPneumonia(rsna).records()}
    assert {records[f"rsna-{name}"].patient_id for name in (OPAQUE, NORMAL)} == {"nih-00004342"}
    assert records[f"rsna-{OPAQUE}"].split == split_by_hash("nih-00004342")
    assert records[f"rsna-{OTHER}"].patient_id == f"rsna-{OTHER}"


def test_rsna_missing_broken_and_hostile_images(rsna: Path) -> None:
    write(rsna.parent / "outside.dcm", dicom())
    images = rsna / "stage_2_train_images"
    (images / f"{NORMAL}.dcm").unlink()
    (images / f"{OPAQUE}.dcm").write_bytes(bytes(128) + b"DICM" + b"\xff" * 50)
    hostile = ("../../outside", str(rsna.parent / "outside"))
    write_csv(
        rsna / "stage_2_detailed_class_info.csv",
        ("patientId", "class"),
        [(name, "Normal") for name in (NORMAL, OPAQUE, *hostile)],
    )
    write_csv(
        rsna / "stage_2_train_labels.csv", BOXES, [(name, "", "", "", "", 0) for name in (NORMAL, OPAQUE, *hostile)]
    )
    outcome = run(RsnaPneumonia(rsna))
    assert not outcome.samples
    assert [cause for cause, _ in outcome.bad.values()] == ["missing image", "unreadable image", *["missing image"] * 2]


@pytest.mark.parametrize(
    "table, columns, rows, message",
    [
        ("stage_2_train_labels.csv", BOXES[:-1], [], "no column 'Target'"),
        ("stage_2_train_labels.csv", BOXES, [], "no row below"),
        ("stage_2_train_labels.csv", BOXES, [(NORMAL, "", "", "", "", 1)], "line 2: the Target contradicts the class"),
        (
            "stage_2_train_labels.csv",
            BOXES,
            [("unknown", "", "", "", "", 1)],
            "line 2: the image is not in stage_2_det",
        ),
        ("stage_2_train_labels.csv", BOXES, [(OPAQUE, "1", "2", "", "4", 1)], "line 2: a box needs four numbers"),
        ("stage_2_detailed_class_info.csv", ("patientId", "class"), [(NORMAL, "Fine")], "unknown class 'Fine'"),
        (
            "stage_2_detailed_class_info.csv",
            ("patientId", "class"),
            [(NORMAL, "Normal"), (NORMAL, "Lung Opacity")],
            "line 3: another class than before",
        ),
    ],
)
def test_rsna_wrong_tables(rsna: Path, table: str, columns: Any, rows: Any, message: str) -> None:
    write_csv(rsna / table, columns, rows)
    with pytest.raises(UserError, match=message):
        RsnaPneumonia(rsna).records()


def test_rsna_a_wrong_mapping_and_a_missing_table(rsna: Path) -> None:
    path = write(rsna / "pneumonia-challenge-dataset-mappings_2018.json", '[{"subset_img_id": "a"}]')
    with pytest.raises(UserError, match="no JSON list of objects with subset_img_id and img_id"):
        RsnaPneumonia(rsna).records()
    path.unlink()
    (rsna / "stage_2_train_labels.csv").unlink()
    with pytest.raises(UserError, match=r"rsna-pneumonia: neither stage_2_train_labels\.csv"):
        RsnaPneumonia(rsna).records()


# --------------------------------------------------------------------------------------------------------------- SIIM

MASKED, FREE, LOST = (f"1.2.276.0.7230010.3.1.4.8323329.{number}.1517875201.850819" for number in (1000, 2000, 3000))
RLE = ("ImageId", " EncodedPixels")  # with a blank, as in the original


@pytest.fixture
def siim(tmp_path: Path) -> Path:
    home = tmp_path / "siim"
    rows = [(MASKED, " 387620 23 996 33"), (MASKED, " 1 2 3 4"), (FREE, " -1")]
    write_csv(home / "train-rle.csv", RLE, rows)
    for number, name in enumerate((MASKED, FREE)):
        data = dicom(number, ViewPosition="PA", PatientAge="51", PatientSex="M")
        write(home / "dicom-images-train" / f"{name}.1" / f"{name}.2" / f"{name}.dcm", data)
    write(home / "dicom-images-test" / "9" / "9.1" / "9.dcm", dicom())
    return home


def test_siim_masks_are_pneumothoraces(siim: Path, tmp_path: Path) -> None:
    outcome = run(SiimAcr(siim), tmp_path / "shards")
    assert list(outcome.samples) == [f"siim-{MASKED}", f"siim-{FREE}"]  # of the test images nothing is known
    masked, free = outcome.samples.values()
    assert masked.labels == BLANK | {"Pneumothorax": 1, "No Finding": 0}
    assert free.labels == BLANK | {"Pneumothorax": 0}
    assert masked.extra == {"age": 51, "sex": "M", "masks": 2}
    assert (masked.view, free.extra["masks"]) == (["PA"], 0)
    assert masked.key != free.key  # though all that tells them apart stands behind dots
    assert "." not in masked.key


def test_siim_stage_2_is_flat_and_has_another_table(siim: Path) -> None:
    expected = run(SiimAcr(siim)).samples
    (siim / "train-rle.csv").rename(siim / "stage_2_train.csv")
    for name in (MASKED, FREE):
        file = siim / "dicom-images-train" / f"{name}.1" / f"{name}.2" / f"{name}.dcm"
        write(siim / "stage_2_images" / file.name, file.read_bytes())
        file.unlink()
    assert run(SiimAcr(siim)).samples == expected


def test_siim_images_that_are_not_there(siim: Path) -> None:
    outside = write(siim.parent / "outside.dcm", dicom())
    rows = [(LOST, "-1"), ("../outside", "-1"), (str(outside.with_suffix("")), "-1")]
    write_csv(siim / "train-rle.csv", RLE, rows)
    outcome = run(SiimAcr(siim))
    assert not outcome.samples
    assert {cause for cause, _ in outcome.bad.values()} == {"missing image"}


@pytest.mark.parametrize(
    "columns, rows, message",
    [
        (("ImageId", "Pixels"), [], "no column 'EncodedPixels'"),
        (RLE, [], "no row below"),
        (RLE, [(MASKED, "")], "line 2: ImageId and EncodedPixels must not be empty"),
    ],
)
def test_siim_wrong_tables(siim: Path, columns: Any, rows: Any, message: str) -> None:
    write_csv(siim / "train-rle.csv", columns, rows)
    with pytest.raises(UserError, match=message):
        SiimAcr(siim).records()


def test_siim_without_table_or_images(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "")
    with pytest.raises(UserError, match=r"siim-acr: neither train-rle\.csv"):
        SiimAcr(tmp_path).records()
    write_csv(tmp_path / "train-rle.csv", RLE, [(FREE, "-1")])
    with pytest.raises(UserError, match=r"siim-acr: no \.dcm file"):
        SiimAcr(tmp_path).records()
