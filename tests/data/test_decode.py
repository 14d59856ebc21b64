import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medclip_lab.data.decode import DecodeError, decode_image, read_image, suffix_of
from medclip_lab.errors import UserError


def encode(pixels: "np.ndarray[Any, Any]", kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


GREY = (np.random.default_rng(0).random((20, 30)) * 255).astype(np.uint8)


@pytest.mark.parametrize(("suffix", "kind"), [("png", "PNG"), ("tif", "TIFF"), ("jpg", "JPEG"), ("webp", "WEBP")])
def test_eight_bits(suffix: str, kind: str) -> None:
    image = decode_image(encode(GREY, kind), suffix).image
    assert image.size == (30, 20)
    if suffix in ("png", "tif"):
        assert image.mode == "L"
        assert (np.asarray(image) == GREY).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_windowed_not_cut(suffix: str) -> None:
    deep = np.linspace(1000, 5000, 600).reshape(20, 30).astype(np.uint16)
    image = np.asarray(decode_image(encode(deep, {"png": "PNG", "tif": "TIFF"}[suffix]), suffix))
    assert image.dtype == np.uint8
    assert image.min() == 0
    assert image.max() == 255
    assert (np.diff(image.ravel().astype(int)) >= 0).all()


def test_colour_stays_colour() -> None:
    assert decode_image(encode(np.zeros((4, 4, 3), np.uint8), "PNG"), "png").image.mode == "RGB"


@pytest.mark.parametrize(
    ("data", "suffix", "message"),
    [
        (b"", "png", "broken png"),
        (encode(GREY, "PNG")[:200], "png", "broken png"),
        (encode(GREY, "JPEG")[:300], "jpg", "broken jpg"),
        (encode(GREY, "PNG"), "jpg", "broken jpg"),
        (b"<svg/>", "svg", r"no decoder for \.svg"),
        (b"0" * 200, "dcm", "broken DICOM"),
    ],
)
def test_broken_images(data: bytes, suffix: str, message: str) -> None:
    with pytest.raises(DecodeError, match=message):
        decode_image(data, suffix)


def test_size_is_checked_before_decoding() -> None:
    with pytest.raises(DecodeError, match="more than the cap of 100"):
        decode_image(encode(GREY, "PNG"), "png", max_pixels=100)


def test_suffixes_and_files(tmp_path: Path) -> None:
    assert suffix_of("1.2.840.DCM") == "dcm"
    assert suffix_of("volume.NII.GZ") == "nii.gz"
    with pytest.raises(UserError, match="cannot read"):
        read_image(tmp_path / "none.png")


def dicom(pixels: "np.ndarray[Any, Any]", photometric: str = "MONOCHROME2", **tags: Any) -> bytes:
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, photometric
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.PixelData = pixels.astype(np.uint16).tobytes()
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset)
    return buffer.getvalue()


RAMP = np.linspace(0, 4095, 400).reshape(20, 20)


def test_dicom_window() -> None:
    image = np.asarray(decode_image(dicom(RAMP, WindowCenter=1000, WindowWidth=400), "dcm")).ravel()
    values = RAMP.ravel()
    assert (image[values < 790] == 0).all()
    assert (image[values > 1210] == 255).all()
    assert 100 < image[np.abs(values - 1000).argmin()] < 155


def test_dicom_monochrome1_is_inverted() -> None:
    bright = np.asarray(decode_image(dicom(RAMP), "dcm")).astype(int)
    dark = np.asarray(decode_image(dicom(RAMP, "MONOCHROME1"), "dcm")).astype(int)
    assert np.abs(bright + dark - 255).max() <= 1


def test_dicom_rescale_comes_before_the_window() -> None:
    tags = {"RescaleSlope": 2, "RescaleIntercept": -1024, "WindowCenter": 976, "WindowWidth": 400}
    image = np.asarray(decode_image(dicom(RAMP, **tags), "dcm")).ravel()
    assert 100 < image[np.abs(RAMP.ravel() * 2 - 1024 - 976).argmin()] < 155


def test_constant_dicom_gives_no_nan() -> None:
    assert (np.asarray(decode_image(dicom(np.full((8, 8), 7)), "dcm")) == 0).all()


def test_several_frames_need_a_choice() -> None:
    with pytest.raises(DecodeError, match="more than one frame"):
        decode_image(dicom(np.zeros((2, 8, 8)), NumberOfFrames=2), "dcm")
