"""The backward sweep: scores once more, G of them, and from G what the products' gradients are made of.

G goes to memory in the operands' precision, without the incoming gradient's size, 1/N and α, which half precision could
not hold; sums over G are made of the unrounded numbers, tile by tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from smartclip_kernels.backends.triton import objective, similarity, tile


@triton.jit
def _store(pointer, stride, x, i, j, n, m):
    """Into (n, m), rows `stride` numbers apart.

    What half precision cannot hold is brought inside: infinite, it would make NaN of every sum.
    """
    if pointer.dtype.element_ty == tl.float16:
        x = tl.where(x > 65504.0, 65504.0, tl.where(x < -65504.0, -65504.0, x))
    at = pointer + i.to(tl.int64)[:, None] * stride + j[None, :]
    tl.store(at, x.to(pointer.dtype.element_ty), mask=(i < n)[:, None] & (j < m)[None, :])


@triton.jit
def anchors(
    statistics, weight, unit, tau, scale, bias, smoothing, out, size,
    OBJECTIVE: tl.constexpr, PLANES: tl.constexpr, ANCHOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What G needs of one side's anchors, (ANCHOR, size). Their weights are divided by `unit`."""
    index, inside = tile.indices(tl.program_id(0), size, BLOCK)
    weights = tl.load(weight + index, mask=inside, other=0.0)
    if unit is not None:
        weights /= tl.load(unit)
    state = (weights,)
    if PLANES > 0:
        state = tile.load_planes(statistics, size, index, inside, PLANES)
    of_each, least = tile.debiasing(tau, scale, bias, index, inside, BLOCK)
    numbers = objective.anchor(OBJECTIVE, state, weights, smoothing, of_each, least)
    tile.store_planes(out, size, index, inside, numbers, ANCHOR)


@triton.jit
def gradient(
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
    row_anchor,
    column_anchor,
    row_start,
    column_start,
    row_size,
    column_size,
    out_a,
    out_b,
    out_stride,
    parameters,
    column_scores,
    row_partials,
    n,
    m,
    d,
    SIMILARITY: tl.constexpr,
    OBJECTIVE: tl.constexpr,
    ANCHOR: tl.constexpr,
    PARTIAL_PLANES: tl.constexpr,
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
    """dL/daccumulator of a tile into `out_a` (and `out_b`), (n, m).

    `parameters` (programs · parts, 2) float64: Σ G·sim and Σ G. `column_scores` (blocks of rows, m), if any: Σ_i G·sim.
    With PARTIAL_PLANES the rows' partial states go to `row_partials` (planes, parts of columns, n), as forward's do.
    """
    row_block, column_block = tile.block_of_program(n, m, BLOCK_N, BLOCK_M, GROUP)
    i, i_inside = tile.indices(row_block, n, BLOCK_N)
    j, _ = tile.indices(column_block, m, BLOCK_M)
    first, second = tile.products(
        rows, columns, i, j, n, m, d, row_stride, column_stride,
        SIMILARITY, SPLIT, EVEN, WIDEN, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D, PARTS,
    )  # fmt: skip
    row_anchor, column_anchor = row_anchor + row_start, column_anchor + column_start
    parameters += 2 * PARTS * tl.program_id(0)
    for part in tl.static_range(PARTS):
        column_part = column_block * PARTS + part
        j, j_inside = tile.indices(column_part, m, BLOCK_M // PARTS)
        row, column = tile.factors(row_factor, column_factor, i, j, n, m, SIMILARITY)
        sim = similarity.value(SIMILARITY, first[part], second[part], row, column)
        of_row, of_column = tile.ids(row_id, column_id, i, j, n, m)
        logit = tile.logits(sim, scale, bias, of_row, of_column, row_ignore, column_ignore, i, j, n, m)
        some = tile.any_positive(of_row, of_column)
        if PARTIAL_PLANES > 0:
            state = objective.side_of_tile(OBJECTIVE, logit, of_row, of_column, some, 1, SMOOTHING)
            at = row_partials + column_part.to(tl.int64) * n
            tile.store_planes(at, tl.cdiv(m, BLOCK_M) * PARTS * n, i, i_inside, state, PARTIAL_PLANES)

        u = tile.load_planes(row_anchor, row_size, i, i_inside, ANCHOR)
        v = tile.load_planes(column_anchor, column_size, j, j_inside & BOTH_SIDES, ANCHOR)
        for_row = tile.below(logit, row_ceiling, i, n, of_row, of_column, 1)
        for_column = tile.below(logit, column_ceiling, j, m, of_row, of_column, 0)
        grad = objective.gradient(OBJECTIVE, for_row, for_column, u, v, SMOOTHING)
        if some:
            # Everything is made again: kept, it would cost registers in the tiles that do not need it.
            of_row, of_column = tile.ids(row_id, column_id, i, j, n, m)
            logit = tile.logits(sim, scale, bias, of_row, of_column, None, None, i, j, n, m)
            u = tile.load_planes(row_anchor, row_size, i, i_inside, ANCHOR)
            v = tile.load_planes(column_anchor, column_size, j, j_inside & BOTH_SIDES, ANCHOR)
            of_positives = objective.gradient_of_positives(OBJECTIVE, logit, u, v)
            grad = tl.where(of_row[:, None] == of_column[None, :], of_positives, grad)

        # Not 0 · infinity, where a pair does not count.
        along_sim = tl.where(grad == 0.0, 0.0, grad * sim)
        tl.store(parameters + 2 * part, tl.sum(tl.sum(along_sim, 1).to(tl.float64), 0))
        tl.store(parameters + 2 * part + 1, tl.sum(tl.sum(grad, 1).to(tl.float64), 0))
        if column_scores is not None:
            tl.store(column_scores + row_block.to(tl.int64) * m + j, tl.sum(along_sim, 0), mask=j_inside)
        grad_a, grad_b = similarity.derivative(SIMILARITY, first[part], second[part], row, column, sim, grad)
        _store(out_a, out_stride, grad_a, i, j, n, m)
        if SIMILARITY != "dot":
            _store(out_b, out_stride, grad_b, i, j, n, m)


@triton.jit
def derivative(
    rows,
    columns,
    row_stride,
    column_stride,
    row_factor,
    column_factor,
    grad_sim,
    unit,
    out_a,
    out_b,
    out_stride,
    column_scores,
    n,
    m,
    d,
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
    """As `gradient`, from a given dL/dsim (n, m), which is divided by `unit`."""
    row_block, column_block = tile.block_of_program(n, m, BLOCK_N, BLOCK_M, GROUP)
    i, i_inside = tile.indices(row_block, n, BLOCK_N)
    j, _ = tile.indices(column_block, m, BLOCK_M)
    first, second = tile.products(
        rows, columns, i, j, n, m, d, row_stride, column_stride,
        SIMILARITY, SPLIT, EVEN, WIDEN, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D, PARTS,
    )  # fmt: skip
    for part in tl.static_range(PARTS):
        j, j_inside = tile.indices(column_block * PARTS + part, m, BLOCK_M // PARTS)
        row, column = tile.factors(row_factor, column_factor, i, j, n, m, SIMILARITY)
        sim = similarity.value(SIMILARITY, first[part], second[part], row, column)
        inside = i_inside[:, None] & j_inside[None, :]
        given = tl.load(grad_sim + i.to(tl.int64)[:, None] * m + j[None, :], mask=inside, other=0.0)
        if unit is not None:
            given /= tl.load(unit)
        if column_scores is not None:
            sums = tl.sum(tl.where(inside, given * sim, 0.0), 0)
            tl.store(column_scores + row_block.to(tl.int64) * m + j, sums, mask=j_inside)
        grad_a, grad_b = similarity.derivative(SIMILARITY, first[part], second[part], row, column, sim, given)
        _store(out_a, out_stride, grad_a, i, j, n, m)
        if SIMILARITY != "dot":
            _store(out_b, out_stride, grad_b, i, j, n, m)


@triton.jit
def unit_of(x, y, unit, x_size, y_size, room, BLOCK: tl.constexpr):
    """The power of two that brings max(|x|, |y|) into [1, 2), over `room`; 1 where that maximum is 0 or not finite."""
    top = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, x_size, BLOCK):
        index = start + tl.arange(0, BLOCK)
        top = tl.maximum(top, tl.abs(tl.load(x + index, mask=index < x_size, other=0.0)))
    for start in range(0, y_size, BLOCK):
        index = start + tl.arange(0, BLOCK)
        top = tl.maximum(top, tl.abs(tl.load(y + index, mask=index < y_size, other=0.0)))
    # The exponent alone: the bits of a float without sign and mantissa are a power of two.
    largest = tl.max(top, 0)
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    ordinary = (largest >= 1e-36) & (largest <= 1e36)
    tl.store(unit, tl.where(ordinary, power, 1.0) / room)
