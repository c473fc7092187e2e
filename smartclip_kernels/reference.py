"""The definition of every operation, in eager torch.

The formulas of the documentation, line by line, on any device and in any precision. In float64 this file is the
truth that every backend is tested against; as backend ``"reference"`` it is the naive implementation that the
library replaces. It holds N×M matrices: use it at small sizes only.

Half-precision inputs are widened to float32; everything after the inputs is computed in that precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

MIN_IMAGE_NORM = 1e-6
"""Where ‖image ⊙ mask‖ is no larger than this, the similarity is 0 and passes no gradient."""
MIN_TEXT_NORM = 1e-12
"""Where ‖text‖ is no larger than this, the similarity is 0 and passes no gradient."""
MIN_NORM = 1e-12
"""A prefix of features is divided by its norm, where that is less than this by this, as `F.normalize` does."""

DIRECTIONS = ("image_to_text", "text_to_image")
"""Whose losses count: those of images among texts, those of texts among images."""
SYMMETRIC = (0.5, 0.5)
"""Shares of images' and texts' losses in the whole, where both count."""


def shares_of(directions: Sequence[str]) -> tuple[float, float]:
    image, text = (float(name in directions) for name in DIRECTIONS)
    return image / (image + text), text / (image + text)


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


def normalised(x: Tensor, width: int) -> Tensor:
    """x[:, :width] in rows of length 1, in the precision of the scores."""
    return F.normalize(x[:, :width].to(compute_dtype(x.dtype)), dim=1, eps=MIN_NORM)


def normalised_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """∂L/∂x from ∂L/∂`normalised`(x, width): zeros beyond the width."""
    width = grad.shape[1]
    unit = normalised(x, width)
    norm = torch.linalg.vector_norm(x[:, :width].to(grad.dtype), dim=1, keepdim=True)
    along = torch.where(norm < MIN_NORM, 0, (grad * unit).sum(1, keepdim=True))
    return F.pad((grad - unit * along) / norm.clamp(min=MIN_NORM), (0, x.shape[1] - width))


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


def paired_similarity(image: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
    """(N,): `similarity` of row i with row i alone."""
    dtype = compute_dtype(image.dtype)
    image, text = image.to(dtype), text.to(dtype)
    if mask is None:
        return (image * text).sum(1)
    image = image * mask.to(dtype)
    norms = torch.linalg.vector_norm(image, dim=1), torch.linalg.vector_norm(text, dim=1)
    undefined = (norms[0] <= MIN_IMAGE_NORM) | (norms[1] <= MIN_TEXT_NORM)
    return torch.where(undefined, 0, (image * text).sum(1) / torch.where(undefined, 1, norms[0] * norms[1]))


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


def ceiling_vectors(
    margin: tuple[Tensor, Tensor] | float | None, logits: Tensor, positive: Tensor, scale: Tensor | float
) -> tuple[Tensor | None, Tensor | None]:
    """Of all rows and all columns, constants: their best positive's logit plus α times the margin; without one, ∞."""
    if margin is None or isinstance(margin, (tuple, list)):
        return (None, None) if margin is None else (margin[0], margin[1])
    best = torch.where(positive, logits, -torch.inf).detach()
    above = margin * torch.as_tensor(scale, dtype=logits.dtype, device=logits.device).detach()
    rows, columns = (torch.where(positive.any(side), best.amax(side) + above, torch.inf) for side in (1, 0))
    return rows, columns


def below_ceiling(logits: Tensor, positive: Tensor, candidate: Tensor, ceiling: Tensor | None) -> Tensor:
    """(N, M) bool: which pairs count for their rows. Above a row's ceiling only its positives do."""
    # "Is not above": a NaN compares false and must stay visible.
    return candidate if ceiling is None else candidate & (positive | ~(logits > ceiling[:, None]))


def others_advantage(logits: Tensor, positive: Tensor, candidate: Tensor) -> Tensor:
    """(N,) log Σ_{j ∉ P(i)} e^{s_ij} − s_ip for a lone positive p, −inf without others; softplus of it is r_i − s_ip.

    r_i − s_ip itself, and the probability of p minus 1, cancel where p is nearly certain, in float64 too.
    """
    others = candidate & ~positive
    alone = ~others.any(1)
    # A row without others becomes all zeros first: the gradient of its logsumexp, −inf, is NaN even times 0.
    lse = torch.where(alone[:, None], 0, logits.masked_fill(~others, -torch.inf)).logsumexp(1)
    return torch.where(alone, -torch.inf, lse - torch.where(positive, logits, 0).sum(1))


def debiased_others(logits: Tensor, positive: Tensor, candidate: Tensor, tau: Tensor, least: Tensor | float) -> Tensor:
    """(N,) log g, g = max((O − K·τ·P/|P|) / (1 − τ), K·e^least): Chuang et al. 2020, arXiv 2007.00224.

    P and O are the sums of e^s over a row's positives and over its K others. −inf where g is 0; where τ is, log O.
    """
    others = candidate & ~positive
    top = torch.where(candidate.any(1), logits.masked_fill(~candidate, -torch.inf).amax(1), 0).detach()
    floor_top = least.detach().amax(1) if isinstance(least, Tensor) else top.new_tensor(least)
    top = torch.where(tau == 0, top, torch.maximum(top, floor_top))
    # Relative to the largest. where() inside, too: a logit that does not count may be larger.
    mass = torch.where(candidate, torch.where(candidate, logits - top[:, None], 0).exp(), 0)
    positive_mean = torch.where(positive, mass, 0).sum(1) / positive.sum(1).clamp(min=1)
    other_mass = torch.where(others, mass, 0).sum(1)
    debiased = (other_mass - others.sum(1) * tau * positive_mean) / (1 - tau)
    floor = torch.where(others, (least - top[:, None]).exp(), 0).sum(1)
    g = torch.where(tau == 0, other_mass, torch.where(debiased < floor, floor, debiased))
    none = g <= 0
    return torch.where(none, -torch.inf, torch.where(none, 1, g).log() + top)


def softmax_losses(
    logits: Tensor,
    positive: Tensor,
    candidate: Tensor,
    label_smoothing: float,
    tau: Tensor | None = None,
    least: Tensor | float = 0.0,
) -> Tensor:
    """(N,) InfoNCE of every row: r_i − (1 − e)·mean over positives − e·mean over candidates; 0 without a positive.

    With `tau` (N,), r_i = log(P + g), as `debiased_others`; `least` is a number, or one of every pair.
    """
    positives = positive.sum(1)
    anchor, lone = positives > 0, positives == 1
    positive_mean = torch.where(positive, logits, 0).sum(1) / positives.clamp(min=1)
    # where() inside and outside: what is not chosen must not send a NaN back.
    if tau is None:
        lse = torch.where(anchor[:, None], logits.masked_fill(~candidate, -torch.inf), 0).logsumexp(1)
        advantage = others_advantage(torch.where(lone[:, None], logits, 0), positive & lone[:, None], candidate)
    else:
        negatives = debiased_others(logits, positive, candidate, tau, least)
        right = torch.where(anchor[:, None], logits.masked_fill(~positive, -torch.inf), 0).logsumexp(1)
        lse = torch.logaddexp(right, negatives)
        advantage = negatives - torch.where(lone, positive_mean, 0)
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
    tau_plus: tuple[Tensor, Tensor] | float = 0.0,
    margin: tuple[Tensor, Tensor] | float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses of rows (N,) and columns (M,), and how many positives each has. A sigmoid's columns have no loss: (0,).

    `margin`: a number, or what `ceiling_vectors` makes of it.
    """
    logits = similarity(image, text, mask) * scale
    if bias is not None:
        logits = logits + bias
    positive = positive_pairs(image, text, image_ids, text_ids)
    candidate = candidate_pairs(positive, *(ignore_ids or (None, None)))
    if objective == "sigmoid":
        rows, columns = sigmoid_losses(logits, positive, candidate), logits.new_zeros(0)
    else:
        of_rows, of_columns = tau_vectors(tau_plus, *logits.shape, like=logits)
        least = least_logits(scale, bias, logits)
        row_ceiling, column_ceiling = ceiling_vectors(margin, logits, positive, scale)
        counts = below_ceiling(logits, positive, candidate, row_ceiling)
        rows = softmax_losses(logits, positive, counts, label_smoothing, of_rows, least)
        counts = below_ceiling(logits.T, positive.T, candidate.T, column_ceiling)
        columns = softmax_losses(logits.T, positive.T, counts, label_smoothing, of_columns, least.T)
    return rows, columns, positive.sum(1).to(logits.dtype), positive.sum(0).to(logits.dtype)


def tau_vectors(
    tau_plus: tuple[Tensor, Tensor] | float, n: int, m: int, *, like: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Of all rows and all columns, constants; None for 0, where there is nothing to correct."""
    if isinstance(tau_plus, (tuple, list)):
        image, text = (x.detach().to(like.dtype) for x in tau_plus)
        return image, text
    return (like.new_full((n,), tau_plus), like.new_full((m,), tau_plus)) if tau_plus else (None, None)


def least_logits(scale: Tensor | float, bias: Tensor | float | None, logits: Tensor) -> Tensor:
    """(N, M): β − α of every pair, the least that a cosine gives. α is a constant here; β moves all logits alike."""
    alpha = torch.as_tensor(scale, dtype=logits.dtype, device=logits.device).detach()
    return ((0.0 if bias is None else bias) - alpha).expand_as(logits)


def reduce_losses(
    rows: Tensor,
    columns: Tensor,
    row_positives: Tensor | None,
    column_positives: Tensor | None,
    *,
    objective: str,
    reduction: str,
    shares: Sequence[float] = SYMMETRIC,
) -> tuple[Tensor, Tensor]:
    """The loss of a batch (0-D) by "mean" or "sum", and what each side's losses count in it: (2,), or (1,) of rows.

    Where both sides have losses they have `shares`. A mean is over a side's anchors, those with a positive (None: all
    have one); a side without any contributes 0. The sigmoid's is over all N rows.
    """
    both = OBJECTIVES[objective].both_sides
    sides = ((rows, shares[0]), (columns, shares[1])) if both else ((rows, 1.0),)
    if reduction == "sum":
        weights = torch.stack([rows.new_full((), share) for _, share in sides])
    elif not both or row_positives is None or column_positives is None:
        weights = torch.stack([rows.new_full((), share / len(x)) for x, share in sides])
    else:
        anchors = torch.stack([(x > 0).sum() for x in (row_positives, column_positives)])
        weights = torch.stack([rows.new_full((), share) for _, share in sides]) / anchors.clamp(min=1).to(rows.dtype)
    # A side without a share is left out: 0 times its infinity would be NaN.
    sums = torch.stack([x.sum() if share else rows.new_zeros(()) for x, share in sides])
    return (sums * weights).sum(), weights


def asked_for(rows: Tensor, columns: Tensor, objective: str, shares: Sequence[float]) -> Tensor | tuple[Tensor, Tensor]:
    """The losses of anchors, of the sides that have a share."""
    if not OBJECTIVES[objective].both_sides or not shares[1]:
        return rows
    return (rows, columns) if shares[0] else columns


def reduce(
    rows: Tensor,
    columns: Tensor,
    row_positives: Tensor,
    column_positives: Tensor,
    *,
    objective: str,
    reduction: str,
    shares: Sequence[float] = SYMMETRIC,
) -> Tensor | tuple[Tensor, Tensor]:
    """The loss of a batch from its anchors' losses: "mean", "sum" or "none"."""
    if reduction == "none":
        return asked_for(rows, columns, objective, shares)
    positives = row_positives, column_positives
    return reduce_losses(rows, columns, *positives, objective=objective, reduction=reduction, shares=shares)[0]


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
    tau_plus: tuple[Tensor, Tensor] | float = 0.0,
    margin: float | None = None,
    directions: Sequence[str] = DIRECTIONS,
    dims: Sequence[int] = (),
) -> Tensor | tuple[Tensor, Tensor]:
    """The whole loss by definition; `clip_loss`, `siglip_loss` and `smartclip_loss` must equal it."""
    levels = [(normalised(image, d), normalised(text, d)) for d in dims] or [(image, text)]
    terms = [
        anchor_losses(
            *features,
            mask,
            scale,
            bias,
            objective=objective,
            image_ids=image_ids,
            text_ids=text_ids,
            ignore_ids=ignore_ids,
            label_smoothing=label_smoothing,
            tau_plus=tau_plus,
            margin=margin,
        )
        for features in levels
    ]
    rows, columns = (torch.stack([of_level[side] for of_level in terms]).sum(0) for side in (0, 1))
    return reduce(rows, columns, *terms[0][2:], objective=objective, reduction=reduction, shares=shares_of(directions))


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
