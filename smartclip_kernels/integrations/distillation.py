"""A CLIP that learns from another CLIP's soft targets, without the N×M logits of either.

With s = α · image · textᵀ of the student, t of the teacher, and p_i = softmax(t_i) (Hinton et al. 2015, arXiv
1503.02531), the cross-entropy of row i is −Σ_j p_ij log softmax(s_i)_j = log Σ_j e^{s_ij} − Σ_j p_ij s_ij. Three
numbers a row and three a column are all that the tiles leave behind, and
∂/∂s_ij = softmax(s_i)_j − p_ij, so that the backward pass makes tile after tile of both once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from smartclip_kernels import checks
from smartclip_kernels.backends import workspace_bytes
from smartclip_kernels.ops import first_order
from smartclip_kernels.reference import compute_dtype

_TILES = 8  # buffers of a tile's size that are alive at once: two logits, four exponentials, what torch needs besides
_COLUMNS = 2048


def clip_and_distillation(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    teacher_image: Tensor,
    teacher_text: Tensor,
    teacher_logit_scale: Tensor | float,
    *,
    first_text: int = 0,
    both_sides: bool = True,
) -> tuple[Tensor, Tensor]:
    """CLIP's loss and the cross-entropy against a teacher's soft targets, in memory linear in N + M.

    Args:
        image: (N, D) and text: (M, D) of the student, in one dtype and on one device; image i matches text
            first_text + i.
        teacher_image: (N, D'), teacher_text: (M, D'). The teacher is a constant.
        logit_scale, teacher_logit_scale: exponentiated: a float, a 0-D or a 1-element tensor.
        both_sides: ½ of the mean over images + ½ of the mean over texts, for N = M; otherwise the mean over images.

    Returns:
        Two 0-D tensors, float32 (float64 for float64). Gradients flow to image, text and logit_scale; second
        derivatives raise `RuntimeError`.

    Raises:
        TypeError, ValueError: features do not fit one another, or the teacher's require a gradient.
    """
    scale, teacher_scale = (_scalar(x, image) for x in (logit_scale, teacher_logit_scale))
    _check(image, text, scale, teacher_image, teacher_text, teacher_scale, both_sides)
    device = image.device.type
    if torch.is_autocast_enabled(device):  # as `mm` would; the scores themselves are never rounded
        dtype = torch.get_autocast_dtype(device)
        image, text, teacher_image, teacher_text = (x.to(dtype) for x in (image, text, teacher_image, teacher_text))
    dtype = compute_dtype(image.dtype)
    with torch.autocast(device, enabled=False):
        contrastive, distill = _Distillation.apply(
            image, text, scale.to(dtype), teacher_image, teacher_text, teacher_scale.to(dtype), first_text, both_sides
        )
    return contrastive, distill


def _scalar(x: Tensor | float, image: Tensor) -> Tensor:
    return torch.as_tensor(x, device=image.device).reshape(-1).squeeze()


def _check(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    teacher_scale: Tensor,
    both_sides: bool,
) -> None:
    checks.features(image, text)
    checks.features(teacher_image, teacher_text)
    checks.one_element("logit_scale", scale, image)
    checks.one_element("teacher_logit_scale", teacher_scale, image)
    teacher = {"teacher_image": teacher_image, "teacher_text": teacher_text, "teacher_logit_scale": teacher_scale}
    for name, x in teacher.items():
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: got a tensor that requires a gradient, needs a constant: detach it")
    for name, x, student in (("teacher_image", teacher_image, image), ("teacher_text", teacher_text, text)):
        if len(x) != len(student):
            raise ValueError(f"{name}: got {len(x)} rows, needs the student's, {len(student)}")
    if both_sides:
        checks.paired(image, text, None)


class _Side:
    """What the tiles have told so far of one side's anchors: log Σ e^s, log Σ e^t and Σ p s."""

    def __init__(self, anchors: int, like: Tensor) -> None:
        self.student = like.new_full((anchors,), -torch.inf)
        self.teacher = like.new_full((anchors,), -torch.inf)
        self.agreement = like.new_zeros(anchors)

    def add(self, anchors: slice, s: Tensor, t: Tensor, dim: int) -> None:
        """A tile of logits, whose candidates lie along `dim`."""
        self.student[anchors] = torch.logaddexp(self.student[anchors], s.logsumexp(dim))
        before, here = self.teacher[anchors], t.logsumexp(dim)
        after = torch.logaddexp(before, here)
        agreement = (t.softmax(dim) * s).sum(dim)
        self.agreement[anchors] = self.agreement[anchors] * (before - after).exp() + agreement * (here - after).exp()
        self.teacher[anchors] = after


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, first_text, both_sides = arguments
        image, text, scale, teacher_image, teacher_text, teacher_scale = tensors
        positive = scale.new_empty(len(image))
        rows, columns = _Side(len(image), scale), _Side(len(text), scale)
        for i, j in _tiles(image, text):
            s, t = _sim(image, text, i, j) * scale, _sim(teacher_image, teacher_text, i, j) * teacher_scale
            rows.add(i, s, t, 1)
            if both_sides:
                columns.add(j, s, t, 0)
            found, pairs = _positives(s, i, j, first_text)
            positive[found] = pairs
        contrastive, distill = (rows.student - positive).mean(), (rows.student - rows.agreement).mean()
        if both_sides:
            contrastive = (contrastive + (columns.student - positive).mean()) / 2
            distill = (distill + (columns.student - columns.agreement).mean()) / 2
        ctx.save_for_backward(*tensors, rows.student, rows.teacher, columns.student, columns.teacher)
        ctx.constants = first_text, both_sides
        return contrastive, distill

    @staticmethod
    def backward(ctx: Any, grad_contrastive: Tensor, grad_distill: Tensor) -> Any:
        with torch.no_grad():
            grads = _gradients(ctx, grad_contrastive, grad_distill)
        made = iter(first_order(tuple(x for x in grads if x is not None), (grad_contrastive, *ctx.saved_tensors)))
        return *(None if x is None else next(made) for x in grads), *([None] * 5)


def _gradients(ctx: Any, grad_contrastive: Tensor, grad_distill: Tensor) -> list[Tensor | None]:
    """Of image, text and logit_scale, where needed."""
    image, text, scale, teacher_image, teacher_text, teacher_scale, *statistics = ctx.saved_tensors
    row_student, row_teacher, column_student, column_teacher = statistics
    first_text, both_sides = ctx.constants
    needs_image, needs_text, needs_scale = ctx.needs_input_grad[:3]
    # Sums over tiles are in the precision of the scores: of a row panel of images at a time, of all texts.
    grad_image = torch.empty_like(image) if needs_image else None
    grad_text = torch.zeros_like(text, dtype=scale.dtype) if needs_text else None
    grad_scale = torch.zeros_like(scale) if needs_scale else None
    share = (0.5 if both_sides else 1.0) / len(image)
    hard, soft = grad_contrastive * share, grad_distill * share
    for i, j in _tiles(image, text):
        sim = _sim(image, text, i, j)
        s, t = sim * scale, _sim(teacher_image, teacher_text, i, j) * teacher_scale
        G = (s - row_student[i, None]).exp_().mul_(hard + soft)
        G -= (t - row_teacher[i, None]).exp_().mul_(soft)
        if both_sides:
            G += (s - column_student[j]).exp_().mul_(hard + soft)
            G -= (t - column_teacher[j]).exp_().mul_(soft)
        _positives(G, i, j, first_text)[1].sub_(hard * (2 if both_sides else 1))
        if grad_image is not None:
            if j.start == 0:
                sums = G.new_zeros(len(G), image.shape[1])
            sums.addmm_(G, text[j].to(G.dtype))
            if j.stop == len(text):
                grad_image[i] = sums.mul_(scale)
        if grad_text is not None:
            grad_text[j].addmm_(G.T, image[i].to(G.dtype))
        if grad_scale is not None:
            grad_scale += G.mul_(sim).sum()
    return [grad_image, None if grad_text is None else grad_text.mul_(scale).to(text.dtype), grad_scale]


def _sim(a: Tensor, b: Tensor, i: slice, j: slice) -> Tensor:
    """A tile of a · bᵀ, half precision widened: its product would be rounded."""
    dtype = compute_dtype(a.dtype)
    return a[i].to(dtype) @ b[j].to(dtype).T


def _tiles(image: Tensor, text: Tensor) -> Iterator[tuple[slice, slice]]:
    """Row and column ranges of all tiles, each of which fits the workspace."""
    numbers = max(1, workspace_bytes(image.device) // (_TILES * compute_dtype(image.dtype).itemsize))
    columns = min(len(text), _COLUMNS, numbers)
    rows = max(1, numbers // columns)
    for i in range(0, len(image), rows):
        for j in range(0, len(text), columns):
            yield slice(i, min(i + rows, len(image))), slice(j, min(j + columns, len(text)))


def _positives(tile: Tensor, i: slice, j: slice, first_text: int) -> tuple[slice, Tensor]:
    """The images whose own text is in the tile, and a view of those pairs; both may be empty."""
    offset = first_text + i.start - j.start
    if not -tile.shape[0] < offset < tile.shape[1]:
        return slice(0, 0), tile.new_empty(0)
    pairs = tile.diagonal(offset)
    first = i.start + max(0, -offset)
    return slice(first, first + len(pairs)), pairs
