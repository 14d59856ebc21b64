"""Encoded images to 8-bit pixels: decoders by suffix from a short list, sizes checked before decoding."""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medclip_lab.errors import UserError

MAX_PIXELS = 128 * 2**20
PILLOW_FORMATS = {
    "jpg": "JPEG",
    "jpeg": "JPEG",
    "png": "PNG",
    "webp": "WEBP",
    "tif": "TIFF",
    "tiff": "TIFF",
}


class DecodeError(ValueError):
    """An image that cannot be used; the message names the cause and nothing of the image's content."""


def suffix_of(name: str) -> str:
    """Lower-case suffix without the dot, `nii.gz` as one."""
    lower = name.lower()
    return "nii.gz" if lower.endswith(".nii.gz") else lower.rpartition(".")[2]


def read_image(path: str | Path) -> Image.Image:
    """Decode an image file.

    Raises:
        UserError: missing or undecodable.
    """
    path = Path(path).expanduser()
    try:
        return decode_image(path.read_bytes(), suffix_of(path.name))
    except OSError as error:
        raise UserError(f"image: cannot read {path}: {error.strerror}") from None
    except DecodeError as error:
        raise UserError(f"image: cannot decode {path}: {error}") from None


def decode_image(data: bytes, suffix: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An 8-bit Pillow image, mode "L" for greyscale and "RGB" for colour.

    More than 8 bits are windowed: DICOM by its own rescale, VOI LUT and photometric interpretation, other formats
    from their least to their greatest value.

    Raises:
        DecodeError: unknown suffix, broken data, too many pixels.
    """
    if suffix == "dcm":
        return _decode_dicom(data, max_pixels)
    if suffix not in PILLOW_FORMATS:
        raise DecodeError(f"no decoder for .{suffix} (known: {', '.join([*PILLOW_FORMATS, 'dcm'])})")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own cap is stricter
            image = Image.open(io.BytesIO(data), formats=(PILLOW_FORMATS[suffix],))
            _check_size(*image.size, max_pixels)
            image.load()
    except DecodeError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DecodeError(f"broken {suffix}: {type(error).__name__}") from None
    return eight_bits(image)


def eight_bits(image: Image.Image) -> Image.Image:
    """Mode "L" or "RGB" from any other; more than 8 bits are stretched from the least to the greatest value."""
    if image.mode in ("L", "RGB"):
        return image
    if image.mode in ("I;16", "I;16B", "I", "F"):
        return Image.fromarray(_window(np.asarray(image, dtype=np.float32)))
    return image.convert("L" if image.mode in ("1", "LA") else "RGB")


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise DecodeError(f"{width} x {height} pixels, more than the cap of {max_pixels}")


def _window(pixels: "np.ndarray[Any, np.dtype[np.float32]]") -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """Stretch from least to greatest value over 8 bits; a constant image stays black."""
    if not np.isfinite(pixels).all():
        raise DecodeError("pixels that are not finite")
    low, high = float(pixels.min()), float(pixels.max())
    scaled = (pixels - low) * (255.0 / (high - low) if high > low else 0.0)
    eight: np.ndarray[Any, np.dtype[np.uint8]] = np.rint(scaled).astype(np.uint8)
    return eight


def _decode_dicom(data: bytes, max_pixels: int) -> Image.Image:
    try:
        import pydicom
        from pydicom.pixels.processing import apply_rescale, apply_voi_lut
    except ImportError:
        raise UserError("DICOM needs pydicom: pip install 'medclip_lab[dicom]'") from None
    try:
        dataset = pydicom.dcmread(io.BytesIO(data))
        rows, columns = int(dataset.Rows), int(dataset.Columns)
        _check_size(rows * int(dataset.get("NumberOfFrames", 1) or 1), columns, max_pixels)
        if int(dataset.get("NumberOfFrames", 1) or 1) > 1:
            raise DecodeError("more than one frame: choose one before")
        pixels = dataset.pixel_array
        if pixels.ndim == 3:
            return Image.fromarray(np.asarray(pixels, dtype=np.uint8)).convert("RGB")
        values = apply_voi_lut(apply_rescale(pixels, dataset), dataset).astype(np.float32)
        if dataset.PhotometricInterpretation == "MONOCHROME1":  # low values are bright
            values = values.max() - values
    except DecodeError:
        raise
    except Exception as error:  # pydicom and its plug-ins raise whatever they meet in broken files
        raise DecodeError(f"broken DICOM: {type(error).__name__}") from None
    return Image.fromarray(_window(values))
