"""The loss and its gradients in float64, at any N, in blocks of rows: no N×M matrix is held."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.cases import Case, Inputs
from smartclip_kernels import reference

BLOCK_ELEMENTS = {"cpu": 2**23, "cuda": 2**26}
"""Scores in a block, by device: 64 and 512 MiB in float64."""
WHOLE_N = {"cpu": 2**31, "cuda": 16384}
"""Beyond, gradients of image, text and mask are known in a sample of their rows."""
SAMPLE = 1024
"""One row of each of so many equal ranges: no tile of N / SAMPLE rows is missed."""


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
    sample: dict[str, Tensor] = field(default_factory=dict)  # by argument: the rows that its gradient is known of

    @property
    def note(self) -> str:
        rows = {len(rows) for rows in self.sample.values()}
        return f"gradients verified in {max(rows)} rows of each side" if rows else ""


def leaves_in(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return replace(inputs, **{name: x.detach().to(dtype).requires_grad_() for name, x in inputs.named().items()})


def scores(x: Inputs, image: Tensor, text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """sim and logits of some rows and columns."""
    sim = reference.similarity(image, text, mask)
    return sim, sim * x.scale if x.bias is None else sim * x.scale + x.bias


def block_loss(logits: Tensor, anchors: Tensor, other_lse: Tensor, objective: str) -> tuple[Tensor, Tensor]:
    """For some anchors, the rows of `logits`: what they add to N times the loss, and something of the same gradient.

    Autograd is given exp(s_ij − c_j) with c_j, the statistics of the other side, held fixed, whose gradient is that of
    c_j itself.
    """
    positive = torch.arange(len(anchors), device=logits.device), anchors
    if objective == "softmax":
        partial = (logits.logsumexp(1) / 2 - logits[positive]).sum()
        return partial, partial + (logits - other_lse).exp().sum() / 2
    sign = -torch.ones_like(logits)
    sign[positive] = 1
    partial = -F.logsigmoid(sign * logits).sum()
    return partial, partial


def blockwise(inputs: Inputs, objective: str, dtype: torch.dtype, sample: dict[str, Tensor] | None = None) -> Answer:
    """The definition in `dtype`, a block of rows at a time; statistics of the columns (and rows) in a first sweep.

    With a sample, gradients of features and masks are those of its rows only; the loss and the others are whole.
    """
    x = leaves_in(inputs, dtype)
    n, m = len(x.image), len(x.text)
    rows_of_block = max(1, BLOCK_ELEMENTS[x.image.device.type] // m)
    blocks = torch.arange(n, device=x.image.device).split(rows_of_block)
    starts = range(0, n, rows_of_block)
    row_lse, column_lse = x.image.new_empty(n if sample else 0), x.image.new_full((m,), -torch.inf)
    row_logit, column_logit = x.image.new_zeros(n, 1), x.image.new_zeros(m, 1)
    with torch.no_grad():
        for start, rows in zip(starts, blocks, strict=True):
            _, logits = scores(x, x.image[start : start + rows_of_block], x.text, x.mask)
            column_lse = torch.logaddexp(column_lse, logits.logsumexp(0))
            row_logit[rows] = logits.abs().amax(1, keepdim=True)
            column_logit = torch.maximum(column_logit, logits.abs().amax(0)[:, None])
            if sample:
                row_lse[rows] = logits.logsumexp(1)

    features = (x.image, x.text, x.mask)
    image, text, mask = (f if f is None or not sample else f.detach() for f in features)
    assert image is not None and text is not None
    loss = column_lse.mean() / 2 if objective == "softmax" else column_lse.new_zeros(())
    scale_terms, bias_terms = loss.new_zeros(()), loss.new_zeros(())
    for start, rows in zip(starts, blocks, strict=True):
        sim, logits = scores(x, image[start : start + rows_of_block], text, mask)
        logits.retain_grad()
        partial, surrogate = block_loss(logits, rows, column_lse, objective)
        (surrogate / n).backward()
        loss = loss + partial.detach() / n
        assert logits.grad is not None
        scale_terms += (logits.grad * sim.detach()).abs().sum()
        bias_terms += logits.grad.abs().sum()
        del sim, logits, partial, surrogate  # before the next block's are made
    gradients = [leaf.grad for leaf in x.leaves() if leaf.grad is not None]
    if sample:
        of_rows = sampled_gradients(x, sample, (row_lse, column_lse), rows_of_block, objective)
        gradients = [*of_rows, *gradients]
    return Answer(loss, gradients, row_logit, column_logit, scale_terms, bias_terms)


def sampled_gradients(
    x: Inputs, sample: dict[str, Tensor], lse: tuple[Tensor, Tensor], rows_of_block: int, objective: str
) -> list[Tensor]:
    """Of the sample's rows of image, text and mask, for which the other side's statistics suffice."""
    n = len(x.image)
    image, text, mask = x.image.detach(), x.text.detach(), None if x.mask is None else x.mask.detach()
    of_image, of_columns = [], []
    for rows in sample["image"].split(rows_of_block):
        leaf = image[rows].requires_grad_()
        _, surrogate = block_loss(scores(x, leaf, text, mask)[1], rows, lse[1], objective)
        of_image.append(torch.autograd.grad(surrogate / n, leaf)[0])
    for columns in sample["text"].split(rows_of_block):
        leaves = [f[columns].requires_grad_() for f in (text, mask) if f is not None]
        logits = scores(x, image, leaves[0], leaves[1] if len(leaves) > 1 else None)[1].T
        _, surrogate = block_loss(logits, columns, lse[0], objective)
        of_columns.append(torch.autograd.grad(surrogate / n, leaves))
    return [torch.cat(of_image), *(torch.cat(parts) for parts in zip(*of_columns, strict=True))]


def positive_terms(inputs: Inputs, objective: str) -> dict[str, Tensor]:
    """∂(mean_i s_ii) by argument, the largest element of each row (N, 1); scale's as a number.

    A softmax's G_ii is e^{s_ii − r_i} − 1 up to factors. Where a pair is well told apart this cancels: the rounding of
    r_i, one number, decides the error of the whole row, and eager's may by luck be far below what is due.
    """
    x = leaves_in(inputs, torch.float64)
    part = x.image if x.mask is None else x.image * x.mask
    sim = (part * x.text).sum(1)
    if x.mask is not None:
        sim = sim / (part.norm(dim=1) * x.text.norm(dim=1))
    leaves = {name: leaf for name, leaf in x.named().items() if leaf.ndim == 2}
    factor = 1.0 if objective == "softmax" else 0.0
    gradients = torch.autograd.grad((sim * x.scale).mean(), list(leaves.values()))
    rows = {name: factor * g.abs().amax(1, keepdim=True) for name, g in zip(leaves, gradients, strict=True)}
    return {**rows, "scale": factor * sim.detach().abs().mean()}


def sample_of(inputs: Inputs, seed: int = 0) -> dict[str, Tensor]:
    """A random row of each of SAMPLE ranges that together are all rows; another for every side."""
    n, generator = len(inputs.image), torch.Generator().manual_seed(seed)
    ends = torch.linspace(0, n, min(n, SAMPLE) + 1).long()
    sizes = ends.diff()
    rows = [ends[:-1] + (torch.rand(len(sizes), generator=generator) * sizes).long() for _ in range(2)]
    image, text = (x.to(inputs.image.device) for x in rows)
    return {"image": image, "text": text} | ({} if inputs.mask is None else {"mask": text})


def truth(case: Case, inputs: Inputs) -> Truth:
    """In a sample half precision has the whole contract but eager's own error, which its bounds do not need."""
    cancelled = positive_terms(inputs, case.objective)
    if case.n > WHOLE_N[case.device] and case.torch_dtype.itemsize == 2:
        sample = sample_of(inputs)
        exact = blockwise(inputs, case.objective, torch.float64, sample)
        return Truth(exact, [torch.zeros_like(g) for g in exact.gradients], cancelled, sample)
    exact = blockwise(inputs, case.objective, torch.float64)
    eager = blockwise(inputs, case.objective, torch.float32)
    pairs = zip(eager.gradients, exact.gradients, inputs.leaves(), strict=True)
    errors = [(got.to(leaf.dtype) - want).abs() for got, want, leaf in pairs]
    return Truth(exact, errors, cancelled)
