"""Corruptions: worse by degrees, the same for a sample in any company, and mCE by its definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from medclip_lab.data.decode import decode_image
from medclip_lab.data.phantom.study import make_study
from medclip_lab.evaluation.corruptions import KINDS, SEVERITIES, corrupt, corruption, robustness


def film(size: int = 128, patient: int = 0) -> NDArray[np.uint8]:
    suffix, data = make_study(0, patient, 0, size)["images"][0]
    return np.asarray(decode_image(data, suffix).image)


def distance(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_each_severity_is_worse_than_the_one_before(kind: str) -> None:
    image = film()
    costs = [distance(corrupt(image, kind, severity), image) for severity in SEVERITIES]
    assert costs[0] > 0.3
    assert costs == sorted(costs)
    assert len(set(costs)) == len(costs)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)),
    severity=st.sampled_from(SEVERITIES),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    channels=st.sampled_from([0, 3]),
    deep=st.booleans(),
    seed=st.integers(0, 3),
)
def test_shape_and_depth_stay_and_nothing_else_decides(
    kind: str, severity: int, height: int, width: int, channels: int, deep: bool, seed: int
) -> None:
    shape = (height, width, channels) if channels else (height, width)
    pixels = np.random.default_rng(0).integers(0, 65536 if deep else 256, shape, np.uint16 if deep else np.uint8)
    before = pixels.copy()
    first, second = corrupt(pixels, kind, severity, seed), corrupt(pixels, kind, severity, seed)
    assert first.shape == shape
    assert first.dtype == pixels.dtype
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(pixels, before)


def test_noise_belongs_to_the_image_and_the_seed() -> None:
    flat, other = np.full((32, 32), 100, np.uint8), np.full((32, 32), 101, np.uint8)
    noise = corrupt(flat, "gaussian_noise", 3, seed=0).astype(int) - 100
    assert not np.array_equal(noise, corrupt(other, "gaussian_noise", 3, seed=0).astype(int) - 101)
    assert not np.array_equal(noise, corrupt(flat, "gaussian_noise", 3, seed=1).astype(int) - 100)


def test_depth_makes_no_difference() -> None:
    """The same picture in 16 bits is worse by as much as in 8, noise aside, which is drawn for each."""
    eight = film(64)
    sixteen = eight.astype(np.uint16) * 257
    for kind in ("contrast", "jpeg", "pixelate"):
        worse = corrupt(sixteen, kind, 3).astype(float) / 257
        assert np.abs(worse - corrupt(eight, kind, 3)).max() <= 1, kind


def test_a_severity_means_the_same_for_a_large_film() -> None:
    """Seen at the size of a tower, the loss of a film of four times the side is about that of the small one."""
    small = film(128)
    large = np.asarray(Image.fromarray(small).resize((896, 896), Image.Resampling.BICUBIC))

    def seen(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return np.asarray(Image.fromarray(pixels).resize((96, 96), Image.Resampling.BICUBIC))

    small = np.asarray(Image.fromarray(large).resize((224, 224), Image.Resampling.BICUBIC))
    for kind in ("gaussian_noise", "speckle", "jpeg", "pixelate", "contrast"):
        costs = [distance(seen(corrupt(image, kind, 4)), seen(image)) for image in (small, large)]
        assert 0.7 < costs[1] / costs[0] < 1.5, (kind, costs)


def test_an_image_of_pillow_keeps_its_mode() -> None:
    for mode in ("L", "RGB"):
        image = Image.fromarray(film(48)).convert(mode)
        assert corruption("motion_blur", 2)(image).mode == mode


def test_unknown_kinds_and_depths_are_refused() -> None:
    with pytest.raises(ValueError, match="'fog' at severity 1: one of gaussian_noise"):
        corrupt(np.zeros((4, 4), np.uint8), "fog", 1)
    with pytest.raises(ValueError, match="severity 6"):
        corrupt(np.zeros((4, 4), np.uint8), "jpeg", 6)
    with pytest.raises(ValueError, match="not float64"):
        corrupt(np.zeros((4, 4)), "jpeg", 1)  # type: ignore[arg-type]


def test_mean_corruption_error_by_hand() -> None:
    baseline = robustness(0.9, {"jpeg": [0.1, 0.2], "contrast": [0.2, 0.4]}, None)
    assert baseline["mce"] is None
    assert baseline["reasons"] == ["no baseline was named, hence no mCE"]
    result = robustness(0.8, {"jpeg": [0.3, 0.3], "contrast": [0.3, 0.3]}, baseline)
    assert result["ce"] == {"jpeg": pytest.approx(2.0), "contrast": pytest.approx(1.0)}
    assert result["mce"] == pytest.approx(1.5)
    assert result["relative_drop"] == {
        "mean": pytest.approx(1 / 3),
        "jpeg": pytest.approx(1 / 3),
        "contrast": pytest.approx(1 / 3),
    }
    assert robustness(0.9, baseline["errors"], baseline)["mce"] == pytest.approx(1.0)
    chance = robustness(0.5, {"jpeg": [0.5]}, None)
    assert chance["relative_drop"] == {"mean": None, "jpeg": None}
    with pytest.raises(ValueError, match="other corruptions"):
        robustness(0.8, {"jpeg": [0.3]}, baseline)
