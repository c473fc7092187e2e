"""Scores themselves, and searches through them.

A score and the index of its candidate become one integer whose order is that of a search: best first, NaN before all,
ties to the lower index. So the library's own integer maximum and top-k do the rest, exactly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from smartclip_kernels.backends.triton import similarity, tile

NONE = tl.constexpr(-(2**63))  # worse than every key


@triton.jit
def _keys(sim, index):
    """int64: above, the bits of sim in the order of numbers; below, the candidate, the lower the better."""
    bits = (sim + 0.0).to(tl.int32, bitcast=True)  # −0 becomes 0
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = tl.where(sim == sim, ordered, 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def scores(
    rows,
    columns,
    row_stride,
    column_stride,
    row_id,
    column_id,
    row_factor,
    column_factor,
    out,
    best,
    out_stride_n,
    out_stride_m,
    n,
    m,
    d,
    start,
    WHAT: tl.constexpr,
    PER_TEXT: tl.constexpr,
    SIMILARITY: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One of four things of a tile, as WHAT says. Candidates are counted from `start`.

    "sim" and "keys": all of them into `out`, by its strides. "positive": the best key of each anchor's positives, and
    "ahead": how many keys of each anchor are better than its `best`; into `out` (blocks of candidates, anchors).
    """
    row_block, column_block = tile.block_of_program(n, m, BLOCK_N, BLOCK_M, GROUP)
    i, i_inside = tile.indices(row_block, n, BLOCK_N)
    j, j_inside = tile.indices(column_block, m, BLOCK_M)
    (a,), (b,) = tile.products(
        rows, columns, i, j, n, m, d, row_stride, column_stride,
        SIMILARITY, SPLIT, EVEN, WIDEN, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D, 1,
    )  # fmt: skip
    row, column = tile.factors(row_factor, column_factor, i, j, n, m, SIMILARITY)
    sim = similarity.value(SIMILARITY, a, b, row, column)
    inside = i_inside[:, None] & j_inside[None, :]
    at = out + i.to(tl.int64)[:, None] * out_stride_n + j.to(tl.int64)[None, :] * out_stride_m
    if WHAT == "sim":
        tl.store(at, sim, mask=inside)
    else:
        axis: tl.constexpr = 0 if PER_TEXT else 1
        candidate = start + (i[:, None] if PER_TEXT else j[None, :])
        keys = _keys(sim, candidate)
        if WHAT == "keys":
            tl.store(at, keys, mask=inside)
        else:
            anchor = j if PER_TEXT else i
            anchor_inside = j_inside if PER_TEXT else i_inside
            block = row_block if PER_TEXT else column_block
            to = out + block.to(tl.int64) * (m if PER_TEXT else n) + anchor
            if WHAT == "positive":
                of_row, of_column = tile.ids(row_id, column_id, i, j, n, m)
                positive = of_row[:, None] == of_column[None, :]
                tl.store(to, tl.max(tl.where(positive, keys, NONE), axis), mask=anchor_inside)
            else:
                bar = tl.expand_dims(tl.load(best + anchor, mask=anchor_inside, other=0), axis)
                ahead = (keys > bar) & inside
                tl.store(to, tl.sum(ahead.to(tl.int32), axis), mask=anchor_inside)
