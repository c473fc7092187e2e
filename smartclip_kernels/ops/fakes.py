"""The shapes and dtypes of the results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smartclip_kernels import backends
from smartclip_kernels.ops.arguments import (
    check_topk,
    feature_needs,
    loss_problem,
    ranks_problem,
    reduced_problem,
    similarity_problem,
    split_backward,
    split_needs,
)
from smartclip_kernels.ops.library import fake
from smartclip_kernels.problem import Needs, Problem, empty_gradients


@fake("loss")
def _loss_fake(*arguments: Any) -> tuple[Tensor, ...]:
    problem = loss_problem(*arguments)
    empty, m = problem.scale.new_empty, problem.m if problem.traits.both_sides else 0
    products = backends.resolve(arguments[11], problem.image.device).kept_shape(problem)
    return empty(problem.n), empty(m), *_statistics_fake(problem), empty(products)


def _statistics_fake(problem: Problem) -> tuple[Tensor, ...]:
    m = problem.m if problem.traits.both_sides else 0
    return tuple(problem.scale.new_empty(problem.planes, count) for count in (problem.n, m))


@fake("loss_backward")
def _loss_backward_fake(
    grad_rows: Tensor,
    grad_columns: Tensor,
    row_statistics: Tensor,
    column_statistics: Tensor,
    kept: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    loss_arguments, needs, unrounded = split_backward(arguments)
    return tuple(empty_gradients(loss_problem(*loss_arguments), Needs(*needs), unrounded=unrounded))


@fake("reduced_loss")
def _reduced_loss_fake(*arguments: Any) -> Tensor:
    return reduced_problem(*arguments).scale.new_empty(())


@fake("loss_forward")
def _loss_forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    problem = reduced_problem(*arguments)
    weights = problem.scale.new_empty(2 if problem.traits.both_sides else 1)
    return problem.scale.new_empty(()), weights, *_statistics_fake(problem)


@fake("loss_and_gradients")
def _loss_and_gradients_fake(*arguments: Any) -> tuple[Tensor, ...]:
    reduced_arguments, needs = split_needs(arguments)
    problem = reduced_problem(*reduced_arguments)
    return problem.scale.new_empty(()), *empty_gradients(problem, Needs(*needs), unrounded=True)


@fake("masked_similarity")
def _masked_similarity_fake(image: Tensor, text: Tensor, mask: Tensor, backend: str) -> Tensor:
    problem = similarity_problem(image, text, mask)
    return problem.scale.new_empty(problem.n, problem.m)


@fake("masked_similarity_backward")
def _masked_similarity_backward_fake(
    grad_sim: Tensor, image: Tensor, text: Tensor, mask: Tensor, backend: str, needs: list[bool]
) -> tuple[Tensor, ...]:
    return tuple(empty_gradients(similarity_problem(image, text, mask), feature_needs(needs))[:3])


@fake("masked_topk")
def _masked_topk_fake(
    image: Tensor, text: Tensor, mask: Tensor, k: int, per: str, backend: str
) -> tuple[Tensor, Tensor]:
    problem = similarity_problem(image, text, mask)
    check_topk(k, per)
    anchors, candidates = (problem.m, problem.n) if per == "text" else (problem.n, problem.m)
    values = problem.scale.new_empty(anchors, min(k, candidates))
    return values, torch.empty_like(values, dtype=torch.int64)


@fake("best_positive")
def _best_positive_fake(*arguments: Any) -> Tensor:
    problem, per = ranks_problem(*arguments), arguments[-2]
    return problem.scale.new_empty(problem.m if per == "text" else problem.n)


@fake("retrieval_ranks")
def _retrieval_ranks_fake(*arguments: Any) -> Tensor:
    problem, per = ranks_problem(*arguments), arguments[-2]
    return problem.image.new_empty(problem.m if per == "text" else problem.n, dtype=torch.int64)
