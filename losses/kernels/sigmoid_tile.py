"""Triton kernel: the pairwise sigmoid loss of a tile of pairs, and its slopes."""

import triton
import triton.language as tl

from medclip_lab.losses.kernels.tiles import (
    LN2,
    LOG2E,
    anchored,
    apart,
    cosines,
    halves,
    log1p,
    pair_columns,
    place,
    product,
    reciprocal,
    rounded,
    same,
    store,
    whole,
)


@triton.jit
def _part(
    x,
    loss,
    excess,
    cosine,
    slope,
    row,
    column,
    own,
    scale,
    bias,
    image_ids,
    text_ids,
    columns,
    SPECIAL: tl.constexpr,
    POSITIVE: tl.constexpr,
    IGNORED: tl.constexpr,
    SLOPES: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Add the columns of x to the sums, [BM, LANES] each; slopes, if they are wanted.

    Args:
        image_ids, text_ids: where those of row 0 and of column 0 would stand, were they of this tile.
        SPECIAL: some columns may be past the edge, or where the pairs stand, `own` [BM].
        WIDE: columns of the tile.
    """
    if PARTS > 1:
        left, right = halves(x, BM, BN)
        left, loss, excess, cosine, slope = _part(
            left, loss, excess, cosine, slope, row, column, own, scale, bias, image_ids, text_ids, columns, SPECIAL,
            POSITIVE, IGNORED, SLOPES, WIDE, BM, BN // 2, PARTS // 2, LANES, INTERPRETED,
        )  # fmt: skip
        right, loss, excess, cosine, slope = _part(
            right, loss, excess, cosine, slope, row, column + BN // 2, own, scale, bias, image_ids, text_ids, columns,
            SPECIAL, POSITIVE, IGNORED, SLOPES, WIDE, BM, BN // 2, PARTS // 2, LANES, INTERPRETED,
        )  # fmt: skip
        w = whole(left, right, BM, BN) if SLOPES else left
    else:
        z = x * scale + bias
        # -log sigmoid(-z) of a negative, -log sigmoid(z) of a positive: softplus after the sign is turned.
        r, c = row + tl.arange(0, BM), column + tl.arange(0, BN)
        row_at, column_at = image_ids + r, text_ids + c
        if POSITIVE > 0:
            positive = same(row_at, column_at, BM, WIDE, POSITIVE)
            if SPECIAL:
                positive = positive | (c[None, :] == own[:, None])
        elif SPECIAL:
            positive = c[None, :] == own[:, None]
        if SPECIAL or POSITIVE > 0:
            z = tl.where(positive, -z, z)
        if IGNORED > 0:
            ignored = same(row_at + POSITIVE * BM, column_at + POSITIVE * WIDE, BM, WIDE, IGNORED)
            if SPECIAL or POSITIVE > 0:
                ignored = ignored & (positive == 0)
            z = tl.where(ignored, float("-inf"), z)
        if SPECIAL:
            # No text past the edge: its logit is that of a pair that is surely none, and adds exactly nothing.
            z = tl.where((c < columns)[None, :], z, float("-inf"))
        e = tl.exp2(-tl.abs(z))  # NaN where z is
        loss += tl.sum(apart(tl.maximum(z, 0.0), BM, BN, LANES), 1)
        # At most 64 factors of at most 2 each: no overflow.
        excess = product(excess, tl.reduce(apart(e, BM, BN, LANES), 1, product))
        w = e
        if SLOPES:
            w = tl.where(z >= 0, 1.0, e) * reciprocal(1.0 + e, INTERPRETED)
            if SPECIAL or POSITIVE > 0:
                # sigmoid - 1 of a positive formed as -sigmoid(-z) to keep its digits.
                w = tl.where(positive, -w, w)
            cosine += tl.sum(apart(w * x, BM, BN, LANES), 1)
            slope += tl.sum(apart(w, BM, BN, LANES), 1)
            w = rounded(w, INTERPRETED)
        loss, excess = anchored(loss, INTERPRETED), anchored(excess, INTERPRETED)
        cosine, slope = anchored(cosine, INTERPRETED), anchored(slope, INTERPRETED)
    return w, loss, excess, cosine, slope


@triton.jit(do_not_specialize=["rows", "columns", "pair"])
def sigmoid_tile(
    image,
    text,
    slopes,
    sums,
    scale,
    bias,
    image_ids,
    text_ids,
    rows,
    columns,
    dim,
    pair,
    stride,
    POSITIVE: tl.constexpr,
    IGNORED: tl.constexpr,
    SLOPES: tl.constexpr,
    TMA: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The pairwise sigmoid loss of a tile and its slopes.

    Args:
        image, text: [rows, dim] and [columns, dim], as descriptors of blocks [BM, BK] and [BN, BK], or contiguous.
        slopes: bfloat16 [rows, columns], as a descriptor of blocks [BM, BN], or with rows `stride` apart.
        sums: float32 [tiles, 3]: loss, slope times cosine, slope.
        image_ids: int32 [row tiles, POSITIVE + IGNORED, BM], as float32; `text_ids` [column tiles, POSITIVE + IGNORED,
            BN] likewise.
        pair: column of the first row's pair, the next row's beside it.
    """
    row_tile, column_tile = place(rows, columns, BM, BN, GROUP)
    row, column = row_tile * BM, column_tile * BN
    x = cosines(image, text, row, column, rows, columns, dim, BM, BN, BK, TMA, INTERPRETED)
    s, b = tl.load(scale) * LOG2E, tl.load(bias) * LOG2E
    own = pair_columns(row, pair, columns, BM)
    none = tl.zeros((BM, LANES), tl.float32)
    image_ids += row_tile * (POSITIVE + IGNORED) * BM - row
    text_ids += column_tile * (POSITIVE + IGNORED) * BN - column
    # Most tiles have no pair and no edge: they are spared the masks.
    if ((pair + row < column + BN) & (column < pair + row + BM)) | (column + BN > columns):
        w, loss, excess, cosine, slope = _part(
            x, none, none, none, none, row, column, own, s, b, image_ids, text_ids, columns, True, POSITIVE, IGNORED,
            SLOPES, BN, BM, BN, PARTS, LANES, INTERPRETED,
        )  # fmt: skip
    else:
        w, loss, excess, cosine, slope = _part(
            x, none, none, none, none, row, column, own, s, b, image_ids, text_ids, columns, False, POSITIVE, IGNORED,
            SLOPES, BN, BM, BN, PARTS, LANES, INTERPRETED,
        )  # fmt: skip
    if SLOPES:
        store(slopes, w, row, column, rows, stride, BM, BN, TMA)
    inside = row + tl.arange(0, BM) < rows
    at = sums + tl.program_id(0).to(tl.int64) * 3
    tl.store(at, tl.sum(tl.where(inside, tl.sum(loss + log1p(excess), 1), 0.0)) * LN2)
    tl.store(at + 1, tl.sum(tl.where(inside, tl.sum(cosine, 1), 0.0)))
    tl.store(at + 2, tl.sum(tl.where(inside, tl.sum(slope, 1), 0.0)))
