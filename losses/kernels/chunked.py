"""Blocks of pairs in torch operations: any device, any floating dtype.

Logits and their exponentials are float32 (float64 for float64 features), and so are sums over a row; sums over rows are
float64.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from medclip_lab.losses import functional
from medclip_lab.losses.kernels.pairs import Block, Formula
from medclip_lab.losses.kernels.targets import BLOCK_BYTES, Target, split


class Engine:
    """See `pairs.Engine`.

    Args:
        rows: images of a block; 0 fits the cache.
    """

    sums_cosines = False
    label_sums = None

    def __init__(self, image: Tensor, text: Tensor, scale: Tensor, sizes: Sequence[int], rows: int) -> None:
        self.dtype = functional.wide_dtype(image, text)
        self.rows = rows or max(1, BLOCK_BYTES // (max(*sizes, 1) * self.dtype.itemsize))
        self._s = float(scale)
        shape = min(self.rows, len(image)), max(sizes)
        self._z, self._work = (image.new_empty(shape, dtype=self.dtype) for _ in range(2))

    def prepare(self, features: Tensor) -> Tensor:
        return features.to(self.dtype).contiguous()

    def add_product(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        out.addmm_(a, b)

    def _logits(self, block: Block, shift: Tensor | None = None) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Scale times cosine plus shift, a buffer of the same shape, and where in it the pairs stand."""
        images, texts = block.images, block.texts
        z, work = (buffer[: len(images), : len(texts)] for buffer in (self._z, self._work))
        if shift is not None:
            torch.addmm(shift, images, texts.T, alpha=self._s, out=z)
        else:
            torch.addmm(z, images, texts.T, beta=0, alpha=self._s, out=z)
        row = torch.arange(len(images) if block.pair < len(texts) else 0, device=images.device)
        return z, work, (row, row + block.pair)

    def sigmoid(self, bias: Tensor, positive_ids: Sequence[Tensor], ignored_ids: Sequence[Tensor]) -> Formula:
        shift = bias.to(self.dtype).reshape(1)

        def same(block: Block, ids: Sequence[Tensor]) -> Tensor:
            images, texts = ids
            return functional.same_ids(images[block.rows], texts[block.columns])

        def formula(block: Block, slopes: bool) -> tuple[Tensor, Tensor | None]:
            z, p, own = self._logits(block, shift)
            # softplus(z) of a negative, softplus(-z) of a positive; the derivatives are sigmoid(z), and sigmoid(z) - 1
            # formed as -sigmoid(-z) to keep its digits.
            positive = keep = near = None
            if positive_ids:
                positive = same(block, positive_ids)
                positive[own] = True
                z = torch.where(positive, -z, z)
            else:
                near = -z[own]
            if ignored_ids:
                keep = ~same(block, ignored_ids)
                keep[own if positive is None else positive] = True
            torch.ops.aten.softplus.out(z, 1, 40, out=p)
            if near is not None:
                p[own] = F.softplus(near, threshold=40)
            sums = p.new_zeros(3, dtype=torch.float64)
            sums[0] = (p if keep is None else p.mul_(keep)).sum(1).sum(dtype=torch.float64)
            if not slopes:
                return sums, None
            torch.sigmoid(z, out=p)
            if near is not None:
                p[own] = -torch.sigmoid(near)
            elif positive is not None:
                p = torch.where(positive, -p, p)
            if keep is not None:
                p.mul_(keep)
            sums[2] = p.sum(1).sum(dtype=torch.float64)
            return sums, p

        return formula

    def logsumexp(self, block: Block, everything: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | float]:
        z, work, own = self._logits(block)
        total = z.sum(1).sum(dtype=torch.float64) if everything else 0.0
        return _logsumexp(z, 1, work), _logsumexp(z, 0, work), z[own].sum(dtype=torch.float64), total

    def softmax(
        self, row_lse_N: Tensor, column_lse_M: Tensor, by_row: float, by_column: float, target: Target
    ) -> Formula:
        row_top, row_factor = split(row_lse_N, by_row, self.dtype)
        column_top, column_factor = split(column_lse_M, by_column, self.dtype)

        def formula(block: Block, slopes: bool) -> tuple[Tensor, Tensor | None]:
            z, p, own = self._logits(block)
            sums = p.new_zeros(3, dtype=torch.float64)
            wanted = target.block(block.rows, block.columns, block.pair)
            if wanted is not None:
                wanted = wanted.to(self.dtype)
                sums[0] = -torch.mul(wanted, z, out=p).sum(1).sum(dtype=torch.float64)
            if not slopes:
                return sums, None
            torch.sub(z, row_top[block.rows, None], out=p).exp_().mul_(row_factor[block.rows, None])
            p.addcmul_(z.sub_(column_top[block.columns]).exp_(), column_factor[block.columns])
            if wanted is not None:
                p -= wanted
            else:
                # P - 1 in the accuracy of the logits: rounding P first would lose the gradient of a good pair.
                p[own] -= target.own
                if target.spread:
                    p -= target.spread
            return sums, p

        return formula


def _logsumexp(z: Tensor, dim: int, work: Tensor) -> Tensor:
    """float64 `z.logsumexp(dim)`; the exponentials and their sums stay in the dtype of `z`."""
    top = z.amax(dim, keepdim=True)
    # A row of -inf has the logarithm of 0; any other non-finite maximum must come out as it is.
    torch.sub(z, torch.where(top == float("-inf"), 0.0, top), out=work).exp_()
    return work.sum(dim).double().log() + top.squeeze(dim).double()
