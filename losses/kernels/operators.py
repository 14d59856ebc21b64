"""The losses over all pairs as operators of torch: every gradient is formed in the forward pass, a block at a time.

What a step keeps for its backward is the gradients themselves, O((N + M) D), never the N x M pairs.

Of W ranks each takes its own images against all texts: only the texts move, and while they do the own pairs are worked
on. Each operator returns the loss of the global batch on every rank, and gradients that are those of the loss after an
average over ranks, or after a sum.

Shape suffixes: N own image rows, M text rows of all ranks, D embed dim, K labels, n kinds of ids.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from medclip_lab import distributed
from medclip_lab.losses import functional
from medclip_lab.losses.kernels import chunked
from medclip_lab.losses.kernels.pairs import Engine, Gradients, Pairs, Result
from medclip_lab.losses.kernels.targets import EvenTarget, LabelTarget, Target


def _pairs(
    image: Tensor, text: Tensor, scale: Tensor, sizes: Sequence[int], chunk_size: int, half: torch.dtype | None
) -> Pairs:
    engine: Engine
    if half is None:
        engine = chunked.Engine(image, text, scale, sizes, chunk_size)
    else:
        from medclip_lab.losses.kernels import fused  # Triton is not everywhere

        image, text = image.to(half), text.to(half)
        engine = fused.Engine(image, scale, sizes, chunk_size)
    return Pairs(engine, image, text, sizes)


@torch.library.custom_op("medclip_lab::siglip_pairs", mutates_args=())
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
    half: torch.dtype | None,
    needs: list[bool],
    average: bool,
) -> Result:
    """The sigmoid loss of the global batch and its gradients.

    Args:
        positive_ids, ignored_ids: none, or ids of the own images [N, n] and of all texts [M, n].
        sizes: rows of each rank.
        count: what the sum over pairs is divided by.
        chunk_size: images of a block; 0 lets the kernels choose.
        half: bfloat16 or float16, in which the fused kernels take the features; None for the operations of torch.
        needs: whether gradients of images, of texts, of scale and bias are wanted.
        average: gradients are meant for an average over ranks, not for a sum.
    """
    with torch.autocast(image_ND.device.type, enabled=False):
        pairs = _pairs(image_ND, text_ND, scale, sizes, chunk_size, half)
        grads = Gradients(pairs, needs)
        formula = pairs.engine.sigmoid(bias, positive_ids, ignored_ids)
        for block in pairs.blocks(grads):
            grads.add(block, *formula(block, not grads.none))
        return grads.result(scale, 0.0, 0.0, 1 / count, average)


@torch.library.custom_op("medclip_lab::softmax_pairs", mutates_args=())
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
    half: torch.dtype | None,
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
        chunk_size, half, needs, average: as for `siglip_pairs`.
    """
    with torch.autocast(image_ND.device.type, enabled=False):
        pairs = _pairs(image_ND, text_MD, scale, sizes, chunk_size, half)
        engine = pairs.engine
        columns, rank, world = sum(sizes), distributed.rank(), distributed.world_size()
        # The loss is 1 / count times the sum of these over pairs.
        by_row, by_column = weights[0], weights[1] * count / columns
        spread = smoothing * (by_row / columns + by_column / count)
        target = Target((1 - smoothing) * (by_row + by_column), spread)
        if positive_ids:
            target = EvenTarget(positive_ids, sum(sizes[:rank]), by_row, by_column)
        elif label_values:
            target = LabelTarget(label_values, similarity, temperature, by_row, by_column, engine.label_sums)
            if half is not None:
                pairs.order = target.sort()

        row_lse = pairs.zero(len(image_ND)).fill_(float("-inf"))
        column_lse = pairs.zero(columns).fill_(float("-inf"))
        loss = pairs.zero()
        for block in pairs.blocks():
            rows, cols = block.rows, block.columns
            in_rows, in_columns, own, everything = engine.logsumexp(block, target.spread > 0)
            torch.logaddexp(row_lse[rows], in_rows, out=row_lse[rows])
            torch.logaddexp(column_lse[cols], in_columns, out=column_lse[cols])
            loss -= target.own * own + target.spread * everything
        column_lse = distributed.all_logsumexp(column_lse)
        # Every rank holds all columns: each counts its share, so that the sum over ranks counts them once.
        loss += by_row * row_lse.sum() + by_column * column_lse.sum() / world

        grads = Gradients(pairs, needs)
        if target.in_blocks or not grads.none:
            formula = engine.softmax(row_lse, column_lse, by_row, by_column, target)
            for block in pairs.blocks(grads):
                grads.add(block, *formula(block, not grads.none))
        return grads.result(scale, loss, target.floor(), 1 / count, average)


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


@torch.library.custom_op("medclip_lab::pairs_gradient", mutates_args=())
def _times(saved: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    # Out of place, so that a second backward over a retained graph finds what the first one found.
    return torch.mul(saved, gradient, out=torch.empty_like(saved, dtype=dtype))


@_times.register_fake
def _(saved: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ARG001 - the signature of the operator
    return torch.empty_like(saved, dtype=dtype)


def _no_second_derivative(*_: Any) -> Any:
    raise RuntimeError("the losses over blocks of pairs have no second derivative: use impl='reference'")


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
