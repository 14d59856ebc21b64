"""CT-RATE: made-up scans in the layout of the original, with its own column names."""

import gzip
import json
import tarfile
from pathlib import Path

import pytest

from medclip_lab.data.decode import DecodeError, decode_image
from medclip_lab.data.manifest import Manifest
from medclip_lab.data.quarantine import Quarantine
from medclip_lab.data.reader import read_split
from medclip_lab.data.sources.common import split_by_hash
from medclip_lab.data.sources.ct_rate import ABNORMALITIES, CtRate
from medclip_lab.errors import UserError
from medclip_lab.evaluation.labels_from import LabelsFrom
from medclip_lab.inference.labelset import load_labelset
from tests.data.sources.helpers import run, write, write_csv

REPORTS = ("VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN")
METADATA = (
    "VolumeName", "Manufacturer", "SeriesDescription", "ManufacturerModelName", "PatientSex", "PatientAge",
    "ConvolutionKernel", "PatientPosition", "Rows", "Columns", "XYSpacing", "RescaleIntercept", "RescaleSlope",
    "RescaleType", "NumberofSlices", "ZSpacing", "StudyDate",
)  # fmt: skip
SCANS = {"train": ("train_1_a_1", "train_1_a_2", "train_2_a_1"), "valid": ("valid_1_a_1", "valid_1_b_1")}
LONG = {"train": "train", "valid": "validation"}


def nifti(shade: int) -> bytes:
    """A header of NIfTI-1 and a few voxels."""
    header = bytearray(352)
    header[:4] = (348).to_bytes(4, "little")
    header[344:348] = b"n+1\0"
    return gzip.compress(bytes(header) + bytes([shade]) * 64, mtime=0)


def facts(name: str) -> list[str]:
    spacing, sex, age = ("[0.75, 0.75]", "F", "061Y") if "_1_" in name else ("", "M", "")
    return [
        f"{name}.nii.gz", "Maker", "HRCT", "Model", sex, age, "YA", "HFS", "512", "512", spacing, "-8192", "1", "HU",
        "300", "1.5", "20200101",
    ]  # fmt: skip


def report(name: str) -> list[str]:
    said = "A nodule,\nunchanged." if name.startswith("train_1_a") else "The lungs are clear."
    return [f"{name}.nii.gz", "Not given.", "Axial images.", said, "" if "_b_" in name else "See above."]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "dataset"
    for part, names in SCANS.items():
        write_csv(home / f"radiology_text_reports/{LONG[part]}_reports.csv", REPORTS, map(report, names))
        write_csv(home / f"metadata/{LONG[part]}_metadata.csv", METADATA, map(facts, names))
        labels = [[f"{name}.nii.gz", *(int(column == 9) for column in range(18))] for name in names]
        table = home / f"multi_abnormality_labels/{part}_predicted_labels.csv"
        write_csv(table, ("VolumeName", *ABNORMALITIES), labels)
        for number, name in enumerate(names):
            scan = name.rpartition("_")[0]
            folder = f"{part}_fixed/{scan.rpartition('_')[0]}/{scan}"
            write(home / folder / f"{name}.nii.gz", nifti(number))
            write(home / folder.replace("_fixed", "") / f"{name}.nii.gz", nifti(100 + number))
    return home


def test_a_scan_is_a_study_with_its_volumes_report_and_labels(home: Path, tmp_path: Path) -> None:
    outcome = run(CtRate(home), tmp_path / "shards")
    assert not outcome.notes
    assert not outcome.bad
    assert list(outcome.samples) == [f"ct-rate-{name}" for name in ("train_1_a", "train_2_a", "valid_1_a", "valid_1_b")]
    sample = outcome.samples["ct-rate-train_1_a"]
    assert sample.images == [("nii.gz", nifti(0)), ("nii.gz", nifti(1))], "byte for byte"
    assert (sample.patient_id, sample.modality) == ("ct-rate-train_1", "CT")
    assert sample.split == split_by_hash("ct-rate-train_1", val=0.1, test=0)
    assert {sample.split for name, sample in outcome.samples.items() if "valid" in name} == {"test"}
    sections = {"findings": "A nodule, unchanged.", "impression": "See above.", "technique": "Axial images."}
    assert sample.sections == sections, "what is not given is no indication"
    assert sample.text == "A nodule, unchanged. See above."
    assert outcome.samples["ct-rate-valid_1_b"].text == "The lungs are clear."
    assert sample.labels == dict.fromkeys(ABNORMALITIES, 0) | {"Lung nodule": 1}
    assert sample.extra == {
        "VolumeName": ["train_1_a_1.nii.gz", "train_1_a_2.nii.gz"], "sex": "F", "age": 61, "kernel": ["YA", "YA"],
        "spacing": [[0.75, 0.75, 1.5]] * 2, "rescale": None,
    }  # fmt: skip
    other = outcome.samples["ct-rate-train_2_a"].extra
    assert (other["age"], other["spacing"]) == (None, [None])


def test_volumes_stand_in_the_shards_and_nothing_decodes_them(home: Path, tmp_path: Path) -> None:
    run(CtRate(home), tmp_path / "shards")
    manifest = Manifest.load(tmp_path / "shards")
    (study, _) = read_split(manifest, "test", Quarantine(2, 0.0))
    assert study.images == [("nii.gz", nifti(0))]
    with tarfile.open(next((tmp_path / "shards").glob("*test*.tar"))) as tar:
        assert sum(name.endswith(".nii.gz") for name in tar.getnames()) == 2
    with pytest.raises(DecodeError, match=r"no decoder for \.nii\.gz"):
        decode_image(nifti(0), "nii.gz")


def test_the_label_set_and_the_tables_speak_of_the_same_abnormalities(home: Path) -> None:
    assert tuple(load_labelset("ct_rate18").names) == ABNORMALITIES
    sample = run(CtRate(home, volumes="none")).samples["ct-rate-valid_1_a"]
    record = json.loads(json.dumps({"study_id": sample.study_id, **sample.extra}))
    table = home / "multi_abnormality_labels/valid_predicted_labels.csv"
    assert LabelsFrom(str(table)).of(record, ABNORMALITIES) == sample.labels


def test_original_volumes_have_a_rescale_and_none_are_read_if_none_are_wanted(home: Path) -> None:
    sample = run(CtRate(home, volumes="original")).samples["ct-rate-train_1_a"]
    assert sample.images[1] == ("nii.gz", nifti(101))
    assert sample.extra["rescale"] == [[1.0, -8192.0]] * 2
    without = run(CtRate(home, volumes="none"))
    assert not without.bad
    assert all(not sample.images and sample.text for sample in without.samples.values())
    assert len(without.samples["ct-rate-train_1_a"].extra["VolumeName"]) == 2


def test_missing_broken_and_differing_volumes(home: Path) -> None:
    (home / "train_fixed/train_1/train_1_a/train_1_a_1.nii.gz").unlink()
    (home / "train_fixed/train_2/train_2_a/train_2_a_1.nii.gz").write_bytes(gzip.compress(bytes(400)))
    (home / "valid_fixed/valid_1/valid_1_a/valid_1_a_1.nii.gz").write_bytes(b"no gzip")
    rows = [report(name) for name in SCANS["train"]]
    rows[1][3] = "Something else."
    write_csv(home / "radiology_text_reports/train_reports.csv", REPORTS, rows)
    outcome = run(CtRate(home))
    assert outcome.bad == {
        "ct-rate-train_2_a": ("unreadable image", "1 of 1 images: no NIfTI header"),
        "ct-rate-valid_1_a": ("unreadable image", "1 of 1 images: not gzip"),
    }
    sample = outcome.samples["ct-rate-train_1_a"]
    assert sample.extra["VolumeName"] == ["train_1_a_2.nii.gz"]
    assert sample.text == "A nodule, unchanged. See above."
    assert [(study, cause) for study, cause, _ in outcome.notes] == [
        ("ct-rate-train_1_a", "missing image"),
        ("ct-rate-train_1_a", "volumes of a study differ"),
    ]


def test_a_part_and_tables_may_be_missing(home: Path) -> None:
    for path in ("radiology_text_reports/train_reports.csv", "metadata/validation_metadata.csv"):
        (home / path).unlink()
    (home / "multi_abnormality_labels/valid_predicted_labels.csv").unlink()
    samples = run(CtRate(home)).samples
    assert list(samples) == ["ct-rate-valid_1_a", "ct-rate-valid_1_b"]
    assert samples["ct-rate-valid_1_a"].labels == dict.fromkeys(ABNORMALITIES)
    assert samples["ct-rate-valid_1_a"].extra["age"] is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../../etc/passwd", r"line 4: VolumeName is no train_PATIENT_SCAN_VOLUME\.nii\.gz"),
        ("valid_1_a_1.nii.gz", "line 4: VolumeName is no train_PATIENT"),
        ("train_1_a_2.nii.gz", "line 4: this volume stands there twice"),
    ],
)
def test_names_that_are_none_are_refused(home: Path, name: str, message: str) -> None:
    rows = [report(scan) for scan in SCANS["train"]]
    rows[2][0], rows[0][3], rows[1][3] = name, "One line.", "One line."
    write_csv(home / "radiology_text_reports/train_reports.csv", REPORTS, rows)
    with pytest.raises(UserError, match=message):
        CtRate(home).records()


def test_labels_and_options_that_are_none_are_refused(home: Path) -> None:
    with pytest.raises(UserError, match="volumes: one of fixed, original, none expected, got 'all'"):
        CtRate(home, volumes="all").records()  # type: ignore[arg-type]
    table = home / "multi_abnormality_labels/train_predicted_labels.csv"
    table.write_text(table.read_text().replace("Medical material", "Medical materials"))
    with pytest.raises(UserError, match=r"no column 'Medical material'.*did you mean 'Medical materials'"):
        CtRate(home).records()
