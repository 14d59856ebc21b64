"""From bytes somebody sent to what a tower reads: kind by content, sizes before decoding, and what was done told."""

import base64
import binascii
import io
import re
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from medclip_lab.data.decode import DecodeError, decode_image
from medclip_lab.data.decoded import DEEP_MODES
from medclip_lab.data.preprocess import Preprocess
from medclip_lab.errors import UserError
from medclip_lab.serving.problems import Problem

PNG_START = b"\x89PNG\r\n\x1a\n"
STARTS = {PNG_START: "png", b"\xff\xd8\xff": "jpg", b"II*\0": "tif", b"MM\0*": "tif"}
FOREIGN = re.compile(rb"%PDF-|<\s*(!doctype|html|script|svg|\?xml|\?php)", re.IGNORECASE)
"""What other readers take a file for, wherever in its first kilobyte they find it."""
PREAMBLES = (b"MZ", b"\x7fELF", b"PK", b"#!", b"GIF8", b"II*\0", b"MM\0*", PNG_START, b"\xff\xd8\xff")
KNOWN = "PNG, JPEG, TIFF, WebP or DICOM"


@dataclass(frozen=True)
class Prepared:
    """An image, ready for the tower."""

    pixels: Tensor
    """uint8 [C, size, size]."""
    picture: Image.Image
    """The windowed image in its own size."""
    facts: dict[str, Any]
    """What was done to the pixels."""


@dataclass(frozen=True)
class Limits:
    """What an image may be."""

    max_pixels: int
    max_aspect: float


def from_base64(text: str) -> bytes:
    """The bytes of an image in JSON.

    Raises:
        Problem: no base64.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Problem(422, "bad-base64", "data is no base64: encode the file's bytes, without line breaks") from None


def prepare(data: bytes, frame: int | None, preprocess: Preprocess, limits: Limits) -> Prepared:
    """Decode one image and make of it what the tower reads.

    Raises:
        Problem: 415 for what is no image, 413 for too many pixels, 422 for what cannot be used.
    """
    suffix = kind_of(data)
    try:
        decoded = decode_image(data, suffix, frame=frame, max_pixels=limits.max_pixels)
        width, height = decoded.image.size
        if max(width, height) > limits.max_aspect * min(width, height):
            raise Problem(
                422, "aspect", f"a side of the image is more than {limits.max_aspect:g} times the other: crop it"
            )
        picture = preprocess.window(decoded)
    except DecodeError as error:
        raise _problem(str(error), limits) from None
    except UserError as error:
        raise Problem(501, "no-decoder", str(error)) from None
    config = preprocess.config
    deep = decoded.image.mode in DEEP_MODES
    facts: dict[str, Any] = {"format": suffix, "width": width, "height": height, "frame": frame}
    facts |= {"channels": len(picture.getbands()), "deep": deep}
    if deep:
        own = config.window == "file" and decoded.display is not None
        window = "file" if own else "percentiles" if isinstance(config.window, str) else list(config.window)
        facts |= {"window": window, "percentiles": list(config.percentiles), "inverted": decoded.inverted}
    facts |= {"resized_to": config.size, "resize_mode": config.resize_mode, "interpolation": config.interpolation}
    return Prepared(preprocess(picture), picture, facts)


def kind_of(data: bytes) -> str:
    """The suffix that fits what a file holds, whatever it is called.

    Raises:
        Problem: nothing known, or more than one thing at once.
    """
    if data[128:132] == b"DICM":
        if data.startswith(PREAMBLES) or FOREIGN.search(data[:128]):
            raise _two_things()
        return "dcm"
    kind = next((kind for start, kind in STARTS.items() if data.startswith(start)), None)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        kind = "webp"
    if kind is None:
        raise Problem(415, "no-image", f"the content is no image that is read here: send {KNOWN}")
    # Only pixels leave the decoder, so such a file does no harm here; it is no honest export of an archive either.
    if FOREIGN.search(data[:1024]) or _ends_as_zip(data) or (kind == "png" and not _ends_as_png(data)):
        raise _two_things()
    return kind


def _ends_as_zip(data: bytes) -> bool:
    """Whether a reader of ZIP finds its directory, whose last field is the length of what follows it."""
    start = data.rfind(b"PK\x05\x06", max(len(data) - 65_600, 0))
    return 0 <= start <= len(data) - 22 and start + 22 + int.from_bytes(data[start + 20 : start + 22], "little") == len(
        data
    )


def _ends_as_png(data: bytes) -> bool:
    """Whether nothing follows the last chunk; a file without one is for the decoder to refuse."""
    position = len(PNG_START)
    while position + 12 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        name = data[position + 4 : position + 8]
        position += 12 + length
        if name == b"IEND":
            return position >= len(data)
    return True


def _two_things() -> Problem:
    return Problem(415, "two-kinds", f"the content is an image and something else at once: send a plain {KNOWN}")


def _problem(cause: str, limits: Limits) -> Problem:
    """A refusal from what the decoder said, which quotes nothing of the content."""
    if "more than the cap" in cause or "inflates to more" in cause or "DecompressionBomb" in cause:
        return Problem(413, "too-many-pixels", f"an image may have {limits.max_pixels} pixels: send a smaller one")
    if "more than one frame" in cause:
        return Problem(422, "frame-missing", "the file has several frames: name one as `frame`, counted from 0")
    if cause.startswith("no frame"):
        return Problem(422, "no-such-frame", "the file has no such frame: choose a smaller `frame`, counted from 0")
    return Problem(422, "broken-image", f"the image cannot be decoded ({cause}): export it again")


def png_of(pixels: Tensor) -> str:
    """What the tower saw, as PNG in base64."""
    values = pixels.permute(1, 2, 0).squeeze(-1).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
