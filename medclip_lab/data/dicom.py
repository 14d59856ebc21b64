"""DICOM to pixels: rescaled values, the file's own window, spacing; one frame, its sizes checked before decoding."""

import io
import logging
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medclip_lab.data.decoded import Decoded, DecodeError, check_size
from medclip_lab.errors import UserError

if TYPE_CHECKING:
    from pydicom import Dataset

LOGGERS = ("pydicom", "pylibjpeg", "libjpeg", "openjpeg", "rle")
SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
FRAME_GROUPS = ("PixelMeasuresSequence", "PixelValueTransformationSequence", "FrameVOILUTSequence")
BYTES_PER_PIXEL = 4  # what the deflated form may hold for each pixel of the cap, all else included
JPEG_START, J2K_START = b"\xff\xd8", b"\xff\x4f\xff\x51"
JPEG_FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
"""Markers that start a frame header of JPEG, and of JPEG-LS."""


def decode_dicom(data: bytes, frame: int | None, max_pixels: int) -> Decoded:
    """One frame: greyscale as rescaled float32 values of mode "F", colour as "RGB".

    Raises:
        DecodeError: broken data, too many pixels, no such frame or no choice between several.
        UserError: pydicom is not installed.
    """
    try:
        import pydicom  # noqa: F401
    except ImportError:
        raise UserError("DICOM needs pydicom: pip install 'medclip_lab[dicom]'") from None
    try:
        with _silence():
            return _decode(data, frame, max_pixels)
    except (DecodeError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # whatever pydicom and its plug-ins meet; a panic of the RLE one is no Exception
        raise DecodeError(f"broken DICOM: {type(error).__name__}") from None


@contextmanager
def _silence() -> Iterator[None]:
    """No warning and no log line of pydicom and the decoders: they quote values of the file, UIDs among them."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _decode(data: bytes, frame: int | None, max_pixels: int) -> Decoded:
    from pydicom.pixels.processing import apply_rescale

    dataset = _read(data, max_pixels)
    number = _choose_frame(dataset, frame, max_pixels)
    _flatten(dataset, number)
    pixels = _pixels(dataset, number, max_pixels)
    spacing = _spacing(dataset)
    if pixels.ndim == 3:
        return Decoded(Image.fromarray(pixels), spacing)
    values = apply_rescale(pixels, dataset).astype(np.float32)
    windowed = "VOILUTSequence" in dataset or "WindowCenter" in dataset
    return Decoded(
        Image.fromarray(values),
        spacing,
        display=partial(_display, dataset) if windowed else None,
        inverted=dataset.PhotometricInterpretation == "MONOCHROME1",
    )


def _display(dataset: "Dataset", values: NDArray[Any]) -> NDArray[Any]:
    """The VOI LUT or window of a dataset, applied to rescaled values."""
    from pydicom.pixels.processing import apply_voi_lut

    try:
        with _silence():
            return apply_voi_lut(values, dataset)
    except Exception as error:  # as above, and the table is not read before
        raise DecodeError(f"broken DICOM: {type(error).__name__}") from None


def _read(data: bytes, max_pixels: int) -> "Dataset":
    from pydicom import dcmread
    from pydicom.filereader import _read_file_meta_info, read_preamble
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    file = io.BytesIO(data)
    read_preamble(file, force=False)
    # The very function that dcmread uses, public in the form for paths only: both must see the same syntax.
    if _read_file_meta_info(file).get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        # pydicom inflates without a limit, so the size is found out first, a piece at a time.
        _check_inflated(file.read(), BYTES_PER_PIXEL * max_pixels)
    return dcmread(io.BytesIO(data))


def _check_inflated(data: bytes, cap: int) -> None:
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    size = 0
    while data and not inflate.eof:
        size += len(inflate.decompress(data, 2**20))
        if size > cap:
            raise DecodeError(f"inflates to more than {cap} bytes")
        data = inflate.unconsumed_tail


def _choose_frame(dataset: "Dataset", frame: int | None, max_pixels: int) -> int:
    frames = int(dataset.get("NumberOfFrames", 1) or 1)
    check_size(int(dataset.Rows) * int(dataset.Columns) * int(dataset.SamplesPerPixel) * frames, max_pixels)
    if frame is None and frames > 1:
        raise DecodeError("more than one frame: choose one with frame=")
    number = frame or 0
    if not 0 <= number < frames:
        raise DecodeError(f"no frame {number} among {frames}")
    return number


def _flatten(dataset: "Dataset", frame: int) -> None:
    """Bring what an enhanced multi-frame says of this frame (spacing, rescale, window) to where others have it."""
    groups = [*dataset.get("SharedFunctionalGroupsSequence", [])[:1]]
    groups += dataset.get("PerFrameFunctionalGroupsSequence", [])[frame : frame + 1]
    for group in groups:
        for name in FRAME_GROUPS:
            for item in group.get(name, [])[:1]:
                dataset.update(item)


def _pixels(dataset: "Dataset", frame: int, max_pixels: int) -> NDArray[Any]:
    """[rows, columns] stored values, or [rows, columns, 3] uint8."""
    from pydicom.encaps import get_frame
    from pydicom.pixels.processing import apply_color_lut
    from pydicom.pixels.utils import pixel_array
    from pydicom.uid import RLELossless

    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated and syntax != RLELossless:
        # The decoders go by the frame's own header, which may promise another size than the dataset.
        frames = int(dataset.get("NumberOfFrames", 1) or 1)
        check_size(_encoded_pixels(get_frame(dataset.PixelData, frame, number_of_frames=frames)), max_pixels)
    pixels = pixel_array(dataset, index=frame)
    bits = int(dataset.BitsStored)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dataset)
        bits = 8 * pixels.itemsize
    if pixels.ndim == 2:
        return pixels
    return (pixels >> max(bits - 8, 0)).astype(np.uint8)[..., :3]


def _encoded_pixels(stream: bytes) -> int:
    """Width x height x components in the header of a JPEG, JPEG-LS or JPEG 2000 stream.

    Raises:
        DecodeError: no such header.
    """
    if stream.startswith(JPEG_START):
        return _jpeg_pixels(stream)
    # Some writers put the boxes of JP2 around the stream; what a box claims to be one counts as well.
    starts = [0] if stream.startswith(J2K_START) else [match.start() for match in re.finditer(J2K_START, stream)]
    if not starts:
        raise DecodeError("broken DICOM: a frame without a header")
    return max(_j2k_pixels(stream[start : start + 42]) for start in starts)


def _j2k_pixels(head: bytes) -> int:
    right, bottom, left, top = struct.unpack_from(">4I", head, 8)
    (components,) = struct.unpack_from(">H", head, 40)
    return max(int(right) - int(left), 0) * max(int(bottom) - int(top), 0) * int(components)


def _jpeg_pixels(stream: bytes) -> int:
    position = 2
    while position + 10 <= len(stream) and stream[position] == 0xFF:
        marker = stream[position + 1]
        if marker == 0xFF:  # fill
            position += 1
            continue
        length, _, height, width, components = struct.unpack_from(">HBHHB", stream, position + 2)
        if marker in JPEG_FRAMES:
            return int(height) * int(width) * int(components)
        position += 2 + length
    raise DecodeError("broken DICOM: a frame without a header")


def _spacing(dataset: "Dataset") -> tuple[float, float] | None:
    for name in SPACINGS:
        value = dataset.get(name)
        if value and len(value) == 2:
            return float(value[0]), float(value[1])
    return None
