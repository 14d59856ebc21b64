import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from medclip_lab.data.decode import DecodeError, decode_image
from medclip_lab.data.decoded import Decoded

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("libjpeg")
from pydicom import uid  # noqa: E402
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset  # noqa: E402

RAMP = np.linspace(0, 4095, 400).reshape(20, 20).astype(np.uint16)


def dataset(
    pixels: NDArray[Any], photometric: str = "MONOCHROME2", syntax: str = uid.ExplicitVRLittleEndian, **tags: Any
) -> FileDataset:
    """[rows, columns], with frames before and samples after them where there are any."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    meta.MediaStorageSOPInstanceUID = uid.generate_uid()
    made = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    made.SOPClassUID, made.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    made.SamplesPerPixel = pixels.shape[-1] if photometric[:3] in ("RGB", "YBR") else 1
    made.Rows, made.Columns = pixels.shape[-3:-1] if made.SamplesPerPixel > 1 else pixels.shape[-2:]
    made.PhotometricInterpretation, made.PixelRepresentation = photometric, int(pixels.dtype.kind == "i")
    bits = 8 * pixels.itemsize
    made.BitsAllocated, made.BitsStored, made.HighBit = bits, bits, bits - 1
    if made.SamplesPerPixel > 1:
        made.PlanarConfiguration = 0
    made.PixelData = pixels.tobytes() if len(pixels.tobytes()) % 2 == 0 else pixels.tobytes() + b"\0"
    made["PixelData"].VR = "OW" if bits > 8 else "OB"
    for name, value in tags.items():
        setattr(made, name, value)
    return made


def written(made: FileDataset) -> bytes:
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, made)
    return buffer.getvalue()


def dicom(pixels: NDArray[Any], *args: Any, **tags: Any) -> bytes:
    return written(dataset(pixels, *args, **tags))


def decode(data: bytes, **options: Any) -> Decoded:
    return decode_image(data, "dcm", **options)


def eight(data: bytes, **options: Any) -> NDArray[np.int64]:
    return np.asarray(decode(data).eight_bits(**options)).astype(np.int64)


SYNTAXES = [
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRLittleEndian,
    uid.DeflatedExplicitVRLittleEndian,
    uid.RLELossless,
    uid.JPEG2000Lossless,
]


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: syntax.name)
@pytest.mark.parametrize("kind", ["uint8", "uint16", "int16"])
def test_every_value_survives(syntax: str, kind: str) -> None:
    limits = np.iinfo(kind)
    pixels = np.random.default_rng(0).integers(limits.min, limits.max, (80, 64), dtype=kind, endpoint=True)
    made = dataset(pixels, PixelSpacing=[0.5, 0.25])
    if syntax in (uid.RLELossless, uid.JPEG2000Lossless):
        made.compress(syntax, pixels, generate_instance_uid=False)
    else:
        made.file_meta.TransferSyntaxUID = syntax
    decoded = decode(written(made))
    assert decoded.image.mode == "F"
    assert (np.asarray(decoded.image) == pixels).all()
    assert decoded.spacing == (0.5, 0.25)
    with pytest.raises(DecodeError, match="5120 pixels, more than the cap of 5119"):
        decode(written(made), max_pixels=5119)


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.RLELossless, uid.JPEG2000Lossless])
def test_colour(syntax: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (80, 64, 3), dtype=np.uint8)
    made = dataset(pixels, "RGB")
    if syntax != uid.ExplicitVRLittleEndian:
        made.compress(syntax, pixels, generate_instance_uid=False)
    decoded = decode(written(made))
    assert decoded.image.mode == "RGB"
    assert (np.asarray(decoded.image) == pixels).all()
    deep = dataset(pixels.astype(np.uint16) * 257, "RGB")
    assert (np.asarray(decode(written(deep)).image) == pixels).all(), "the high byte, not the low one"


# Files that pydicom ships, in syntaxes that nothing here can write: name, mode and size.
SHIPPED = {
    "JPEG lossless": ("SC_rgb_jpeg_gdcm.dcm", "RGB", (100, 100)),
    "JPEG baseline": ("SC_rgb_jpeg_lossy_gdcm.dcm", "RGB", (100, 100)),
    "JPEG extended": ("JPGExtended.dcm", "F", (256, 1024)),
    "JPEG-LS lossless": ("MR_small_jpeg_ls_lossless.dcm", "F", (64, 64)),
    "JPEG-LS near lossless": ("JPEGLSNearLossless_16.dcm", "F", (10, 50)),
    "JPEG 2000": ("JPEG2000.dcm", "F", (256, 1024)),
    "JPEG 2000 lossless": ("MR_small_jp2klossless.dcm", "F", (64, 64)),
    "JPEG 2000 colour": ("examples_jpeg2k.dcm", "RGB", (640, 480)),
    "RLE": ("MR_small_RLE.dcm", "F", (64, 64)),
    "big endian": ("MR_small_bigendian.dcm", "F", (64, 64)),
    "deflated": ("image_dfl.dcm", "F", (512, 512)),
    "YBR 422": ("SC_ybr_full_422_uncompressed.dcm", "RGB", (100, 100)),
    "palette": ("examples_palette.dcm", "RGB", (800, 350)),
    "one bit": ("liver_1frame.dcm", "F", (512, 512)),
}


def shipped(name: str) -> bytes:
    return (Path(pydicom.__file__).parent / "data" / "test_files" / name).read_bytes()


@pytest.mark.parametrize("kind", SHIPPED)
def test_shipped_files(kind: str) -> None:
    name, mode, size = SHIPPED[kind]
    decoded = decode(shipped(name))
    assert (decoded.image.mode, decoded.image.size) == (mode, size)
    assert np.ptp(np.asarray(decoded.eight_bits())) > 100
    with pytest.raises(DecodeError, match="more than the cap"):
        decode(shipped(name), max_pixels=size[0] * size[1] - 1)


def test_syntaxes_of_one_image_agree() -> None:
    plain = np.asarray(decode(shipped("MR_small.dcm")).image)
    for name in ("RLE", "jp2klossless", "jpeg_ls_lossless", "bigendian", "implicit", "expb", "padded"):
        assert (np.asarray(decode(shipped(f"MR_small_{name}.dcm")).image) == plain).all(), name


def test_window() -> None:
    image = eight(dicom(RAMP, WindowCenter=1000, WindowWidth=400)).ravel()
    values = RAMP.ravel()
    assert (image[values < 790] == 0).all()
    assert (image[values > 1210] == 255).all()
    assert 100 < image[np.abs(values - 1000.0).argmin()] < 155


def test_the_file_is_overruled() -> None:
    data = dicom(RAMP, WindowCenter=1000, WindowWidth=400)
    assert (eight(data, window="percentiles") == eight(dicom(RAMP))).all()
    fixed = eight(data, window=(3000.0, 200.0)).ravel()
    assert (fixed[RAMP.ravel() < 2900] == 0).all()
    assert (fixed[RAMP.ravel() > 3100] == 255).all()


def test_a_lookup_table_does_what_the_window_does() -> None:
    item = Dataset()
    item.LUTDescriptor = [401, 800, 16]
    item.LUTData = np.rint(np.linspace(0, 65535, 401)).astype(int).tolist()
    item["LUTData"].VR = "US"
    tables = {"VOILUTSequence": [item], "RescaleSlope": 1, "RescaleIntercept": 0}  # whose values are no integers
    by_table = eight(dicom(RAMP, **tables))
    by_window = eight(dicom(RAMP, WindowCenter=1000.5, WindowWidth=401))
    assert np.abs(by_table - by_window).max() <= 1
    assert 0 < (by_table == 0).mean() < 0.25


def test_monochrome1_is_inverted() -> None:
    window: dict[str, Any]
    for window in ({}, {"WindowCenter": 1000, "WindowWidth": 400}):
        bright, dark = eight(dicom(RAMP, **window)), eight(dicom(RAMP, "MONOCHROME1", **window))
        assert np.abs(bright + dark - 255).max() <= 1
    fixed = eight(dicom(RAMP, "MONOCHROME1"), window=(1000.0, 400.0)).ravel()
    assert (fixed[RAMP.ravel() < 790] == 255).all()


def test_rescale_comes_before_the_window() -> None:
    tags = {"RescaleSlope": 2, "RescaleIntercept": -1024, "WindowCenter": 976, "WindowWidth": 400}
    data = dicom(RAMP, **tags)
    np.testing.assert_array_equal(np.asarray(decode(data).image), RAMP * 2.0 - 1024)
    assert 100 < eight(data).ravel()[np.abs(RAMP.ravel() * 2.0 - 1024 - 976).argmin()] < 155


def test_constant_gives_no_nan() -> None:
    assert (eight(dicom(np.full((8, 8), 7, np.uint16))) == 0).all()


def test_frames() -> None:
    frames = np.stack([RAMP, RAMP[::-1], RAMP // 2])
    plain = dataset(frames, NumberOfFrames=3)
    packed = dataset(frames, NumberOfFrames=3)
    packed.compress(uid.RLELossless, frames, generate_instance_uid=False)
    for made in (plain, packed):
        data = written(made)
        with pytest.raises(DecodeError, match="more than one frame: choose one"):
            decode(data)
        for number, frame in enumerate(frames):
            assert (np.asarray(decode(data, frame=number).image) == frame).all()
        for number in (3, -1):
            with pytest.raises(DecodeError, match="no frame"):
                decode(data, frame=number)
    with pytest.raises(DecodeError, match="1200 pixels, more than the cap of 1199"):
        decode(written(plain), frame=0, max_pixels=1199)


def test_an_enhanced_file_speaks_for_each_frame() -> None:
    def group(slope: float, spacing: float) -> Dataset:
        measures, transformation, one = Dataset(), Dataset(), Dataset()
        measures.PixelSpacing = [spacing, spacing]
        transformation.RescaleSlope, transformation.RescaleIntercept = slope, -10
        one.PixelMeasuresSequence, one.PixelValueTransformationSequence = [measures], [transformation]
        return one

    made = dataset(np.stack([RAMP, RAMP]), NumberOfFrames=2)
    made.PerFrameFunctionalGroupsSequence = [group(1, 0.5), group(3, 0.7)]
    for number, (slope, spacing) in enumerate([(1.0, 0.5), (3.0, 0.7)]):
        decoded = decode(written(made), frame=number)
        assert decoded.spacing == (spacing, spacing)
        np.testing.assert_array_equal(np.asarray(decoded.image), RAMP * slope - 10)


def test_spacing_of_a_detector() -> None:
    assert decode(dicom(RAMP, ImagerPixelSpacing=[0.139, 0.139])).spacing == (0.139, 0.139)
    both = dicom(RAMP, ImagerPixelSpacing=[0.139, 0.139], PixelSpacing=[0.1, 0.1])
    assert decode(both).spacing == (0.1, 0.1), "that of the patient comes first"
    assert decode(dicom(RAMP)).spacing is None


def test_a_broken_table() -> None:
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [401, 800, 99], [1, 2]
    item["LUTData"].VR = "US"
    decoded = decode(dicom(RAMP, VOILUTSequence=[item]))
    with pytest.raises(DecodeError, match="broken DICOM: NotImplementedError"):
        decoded.eight_bits()
    assert decoded.eight_bits("percentiles").size == (20, 20)


def test_a_panic_of_the_rle_decoder() -> None:
    """It is written in Rust, and what it raises when a run ends beyond its segment is no Exception."""
    made = dataset(RAMP)
    made.compress(uid.RLELossless, RAMP, generate_instance_uid=False)
    data = bytearray(written(made))
    item = bytes.fromhex("feff00e0")
    data[data.index(item, data.index(item) + 4) + 74] = 244
    with pytest.raises(DecodeError, match="PanicException"):
        decode(bytes(data))


def test_no_value_of_the_file_is_told(caplog: pytest.LogCaptureFixture) -> None:
    data = dicom(RAMP, WindowCenter=1, WindowWidth=2)
    broken = data.replace(b"MONOCHROME2 ", b"MONOCHROMEX ")
    caplog.clear()
    caplog.set_level("DEBUG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(data).eight_bits()
        with pytest.raises(DecodeError) as caught:
            decode(broken)
        with pytest.raises(DecodeError):
            decode(shipped("JPEG-lossy.dcm"))  # whose decoder logs a traceback
    assert "MONOCHROMEX" not in str(caught.value)
    assert caplog.text == ""


SAMPLES = [shipped(name) for name in ("MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "SC_rgb_small_odd_jpeg.dcm")]
SAMPLES += [shipped("MR_small_jpeg_ls_lossless.dcm"), dicom(RAMP, WindowCenter=9, WindowWidth=9)]
SAMPLES += [dicom(RAMP, syntax=uid.DeflatedExplicitVRLittleEndian)]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(SAMPLES)))
    for position in draw(st.lists(st.integers(0, 8 * len(data) - 1), max_size=8)):
        data[position // 8] ^= 1 << position % 8
    return bytes(data[: draw(st.integers(0, len(data)) | st.just(len(data)))])


@settings(max_examples=300, deadline=5000)
@given(damaged(), st.sampled_from([None, 0]))
def test_damage_raises_nothing_else(data: bytes, frame: int | None) -> None:
    with contextlib.suppress(DecodeError):
        decode(data, frame=frame, max_pixels=2**20).eight_bits()
