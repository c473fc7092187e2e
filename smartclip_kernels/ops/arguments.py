"""From an op's arguments to a checked problem."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smartclip_kernels import backends, checks
from smartclip_kernels.problem import Correction, Needs, Problem
from smartclip_kernels.reference import compute_dtype


def loss_problem(*loss_arguments: Any) -> Problem:
    """A checked problem, and the workspace that its backend gets."""
    *arguments, _, workspace = loss_arguments[:13]
    *numbers, dims = loss_arguments[13:]
    correction = Correction(*numbers)
    checks.problem(*arguments)
    problem = Problem(*arguments)
    checks.correction(correction, problem.image, problem.text, problem.objective)
    if dims:
        checks.dims(dims, problem.image)
        backend = backends.resolve(loss_arguments[11], problem.image.device)
        checks.one_sweep(problem.mask, correction.image_ceiling, backend.name, backend.nests)
    workspace = workspace or backends.workspace_bytes(problem.image.device)
    return problem._replace(workspace=workspace, correction=correction, dims=dims)


def similarity_problem(image: Tensor, text: Tensor, mask: Tensor | None) -> Problem:
    checks.features(image, text)
    if mask is not None:
        checks.text_mask(mask, image, text)
    one = torch.ones((), dtype=compute_dtype(image.dtype), device=image.device)
    return Problem(image, text, mask, one, workspace=backends.workspace_bytes(image.device))


def split_backward(arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[bool], bool]:
    """Those of the loss, `needs` and `unrounded`."""
    needs, unrounded, *tail = arguments[13:]
    return (*arguments[:13], *tail), needs, unrounded


def reduced_problem(*arguments: Any) -> Problem:
    reduction, shares, *tail = arguments[13:]
    checks.choice("reduction", reduction, ("sum", "mean"))
    return loss_problem(*arguments[:13], *tail)._replace(reduction=reduction, shares=shares)


def split_needs(arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[bool]]:
    """Those of a reduced loss, and `needs`."""
    return (*arguments[:13], *arguments[14:]), arguments[13]


def ranks_problem(
    image: Tensor,
    text: Tensor,
    mask: Tensor | None,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    per: str,
    backend: str,
) -> Problem:
    problem = similarity_problem(image, text, mask)
    checks.ids(("image_ids", "text_ids"), (image_ids, text_ids), image, text)
    checks.paired(image, text, image_ids)
    checks.choice("per", per, checks.SIDES)
    return problem._replace(image_ids=image_ids, text_ids=text_ids)


def feature_needs(needs: list[bool]) -> Needs:
    return Needs(needs[0], needs[1], needs[2], False, False)


def check_topk(k: int, per: str) -> None:
    checks.choice("per", per, checks.SIDES)
    if k < 1:
        raise ValueError(f"k: got {k}, needs at least 1")
