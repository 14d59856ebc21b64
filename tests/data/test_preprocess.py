import json
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from medclip_lab.data.decoded import Window
from medclip_lab.data.preprocess import Preprocess, PreprocessConfig, normalise, stack


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(50, 70), (31, 20), (32, 32), (64, 200)])
def test_pixels_are_those_of_open_clip(mode: str, interpolation: str, size: tuple[int, int]) -> None:
    image = Image.fromarray((np.random.default_rng(0).random(size) * 255).astype(np.uint8))
    config = PreprocessConfig(size=32, resize_mode=mode, interpolation=interpolation)  # type: ignore[arg-type]
    ours = stack([Preprocess(config)(image)])
    assert ours.shape == (1, 1, 32, 32)
    assert ours.dtype == torch.uint8
    ours = normalise(ours, torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25))
    theirs = image_transform_v2(PreprocessCfg(**config.open_clip()), is_train=False)(image)
    torch.testing.assert_close(ours[0], theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("window", ["file", "percentiles", (40.0, 400.0)])
def test_round_trip(window: Window) -> None:
    config = PreprocessConfig(48, "longest", mean=(0.1, 0.2, 0.3), window=window, percentiles=(1.0, 99.5))
    assert PreprocessConfig.from_record(json.loads(json.dumps(config.record()))) == config
    plain = PreprocessConfig(size=48, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert PreprocessConfig.from_record(plain.open_clip()) == plain
    assert PreprocessConfig.from_record(vars(PreprocessCfg())).resize_mode == "shortest"


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"window": (40.0, 0.0)}, "positive width"), ({"percentiles": (50.0, 50.0)}, "two growing numbers")],
)
def test_config_refuses(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PreprocessConfig(**settings)


def test_window_is_a_setting() -> None:
    deep = Image.fromarray(np.arange(0, 4096, 4, dtype=np.uint16).reshape(32, 32))

    def values(**settings: Any) -> "np.ndarray[Any, Any]":
        return np.asarray(Preprocess(PreprocessConfig(size=32, resize_mode="squash", **settings)).window(deep)).ravel()

    assert (values()[[0, -1]] == (0, 255)).all()
    fixed = values(window=(2000.0, 1000.0))
    assert (fixed[: 1500 // 4] == 0).all()
    assert (fixed[2500 // 4 + 1 :] == 255).all()
    assert abs(int(fixed[500]) - 128) <= 1
    cut = values(percentiles=(10.0, 90.0))
    assert 0.09 < (cut == 0).mean() < 0.11
    assert 0.09 < (cut == 255).mean() < 0.11


def test_box_takes_its_part() -> None:
    pixels = np.zeros((40, 80), np.uint8)
    pixels[10:20, 20:40] = 200
    preprocess = Preprocess(PreprocessConfig(size=16, resize_mode="squash"))
    assert (preprocess(Image.fromarray(pixels), (0.25, 0.25, 0.5, 0.5)) == 200).all()
    assert preprocess(Image.fromarray(pixels), (0.999, 0.999, 1.0, 1.0)).shape == (1, 16, 16)
    assert preprocess.at_least() == 16
    assert preprocess.at_least((0.1, 0.0, 0.6, 1.0)) == 32


def test_grey_beside_colour() -> None:
    grey, colour = torch.zeros(1, 4, 4, dtype=torch.uint8), torch.ones(3, 4, 4, dtype=torch.uint8)
    assert stack([grey, grey]).shape == (2, 1, 4, 4)
    assert stack([grey, colour]).shape == (2, 3, 4, 4)
