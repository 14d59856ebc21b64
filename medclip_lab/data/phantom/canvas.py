"""The drawing board: an image grid in the coordinates of a body, soft edges, strokes and clouds.

Body coordinates: x to the right of the picture, y down, both about -1 to 1 over the picture; `pixel` is the size of a
pixel in them. Fields are float32 [size, size].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Field: TypeAlias = NDArray[np.float32]
Points: TypeAlias = NDArray[np.float64]
Box: TypeAlias = list[float]

_OVERSAMPLE = 3  # strokes are drawn on a finer raster, so that thin ones are smooth and keep their weight


@dataclass(frozen=True)
class Stroke:
    """A polyline: points [N, 2] and width in body units, brightness 0..1; `closed` fills the outline instead."""

    points: Points
    width: float
    value: float = 1.0
    closed: bool = False


@lru_cache(maxsize=8)
def _grid(size: int) -> tuple[Field, Field]:
    axis = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return x, y


class Canvas:
    """The picture of a body that is enlarged by `zoom`, moved by `shift` (picture units) and turned by `angle`."""

    def __init__(self, size: int, zoom: float, shift: tuple[float, float], angle: float) -> None:
        self.size = size
        self.pixel = 2 / size / zoom
        self._shift = np.array(shift)
        cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
        self._to_body = np.array([[cos, sin], [-sin, cos]])
        self._from_body = np.linalg.inv(self._to_body)
        x, y = _grid(size)
        self.x: Field = np.float32(cos) * (x - np.float32(shift[0])) + np.float32(sin) * (y - np.float32(shift[1]))
        self.y: Field = np.float32(cos) * (y - np.float32(shift[1])) - np.float32(sin) * (x - np.float32(shift[0]))

    def picture(self, points: Points) -> Points:
        """Body points [N, 2] as fractions of the picture."""
        return np.asarray((points @ self._from_body.T + self._shift + 1) / 2)

    def edge(self, distance: Field, soft: float = 0.0) -> Field:
        """1 where `distance` is positive, 0 where negative, a ramp `soft` wide (a pixel at least) between."""
        return np.asarray(np.clip(distance * np.float32(1 / max(soft, self.pixel)) + np.float32(0.5), 0, 1))

    def blob(self, centre: tuple[float, float], radii: tuple[float, float], angle: float = 0.0) -> Field:
        """A Gaussian with standard deviations `radii`."""
        return np.asarray(np.exp(np.float32(-0.5) * self.distance2(centre, radii, angle)))

    def distance2(self, centre: tuple[float, float], radii: tuple[float, float], angle: float = 0.0) -> Field:
        """Squared distance from `centre` in units of `radii`, along axes turned by `angle`."""
        dx, dy = self.x - np.float32(centre[0]), self.y - np.float32(centre[1])
        if not angle:  # the common case, at half the cost
            dx *= np.float32(1 / radii[0])
            dy *= np.float32(1 / radii[1])
            return np.asarray(dx * dx + dy * dy)
        cos, sin = np.cos(angle), np.sin(angle)
        a = dx * np.float32(cos / radii[0]) + dy * np.float32(sin / radii[0])
        b = dy * np.float32(cos / radii[1]) - dx * np.float32(sin / radii[1])
        return np.asarray(a * a + b * b)

    def strokes(self, strokes: Sequence[Stroke], soft: bool = False) -> Field:
        """The strokes over each other, 0..1; `soft` draws on a coarser raster, for what is blurred anyway."""
        fine = 2 if soft else _OVERSAMPLE
        image = Image.new("L", (self.size * fine, self.size * fine))
        draw = ImageDraw.Draw(image)
        if strokes:
            ends = np.cumsum([len(stroke.points) for stroke in strokes])[:-1]
            placed = np.split(self.picture(np.concatenate([stroke.points for stroke in strokes])) * image.width, ends)
            for stroke, points in zip(strokes, placed, strict=True):
                fill = min(255, int(stroke.value * 255))
                if stroke.closed:
                    draw.polygon(points.ravel().tolist(), fill=fill)
                else:
                    width = max(1, round(stroke.width / self.pixel * fine))
                    draw.line(
                        points.ravel().tolist(), fill=fill, width=width, joint=None if soft or width < 4 else "curve"
                    )
        return np.asarray(image.reduce(fine), dtype=np.float32) * np.float32(1 / 255)

    def cloud(self, rng: np.random.Generator, cells: int) -> Field:
        """Smooth noise of about unit variance, `cells` bumps across the picture."""
        coarse = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
        smooth = coarse.resize((self.size, self.size), Image.Resampling.BICUBIC)
        return np.asarray(smooth, dtype=np.float32)

    def box(self, mask: Field, part: float = 0.3) -> Box | None:
        """The box [x0, y0, x1, y1] (fractions) around what exceeds `part` of the maximum; None if next to nothing."""
        top = float(mask.max())
        if top < 0.02:
            return None
        hit = mask > part * top
        rows, columns = np.flatnonzero(hit.any(axis=1)), np.flatnonzero(hit.any(axis=0))
        corners = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        return [round(float(corner) / self.size, 4) for corner in corners]


def curve(*points: tuple[float, float], steps: int = 12) -> Points:
    """A smooth curve [steps, 2] through two, three or four points (a Bezier curve)."""
    t = np.linspace(0, 1, steps)[:, None]
    control = np.repeat(np.array(points, dtype=np.float64)[:, None, :], steps, axis=1)
    while len(control) > 1:
        control = control[:-1] * (1 - t) + control[1:] * t
    return np.asarray(control[0])


def moved(points: Points, x: float, y: float) -> Points:
    """Points [N, 2] moved by (x, y)."""
    return np.asarray(points + np.array((x, y)))


def blur(image: Field, amount: float) -> Field:
    """A small separable blur; `amount` 0..0.33 is the share each neighbour gives."""
    k, c = np.float32(amount), np.float32(1 - 2 * amount)
    padded: Field = np.pad(image, 1, mode="edge")
    rows: Field = c * padded[1:-1] + k * (padded[:-2] + padded[2:])
    blurred: Field = c * rows[:, 1:-1] + k * (rows[:, :-2] + rows[:, 2:])
    return blurred
