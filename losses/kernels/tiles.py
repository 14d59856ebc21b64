"""Triton kernels over tiles of pairs: a product of features whose epilogue keeps the pairs in registers.

A program forms the cosines [BM, BN] of a tile, turns them into what the loss wants, some columns at a time so that
nothing spills, and writes the slopes in 16 bits and its sums to a place of its own: no atomics, the same bits every
time. Logits are in units of log 2, as the hardware's exponential is that of 2.

On sm_90 tiles are loaded and stored through tensor descriptors (TMA), on older GPUs through pointers. Sizes that change
from batch to batch are not specialized on: a ragged last batch compiles nothing.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _product(a, b):
    """a + b + ab: log1p of a reduction by it is the sum of the log1p, one logarithm for many terms."""
    return a + b + a * b


@triton.jit
def _log1p(q):
    """log(1 + q) in units of log 2 that keeps small q, without a precise routine for every term."""
    small = q - q * q * (0.5 - q * (1.0 / 3.0))
    return tl.where(q < 2e-3, small * LOG2E, tl.log2(1.0 + q))


@triton.jit
def _reciprocal(x, INTERPRETED: tl.constexpr):
    """1 / x to 1 ulp in one instruction; a correctly rounded division takes eight."""
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _tile(rows, columns, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Row tile and column tile of this program: in groups of rows, so that the columns they share are still cached."""
    tile = tl.program_id(0)
    row_tiles, column_tiles = tl.cdiv(rows, BM), tl.cdiv(columns, BN)
    in_group = GROUP * column_tiles
    group = tile // in_group
    height = tl.minimum(row_tiles - group * GROUP, GROUP)
    return group * GROUP + (tile % in_group) % height, (tile % in_group) // height


@triton.jit
def _cosines(
    image,
    text,
    row,
    column,
    rows,
    columns,
    dim,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """[BM, BN] products of the rows from `row` on and the columns from `column` on; past the edge they mean nothing."""
    x = tl.zeros((BM, BN), tl.float32)
    if TMA:
        for k in range(0, dim, BK):
            a = image.load([row, k])
            b = text.load([column, k])
            if INTERPRETED:  # the interpreter would multiply the bits of bfloat16
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            x = tl.dot(a, b.T, x)
    else:
        k = tl.arange(0, BK)
        # Past the edge the first rows are read again: cheaper than a mask in the loop.
        r = ((row + tl.arange(0, BM)) % rows).to(tl.int64)
        c = ((column + tl.arange(0, BN)) % columns).to(tl.int64)
        a_at = image + r[:, None] * dim + k[None, :]
        b_at = text + c[None, :] * dim + k[:, None]
        for start in range(0, dim, BK):
            inside = start + k < dim
            a = tl.load(a_at, mask=inside[None, :], other=0.0)
            b = tl.load(b_at, mask=inside[:, None], other=0.0)
            if INTERPRETED:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            x = tl.dot(a, b, x)
            a_at += BK
            b_at += BK
    return x


@triton.jit
def _halves(x, BM: tl.constexpr, BN: tl.constexpr):
    """Left and right half of the columns; in registers."""
    return tl.split(tl.reshape(x, (BM, 2, BN // 2)).permute(0, 2, 1))


@triton.jit
def _same(image_ids, text_ids, r, c, rows, columns, image_stride, text_stride, KINDS: tl.constexpr):
    """Which pairs share an id of one kind at least; ids int32 [KINDS, ...], those that are no group never equal."""
    same = r[:, None] < 0
    for kind in tl.static_range(KINDS):
        own = tl.load(image_ids + kind * image_stride + r, mask=r < rows, other=-1)
        other = tl.load(text_ids + kind * text_stride + c, mask=c < columns, other=-2)
        same = same | (own[:, None] == other[None, :])
    return same


@triton.jit
def _store(
    slopes,
    w,
    row,
    column,
    rows,
    columns,
    stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TMA: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Slopes to their place in the chunk, cut at its edge."""
    if not INTERPRETED:  # the interpreter would cut bits off where the hardware rounds
        w = w.to(tl.bfloat16)
    if TMA:
        slopes.store([row, column], w)
    else:
        r, c = row + tl.arange(0, BM), column + tl.arange(0, BN)
        at = slopes + r.to(tl.int64)[:, None] * stride + c[None, :]
        tl.store(at, w, mask=(r < rows)[:, None] & (c < columns)[None, :])


@triton.jit
def _sigmoid_part(
    x,
    loss,
    cosine,
    slope,
    row,
    column,
    scale,
    bias,
    slopes,
    positive_image,
    positive_text,
    ignored_image,
    ignored_text,
    image_stride,
    text_stride,
    rows,
    columns,
    pair,
    stride,
    POSITIVE: tl.constexpr,
    IGNORED: tl.constexpr,
    SLOPES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PARTS: tl.constexpr,
    TMA: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Add the columns of x to the sums over rows, [BM] each."""
    if PARTS > 1:
        left, right = _halves(x, BM, BN)
        loss, cosine, slope = _sigmoid_part(
            left, loss, cosine, slope, row, column, scale, bias, slopes, positive_image, positive_text, ignored_image,
            ignored_text, image_stride, text_stride, rows, columns, pair, stride, POSITIVE, IGNORED, SLOPES, BM,
            BN // 2, PARTS // 2, TMA, INTERPRETED,
        )  # fmt: skip
        loss, cosine, slope = _sigmoid_part(
            right, loss, cosine, slope, row, column + BN // 2, scale, bias, slopes, positive_image, positive_text,
            ignored_image, ignored_text, image_stride, text_stride, rows, columns, pair, stride, POSITIVE, IGNORED,
            SLOPES, BM, BN // 2, PARTS // 2, TMA, INTERPRETED,
        )  # fmt: skip
    else:
        r, c = row + tl.arange(0, BM), column + tl.arange(0, BN)
        inside = (r < rows)[:, None] & (c < columns)[None, :]
        positive = c[None, :] == (pair + r)[:, None]
        if POSITIVE > 0:
            positive = positive | _same(
                positive_image, positive_text, r, c, rows, columns, image_stride, text_stride, POSITIVE
            )
        if IGNORED > 0:
            ignored = _same(ignored_image, ignored_text, r, c, rows, columns, image_stride, text_stride, IGNORED)
            inside = inside & (positive | (ignored == 0))
        z = x * scale + bias
        # -log sigmoid(-z) of a negative, -log sigmoid(z) of a positive: softplus after the sign is turned.
        z = tl.where(positive, -z, z)
        e = tl.where(inside, tl.exp2(-tl.abs(z)), 0.0)
        above = tl.where(inside, tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL), 0.0)
        # At most 64 factors of at most 2 each: no overflow.
        loss += tl.sum(above, 1) + _log1p(tl.reduce(e, 1, _product))
        if SLOPES:
            # sigmoid, and sigmoid - 1 of a positive formed as -sigmoid(-z) to keep its digits.
            w = tl.where(z >= 0, 1.0, e) * _reciprocal(1.0 + e, INTERPRETED)
            w = tl.where(inside, tl.where(positive, -w, w), 0.0)
            cosine += tl.sum(w * x, 1)
            slope += tl.sum(w, 1)
            _store(slopes, w, row, column, rows, columns, stride, BM, BN, TMA, INTERPRETED)
    return loss, cosine, slope


@triton.jit(do_not_specialize=["rows", "columns", "pair", "image_stride", "text_stride"])
def sigmoid_tile(
    image,
    text,
    slopes,
    sums,
    scale,
    bias,
    positive_image,
    positive_text,
    ignored_image,
    ignored_text,
    image_stride,
    text_stride,
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
    GROUP: tl.constexpr,
):
    """The pairwise sigmoid loss of a tile and its slopes.

    Args:
        image, text: [rows, dim] and [columns, dim], as descriptors of blocks [BM, BK] and [BN, BK], or contiguous.
        slopes: bfloat16 [rows, columns], as a descriptor of blocks [BM, BN / PARTS], or with rows `stride` apart.
        sums: float32 [tiles, 3]: loss, slope times cosine, slope.
        positive_image, positive_text: int32 ids [POSITIVE, rows] and [POSITIVE, columns], kinds `image_stride` and
            `text_stride` apart; `ignored_` likewise.
        pair: column of the first row's pair, the next row's beside it.
    """
    row_tile, column_tile = _tile(rows, columns, BM, BN, GROUP)
    row, column = row_tile * BM, column_tile * BN
    x = _cosines(image, text, row, column, rows, columns, dim, BM, BN, BK, TMA, INTERPRETED)
    s, b = tl.load(scale) * LOG2E, tl.load(bias) * LOG2E
    loss = tl.zeros((BM,), tl.float32)
    cosine = tl.zeros((BM,), tl.float32)
    slope = tl.zeros((BM,), tl.float32)
    loss, cosine, slope = _sigmoid_part(
        x, loss, cosine, slope, row, column, s, b, slopes, positive_image, positive_text, ignored_image, ignored_text,
        image_stride, text_stride, rows, columns, pair, stride, POSITIVE, IGNORED, SLOPES, BM, BN, PARTS, TMA,
        INTERPRETED,
    )  # fmt: skip
    at = sums + tl.program_id(0).to(tl.int64) * 3
    tl.store(at, tl.sum(loss) * LN2)
    tl.store(at + 1, tl.sum(cosine))
    tl.store(at + 2, tl.sum(slope))


@triton.jit
def _columns_part(
    z,
    row_top,
    row_sum,
    row,
    column,
    column_tops,
    column_sums,
    columns,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Add the columns of z, -inf past the edge, to the sums over rows, and write those over columns."""
    if PARTS > 1:
        left, right = _halves(z, BM, BN)
        row_sum = _columns_part(
            left, row_top, row_sum, row, column, column_tops, column_sums, columns, BM, BN // 2, PARTS // 2
        )
        row_sum = _columns_part(
            right, row_top, row_sum, row, column + BN // 2, column_tops, column_sums, columns, BM, BN // 2, PARTS // 2
        )
    else:
        c = column + tl.arange(0, BN)
        top = tl.max(z, 0)
        row_sum += tl.sum(tl.exp2(z - row_top[:, None]), 1)
        tl.store(column_tops + c, top, mask=c < columns)
        tl.store(column_sums + c, tl.sum(tl.exp2(z - top[None, :]), 0), mask=c < columns)
    return row_sum


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
    GROUP: tl.constexpr,
):
    """Maximum and sum of the exponentials of a tile's rows, and of its columns, from one product.

    Args:
        image, text, pair: as for `sigmoid_tile`.
        row_tops, row_sums: float32 [column tiles, rows]: maxima in units of log 2, and sums of exp2 of what is above.
        column_tops, column_sums: float32 [row tiles, columns].
        own: float32 [tiles]: the sum over the pairs' logits.
    """
    row_tile, column_tile = _tile(rows, columns, BM, BN, GROUP)
    row, column = row_tile * BM, column_tile * BN
    x = _cosines(image, text, row, column, rows, columns, dim, BM, BN, BK, TMA, INTERPRETED)
    r, c = row + tl.arange(0, BM), column + tl.arange(0, BN)
    z = tl.where((r < rows)[:, None] & (c < columns)[None, :], x * (tl.load(scale) * LOG2E), float("-inf"))
    here = (c[None, :] == (pair + r)[:, None]) & (r < rows)[:, None] & (c < columns)[None, :]
    tl.store(own + tl.program_id(0), tl.sum(tl.sum(tl.where(here, z, 0.0), 1)) * LN2)
    top = tl.max(z, 1)
    column_at = row_tile.to(tl.int64) * columns
    row_at = column_tile.to(tl.int64) * rows + r
    sums = _columns_part(
        z, top, tl.zeros((BM,), tl.float32), row, column, column_tops + column_at, column_sums + column_at, columns, BM,
        BN, PARTS,
    )  # fmt: skip
    tl.store(row_tops + row_at, top, mask=r < rows)
    tl.store(row_sums + row_at, sums, mask=r < rows)


@triton.jit(do_not_specialize=["tiles", "length"])
def combine_stats(tops, sums, top_out, sum_out, tiles, length, BLOCK: tl.constexpr):
    """Maxima (float32 [length], in units of log 2) and sums above them (float64) of all tiles.

    Args:
        tops, sums: float32 [tiles, length].
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    place = tops + at
    for _ in range(tiles):
        top = tl.maximum(top, tl.load(place, mask=inside, other=float("-inf")))
        place += length
    total = tl.zeros((BLOCK,), tl.float64)
    place = tops + at
    sum_place = sums + at
    for _ in range(tiles):
        above = tl.load(place, mask=inside, other=0.0) - top
        total += (tl.load(sum_place, mask=inside, other=0.0) * tl.exp2(above)).to(tl.float64)
        place += length
        sum_place += length
    tl.store(top_out + at, top, mask=inside)
    tl.store(sum_out + at, total, mask=inside)


@triton.jit
def _similarity(image_values, text_values, r, c, rows, columns, K: tl.constexpr):
    """[BM, BN] products of label values [rows, K] and [columns, K], nearly in float32."""
    k = tl.arange(0, K)
    a = tl.load(image_values + r[:, None] * K + k[None, :], mask=(r < rows)[:, None], other=0.0)
    b = tl.load(text_values + c[None, :] * K + k[:, None], mask=(c < columns)[None, :], other=0.0)
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _softmax_part(
    x,
    wanted,
    cosine,
    row,
    column,
    scale,
    row_tops,
    row_factors,
    column_tops,
    column_factors,
    slopes,
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
    pair,
    stride,
    TARGET: tl.constexpr,
    KINDS: tl.constexpr,
    SLOPES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PARTS: tl.constexpr,
    TMA: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Add the columns of x to the sums over rows, [BM] each."""
    if PARTS > 1:
        left, right = _halves(x, BM, BN)
        wanted, cosine = _softmax_part(
            left, wanted, cosine, row, column, scale, row_tops, row_factors, column_tops, column_factors, slopes,
            target_image, target_text, image_stride, text_stride, target_rows, target_columns, own, spread, rows,
            columns, pair, stride, TARGET, KINDS, SLOPES, BM, BN // 2, PARTS // 2, TMA, INTERPRETED,
        )  # fmt: skip
        wanted, cosine = _softmax_part(
            right, wanted, cosine, row, column + BN // 2, scale, row_tops, row_factors, column_tops, column_factors,
            slopes, target_image, target_text, image_stride, text_stride, target_rows, target_columns, own, spread,
            rows, columns, pair, stride, TARGET, KINDS, SLOPES, BM, BN // 2, PARTS // 2, TMA, INTERPRETED,
        )  # fmt: skip
    else:
        r, c = row + tl.arange(0, BM), column + tl.arange(0, BN)
        in_rows, in_columns = r < rows, c < columns
        inside = in_rows[:, None] & in_columns[None, :]
        here = c[None, :] == (pair + r)[:, None]
        if TARGET == 0:
            target = tl.where(here, own + spread, spread)
        elif TARGET == 1:
            same = here | _same(target_image, target_text, r, c, rows, columns, image_stride, text_stride, KINDS)
            in_row = tl.load(target_rows + r, mask=in_rows, other=0.0)
            in_column = tl.load(target_columns + c, mask=in_columns, other=0.0)
            target = tl.where(same, in_row[:, None] + in_column[None, :], 0.0)
        else:
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
            row_at, column_at = target_rows + r, target_columns + c
            target = tl.exp2(a - tl.load(row_at, mask=in_rows, other=0.0)[:, None])
            target = target * tl.load(row_at + rows, mask=in_rows, other=0.0)[:, None]
            other = tl.exp2(a - tl.load(column_at, mask=in_columns, other=0.0)[None, :])
            target += other * tl.load(column_at + columns, mask=in_columns, other=0.0)[None, :]
        if TARGET > 0:
            wanted += tl.sum(tl.where(inside, target * x, 0.0), 1)
        if SLOPES:
            z = x * scale
            row_top, row_factor = tl.load(row_tops + r, mask=in_rows, other=0.0), row_factors + r
            column_top, column_factor = tl.load(column_tops + c, mask=in_columns, other=0.0), column_factors + c
            w = tl.exp2(z - row_top[:, None]) * tl.load(row_factor, mask=in_rows, other=0.0)[:, None] - target
            w += tl.exp2(z - column_top[None, :]) * tl.load(column_factor, mask=in_columns, other=0.0)[None, :]
            w = tl.where(inside, w, 0.0)
            cosine += tl.sum(w * x, 1)
            _store(slopes, w, row, column, rows, columns, stride, BM, BN, TMA, INTERPRETED)
    return wanted, cosine


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
    row_tile, column_tile = _tile(rows, columns, BM, BN, GROUP)
    row, column = row_tile * BM, column_tile * BN
    x = _cosines(image, text, row, column, rows, columns, dim, BM, BN, BK, TMA, INTERPRETED)
    wanted, cosine = _softmax_part(
        x, tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32), row, column, tl.load(scale) * LOG2E, row_tops,
        row_factors, column_tops, column_factors, slopes, target_image, target_text, image_stride, text_stride,
        target_rows, target_columns, own, spread, rows, columns, pair, stride, TARGET, KINDS, SLOPES, BM, BN, PARTS,
        TMA, INTERPRETED,
    )  # fmt: skip
    at = sums + tl.program_id(0).to(tl.int64) * 2
    tl.store(at, tl.sum(wanted))
    tl.store(at + 1, tl.sum(cosine))
