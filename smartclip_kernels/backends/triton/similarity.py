"""What a pair scores: the twin of csrc/similarity.h, in Triton. The formulas stand there and in reference.py.

`a` and `b` are the accumulated products (b is unused where there is one), `row` and `column` the pair's factors.
"""

from __future__ import annotations

import triton
import triton.language as tl

MIN_IMAGE_NORM = tl.constexpr(1e-6)


@triton.jit
def value(SIMILARITY: tl.constexpr, a, b, row, column):
    """From products to sim."""
    if SIMILARITY == "dot":
        return a
    else:
        return _cosine(a, b, row, column)


@triton.jit
def derivative(SIMILARITY: tl.constexpr, a, b, row, column, sim, grad_sim):
    """From dL/dsim to dL/daccumulator: two, of which the second is unused where there is one accumulator."""
    if SIMILARITY == "dot":
        return grad_sim, grad_sim
    else:
        return _cosine_derivative(a, b, row, column, sim, grad_sim)


@triton.jit
def _cosine(p, q, row, column):
    """P / (√Q ‖text‖), 0 where undefined."""
    norm = tl.sqrt(q)
    return tl.where(_undefined(norm, row, column), 0.0, p * column / norm)


@triton.jit
def _cosine_derivative(p, q, row, column, sim, grad_sim):
    """dP = dL/dsim / (√Q ‖text‖), dQ = −½ dL/dsim sim / Q"""
    norm = tl.sqrt(q)
    none = _undefined(norm, row, column)
    per_norm = grad_sim / norm
    return tl.where(none, 0.0, per_norm * column), tl.where(none, 0.0, -0.5 * per_norm * (sim / norm))


@triton.jit
def _undefined(norm, row, column):
    """Written so that a NaN is defined: it has to reach the loss."""
    return (norm * row <= MIN_IMAGE_NORM) | (column == 0.0)
