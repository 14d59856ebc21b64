"""Encoded images to pixels: decoders by suffix from a short list, sizes checked before decoding."""

import io
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from medclip_lab.data.decoded import DEEP_MODES, Decoded, DecodeError, check_size
from medclip_lab.errors import UserError

__all__ = ["MAX_PIXELS", "DecodeError", "Decoded", "decode_image", "read_image", "suffix_of"]

MAX_PIXELS = 128 * 2**20
MAX_SCANS = 64  # of a progressive JPEG: each costs a pass over the whole image, however few bytes it has
PILLOW_FORMATS = {
    "jpg": "JPEG",
    "jpeg": "JPEG",
    "png": "PNG",
    "webp": "WEBP",
    "tif": "TIFF",
    "tiff": "TIFF",
}
TILE_WIDTH, TILE_LENGTH, PHOTOMETRIC = 322, 323, 262  # tags of TIFF
WHITE_IS_ZERO = 0


def suffix_of(name: str) -> str:
    """Lower-case suffix without the dot, `nii.gz` as one."""
    lower = name.lower()
    return "nii.gz" if lower.endswith(".nii.gz") else lower.rpartition(".")[2]


def read_image(path: str | Path, frame: int | None = None) -> Decoded:
    """Decode an image file; `frame` is needed where it holds several.

    Raises:
        UserError: missing or undecodable.
    """
    path = Path(path).expanduser()
    try:
        return decode_image(path.read_bytes(), suffix_of(path.name), frame=frame)
    except OSError as error:
        raise UserError(f"image: cannot read {path}: {error.strerror}") from None
    except DecodeError as error:
        raise UserError(f"image: cannot decode {path}: {error}") from None


def decode_image(
    data: bytes,
    suffix: str,
    *,
    frame: int | None = None,
    at_least: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Decoded:
    """Pixels as deep as the file has them; greyscale stays one channel.

    Args:
        frame: which one of several, from 0; None where there is but one.
        at_least: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, which is faster, as long as no side gets
            shorter than this; None decodes every pixel.
        max_pixels: cap on rows x columns x samples x frames, checked before memory is taken for them.

    Raises:
        DecodeError: unknown suffix, broken data, too many pixels, no such frame or no choice between several.
    """
    if suffix == "dcm":
        from medclip_lab.data.dicom import decode_dicom

        return decode_dicom(data, frame, max_pixels)
    if suffix not in PILLOW_FORMATS:
        raise DecodeError(f"no decoder for .{suffix} (known: {', '.join([*PILLOW_FORMATS, 'dcm'])})")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own cap is stricter, and a warning may quote the file
            image = _open(data, suffix, frame, max_pixels)
            if at_least is not None and image.format == "JPEG":
                image.draft(None, (at_least, at_least))
            image.load()
    except DecodeError:
        raise
    except Exception as error:  # Pillow's readers raise whatever they meet in broken files
        raise DecodeError(f"broken {suffix}: {type(error).__name__}") from None
    inverted = isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO
    return Decoded(image, inverted=inverted and image.mode in DEEP_MODES)  # Pillow itself inverts 8 bits


def jpeg_channels(data: bytes, suffix: str, max_pixels: int = MAX_PIXELS) -> int:
    """1 or 3 for a grey or a colour JPEG with 8 bits, by its header; 0 for anything else.

    Raises:
        DecodeError: a broken header, too many pixels.
    """
    if PILLOW_FORMATS.get(suffix) != "JPEG":
        return 0
    try:
        image = _open(data, suffix, None, max_pixels)
    except DecodeError:
        raise
    except Exception as error:  # as above
        raise DecodeError(f"broken {suffix}: {type(error).__name__}") from None
    return {"L": 1, "RGB": 3}.get(image.mode, 0)


def _open(data: bytes, suffix: str, frame: int | None, max_pixels: int) -> Image.Image:
    """The image with its header read and checked, and no pixel decoded."""
    kind = PILLOW_FORMATS[suffix]
    if kind == "WEBP":
        # Its decoder takes memory for the canvas as soon as it is opened.
        check_size(_webp_pixels(data), max_pixels)
    image = Image.open(io.BytesIO(data), formats=(kind,))
    check_size(image.width * image.height, max_pixels)
    if kind == "JPEG":  # further frames, if any, are previews or depth maps of the first
        if "progressive" in image.info and data.count(b"\xff\xda") > MAX_SCANS:
            raise DecodeError(f"a progressive JPEG of more than {MAX_SCANS} scans")
    elif frame is not None:
        try:
            image.seek(frame)
        except EOFError:
            raise DecodeError(f"no frame {frame}") from None
        check_size(image.width * image.height, max_pixels)
    elif getattr(image, "is_animated", False):
        raise DecodeError("more than one frame: choose one with frame=")
    if isinstance(image, TiffImageFile):
        # A tile is decoded whole, however little of it the image needs.
        check_size(image.tag_v2.get(TILE_WIDTH, 1) * image.tag_v2.get(TILE_LENGTH, 1), max_pixels)
    return image


def _webp_pixels(data: bytes) -> int:
    """Pixels of the canvas and of the largest frame, as the chunks of a WebP tell them."""
    return max((width * height for width, height in _webp_sizes(data)), default=0)


def _webp_sizes(data: bytes) -> Iterator[tuple[int, int]]:
    position = 12
    while position + 8 <= len(data):
        name, length = struct.unpack_from("<4sI", data, position)
        body = data[position + 8 : position + 24]
        if name == b"VP8X" and len(body) >= 10:
            yield 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
        elif name == b"VP8 " and len(body) >= 10:
            width, height = struct.unpack_from("<HH", body, 6)
            yield width & 0x3FFF, height & 0x3FFF
        elif name == b"VP8L" and len(body) >= 5:
            bits = int.from_bytes(body[1:5], "little")
            yield 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        position += 8 + length + length % 2
