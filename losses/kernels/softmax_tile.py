"""Triton kernels: the log-sum-exp of a tile's rows and columns, and the slopes of cross entropies over them."""

import triton
import triton.language as tl

from medclip_lab.losses.kernels.tiles import (
    LN2,
    LOG2E,
    anchored,
    apart,
    cosines,
    halves,
    pair_columns,
    place,
    rounded,
    same,
    store,
    whole,
)

LEAST = tl.constexpr(2.0**-60)
"""A column's sum above it has lost less than its 2^-59th part to terms too small for float32."""


@triton.jit
def _sums_part(
    z,
    top,
    weight,
    row_sum,
    least,
    column,
    column_sums,
    columns,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Add the columns of z, -inf past the edge, to the sums over rows [BM, LANES], and write those over columns.

    One exponential serves both: that above the row's top, and times `weight` that above the tile's.
    """
    if PARTS > 1:
        left, right = halves(z, BM, BN)
        row_sum, least = _sums_part(
            left, top, weight, row_sum, least, column, column_sums, columns, BM, BN // 2, PARTS // 2, LANES, INTERPRETED
        )
        row_sum, least = _sums_part(
            right, top, weight, row_sum, least, column + BN // 2, column_sums, columns, BM, BN // 2, PARTS // 2, LANES,
            INTERPRETED,
        )  # fmt: skip
    else:
        c = column + tl.arange(0, BN)
        e = tl.exp2(z - top[:, None])
        row_sum += tl.sum(apart(e, BM, BN, LANES), 1)
        column_sum = tl.sum(e * weight[:, None], 0)
        tl.store(column_sums + c, column_sum, mask=c < columns)
        least = tl.minimum(least, tl.where(c < columns, column_sum, 1.0))
        row_sum = anchored(row_sum, INTERPRETED)
    return row_sum, least


@triton.jit
def _columns_part(
    z,
    column,
    column_tops,
    column_sums,
    columns,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Write the sums over columns of z, -inf past the edge, each above its own top."""
    if PARTS > 1:
        left, right = halves(z, BM, BN)
        _columns_part(left, column, column_tops, column_sums, columns, BM, BN // 2, PARTS // 2)
        _columns_part(right, column + BN // 2, column_tops, column_sums, columns, BM, BN // 2, PARTS // 2)
    else:
        c = column + tl.arange(0, BN)
        top = tl.max(z, 0)
        tl.store(column_tops + c, top, mask=c < columns)
        tl.store(column_sums + c, tl.sum(tl.exp2(z - top[None, :]), 0), mask=c < columns)


@triton.jit(do_not_specialize=["rows", "columns", "pair"])
def logsumexp_tile(
    image,
    text,
    row_tops,
    row_sums,
    column_tops,
    column_sums,
    own,
    scale,
    rows,
    columns,
    dim,
    pair,
    TMA: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Maximum and sum of the exponentials of a tile's rows, and of its columns, from one product.

    Args:
        image, text, pair: as for `sigmoid_tile`.
        row_tops, row_sums: float32 [column tiles, rows]: maxima in units of log 2, and sums of exp2 of what is above.
        column_tops, column_sums: float32 [row tiles, columns]; the tops are not always the maxima.
        own: float32 [tiles]: the sum over the pairs' logits.
    """
    row_tile, column_tile = place(rows, columns, BM, BN, GROUP)
    row, column = row_tile * BM, column_tile * BN
    x = cosines(image, text, row, column, rows, columns, dim, BM, BN, BK, TMA, INTERPRETED)
    r, c = row + tl.arange(0, BM), column + tl.arange(0, BN)
    inside = r < rows
    z = x * (tl.load(scale) * LOG2E)
    if column + BN > columns:
        z = anchored(tl.where((c < columns)[None, :], z, float("-inf")), INTERPRETED)
    sum_own = 0.0
    if (pair + row < column + BN) & (column < pair + row + BM):
        here = (c[None, :] == pair_columns(row, pair, columns, BM)[:, None]) & inside[:, None]
        sum_own = tl.sum(tl.sum(tl.where(here, z, 0.0), 1)) * LN2
    tl.store(own + tl.program_id(0), sum_own)

    top = tl.max(z, 1)
    tile_top = tl.max(tl.where(inside, top, float("-inf")), 0)
    weight = tl.where(inside, tl.exp2(top - tile_top), 0.0)
    column_at = row_tile.to(tl.int64) * columns
    row_at = column_tile.to(tl.int64) * rows + r
    tl.store(column_tops + column_at + c, tl.zeros((BN,), tl.float32) + tile_top, mask=c < columns)
    none, enough = tl.zeros((BM, LANES), tl.float32), tl.full((BN // PARTS,), 1.0, tl.float32)
    sums, least = _sums_part(
        z, top, weight, none, enough, column, column_sums + column_at, columns, BM, BN, PARTS, LANES, INTERPRETED
    )
    tl.store(row_tops + row_at, top, mask=inside)
    tl.store(row_sums + row_at, tl.sum(sums, 1), mask=inside)
    if tl.min(least, 0) < LEAST:  # a column far below the best pair of the tile
        # What was written above may be other threads': the barriers of the reductions stand between.
        z = tl.where(inside[:, None], z, float("-inf"))
        _columns_part(z, column, column_tops + column_at, column_sums + column_at, columns, BM, BN, BN // (2 * LANES))


@triton.jit(do_not_specialize=["tiles", "length"])
def combine_stats(tops, sums, top_out, sum_out, tiles, length, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """Maxima (float32 [length], in units of log 2) and sums above them (float64) of all tiles, STEP at a time.

    Args:
        tops, sums: float32 [tiles, length].
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    tile = tl.arange(0, STEP).to(tl.int64)
    step = STEP * length.to(tl.int64)
    place = tile[:, None] * length + at[None, :]
    top = tl.full((STEP, BLOCK), float("-inf"), tl.float32)
    for start in range(0, tiles, STEP):
        found = inside[None, :] & (start + tile < tiles)[:, None]
        top = tl.maximum(top, tl.load(tops + place, mask=found, other=float("-inf")))
        place += step
    highest = tl.max(top, 0)
    total = tl.zeros((STEP, BLOCK), tl.float64)
    place = tile[:, None] * length + at[None, :]
    for start in range(0, tiles, STEP):
        found = inside[None, :] & (start + tile < tiles)[:, None]
        above = tl.load(tops + place, mask=found, other=0.0) - highest[None, :]
        total += (tl.load(sums + place, mask=found, other=0.0) * tl.exp2(above)).to(tl.float64)
        place += step
    tl.store(top_out + at, highest, mask=inside)
    tl.store(sum_out + at, tl.sum(total, 0), mask=inside)


@triton.jit
def _similarity(image_values, text_values, r, c, rows, columns, K: tl.constexpr):
    """[BM, BN] products of label values [rows, K] and [columns, K], nearly in float32."""
    k = tl.arange(0, K)
    a = tl.load(image_values + r[:, None] * K + k[None, :], mask=(r < rows)[:, None], other=0.0)
    b = tl.load(text_values + c[None, :] * K + k[:, None], mask=(c < columns)[None, :], other=0.0)
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _part(
    x,
    wanted,
    cosine,
    row,
    column,
    pairs,
    scale,
    row_top,
    row_factor,
    column_tops,
    column_factors,
    target_image,
    target_text,
    image_stride,
    text_stride,
    target_rows,
    target_columns,
    own,
    spread,
    rows,
    columns,
    SPECIAL: tl.constexpr,
    TARGET: tl.constexpr,
    KINDS: tl.constexpr,
    SLOPES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Add the columns of x to the sums, [BM, LANES] each; slopes, if they are wanted.

    Args:
        SPECIAL: some columns may be past the edge, or where `pairs` [BM] stand.
    """
    if PARTS > 1:
        left, right = halves(x, BM, BN)
        left, wanted, cosine = _part(
            left, wanted, cosine, row, column, pairs, scale, row_top, row_factor, column_tops, column_factors,
            target_image, target_text, image_stride, text_stride, target_rows, target_columns, own, spread, rows,
            columns, SPECIAL, TARGET, KINDS, SLOPES, BM, BN // 2, PARTS // 2, LANES, INTERPRETED,
        )  # fmt: skip
        right, wanted, cosine = _part(
            right, wanted, cosine, row, column + BN // 2, pairs, scale, row_top, row_factor, column_tops,
            column_factors, target_image, target_text, image_stride, text_stride, target_rows, target_columns, own,
            spread, rows, columns, SPECIAL, TARGET, KINDS, SLOPES, BM, BN // 2, PARTS // 2, LANES, INTERPRETED,
        )  # fmt: skip
        w = whole(left, right, BM, BN) if SLOPES else left
    else:
        r, c = row + tl.arange(0, BM), column + tl.arange(0, BN)
        at = c
        if SPECIAL:
            at = tl.minimum(c, columns - 1)
            here = c[None, :] == pairs[:, None]
        if TARGET == 1:
            share = same(target_image, target_text, r, c, rows, columns, image_stride, text_stride, KINDS)
            if SPECIAL:
                share = share | here
            in_row = tl.load(target_rows + tl.minimum(r, rows - 1))
            target = tl.where(share, in_row[:, None] + tl.load(target_columns + at)[None, :], 0.0)
        if TARGET > 1:
            a = _similarity(target_image, target_text, r, c, rows, columns, KINDS)
            if TARGET == 3:
                # Where labels are ignored the norms are those of the labels both know: two more products.
                squares = _similarity(
                    target_image + image_stride, target_text + text_stride, r, c, rows, columns, KINDS
                ) * _similarity(
                    target_image + 2 * image_stride, target_text + 2 * text_stride, r, c, rows, columns, KINDS
                )
                a = a / tl.maximum(tl.sqrt(squares), 1e-12)
            # Tops and factors of the targets stand one after another.
            a = a * own
            row_at, column_at = target_rows + tl.minimum(r, rows - 1), target_columns + at
            target = tl.exp2(a - tl.load(row_at)[:, None]) * tl.load(row_at + rows)[:, None]
            target += tl.exp2(a - tl.load(column_at)[None, :]) * tl.load(column_at + columns)[None, :]
            if SPECIAL:
                target = tl.where((c < columns)[None, :], target, 0.0)
        if TARGET > 0:
            wanted = anchored(wanted + tl.sum(apart(target * x, BM, BN, LANES), 1), INTERPRETED)
        w = x
        if SLOPES:
            z = x * scale
            w = tl.exp2(z - row_top[:, None]) * row_factor[:, None]
            w += tl.exp2(z - tl.load(column_tops + at)[None, :]) * tl.load(column_factors + at)[None, :]
            if TARGET > 0:
                w -= target
            else:
                w -= spread
                if SPECIAL:
                    w = tl.where(here, w - own, w)
            if SPECIAL:
                w = tl.where((c < columns)[None, :], w, 0.0)
            cosine = anchored(cosine + tl.sum(apart(w * x, BM, BN, LANES), 1), INTERPRETED)
            w = rounded(w, INTERPRETED)
    return w, wanted, cosine


@triton.jit(do_not_specialize=["rows", "columns", "pair", "image_stride", "text_stride"])
def softmax_tile(
    image,
    text,
    slopes,
    sums,
    scale,
    row_tops,
    row_factors,
    column_tops,
    column_factors,
    target_image,
    target_text,
    image_stride,
    text_stride,
    target_rows,
    target_columns,
    own,
    spread,
    rows,
    columns,
    dim,
    pair,
    stride,
    TARGET: tl.constexpr,
    KINDS: tl.constexpr,
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
    """Slopes of two cross entropies whose softmaxes are exp2(z - top) * factor, z in units of log 2.

    Args:
        image, text, slopes, pair, stride: as for `sigmoid_tile`.
        sums: float32 [tiles, 2]: target times cosine (where TARGET is not 0), slope times cosine.
        row_tops, row_factors: float32 [rows]; `column_` likewise.
        TARGET: 0: `own` for pairs and `spread` for every pair. 1: the sum of `target_rows` [rows] and `target_columns`
            [columns] where ids are shared and for pairs, int32 ids [KINDS, ...] in `target_image` and `target_text`.
            2: two softmaxes of products of label values [rows, KINDS] and [columns, KINDS], float32, times `own`;
            their tops and factors stand in `target_rows` [2, rows] and `target_columns` [2, columns]. 3: the same, of
            products over the root of two further products, `image_stride` and `text_stride` apart.
    """
    row_tile, column_tile = place(rows, columns, BM, BN, GROUP)
    row, column = row_tile * BM, column_tile * BN
    x = cosines(image, text, row, column, rows, columns, dim, BM, BN, BK, TMA, INTERPRETED)
    r = row + tl.arange(0, BM)
    inside = r < rows
    # What rows past the edge add to nothing: their sums are left out, their slopes are not stored.
    row_top = tl.load(row_tops + r, mask=inside, other=0.0)
    row_factor = tl.load(row_factors + r, mask=inside, other=0.0)
    pairs = pair_columns(row, pair, columns, BM)
    none = tl.zeros((BM, LANES), tl.float32)
    s = tl.load(scale) * LOG2E
    # Most tiles have no pair and no edge: they are spared the masks.
    special = ((pair + row < column + BN) & (column < pair + row + BM)) | (column + BN > columns)
    if TARGET == 3 or special:
        w, wanted, cosine = _part(
            x, none, none, row, column, pairs, s, row_top, row_factor, column_tops, column_factors, target_image,
            target_text, image_stride, text_stride, target_rows, target_columns, own, spread, rows, columns, True,
            TARGET, KINDS, SLOPES, BM, BN, PARTS, LANES, INTERPRETED,
        )  # fmt: skip
    else:
        w, wanted, cosine = _part(
            x, none, none, row, column, pairs, s, row_top, row_factor, column_tops, column_factors, target_image,
            target_text, image_stride, text_stride, target_rows, target_columns, own, spread, rows, columns, False,
            TARGET, KINDS, SLOPES, BM, BN, PARTS, LANES, INTERPRETED,
        )  # fmt: skip
    if SLOPES:
        store(slopes, w, row, column, rows, stride, BM, BN, TMA)
    at = sums + tl.program_id(0).to(tl.int64) * 2
    tl.store(at, tl.sum(tl.where(inside, tl.sum(wanted, 1), 0.0)))
    tl.store(at + 1, tl.sum(tl.where(inside, tl.sum(cosine, 1), 0.0)))
