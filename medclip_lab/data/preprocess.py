"""From decoded images to the tower's input: geometry once for training and inference, then augmentation in batches."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from open_clip.transform import CenterCropOrPad, ResizeKeepRatio
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize
from torchvision.transforms.functional import pil_to_tensor


@dataclass(frozen=True)
class PreprocessConfig:
    """What is done to every image, in the words of open_clip's `preprocess_cfg`."""

    size: int = 224
    """Side of the square the tower sees, in pixels."""
    resize_mode: Literal["shortest", "longest", "squash"] = "longest"
    """"longest" pads and keeps everything; "shortest" crops; "squash" changes the aspect."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    fill_color: int = 0
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.25, 0.25, 0.25)

    def open_clip(self) -> dict[str, Any]:
        """The same as open_clip writes it into `open_clip_config.json`."""
        return {**asdict(self), "size": [self.size, self.size], "mode": "RGB", "mean": list(self.mean)} | {
            "std": list(self.std)
        }

    @classmethod
    def from_open_clip(cls, values: dict[str, Any]) -> Self:
        """Read an open_clip `preprocess_cfg`."""
        size = values["size"]
        return cls(
            size=size if isinstance(size, int) else int(size[0]),
            resize_mode=values.get("resize_mode") or "shortest",
            interpolation=values.get("interpolation") or "bicubic",
            fill_color=int(values.get("fill_color") or 0),
            mean=tuple(values["mean"]),
            std=tuple(values["std"]),
        )


class Preprocess:
    """Resizes an image to the square the tower expects; pixels stay 8 bits and greyscale stays one channel."""

    def __init__(self, config: PreprocessConfig) -> None:
        self.config = config
        mode = InterpolationMode(config.interpolation)
        # The same operators in the same order as open_clip.transform.image_transform, so that plain open_clip sees
        # the same pixels. Pillow resizes channels apart, hence one channel now equals three channels later.
        steps: dict[str, list[Any]] = {
            "shortest": [Resize(config.size, mode), CenterCrop(config.size)],
            "longest": [
                ResizeKeepRatio(config.size, interpolation=mode, longest=1),
                CenterCropOrPad(config.size, fill=config.fill_color),
            ],
            "squash": [Resize((config.size, config.size), mode)],
        }
        self._geometry = Compose(steps[config.resize_mode])

    def __call__(self, image: Image.Image) -> Tensor:
        """uint8 [C, size, size], C being 1 for mode "L" and 3 for "RGB"."""
        pixels: Tensor = pil_to_tensor(self._geometry(image))
        return pixels


def stack(images: list[Tensor]) -> Tensor:
    """float32 [B, C, H, W] in [0, 1] of uint8 images; greyscale is spread over three channels only beside colour."""
    channels = max(len(image) for image in images)
    return torch.stack([image.expand(channels, -1, -1) for image in images]).float() / 255


@dataclass
class AugmentConfig:
    """Random changes of training images, drawn for each image."""

    flip: float = 0.0
    """Share of images that are mirrored; only where texts and labels tell no side."""

    degrees: float = 0.0
    """Rotation, up to this many degrees either way."""
    translate: float = 0.0
    """Shift, up to this share of the side either way."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Magnification, drawn between these."""
    brightness: float = 0.0
    """Added to [0, 1] pixels, up to this much either way."""
    contrast: float = 0.0
    """Contrast is multiplied by 1 plus up to this much either way."""


def augment(images: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Random affine and exposure changes of a batch, float [B, C, H, W] in [0, 1], another for each image."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(images), generator=generator)

    if config.flip:
        mirrored = torch.rand(len(images), generator=generator) < config.flip
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    if config.degrees or config.translate or tuple(config.scale) != (1.0, 1.0):
        angle = torch.deg2rad(uniform(-config.degrees, config.degrees))
        zoom = uniform(*config.scale)
        cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
        shift = 2 * config.translate
        affine = torch.stack(
            [
                torch.stack([cos, -sin, uniform(-shift, shift)], 1),
                torch.stack([sin, cos, uniform(-shift, shift)], 1),
            ],
            1,
        )
        grid = F.affine_grid(affine, list(images.shape), align_corners=False)
        images = F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)
    if config.contrast:
        mean = images.mean((1, 2, 3), keepdim=True)
        images = mean + (images - mean) * uniform(1 - config.contrast, 1 + config.contrast)[:, None, None, None]
    if config.brightness:
        images = images + uniform(-config.brightness, config.brightness)[:, None, None, None]
    return images.clamp(0, 1)
