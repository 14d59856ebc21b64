"""What tells that two studies are the same or nearly so: hashes of their images and of their report."""

import hashlib
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medclip_lab.data.decode import DecodeError, decode_image
from medclip_lab.data.sample import Sample
from medclip_lab.errors import UserError

_SIDE = 64  # pixels of the image that is transformed
_KEPT = 16  # lowest frequencies in each direction: 16 x 16 bits


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Hashes of a study, in hex."""

    images: list[str]
    """Of the bytes of each image, 32 digits."""
    looks: list[str]
    """`perceptual_hash` of each image, 64 digits; empty where it has none."""
    report: str
    """Of the words of the report, 32 digits; empty if there are none."""


def fingerprint(sample: Sample) -> Fingerprint:
    words = " ".join(re.findall(r"\w+", sample.text.lower()))
    return Fingerprint(
        images=[_digest(data) for _, data in sample.images],
        looks=[perceptual_hash(suffix, data) for suffix, data in sample.images],
        report=_digest(words.encode()) if words else "",
    )


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _cosines() -> NDArray[np.float32]:
    """The first rows of the discrete cosine transform, [_KEPT, _SIDE]."""
    places, frequencies = np.arange(_SIDE) + 0.5, np.arange(_KEPT)
    return np.cos(np.pi / _SIDE * frequencies[:, None] * places).astype(np.float32)


_COSINES = _cosines()


def perceptual_hash(suffix: str, data: bytes) -> str:
    """256 bits that stay nearly the same when an image is compressed, resized or made a little brighter.

    A bit a frequency of the 16 x 16 lowest: whether its cosine coefficient is above their median (pHash, Zauner 2010,
    at twice its side: with 64 bits unrelated chest radiographs come as close as 4). Bit (u, v) is stored in row
    (v - u) mod 16, so that each row of 16 has low and high frequencies and rows of unrelated images seldom agree.

    Returns:
        64 hex digits; empty for an image that is all of one grey, or of a format that cannot be decoded here.
    """
    try:
        image = decode_image(data, suffix).eight_bits()
    except (DecodeError, UserError):  # no decoder for the suffix or the transfer syntax, or no pydicom
        return ""
    grey = image.convert("L").convert("F")
    small = np.asarray(grey.resize((_SIDE, _SIDE), Image.Resampling.BOX), dtype=np.float32)
    if np.ptp(small) < 1:
        return ""
    frequencies = _COSINES @ small @ _COSINES.T
    bits = frequencies > np.median(frequencies.ravel()[1:])  # the first is the mean brightness
    rows = np.arange(_KEPT)
    return np.packbits(bits[rows, (rows + rows[:, None]) % _KEPT]).tobytes().hex()
