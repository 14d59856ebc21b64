"""Triton kernels: the log-sum-exp of a tile's rows and columns, and the slopes of cross entropies over them."""

import triton
import triton.language as tl

from medclip_lab.losses.kernels.label_tile import similarity
from medclip_lab.losses.kernels.tiles import (
    LN2,
    LOG2E,
    anchored,
    apart,
    cosines,
    halves,
    integers,
    looked_up,
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
        above = tl.load(tops + place, mask=found, other=float("-inf")) - highest[None, :]
        total += (tl.load(sums + place, mask=found, other=0.0) * tl.exp2(above)).to(tl.float64)
        place += step
    tl.store(top_out + at, highest, mask=inside)
    tl.store(sum_out + at, tl.sum(total, 0), mask=inside)


@triton.jit
def _part(
    x,
    wanted,
    cosine,
    agreement,
    row,
    column,
    pairs,
    scale,
    row_top,
    row_factor,
    row_values,
    column_values,
    image_labels,
    text_labels,
    image_stride,
    text_stride,
    width,
    table,
    own,
    spread,
    rows,
    columns,
    SPECIAL: tl.constexpr,
    TARGET: tl.constexpr,
    KINDS: tl.constexpr,
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
        row_values, column_values: where those of row 0 and of column 0 would stand, were they of this tile.
        SPECIAL: some columns may be past the edge, or where `pairs` [BM] stand.
        WIDE: columns of the tile.
    """
    if PARTS > 1:
        left, right = halves(x, BM, BN)
        left, wanted, cosine, agreement = _part(
            left, wanted, cosine, agreement, row, column, pairs, scale, row_top, row_factor, row_values, column_values,
            image_labels, text_labels, image_stride, text_stride, width, table, own, spread, rows, columns, SPECIAL,
            TARGET, KINDS, SLOPES, WIDE, BM, BN // 2, PARTS // 2, LANES, INTERPRETED,
        )  # fmt: skip
        right, wanted, cosine, agreement = _part(
            right, wanted, cosine, agreement, row, column + BN // 2, pairs, scale, row_top, row_factor, row_values,
            column_values, image_labels, text_labels, image_stride, text_stride, width, table, own, spread, rows,
            columns, SPECIAL, TARGET, KINDS, SLOPES, WIDE, BM, BN // 2, PARTS // 2, LANES, INTERPRETED,
        )  # fmt: skip
        w = whole(left, right, BM, BN) if SLOPES else left
    else:
        r, c = row + tl.arange(0, BM), column + tl.arange(0, BN)
        row_at, column_at = row_values + r, column_values + c
        if SPECIAL:
            here = c[None, :] == pairs[:, None]
        if TARGET == 1:
            share = same(row_at + 3 * BM, column_at + 3 * WIDE, BM, WIDE, KINDS)
            if SPECIAL:
                share = share | here
            even = tl.load(row_at + 2 * BM)[:, None] + tl.load(column_at + 2 * WIDE)[None, :]
            target = tl.where(share, even, 0.0)
        if TARGET == 2:
            place = integers(row_at + 2 * BM)[:, None] + integers(column_at + 2 * WIDE)[None, :]
            target = looked_up(table, place, x, INTERPRETED)
        if TARGET > 2:
            a = own * similarity(
                image_labels, text_labels, image_stride, text_stride, r, c, rows, columns, width, TARGET == 4, BM, BN
            )
            target = _softmaxes(a, row_at + 2 * BM, column_at + 2 * WIDE, BM, WIDE)
            agreement = anchored(agreement + tl.sum(apart(target * a, BM, BN, LANES), 1), INTERPRETED)
        if TARGET > 0 and SPECIAL:
            target = tl.where((c < columns)[None, :], target, 0.0)
        if TARGET > 0:
            wanted = anchored(wanted + tl.sum(apart(target * x, BM, BN, LANES), 1), INTERPRETED)
        w = x
        if SLOPES:
            z = x * scale
            w = tl.exp2(z - row_top[:, None]) * row_factor[:, None]
            w += tl.exp2(z - tl.load(column_at)[None, :]) * tl.load(column_at + WIDE)[None, :]
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
    return w, wanted, cosine, agreement


@triton.jit
def _softmaxes(z, row_at, column_at, BM: tl.constexpr, WIDE: tl.constexpr):
    """The softmax over the columns and the one over the rows; their tops at these places, the factors behind."""
    by_row = tl.exp2(z - tl.load(row_at)[:, None]) * tl.load(row_at + BM)[:, None]
    return by_row + tl.exp2(z - tl.load(column_at)[None, :]) * tl.load(column_at + WIDE)[None, :]


@triton.jit(do_not_specialize=["rows", "columns", "pair", "image_stride", "text_stride"])
def softmax_tile(
    image,
    text,
    slopes,
    sums,
    scale,
    row_values,
    column_values,
    image_labels,
    text_labels,
    image_stride,
    text_stride,
    width,
    table,
    own,
    spread,
    rows,
    columns,
    dim,
    pair,
    stride,
    TARGET: tl.constexpr,
    KINDS: tl.constexpr,
    VALUES: tl.constexpr,
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
        sums: float32 [tiles, 3]: target times cosine (unless TARGET is 0), slope times cosine, target times similarity
            of labels (where TARGET is 3 or 4).
        row_values: float32 [row tiles, VALUES, BM]: tops, factors, and what TARGET says; `column_values` [column tiles,
            VALUES, BN] likewise.
        TARGET: 0: `own` for pairs and `spread` for every pair. 1: the sum of the third values where one of KINDS ids is
            shared, the int32 behind them, and for pairs. 2: the float32 in `table`, as many bytes from its start as the
            third values, int32, add up to. 3: two softmaxes of products of the labels [rows, width] and [columns,
            width], float32, times `own`; their tops and factors are the third and fourth values. 4: the same, of
            products over the root of two further products, `image_stride` and `text_stride` apart.
    """
    row_tile, column_tile = place(rows, columns, BM, BN, GROUP)
    row, column = row_tile * BM, column_tile * BN
    x = cosines(image, text, row, column, rows, columns, dim, BM, BN, BK, TMA, INTERPRETED)
    pairs = pair_columns(row, pair, columns, BM)
    none = tl.zeros((BM, LANES), tl.float32)
    s = tl.load(scale) * LOG2E
    row_values += row_tile * VALUES * BM - row
    column_values += column_tile * VALUES * BN - column
    r = row + tl.arange(0, BM)
    row_top = tl.load(row_values + r)
    row_factor = tl.load(row_values + BM + r)
    # Most tiles have no pair and no edge and are spared the masks; labels know nothing of pairs.
    special = column + BN > columns
    if TARGET < 2:
        special = special | ((pair + row < column + BN) & (column < pair + row + BM))
    if TARGET > 2 or special:  # beside what labels cost the masks are little, and one way takes fewer registers
        w, wanted, cosine, agreement = _part(
            x, none, none, none, row, column, pairs, s, row_top, row_factor, row_values, column_values, image_labels,
            text_labels, image_stride, text_stride, width, table, own, spread, rows, columns, True, TARGET, KINDS,
            SLOPES, BN, BM, BN, PARTS, LANES, INTERPRETED,
        )  # fmt: skip
    else:
        w, wanted, cosine, agreement = _part(
            x, none, none, none, row, column, pairs, s, row_top, row_factor, row_values, column_values, image_labels,
            text_labels, image_stride, text_stride, width, table, own, spread, rows, columns, False, TARGET, KINDS,
            SLOPES, BN, BM, BN, PARTS, LANES, INTERPRETED,
        )  # fmt: skip
    if SLOPES:
        store(slopes, w, row, column, rows, stride, BM, BN, TMA)
    inside = row + tl.arange(0, BM) < rows
    at = sums + tl.program_id(0).to(tl.int64) * 3
    tl.store(at, tl.sum(tl.where(inside, tl.sum(wanted, 1), 0.0)))
    tl.store(at + 1, tl.sum(tl.where(inside, tl.sum(cosine, 1), 0.0)))
    tl.store(at + 2, tl.sum(tl.where(inside, tl.sum(agreement, 1), 0.0)))
