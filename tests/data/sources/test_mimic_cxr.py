"""MIMIC-CXR-JPG: made-up studies in its layout; marks of de-identification are built by code, never written down."""

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medclip_lab.data.findings import CHEXPERT14
from medclip_lab.data.report import report_text
from medclip_lab.data.sources import mimic_cxr
from medclip_lab.data.sources.mimic_cxr import MimicCxr
from medclip_lab.errors import UserError
from tests.data.sources.helpers import dicom, image, run, write, write_csv

MARK = "_" * 3
METADATA = (
    *("dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition", "Rows", "Columns"),
    *("StudyDate", "StudyTime", "ProcedureCodeSequence_CodeMeaning", "ViewCodeSequence_CodeMeaning"),
    "PatientOrientationCodeSequence_CodeMeaning",
)
# The order of the columns in the original tables.
LABELS = (
    *("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum", "Fracture"),
    *("Lung Lesion", "Lung Opacity", "No Finding", "Pleural Effusion", "Pleural Other", "Pneumonia", "Pneumothorax"),
    "Support Devices",
)
REPORT = f"""                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  {MARK} year old woman with cough  // pneumonia?

 FINDINGS:

 There is a small left pleural effusion. No pneumothorax.

 IMPRESSION:

 Small effusion.
"""


def dicom_id(number: int) -> str:
    return "-".join(f"{number:08x}" for _ in range(5))


# (subject, study, split, views)
STUDIES = (
    ("10000032", "50414267", "train", ("LATERAL", "PA")),
    ("10000032", "53189527", "train", ("AP",)),
    ("11000011", "51029426", "validate", ("LL",)),
    ("19999987", "58621812", "test", ("",)),
)


def labels_row(**values: str) -> list[str]:
    return [values.get(name.replace(" ", "_"), "") for name in LABELS]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "mimic-cxr-jpg"
    split, metadata = [], []
    with zipfile.ZipFile(tmp_path / "mimic-cxr-reports.zip", "w") as archive:
        for subject, study, part, views in STUDIES:
            home = f"files/p{subject[:2]}/p{subject}"
            for number, view in enumerate(views):
                identifier = dicom_id(int(study) + number)
                write(root / home / f"s{study}" / f"{identifier}.jpg", image(40 + number, "JPEG"))
                split.append((identifier, study, subject, part))
                metadata.append(
                    (
                        *(identifier, subject, study, "CHEST (PA AND LAT)", view, 3056, 2544, 21800506, 213014.531),
                        *("CHEST (PA AND LAT)", "postero-anterior", "Erect"),
                    )
                )
            archive.writestr(f"{home}/s{study}.txt", REPORT)
    write_csv(root / "mimic-cxr-2.0.0-split.csv.gz", ("dicom_id", "study_id", "subject_id", "split"), split)
    write_csv(root / "mimic-cxr-2.0.0-metadata.csv.gz", METADATA, metadata)
    rows = [
        ("10000032", "50414267", *labels_row(Pleural_Effusion="1.0", Pneumothorax="0.0", Edema="-1.0")),
        ("11000011", "51029426", *labels_row(No_Finding="1.0")),
    ]
    write_csv(root / "mimic-cxr-2.0.0-chexpert.csv.gz", ("subject_id", "study_id", *LABELS), rows)
    negbio = [("10000032", "50414267", *labels_row(Pleural_Effusion="-1.0"))]
    write_csv(root / "mimic-cxr-2.0.0-negbio.csv.gz", ("subject_id", "study_id", *LABELS), negbio)
    expert = [name if name != "Lung Opacity" else "Airspace Opacity" for name in LABELS]
    write_csv(
        root / "mimic-cxr-2.1.0-test-set-labeled.csv",
        ("study_id", *expert),
        [("58621812", *labels_row(Lung_Opacity="1.0", Fracture="0.0"))],
    )
    return root


@pytest.fixture
def source(folder: Path) -> MimicCxr:
    return MimicCxr(folder, reports=folder.parent / "mimic-cxr-reports.zip")


def test_studies_views_splits_and_sections(source: MimicCxr, tmp_path: Path) -> None:
    outcome = run(source, tmp_path / "shards")
    assert not outcome.bad
    assert not outcome.notes
    assert [(r.study_id, r.patient_id, r.split) for r in outcome.records] == [
        ("mimic-50414267", "mimic-10000032", "train"),
        ("mimic-53189527", "mimic-10000032", "train"),
        ("mimic-51029426", "mimic-11000011", "val"),
        ("mimic-58621812", "mimic-19999987", "test"),
    ]
    first = outcome.samples["mimic-50414267"]
    assert first.view == ["PA", "LATERAL"]  # frontal first, though the table names the other one first
    assert first.images == [("jpg", image(41, "JPEG")), ("jpg", image(40, "JPEG"))]
    assert first.extra["dicom_ids"] == [dicom_id(50414268), dicom_id(50414267)]
    assert [sample.view for sample in outcome.samples.values()][1:] == [["AP"], ["LATERAL"], [""]]
    assert first.text == "There is a small left pleural effusion. No pneumothorax. Small effusion."
    assert MARK in first.sections["indication"]
    assert first.sentences[1]["labels"] == {"Pneumothorax": 0}


def test_labels_are_those_of_the_labeller_in_its_own_coding(source: MimicCxr) -> None:
    samples = run(source).samples
    expected: dict[str, int | None] = dict.fromkeys(CHEXPERT14) | {
        "Pleural Effusion": 1,
        "Pneumothorax": 0,
        "Edema": -1,
    }
    assert samples["mimic-50414267"].labels == expected
    assert samples["mimic-53189527"].labels == dict.fromkeys(CHEXPERT14)  # not one of the 227,827 labelled studies
    assert samples["mimic-51029426"].labels["No Finding"] == 1
    assert "radiologist_labels" not in samples["mimic-50414267"].extra
    radiologist = samples["mimic-58621812"].extra["radiologist_labels"]
    assert radiologist == dict.fromkeys(CHEXPERT14) | {"Lung Opacity": 1, "Fracture": 0}

    negbio = run(replace(source, labeller="negbio")).samples
    assert negbio["mimic-50414267"].labels == dict.fromkeys(CHEXPERT14) | {"Pleural Effusion": -1}
    rules = run(replace(source, labeller="rules")).samples
    assert rules["mimic-53189527"].labels["Pleural Effusion"] == 1


def test_a_label_table_of_another_labeller(source: MimicCxr, tmp_path: Path) -> None:
    rows = [("53189527", "Small effusion.", *labels_row(Fracture="1"))]
    path = write_csv(tmp_path / "chexbert.csv", ("study_id", "Report Impression", *LABELS), rows)
    labels = run(replace(source, label_table=path)).samples["mimic-53189527"].labels
    assert labels == dict.fromkeys(CHEXPERT14) | {"Fracture": 1}
    with pytest.raises(UserError, match="label-table: no such file"):
        replace(source, label_table=tmp_path / "nowhere.csv").records()


def test_reports_in_a_folder_beside_the_images_or_none(source: MimicCxr, folder: Path) -> None:
    assert run(MimicCxr(folder)).samples["mimic-50414267"].text == ""
    with zipfile.ZipFile(folder.parent / "mimic-cxr-reports.zip") as archive:
        archive.extractall(folder)
    assert run(replace(source, reports=folder)) == run(source)
    (folder.parent / "mimic-cxr-reports.zip").rename(folder / "mimic-cxr-reports.zip")
    assert run(MimicCxr(folder)) == run(replace(source, reports=folder))  # found by itself


def test_reports_that_are_missing_empty_or_too_large(source: MimicCxr, folder: Path) -> None:
    home = folder / "files/p10/p10000032"
    for subject, study, _, _ in STUDIES[2:]:
        write(folder / f"files/p{subject[:2]}/p{subject}/s{study}.txt", REPORT)
    write(home / "s53189527.txt", "FINAL REPORT\n EXAMINATION: CHEST\n FINDINGS:\n")
    outcome = run(replace(source, reports=folder))
    assert outcome.notes == [
        ("mimic-50414267", "missing report", "no text file of this study"),
        ("mimic-53189527", "no findings and no impression", "kept as an image without text"),
    ]
    assert outcome.samples["mimic-50414267"].text == outcome.samples["mimic-53189527"].text == ""
    write(home / "s50414267.txt", "A" * (2**20 + 1))
    write(home / "s53189527.txt", REPORT.encode() + b"\xe9")  # not UTF-8
    outcome = run(replace(source, reports=folder))
    assert [note[:2] for note in outcome.notes] == [("mimic-50414267", "unreadable report")]
    assert outcome.samples["mimic-53189527"].text.startswith("There is")


def test_missing_and_broken_images(source: MimicCxr, folder: Path) -> None:
    home = folder / "files/p10/p10000032"
    (home / "s50414267" / f"{dicom_id(50414268)}.jpg").unlink()
    whole = home / "s53189527" / f"{dicom_id(53189527)}.jpg"
    whole.write_bytes(whole.read_bytes()[:200])
    outcome = run(source)
    assert outcome.notes == [("mimic-50414267", "missing image", "1 of 2 images: no such file")]
    sample = outcome.samples["mimic-50414267"]
    assert (sample.view, sample.extra["dicom_ids"]) == (["LATERAL"], [dicom_id(50414267)])
    assert outcome.bad["mimic-53189527"][0] == "unreadable image"


def test_dicom_of_mimic_cxr_in_the_same_tree(source: MimicCxr, folder: Path) -> None:
    data = dicom()
    write(folder / "files/p10/p10000032/s53189527" / f"{dicom_id(53189527)}.dcm", data)
    assert run(source).samples["mimic-53189527"].images == [("dcm", data)]


def test_a_row_twice_is_one_image(source: MimicCxr, folder: Path) -> None:
    row = (dicom_id(53189527), "53189527", "10000032", "train")
    write_csv(folder / "mimic-cxr-2.0.0-split.csv", ("dicom_id", "study_id", "subject_id", "split"), [row, row])
    assert len(run(source).only().images) == 1  # and the table that is not compressed comes first


@pytest.mark.parametrize(
    "row, message",
    [
        (("../../../secret", "53189527", "10000032", "train"), "line 2: the dicom_id is no name"),
        (("/etc/passwd", "53189527", "10000032", "train"), "line 2: the dicom_id is no name"),
        ((dicom_id(1), "../secret", "10000032", "train"), "line 2: study_id and subject_id have eight digits"),
        ((dicom_id(1), "53189527", "10000032", "validation set"), "unknown split 'validation set'"),
    ],
)
def test_hostile_and_wrong_rows(source: MimicCxr, folder: Path, row: Sequence[Any], message: str) -> None:
    write_csv(folder / "mimic-cxr-2.0.0-split.csv", ("dicom_id", "study_id", "subject_id", "split"), [row])
    with pytest.raises(UserError, match=message):
        source.records()


def test_a_study_of_two_subjects_is_refused(source: MimicCxr, folder: Path) -> None:
    rows = [(dicom_id(1), "53189527", "10000032", "train"), (dicom_id(2), "53189527", "10000033", "train")]
    write_csv(folder / "mimic-cxr-2.0.0-split.csv", ("dicom_id", "study_id", "subject_id", "split"), rows)
    with pytest.raises(UserError, match="line 3: another subject or split"):
        source.records()


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def with_columns(name: str, *columns: str) -> Callable[[Path], object]:
    return lambda folder: write_csv(folder / name, columns, [])


@pytest.mark.parametrize(
    "fault, options, message",
    [
        (
            without("mimic-cxr-2.0.0-split.csv.gz"),
            {},
            "neither mimic-cxr-2.0.0-split.csv nor mimic-cxr-2.0.0-split.csv.gz",
        ),
        (without("mimic-cxr-2.0.0-metadata.csv.gz"), {}, "neither mimic-cxr-2.0.0-metadata.csv"),
        (without("mimic-cxr-2.0.0-chexpert.csv.gz"), {}, "neither mimic-cxr-2.0.0-chexpert.csv"),
        (with_columns("mimic-cxr-2.0.0-metadata.csv", "dicom_id", "View"), {}, "no column 'ViewPosition'"),
        (
            with_columns("mimic-cxr-2.0.0-split.csv", "dicom_id", "study", "subject_id", "split"),
            {},
            "did you mean 'study'",
        ),
        (with_columns("mimic-cxr-2.0.0-chexpert.csv", "study_id", *LABELS[1:]), {}, "no column 'Atelectasis'"),
        (
            lambda folder: write_csv(
                folder / "mimic-cxr-2.0.0-chexpert.csv", ("study_id", *LABELS), [("1", *labels_row(Edema="yes"))]
            ),
            {},
            "line 2: label column 'Edema' holds 'yes'",
        ),
        (lambda folder: write(folder / "mimic-cxr-2.0.0-split.csv.gz", b"\x1f\x8b\x08cut"), {}, "cannot be read"),
        (lambda folder: None, {"labeller": "chexbert"}, "labeller: one of chexpert, negbio, rules expected"),
        (lambda folder: None, {"reports": Path("nowhere.zip")}, "reports: neither a folder nor a zip file"),
        (lambda folder: None, {"labeller": "rules", "reports": None}, "rules needs reports"),
    ],
)
def test_what_is_missing_is_named_in_one_line(
    source: MimicCxr, folder: Path, fault: Callable[[Path], object], options: dict[str, Any], message: str
) -> None:
    fault(folder)
    with pytest.raises(UserError, match=message) as caught:
        replace(source, **options).records()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("report", "text"),
    [
        ("COMPARISON: None.\n \n The lungs are clear.\n No effusion.\n", "The lungs are clear. No effusion."),
        ("HISTORY: Cough.\n\nCOMPARISON: None.\n", ""),
        ("COMPARISON: None.\n\nFINDINGS: Clear lungs.\n\nSigned.", "Clear lungs. Signed."),
        ("", ""),
    ],
)
def test_what_follows_the_comparison_without_a_header_is_what_was_seen(report: str, text: str) -> None:
    assert report_text(mimic_cxr._sections(report)) == text
