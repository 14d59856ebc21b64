"""PadChest: made-up studies in its layout."""

from pathlib import Path

import pytest

from medclip_lab.data.findings import CHEXPERT14
from medclip_lab.data.sources.padchest import CHEXPERT_OF, Padchest, chexpert_labels
from medclip_lab.errors import UserError
from tests.data.sources.helpers import image, run, write, write_csv

TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
# The order of the columns in the original; the first, a row number, has no name.
COLUMNS = (
    *("", "ImageID", "ImageDir", "StudyDate_DICOM", "StudyID", "PatientID", "PatientBirth", "PatientSex_DICOM"),
    *("ViewPosition_DICOM", "Projection", "MethodProjection", "Pediatric", "Modality_DICOM", "Manufacturer_DICOM"),
    *("PhotometricInterpretation_DICOM", "PixelRepresentation_DICOM", "PixelAspectRatio_DICOM"),
    *("SpatialResolution_DICOM", "BitsStored_DICOM", "WindowCenter_DICOM", "WindowWidth_DICOM", "Rows_DICOM"),
    *("Columns_DICOM", "XRayTubeCurrent_DICOM", "Exposure_DICOM", "ExposureInuAs_DICOM", "ExposureTime"),
    *("RelativeXRayExposure_DICOM", "ReportID", "Report", "MethodLabel", "Labels", "Localizations"),
    *("LabelsLocalizationsBySentence", "labelCUIS", "LocalizationsCUIS"),
)
STUDY = "20536686640136348236148679891455886468"
PATIENT = "839860488694292331637988235681460987"


def row(name: str, **cells: str) -> list[str]:
    known = {
        "ImageID": name, "ImageDir": "0", "StudyDate_DICOM": "20140915", "StudyID": STUDY, "PatientID": PATIENT,
        "PatientBirth": "1930.0", "PatientSex_DICOM": "F", "Projection": "PA", "ReportID": "4765777",
        "Report": "derrame pleural izquierdo pequeno . sin neumotorax .", "MethodLabel": "Physician",
        "Labels": "['pleural effusion', ' cardiomegaly', '', 'NSG tube', 'kyphosis']",
    }  # fmt: skip
    return [(known | cells).get(column, "") for column in COLUMNS]


ROWS = [
    row(f"{STUDY}_k6ga28.png", Projection="L"),
    row(f"{STUDY}_k6ga29.png"),
    row("7_a.png", StudyID="7", PatientID="8", ImageDir="54", Projection="AP_horizontal", Labels="['normal']"),
    row("9_a.png", StudyID="9", PatientID="8", ImageDir="54", Projection="UNK", Labels="", Report="", MethodLabel=""),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    home = tmp_path / "padchest"
    write_csv(home / TABLE, COLUMNS, ROWS)
    for number, cells in enumerate(ROWS):
        write(home / cells[2] / cells[1], image(1000 * number, depth=16))
    return home


def test_studies_in_the_original_folders(folder: Path, tmp_path: Path) -> None:
    outcome = run(Padchest(folder), tmp_path / "shards")
    assert [(r.study_id, r.patient_id) for r in outcome.records] == [
        (f"padchest-{STUDY}", f"padchest-{PATIENT}"), ("padchest-7", "padchest-8"), ("padchest-9", "padchest-8")
    ]  # fmt: skip
    sample = outcome.samples[f"padchest-{STUDY}"]
    assert sample.view == ["PA", "LATERAL"]
    assert sample.images == [("png", image(1000, depth=16)), ("png", image(0, depth=16))]  # 16 bits, as they were
    assert sample.text == "derrame pleural izquierdo pequeno . sin neumotorax ."
    assert sample.sentences == []
    assert sample.extra == {
        "language": "es", "method_label": "Physician", "sex": "F", "birth_year": "1930.0",
        "finding_labels": ["pleural effusion", "cardiomegaly", "NSG tube", "kyphosis"],
    }  # fmt: skip
    present = {name for name, state in sample.labels.items() if state == 1}
    assert present == {"Pleural Effusion", "Cardiomegaly", "Support Devices"}
    assert sample.labels["No Finding"] == sample.labels["Pneumothorax"] == 0
    assert outcome.samples["padchest-7"].view == ["AP"]
    assert outcome.samples["padchest-7"].labels["No Finding"] == 1
    last = outcome.samples["padchest-9"]
    assert (last.text, last.labels) == ("", dict.fromkeys(CHEXPERT14))
    assert outcome.notes == [("padchest-9", "no report", "kept as an image without text")]


@pytest.mark.parametrize("place", ["", "images", "images/0"])
def test_images_in_other_folders(folder: Path, place: str) -> None:
    write_csv(folder / TABLE, COLUMNS, ROWS[:2])
    names = [cells[1] for cells in ROWS[:2]]
    expected = run(Padchest(folder)).samples
    for name in names:
        write(folder / "moved" / name, (folder / "0" / name).read_bytes())
        (folder / "0" / name).unlink()
    (folder / "0").rmdir()
    for name in names:
        write(folder / place / name, (folder / "moved" / name).read_bytes())
    assert run(Padchest(folder)).samples == expected


@pytest.mark.parametrize(
    "findings, states",
    [
        ((), {}),
        (("exclude",), {}),
        (("suboptimal study", "pneumonia"), {}),
        (("unchanged",), {}),
        (("unchanged", "pacemaker", "costophrenic angle blunting"), {"Support Devices": 1, "Pleural Effusion": -1}),
    ],
)
def test_findings_that_leave_the_rest_unknown(findings: tuple[str, ...], states: dict[str, int]) -> None:
    assert chexpert_labels(findings) == dict.fromkeys(CHEXPERT14) | states


def test_one_finding_may_be_two_observations_and_one_only_a_doubt() -> None:
    labels = chexpert_labels(("hydropneumothorax", "costophrenic angle blunting", "a finding of no table"))
    assert {name for name, state in labels.items() if state} == {"Pleural Effusion", "Pneumothorax"}
    assert labels["Pleural Effusion"] == 1
    assert chexpert_labels(("costophrenic angle blunting",))["Pleural Effusion"] == -1


def test_every_observation_has_a_finding() -> None:
    assert {name for names in CHEXPERT_OF.values() for name in names} == set(CHEXPERT14)
    assert all(finding == finding.lower() for finding in CHEXPERT_OF)


def test_names_that_lead_outside_are_refused_or_not_found(folder: Path) -> None:
    write(folder.parent / "outside.png", image(9))
    write_csv(folder / TABLE, COLUMNS, [row("../outside.png")])
    with pytest.raises(UserError, match="line 2: StudyID, PatientID and ImageID have letters"):
        Padchest(folder).records()
    for place in ("..", str(folder.parent)):
        write_csv(folder / TABLE, COLUMNS, [row("outside.png", ImageDir=place)])
        assert run(Padchest(folder)).bad == {f"padchest-{STUDY}": ("missing image", "1 of 1 images: no such file")}


def test_a_row_twice_is_one_image(folder: Path) -> None:
    write_csv(folder / TABLE, COLUMNS, [ROWS[1], ROWS[1]])
    assert len(run(Padchest(folder)).only().images) == 1


def test_missing_table_column_and_rows(folder: Path) -> None:
    write_csv(folder / TABLE, [name if name != "Projection" else "View" for name in COLUMNS], [])
    with pytest.raises(UserError, match="no column 'Projection'"):
        Padchest(folder).records()
    write_csv(folder / TABLE, COLUMNS, [])
    with pytest.raises(UserError, match="no row below"):
        Padchest(folder).records()
    (folder / TABLE).unlink()
    with pytest.raises(UserError, match=f"padchest: neither {TABLE} nor"):
        Padchest(folder).records()
