"""What the ops do: a checked problem, given to its backend."""

from __future__ import annotations

from typing import Any

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
from smartclip_kernels.ops.library import implement
from smartclip_kernels.problem import Needs


@implement("loss")
def _loss(*arguments: Any) -> tuple[Tensor, ...]:
    problem = loss_problem(*arguments)
    return backends.resolve(arguments[11], problem.image.device).loss(problem)[2:]


@implement("loss_backward")
def _loss_backward(
    grad_rows: Tensor,
    grad_columns: Tensor,
    row_statistics: Tensor,
    column_statistics: Tensor,
    kept: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    loss_arguments, needs, unrounded = split_backward(arguments)
    problem = loss_problem(*loss_arguments)
    backend = backends.resolve(loss_arguments[11], problem.image.device)
    saved = (row_statistics, column_statistics, kept)
    return backend.loss_backward(problem, saved, (grad_rows, grad_columns), Needs(*needs), unrounded)


@implement("reduced_loss")
def _reduced_loss(*arguments: Any) -> Tensor:
    return _loss_forward(*arguments)[0]


@implement("loss_forward")
def _loss_forward(*arguments: Any) -> tuple[Tensor, ...]:
    """What the backward pass of a reduced loss needs beside the loss: no anchor's own loss, no products."""
    problem = reduced_problem(*arguments)
    loss, weights, _, _, *statistics, _ = backends.resolve(arguments[11], problem.image.device).loss(problem)
    return loss, weights, *statistics


@implement("loss_and_gradients")
def _loss_and_gradients(*arguments: Any) -> tuple[Tensor, ...]:
    reduced_arguments, needs = split_needs(arguments)
    problem = reduced_problem(*reduced_arguments)
    return backends.resolve(arguments[11], problem.image.device).loss_and_gradients(problem, Needs(*needs))


@implement("masked_similarity")
def _masked_similarity(image: Tensor, text: Tensor, mask: Tensor, backend: str) -> Tensor:
    return backends.resolve(backend, image.device).masked_similarity(similarity_problem(image, text, mask))


@implement("masked_similarity_backward")
def _masked_similarity_backward(
    grad_sim: Tensor, image: Tensor, text: Tensor, mask: Tensor, backend: str, needs: list[bool]
) -> tuple[Tensor, ...]:
    problem = similarity_problem(image, text, mask)
    return backends.resolve(backend, image.device).masked_similarity_backward(problem, grad_sim, feature_needs(needs))


@implement("masked_topk")
def _masked_topk(image: Tensor, text: Tensor, mask: Tensor, k: int, per: str, backend: str) -> tuple[Tensor, Tensor]:
    problem = similarity_problem(image, text, mask)
    check_topk(k, per)
    return backends.resolve(backend, image.device).masked_topk(problem, k, per == "text")


@implement("best_positive")
def _best_positive(*arguments: Any) -> Tensor:
    problem, (per, backend) = ranks_problem(*arguments), arguments[-2:]
    return backends.resolve(backend, problem.image.device).best_positive(problem, per == "text")


@implement("retrieval_ranks")
def _retrieval_ranks(*arguments: Any) -> Tensor:
    problem, (per, backend) = ranks_problem(*arguments), arguments[-2:]
    return backends.resolve(backend, problem.image.device).retrieval_ranks(problem, per == "text")
