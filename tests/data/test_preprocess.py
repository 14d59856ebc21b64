import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from medclip_lab.data.preprocess import AugmentConfig, Preprocess, PreprocessConfig, augment, stack


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(50, 70), (31, 20), (32, 32), (64, 200)])
def test_pixels_are_those_of_open_clip(mode: str, interpolation: str, size: tuple[int, int]) -> None:
    image = Image.fromarray((np.random.default_rng(0).random(size) * 255).astype(np.uint8))
    config = PreprocessConfig(size=32, resize_mode=mode, interpolation=interpolation)  # type: ignore[arg-type]
    ours = stack([Preprocess(config)(image)])
    assert ours.shape == (1, 1, 32, 32)
    ours = (ours.expand(1, 3, 32, 32) - 0.5) / 0.25
    theirs = image_transform_v2(PreprocessCfg(**config.open_clip()), is_train=False)(image)
    torch.testing.assert_close(ours[0], theirs, rtol=0, atol=1e-6)


def test_round_trip_through_open_clip() -> None:
    config = PreprocessConfig(size=48, resize_mode="longest", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert PreprocessConfig.from_open_clip(config.open_clip()) == config
    clip = open_clip.transform.PreprocessCfg()
    assert PreprocessConfig.from_open_clip(vars(clip)).resize_mode == "shortest"


def test_grey_beside_colour() -> None:
    grey, colour = torch.zeros(1, 4, 4, dtype=torch.uint8), torch.ones(3, 4, 4, dtype=torch.uint8)
    assert stack([grey, grey]).shape == (2, 1, 4, 4)
    assert stack([grey, colour]).shape == (2, 3, 4, 4)


def disc() -> torch.Tensor:
    """A bright square in the image's upper left."""
    images = torch.zeros(16, 1, 32, 32)
    images[:, :, 6:12, 6:12] = 1
    return images


def test_augment_is_drawn_for_each_image_and_repeatable() -> None:
    config = AugmentConfig(degrees=15, translate=0.1, scale=(0.8, 1.2), brightness=0.1, contrast=0.2)
    first = augment(disc(), config, torch.Generator().manual_seed(0))
    assert torch.equal(first, augment(disc(), config, torch.Generator().manual_seed(0)))
    assert not torch.equal(first, augment(disc(), config, torch.Generator().manual_seed(1)))
    assert not torch.equal(first[0], first[1])
    assert 0 <= first.min() <= first.max() <= 1


def test_no_augmentation_changes_nothing() -> None:
    assert torch.equal(augment(disc(), AugmentConfig(), torch.Generator()), disc())


def test_left_stays_left() -> None:
    """Reports name sides: nothing may end on the other side."""
    config = AugmentConfig(degrees=10, translate=0.05, scale=(0.9, 1.1))
    images = augment(disc(), config, torch.Generator().manual_seed(0))
    assert (images[..., :16].sum((1, 2, 3)) > 10 * images[..., 16:].sum((1, 2, 3))).all()


def test_scale_magnifies() -> None:
    larger = augment(disc(), AugmentConfig(scale=(1.3, 1.3)), torch.Generator())
    assert larger.sum() > 1.4 * disc().sum()
