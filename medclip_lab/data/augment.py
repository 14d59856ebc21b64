"""Random changes of training images, each drawn from the image's own seed.

An image's seed alone decides what happens to it: not its batch, nor the rank or device that works on it. The streams
of two seeds are those of a Philox generator under two keys (Salmon et al., "Parallel random numbers: as easy as 1, 2,
3", SC 2011).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from medclip_lab.data.clahe import clahe
from medclip_lab.data.preprocess import Box

DRAWS = (
    *("crop_area", "crop_aspect", "crop_x", "crop_y", "flip", "angle", "zoom", "shift_x", "shift_y"),
    *("contrast", "brightness", "clahe"),
)
"""What is drawn for every image, always and in this order: turning one change on or off alters no other."""
CHUNK = 2  # images whose float pixels fit a core's cache together


@dataclass
class AugmentConfig:
    """Random changes of training images, drawn for each image."""

    crop: tuple[float, float] = (1.0, 1.0)
    """A part of the image is taken, its share of the area drawn between these."""
    aspect: float = 1.0
    """That part may be wider or higher than the image by up to this factor; 4/3 is what open_clip does."""
    flip: float = 0.0
    """Share of images that are mirrored; only where texts and labels tell no side."""
    degrees: float = 0.0
    """Rotation, up to this many degrees either way."""
    translate: float = 0.0
    """Shift, up to this share of the side either way."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Magnification, drawn between these."""
    brightness: float = 0.0
    """Added to the pixels, up to this share of the full range either way."""
    contrast: float = 0.0
    """Contrast is multiplied by 1 plus up to this much either way."""
    clahe: float = 0.0
    """Share of images whose contrast is equalised locally."""
    views: int = 1
    """Images of a study, changed apart from each other; 2 for losses that compare them: the second is another image of
    the study where it has one, else the same once more."""

    def __post_init__(self) -> None:
        if not 0 < self.crop[0] <= self.crop[1] <= 1 or self.aspect < 1:
            raise ValueError(
                "augment: crop is two growing shares of the area up to 1 and aspect at least 1, got "
                f"{list(self.crop)} and {self.aspect}"
            )
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"augment.scale: two growing positive numbers, got {list(self.scale)}")
        if self.views not in (1, 2):
            raise ValueError(f"augment.views is 1 or 2, got {self.views}")

    @property
    def crops(self) -> bool:
        return tuple(self.crop) != (1.0, 1.0) or self.aspect != 1.0

    @property
    def moves(self) -> bool:
        return bool(self.degrees or self.translate) or tuple(self.scale) != (1.0, 1.0)


def draw(seeds: Sequence[int]) -> dict[str, NDArray[np.float64]]:
    """Numbers in [0, 1) for every image, [B] under each name of DRAWS, from seeds of 0 to 2**64 - 1."""
    rows = [np.random.Generator(np.random.Philox(key=seed)).random(len(DRAWS)) for seed in seeds]
    return dict(zip(DRAWS, np.array(rows).T, strict=True))


def crop_box(config: AugmentConfig, seed: int) -> Box | None:
    """The part of an image to take; None where nothing is cropped.

    Area and aspect are drawn as RandomResizedCrop does, the aspect relative to the image's own and from what fits into
    it, so that none has to be drawn again.
    """
    if not config.crops:
        return None
    drawn = {name: float(values[0]) for name, values in draw([seed]).items()}
    area = config.crop[0] + (config.crop[1] - config.crop[0]) * drawn["crop_area"]
    widest = math.log(min(config.aspect, 1 / area))
    aspect = math.exp((2 * drawn["crop_aspect"] - 1) * widest)
    width, height = min(math.sqrt(area * aspect), 1.0), min(math.sqrt(area / aspect), 1.0)
    left, top = drawn["crop_x"] * (1 - width), drawn["crop_y"] * (1 - height)
    return left, top, left + width, top + height


def augment(images: Tensor, config: AugmentConfig, seeds: Sequence[int]) -> Tensor:
    """Changed copies of uint8 images [B, C, H, W]: local contrast, mirror, affine, contrast and brightness.

    Cropping comes before, with `crop_box`, where the image still has all its pixels.

    Args:
        images: on any device.
        seeds: one for each image.
    """
    assert len(images) == len(seeds)
    changes = config.flip or config.clahe or config.moves or config.contrast or config.brightness
    if not changes or not len(images):
        return images
    drawn = {name: torch.from_numpy(values).to(images.device) for name, values in draw(seeds).items()}
    if config.clahe:
        chosen = drawn["clahe"] < config.clahe
        images = images.clone()
        images[chosen] = clahe(images[chosen])
    if config.flip:
        mirrored = drawn["flip"] < config.flip
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    if not (config.moves or config.contrast or config.brightness):
        return images
    size = CHUNK if images.device.type == "cpu" else len(images)
    numbers = {name: 2 * values - 1 for name, values in drawn.items()}
    chunks = [slice(start, start + size) for start in range(0, len(images), size)]
    return torch.cat([_in_float(images[c], config, {name: v[c] for name, v in numbers.items()}) for c in chunks])


def _in_float(images: Tensor, config: AugmentConfig, drawn: dict[str, Tensor]) -> Tensor:
    """Affine, contrast and brightness of a few images, by numbers drawn between -1 and 1."""
    pixels = images.float()
    if config.moves:
        pixels = F.grid_sample(pixels, _grid(config, drawn, pixels), padding_mode="zeros", align_corners=False)
    if config.contrast:
        mean = pixels.mean((1, 2, 3), keepdim=True)
        pixels = mean + (pixels - mean) * (1 + config.contrast * drawn["contrast"]).float()[:, None, None, None]
    if config.brightness:
        pixels = pixels + (255 * config.brightness * drawn["brightness"]).float()[:, None, None, None]
    return pixels.round_().clamp_(0, 255).to(torch.uint8)


def _grid(config: AugmentConfig, drawn: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """Where each pixel of the result is taken from, [B, H, W, 2] as grid_sample wants it.

    Rows and columns are spread apart: `affine_grid` multiplies matrices for it, four times as slow as the sampling.
    """
    angle = drawn["angle"] * math.radians(config.degrees)
    low, high = config.scale
    zoom = (low + high) / 2 + drawn["zoom"] * (high - low) / 2
    # In double precision, so that one row and many give the same float32.
    cos, sin = (torch.cos(angle) / zoom).float(), (torch.sin(angle) / zoom).float()
    shift_x, shift_y = ((2 * config.translate * drawn[name]).float() for name in ("shift_x", "shift_y"))
    height, width = pixels.shape[-2:]
    y, x = (
        ((torch.arange(side, device=pixels.device, dtype=torch.float32) * 2 + 1) / side - 1) for side in (height, width)
    )
    grid = pixels.new_empty((len(pixels), height, width, 2))
    column, row = (slice(None), None, slice(None)), (slice(None), slice(None), None)
    torch.add((cos[:, None] * x)[column], (shift_x[:, None] - sin[:, None] * y)[row], out=grid[..., 0])
    torch.add((sin[:, None] * x)[column], (shift_y[:, None] + cos[:, None] * y)[row], out=grid[..., 1])
    return grid
