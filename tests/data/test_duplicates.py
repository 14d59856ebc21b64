"""Studies that stand in the data twice: found where they were planted, and nowhere else."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from medclip_lab.data.prepare import prepare
from medclip_lab.data.prepare.duplicates import (
    MAX_DISTANCE,
    Known,
    close_pairs,
    count_duplicates,
    in_precedence,
    repeated_studies,
)
from medclip_lab.data.prepare.fingerprints import Fingerprint, fingerprint, perceptual_hash
from medclip_lab.data.sample import Sample
from medclip_lab.data.sources.base import Record
from medclip_lab.data.sources.nih_cxr14 import NihCxr14
from medclip_lab.data.sources.phantom import Phantom
from medclip_lab.data.sources.reading import read_all

from .toy_source import Toy, encoded, picture


def distance(one: str, other: str) -> int:
    return (int(one, 16) ^ int(other, 16)).bit_count()


# --------------------------------------------------------------------------------------------------- a shard set


def duplicates(source: Toy, out: Path, mode: str = "report") -> dict[str, Any]:
    manifest, _ = prepare(source, out, samples_per_shard=5, duplicates=mode, workers=1)
    found: dict[str, Any] = manifest["duplicates"]
    return found


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    assert duplicates(Toy(60), tmp_path) == {
        "images": {"within": 0, "across": 0},
        "near_images": {"within": 0, "across": 0, "distance": MAX_DISTANCE},
        "images_not_compared": 0,
        "reports": {"within": 0, "across": 0},
        "studies_dropped": 0,
    }


# Of patient n // 2: 0 to 5, 10 to 15 and so on are train, 6, 7, 16, 17 ... val, 8, 9, 18, 19 ... test.
PLANTED = Toy(
    60,
    copies=("14:0", "15:0", "16:8", "1:8", "2:7"),
    alike=("12:3", "4:9", "11:10"),
    same_text=("20:5", "21:9", "26:8"),
)


def test_what_was_planted_is_counted(tmp_path: Path) -> None:
    found = duplicates(PLANTED, tmp_path)
    # 14 and 15 like 0; 16 (val) and 1 like 8 (test), 2 like 7 (val). The first of equals is that of test, then val.
    assert found["images"] == {"within": 2, "across": 3}
    # 12 is like 3 of another patient of train, 4 like 9 of test; 11 is of the same patient as 10, a follow-up.
    assert found["near_images"] == {"within": 1, "across": 1, "distance": MAX_DISTANCE}
    # 20 and 5 are train, 21 train and 9 test, 26 val and 8 test.
    assert found["reports"] == {"within": 1, "across": 2}


def test_the_leak_is_told(tmp_path: Path) -> None:
    _, summary = prepare(PLANTED, tmp_path, workers=1)
    assert "5 images (3 across splits), 2 nearly equal images of different patients (1 across splits)" in summary
    assert "3 reports (2 across splits)" in summary


def test_dropped_studies_are_the_later_ones_and_never_of_what_is_held_out(tmp_path: Path) -> None:
    found = duplicates(PLANTED, tmp_path / "out", "drop")
    assert found["studies_dropped"] == 5
    assert found["images"] == {"within": 0, "across": 0}
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert {line["cause"] for line in lines} == {"duplicate"}
    assert {line["key"]: line["reason"].rpartition(" ")[2] for line in lines} == {
        "s14": "train", "s15": "train", "s16": "test", "s1": "test", "s2": "val"
    }  # fmt: skip
    kept, _ = prepare(PLANTED, tmp_path / "kept", samples_per_shard=5, workers=1)
    dropped = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert kept["samples"] - dropped["samples"] == 5
    assert dropped["splits"] == {"train": 36 - 4, "val": 12 - 1, "test": 12}
    assert dropped["labels"]["Pleural Effusion"] == {"1": 55}


def test_dropping_does_not_count_against_the_ceiling(tmp_path: Path) -> None:
    source = Toy(20, copies=tuple(f"{n}:0" for n in range(1, 6)))
    manifest, _ = prepare(source, tmp_path, max_bad=0.0, duplicates="drop", workers=1)
    assert manifest["samples"] == 15


def test_ignored_duplicates_are_not_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medclip_lab.data.prepare.job.fingerprint", None)
    manifest, summary = prepare(PLANTED, tmp_path, duplicates="ignore", workers=1)
    assert "duplicates" not in manifest
    assert "twice" not in summary


def known(study: str, split: str, *images: str) -> Known:
    record = Record(study_id=study, patient_id=study, split=split)
    return Known(record, Fingerprint(images=list(images), looks=[""] * len(images), report=""))


def test_an_image_of_a_dropped_study_only_makes_no_other_a_copy() -> None:
    studies = in_precedence([known("a", "train", "x", "y"), known("b", "train", "y"), known("c", "test", "x")])
    assert repeated_studies(studies) == {"a": "test"}
    assert count_duplicates(studies)["images"] == {"within": 1, "across": 1}


def test_an_image_twice_in_one_study_is_no_copy_of_another() -> None:
    assert repeated_studies([known("a", "train", "x", "x")]) == {}
    assert count_duplicates([known("a", "train", "x", "x")])["images"] == {"within": 0, "across": 0}


# ------------------------------------------------------------------------------------------------------------- hashes


def altered(image: Image.Image, how: str) -> Image.Image:
    if how.startswith("jpeg"):
        return Image.open(io.BytesIO(encoded(image, "JPEG", quality=int(how[4:]))))
    if how.startswith("side"):
        return image.resize((int(how[4:]), int(how[4:])), Image.Resampling.BICUBIC)
    if how == "brighter":
        return ImageEnhance.Brightness(image).enhance(1.1)
    if how == "colour":
        return image.convert("RGB")
    return Image.fromarray(np.asarray(image).astype(np.uint16) * 200 + 100)


ALTERATIONS = ("jpeg30", "jpeg75", "side64", "side300", "brighter", "colour", "16 bits")


@pytest.mark.parametrize("how", ALTERATIONS)
def test_altered_images_are_near_and_others_are_not(how: str) -> None:
    originals = [perceptual_hash("png", encoded(picture(number))) for number in range(20)]
    changed = [perceptual_hash("png", encoded(altered(picture(number), how))) for number in range(20)]
    apart = [[distance(one, other) for other in originals] for one in changed]
    for number, row in enumerate(apart):
        assert row[number] <= MAX_DISTANCE
        assert min(row[:number] + row[number + 1 :]) > 3 * MAX_DISTANCE


def test_images_that_cannot_be_compared_have_no_hash() -> None:
    assert perceptual_hash("png", encoded(Image.new("L", (80, 80), 77))) == ""
    assert perceptual_hash("nii.gz", b"") == ""
    assert perceptual_hash("png", b"broken") == ""
    blank = Sample(study_id="a", patient_id="a", split="train", images=[("png", encoded(Image.new("L", (9, 9))))])
    assert count_duplicates([Known(Record(study_id="a", patient_id="a", split="train"), fingerprint(blank))]) == {
        "images": {"within": 0, "across": 0},
        "near_images": {"within": 0, "across": 0, "distance": MAX_DISTANCE},
        "images_not_compared": 1,
        "reports": {"within": 0, "across": 0},
    }


def test_a_dicom_image_is_near_to_its_jpeg() -> None:
    pytest.importorskip("pydicom")
    pixels = np.asarray(picture(3)).astype(np.uint16) * 16
    shown = perceptual_hash("dcm", dicom(pixels))
    assert distance(shown, perceptual_hash("jpg", encoded(picture(3), "JPEG", quality=80))) <= MAX_DISTANCE
    assert distance(shown, perceptual_hash("png", encoded(picture(4)))) > 3 * MAX_DISTANCE


def dicom(pixels: "np.ndarray[Any, Any]") -> bytes:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = "2.25.1"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.PixelData = pixels.tobytes()
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def test_reports_are_compared_by_their_words() -> None:
    texts = ("No edema.", " no  EDEMA", "No edema. No effusion.", "...")
    prints = [fingerprint(Sample(study_id="a", patient_id="a", split="train", text=text)).report for text in texts]
    assert prints[0] == prints[1] != prints[2]
    assert prints[3] == ""


@given(st.integers(0, 2**32), st.integers(2, 60), st.integers(1, 3))
def test_close_pairs_are_all_that_there_are(seed: int, size: int, families: int) -> None:
    """Beside the definition: rows that stray from a few originals by up to 20 bits."""
    rng = np.random.default_rng(seed)
    bits = rng.random((families, 256))[rng.integers(families, size=size)] < 0.5
    for row in bits:
        row[rng.choice(256, rng.integers(0, 11), replace=False)] ^= True
    words = np.packbits(bits, axis=1).view(np.uint16)
    found = {(int(i), int(j)) for early, late in close_pairs(words) for i, j in zip(early, late, strict=True)}
    apart = (bits[:, None] != bits[None]).sum(axis=2)
    assert found == {(i, j) for i in range(size) for j in range(i + 1, size) if apart[i, j] <= MAX_DISTANCE}


def closest(source: Phantom | NihCxr14) -> int:
    """Least distance between images of different patients."""
    studies = [(sample.patient_id, look) for sample in read_all(source) for look in fingerprint(sample).looks]
    patients = np.array([patient for patient, _ in studies])
    words = np.frombuffer(bytes.fromhex("".join(look for _, look in studies)), dtype=np.uint64).reshape(-1, 4)
    apart = np.bitwise_count(words[:, None] ^ words[None]).sum(axis=2, dtype=np.int64)
    return int(apart[patients[:, None] != patients[None]].min())


def test_phantoms_are_no_duplicates() -> None:
    assert closest(Phantom(150, size=96)) > MAX_DISTANCE


def test_radiographs_of_different_patients_are_no_duplicates(real_data: Path, tmp_path: Path) -> None:
    source = NihCxr14(real_data / "nih-cxr-1000")
    assert closest(source) > 3 * MAX_DISTANCE
    manifest, _ = prepare(source, tmp_path, workers=1)
    assert manifest["duplicates"] == {
        "images": {"within": 1, "across": 0},  # the set holds an image twice, of one patient
        "near_images": {"within": 0, "across": 0, "distance": MAX_DISTANCE},
        "images_not_compared": 0,
        "reports": {"within": 0, "across": 0},
        "studies_dropped": 0,
    }
