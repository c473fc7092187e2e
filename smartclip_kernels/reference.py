"""The definition of every operation, in eager torch.

The formulas of the documentation, line by line, on any device and in any precision. In float64 this file is the
truth that every backend is tested against; as backend ``"reference"`` it is the naive implementation that the
library replaces. It holds N×M matrices: use it at small sizes only.

Half-precision inputs are widened to float32; everything after the inputs is computed in that precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

MIN_IMAGE_NORM = 1e-6
"""Where ‖image ⊙ mask‖ is no larger than this, the similarity is 0 and passes no gradient."""
MIN_TEXT_NORM = 1e-12
"""Where ‖text‖ is no larger than this, the similarity is 0 and passes no gradient."""


@dataclass(frozen=True)
class Objective:
    """What the order of work has to know of an objective. Its formulas stand in this file, and in objective.h."""

    name: str
    needs_statistics: bool  # a sweep over all scores comes before the first gradient
    both_sides: bool  # texts are anchors too, and have losses of their own
    shift_invariant: bool  # adding a constant to all scores changes nothing: grad_bias is exactly 0
    statistics: int  # numbers kept of an anchor between the sweeps; the first counts its positives if both_sides
    anchor: int  # numbers of an anchor that a gradient takes


OBJECTIVES = {
    "softmax": Objective(
        "softmax", needs_statistics=True, both_sides=True, shift_invariant=True, statistics=7, anchor=5
    ),
    "sigmoid": Objective(
        "sigmoid", needs_statistics=False, both_sides=False, shift_invariant=False, statistics=1, anchor=1
    ),
}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of scores, statistics and losses for inputs of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def similarity(image: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
    """sim (N, M): ⟨image_i, text_j⟩, or with a mask cos(image_i ⊙ mask_j, text_j) (SmartCLIP, arXiv 2507.22264)."""
    dtype = compute_dtype(image.dtype)
    image, text = image.to(dtype), text.to(dtype)
    if mask is None:
        return image @ text.T
    mask = mask.to(dtype)
    product = image @ (mask * text).T
    square = image.square() @ mask.square().T
    text_square = text.square().sum(1)
    # "is too small", not "is large enough": a NaN compares false and must stay visible.
    undefined = (square <= MIN_IMAGE_NORM**2) | (text_square <= MIN_TEXT_NORM**2)
    norm = torch.where(undefined, 1, square).sqrt() * torch.where(undefined, 1, text_square).sqrt()
    return torch.where(undefined, 0, product / norm)


def literal_masked_similarity(image: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """cos(image_i ⊙ mask_j, text_j) as the paper writes it, with its N×M×D intermediate; for tests and benchmarks."""
    return F.cosine_similarity(image[:, None, :] * mask[None, :, :], text[None, :, :], dim=-1, eps=1e-8)


def positive_pairs(image: Tensor, text: Tensor, image_ids: Tensor | None, text_ids: Tensor | None) -> Tensor:
    """(N, M) bool: which pairs are positive. Without ids, i matches i."""
    if image_ids is None or text_ids is None:
        return torch.eye(len(image), len(text), dtype=torch.bool, device=image.device)
    return image_ids[:, None] == text_ids[None, :]


def candidate_pairs(positive: Tensor, image_ignore: Tensor | None, text_ignore: Tensor | None) -> Tensor:
    """(N, M) bool: which pairs count at all. Equal ignore ids take out a pair that is not positive."""
    if image_ignore is None or text_ignore is None:
        return torch.ones_like(positive)
    return positive | (image_ignore[:, None] != text_ignore[None, :])


def others_advantage(logits: Tensor, positive: Tensor, candidate: Tensor) -> Tensor:
    """(N,) log Σ_{j ∉ P(i)} e^{s_ij} − s_ip for a lone positive p, −inf without others; softplus of it is r_i − s_ip.

    r_i − s_ip itself, and the probability of p minus 1, cancel where p is nearly certain, in float64 too.
    """
    others = candidate & ~positive
    alone = ~others.any(1)
    # A row without others becomes all zeros first: the gradient of its logsumexp, −inf, is NaN even times 0.
    lse = torch.where(alone[:, None], 0, logits.masked_fill(~others, -torch.inf)).logsumexp(1)
    return torch.where(alone, -torch.inf, lse - torch.where(positive, logits, 0).sum(1))


def softmax_losses(logits: Tensor, positive: Tensor, candidate: Tensor, label_smoothing: float) -> Tensor:
    """(N,) InfoNCE of every row: r_i − (1 − e)·mean over positives − e·mean over candidates; 0 without a positive."""
    positives = positive.sum(1)
    anchor, lone = positives > 0, positives == 1
    lse = torch.where(anchor[:, None], logits.masked_fill(~candidate, -torch.inf), 0).logsumexp(1)
    positive_mean = torch.where(positive, logits, 0).sum(1) / positives.clamp(min=1)
    # where() inside and outside: what is not chosen must not send a NaN back.
    advantage = others_advantage(torch.where(lone[:, None], logits, 0), positive & lone[:, None], candidate)
    loss = torch.where(lone, torch.logaddexp(advantage, torch.zeros_like(advantage)), lse - positive_mean)
    if label_smoothing:
        candidate_mean = torch.where(candidate, logits, 0).sum(1) / candidate.sum(1).clamp(min=1)
        loss = loss + label_smoothing * (positive_mean - candidate_mean)
    return torch.where(anchor, loss, 0)


def sigmoid_losses(logits: Tensor, positive: Tensor, candidate: Tensor) -> Tensor:
    """(N,) Σ_j softplus(−z_ij s_ij), z = +1 for a positive pair and −1 otherwise (SigLIP, arXiv 2303.15343)."""
    signed = torch.where(positive, logits, -logits)
    return torch.where(candidate, -F.logsigmoid(signed), 0).sum(1)


def anchor_losses(
    image: Tensor,
    text: Tensor,
    mask: Tensor | None,
    scale: Tensor | float,
    bias: Tensor | float | None,
    *,
    objective: str,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    ignore_ids: tuple[Tensor, Tensor] | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses of rows (N,) and columns (M,), and how many positives each has. A sigmoid's columns have no loss: (0,)."""
    logits = similarity(image, text, mask) * scale
    if bias is not None:
        logits = logits + bias
    positive = positive_pairs(image, text, image_ids, text_ids)
    candidate = candidate_pairs(positive, *(ignore_ids or (None, None)))
    if objective == "sigmoid":
        rows, columns = sigmoid_losses(logits, positive, candidate), logits.new_zeros(0)
    else:
        rows = softmax_losses(logits, positive, candidate, label_smoothing)
        columns = softmax_losses(logits.T, positive.T, candidate.T, label_smoothing)
    return rows, columns, positive.sum(1).to(logits.dtype), positive.sum(0).to(logits.dtype)


def reduce_losses(
    rows: Tensor,
    columns: Tensor,
    row_positives: Tensor | None,
    column_positives: Tensor | None,
    *,
    objective: str,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """The loss of a batch (0-D) by "mean" or "sum", and what each side's losses count in it: (2,), or (1,) of rows.

    Where both sides have losses each counts ½. A mean is over a side's anchors, those with a positive (None: all have
    one); a side without any contributes 0. The sigmoid's is over all N rows.
    """
    both = OBJECTIVES[objective].both_sides
    sides, share = ((rows, columns), 0.5) if both else ((rows,), 1.0)
    if reduction == "sum":
        weights = rows.new_full((len(sides),), share)
    elif not both or row_positives is None or column_positives is None:
        weights = torch.stack([rows.new_full((), share / len(x)) for x in sides])
    else:
        anchors = torch.stack([(x > 0).sum() for x in (row_positives, column_positives)])
        weights = share / anchors.clamp(min=1).to(rows.dtype)
    return (torch.stack([x.sum() for x in sides]) * weights).sum(), weights


def reduce(
    rows: Tensor, columns: Tensor, row_positives: Tensor, column_positives: Tensor, *, objective: str, reduction: str
) -> Tensor | tuple[Tensor, Tensor]:
    """The loss of a batch from its anchors' losses: "mean", "sum" or "none"."""
    if reduction == "none":
        return (rows, columns) if OBJECTIVES[objective].both_sides else rows
    return reduce_losses(rows, columns, row_positives, column_positives, objective=objective, reduction=reduction)[0]


def loss(
    image: Tensor,
    text: Tensor,
    mask: Tensor | None,
    scale: Tensor | float,
    bias: Tensor | float | None = None,
    *,
    objective: str = "softmax",
    reduction: str = "mean",
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    ignore_ids: tuple[Tensor, Tensor] | None = None,
    label_smoothing: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """The whole loss by definition; `clip_loss`, `siglip_loss` and `smartclip_loss` must equal it."""
    terms = anchor_losses(
        image,
        text,
        mask,
        scale,
        bias,
        objective=objective,
        image_ids=image_ids,
        text_ids=text_ids,
        ignore_ids=ignore_ids,
        label_smoothing=label_smoothing,
    )
    return reduce(*terms, objective=objective, reduction=reduction)


def similarity_gradients(
    image: Tensor, text: Tensor, mask: Tensor | None, grad_sim: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """∂L/∂image, ∂L/∂text and ∂L/∂mask from ∂L/∂sim (N, M), in the precision of the scores."""
    dtype = compute_dtype(image.dtype)
    x, t, grad_sim = image.to(dtype), text.to(dtype), grad_sim.to(dtype)
    if mask is None:
        return grad_sim @ t, grad_sim.T @ x, None
    m = mask.to(dtype)
    square, text_square = x.square() @ m.square().T, t.square().sum(1)
    undefined = (square <= MIN_IMAGE_NORM**2) | (text_square <= MIN_TEXT_NORM**2)
    square, text_square = (
        torch.where(undefined, 1, square),
        torch.where(text_square <= MIN_TEXT_NORM**2, 1, text_square),
    )
    grad_sim = torch.where(undefined, 0, grad_sim)
    sim = x @ (m * t).T / (square.sqrt() * text_square.sqrt())
    grad_product = grad_sim / (square.sqrt() * text_square.sqrt())
    grad_square = -grad_sim * sim / (2 * square)
    grad_image = grad_product @ (m * t) + 2 * x * (grad_square @ m.square())
    grad_masked_text, grad_mask_square = grad_product.T @ x, grad_square.T @ x.square()
    grad_text = grad_masked_text * m - t * ((grad_sim * sim).sum(0) / text_square)[:, None]
    grad_mask = grad_masked_text * t + 2 * m * grad_mask_square
    return grad_image, grad_text, grad_mask


def topk(sim: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices of the k best of every row, best first, ties to the lower index."""
    values, indices = sim.sort(dim=1, descending=True, stable=True)
    return values[:, :k].contiguous(), indices[:, :k].contiguous()


def ranks(sim: Tensor, positive: Tensor) -> Tensor:
    """(N,) int64: 1 for a row whose best candidate is positive; one more than there are candidates without a positive.

    Ties go to the lower index. A row whose positives score NaN ranks behind every other candidate.
    """
    n_candidates = sim.shape[1]
    has_positive = positive.any(1)
    best, best_index = torch.where(positive, sim, -torch.inf).max(1)  # NaN counts as largest
    first = torch.where(positive & (sim == best[:, None]), torch.arange(n_candidates, device=sim.device), n_candidates)
    best_index = torch.where(best.isnan(), best_index, first.min(1).values)
    index = torch.arange(n_candidates, device=sim.device)
    worse = (sim < best[:, None]) | ((sim == best[:, None]) & (index > best_index[:, None]))
    not_worse = ~worse & (index != best_index[:, None])
    return torch.where(has_positive, not_worse.sum(1) + 1, n_candidates + 1)
