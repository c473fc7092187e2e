"""The forward sweep: every tile leaves what it adds to its rows and columns, and another kernel sums that up.

No score goes to memory, and no atomics: sums have a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from smartclip_kernels.backends.triton import objective, similarity, tile


@triton.jit
def statistics(
    rows,
    columns,
    row_stride,
    column_stride,
    row_id,
    column_id,
    row_ignore,
    column_ignore,
    row_ceiling,
    column_ceiling,
    row_factor,
    column_factor,
    scale,
    bias,
    row_partials,
    column_partials,
    n,
    m,
    d,
    SIMILARITY: tl.constexpr,
    OBJECTIVE: tl.constexpr,
    PLANES: tl.constexpr,
    BOTH_SIDES: tl.constexpr,
    SMOOTHING: tl.constexpr,
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
    """Partial states: (PLANES, parts of columns, n) of the rows, (PLANES, blocks of rows, m) of the columns."""
    row_block, column_block = tile.block_of_program(n, m, BLOCK_N, BLOCK_M, GROUP)
    i, i_inside = tile.indices(row_block, n, BLOCK_N)
    j, _ = tile.indices(column_block, m, BLOCK_M)
    first, second = tile.products(
        rows, columns, i, j, n, m, d, row_stride, column_stride,
        SIMILARITY, SPLIT, EVEN, WIDEN, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D, PARTS,
    )  # fmt: skip
    row_planes, column_planes = tl.cdiv(m, BLOCK_M) * PARTS * n, tl.cdiv(n, BLOCK_N) * m
    for part in tl.static_range(PARTS):
        column_part = column_block * PARTS + part
        j, j_inside = tile.indices(column_part, m, BLOCK_M // PARTS)
        row, column = tile.factors(row_factor, column_factor, i, j, n, m, SIMILARITY)
        sim = similarity.value(SIMILARITY, first[part], second[part], row, column)
        of_row, of_column = tile.ids(row_id, column_id, i, j, n, m)
        logit = tile.logits(sim, scale, bias, of_row, of_column, row_ignore, column_ignore, i, j, n, m)
        some = tile.any_positive(of_row, of_column)

        for_row = tile.below(logit, row_ceiling, i, n, of_row, of_column, 1)
        state = objective.side_of_tile(OBJECTIVE, for_row, of_row, of_column, some, 1, SMOOTHING)
        tile.store_planes(row_partials + column_part.to(tl.int64) * n, row_planes, i, i_inside, state, PLANES)
        if BOTH_SIDES:
            for_column = tile.below(logit, column_ceiling, j, m, of_row, of_column, 0)
            state = objective.side_of_tile(OBJECTIVE, for_column, of_row, of_column, some, 0, SMOOTHING)
            tile.store_planes(column_partials + row_block.to(tl.int64) * m, column_planes, j, j_inside, state, PLANES)


@triton.jit
def gather(
    partials,
    into,
    losses,
    tau,
    scale,
    bias,
    smoothing,
    blocks,
    count,
    start,
    size,
    first,
    OBJECTIVE: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merges partial states (PLANES, blocks, count) into anchors [start, start + count) of `into` (PLANES, size).

    With `first` there is nothing there yet. The losses are those of what has been merged so far.
    """
    index, inside = tile.indices(tl.program_id(0), count, BLOCK)
    state = objective.empty(OBJECTIVE, tl.zeros((BLOCK,), tl.float32))
    if first == 0:
        state = tile.load_planes(into + start, size, index, inside, PLANES)
    for begin in range(0, blocks, BLOCKS):
        block = begin + tl.arange(0, BLOCKS)
        at = block[:, None] * count + index[None, :]
        here = (block < blocks)[:, None] & inside[None, :]
        states = tile.load_planes(partials, blocks * count, at, here, PLANES)
        empty = objective.empty(OBJECTIVE, tl.zeros((BLOCKS, BLOCK), tl.float32))
        states = tile.where(here, states, empty, PLANES)
        state = objective.merge(OBJECTIVE, state, objective.fold(OBJECTIVE, states))
    tile.store_planes(into + start, size, index, inside, state, PLANES)
    of_each, least = tile.debiasing(tau, scale, bias, start + index, inside, BLOCK)
    tl.store(losses + start + index, objective.loss(OBJECTIVE, state, smoothing, of_each, least), mask=inside)
