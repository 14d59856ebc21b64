"""A folder of DICOM: made-up patients, whose names and ids must not be found in anything that comes out."""

import io
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from medclip_lab.data.decode import decode_image
from medclip_lab.data.sample import Sample
from medclip_lab.data.sources.common import BadImageError, split_by_hash
from medclip_lab.data.sources.deidentify import deidentified
from medclip_lab.data.sources.dicom_folder import DicomFolder
from medclip_lab.errors import UserError
from tests.data.sources.helpers import Outcome, dicom, run, write

STUDY = "1.2.840.99999.1.20240131"
SECRETS = ("SECRET", "Secret", "1.2.840.99999", "4711", "20240131", "St. Elsewhere")
IDENTITY = {
    "PatientName": "SECRET^PATIENT", "PatientID": "MRN4711", "PatientBirthDate": "20240131", "StudyDate": "20240131",
    "InstitutionName": "St. Elsewhere", "AccessionNumber": "4711", "StudyDescription": "Secret study",
    "ReferringPhysicianName": "SECRET^DOCTOR", "WindowCenterWidthExplanation": "SECRET", "BodyPartExamined": "SECRET",
    "PatientComments": "Secret", "Modality": "DX", "StudyInstanceUID": STUDY, "SeriesInstanceUID": f"{STUDY}.7",
}  # fmt: skip


def study(number: int = 1, **elements: Any) -> bytes:
    known = {"SOPInstanceUID": f"{STUDY}.{number}", "InstanceNumber": number}
    return dicom(10 * number, **IDENTITY | known | elements)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    home = tmp_path / "export"
    write(home / "SECRET_PATIENT/IM0002", study(2, ViewPosition="PA"))
    write(home / "SECRET_PATIENT/IM0001.dcm", study(1, ViewPosition="LL"))
    write(home / "4711/a.dcm", study(3, StudyInstanceUID="1.2.840.99999.2", ViewPosition="SECRET"))
    write(home / "4711/b.dcm", study(4, StudyInstanceUID="1.2.840.99999.3", PatientID="MRN4712"))
    write(home / "notes.txt", "SECRET PATIENT")
    return home


@pytest.fixture
def source(folder: Path) -> DicomFolder:
    return DicomFolder(folder, write(folder.parent / "key", "a secret of the hospital\n"))


def everything(outcome: Outcome) -> str:
    """All that leaves: samples with their bytes, notes and reasons, and ids of records."""
    samples = [repr(sample.images) + json.dumps(vars(sample) | {"images": ""}) for sample in outcome.samples.values()]
    records = [(record.study_id, record.patient_id, record.split) for record in outcome.records]
    return repr((samples, outcome.notes, outcome.bad, records))


def pixels(sample: Sample, place: int = 0) -> int:
    return int(pydicom.dcmread(io.BytesIO(sample.images[place][1])).pixel_array[0, 0])


def test_files_are_grouped_by_their_headers(source: DicomFolder, tmp_path: Path) -> None:
    outcome = run(source, tmp_path / "shards")
    assert not outcome.bad
    assert not outcome.notes
    views = [sample.view for sample in outcome.samples.values()]
    assert views == [[""], [""], ["PA", "LATERAL"]]  # in the order of paths; frontal first; odd views are left out
    one, other, both = outcome.samples.values()
    assert [pixels(both), pixels(both, 1), pixels(one)] == [20, 10, 30]
    assert one.patient_id == both.patient_id != other.patient_id
    assert one.split == both.split == split_by_hash(one.patient_id)
    assert both.modality == "DX"


def test_nothing_tells_who_it_was(source: DicomFolder, caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    write(source.folder / "bad.dcm", bytes(128) + b"DICM" + b"\xff" * 40)
    # values that break the standard: pydicom quotes them when it warns
    odd = study(5, StudyInstanceUID="1.2.840.99999.5", ViewPosition="Secret!", PatientSex="Secret!")
    write(source.folder / "odd.dcm", odd)
    with caplog.at_level(logging.DEBUG):
        outcome = run(source)
    assert len(outcome.samples) == 4
    told = everything(outcome) + caplog.text + "".join(capfd.readouterr())
    assert [secret for secret in SECRETS if secret in told] == []


def test_pseudonyms_depend_on_the_key_and_on_nothing_else(source: DicomFolder, folder: Path) -> None:
    first = run(source)
    moved = folder.rename(folder.parent / "moved")
    same = run(replace(source, folder=moved))
    assert same.samples == first.samples
    other = run(DicomFolder(moved, write(folder.parent / "key2", "another secret of the hospital")))
    assert not set(other.samples) & set(first.samples)
    assert all(sample.study_id.startswith("dicom-") for sample in first.samples.values())


def test_images_are_in_the_order_of_their_numbers(source: DicomFolder) -> None:
    for name, series, instance in (("a", 2, 1), ("b", 1, 10), ("c", 1, 9)):
        data = study(instance, StudyInstanceUID="1.2.840.99999.9", SeriesNumber=series)
        write(source.folder / "last" / name, data)
    sample = list(run(source).samples.values())[-1]
    assert [pixels(sample, place) for place in range(3)] == [90, 100, 10]


def test_patient_ids_go_no_further_than_listing(source: DicomFolder) -> None:
    told = repr(source.records())
    assert "MRN" not in told
    assert STUDY not in told


def test_bad_files_are_studies_of_their_own(source: DicomFolder) -> None:
    for path in source.folder.rglob("*"):
        if path.is_file():
            path.unlink()
    write(source.folder / "cut.dcm", b"no DICOM at all")
    write(source.folder / "no-study.dcm", study(1, StudyInstanceUID=""))
    write(source.folder / "no-pixels.dcm", study(2, StudyInstanceUID="1.2.3")[:-80])
    write(source.folder / "burned.dcm", study(3, StudyInstanceUID="1.2.4", BurnedInAnnotation="YES"))
    write(source.folder / "two/a.dcm", study(4, StudyInstanceUID="1.2.5"))
    write(source.folder / "two/b.dcm", study(5, StudyInstanceUID="1.2.5", PatientID="MRN4712"))
    outcome = run(source)
    assert not outcome.samples
    assert sorted(cause for cause, _ in outcome.bad.values()) == [
        "burned-in annotation", "several patients", "unreadable image", "unreadable image", "unreadable image"
    ]  # fmt: skip


def test_a_bad_image_among_good_ones_is_noted(source: DicomFolder) -> None:
    write(source.folder / "SECRET_PATIENT/IM0003.dcm", study(3, BurnedInAnnotation="YES"))
    outcome = run(source)
    assert [note[1:] for note in outcome.notes] == [
        ("burned-in annotation", "1 of 3 images: the header says that the pixels hold text")
    ]
    records = source.records()
    (source.folder / "4711/a.dcm").unlink()
    with pytest.raises(ValueError, match="1 of 1 images: No such file or directory"):
        source.read(records[0], lambda *note: None)


def test_other_modalities_and_what_is_no_image_are_passed_over(source: DicomFolder) -> None:
    write(source.folder / "ct.dcm", study(6, StudyInstanceUID="1.2.6", Modality="CT"))
    report = pydicom.dcmread(io.BytesIO(study(7, StudyInstanceUID="1.2.7", Modality="SR")))
    for keyword in ("PixelData", "Rows", "Columns"):
        delattr(report, keyword)
    report.save_as(source.folder / "report.dcm")
    assert len(run(source).samples) == 3
    modalities = [sample.modality for sample in run(replace(source, modalities="")).samples.values()]
    assert sorted(modalities) == ["CT", "DX", "DX", "DX"]
    with pytest.raises(UserError, match="no DICOM image of modality MG"):
        replace(source, modalities="MG").records()


def test_a_patient_without_id_is_the_study(source: DicomFolder) -> None:
    write(source.folder / "4711/a.dcm", study(3, StudyInstanceUID="1.2.840.99999.2", PatientID=""))
    sample = next(iter(run(source).samples.values()))
    assert sample.patient_id == sample.study_id


def test_the_key(source: DicomFolder) -> None:
    with pytest.raises(UserError, match="dicom-folder: --key-file is missing"):
        replace(source, key_file=None).records()
    with pytest.raises(UserError, match="key-file: cannot read"):
        replace(source, key_file=source.folder / "nowhere").records()
    with pytest.raises(UserError, match="holds 5 bytes, at least 16 are needed") as caught:
        replace(source, key_file=write(source.folder.parent / "short", "short\n")).records()
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- deidentify


def test_the_image_looks_as_before() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 4096, (8, 8), dtype=np.uint16)
    shown = {
        "BitsAllocated": 16, "BitsStored": 12, "HighBit": 11, "PhotometricInterpretation": "MONOCHROME1",
        "RescaleSlope": "2", "RescaleIntercept": "-10", "WindowCenter": ["2000", "1000"],
        "WindowWidth": ["1500", "500"], "VOILUTFunction": "SIGMOID", "PixelSpacing": ["0.14", "0.14"],
        "ImageLaterality": "L", "ViewPosition": "PA",
    }  # fmt: skip
    data = dicom(**IDENTITY | shown | {"PixelData": values.tobytes()})
    new = pydicom.dcmread(io.BytesIO(deidentified(data, "name")))
    assert np.array_equal(new.pixel_array, values)
    assert {keyword: new[keyword].value for keyword in shown} == {
        keyword: pydicom.dcmread(io.BytesIO(data))[keyword].value for keyword in shown
    }
    before, after = decode_image(data, "dcm"), decode_image(deidentified(data, "name"), "dcm")
    assert before.eight_bits().tobytes() == after.eight_bits().tobytes()


def test_lookup_tables_are_kept_without_their_words() -> None:
    table = pydicom.Dataset()
    table.LUTDescriptor, table.LUTExplanation, table.LUTData = [256, 0, 8], "SECRET", list(range(255, -1, -1))
    table["LUTDescriptor"].VR = table["LUTData"].VR = "US"
    data = dicom(90, VOILUTSequence=[table])
    new = deidentified(data, "name")
    assert b"SECRET" in data
    assert b"SECRET" not in new
    assert list(pydicom.dcmread(io.BytesIO(new)).VOILUTSequence[0].LUTData) == list(range(255, -1, -1))


def test_the_same_image_gives_the_same_bytes_and_names_give_uids() -> None:
    data = study()
    assert deidentified(data, "a") == deidentified(data, "a")
    uids = [pydicom.dcmread(io.BytesIO(deidentified(data, name))).SOPInstanceUID for name in "ab"]
    assert uids[0] != uids[1]
    assert all(uid.is_valid and uid.startswith("2.25.") for uid in uids)


def test_text_in_elements_of_numbers_and_private_elements_are_left_out() -> None:
    source = pydicom.dcmread(io.BytesIO(study()))
    source.private_block(0x0011, "SECRET", create=True).add_new(1, "LO", "SECRET")
    source.add_new("Rows", "US", 8)
    source.add_new("PixelPaddingValue", "LO", "SECRET")
    source.add_new(0x60000010, "US", 8)  # an overlay
    source.add_new(0x60003000, "OW", b"SECRET")
    buffer = io.BytesIO()
    source.save_as(buffer)
    assert b"SECRET" in buffer.getvalue()
    new = deidentified(buffer.getvalue(), "name")
    assert b"SECRET" not in new
    assert set(pydicom.dcmread(io.BytesIO(new)).dir()) == {
        "BitsAllocated", "BitsStored", "Columns", "HighBit", "Modality", "PhotometricInterpretation", "PixelData",
        "PixelRepresentation", "Rows", "SOPClassUID", "SOPInstanceUID", "SamplesPerPixel",
    }  # fmt: skip


def test_a_compressed_image_stays_compressed() -> None:
    dataset = pydicom.dcmread(io.BytesIO(study()))
    dataset.compress(pydicom.uid.RLELossless)
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    new = pydicom.dcmread(io.BytesIO(deidentified(buffer.getvalue(), "name")))
    assert new.file_meta.TransferSyntaxUID == pydicom.uid.RLELossless
    assert np.array_equal(new.pixel_array, pydicom.dcmread(io.BytesIO(study())).pixel_array)


@pytest.mark.parametrize("data", [b"", b"no DICOM", bytes(128) + b"DICM", study()[:400]])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(BadImageError):
        deidentified(data, "name")
