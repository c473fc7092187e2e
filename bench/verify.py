"""Is what we are about to time the right loss? Truth in float64 at any N, in blocks of rows: no N×M matrix is held."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.cases import Case, Inputs
from bench.peers import LossFn
from smartclip_kernels import reference
from smartclip_kernels.testing import TOLERANCES, assert_accurate

BLOCK_ELEMENTS = 2**23
"""Scores in a block: 64 MiB in float64."""
PEER_SLACK = 8.0
"""A peer has to compute the same loss; our accuracy contract is not its own. It may err this many times as much."""


@dataclass(frozen=True)
class Answer:
    """A loss and its gradients, in the order of `Inputs.named`, and the sizes that error bounds are made of."""

    loss: Tensor
    gradients: list[Tensor]
    row_logit: Tensor  # (N, 1) max_j |s_ij|
    column_logit: Tensor  # (M, 1)
    scale_terms: Tensor  # Σ |G_ij sim_ij|
    bias_terms: Tensor  # Σ |G_ij|


@dataclass(frozen=True)
class Truth:
    """The answer in float64, and how far the same formulas in float32 are from it."""

    exact: Answer
    eager_errors: list[Tensor]
    cancelled: dict[str, Tensor]  # by argument: the largest of each row of what the positives' terms come to


def blockwise(inputs: Inputs, objective: str, dtype: torch.dtype) -> Answer:
    """The definition in `dtype`, a block of rows at a time.

    The column statistics c_j of a softmax come first. In the second sweep autograd is given exp(s_ij − c_j) with c_j
    held fixed, whose gradient is that of c_j itself.
    """
    x = replace(inputs, **{name: leaf.detach().to(dtype).requires_grad_() for name, leaf in inputs.named().items()})
    n, m = len(x.image), len(x.text)
    blocks = torch.arange(n).split(max(1, BLOCK_ELEMENTS // m))

    def scores(rows: Tensor) -> tuple[Tensor, Tensor]:
        sim = reference.similarity(x.image[rows[0] : rows[-1] + 1], x.text, x.mask)
        return sim, sim * x.scale if x.bias is None else sim * x.scale + x.bias

    column_lse = torch.full((m,), -torch.inf, dtype=dtype)
    row_logit, column_logit = torch.zeros(n, 1, dtype=dtype), torch.zeros(m, 1, dtype=dtype)
    with torch.no_grad():
        for rows in blocks:
            _, logits = scores(rows)
            column_lse = torch.logaddexp(column_lse, logits.logsumexp(0))
            row_logit[rows] = logits.abs().amax(1, keepdim=True)
            column_logit = torch.maximum(column_logit, logits.abs().amax(0)[:, None])

    loss = column_lse.mean() / 2 if objective == "softmax" else column_lse.new_zeros(())
    scale_terms, bias_terms = loss.new_zeros(()), loss.new_zeros(())
    for rows in blocks:
        sim, logits = scores(rows)
        logits.retain_grad()
        positive = logits.diagonal(int(rows[0]))
        if objective == "softmax":
            partial = (logits.logsumexp(1) / 2 - positive).sum() / n
            (partial + (logits - column_lse).exp().sum() / (2 * n)).backward()
        else:
            sign = -torch.ones_like(logits)
            sign.diagonal(int(rows[0])).fill_(1)
            partial = -F.logsigmoid(sign * logits).sum() / n
            partial.backward()
        loss = loss + partial.detach()
        assert logits.grad is not None
        scale_terms += (logits.grad * sim.detach()).abs().sum()
        bias_terms += logits.grad.abs().sum()
    gradients = [leaf.grad for leaf in x.leaves() if leaf.grad is not None]
    return Answer(loss, gradients, row_logit, column_logit, scale_terms, bias_terms)


def positive_terms(inputs: Inputs, objective: str) -> dict[str, Tensor]:
    """∂(mean_i s_ii) by argument, the largest element of each row (N, 1); scale's as a number.

    A softmax's G_ii is e^{s_ii − r_i} − 1 up to factors. Where a pair is well told apart this cancels: the rounding of
    r_i, one number, decides the error of the whole row, and eager's may by luck be far below what is due.
    """
    x = replace(inputs, **{name: leaf.detach().double().requires_grad_() for name, leaf in inputs.named().items()})
    part = x.image if x.mask is None else x.image * x.mask
    sim = (part * x.text).sum(1)
    if x.mask is not None:
        sim = sim / (part.norm(dim=1) * x.text.norm(dim=1))
    leaves = {name: leaf for name, leaf in x.named().items() if leaf.ndim == 2}
    factor = 1.0 if objective == "softmax" else 0.0
    gradients = torch.autograd.grad((sim * x.scale).mean(), list(leaves.values()))
    rows = {name: factor * g.abs().amax(1, keepdim=True) for name, g in zip(leaves, gradients, strict=True)}
    return {**rows, "scale": factor * sim.detach().abs().mean()}


def truth(case: Case, inputs: Inputs) -> Truth:
    exact = blockwise(inputs, case.objective, torch.float64)
    eager = blockwise(inputs, case.objective, torch.float32)
    pairs = zip(eager.gradients, exact.gradients, inputs.leaves(), strict=True)
    errors = [(got.to(leaf.dtype) - want).abs() for got, want, leaf in pairs]
    return Truth(exact, errors, positive_terms(inputs, case.objective))


def run(loss: LossFn, inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
    value = loss(inputs)
    return value.detach(), list(torch.autograd.grad(value, inputs.leaves()))


def check(value: Tensor, gradients: list[Tensor], true: Truth, inputs: Inputs, *, slack: float = 1.0) -> None:
    """Assert the accuracy contract of `smartclip_kernels.testing`, every bound times `slack`, cancellation allowed for.

    Raises:
        AssertionError: names the output and its worst row.
    """
    exact, tolerance = true.exact, TOLERANCES[inputs.image.dtype]
    allowed = tolerance.loss * (exact.loss.abs() + exact.row_logit.mean())
    assert_accurate(value, torch.zeros_like(exact.loss), exact.loss, slack * allowed, name="loss")
    for name, got, want, error in zip(inputs.named(), gradients, exact.gradients, true.eager_errors, strict=True):
        if want.ndim == 0:
            terms = exact.scale_terms + true.cancelled["scale"] if name == "scale" else exact.bias_terms
            floor = tolerance.unit * (1 + exact.row_logit.max()) * terms
        else:
            logit = exact.row_logit if name == "image" else exact.column_logit
            largest = want.abs().amax(1, keepdim=True)
            floor = tolerance.unit * (1 + logit) * (largest + true.cancelled[name]) + tolerance.score_rounding * largest
        assert_accurate(got, slack * error, want, slack * floor, name=f"grad_{name}")
