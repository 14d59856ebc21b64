"""Our bundles inside LAION's CLIP_benchmark, as a model type of its own.

CLIP_benchmark keeps a table from model type to loader, `clip_benchmark.models.TYPE2FUNC`; a loader takes `model_name`,
`pretrained`, `cache_dir` and `device`, and returns (model, transform, tokenizer) with `model.encode_image(batch)`,
`model.encode_text(tokens)`, `transform(PIL image)` and `tokenizer(texts)` with `.to(device)`. This file adds one line
to that table and passes the command line on::

    python -m medclip_lab.inference.clip_benchmark eval --model_type medclip_lab --model BUNDLE --pretrained "" ...
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from medclip_lab.data.preprocess import Preprocess
from medclip_lab.errors import UserError
from medclip_lab.inference.foreign import open_encoder

MODEL_TYPE = "medclip_lab"


class BenchmarkModel(nn.Module):
    """The towers as CLIP_benchmark calls them; it normalises the features itself, which leaves unit norm as it is."""

    def __init__(self, towers: Any) -> None:
        super().__init__()
        self.towers = towers

    def encode_image(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.towers.encode_image(pixels)
        return features

    def encode_text(self, ids: Tensor) -> Tensor:
        features: Tensor = self.towers.encode_text(ids)
        return features


class Transform:
    """From a Pillow image to what the image tower reads; it travels to loader processes."""

    def __init__(self, preprocess: Preprocess) -> None:
        self.preprocess = preprocess

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = self.preprocess(image.convert("RGB"))
        return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels  # what the towers take, and no integer


def load_medclip_lab(
    model_name: str,
    pretrained: str = "",
    cache_dir: str | None = None,
    device: str | torch.device = "cpu",
) -> tuple[BenchmarkModel, Callable[[Image.Image], Tensor], Any]:
    """A loader of CLIP_benchmark's kind.

    Args:
        model_name: anything `open_encoder` takes.
        pretrained, cache_dir: part of the interface; a bundle holds its own weights and fetches nothing.

    Raises:
        UserError: no such model, or weights named beside it.
    """
    if pretrained:
        raise UserError(f"pretrained: a bundle holds its own weights, leave {pretrained!r} away")
    del cache_dir
    encoder = open_encoder(model_name, str(device))

    return BenchmarkModel(encoder.model), Transform(encoder.preprocess), encoder.tokenizer


def register(models: Any) -> None:
    """Add our type to the tables of `clip_benchmark.models`."""
    models.TYPE2FUNC[MODEL_TYPE] = load_medclip_lab
    models.MODEL_TYPES = list(models.TYPE2FUNC)


def main() -> None:
    """CLIP_benchmark's command line, with our model type among its own.

    Raises:
        UserError: CLIP_benchmark is not installed.
    """
    try:
        from clip_benchmark import models
    except ImportError:
        raise UserError(
            "CLIP_benchmark is not installed: pip install clip_benchmark, in an environment of its own"
        ) from None
    register(models)
    from clip_benchmark import cli  # after the table has our line: its parser reads the table when it is imported

    cli.MODEL_TYPES = models.MODEL_TYPES
    sys.exit(cli.main())


if __name__ == "__main__":
    main()
