"""A tile of scores on chip: which one a program has, its products, its pairs, and what goes out to both sides.

Rows are images, columns texts. `rows` and `columns` are the operands of operands.py: pointers, as many as there are.
Indices within a tile's panel fit 32 bits; what is multiplied by a stride is widened first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from smartclip_kernels.backends.triton import objective


@triton.jit
def block_of_program(n, m, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr):
    """Blocks go down GROUP rows before the next column, so that the operands of neighbours are in the cache."""
    program, n_blocks, m_blocks = tl.program_id(0), tl.cdiv(n, BLOCK_N), tl.cdiv(m, BLOCK_M)
    first = program // (GROUP * m_blocks) * GROUP
    height = tl.minimum(n_blocks - first, GROUP)
    within = program % (GROUP * m_blocks)
    return first + within % height, within // height


@triton.jit
def indices(block, size, BLOCK: tl.constexpr):
    """Those of a block, and which of them exist."""
    index = block * BLOCK + tl.arange(0, BLOCK)
    return index, index < size


@triton.jit
def _operand(pointer, index, stride, depth, d, EVEN: tl.constexpr, WIDEN: tl.constexpr):
    """Rows `index` of an operand, columns `depth`; beyond D there are zeros."""
    at = pointer + index.to(tl.int64)[:, None] * stride + depth[None, :]
    x = tl.load(at) if EVEN else tl.load(at, mask=depth[None, :] < d, other=0.0)
    return x.to(tl.float32) if WIDEN else x


@triton.jit
def _parts(x, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, PARTS: tl.constexpr):
    """The columns of x in PARTS (1, 2 or 4) equal parts, from left to right. Only registers change their names."""
    if PARTS == 1:
        return (x,)
    else:
        left, right = tl.split(tl.permute(tl.reshape(x, (BLOCK_N, 2, BLOCK_M // 2)), (0, 2, 1)))
        if PARTS == 2:
            return left, right
        else:
            tl.static_assert(PARTS == 4)
            a, b = tl.split(tl.permute(tl.reshape(left, (BLOCK_N, 2, BLOCK_M // 4)), (0, 2, 1)))
            c, d = tl.split(tl.permute(tl.reshape(right, (BLOCK_N, 2, BLOCK_M // 4)), (0, 2, 1)))
            return a, b, c, d


@triton.jit
def products(
    rows,
    columns,
    i,
    j,
    n,
    m,
    d,
    row_stride,
    column_stride,
    SIMILARITY: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The accumulated products of rows i and columns j: two, of which the second is unused where there is one.

    Each comes in PARTS, so that what follows takes the registers of a narrow tile after the products had a wide one's
    reuse. Indices beyond the panel are brought back to its last row: what they give is masked later, no load is.
    """
    i, j = tl.minimum(i, n - 1), tl.minimum(j, m - 1)
    depth = tl.arange(0, BLOCK_D)
    a = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    b = a
    for start in range(0, d, BLOCK_D):
        x = _operand(rows[0], i, row_stride, start + depth, d, EVEN, WIDEN)
        y = _operand(columns[0], j, column_stride, start + depth, d, EVEN, WIDEN)
        a = tl.dot(x, y.T, a, input_precision=PRECISION)
        if SIMILARITY != "dot":
            square = _operand(rows[1], i, row_stride, start + depth, d, EVEN, WIDEN)
            mask = _operand(columns[1], j, column_stride, start + depth, d, EVEN, WIDEN)
            b = tl.dot(square, mask.T, b, input_precision=PRECISION)
            if SPLIT:
                low = _operand(rows[2], i, row_stride, start + depth, d, EVEN, WIDEN)
                b = tl.dot(low, mask.T, b, input_precision=PRECISION)
    if SPLIT:
        # Only soft masks have low halves.
        if tl.load(columns[4]) != 0:
            for start in range(0, d, BLOCK_D):
                x = _operand(rows[0], i, row_stride, start + depth, d, EVEN, WIDEN)
                y = _operand(columns[2], j, column_stride, start + depth, d, EVEN, WIDEN)
                a = tl.dot(x, y.T, a, input_precision=PRECISION)
                mask = _operand(columns[3], j, column_stride, start + depth, d, EVEN, WIDEN)
                square = _operand(rows[1], i, row_stride, start + depth, d, EVEN, WIDEN)
                b = tl.dot(square, mask.T, b, input_precision=PRECISION)
                low = _operand(rows[2], i, row_stride, start + depth, d, EVEN, WIDEN)
                b = tl.dot(low, mask.T, b, input_precision=PRECISION)
    return _parts(a, BLOCK_N, BLOCK_M, PARTS), _parts(b, BLOCK_N, BLOCK_M, PARTS)


@triton.jit
def factors(row_factor, column_factor, i, j, n, m, SIMILARITY: tl.constexpr):
    """What the similarity knows of rows (BLOCK_N, 1) and columns (1, BLOCK_M)."""
    if SIMILARITY == "dot":
        return 0.0, 0.0
    else:
        row = tl.load(row_factor + i, mask=i < n, other=1.0)
        column = tl.load(column_factor + j, mask=j < m, other=1.0)
        return row[:, None], column[None, :]


@triton.jit
def ids(row_id, column_id, i, j, n, m):
    """Of rows and columns: positive pairs have equal ones. Outside the tile none are equal."""
    return tl.load(row_id + i, mask=i < n, other=-1), tl.load(column_id + j, mask=j < m, other=-2)


@triton.jit
def any_positive(row_id, column_id):
    return tl.max(tl.max((row_id[:, None] == column_id[None, :]).to(tl.int32), 1), 0) > 0


@triton.jit
def logits(sim, scale, bias, row_id, column_id, row_ignore, column_ignore, i, j, n, m):
    """α · sim + β, LOWEST for pairs that do not count. Scale and bias stay on the device."""
    logit = tl.load(scale) * sim
    if bias is not None:
        logit += tl.load(bias)
    candidate = (i < n)[:, None] & (j < m)[None, :]
    if row_ignore is not None:
        of_row = tl.load(row_ignore + i, mask=i < n, other=0)
        of_column = tl.load(column_ignore + j, mask=j < m, other=0)
        positive = row_id[:, None] == column_id[None, :]
        candidate = candidate & (positive | (of_row[:, None] != of_column[None, :]))
    return tl.where(candidate, logit, objective.LOWEST)


@triton.jit
def below(logit, ceiling, index, size, row_id, column_id, axis: tl.constexpr):
    """The logits as anchors along `axis` (1: rows) count them: above their ceiling LOWEST, where not positive."""
    if ceiling is None:
        return logit
    else:
        # "Is above": a NaN is not.
        bound = tl.expand_dims(tl.load(ceiling + index, mask=index < size, other=0.0), axis)
        return tl.where((logit > bound) & (row_id[:, None] != column_id[None, :]), objective.LOWEST, logit)


@triton.jit
def debiasing(tau, scale, bias, index, inside, BLOCK: tl.constexpr):
    """τ of each index (0 where there is none) and β − α, which only a τ needs."""
    if tau is None:
        return tl.zeros((BLOCK,), tl.float32), 0.0
    else:
        least = -tl.load(scale)
        if bias is not None:
            least += tl.load(bias)
        return tl.load(tau + index, mask=inside, other=0.0), least


@triton.jit
def load_planes(pointer, stride, index, inside, PLANES: tl.constexpr):
    """PLANES numbers of each index, as a tuple. Outside: 1, which no formula minds."""
    planes = (tl.load(pointer + index, mask=inside, other=1.0),)
    for k in tl.static_range(1, PLANES):
        planes = planes + (tl.load(pointer + k * stride + index, mask=inside, other=1.0),)
    return planes


@triton.jit
def store_planes(pointer, stride, index, inside, planes, PLANES: tl.constexpr):
    for k in tl.static_range(PLANES):
        tl.store(pointer + k * stride + index, planes[k], mask=inside)


@triton.jit
def where(condition, planes, others, PLANES: tl.constexpr):
    chosen = (tl.where(condition, planes[0], others[0]),)
    for k in tl.static_range(1, PLANES):
        chosen = chosen + (tl.where(condition, planes[k], others[k]),)
    return chosen
