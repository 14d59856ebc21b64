from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medclip_lab.data.augment import DRAWS, AugmentConfig, augment, crop_box, draw

EVERYTHING = AugmentConfig(
    flip=0.5, degrees=15, translate=0.1, scale=(0.8, 1.2), brightness=0.1, contrast=0.2, clahe=0.5
)
SEEDS = [3, 2**63 - 1, *range(100, 114)]


def disc() -> Tensor:
    """A bright square in the image's upper left."""
    images = torch.full((16, 1, 32, 32), 20, dtype=torch.uint8)
    images[:, :, 6:12, 6:12] = 240
    return images


def test_draws_are_uniform_and_independent() -> None:
    """Also of consecutive seeds and of seeds that differ in high bits only, which a poor generator would relate."""
    for step in (1, 2**20, 2**40):
        drawn = np.stack(list(draw([7 + step * number for number in range(4000)]).values()))
        assert drawn.shape == (len(DRAWS), 4000)
        counts = np.stack([np.histogram(row, bins=20, range=(0, 1))[0] for row in drawn])
        chi_squared = ((counts - 200) ** 2 / 200).sum(1)
        assert (chi_squared < 50).all(), chi_squared  # 19 degrees of freedom: one row in ten thousand is above
        limit = 5 / np.sqrt(4000)
        correlations = np.corrcoef(drawn) - np.eye(len(DRAWS))
        assert np.abs(correlations).max() < limit, "one draw tells of another"
        neighbours = [np.corrcoef(row[:-1], row[1:])[0, 1] for row in drawn]
        assert np.abs(neighbours).max() < limit, "one image tells of the next"


def test_a_seed_decides() -> None:
    first = augment(disc(), EVERYTHING, SEEDS)
    assert torch.equal(first, augment(disc(), EVERYTHING, SEEDS))
    assert not torch.equal(first, augment(disc(), EVERYTHING, [seed + 1 for seed in SEEDS]))
    assert len({row.numpy().tobytes() for row in first}) == len(SEEDS)
    assert first.dtype == torch.uint8


@settings(deadline=None, max_examples=25)
@given(rows=st.lists(st.integers(0, 15), min_size=1, max_size=20), channels=st.sampled_from([1, 3]))
def test_a_row_does_not_depend_on_its_batch(rows: list[int], channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (16, channels, 24, 20), generator=generator, dtype=torch.uint8)
    whole = augment(images, EVERYTHING, SEEDS)
    assert torch.equal(augment(images[rows], EVERYTHING, [SEEDS[row] for row in rows]), whole[rows])


def test_one_change_alters_no_other() -> None:
    moved = augment(disc(), AugmentConfig(degrees=15), SEEDS)
    both = augment(disc(), AugmentConfig(degrees=15, brightness=0.1), SEEDS)
    change = (both.float() - moved.float()).flatten(1)
    assert (change.max(1).values - change.min(1).values <= 27).all(), "the same rotation under another brightness"
    assert len(change.mean(1).round().unique()) > 8


def test_nothing_asked_changes_nothing() -> None:
    images = disc()
    assert augment(images, AugmentConfig(), SEEDS) is images
    before = images.clone()
    augment(images, EVERYTHING, SEEDS)
    assert torch.equal(images, before), "the images given are left alone"


def test_left_stays_left() -> None:
    """Reports name sides: nothing may end on the other side."""
    changed = augment(disc(), AugmentConfig(degrees=10, translate=0.05, scale=(0.9, 1.1)), SEEDS).float()
    bright = (changed > 128).float()
    assert (bright[..., :16].sum((1, 2, 3)) > 20).all()
    assert (bright[..., 16:].sum((1, 2, 3)) == 0).all()
    assert AugmentConfig().flip == 0


@pytest.mark.parametrize(
    ("config", "corner"),
    [
        (AugmentConfig(scale=(2.0, 2.0)), (slice(-4, 8), slice(-4, 8))),
        (AugmentConfig(flip=1.0), (slice(6, 12), slice(20, 26))),
    ],
)
def test_geometry_is_what_it_says(config: AugmentConfig, corner: tuple[slice, slice]) -> None:
    expected = torch.zeros(32, 32, dtype=torch.bool)
    expected[max(corner[0].start, 0) : corner[0].stop, max(corner[1].start, 0) : corner[1].stop] = True
    changed = augment(disc(), config, SEEDS)[:, 0] > 128
    assert (changed == expected).all(0).float().mean() > 0.98


def test_rotation_and_shift_against_affine_grid() -> None:
    """Another way to the same picture: torch's own affine grid."""
    config = AugmentConfig(degrees=30, translate=0.1, scale=(0.7, 1.4))
    images = torch.nn.functional.avg_pool2d(torch.rand(16, 1, 43, 53, generator=torch.Generator().manual_seed(0)), 5, 1)
    images = (images * 255).round().to(torch.uint8)
    drawn = {name: torch.from_numpy(2 * values - 1).float() for name, values in draw(SEEDS).items()}
    angle, zoom = torch.deg2rad(30 * drawn["angle"]), 1.05 + 0.35 * drawn["zoom"]
    rows = [
        torch.stack([angle.cos() / zoom, -angle.sin() / zoom, 0.2 * drawn["shift_x"]], 1),
        torch.stack([angle.sin() / zoom, angle.cos() / zoom, 0.2 * drawn["shift_y"]], 1),
    ]
    grid = torch.nn.functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    expected = torch.nn.functional.grid_sample(images.float(), grid, align_corners=False)
    assert (augment(images, config, SEEDS).float() - expected).abs().max() <= 0.51


def test_contrast_and_brightness() -> None:
    brighter = augment(disc(), AugmentConfig(brightness=0.05), SEEDS).float() - disc().float()
    shifts = brighter.flatten(1).min(1).values
    assert (brighter.flatten(1) == shifts[:, None]).all(), "one shift for each image"
    assert -13 <= shifts.min() < -3
    assert 3 < shifts.max() <= 13
    contrasts = augment(disc(), AugmentConfig(contrast=0.5), SEEDS).float()
    assert (contrasts.mean((1, 2, 3)) - disc().float().mean()).abs().max() < 6, "the mean stays, up to clipping"
    assert contrasts.std((1, 2, 3)).unique().numel() > 10


@settings(deadline=None)
@given(low=st.floats(0.05, 1.0), high=st.floats(0.05, 1.0), aspect=st.floats(1.0, 3.0), seed=st.integers(0, 2**64 - 1))
def test_boxes_fit(low: float, high: float, aspect: float, seed: int) -> None:
    low, high = sorted((low, high))
    box = crop_box(AugmentConfig(crop=(low, high), aspect=aspect), seed)
    if box is None:
        assert (low, high, aspect) == (1.0, 1.0, 1.0)
        return
    left, top, right, bottom = box
    assert 0 <= left < right <= 1 + 1e-9
    assert 0 <= top < bottom <= 1 + 1e-9
    width, height = right - left, bottom - top
    assert low * (1 - 1e-6) <= width * height <= high * (1 + 1e-6)
    assert max(width / height, height / width) <= aspect * (1 + 1e-6)


def test_boxes_cover_the_image() -> None:
    boxes = np.array([crop_box(AugmentConfig(crop=(0.5, 0.9)), seed) for seed in range(2000)])
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert areas.mean() == pytest.approx(0.7, abs=0.02)
    np.testing.assert_allclose(boxes[:, :2].mean(0), 1 - boxes[:, 2:].mean(0), atol=0.01)


@pytest.mark.parametrize(
    ("settings_", "said"),
    [
        ({"crop": (0.9, 0.5)}, "two growing shares"),
        ({"crop": (0.0, 1.0)}, "two growing shares"),
        ({"aspect": 0.5}, "at least 1"),
        ({"scale": (0.0, 1.0)}, "growing positive"),
    ],
)
def test_config_refuses(settings_: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AugmentConfig(**settings_)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_does_the_same() -> None:
    images = torch.randint(0, 256, (16, 1, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    there = augment(images.cuda(), EVERYTHING, SEEDS).cpu().float()
    assert (there - augment(images, EVERYTHING, SEEDS).float()).abs().max() <= 1
