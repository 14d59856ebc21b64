"""Contrast-limited adaptive histogram equalisation (Zuiderveld, "Graphics Gems IV", 1994), for batches, as OpenCV's."""

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 256


def clahe(images: Tensor, clip_limit: float = 2.0, tiles: int = 8) -> Tensor:
    """Equalise uint8 images [B, C, H, W] tile by tile, each channel for itself; uint8 of the same shape and device.

    Args:
        clip_limit: a level's share of a tile counts up to this many times what it would have were all levels equal.
        tiles: along each side.
    """
    batch, channels, height, width = images.shape
    high, wide = -(-height // tiles), -(-width // tiles)
    planes = images.reshape(batch * channels, 1, height, width)
    padding = (0, wide * tiles - width, 0, high * tiles - height)
    padded = F.pad(planes.float(), padding, mode="reflect").long() if any(padding) else planes.long()
    tables = _tables(padded[:, 0], clip_limit, tiles)

    rows, row_share = _neighbours(height, high, tiles, images.device)
    columns, column_share = _neighbours(width, wide, tiles, images.device)
    values = planes[:, 0].long()
    flat = tables.flatten(1)

    def looked_up(row: Tensor, column: Tensor) -> Tensor:
        index = (row[:, None] * tiles + column) * LEVELS + values
        return flat.gather(1, index.flatten(1)).view_as(values)

    upper, lower = (
        looked_up(row, columns[0]) * (1 - column_share) + looked_up(row, columns[1]) * column_share for row in rows
    )
    result = upper * (1 - row_share)[:, None] + lower * row_share[:, None]
    return result.round_().clamp_(0, 255).to(torch.uint8).view_as(images)


def _tables(planes: Tensor, clip_limit: float, tiles: int) -> Tensor:
    """What becomes of each level in each tile, float32 [N, tiles, tiles, LEVELS], of int64 planes [N, H, W]."""
    number, height, width = planes.shape
    high, wide = height // tiles, width // tiles
    cells = planes.view(number, tiles, high, tiles, wide).transpose(2, 3).reshape(number * tiles**2, high * wide)
    counts = torch.zeros(len(cells), LEVELS, dtype=torch.int64, device=planes.device)
    counts.scatter_add_(1, cells, torch.ones_like(cells))
    limit = max(int(clip_limit * high * wide / LEVELS), 1)
    excess = (counts - limit).clamp_(min=0).sum(1, keepdim=True)
    counts = counts.clamp_(max=limit) + excess // LEVELS
    # What does not divide goes to levels spread evenly over the range, one each.
    left = excess % LEVELS
    step = (LEVELS // left.clamp(min=1)).clamp_(min=1)
    level = torch.arange(LEVELS, device=planes.device)
    counts += (level % step == 0) & (level // step < left)
    tables = (counts.cumsum(1) * torch.tensor(255 / (high * wide), dtype=torch.float32)).round_().clamp_(0, 255)
    return tables.view(number, tiles, tiles, LEVELS)


def _neighbours(side: int, tile: int, tiles: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each pixel along a side: the tiles whose centres lie around it, int64 [2, side], and the second's share."""
    place = torch.arange(side, device=device, dtype=torch.float32) / tile - 0.5
    first = place.floor()
    both = torch.stack([first, first + 1]).clamp_(0, tiles - 1).long()
    return both, place - first
