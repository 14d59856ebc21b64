"""The walk over all pairs of a step: which block comes when, what moves between ranks, what is added up.

What is done to a block is the business of an engine: `chunked.Engine` in torch operations on any device, `fused.Engine`
in Triton kernels.

Shape suffixes: N own image rows, M text rows of all ranks, D embed dim, K labels, n kinds of ids; R and C rows and
columns of a block.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from medclip_lab import distributed
from medclip_lab.losses import functional
from medclip_lab.losses.kernels.targets import LabelSums, Target

Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Loss; its gradients of images, own texts, scale and bias; the least value the loss can reach with these targets."""


@dataclass(frozen=True)
class Block:
    """Some own images by the texts of one rank."""

    rows: slice
    columns: slice
    """Among the texts of all ranks."""
    images: Tensor
    texts: Tensor
    pair: int
    """Column of the block where the first row's pair stands, the next row's beside it; past the columns if the texts
    are another rank's. Where the images have an order of their own it means nothing."""


Formula = Callable[[Block, bool], tuple[Tensor, Tensor | None]]
"""From a block, and whether slopes are wanted: the sums over its pairs, float64 [3], of the loss, of slope times cosine
and of the slopes; and the slopes [R, C], the derivatives of the loss by the logits. An engine may leave the second sum
at 0 and say so in `sums_cosines`."""


class Engine(Protocol):
    """Does the arithmetic of blocks."""

    rows: int
    """Images of a block."""
    sums_cosines: bool
    """Whether the sums of a formula hold that of slope times cosine."""

    @property
    def label_sums(self) -> LabelSums | None:
        """Forms them faster than torch does."""

    def prepare(self, features: Tensor) -> Tensor:
        """Features [B, D] as its blocks take them."""

    def sigmoid(self, bias: Tensor, positive_ids: Sequence[Tensor], ignored_ids: Sequence[Tensor]) -> Formula:
        """The pairwise sigmoid loss; ids of own images [N, n] and of all texts [M, n], or none."""

    def logsumexp(self, block: Block, everything: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | float]:
        """float64 log-sum-exp of the rows [R] and of the columns [C]; sums of the pairs' logits and of all logits.

        Args:
            everything: whether the last is wanted; else it is 0.
        """

    def softmax(
        self, row_lse_N: Tensor, column_lse_M: Tensor, by_row: float, by_column: float, target: Target
    ) -> Formula:
        """Cross entropies whose softmaxes are known but for these sums.

        The loss of the formula is minus target times logit where the target tells its blocks, else 0.

        Args:
            by_row, by_column: weights of the softmaxes.
        """

    def add_product(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        """Add the product of slopes and features to `out`, of the wide dtype."""


class Pairs:
    """Own images by all texts, in blocks, own texts first.

    Attributes:
        order: int64 [N], in which the images come: row i of the blocks is image `order[i]`. None: as they are.
    """

    def __init__(self, engine: Engine, image: Tensor, text: Tensor, sizes: Sequence[int]) -> None:
        self.engine = engine
        self.wide = functional.wide_dtype(image, text)  # of sums and gradients
        self.sizes = sizes
        self.dim = image.shape[1]
        # Contiguous, as the ranks add up each other's memory as it lies.
        self._shares = distributed.Shares(text.contiguous(), sizes)
        self.image = engine.prepare(image)
        self.order: Tensor | None = None
        self._texts: dict[int, Tensor] = {}

    def zero(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.image.device)

    def blocks(self, grads: "Gradients | None" = None) -> Iterator[Block]:
        for source, arrived in self._shares:
            if source not in self._texts:
                self._texts[source] = self.engine.prepare(arrived)
            text = self._texts[source]
            offset = sum(self.sizes[:source])
            mine = source == distributed.rank()
            if grads is not None:
                grads.begin(text)
            for start in range(0, len(self.image), self.engine.rows) if len(text) else ():
                rows = slice(start, min(start + self.engine.rows, len(self.image)))
                columns = slice(offset, offset + len(text))
                own = self.image[rows] if self.order is None else self.image[self.order[rows]]
                yield Block(rows, columns, own, text, start if mine else len(text))
            if grads is not None:
                grads.end(source)

    def close(self) -> None:
        """Wait until the own rows have left."""
        self._shares.close()


class Gradients:
    """What the blocks add up to."""

    def __init__(self, pairs: Pairs, needs: Sequence[bool]) -> None:
        need_image, need_text, _ = needs
        self.none = not any(needs)
        self.pairs = pairs
        self.sums = pairs.zero(3)
        self.image = torch.zeros_like(pairs.image, dtype=pairs.wide) if need_image else None
        self._cosines = pairs.zero()
        self._returns = distributed.Returns(pairs.sizes) if need_text else None
        self._text: Tensor | None = None
        self._texts: Tensor | None = None

    def begin(self, text: Tensor) -> None:
        """The blocks of these texts come now."""
        self._texts = text
        self._text = None if self._returns is None else torch.zeros_like(text, dtype=self.pairs.wide)

    def add(self, block: Block, sums: Tensor, slopes: Tensor | None) -> None:
        """Add what a formula gave."""
        self.sums += sums
        if slopes is None:
            return
        engine = self.pairs.engine
        if self.image is not None and self.pairs.order is not None:
            part = torch.zeros_like(block.images, dtype=self.pairs.wide)
            engine.add_product(part, slopes, block.texts)
            self.image.index_add_(0, self.pairs.order[block.rows], part)  # each row once: the same bits every time
        elif self.image is not None:
            engine.add_product(self.image[block.rows], slopes, block.texts)
        if self._text is not None:
            engine.add_product(self._text, slopes.T, block.images)
        if not engine.sums_cosines and self.image is None and self._text is None:
            self._cosines += (slopes * (block.images @ block.texts.T)).sum(1).sum(dtype=torch.float64)

    def end(self, owner: int) -> None:
        """No more blocks of these texts come."""
        if self._returns is None:
            return
        assert self._text is not None
        assert self._texts is not None
        if self.image is None and not self.pairs.engine.sums_cosines:
            self._cosines += (self._text * self._texts).sum(1).sum(dtype=torch.float64)
        self._returns.send(owner, self._text)

    def result(
        self, scale: Tensor, loss: Tensor | float, floor: Tensor | float, factor: float, average: bool
    ) -> Result:
        """Sums of all ranks.

        Args:
            loss: this rank's part that no formula gave.
            factor: stands before the loss and its gradients.
            average: gradients are meant for an average over ranks, not for a sum.
        """
        pairs, world = self.pairs, distributed.world_size()
        cosines = self._cosines
        if pairs.engine.sums_cosines:
            cosines = self.sums[1]
        elif self.image is not None:
            # The derivative by the scale is the sum of slope times cosine: it comes with a product that is needed.
            cosines = (self.image * pairs.image).sum(1).sum(dtype=torch.float64)
        rows = factor * scale.to(pairs.wide) * (world if average else 1)
        parts = torch.stack([self.sums[0] + loss, cosines, self.sums[2], pairs.zero() + floor]) * factor
        if not average:
            parts[1:3] /= world
        sums = distributed.all_sum(parts)
        none = pairs.image.new_zeros(0, dtype=pairs.wide)
        text = none if self._returns is None else self._returns.own().mul_(rows)[:, : pairs.dim].contiguous()
        image = none.clone() if self.image is None else self.image.mul_(rows)[:, : pairs.dim].contiguous()
        pairs.close()
        value, by_scale, by_bias, least = (scalar.clone() for scalar in sums.to(pairs.wide))
        return value, image, text, by_scale, by_bias, least
