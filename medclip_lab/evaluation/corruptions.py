"""Seven ways in which a radiograph can be worse than those of the training, in five severities each.

After the kinds of MedMNIST-C (Di Salvo et al., 2024) and MediMeta-C (Imam et al., 2025), drawn by our own code. Images
are arrays [H, W] or [H, W, 3] of uint8 or uint16, before any geometry. What is meant in pixels (grain, blur, cells of a
mosaic) is in units of 1/224 of the longer side, so that a severity means the same for a small image and a large film.
Whatever is random is drawn from the seed, the kind, the severity and the image itself: a sample looks the same in any
order and company.
"""

import io
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8] | NDArray[np.uint16]
Values = NDArray[np.floating[Any]]
SEVERITIES = (1, 2, 3, 4, 5)
REFERENCE_SIDE = 224


def corrupt(pixels: Pixels, kind: str, severity: int, seed: int = 0) -> Pixels:
    """The image made worse: same shape, same depth.

    Args:
        kind: one of `KINDS`.
        severity: 1 to 5.

    Raises:
        ValueError: another kind, severity or depth.
    """
    if kind not in KINDS or severity not in SEVERITIES:
        raise ValueError(f"corruption {kind!r} at severity {severity}: one of {', '.join(KINDS)}, from 1 to 5")
    if pixels.dtype not in (np.uint8, np.uint16) or pixels.ndim not in (2, 3):
        raise ValueError(f"corruption: uint8 or uint16 [H, W] or [H, W, 3], not {pixels.dtype} {pixels.shape}")
    top = np.iinfo(pixels.dtype).max
    look = zlib.crc32(np.ascontiguousarray(pixels).tobytes())
    rng = np.random.default_rng((seed, list(KINDS).index(kind), severity, look))
    values = (pixels.astype(np.float32) / np.float32(top)).reshape(*pixels.shape[:2], -1)
    worse = np.clip(KINDS[kind](values, severity - 1, rng), 0, 1).reshape(pixels.shape)
    rounded = np.rint(worse * np.float32(top))
    return np.asarray(rounded, np.uint8) if pixels.dtype == np.uint8 else np.asarray(rounded, np.uint16)


def corruption(kind: str, severity: int, seed: int = 0) -> Callable[[Image.Image], Image.Image]:
    """The same for Pillow images of mode "L" or "RGB"."""
    return lambda image: Image.fromarray(corrupt(np.asarray(image), kind, severity, seed))


def _grain(values: Values) -> float:
    """Pixels of this image in one of the reference."""
    return float(max(1.0, max(values.shape[:2]) / REFERENCE_SIDE))


def _noise(values: Values, rng: np.random.Generator) -> Values:
    """Standard normal [H, W, 1], one draw a grain: finer noise would average out when the image is made smaller."""
    height, width = values.shape[:2]
    grain = _grain(values)
    rows, columns = (np.arange(height) / grain).astype(int), (np.arange(width) / grain).astype(int)
    drawn = rng.standard_normal((rows[-1] + 1, columns[-1] + 1), dtype=np.float32)
    return np.asarray(drawn[np.ix_(rows, columns)][..., None])


def _gaussian_noise(values: Values, level: int, rng: np.random.Generator) -> Values:
    return values + np.float32((0.04, 0.08, 0.13, 0.20, 0.30)[level]) * _noise(values, rng)


def _speckle(values: Values, level: int, rng: np.random.Generator) -> Values:
    """Noise in proportion to the brightness."""
    return values * (1 + np.float32((0.10, 0.18, 0.28, 0.40, 0.60)[level]) * _noise(values, rng))


def _motion_blur(values: Values, level: int, rng: np.random.Generator) -> Values:
    """The mean along a straight way of random direction."""
    length, angle = (4, 7, 11, 16, 24)[level] * _grain(values), rng.uniform(0, np.pi)
    places = np.linspace(-length / 2, length / 2, round(length) + 1)
    steps = np.rint(np.stack([places * np.sin(angle), places * np.cos(angle)], 1)).astype(int)
    reach = int(np.abs(steps).max())
    height, width = values.shape[:2]
    padded = np.pad(values, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    total = np.zeros_like(values)
    for down, right in steps:
        total += padded[reach + down : reach + down + height, reach + right : reach + right + width]
    return np.asarray(total / np.float32(len(steps)))


def _jpeg(values: Values, level: int, _rng: np.random.Generator) -> Values:
    """Saved at 8 bits and low quality, at the reference's size at most: blocks on a large film would not be seen."""
    height, width = values.shape[:2]
    grain = _grain(values)
    small = _picture(values).resize((round(width / grain), round(height / grain)), Image.Resampling.BOX)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=(40, 25, 15, 9, 5)[level])
    return _values(Image.open(buffer).resize((width, height), Image.Resampling.BILINEAR), values.shape[2])


def _brightness(values: Values, level: int, rng: np.random.Generator) -> Values:
    """Over- or underexposed."""
    return values + np.float32(rng.choice((-1, 1)) * (0.08, 0.16, 0.24, 0.34, 0.46)[level])


def _contrast(values: Values, level: int, _rng: np.random.Generator) -> Values:
    """Flatter around the mean."""
    mean = values.mean(dtype=np.float64).astype(np.float32)
    return np.asarray(mean + np.float32((0.65, 0.50, 0.36, 0.24, 0.14)[level]) * (values - mean))


def _pixelate(values: Values, level: int, _rng: np.random.Generator) -> Values:
    """A mosaic of so many cells along the longer side."""
    height, width = values.shape[:2]
    shrink = max(1.0, max(height, width) / (96, 64, 48, 32, 20)[level])
    size = max(1, round(width / shrink)), max(1, round(height / shrink))
    mosaic = _picture(values).resize(size, Image.Resampling.BOX)
    return _values(mosaic.resize((width, height), Image.Resampling.NEAREST), values.shape[2])


def _picture(values: Values) -> Image.Image:
    eight = np.rint(values * 255).astype(np.uint8)
    return Image.fromarray(eight[..., 0] if eight.shape[2] == 1 else eight)


def _values(image: Image.Image, channels: int) -> Values:
    return (np.asarray(image, dtype=np.float32) / 255).reshape(image.height, image.width, channels)


KINDS: dict[str, Callable[[Values, int, np.random.Generator], Values]] = {
    "gaussian_noise": _gaussian_noise,
    "speckle": _speckle,
    "motion_blur": _motion_blur,
    "jpeg": _jpeg,
    "brightness": _brightness,
    "contrast": _contrast,
    "pixelate": _pixelate,
}


def robustness(clean: float, errors_of: dict[str, list[float]], baseline: dict[str, Any] | None) -> dict[str, Any]:
    """What the corruptions cost.

    Errors are 1 - AUROC (mean over labels). For a kind c with errors E(c, s) at severities s, as in Hendrycks &
    Dietterich (ICLR 2019, section 4.1), with AUROC in place of accuracy:

    - corruption error of a kind: sum over s of E(c, s), divided by the same sum of the baseline; mCE is its mean over
      kinds, 1 for a model as robust as the baseline. None without a baseline.
    - relative drop of a kind: (clean AUROC - mean AUROC over s) / (clean AUROC - 0.5), the share that is lost of what
      the model is better than chance. None where it is not better than chance on clean images.

    Args:
        clean: AUROC of the images as they are.
        errors_of: kind to the five errors.
        baseline: what this function gave for another model on the same images, or None.

    Raises:
        ValueError: the baseline has other kinds.
    """
    if baseline is not None and set(baseline["errors"]) != set(errors_of):
        raise ValueError("the baseline was measured on other corruptions")
    drops: dict[str, float | None] = {}
    ratios: dict[str, float] = {}
    for kind, errors in errors_of.items():
        lost = clean - (1 - float(np.mean(errors)))
        drops[kind] = lost / (clean - 0.5) if clean > 0.5 else None
        if baseline is not None:
            ratios[kind] = float(sum(errors) / sum(baseline["errors"][kind]))
    known = [drop for drop in drops.values() if drop is not None]
    return {
        "clean_auroc": clean,
        "errors": errors_of,
        "relative_drop": {"mean": float(np.mean(known)) if known else None, **drops},
        "mce": float(np.mean(list(ratios.values()))) if ratios else None,
        "ce": ratios or None,
        "reasons": ([] if ratios else ["no baseline was named, hence no mCE"])
        + ([] if known else ["no better than chance on clean images, hence no relative drop"]),
    }
