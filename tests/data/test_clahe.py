from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from medclip_lab.data.clahe import clahe


def film(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """A smooth picture with grain, so that tiles differ."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    smooth = 90 + 50 * np.sin(y / 17) + 40 * np.cos(x / 23 + seed)
    return np.clip(smooth + rng.normal(0, 12, (height, width)), 0, 255).astype(np.uint8)


def slow_clahe(image: NDArray[np.uint8], clip_limit: float, tiles: int) -> NDArray[Any]:
    """The same from the definition, pixel by pixel."""
    height, width = image.shape
    high, wide = -(-height // tiles), -(-width // tiles)
    padded = np.pad(image, ((0, high * tiles - height), (0, wide * tiles - width)), mode="reflect")
    tables = np.zeros((tiles, tiles, 256))
    for row in range(tiles):
        for column in range(tiles):
            tile = padded[row * high : (row + 1) * high, column * wide : (column + 1) * wide]
            counts = [int((tile == level).sum()) for level in range(256)]
            limit = max(int(clip_limit * tile.size / 256), 1)
            excess = sum(max(count - limit, 0) for count in counts)
            counts = [min(count, limit) + excess // 256 for count in counts]
            left, level = excess % 256, 0
            step = max(256 // left, 1) if left else 1
            while left and level < 256:
                counts[level] += 1
                level, left = level + step, left - 1
            tables[row, column] = np.clip(np.rint(np.cumsum(counts) * np.float32(255 / tile.size)), 0, 255)
    result = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            row, column = y / high - 0.5, x / wide - 0.5
            r, c = int(np.floor(row)), int(np.floor(column))
            rows, columns = (np.clip((at, at + 1), 0, tiles - 1) for at in (r, c))
            four = tables[np.ix_(rows, columns)][..., image[y, x]]
            result[y, x] = [1 - (row - r), row - r] @ four @ [1 - (column - c), column - c]
    return result


@pytest.mark.parametrize(
    ("size", "clip_limit", "tiles"), [((32, 48), 2.0, 4), ((50, 35), 1.5, 4), ((40, 40), 40, 8), ((64, 60), 1.1, 2)]
)
def test_against_the_definition(size: tuple[int, int], clip_limit: float, tiles: int) -> None:
    image = film(*size)
    ours = clahe(torch.from_numpy(image)[None, None], clip_limit, tiles)[0, 0].numpy()
    assert np.abs(ours - slow_clahe(image, clip_limit, tiles)).max() <= 0.51


@pytest.mark.parametrize("size", [(224, 224), (100, 131)])
def test_against_opencv(size: tuple[int, int]) -> None:
    cv2 = pytest.importorskip("cv2")
    image = film(*size)
    ours = clahe(torch.from_numpy(image)[None, None])[0, 0].numpy().astype(int)
    theirs = cv2.createCLAHE(clipLimit=2.0, tileGridSize=(8, 8)).apply(image).astype(int)
    assert np.abs(ours - theirs).max() <= 1
    assert (ours != theirs).mean() < 0.01, "ties of rounding"


def test_every_plane_for_itself() -> None:
    images = torch.stack([torch.from_numpy(film(48, 64, seed)) for seed in range(6)]).view(2, 3, 48, 64)
    whole = clahe(images)
    for row in range(2):
        for channel in range(3):
            alone = clahe(images[row : row + 1, channel : channel + 1])
            assert torch.equal(whole[row, channel], alone[0, 0])


def test_local_contrast_rises_and_order_stays() -> None:
    image = torch.from_numpy(film(64, 64) // 4 + 60)[None, None]
    assert clahe(image).float().std() > 1.5 * image.float().std()
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256).expand(1, 1, 64, 256)
    assert (clahe(ramp, tiles=1)[0, 0, 0].int().diff() >= 0).all()
