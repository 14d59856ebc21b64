"""Triton kernels: similarities of label vectors, and their log-sum-exp."""

import triton
import triton.language as tl

from medclip_lab.losses.kernels.tiles import place


@triton.jit
def _products(image_labels, text_labels, r, c, rows, columns, width, BM: tl.constexpr, BN: tl.constexpr):
    """[BM, BN] products, nearly in float32; 0 past the edge."""
    k = tl.arange(0, 16)
    a_at = image_labels + r.to(tl.int64)[:, None] * width + k[None, :]
    b_at = text_labels + c.to(tl.int64)[None, :] * width + k[:, None]
    out = tl.zeros((BM, BN), tl.float32)
    for _ in tl.range(0, width, 16, num_stages=1):
        a = tl.load(a_at, mask=(r < rows)[:, None], other=0.0)
        b = tl.load(b_at, mask=(c < columns)[None, :], other=0.0)
        out = tl.dot(a, b, out, input_precision="tf32x3")
        a_at += 16
        b_at += 16
    return out


@triton.jit
def similarity(
    image_labels,
    text_labels,
    image_stride,
    text_stride,
    r,
    c,
    rows,
    columns,
    width,
    NORMS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """[BM, BN] products of labels, float32 [rows, width] and [columns, width]; 0 past the edge.

    Args:
        width: a multiple of 16.
        NORMS: where labels are ignored the norms are those of the labels both know: over the root of two more products,
            `image_stride` and `text_stride` apart.
    """
    a = _products(image_labels, text_labels, r, c, rows, columns, width, BM, BN)
    if NORMS:
        image_labels, text_labels = image_labels + image_stride, text_labels + text_stride
        norms = _products(image_labels, text_labels, r, c, rows, columns, width, BM, BN)
        image_labels, text_labels = image_labels + image_stride, text_labels + text_stride
        norms *= _products(image_labels, text_labels, r, c, rows, columns, width, BM, BN)
        a = a / tl.maximum(tl.sqrt(norms), 1e-12)
    return a


@triton.jit(do_not_specialize=["rows", "columns", "image_stride", "text_stride"])
def label_logsumexp_tile(
    image_labels,
    text_labels,
    image_stride,
    text_stride,
    image_counts,
    text_counts,
    row_tops,
    row_sums,
    column_tops,
    column_sums,
    factor,
    rows,
    columns,
    width,
    NORMS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Maximum and sum of the exponentials of a tile's rows and of its columns, in units of log 2.

    Args:
        image_labels, text_labels, image_stride, text_stride, width, NORMS: as for `similarity`.
        image_counts, text_counts: float32 [rows] and [columns]: how many rows and columns each stands for.
        row_tops, row_sums: float32 [column tiles, rows]; `column_` float32 [row tiles, columns].
        factor: stands before the similarity.
    """
    row_tile, column_tile = place(rows, columns, BM, BN, GROUP)
    r, c = row_tile * BM + tl.arange(0, BM), column_tile * BN + tl.arange(0, BN)
    in_rows, in_columns = r < rows, c < columns
    a = similarity(image_labels, text_labels, image_stride, text_stride, r, c, rows, columns, width, NORMS, BM, BN)
    a *= factor
    row_at, column_at = column_tile.to(tl.int64) * rows + r, row_tile.to(tl.int64) * columns + c

    z = tl.where(in_columns[None, :], a, float("-inf"))
    top = tl.max(z, 1)
    many = tl.load(text_counts + c, mask=in_columns, other=0.0)
    tl.store(row_tops + row_at, top, mask=in_rows)
    tl.store(row_sums + row_at, tl.sum(tl.exp2(z - top[:, None]) * many[None, :], 1), mask=in_rows)

    z = tl.where(in_rows[:, None], a, float("-inf"))
    top = tl.max(z, 0)
    many = tl.load(image_counts + r, mask=in_rows, other=0.0)
    tl.store(column_tops + column_at, top, mask=in_columns)
    tl.store(column_sums + column_at, tl.sum(tl.exp2(z - top[None, :]) * many[:, None], 0), mask=in_columns)
