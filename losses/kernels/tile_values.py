"""What the fused kernels are told of the rows and columns of a tile, in the order in which they read it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medclip_lab.losses.kernels.targets import EvenTarget, LabelTarget, Target, places

LOG2E = 1 / math.log(2)


@dataclass(frozen=True)
class Told:
    """What `softmax_tile.softmax_tile` is told of a target."""

    kind: str
    """Of tile."""
    code: int
    """Its TARGET."""
    of_rows: Sequence[Tensor] = ()
    of_columns: Sequence[Tensor] = ()
    """float32 [N] and [M] each: what stands behind tops and factors."""
    kinds: int = 1
    """Its KINDS."""
    labels: tuple[Tensor, Tensor] | None = None
    """float32 [1 or 3, N, width] and [1 or 3, M, width]."""
    table: Tensor | None = None
    own: float = 0.0
    """What is wanted of a pair; of labels what stands before their similarity."""


def told(target: Target) -> Told:
    """What a tile is told of this target."""
    if isinstance(target, EvenTarget):
        images, texts = same_ids([target.image_ids_Nn, target.text_ids_Mn])
        rows, columns = target.by_row / target.in_row, target.by_column / target.in_column
        return Told("softmax-ids", 1, [rows.float(), *images], [columns.float(), *texts], len(images))
    if isinstance(target, LabelTarget) and target.table is not None:
        table = target.table.float()
        rows, columns = table.itemsize * table.shape[1] * target.image_of, table.itemsize * target.text_of
        return Told("softmax-table", 2, [_as_float32(rows)], [_as_float32(columns)], table=table)
    if isinstance(target, LabelTarget):
        labels = label_sides(target.images, target.image_known, target.texts, target.text_known, target.similarity)
        of = split(target.row_lse, target.by_row), split(target.column_lse, target.by_column)
        kind, code = ("softmax-known", 4) if len(labels[0]) > 1 else ("softmax-labels", 3)
        return Told(kind, code, *of, labels=labels, own=LOG2E / target.temperature)
    return Told("softmax", 0, own=target.own)


def label_sides(
    images: Tensor, image_known: Tensor | None, texts: Tensor, text_known: Tensor | None, similarity: str
) -> tuple[Tensor, Tensor]:
    """float32 [1, N, width] and [1, M, width], or 3 of them, width a multiple of 16: see `label_tile.similarity`."""
    sides = [[images], [texts]]
    if image_known is not None and text_known is not None:
        images, texts = images * image_known, texts * text_known
        sides = [[images], [texts]]
        if similarity == "cosine":
            sides = [[images, images.square(), image_known], [texts, text_known, texts.square()]]
    elif similarity == "cosine":
        sides = [[F.normalize(images, dim=1)], [F.normalize(texts, dim=1)]]
    short = -images.shape[1] % 16
    image, text = (torch.stack([F.pad(value.float(), (0, short)) for value in side]) for side in sides)
    return image, text


def same_ids(ids: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """int32 [N] and [M] for each kind, as float32, equal where the given ids are equal and not negative.

    Args:
        ids: none, or those of the images [N, n] and of the texts [M, n].
    """
    if not ids:
        return [], []
    images, texts = ids
    kinds = [places(*pair) for pair in zip(images.T.contiguous(), texts.T.contiguous(), strict=True)]
    own, other = ([_as_float32(side) for side in sides] for sides in zip(*kinds, strict=True))
    return own, other


def _as_float32(integers: Tensor) -> Tensor:
    return integers.int().view(torch.float32)


def by_tile(values: Sequence[Tensor], part: slice, size: int) -> Tensor:
    """[tiles, values, size]: what a tile wants of its rows or columns in one place, with zeros past the edge.

    Args:
        values: [N] each.
        part: of those N.
    """
    stacked = torch.stack([value[part] for value in values])
    tiles = F.pad(stacked, (0, -stacked.shape[1] % size)).view(len(values), -1, size)
    return tiles.transpose(0, 1).contiguous()


def split(lse: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """float32 top and factor with exp2(z - top) * factor = weight * exp(logit - lse), z the logit in units of log 2."""
    exact = lse * LOG2E
    top = exact.float()
    return top, (weight * torch.exp2(top.double() - exact)).float()
