"""What the softmaxes over all pairs should be, told without a matrix of all pairs.

Each target is the sum of both directions' targets times their weights. What it needs of all pairs it takes from groups
of equal rows: label vectors and ids repeat.

Shape suffixes: N own image rows, M text rows of all ranks, K labels, n kinds of ids; U and V distinct label vectors of
the images and of the texts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import torch
from torch import Tensor

from medclip_lab import distributed
from medclip_lab.losses import functional

BLOCK_BYTES = 16 * 2**20
"""Of the block of pairs that is held at a time: it should stay in the last level of cache."""
GPU_BLOCK_BYTES = 2**27
"""The same on a GPU, where a launch costs more than a block that leaves the cache."""
TABLE_BYTES, GPU_TABLE_BYTES = 2**26, 2**28
"""Of the targets that may be held for pairs of distinct label vectors; more of them are formed for every block anew."""
TABLE_SHARE = 32
"""Kernels form the targets of so many pairs while torch forms one of a table."""


class Target:
    """The pair, and perhaps a little of everything else.

    Args:
        own: what is wanted of a pair.
        spread: what is wanted of every image and text besides.
    """

    in_blocks: ClassVar[bool] = False
    """Whether more is wanted of pairs than `own` and `spread` say."""

    def __init__(self, own: float, spread: float) -> None:
        self.own, self.spread = own, spread

    def block(self, rows: slice, columns: slice, pair: int) -> Tensor | None:
        """[R, C] targets of some own images and some texts; None unless `in_blocks`.

        Args:
            pair: column of the block where the first row's pair stands.
        """
        del rows, columns, pair
        return None

    def floor(self) -> Tensor | float:
        """This rank's share of the entropy of the targets, but for those that are constant."""
        return 0.0


class EvenTarget(Target):
    """Spread evenly over the positives of a row, and over those of a column.

    Args:
        ids: of own images [N, n] and of all texts [M, n].
        first: among all texts, that of the first own image.
        by_row, by_column: weights of the directions.
    """

    in_blocks = True

    def __init__(self, ids: Sequence[Tensor], first: int, by_row: float, by_column: float) -> None:
        super().__init__(0.0, 0.0)
        self.image_ids_Nn, self.text_ids_Mn = ids
        self.by_row, self.by_column = by_row, by_column
        in_row, in_column = count_same(self.image_ids_Nn, self.text_ids_Mn)
        # A pair is positive also where its ids say nothing.
        own = slice(first, first + len(self.image_ids_Nn))
        unsaid = ~same_rows(self.image_ids_Nn, self.text_ids_Mn[own])
        in_row += unsaid
        in_column[own] += unsaid
        self.in_row = in_row.double()
        self.in_column = distributed.all_sum(in_column).double()

    def block(self, rows: slice, columns: slice, pair: int) -> Tensor:
        same = functional.same_ids(self.image_ids_Nn[rows], self.text_ids_Mn[columns])
        if pair < same.shape[1]:
            same.diagonal(pair).fill_(True)
        share = self.by_row / self.in_row[rows, None] + self.by_column / self.in_column[columns]
        return torch.where(same, share, 0.0)

    def floor(self) -> Tensor:
        columns = self.by_column * self.in_column.log().sum() / distributed.world_size()
        return self.by_row * self.in_row.log().sum() + columns


def same_rows(image_ids_Nn: Tensor, text_ids_Nn: Tensor) -> Tensor:
    """[N] bool: image i and text i share an id of one kind at least."""
    return ((image_ids_Nn == text_ids_Nn) & (image_ids_Nn >= 0)).any(1)


def places(image_ids_N: Tensor, text_ids_M: Tensor) -> tuple[Tensor, Tensor]:
    """int64 ids below M, equal where the given ones are equal and not negative; else -1 for images and -2 for texts."""
    ordered = text_ids_M.sort().values
    texts = torch.searchsorted(ordered, text_ids_M)
    images = torch.searchsorted(ordered, image_ids_N).clamp_max_(max(len(ordered) - 1, 0))
    known = (image_ids_N >= 0) & (ordered[images] == image_ids_N) if len(ordered) else torch.zeros_like(images).bool()
    return torch.where(known, images, -1), torch.where(text_ids_M >= 0, texts, -2)


def count_same(image_ids_Nn: Tensor, text_ids_Mn: Tensor) -> tuple[Tensor, Tensor]:
    """int64 [N] and [M]: with how many texts an image shares an id of one kind at least, and the other way round."""
    many = len(text_ids_Mn)
    sides = image_ids_Nn, text_ids_Mn
    in_row, in_column = (torch.zeros(len(ids), dtype=torch.int64, device=ids.device) for ids in sides)
    kinds = [places(*pair) for pair in zip(image_ids_Nn.T.contiguous(), text_ids_Mn.T.contiguous(), strict=True)]
    # Those that share one of several kinds: with all that share one, less those that share two, and so on.
    for size in range(1, len(kinds) + 1):
        for chosen in combinations(kinds, size):
            images, texts = chosen[0]
            for more_images, more_texts in chosen[1:]:
                images = torch.where((images >= 0) & (more_images >= 0), images * many + more_images, -1)
                texts = torch.where((texts >= 0) & (more_texts >= 0), texts * many + more_texts, -2)
                images, texts = places(images, texts)
            sign = 1 if size % 2 else -1
            for out, own, other in ((in_row, images, texts), (in_column, texts, images)):
                counts = torch.zeros(many + 1, dtype=torch.int64, device=out.device)
                counts.index_add_(0, torch.where(other >= 0, other, many), torch.ones_like(other))
                out += sign * torch.where(own >= 0, counts[own.clamp_min(0)], 0)
    return in_row, in_column


class LabelTarget(Target):
    """The softmax of the similarity of label vectors.

    Args:
        values: of own images [N, K] and of all texts [M, K] and, where labels are ignored, which count, 1 or 0.
        similarity: "dot" or "cosine".
        temperature: divides the similarity.
        by_row, by_column: weights of the directions.
        sums: what forms the sums over many distinct vectors; torch by default.

    Attributes:
        table: [U, V] targets of pairs of distinct label vectors, unless there are too many.
        image_of, text_of: int64 [N] and [M], which of them each row has.
        agreement: float64, the sum over own images and all texts of target times similarity over temperature.
    """

    in_blocks = True

    def __init__(
        self,
        values: Sequence[Tensor],
        similarity: str,
        temperature: float,
        by_row: float,
        by_column: float,
        sums: "LabelSums | None" = None,
    ) -> None:
        super().__init__(0.0, 0.0)
        self.images, self.texts = values[:2]
        known: Sequence[Tensor | None] = values[2:] or (None, None)
        self.image_known, self.text_known = known
        self.similarity, self.temperature = similarity, temperature
        self.by_row, self.by_column = by_row, by_column
        # A softmax needs each distinct vector once, and how many rows have it.
        images, self.image_of = distinct(self.images, self.image_known)
        texts, self.text_of = distinct(self.texts, self.text_known)
        table = self.images.new_empty(len(images), len(texts), device="meta")
        room = TABLE_BYTES if self.images.device.type == "cpu" else GPU_TABLE_BYTES
        if sums is not None:
            room = min(room, len(self.images) * len(self.texts) * table.itemsize // TABLE_SHARE)
        self.table = torch.empty_like(table, device=self.images.device) if table.nbytes <= room else None
        self.agreement = torch.zeros((), dtype=torch.float64, device=self.images.device)
        if self.table is not None:
            sums = None  # filling it comes by both sums
        row_lse, column_lse = self._sums(images, texts) if sums is None else sums(images, texts, self)
        column_lse = distributed.all_logsumexp(column_lse)
        if sums is None:
            self._agree(images, texts, row_lse, column_lse)
        self.row_lse, self.column_lse = row_lse[self.image_of], column_lse[self.text_of]

    def _sums(self, images: "Vectors", texts: "Vectors") -> tuple[Tensor, Tensor]:
        row_lse = torch.empty_like(images.counts)
        column_lse = torch.full_like(texts.counts, float("-inf"))
        for rows, similar in self._similarities(images, texts):
            row_lse[rows] = (similar + texts.counts.log()).logsumexp(1)
            column_lse = torch.logaddexp(column_lse, (similar + images.counts[rows, None].log()).logsumexp(0))
        return row_lse, column_lse

    def _agree(self, images: "Vectors", texts: "Vectors", row_lse: Tensor, column_lse: Tensor) -> None:
        """Fill the table and sum target times similarity."""
        for rows, similar in self._similarities(images, texts):
            target = self.by_row * (similar - row_lse[rows, None]).exp()
            target += self.by_column * (similar - column_lse).exp()
            if self.table is not None:
                self.table[rows] = target
            self.agreement += (target * similar * texts.counts).sum(1) @ images.counts[rows]

    def _similarities(self, images: "Vectors", texts: "Vectors") -> Iterator[tuple[slice, Tensor]]:
        """float64 similarities over the temperature, some rows at a time."""
        room = BLOCK_BYTES if self.images.device.type == "cpu" else GPU_BLOCK_BYTES
        step = max(1, room // (8 * max(1, len(texts))))
        for start in range(0, len(images), step):
            rows = slice(start, start + step)
            values, known = images.values[rows], None if images.known is None else images.known[rows]
            similar = functional.label_similarity(values, texts.values, self.similarity, known, texts.known)
            yield rows, similar.double() / self.temperature

    def sort(self) -> Tensor | None:
        """Let images of equal label vectors stand together, as then few lines of the table serve a tile.

        Returns:
            int64 [N]: which of the own images stands where; None where there is no table.
        """
        if self.table is None:
            return None
        order = self.image_of.argsort(stable=True)
        self.images, self.row_lse, self.image_of = self.images[order], self.row_lse[order], self.image_of[order]
        if self.image_known is not None:
            self.image_known = self.image_known[order]
        return order

    def block(self, rows: slice, columns: slice, pair: int) -> Tensor:
        del pair
        if self.table is not None:
            images, texts = self.image_of[rows], self.text_of[columns]
            if len(self.table) * len(texts) < len(images) * self.table.shape[1]:
                return self.table.index_select(1, texts)[images]
            return self.table[images].index_select(1, texts)
        similar = functional.label_similarity(
            self.images[rows],
            self.texts[columns],
            self.similarity,
            None if self.image_known is None else self.image_known[rows],
            None if self.text_known is None else self.text_known[columns],
        ).div_(self.temperature)
        row_top, row_factor = split(self.row_lse[rows], self.by_row, similar.dtype)
        column_top, column_factor = split(self.column_lse[columns], self.by_column, similar.dtype)
        target = (similar - row_top[:, None]).exp_().mul_(row_factor[:, None])
        return target.addcmul_(similar.sub_(column_top).exp_(), column_factor)

    def floor(self) -> Tensor:
        columns = self.column_lse.sum() / distributed.world_size()
        return self.by_row * self.row_lse.sum() + self.by_column * columns - self.agreement


@dataclass(frozen=True)
class Vectors:
    """Distinct label vectors [U, K], which labels of them are known, and how many rows have each, float64 [U]."""

    values: Tensor
    known: Tensor | None
    counts: Tensor

    def __len__(self) -> int:
        return len(self.counts)


LabelSums = Callable[[Vectors, Vectors, LabelTarget], tuple[Tensor, Tensor]]
"""From distinct vectors of own images and of all texts the float64 log-sum-exp over all texts [U] and over own images
[V]. Who gives them adds target times similarity, of own images and all texts, to `LabelTarget.agreement` later."""


def distinct(values: Tensor, known: Tensor | None) -> tuple[Vectors, Tensor]:
    """Distinct rows, and which of them each row is."""
    both = values if known is None else torch.cat([values, known], 1)
    # One number a row is sorted faster than rows are; that no two of them share it is seen to.
    weights = torch.arange(1, both.shape[1] + 1, dtype=torch.float64, device=both.device).sin()
    keys, order = (both * weights).sum(1).sort(stable=True)
    _, place, counts = torch.unique_consecutive(keys, return_inverse=True, return_counts=True)
    which = torch.empty_like(place).index_copy_(0, order, place)
    rows = both[order[counts.cumsum(0) - counts]]
    if not torch.equal(rows[which], both):
        rows, which, counts = torch.unique(both, dim=0, return_inverse=True, return_counts=True)
    labels = values.shape[1]
    return Vectors(rows[:, :labels], None if known is None else rows[:, labels:], counts.double()), which


def split(lse: Tensor, weight: float, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """A top and a factor with exp(z - top) * factor = weight * exp(z - lse), to the last digit.

    A logarithm of 100 is off by 4e-6 in float32, and so would be the probability of a pair, less which the target is
    little.
    """
    top = lse.to(wide)
    return top, (weight * (top.double() - lse).exp()).to(wide)
