"""A decoded image: pixels as deep as the file has them, and the windows that make 8 bits of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Window = Literal["file", "percentiles"] | tuple[float, float]
DEEP_MODES = ("I;16", "I;16B", "I", "F")
"""Pillow's modes of more than 8 bits."""


class DecodeError(ValueError):
    """An image that cannot be used; the message names the cause and nothing of the image's content."""


def check_size(pixels: int, max_pixels: int) -> None:
    """Refuse before any memory is taken.

    Raises:
        DecodeError: more than `max_pixels`.
    """
    if pixels > max_pixels:
        raise DecodeError(f"{pixels} pixels, more than the cap of {max_pixels}")


@dataclass(frozen=True)
class Decoded:
    """One image, or one frame of several."""

    image: Image.Image
    """Mode "L" or "RGB"; "I;16", "I" or "F" where the file has more than 8 bits, as DICOM always has here. The values
    of DICOM are rescaled (Hounsfield units for CT)."""
    spacing: tuple[float, float] | None = None
    """Millimetres between rows and between columns, where the file tells."""
    display: Callable[[NDArray[Any]], NDArray[Any]] | None = None
    """The file's own VOI LUT or window."""
    inverted: bool = False
    """Low values are bright (MONOCHROME1, and "white is zero" of TIFF)."""

    def eight_bits(self, window: Window = "file", percentiles: tuple[float, float] = (0.0, 100.0)) -> Image.Image:
        """Mode "L" or "RGB". What has 8 bits stays as it is; deeper pixels are windowed.

        Args:
            window: "file" applies the file's VOI LUT or window, if it has one, and stretches the result between the
                percentiles; "percentiles" stretches the values as they are; (center, width) is in the file's units.
            percentiles: these become black and white; a constant image becomes black.

        Raises:
            DecodeError: values that are not finite, or a VOI LUT that is broken.
        """
        if self.image.mode not in DEEP_MODES:
            return plain(self.image)
        values: NDArray[Any] = np.asarray(self.image)
        if window == "file" and self.display is not None:
            values = self.display(values)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise DecodeError("pixels that are not finite")
        if isinstance(window, str):
            low, high = _range(values, percentiles)
        else:
            low, high = window[0] - window[1] / 2, window[0] + window[1] / 2
        return Image.fromarray(_stretch(values, low, high, self.inverted))


def plain(image: Image.Image) -> Image.Image:
    """An 8-bit Pillow image as "L" or "RGB"."""
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode in ("1", "LA") else "RGB")


def _range(values: NDArray[Any], percentiles: tuple[float, float]) -> tuple[float, float]:
    if tuple(percentiles) == (0.0, 100.0):
        return float(values.min()), float(values.max())
    low, high = np.percentile(values, percentiles)
    return float(low), float(high)


def _stretch(values: NDArray[Any], low: float, high: float, inverted: bool) -> NDArray[np.uint8]:
    scaled = values.astype(np.float32)
    if inverted:
        np.subtract(high, scaled, out=scaled)
    else:
        scaled -= low
    scaled *= 255.0 / (high - low) if high > low else 0.0
    np.clip(scaled, 0, 255, out=scaled)
    np.rint(scaled, out=scaled)
    return scaled.astype(np.uint8)
