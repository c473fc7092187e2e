"""What the engine asks of a backend's kernels, and what they know of each side of the scores."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from smartclip_kernels.problem import Problem, Tensors
from smartclip_kernels.reference import reduce_losses
from smartclip_kernels.tiles import Tile


class Side:
    """One side's vectors (N or M numbers each) on their way to the kernels; the addresses of what is set go there."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.id: Tensor | None = None
        self.ignore: Tensor | None = None
        self.factor: Tensor | None = None
        self.tau: Tensor | None = None
        self.ceiling: Tensor | None = None
        self.statistics: Tensor | None = None
        self.loss: Tensor | None = None
        self.weight: Tensor | None = None
        self.anchor: Tensor | None = None
        self.score_gradient: Tensor | None = None


class LossLaunch(Protocol):
    """A loss's kernels, bound to one problem. `out`, dL/daccumulator, may be a tile's accumulators themselves."""

    def statistics(self, tile: Tile) -> None: ...
    def loss(self) -> Tensors:
        """Losses of what has statistics; returns what `reduce_losses` does, empty where no reduction is asked for."""

    def anchor(self) -> Tensor | None:
        """Makes ready for gradients. Returns what they are to be multiplied by at the end; None: nothing."""

    def gradient(self, tile: Tile, out: list[Tensor], statistics: bool) -> None: ...
    def parameter_gradient(self, scale: Tensor | None, bias: Tensor | None) -> None:
        """Writes the sums of G · sim and of G over all scores where they are asked for."""


class Launch(LossLaunch, Protocol):
    """All of a backend's kernels."""

    def gain(self, grad_sim: Tensor) -> Tensor | None:
        """As `anchor`, for a given dL/dsim."""

    def similarity(self, tile: Tile, out: Tensor) -> None: ...
    def derivative(self, tile: Tile, grad_sim: Tensor, out: list[Tensor]) -> None: ...
    def topk(self, tile: Tile, values: Tensor, indices: Tensor) -> None: ...
    def best_positive(self, tile: Tile, values: Tensor, indices: Tensor) -> None: ...
    def rank(self, tile: Tile, values: Tensor, indices: Tensor, ranks: Tensor) -> None: ...


class MakeLaunch(Protocol):
    def __call__(self, problem: Problem, similarity: str, row: Side, column: Side, swapped: bool = False) -> Launch: ...


def reduced(problem: Problem, row: Side, column: Side) -> Tensors:
    """What `Launch.loss` returns, in torch."""
    assert row.loss is not None
    if problem.reduction == "none":
        return row.loss.new_empty(0), row.loss.new_empty(0)
    columns = row.loss[:0] if column.loss is None else column.loss
    counted = problem.counts_anchors
    positives = (side.statistics[0] if counted and side.statistics is not None else None for side in (row, column))
    return reduce_losses(
        row.loss,
        columns,
        *positives,
        objective=problem.objective,
        reduction=problem.reduction,
        shares=problem.shares,
    )


def write_sums(sums: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
    """What `Launch.parameter_gradient` does, from both sums."""
    for out, x in zip((scale, bias), sums, strict=True):
        if out is not None:
            out.copy_(x.reshape(out.shape))
