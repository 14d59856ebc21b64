"""From decoded images to the tower's input: window and geometry, the same for training and inference."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import torch
from open_clip.transform import CenterCropOrPad
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize
from torchvision.transforms import functional as F
from torchvision.transforms.functional import pil_to_tensor

from medclip_lab.data.decoded import Decoded, Window

Box = tuple[float, float, float, float]
"""Left, top, right and bottom as shares of width and height."""


@dataclass(frozen=True)
class PreprocessConfig:
    """What is done to every image, in the words of open_clip's `preprocess_cfg`; windowing is ours."""

    size: int = 224
    """Side of the square the tower sees, in pixels."""
    resize_mode: Literal["shortest", "longest", "squash"] = "longest"
    """"longest" pads and keeps everything; "shortest" crops; "squash" changes the aspect."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    fill_color: int = 0
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.25, 0.25, 0.25)
    window: Window = "file"
    """How more than 8 bits become 8: "file" applies a DICOM's own VOI LUT or window and stretches the result between
    the percentiles; "percentiles" stretches the values themselves; [center, width] is in the file's units, Hounsfield
    for CT."""
    percentiles: tuple[float, float] = (0.0, 100.0)
    """Of an image's values: what becomes black and what white."""

    def __post_init__(self) -> None:
        if not isinstance(self.window, str) and self.window[1] <= 0:
            raise ValueError(f"preprocess.window: [center, width] with a positive width, got {list(self.window)}")
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            raise ValueError(f"preprocess.percentiles: two growing numbers from 0 to 100, got {[low, high]}")

    def open_clip(self) -> dict[str, Any]:
        """What open_clip knows of it, as it stands in `open_clip_config.json`."""
        values = {name: value for name, value in asdict(self).items() if name not in ("window", "percentiles")}
        return values | {"size": [self.size, self.size], "mode": "RGB", "mean": list(self.mean), "std": list(self.std)}

    def record(self) -> dict[str, Any]:
        """All of it, as it stands in `preprocess.json`."""
        window = self.window if isinstance(self.window, str) else list(self.window)
        return self.open_clip() | {"window": window, "percentiles": list(self.percentiles)}

    @classmethod
    def from_record(cls, values: dict[str, Any]) -> Self:
        """Read what `record` or `open_clip` gave, or any `preprocess_cfg` of open_clip."""
        size = values["size"]
        window: Any = values.get("window", "file")
        return cls(
            size=size if isinstance(size, int) else int(size[0]),
            resize_mode=values.get("resize_mode") or "shortest",
            interpolation=values.get("interpolation") or "bicubic",
            fill_color=int(values.get("fill_color") or 0),
            mean=tuple(values["mean"]),
            std=tuple(values["std"]),
            window=tuple(window) if isinstance(window, list) else window,
            percentiles=tuple(values.get("percentiles", (0.0, 100.0))),
        )


class Preprocess:
    """Windows an image and resizes it to the square the tower expects: 8 bits, and greyscale stays one channel."""

    def __init__(self, config: PreprocessConfig) -> None:
        self.config = config
        mode = InterpolationMode(config.interpolation)
        # The same operators in the same order as open_clip.transform.image_transform, so that plain open_clip sees
        # the same pixels. Pillow resizes channels apart, hence one channel now equals three channels later.
        steps: dict[str, list[Any]] = {
            "shortest": [Resize(config.size, mode), CenterCrop(config.size)],
            "longest": [
                _Longest(config.size, mode),
                CenterCropOrPad(config.size, fill=config.fill_color),
            ],
            "squash": [Resize((config.size, config.size), mode)],
        }
        self._geometry = Compose(steps[config.resize_mode])

    def __call__(self, image: Decoded | Image.Image, box: Box | None = None) -> Tensor:
        """uint8 [C, size, size], C being 1 for greyscale and 3 for colour.

        Args:
            box: the part of the image to take; None takes the whole.

        Raises:
            DecodeError: values that are not finite.
        """
        picture = self.window(image)
        if box is not None:
            picture = picture.crop(_pixels(box, *picture.size))
        pixels: Tensor = pil_to_tensor(self._geometry(picture))
        return pixels

    def resize(self, pixels: Tensor, box: Box | None = None) -> Tensor:
        """uint8 [C, size, size] from pixels [C, H, W] with 8 bits, on their device.

        Pixels differ by a level or two from those of `__call__`: Pillow rounds between its two passes.
        """
        if box is not None:
            left, top, right, bottom = _pixels(box, pixels.shape[-1], pixels.shape[-2])
            pixels = pixels[..., top:bottom, left:right]
        resized: Tensor = self._geometry(pixels)
        return resized

    def at_least(self, box: Box | None = None) -> int:
        """The least side, in pixels, of an image that this need not magnify: for `decode_image`."""
        share = 1.0 if box is None else min(box[2] - box[0], box[3] - box[1])
        return math.ceil(self.config.size / share)

    def window(self, image: Decoded | Image.Image) -> Image.Image:
        """The image in its own size with 8 bits, mode "L" or "RGB".

        Raises:
            DecodeError: values that are not finite.
        """
        decoded = image if isinstance(image, Decoded) else Decoded(image)
        return decoded.eight_bits(self.config.window, self.config.percentiles)


class _Longest:
    """Resizes the longer side, as open_clip's ResizeKeepRatio does, which knows no tensors."""

    def __init__(self, size: int, mode: InterpolationMode) -> None:
        self.size, self.mode = size, mode

    def __call__(self, image: Any) -> Any:
        _, height, width = F.get_dimensions(image)
        ratio = max(height, width) / self.size
        return F.resize(image, [round(height / ratio), round(width / ratio)], self.mode)


def _pixels(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    left, top = min(round(box[0] * width), width - 1), min(round(box[1] * height), height - 1)
    return left, top, max(round(box[2] * width), left + 1), max(round(box[3] * height), top + 1)


def stack(images: list[Tensor]) -> Tensor:
    """uint8 [B, C, H, W]; greyscale is spread over three channels only beside colour."""
    channels = max(len(image) for image in images)
    return torch.stack([image.expand(channels, -1, -1) for image in images])


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """float32 [B, C, H, W] of uint8 or float in [0, 1] pixels [B, 1 or C, H, W]; mean and std are [C, 1, 1].

    In one pass over the result: greyscale is spread over the channels by it.
    """
    scale = 1 / (std * (255 if images.dtype == torch.uint8 else 1))
    return torch.addcmul(-mean / std, images.float(), scale)
