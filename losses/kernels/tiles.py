"""Triton kernels over tiles of pairs: what the kinds of tile share.

A program forms the cosines [BM, BN] of a tile, turns them into what the loss wants in registers, some columns at a time
so that nothing spills, and writes the slopes in 16 bits and its sums to a place of its own: no atomics, the same bits
every time. Logits are in units of log 2, as the hardware's exponential is that of 2.

Nothing overlaps the epilogue of a tile within its program, so what it does for every pair counts: sums over columns
stay with the threads that hold them until the last part, masks and pairs cost something only in tiles that have any.

On sm_90 tiles are loaded and stored through tensor descriptors (TMA), on older GPUs through pointers. Sizes that change
from batch to batch are not specialized on: a ragged last batch compiles nothing.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def product(a, b):
    """a + b + ab: log1p of a reduction by it is the sum of the log1p, one logarithm for many terms.

    Written so that 1 + b is what the caller has already.
    """
    return b + a * (1.0 + b)


@triton.jit
def apart(x, BM: tl.constexpr, BN: tl.constexpr, LANES: tl.constexpr):
    """[BM, BN / LANES, LANES]: a reduction over the second axis stays within a thread.

    Args:
        LANES: threads that share a row: each holds 2 columns of every 2 * LANES.
    """
    neighbours = tl.reshape(x, (BM, BN // (2 * LANES), LANES, 2))
    return tl.reshape(tl.permute(neighbours, (0, 1, 3, 2)), (BM, BN // LANES, LANES))


@triton.jit
def log1p(q):
    """log(1 + q) in units of log 2 that keeps small q, without a precise routine for every term."""
    small = q - q * q * (0.5 - q * (1.0 / 3.0))
    return tl.where(q < 2e-3, small * LOG2E, tl.log2(1.0 + q))


@triton.jit
def reciprocal(x, INTERPRETED: tl.constexpr):
    """1 / x to 1 ulp in one instruction; a correctly rounded division takes eight."""
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def place(rows, columns, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Row tile and column tile of this program: in groups of rows, so that the columns they share are still cached."""
    tile = tl.program_id(0)
    row_tiles, column_tiles = tl.cdiv(rows, BM), tl.cdiv(columns, BN)
    in_group = GROUP * column_tiles
    group = tile // in_group
    height = tl.minimum(row_tiles - group * GROUP, GROUP)
    return group * GROUP + (tile % in_group) % height, (tile % in_group) // height


@triton.jit
def cosines(
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
def halves(x, BM: tl.constexpr, BN: tl.constexpr):
    """Left and right half of the columns; in registers."""
    return tl.split(tl.reshape(x, (BM, 2, BN // 2)).permute(0, 2, 1))


@triton.jit
def whole(left, right, BM: tl.constexpr, BN: tl.constexpr):
    """The columns of which these are the halves; in registers."""
    return tl.reshape(tl.join(left, right).permute(0, 2, 1), (BM, BN))


@triton.jit
def pair_columns(row, pair, columns, BM: tl.constexpr):
    """[BM] columns where the pairs of the rows stand; -1 where that is past the edge."""
    own = pair + row + tl.arange(0, BM)
    return tl.where(own < columns, own, -1)


@triton.jit
def integers(at):
    """int32 that stand among float32."""
    return tl.load(at).to(tl.int32, bitcast=True)


@triton.jit
def same(row_at, column_at, ROW_STEP: tl.constexpr, COLUMN_STEP: tl.constexpr, KINDS: tl.constexpr):
    """Which pairs share an id of one kind at least; those that are no group are never equal.

    Args:
        row_at, column_at: places [BM] and [BN] of the first kind, the next kinds a step behind.
    """
    found = integers(row_at)[:, None] == integers(column_at)[None, :]
    for kind in tl.static_range(1, KINDS):
        own, other = integers(row_at + kind * ROW_STEP), integers(column_at + kind * COLUMN_STEP)
        found = found | (own[:, None] == other[None, :])
    return found


@triton.jit
def looked_up(table, at, x, INTERPRETED: tl.constexpr):
    """Elements of a float32 table, `at` in bytes, where the products x are.

    An ordinary load would be made by other threads, and what it finds moved to those of x through shared memory.
    """
    if INTERPRETED:
        return tl.load(table + at // 4)
    base = table.to(tl.int64)
    return tl.inline_asm_elementwise(
        "{ .reg .u64 at; cvt.u64.u32 at, $2; add.u64 at, at, $1; ld.global.nc.f32 $0, [at]; }",
        "=f,l,r,f",
        [base, at, x],
        dtype=tl.float32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def rounded(w, INTERPRETED: tl.constexpr):
    """Slopes as they are stored."""
    if INTERPRETED:  # the interpreter would cut bits off where the hardware rounds
        return w
    # Not pure: at once, or the compiler would keep float32 until the store.
    return tl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [w], dtype=tl.bfloat16, is_pure=False, pack=2
    )


@triton.jit
def store(
    slopes,
    w,
    row,
    column,
    rows,
    stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TMA: tl.constexpr,
):
    """Slopes to their place in the chunk, cut at its edge."""
    if TMA:
        slopes.store([row, column], w)
    else:
        r, c = row + tl.arange(0, BM), column + tl.arange(0, BN)
        at = slopes + r.to(tl.int64)[:, None] * stride + c[None, :]
        # Rows are as long as their stride, which vector stores can rely on: what is past the edge is 0.
        tl.store(at, w, mask=(r < rows)[:, None] & (c < stride)[None, :])


@triton.jit
def anchored(x, INTERPRETED: tl.constexpr):
    """x, formed here and not where it is next used: the compiler would keep all it is the sum of until then."""
    if INTERPRETED:
        return x
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1)
