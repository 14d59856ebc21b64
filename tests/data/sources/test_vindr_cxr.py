"""VinDr-CXR: made-up images in its layout."""

from pathlib import Path

import pytest

from medclip_lab.data.findings import CHEXPERT14
from medclip_lab.data.sources.vindr_cxr import CHEXPERT_OF, OWN, VindrCxr
from medclip_lab.errors import UserError
from tests.data.sources.helpers import dicom, run, write, write_csv

# The order of the columns in the original; the table of the test images has "Other disease" and no rad_id.
FINDINGS = (
    *("Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Clavicle fracture", "Consolidation"),
    *("Edema", "Emphysema", "Enlarged PA", "ILD", "Infiltration", "Lung Opacity", "Lung cavity", "Lung cyst"),
    *("Mediastinal shift", "Nodule/Mass", "Pleural effusion", "Pleural thickening", "Pneumothorax"),
    *("Pulmonary fibrosis", "Rib fracture", "Other lesion", "COPD", "Lung tumor", "Pneumonia", "Tuberculosis"),
)
TRAIN = ("image_id", "rad_id", *FINDINGS, "Other diseases", "No finding")
TEST = ("image_id", *FINDINGS, "Other disease", "No finding")


def cells(columns: tuple[str, ...], image: str, *present: str, rad: str = "") -> list[str]:
    return (
        [image]
        + ([rad] if "rad_id" in columns else [])
        + ["1" if name in present else "0" for name in columns if not name.endswith("_id")]
    )


FIRST, SECOND, THIRD = (
    "50a418190bc3fb1ef1633bf9678929b3",
    "21a10246a5ec7af151081d0cd6d65dc9",
    "9a5094b2563a1ef3ff50dc5c7ff71345",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    home = tmp_path / "vindr-cxr"
    train = [
        cells(TRAIN, FIRST, "Infiltration", "Aortic enlargement", "Nodule/Mass", rad="R1"),
        cells(TRAIN, FIRST, "Infiltration", "Aortic enlargement", rad="R2"),
        cells(TRAIN, FIRST, "Infiltration", "Other diseases", rad="R3"),
        *(cells(TRAIN, SECOND, "No finding", rad=f"R{number}") for number in (4, 5, 6)),
    ]
    write_csv(home / "annotations" / "image_labels_train.csv", TRAIN, train)
    test = [cells(TEST, THIRD, "Other disease", "Rib fracture")]
    write_csv(home / "annotations" / "image_labels_test.csv", TEST, test)
    for place, shade in ((f"train/{FIRST}", 10), (f"train/{SECOND}", 20), (f"test/{THIRD}", 30)):
        write(home / f"{place}.dicom", dicom(shade))
    return home


def test_votes_of_radiologists_become_states(folder: Path, tmp_path: Path) -> None:
    outcome = run(VindrCxr(folder), tmp_path / "shards")
    assert list(outcome.samples) == [f"vindr-{FIRST}", f"vindr-{SECOND}", f"vindr-{THIRD}"]
    first, second, third = outcome.samples.values()
    assert first.images == [("dcm", (folder / f"train/{FIRST}.dicom").read_bytes())]
    assert first.view == ["PA"]
    stated = {name: state for name, state in first.labels.items() if state}
    assert stated == {"Lung Opacity": 1, "Aortic enlargement": 1, "Lung Lesion": -1, "Other diseases": -1}
    assert first.labels["Pneumothorax"] == first.labels["COPD"] == first.labels["No Finding"] == 0
    assert first.labels["Support Devices"] is None
    assert first.extra == {
        "readers": 3,
        "votes": {"Infiltration": 3, "Aortic enlargement": 2, "Nodule/Mass": 1, "Other diseases": 1},
    }
    assert {name for name, state in second.labels.items() if state} == {"No Finding"}
    assert {name for name, state in third.labels.items() if state == 1} == {"Fracture", "Other diseases"}
    assert third.extra["readers"] == 1


def test_every_label_of_the_set_is_read() -> None:
    assert {*CHEXPERT_OF, *OWN} == {*FINDINGS, "No finding"}
    assert not set(OWN) & set(CHEXPERT14)


def test_splits_are_the_official_ones(folder: Path) -> None:
    images = [f"{number:032x}" for number in range(300)]
    write_csv(folder / "annotations/image_labels_train.csv", TRAIN, [cells(TRAIN, name, rad="R1") for name in images])
    splits = [record.split for record in VindrCxr(folder).records()]
    assert splits[-1] == "test"
    assert set(splits[:-1]) == {"train", "val"}
    assert 10 < splits.count("val") < 60


def test_a_radiologist_counts_once(folder: Path) -> None:
    rows = [
        cells(TRAIN, FIRST, "Edema", rad="R1"),
        cells(TRAIN, FIRST, "Edema", rad="R1"),
        cells(TRAIN, FIRST, rad="R2"),
    ]
    write_csv(folder / "annotations/image_labels_train.csv", TRAIN, rows)
    sample = run(VindrCxr(folder)).samples[f"vindr-{FIRST}"]
    assert (sample.labels["Edema"], sample.extra) == (-1, {"readers": 2, "votes": {"Edema": 1}})


def test_missing_images_and_hostile_names(folder: Path) -> None:
    (folder / f"train/{FIRST}.dicom").write_bytes(b"no DICOM")
    (folder / f"train/{SECOND}.dicom").unlink()
    write(folder.parent / "outside.dicom", dicom())
    rows = [cells(TEST, "../../outside"), cells(TEST, str(folder.parent / "outside"))]
    write_csv(folder / "annotations/image_labels_test.csv", TEST, rows)
    outcome = run(VindrCxr(folder))
    assert not outcome.samples
    assert [cause for cause, _ in outcome.bad.values()] == ["unreadable image", *["missing image"] * 3]


@pytest.mark.parametrize(
    "columns, rows, message",
    [
        (TRAIN, [], "no row below"),
        (TRAIN[:-1], [], "no column 'No finding'"),
        (TRAIN, [[FIRST, "R1", "x", *["0"] * 27]], "line 2: column 'Aortic enlargement' holds 'x', 0 or 1"),
        ((*TRAIN[:-2], "Others", "No finding"), [[FIRST, "R1", *["0"] * 28]], "column 'Other diseases' holds ''"),
    ],
)
def test_wrong_tables(folder: Path, columns: tuple[str, ...], rows: list[list[str]], message: str) -> None:
    write_csv(folder / "annotations/image_labels_train.csv", columns, rows)
    with pytest.raises(UserError, match=message):
        VindrCxr(folder).records()


def test_a_missing_table(folder: Path) -> None:
    (folder / "annotations/image_labels_test.csv").unlink()
    with pytest.raises(UserError, match=r"vindr-cxr: neither image_labels_test\.csv nor"):
        VindrCxr(folder).records()
