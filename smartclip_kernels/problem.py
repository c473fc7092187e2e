"""What an op computes: the inputs of one loss, and what every backend offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from smartclip_kernels.reference import OBJECTIVES, SYMMETRIC, Objective, compute_dtype

Tensors = tuple[Tensor, ...]


class Needs(NamedTuple):
    """Which gradients are asked for; the others come back empty."""

    image: bool
    text: bool
    mask: bool
    scale: bool
    bias: bool


class Correction(NamedTuple):
    """How anchors' negatives are corrected: a number each, (N,) of images and (M,) of texts, constants in the precision
    of the scores; both sides' or neither's."""

    image_tau: Tensor | None = None  # debiased negatives
    text_tau: Tensor | None = None
    image_ceiling: Tensor | None = None  # a logit above which what is not positive does not count for the anchor
    text_ceiling: Tensor | None = None


class Problem(NamedTuple):
    """One batch, checked. Without a mask the similarity is the dot product."""

    image: Tensor  # (N, D)
    text: Tensor  # (M, D)
    mask: Tensor | None  # (M, D)
    scale: Tensor  # one element
    bias: Tensor | None = None
    image_ids: Tensor | None = None  # (N,) int64
    text_ids: Tensor | None = None  # (M,)
    image_ignore: Tensor | None = None
    text_ignore: Tensor | None = None
    objective: str = "softmax"
    label_smoothing: float = 0.0
    workspace: int = 0  # bytes
    reduction: str = "none"  # or "sum" or "mean", to one number
    shares: Sequence[float] = SYMMETRIC  # of the rows' and of the columns' losses in it, where both have them
    correction: Correction = Correction()
    dims: Sequence[int] = ()  # prefixes, each with a loss of its own; without any features are used as given

    @property
    def n(self) -> int:
        return self.image.shape[0]

    @property
    def m(self) -> int:
        return self.text.shape[0]

    @property
    def d(self) -> int:
        return self.image.shape[1]

    @property
    def traits(self) -> Objective:
        return OBJECTIVES[self.objective]

    @property
    def levels(self) -> int:
        """How many losses are summed."""
        return max(1, len(self.dims))

    @property
    def planes(self) -> int:
        """Numbers kept of an anchor between the sweeps, by all levels."""
        return self.traits.statistics * self.levels

    @property
    def dtype(self) -> torch.dtype:
        """Of scores, statistics and losses."""
        return compute_dtype(self.image.dtype)

    @property
    def counts_anchors(self) -> bool:
        """Whether a mean is over anchors with a positive; where nobody gave ids, all have one."""
        return self.image_ids is not None and self.traits.both_sides

    def least_logit(self) -> Tensor:
        """β − α, what features of length 1 give at least."""
        scale = self.scale.reshape(()).to(self.dtype)
        return -scale if self.bias is None else self.bias.reshape(()).to(self.dtype) - scale

    def inputs(self) -> tuple[Tensor | None, ...]:
        """What may have a gradient, in the order of `Needs`."""
        return self.image, self.text, self.mask, self.scale, self.bias


class LossCall(NamedTuple):
    """One loss as a caller asked for it."""

    arguments: tuple[Any, ...]  # those that all loss ops begin with
    reduction: str
    shares: tuple[float, float]
    correction: Correction  # without ceilings: those are made of the margin
    margin: float | None
    dims: tuple[int, ...] = ()  # in one sweep
    width: int | None = None  # of the prefixes that image and text are; None: they are whole


class Backend(Protocol):
    """What the ops call. Gradients come in the order of `Needs`; those not needed are empty tensors."""

    name: str
    rounds_scores: bool
    """G is rounded to half precision, where the inputs are of it, before the gradients' products"""
    cuts_sums: bool
    """products of half precision are summed on a matrix unit, which cuts off what float32 cannot hold"""
    nests: bool
    """takes a problem's `dims`; else a caller has one loss after the other, each of normalised prefixes"""

    def unavailable(self) -> str:
        """Why it cannot run here and what would help, or ""."""

    def runs_on(self, device_type: str) -> bool: ...

    def kept_shape(self, problem: Problem) -> tuple[int, ...]:
        """Shape of the products that `loss` keeps for `loss_backward`; (0,) where they do not fit the workspace."""

    def loss(self, problem: Problem) -> Tensors:
        """The loss and what each side's losses count in it, as `reference.reduce_losses`; rows (N,), columns (M,),
        statistics of rows and columns (planes, N or M), kept products."""

    def loss_backward(
        self, problem: Problem, saved: Tensors, weights: Tensors, needs: Needs, unrounded: bool
    ) -> Tensors:
        """Gradients, from what `loss` returned after the losses and the gradients of rows and columns.

        Statistics may know of more candidates than the problem has. The gradients of rows and columns may be one
        number, expanded. `unrounded`: in the scores' dtype.
        """

    def loss_and_gradients(self, problem: Problem, needs: Needs) -> Tensors:
        """The reduced loss (0-D) and its gradients in the scores' dtype."""

    def masked_similarity(self, problem: Problem) -> Tensor: ...

    def masked_similarity_backward(self, problem: Problem, grad_sim: Tensor, needs: Needs) -> Tensors: ...

    def masked_topk(self, problem: Problem, k: int, per_text: bool) -> tuple[Tensor, Tensor]: ...

    def best_positive(self, problem: Problem, per_text: bool) -> Tensor:
        """Of every text, or every image: the largest similarity of a positive, NaN before all; −∞ without one."""

    def retrieval_ranks(self, problem: Problem, per_text: bool) -> Tensor: ...


def of_anchors(weights: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A number a side as one an anchor: expanded, not copied, so that a backend can tell that they are all the same.

    Columns that are no anchors have none.
    """
    row, *column = weights.unbind()
    return row.expand(sizes[0]), (column or [row])[0].expand(sizes[1])


def ranks_of_ids(row_ids: Tensor, column_ids: Tensor) -> tuple[Tensor, Tensor]:
    """int32 ranks, equal where the ids are: kernels compare half as many bytes. A sort, so no synchronisation."""
    ids, order = torch.cat([row_ids, column_ids]).sort()
    ranks = torch.empty_like(order, dtype=torch.int32)
    changes = torch.zeros_like(ids, dtype=torch.int32)
    changes[1:] = ids[1:] != ids[:-1]
    ranks[order] = changes.cumsum(0, dtype=torch.int32)
    return ranks[: len(row_ids)].contiguous(), ranks[len(row_ids) :].contiguous()


def empty_gradients(problem: Problem, needs: Needs, *, unrounded: bool = False) -> list[Tensor]:
    """Uninitialised gradients where they are needed, else empty tensors; in the inputs' dtypes or in the scores'."""
    return [
        torch.empty_like(x, dtype=problem.dtype if unrounded else None, memory_format=torch.contiguous_format)
        if need and x is not None
        else torch.empty(0, dtype=(problem.scale if x is None else x).dtype, device=problem.image.device)
        for x, need in zip(problem.inputs(), needs, strict=True)
    ]
