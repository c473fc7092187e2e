"""The reference backend: the definition in eager torch, with N×M matrices. Gradients are torch's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from smartclip_kernels import reference
from smartclip_kernels.problem import Needs, Problem, Tensors, empty_gradients


class ReferenceBackend:
    name = "reference"

    def unavailable(self) -> str:
        return ""

    def runs_on(self, device_type: str) -> bool:
        return True

    def kept_shape(self, problem: Problem) -> tuple[int, ...]:
        return (0,)

    def loss(self, problem: Problem) -> Tensors:
        rows, columns, row_positives, column_positives = _anchor_losses(problem, *problem.inputs())
        statistics = []
        for positives in (row_positives, column_positives if problem.traits.both_sides else column_positives[:0]):
            planes = positives.new_zeros(problem.traits.statistics, len(positives))
            planes[0] = positives
            statistics.append(planes)
        return rows, columns, *statistics, rows.new_empty(0)

    def loss_backward(self, problem: Problem, saved: Tensors, weights: Tensors, needs: Needs) -> Tensors:
        return _vjp(problem, needs, lambda *inputs: _anchor_losses(problem, *inputs)[:2], weights)[1]

    def loss_one_sweep(self, problem: Problem, needs: Needs) -> Tensors:
        one = problem.scale.new_ones((), dtype=problem.dtype)
        outputs, grads = _vjp(problem, needs, lambda *inputs: (_anchor_losses(problem, *inputs)[0].sum(),), (one,))
        return *outputs, *grads

    def masked_similarity(self, problem: Problem) -> Tensor:
        return reference.similarity(problem.image, problem.text, problem.mask)

    def masked_similarity_backward(self, problem: Problem, grad_sim: Tensor, needs: Needs) -> Tensors:
        def similarity(image: Tensor, text: Tensor, mask: Tensor | None, *_: Tensor | None) -> Tensors:
            return (reference.similarity(image, text, mask),)

        return _vjp(problem, needs, similarity, (grad_sim,))[1][:3]

    def masked_topk(self, problem: Problem, k: int, per_text: bool) -> tuple[Tensor, Tensor]:
        return reference.topk(_per(self.masked_similarity(problem), per_text), k)

    def retrieval_ranks(self, problem: Problem, per_text: bool) -> Tensor:
        positive = reference.positive_pairs(problem.image, problem.text, problem.image_ids, problem.text_ids)
        return reference.ranks(_per(self.masked_similarity(problem), per_text), _per(positive, per_text))


def _per(x: Tensor, text: bool) -> Tensor:
    return x.T if text else x


def _anchor_losses(
    problem: Problem, image: Tensor, text: Tensor, mask: Tensor | None, scale: Tensor, bias: Tensor | None
) -> Tensors:
    ignore = problem.image_ignore, problem.text_ignore
    return reference.anchor_losses(
        image,
        text,
        mask,
        scale.reshape(()).to(problem.dtype),
        None if bias is None else bias.reshape(()).to(problem.dtype),
        objective=problem.objective,
        image_ids=problem.image_ids,
        text_ids=problem.text_ids,
        ignore_ids=None if ignore[0] is None or ignore[1] is None else (ignore[0], ignore[1]),
        label_smoothing=problem.label_smoothing,
    )


def _vjp(
    problem: Problem, needs: Needs, function: Callable[..., Tensors], grad_outputs: Tensors
) -> tuple[Tensors, Tensors]:
    """The outputs of `function`, and the gradients asked for."""
    grads = empty_gradients(problem, needs)
    inputs = [None if x is None else x.detach() for x in problem.inputs()]
    wanted = [x.requires_grad_() for x, need in zip(inputs, needs, strict=True) if need and x is not None]
    with torch.enable_grad():
        outputs = function(*inputs)
    if wanted:
        differentiable = [(out, grad) for out, grad in zip(outputs, grad_outputs, strict=True) if out.requires_grad]
        out, grad = zip(*differentiable, strict=True)
        found = iter(torch.autograd.grad(out, wanted, grad, materialize_grads=True))
        grads = [next(found).contiguous() if need else empty for empty, need in zip(grads, needs, strict=True)]
    if needs.bias and problem.traits.shift_invariant:
        grads[4] = torch.zeros_like(grads[4])
    return tuple(out.detach() for out in outputs), tuple(grads)


BACKEND = ReferenceBackend()
