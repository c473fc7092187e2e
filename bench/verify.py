"""Is what we are about to time the right loss?"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.cases import Inputs
from bench.peers import LossFn, Replay
from bench.truth import Truth
from smartclip_kernels.testing import TOLERANCES, Tolerance, assert_accurate

PEER_SLACK = 8.0
"""A peer has to compute the same loss; our accuracy contract is not its own. It may err this many times as much."""

Outcome = tuple[Tensor, list[Tensor | None]]
"""A loss and its gradients, in the order of `Inputs.named`; None where the subject gives none."""


def run(loss: LossFn | Replay, inputs: Inputs) -> Outcome:
    if isinstance(loss, Replay):
        value, gradients = loss(inputs)
        return value, list(gradients)
    value = loss(inputs)
    return value.detach(), list(torch.autograd.grad(value, inputs.leaves(), allow_unused=True))


def check(
    value: Tensor,
    gradients: list[Tensor | None],
    true: Truth,
    inputs: Inputs,
    *,
    slack: float = 1.0,
    tolerance: Tolerance | None = None,
    lacks: tuple[str, ...] = (),
) -> None:
    """Assert the accuracy contract of `smartclip_kernels.testing`, every bound times `slack`, cancellation allowed for.

    Args:
        tolerance: instead of that of the inputs' dtype.
        lacks: arguments that have no gradient.

    Raises:
        AssertionError: names the output and its worst row.
    """
    exact, tolerance = true.exact, tolerance or TOLERANCES[inputs.image.dtype]
    allowed = tolerance.loss * (exact.loss.abs() + exact.row_logit.mean())
    assert_accurate(value, torch.zeros_like(exact.loss), exact.loss, slack * allowed, name="loss")
    for name, got, want, error in zip(inputs.named(), gradients, exact.gradients, true.eager_errors, strict=True):
        if name in lacks:
            continue
        if got is None:
            raise AssertionError(f"grad_{name}: there is none")
        rows = true.sample.get(name, slice(None))
        if want.ndim == 0:
            terms = exact.scale_terms + true.cancelled["scale"] if name == "scale" else exact.bias_terms
            floor = tolerance.unit * (1 + exact.row_logit.max()) * terms
        else:
            got = got[rows]
            logit = (exact.row_logit if name == "image" else exact.column_logit)[rows]
            largest = want.abs().amax(1, keepdim=True)
            cancelled = true.cancelled[name][rows]
            floor = tolerance.unit * (1 + logit) * (largest + cancelled) + tolerance.score_rounding * largest
        assert_accurate(got, slack * error, want, slack * floor, name=f"grad_{name}")


def check_own(value: Tensor, gradients: list[Tensor | None], true: Truth, inputs: Inputs) -> str:
    """The contract.

    Returns:
        What is wrong, where it is wrong by no more than a peer may be; else "".

    Raises:
        AssertionError: it computes something else.
    """
    try:
        check(value, gradients, true, inputs)
    except AssertionError as error:
        check(value, gradients, true, inputs, slack=PEER_SLACK)
        return str(error)
    return ""


def check_peer(
    value: Tensor, gradients: list[Tensor | None], true: Truth, inputs: Inputs, lacks: tuple[str, ...]
) -> str:
    """The contract, PEER_SLACK times; where that fails, what rounding scores to half precision does is allowed for.

    Returns:
        What the peer's row has to say of it.

    Raises:
        AssertionError: it computes something else.
    """
    dtype = inputs.image.dtype
    try:
        check(value, gradients, true, inputs, slack=PEER_SLACK, lacks=lacks)
    except AssertionError:
        if dtype.itemsize != 2:
            raise
        unit = torch.finfo(dtype).eps
        rounded = Tolerance(unit=unit, loss=unit, score_rounding=2 * unit)
        check(value, gradients, true, inputs, tolerance=rounded, lacks=lacks)
        return f"as accurate as with scores rounded to {str(dtype).removeprefix('torch.')}"
    return ""
