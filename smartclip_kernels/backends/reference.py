"""The reference backend: the definition in eager torch, with N×M matrices and gradients by formula."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smartclip_kernels import reference
from smartclip_kernels.problem import Needs, Problem, Tensors, empty_gradients, of_anchors
from smartclip_kernels.states import STATES


class ReferenceBackend:
    name = "reference"
    rounds_scores = False
    cuts_sums = False
    nests = True

    def unavailable(self) -> str:
        return ""

    def runs_on(self, device_type: str) -> bool:
        return True

    def kept_shape(self, problem: Problem) -> tuple[int, ...]:
        return (0,)

    def loss(self, problem: Problem) -> Tensors:
        totals, weights, rows, columns, *states = zip(*map(_loss, _levels(problem)), strict=True)
        total, of_rows, of_columns = (torch.stack(x).sum(0) for x in (totals, rows, columns))
        return total, weights[0], of_rows, of_columns, *map(torch.cat, states), total.new_empty(0)

    def loss_backward(
        self, problem: Problem, saved: Tensors, weights: Tensors, needs: Needs, unrounded: bool
    ) -> Tensors:
        return _rounded(problem, needs, _gradients(problem, saved[:2], weights), unrounded=unrounded)

    def loss_and_gradients(self, problem: Problem, needs: Needs) -> Tensors:
        total, weights, rows, columns, *saved = self.loss(problem)
        grads = _gradients(problem, saved[:2], of_anchors(weights, (len(rows), len(columns))))
        return total, *_rounded(problem, needs, grads, unrounded=True)

    def masked_similarity(self, problem: Problem) -> Tensor:
        return reference.similarity(problem.image, problem.text, problem.mask)

    def masked_similarity_backward(self, problem: Problem, grad_sim: Tensor, needs: Needs) -> Tensors:
        features = reference.similarity_gradients(problem.image, problem.text, problem.mask, grad_sim)
        return _rounded(problem, needs, (*features, None, None))[:3]

    def masked_topk(self, problem: Problem, k: int, per_text: bool) -> tuple[Tensor, Tensor]:
        return reference.topk(_per(self.masked_similarity(problem), per_text), k)

    def best_positive(self, problem: Problem, per_text: bool) -> Tensor:
        positive = reference.positive_pairs(problem.image, problem.text, problem.image_ids, problem.text_ids)
        best = torch.where(positive, self.masked_similarity(problem), -torch.inf)
        return _per(best, per_text).amax(1)

    def retrieval_ranks(self, problem: Problem, per_text: bool) -> Tensor:
        positive = reference.positive_pairs(problem.image, problem.text, problem.image_ids, problem.text_ids)
        return reference.ranks(_per(self.masked_similarity(problem), per_text), _per(positive, per_text))


def _per(x: Tensor, text: bool) -> Tensor:
    return x.T if text else x


def _pair(image: Tensor | None, text: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if image is None or text is None else (image, text)


def _loss(problem: Problem) -> Tensors:
    """Of one level, without products."""
    rows, columns, *positives = reference.anchor_losses(
        problem.image,
        problem.text,
        problem.mask,
        problem.scale.reshape(()),
        None if problem.bias is None else problem.bias.reshape(()),
        objective=problem.objective,
        image_ids=problem.image_ids,
        text_ids=problem.text_ids,
        ignore_ids=_pair(problem.image_ignore, problem.text_ignore),
        label_smoothing=problem.label_smoothing,
        tau_plus=_pair(*problem.correction[:2]) or 0.0,
        margin=_pair(*problem.correction[2:]),
    )
    _, logits, positive, for_rows, for_columns = _scores(problem)
    state = STATES[problem.objective]
    row_states = state.of(logits, positive, for_rows)
    column_states = row_states.new_empty(len(row_states), 0)
    if problem.traits.both_sides:
        column_states = state.of(logits.T, positive.T, for_columns.T)
    total, weights = rows.new_empty(0), rows.new_empty(0)
    if problem.reduction != "none":
        total, weights = reference.reduce_losses(
            rows,
            columns,
            *positives,
            objective=problem.objective,
            reduction=problem.reduction,
            shares=problem.shares,
        )
    return total, weights, rows, columns, row_states, column_states


def _levels(problem: Problem) -> list[Problem]:
    """One for each of its prefixes, normalised."""
    image, text = problem.image, problem.text
    of_prefixes = [
        problem._replace(image=reference.normalised(image, d), text=reference.normalised(text, d), dims=())
        for d in problem.dims
    ]
    return of_prefixes or [problem]


def _scores(problem: Problem) -> Tensors:
    """sim, logits, and which pairs are positive and which count for rows and for columns: (N, M) all."""
    sim = reference.similarity(problem.image, problem.text, problem.mask)
    logits = sim * problem.scale if problem.bias is None else sim * problem.scale + problem.bias
    positive = reference.positive_pairs(problem.image, problem.text, problem.image_ids, problem.text_ids)
    candidate = reference.candidate_pairs(positive, problem.image_ignore, problem.text_ignore)
    _, _, row_ceiling, column_ceiling = problem.correction
    for_columns = reference.below_ceiling(logits.T, positive.T, candidate.T, column_ceiling).T
    return sim, logits, positive, reference.below_ceiling(logits, positive, candidate, row_ceiling), for_columns


def _gradients(problem: Problem, states: Sequence[Tensor], weights: Tensors) -> tuple[Tensor | None, ...]:
    """Of all levels."""
    levels, terms = _levels(problem), []
    for level, *of_level in zip(levels, *(x.chunk(len(levels)) for x in states), strict=True):
        image, text, *others = _level_gradients(level, of_level, weights)
        if problem.dims and image is not None and text is not None:
            image = reference.normalised_gradient(problem.image, image)
            text = reference.normalised_gradient(problem.text, text)
        terms.append((image, text, *others))
    return tuple(None if x[0] is None else torch.stack(x).sum(0) for x in zip(*terms, strict=True))


def _level_gradients(problem: Problem, states: Sequence[Tensor], weights: Tensors) -> tuple[Tensor | None, ...]:
    """Of image, text, mask, scale and bias, in the precision of the scores. States may know of more candidates."""
    sim, logits, positive, for_rows, for_columns = _scores(problem)
    state, smoothing, least = STATES[problem.objective], problem.label_smoothing, problem.least_logit()
    image_tau, text_tau, *_ = problem.correction
    pairs, turned = (logits, positive, for_rows), (logits.T, positive.T, for_columns.T)
    gradient = state.gradient(*pairs, states[0], weights[0], smoothing, image_tau, least)
    if problem.traits.both_sides:
        gradient = gradient + state.gradient(*turned, states[1], weights[1], smoothing, text_tau, least).T
    features = reference.similarity_gradients(problem.image, problem.text, problem.mask, gradient * problem.scale)
    bias = torch.zeros_like(sim[0, 0]) if problem.traits.shift_invariant else gradient.sum()
    return *features, (gradient * sim).sum(), bias


def _rounded(problem: Problem, needs: Needs, grads: tuple[Tensor | None, ...], *, unrounded: bool = False) -> Tensors:
    """Those asked for, in their inputs' shapes and dtypes."""
    return tuple(
        out if grad is None or not need else out.copy_(grad.reshape(out.shape))
        for out, grad, need in zip(empty_gradients(problem, needs, unrounded=unrounded), grads, needs, strict=True)
    )


BACKEND = ReferenceBackend()
