"""What the scores cost: the twin of csrc/objective.h, in Triton. The formulas stand there and in reference.py.

An anchor's state is a tuple of `statistics` numbers, as reference.py's traits say. `side_of_tile` makes it of a tile's
logits, `fold` of the states of several tiles, `merge` of two; `loss` and `anchor` take the state of all. G comes in two
parts, one for positive pairs and one for the others. Adding an objective ends here: no loop names one.

Logits of pairs that do not count are LOWEST. Which pairs are positive is asked of the ids where it matters: a mask of a
whole tile that lives through these functions would cost as many registers as the logits. Most tiles have no positive
pair, and `some_positive` spares them the question.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def empty(OBJECTIVE: tl.constexpr, zero):
    """The state of no logit; `zero` has the anchors' shape."""
    if OBJECTIVE == "softmax":
        return zero, zero + LOWEST, zero, zero, zero, zero, zero
    else:
        return (zero,)


@triton.jit
def side_of_tile(
    OBJECTIVE: tl.constexpr, logit, row_id, column_id, some_positive, axis: tl.constexpr, SMOOTHING: tl.constexpr
):
    """What a tile adds to the anchors along `axis` (1: rows). `some_positive`: there is a positive pair in the tile."""
    if OBJECTIVE == "softmax":
        return _softmax_state(logit, row_id, column_id, some_positive, axis, SMOOTHING)
    else:
        return (_sigmoid_sum(logit, row_id, column_id, some_positive, axis),)


@triton.jit
def fold(OBJECTIVE: tl.constexpr, states):
    """The states in the rows of two-dimensional planes, merged."""
    if OBJECTIVE == "softmax":
        return _softmax_fold(states)
    else:
        return (tl.sum(states[0], 0),)


@triton.jit
def merge(OBJECTIVE: tl.constexpr, a, b):
    if OBJECTIVE == "softmax":
        return _softmax_merge(a, b)
    else:
        return (a[0] + b[0],)


@triton.jit
def loss(OBJECTIVE: tl.constexpr, state, smoothing, tau, least):
    """Of the anchors, from their statistics. `tau`, of each, and `least`, β − α, are for debiased negatives."""
    if OBJECTIVE == "softmax":
        return _softmax_loss(state, smoothing, tau, least)
    else:
        return state[0]


@triton.jit
def anchor(OBJECTIVE: tl.constexpr, state, weight, smoothing, tau, least):
    """From anchors' statistics and weights to the numbers that G needs of them."""
    if OBJECTIVE == "softmax":
        return _softmax_anchor(state, weight, smoothing, tau, least)
    else:
        return (weight,)


@triton.jit
def gradient(OBJECTIVE: tl.constexpr, for_row, for_column, row, column, SMOOTHING: tl.constexpr):
    """G of a tile as if no pair were positive, from its logits as either side counts them and both sides' anchors."""
    if OBJECTIVE == "softmax":
        return _softmax_part(for_row, row, 1, SMOOTHING) + _softmax_part(for_column, column, 0, SMOOTHING)
    else:
        return _sigmoid(for_row) * row[0][:, None]


@triton.jit
def gradient_of_positives(OBJECTIVE: tl.constexpr, logit, row, column):
    """G of a tile as if all pairs were positive."""
    if OBJECTIVE == "softmax":
        return _softmax_gradient_of_positives(logit, row, column)
    else:
        return -_sigmoid(-logit) * row[0][:, None]


@triton.jit
def _positive(row_id, column_id):
    return row_id[:, None] == column_id[None, :]


# --- softmax: (positives, max, positive_mass, other_mass, total, positive_sum, candidates) -----------------------


@triton.jit
def _softmax_state(logit, row_id, column_id, some_positive, axis: tl.constexpr, SMOOTHING: tl.constexpr):
    """Total and candidates matter where there is smoothing, or a tau, and are 0 elsewhere."""
    top = tl.max(logit, axis)
    # LOWEST − LOWEST would be a mass of 1 where no pair counts.
    shift = tl.expand_dims(tl.where(top == LOWEST, 0.0, top), axis)
    other_mass = tl.sum(tl.exp(logit - shift), axis)
    zero = tl.zeros_like(top)
    positives, positive_mass, positive_sum, total, candidates = zero, zero, zero, zero, zero
    if some_positive:
        positive = _positive(row_id, column_id)
        mass = tl.exp(logit - shift)
        positives = tl.sum(positive.to(tl.float32), axis)
        positive_mass = tl.sum(tl.where(positive, mass, 0.0), axis)
        positive_sum = tl.sum(tl.where(positive, logit, 0.0), axis)
        other_mass = tl.sum(tl.where(positive, 0.0, mass), axis)
    if SMOOTHING:
        total = tl.sum(tl.where(logit == LOWEST, 0.0, logit), axis)
        candidates = tl.sum(tl.where(logit == LOWEST, 0.0, 1.0), axis)
    return positives, top, positive_mass, other_mass, total, positive_sum, candidates


@triton.jit
def _softmax_fold(states):
    positives, top, positive_mass, other_mass, total, positive_sum, candidates = states
    highest = tl.max(top, 0)
    rescale = tl.exp(top - highest[None, :])
    return (
        tl.sum(positives, 0),
        highest,
        tl.sum(positive_mass * rescale, 0),
        tl.sum(other_mass * rescale, 0),
        tl.sum(total, 0),
        tl.sum(positive_sum, 0),
        tl.sum(candidates, 0),
    )


@triton.jit
def _softmax_merge(a, b):
    highest = tl.maximum(a[1], b[1])
    of_a, of_b = tl.exp(a[1] - highest), tl.exp(b[1] - highest)
    return (
        a[0] + b[0],
        highest,
        a[2] * of_a + b[2] * of_b,
        a[3] * of_a + b[3] * of_b,
        a[4] + b[4],
        a[5] + b[5],
        a[6] + b[6],
    )


@triton.jit
def _softmax_raised(state, tau, least):
    """With a τ, relative to the floor's logit where that is larger, so that g stays finite."""
    positives, top, positive_mass, other_mass, total, positive_sum, candidates = state
    enough = (tau == 0.0) | (least <= top)
    rescale = tl.where(enough, 1.0, tl.exp(top - least))
    return (
        positives, tl.where(enough, top, least), positive_mass * rescale, other_mass * rescale,
        total, positive_sum, candidates,
    )  # fmt: skip


@triton.jit
def _softmax_negatives(state, tau, least):
    """g, relative to max, and its derivatives by the others' mass and by the positives'. At a tau of 0: the former."""
    positives, top, positive_mass, other_mass, _, _, candidates = state
    count, rest = candidates - positives, 1.0 - tau
    among = count * tau / tl.where(positives == 0.0, 1.0, positives)
    debiased = (other_mass - among * positive_mass) / rest
    floor = tl.where(count == 0.0, 0.0, count * tl.exp(least - top))
    biased, floored = tau == 0.0, debiased < floor
    mass = tl.where(biased, other_mass, tl.where(floored, floor, debiased))
    by_others = tl.where(biased, 1.0, tl.where(floored, 0.0, 1.0 / rest))
    return mass, by_others, tl.where(biased | floored, 0.0, -among / rest)


@triton.jit
def _softmax_loss(state, smoothing, tau, least):
    """log(1 + negatives/positive) where a lone positive dominates: the general form would round at 1."""
    state = _softmax_raised(state, tau, least)
    positives, top, positive_mass, _, total, positive_sum, candidates = state
    negatives, _, _ = _softmax_negatives(state, tau, least)
    count = tl.where(positives == 0.0, 1.0, positives)
    general = (top - (1.0 - smoothing) * positive_sum / count) + tl.log(positive_mass + negatives)
    dominates = (positives == 1.0) & (negatives <= positive_mass)
    certain = smoothing * positive_sum + _log1p_unit(tl.where(dominates, negatives / positive_mass, 0.0))
    result = tl.where(dominates, certain, general)
    result -= tl.where(smoothing == 0.0, 0.0, smoothing * total / tl.where(candidates == 0.0, 1.0, candidates))
    return tl.where(positives == 0.0, 0.0, result)


@triton.jit
def _softmax_anchor(state, weight, smoothing, tau, least):
    """max · factor of e^{s − max} · each candidate's share · at a positive: that factor, and what is added.

    Of a lone positive G is known without cancelling: nothing of e^{s − max}, and minus the others' probability, or
    minus g / (P + g) where g is the floor.
    """
    state = _softmax_raised(state, tau, least)
    positives, top, positive_mass, other_mass, _, _, candidates = state
    negatives, by_others, by_positives = _softmax_negatives(state, tau, least)
    none, lone = positives == 0.0, positives == 1.0
    mass = positive_mass + negatives
    factor = tl.where(none, 0.0, weight / mass)
    pushed = tl.where(by_others == 0.0, negatives, other_mass * by_others)
    share = tl.where(none | (smoothing == 0.0), 0.0, smoothing * weight / candidates)
    certain = smoothing * weight - weight * (pushed / mass)
    added = tl.where(lone, certain, -(1.0 - smoothing) * weight / positives) - share
    of_positives = tl.where(lone, 0.0, factor * (1.0 + by_positives))
    return top, factor * by_others, share, of_positives, tl.where(none, 0.0, added)


@triton.jit
def _softmax_part(logit, anchor, axis: tl.constexpr, SMOOTHING: tl.constexpr):
    grad = tl.exp(logit - tl.expand_dims(anchor[0], axis)) * tl.expand_dims(anchor[1], axis)
    if SMOOTHING:
        grad = tl.where(logit == LOWEST, 0.0, grad - tl.expand_dims(anchor[2], axis))
    return grad


@triton.jit
def _softmax_gradient_of_positives(logit, row, column):
    of_row = tl.exp(logit - row[0][:, None]) * row[3][:, None] + row[4][:, None]
    return of_row + (tl.exp(logit - column[0][None, :]) * column[3][None, :] + column[4][None, :])


# --- sigmoid: (sum of losses,) -------------------------------------------------------------------------------------


@triton.jit
def _sigmoid_sum(logit, row_id, column_id, some_positive, axis: tl.constexpr):
    """softplus(t) = max(t, 0) + log(1 + e^{−|t|}), t = −z s"""
    t = logit
    if some_positive:
        t = tl.where(_positive(row_id, column_id), -logit, logit)
    return tl.sum(tl.where(t < 0.0, 0.0, t) + _log1p_unit(tl.exp(-tl.abs(t))), axis)


@triton.jit
def _sigmoid(x):
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, small, 1.0) / (1.0 + small)


@triton.jit
def _log1p_unit(y):
    """log(1 + y) for 0 ≤ y ≤ 1, exact in relative terms for small y: 2 atanh(z), z = y/(2 + y) ≤ 1/3, by its series."""
    z = y / (2.0 + y)
    square = z * z
    series = square * (1.0 / 15.0) + 1.0 / 13.0
    series = series * square + 1.0 / 11.0
    series = series * square + 1.0 / 9.0
    series = series * square + 1.0 / 7.0
    series = series * square + 1.0 / 5.0
    series = series * square + 1.0 / 3.0
    return 2.0 * z * (series * square + 1.0)
