"""Losses over all pairs with every gradient formed in the forward pass, a block of pairs at a time.

What a step keeps for its backward is the gradients themselves, O((N + M) D), never the N x M pairs. Logits and their
exponentials are float32 (float64 for float64 features), and so are sums over a row; sums over rows are float64.

Of W ranks each takes its own images against all texts: only the texts move, and while they do the own pairs are worked
on. Each operator returns the loss of the global batch on every rank, and gradients that are those of the loss after an
average over ranks, or after a sum.

Shape suffixes: N own image rows, M text rows of all ranks, D embed dim, K labels, n kinds of ids.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medclip_lab import distributed
from medclip_lab.losses import functional

BLOCK_BYTES = 16 * 2**20
"""Of the block of pairs that is held at a time: it should stay in the last level of cache."""

Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Loss; its gradients of images, own texts, scale and bias; the least value the loss can reach with these targets."""


@torch.library.custom_op("medclip_lab::siglip_chunked", mutates_args=())
def siglip_pairs(
    image_ND: Tensor,
    text_ND: Tensor,
    scale: Tensor,
    bias: Tensor,
    positive_ids: list[Tensor],
    ignored_ids: list[Tensor],
    sizes: list[int],
    count: int,
    chunk_size: int,
    needs: list[bool],
    average: bool,
) -> Result:
    """The sigmoid loss of the global batch and its gradients.

    Args:
        positive_ids, ignored_ids: none, or ids of the own images [N, n] and of all texts [M, n].
        sizes: rows of each rank.
        count: what the sum over pairs is divided by.
        chunk_size: images of a block; 0 fits the cache.
        needs: whether gradients of images, of texts, of scale and bias are wanted.
        average: gradients are meant for an average over ranks, not for a sum.
    """
    with torch.autocast(image_ND.device.type, enabled=False):
        pairs = _Pairs(image_ND, text_ND, scale, sizes, chunk_size)
        shift = bias.to(pairs.wide).reshape(1)
        grads = _Gradients(pairs, needs)
        loss, slope = pairs.zero(), pairs.zero()
        for block in pairs.blocks(shift, grads):
            z, p, own = block.z, block.work, block.diagonal
            # softplus(z) of a negative, softplus(-z) of a positive; the derivatives are sigmoid(z), and sigmoid(z) - 1
            # formed as -sigmoid(-z) to keep its digits.
            near = -z[own]
            positive = block.same(*positive_ids, diagonal=True) if positive_ids else None
            if positive is not None:
                z = torch.where(positive, -z, z)
            keep = None
            if ignored_ids:
                keep = ~block.same(*ignored_ids, diagonal=False)
                keep[own if positive is None else positive] = True
            torch.ops.aten.softplus.out(z, 1, 40, out=p)
            if positive is None:
                p[own] = F.softplus(near, threshold=40)
            loss += (p if keep is None else p.mul_(keep)).sum(1).sum(dtype=torch.float64)
            if grads.none:
                continue
            torch.sigmoid(z, out=p)
            if positive is None:
                p[own] = -torch.sigmoid(near)
            else:
                p = torch.where(positive, -p, p)
            if keep is not None:
                p.mul_(keep)
            slope += p.sum(1).sum(dtype=torch.float64)
            grads.add(block, p)
        return grads.result(loss, slope, pairs.zero(), 1 / count, average)


@torch.library.custom_op("medclip_lab::softmax_chunked", mutates_args=())
def softmax_pairs(
    image_ND: Tensor,
    text_MD: Tensor,
    scale: Tensor,
    positive_ids: list[Tensor],
    label_values: list[Tensor],
    similarity: str,
    temperature: float,
    smoothing: float,
    weights: list[float],
    sizes: list[int],
    count: int,
    chunk_size: int,
    needs: list[bool],
    average: bool,
) -> Result:
    """A cross entropy over all texts of an image, one over all images of a text, and their gradients.

    Args:
        positive_ids: none, or ids of the own images [N, n] and of all texts [M, n]: the targets are spread evenly over
            the positives.
        label_values: none, or values of the own images [N, K] and of all texts [M, K] and, where labels are ignored,
            which count, [N, K] and [M, K]: the targets are the softmax of their `similarity` over `temperature`.
            With neither, the target is the own text and the own image.
        smoothing: share of the target that is spread evenly.
        weights: of the two directions.
        sizes: text rows of each rank.
        count: image rows of all ranks.
        chunk_size, needs, average: as for `siglip_pairs`.
    """
    with torch.autocast(image_ND.device.type, enabled=False):
        pairs = _Pairs(image_ND, text_MD, scale, sizes, chunk_size)
        columns = sum(sizes)
        by_row, by_column = weights[0] / count, weights[1] / columns
        spread = smoothing * (by_row / columns + by_column / count)
        target: _Target | None = None
        if positive_ids:
            target = _EvenTarget(positive_ids, by_row, by_column)
        elif label_values:
            target = _LabelTarget(label_values, similarity, temperature, by_row, by_column)
        if target is not None:
            for block in pairs.blocks(None, None):
                target.scan(block)
            target.close()

        grads = _Gradients(pairs, needs)
        row_lse = pairs.image.new_full((len(pairs.image),), float("-inf"), dtype=torch.float64)
        column_lse = pairs.image.new_full((columns,), float("-inf"), dtype=torch.float64)
        loss = pairs.zero()
        for block in pairs.blocks(0.0, None):
            rows, cols = block.rows, block.columns
            torch.logaddexp(row_lse[rows], _logsumexp(block.z, 1, block.work), out=row_lse[rows])
            torch.logaddexp(column_lse[cols], _logsumexp(block.z, 0, block.work), out=column_lse[cols])
            if target is None:
                loss -= (1 - smoothing) * (by_row + by_column) * block.z[block.diagonal].sum(dtype=torch.float64)
                if smoothing:
                    loss -= spread * block.z.sum(1).sum(dtype=torch.float64)
            elif grads.none:
                loss -= (block.z * target.block(block)).sum(1).sum(dtype=torch.float64)
        column_lse = distributed.all_logsumexp(column_lse)
        loss += by_row * row_lse.sum()
        # Every rank holds all of them: each counts its share, so that the sum over ranks counts them once.
        loss += by_column * column_lse.sum() / distributed.world_size()

        if not grads.none:
            row_top, row_factor = _split(row_lse, by_row, pairs.wide)
            column_top, column_factor = _split(column_lse, by_column, pairs.wide)
            for block in pairs.blocks(0.0, grads):
                z, p = block.z, block.work
                wanted = None if target is None else target.block(block)
                if wanted is not None:
                    loss -= torch.mul(wanted, z, out=p).sum(1).sum(dtype=torch.float64)
                torch.sub(z, row_top[block.rows, None], out=p).exp_().mul_(row_factor[block.rows, None])
                p.addcmul_(z.sub_(column_top[block.columns]).exp_(), column_factor[block.columns])
                if wanted is not None:
                    p -= wanted
                else:
                    # P - 1 in the accuracy of the logits: rounding P first would lose the gradient of a good pair.
                    p[block.diagonal] -= (1 - smoothing) * (by_row + by_column)
                    if smoothing:
                        p -= spread
                grads.add(block, p)
        floor = pairs.zero() if target is None else target.floor()
        return grads.result(loss, pairs.zero(), floor, 1.0, average)


def _logsumexp(z: Tensor, dim: int, work: Tensor) -> Tensor:
    """float64 `z.logsumexp(dim)`; the exponentials and their sums stay in the dtype of `z`."""
    top = z.amax(dim, keepdim=True)
    # A row of -inf has the logarithm of 0; any other non-finite maximum must come out as it is.
    torch.sub(z, torch.where(top == float("-inf"), 0.0, top), out=work).exp_()
    return work.sum(dim).double().log() + top.squeeze(dim).double()


def _split(lse: Tensor, weight: float, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """A top and a factor with exp(z - top) * factor = weight * exp(z - lse), to the last digit.

    A logarithm of 100 is off by 4e-6 in float32, and so would be the probability of a pair, less which the target is
    little.
    """
    top = lse.to(wide)
    return top, (weight * (top.double() - lse).exp()).to(wide)


@dataclass
class _Block:
    """Some own images by the texts of one rank, or by some of them."""

    rows: slice
    columns: slice
    """Among the texts of all ranks."""
    images: Tensor
    texts: Tensor
    z: Tensor
    work: Tensor
    """As large as z, free for use."""
    diagonal: tuple[Tensor, Tensor]
    """Where the pairs stand in z."""

    def same(self, image_ids_Nn: Tensor, text_ids_Mn: Tensor, *, diagonal: bool) -> Tensor:
        """Which pairs share an id, and, with `diagonal`, which are pairs anyway."""
        same = functional.same_ids(image_ids_Nn[self.rows], text_ids_Mn[self.columns])
        if diagonal:
            same[self.diagonal] = True
        return same


class _Pairs:
    """Own images by all texts, in blocks."""

    def __init__(self, image: Tensor, text: Tensor, scale: Tensor, sizes: Sequence[int], chunk_size: int) -> None:
        self.wide = functional.wide_dtype(image, text)
        self.sizes = sizes
        # Contiguous, as the ranks add up each other's memory as it lies.
        self._shares = distributed.Shares(text.contiguous(), sizes)
        self.image = image.to(self.wide).contiguous()
        self._texts: dict[int, Tensor] = {}
        self.s = float(scale)
        self.rows = chunk_size or max(1, BLOCK_BYTES // (max(*sizes, 1) * self.image.element_size()))
        shape = min(self.rows, len(image)), max(sizes)
        self._z, self._work = self.image.new_empty(shape), self.image.new_empty(shape)

    def zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.image.device)

    def blocks(self, shift: Tensor | float | None, grads: "_Gradients | None") -> Iterator[_Block]:
        """Every block with its logits: scale times cosine plus `shift`; without a shift z is left as it is."""
        me = distributed.rank()
        for source, arrived in self._shares:
            text = self._texts.setdefault(source, arrived.to(self.wide))
            offset = sum(self.sizes[:source])
            if grads is not None:
                grads.begin(text)
            for start in range(0, len(self.image), self.rows) if len(text) else ():
                own = self.image[start : start + self.rows]
                z, work = (buffer[: len(own), : len(text)] for buffer in (self._z, self._work))
                if shift is not None:
                    if isinstance(shift, Tensor):
                        torch.addmm(shift, own, text.T, alpha=self.s, out=z)
                    else:
                        torch.addmm(z, own, text.T, beta=0, alpha=self.s, out=z)
                row = torch.arange(len(own) if source == me else 0, device=own.device)
                yield _Block(
                    slice(start, start + len(own)),
                    slice(offset, offset + len(text)),
                    own,
                    text,
                    z,
                    work,
                    (row, row + start),
                )
            if grads is not None:
                grads.end(source)

    def close(self) -> None:
        """Wait until the own rows have left."""
        self._shares.close()


class _Gradients:
    """What the blocks add up to."""

    def __init__(self, pairs: _Pairs, needs: Sequence[bool]) -> None:
        need_image, need_text, self.need_scalars = needs
        self.none = not any(needs)
        self.pairs = pairs
        self.image = torch.zeros_like(pairs.image) if need_image else None
        self.scale = pairs.zero()
        self._returns = distributed.Returns(pairs.sizes) if need_text else None
        self._text: Tensor | None = None

    def begin(self, text: Tensor) -> None:
        """The blocks of these texts come now."""
        self._text = torch.zeros_like(text) if self._returns is not None else None

    def add(self, block: _Block, p: Tensor) -> None:
        """Add a block whose derivatives by the logits are `p`."""
        if self.image is not None:
            self.image[block.rows].addmm_(p, block.texts)
        if self._text is not None:
            self._text.addmm_(p.T, block.images)
        if self.need_scalars and self.image is None and self._text is None:
            self.scale += (p * (block.images @ block.texts.T)).sum(1).sum(dtype=torch.float64)

    def end(self, owner: int) -> None:
        """No more blocks of these texts come."""
        if self._returns is None:
            return
        assert self._text is not None
        if self.image is None and self.need_scalars:
            text = self.pairs._texts[owner]
            self.scale += (self._text * text).sum(1).sum(dtype=torch.float64)
        self._returns.send(owner, self._text)

    def result(self, loss: Tensor, slope: Tensor, floor: Tensor, factor: float, average: bool) -> Result:
        """Sums of all ranks; `factor` stands before the loss and its gradients."""
        pairs, world = self.pairs, distributed.world_size()
        if self.image is not None:
            # The derivative by the scale is the sum of p times cosine: it comes with a product that is needed anyway.
            self.scale = (self.image * pairs.image).sum(1).sum(dtype=torch.float64)
        rows = factor * pairs.s * (world if average else 1)
        shared = factor / (1 if average else world)
        sums = distributed.all_sum(torch.stack([loss * factor, self.scale * shared, slope * shared, floor]))
        none = pairs.image.new_zeros(0)
        text = none if self._returns is None else self._returns.own().mul_(rows)
        pairs.close()
        value, scale, bias, least = (scalar.clone() for scalar in sums.to(pairs.wide))
        return value, none.clone() if self.image is None else self.image.mul_(rows), text, scale, bias, least


class _Target:
    """What the softmaxes should be, block by block: never all of it at once.

    A block is the sum of both directions' targets times their weights. Each is asked for once.
    """

    def scan(self, block: _Block) -> None:
        """See a block before any is asked for."""
        raise NotImplementedError

    def close(self) -> None:
        """All blocks have been seen."""

    def block(self, block: _Block) -> Tensor:
        raise NotImplementedError

    def floor(self) -> Tensor:
        """This rank's share of the entropy of the targets."""
        raise NotImplementedError


class _EvenTarget(_Target):
    """Spread evenly over the positives of a row, and over those of a column."""

    def __init__(self, ids: Sequence[Tensor], by_row: float, by_column: float) -> None:
        self.image_ids_Nn, self.text_ids_Mn = ids
        self.by_row, self.by_column = by_row, by_column
        self.in_row = torch.zeros(len(self.image_ids_Nn), dtype=torch.float64, device=self.image_ids_Nn.device)
        self.in_column = self.in_row.new_zeros(len(self.text_ids_Mn))

    def scan(self, block: _Block) -> None:
        same = block.same(self.image_ids_Nn, self.text_ids_Mn, diagonal=True)
        self.in_row[block.rows] += same.sum(1)
        self.in_column[block.columns] += same.sum(0)

    def close(self) -> None:
        distributed.all_sum(self.in_column)

    def block(self, block: _Block) -> Tensor:
        same = block.same(self.image_ids_Nn, self.text_ids_Mn, diagonal=True)
        share = (self.by_row / self.in_row[block.rows, None] + self.by_column / self.in_column[block.columns]).to(
            block.z.dtype
        )
        return torch.where(same, share, 0.0)

    def floor(self) -> Tensor:
        columns = self.by_column * self.in_column.log().sum() / distributed.world_size()
        return self.by_row * self.in_row.log().sum() + columns


class _LabelTarget(_Target):
    """The softmax of the similarity of label vectors."""

    def __init__(
        self, values: Sequence[Tensor], similarity: str, temperature: float, by_row: float, by_column: float
    ) -> None:
        self.images, self.texts = values[:2]
        self.image_known = values[2] if len(values) > 2 else None
        self.text_known = values[3] if len(values) > 2 else None
        self.similarity, self.temperature = similarity, temperature
        self.by_row, self.by_column = by_row, by_column
        self.row_lse = self.images.new_full((len(self.images),), float("-inf"), dtype=torch.float64)
        self.column_lse = self.images.new_full((len(self.texts),), float("-inf"), dtype=torch.float64)
        self.agreement = torch.zeros((), dtype=torch.float64, device=self.images.device)

    def _similarity(self, block: _Block) -> Tensor:
        rows, columns = block.rows, block.columns
        return functional.label_similarity(
            self.images[rows],
            self.texts[columns],
            self.similarity,
            None if self.image_known is None else self.image_known[rows],
            None if self.text_known is None else self.text_known[columns],
        ).div_(self.temperature)

    def scan(self, block: _Block) -> None:
        similar = self._similarity(block)
        rows, columns = block.rows, block.columns
        self.row_lse[rows] = torch.logaddexp(self.row_lse[rows], _logsumexp(similar, 1, block.work))
        self.column_lse[columns] = torch.logaddexp(self.column_lse[columns], _logsumexp(similar, 0, block.work))

    def close(self) -> None:
        self.column_lse = distributed.all_logsumexp(self.column_lse)
        self.row_top, self.row_factor = _split(self.row_lse, self.by_row, self.images.dtype)
        self.column_top, self.column_factor = _split(self.column_lse, self.by_column, self.images.dtype)

    def block(self, block: _Block) -> Tensor:
        similar = self._similarity(block)
        target = (similar - self.row_top[block.rows, None]).exp_().mul_(self.row_factor[block.rows, None])
        target.addcmul_((similar - self.column_top[block.columns]).exp_(), self.column_factor[block.columns])
        self.agreement += (target * similar).sum(1).sum(dtype=torch.float64)
        return target

    def floor(self) -> Tensor:
        rows = self.by_row * self.row_lse.sum()
        columns = self.by_column * self.column_lse.sum() / distributed.world_size()
        return rows + columns - self.agreement


def _shapes(image: Tensor, text: Tensor, needs: Sequence[bool]) -> Result:
    wide = functional.wide_dtype(image, text)

    def scalar() -> Tensor:
        return image.new_empty((), dtype=wide)

    return (
        scalar(),
        image.new_empty(image.shape if needs[0] else (0,), dtype=wide),
        text.new_empty(text.shape if needs[1] else (0,), dtype=wide),
        scalar(),
        scalar(),
        scalar(),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
    image, text, scale = inputs[:3]
    bias = inputs[3] if isinstance(inputs[3], Tensor) else None
    ctx.save_for_backward(*output[1:5])
    ctx.like = [(value.dtype, value.shape) for value in (image, text, scale, bias) if value is not None]
    # Per argument: how many tensors it lists, or that it is no list of tensors.
    ctx.arguments = [
        len(value) if isinstance(value, list | tuple) and all(isinstance(item, Tensor) for item in value) else None
        for value in inputs
    ]
    ctx.set_materialize_grads(False)


@torch.library.custom_op("medclip_lab::chunked_gradient", mutates_args=())
def _times(saved: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    # Out of place, so that a second backward over a retained graph finds what the first one found.
    return (saved * gradient).to(dtype)


@_times.register_fake
def _(saved: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ARG001 - the signature of the operator
    return torch.empty_like(saved, dtype=dtype)


def _no_second_derivative(*_: Any) -> Any:
    raise RuntimeError("the chunked losses have no second derivative: use impl='reference'")


_times.register_autograd(_no_second_derivative)


def _backward(ctx: Any, gradient: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    # An argument that is a list wants a list back.
    grads: list[Any] = [None if length is None else [None] * length for length in ctx.arguments]
    if gradient is not None:
        for place, (saved, (dtype, shape)) in enumerate(zip(ctx.saved_tensors, ctx.like, strict=False)):
            if ctx.needs_input_grad[place]:
                grads[place] = _times(saved, gradient, dtype).reshape(shape)
    return tuple(grads)


for _op in (siglip_pairs, softmax_pairs):
    _op.register_fake(lambda image, text, *rest: _shapes(image, text, rest[-2]))
    _op.register_autograd(_backward, setup_context=_save)
