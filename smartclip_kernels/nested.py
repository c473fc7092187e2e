"""All Matryoshka prefixes in one sweep: a longer prefix's products are a shorter one's, and more.

A tile has an accumulator for each level, each that of the level before plus the products of its own segment of
columns. A level's kernels see its accumulator as if there were no other, and cosines by the norms of its prefixes. Of
the levels' gradients G_k every segment needs H_s = Σ_{k ≥ s} G_k. So all levels together take 2·N·M·max(dims)
operations forward and 4 backward, or 6 where the accumulators are made again.
"""

from __future__ import annotations

from copy import copy
from itertools import pairwise

import torch
from torch import Tensor

from smartclip_kernels.launch import LossLaunch, MakeLaunch, Side
from smartclip_kernels.operands import PANEL_ROWS, Dot, settle
from smartclip_kernels.problem import Needs, Problem, Tensors
from smartclip_kernels.reference import MIN_NORM
from smartclip_kernels.tiles import Tile


class Prefixes(Dot):
    """sim_k = ⟨x_k, t_k⟩ / (‖x_k‖ ‖t_k‖) of the prefixes x_k = image[:, :dims[k]], t_k = text[:, :dims[k]].

    Factors are (levels, rows): 1 / max(‖x_k‖, MIN_NORM).
    """

    name = "cosine"
    nested = True

    def __init__(self, problem: Problem, native: bool = False) -> None:
        super().__init__(problem, native)
        self.accumulators = problem.levels
        self.segments = [slice(*ends) for ends in pairwise((0, *problem.dims))]
        self.row_factor, self.row_pull = self._factors(self.image)
        self.column_factor, self.column_pull = self._factors(self.text)

    def rows(self, panel: slice) -> Tensors:
        return self._split(super().rows(panel)[0])

    def columns(self, panel: slice) -> Tensors:
        return self._split(super().columns(panel)[0])

    def row_sums(self, grads: list[Tensor], panel: slice, needs: Needs) -> list[Tensor]:
        return [part for total in super().row_sums(grads, panel, needs) for part in self._split(total)]

    def column_sums(self, grads: list[Tensor], needs: Needs) -> list[Tensor]:
        return [part for total in super().column_sums(grads, needs) for part in self._split(total)]

    def store_rows(
        self,
        grads: list[Tensor],
        panel: slice,
        rows: Tensors,
        sums: list[Tensor],
        score_gradient: Tensor | None,
        gain: Tensor | None,
    ) -> None:
        if sums:
            assert score_gradient is not None  # the engine makes it where the image needs a gradient
            pull = score_gradient[:, panel] * self.row_pull[:, panel]
            self._store(grads[0][panel], rows, sums, pull, gain)

    def store_columns(
        self, grads: list[Tensor], sums: list[Tensor], needs: Needs, score_gradient: Tensor | None, gain: Tensor | None
    ) -> None:
        if not sums:
            return
        assert score_gradient is not None
        for start in range(0, len(self.text), PANEL_ROWS):
            panel = slice(start, start + PANEL_ROWS)
            pull = score_gradient[:, panel] * self.column_pull[:, panel]
            self._store(grads[1][panel], self.columns(panel), [x[panel] for x in sums], pull, gain)

    def _store(self, grad: Tensor, x: Tensors, sums: list[Tensor], pull: Tensor, gain: Tensor | None) -> None:
        """Of segment s: its sums, less x times Σ_{k ≥ s} of level k's score gradient / ‖x_k‖²; 0 beyond the last."""
        pulls = pull.flip(0).cumsum(0).flip(0)
        for segment, of_segment, total, weight in zip(self.segments, x, sums, pulls, strict=True):
            total.addcmul_(of_segment, weight[:, None], value=-1)
            settle(grad[:, segment], total, gain)
        grad[:, self.segments[-1].stop :].zero_()

    def _split(self, x: Tensor) -> Tensors:
        return tuple(x[:, segment] for segment in self.segments)

    def _factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """1 / ‖x_k‖ of every level, and its square, 0 where the norm is too small to have a gradient."""
        norms = torch.empty(self.accumulators, len(x), dtype=self.sum_dtype, device=x.device)
        for start in range(0, len(x), PANEL_ROWS):
            panel = slice(start, start + PANEL_ROWS)
            parts = [torch.linalg.vector_norm(part, dim=1) for part in self._split(x[panel].to(self.sum_dtype))]
            torch.sqrt(torch.stack(parts).square().cumsum(0), out=norms[:, panel])
        factor = 1 / norms.clamp(min=MIN_NORM)
        return factor, torch.where(norms < MIN_NORM, 0, factor.square())


class NestedLaunch:
    """A launch for each level, all over the same tiles. For backends that make gradients without a gain."""

    def __init__(self, make_launch: MakeLaunch, problem: Problem, similarity: str, row: Side, column: Side) -> None:
        self.sides = row, column
        self.levels = [(_level(row, k, problem), _level(column, k, problem)) for k in range(problem.levels)]
        self.launches: list[LossLaunch] = [make_launch(problem, similarity, *sides) for sides in self.levels]

    def statistics(self, tile: Tile) -> None:
        self.launches[tile.level].statistics(tile)

    def loss(self) -> Tensors:
        """Anchors have the same positives at every level, and so the same weights."""
        losses, weights = zip(*(launch.loss() for launch in self.launches), strict=True)
        for side, levels in zip(self.sides, zip(*self.levels, strict=True), strict=True):
            if side.loss is not None:
                torch.sum(torch.stack([level.loss for level in levels if level.loss is not None]), 0, out=side.loss)
        return torch.stack(losses).sum(0), weights[0]

    def anchor(self) -> Tensor | None:
        gains = [launch.anchor() for launch in self.launches]
        assert not any(gain is not None for gain in gains), "levels would need one gain for all"
        return None

    def gradient(self, tile: Tile, out: list[Tensor], statistics: bool) -> None:
        for launch, accumulator, grad in zip(self.launches, tile.accumulators, out, strict=True):
            launch.gradient(tile._replace(accumulators=[accumulator]), [grad], statistics)
        for following, grad in pairwise(reversed(out)):
            grad += following

    def parameter_gradient(self, scale: Tensor | None, bias: Tensor | None) -> None:
        pairs = []
        for launch in self.launches:
            pairs.append([None if out is None else torch.empty_like(out, dtype=torch.float64) for out in (scale, bias)])
            launch.parameter_gradient(*pairs[-1])
        for out, parts in zip((scale, bias), zip(*pairs, strict=True), strict=True):
            if out is not None:
                out.copy_(torch.stack([part for part in parts if part is not None]).sum(0))


def _level(side: Side, k: int, problem: Problem) -> Side:
    """A side's vectors of one level; losses have memory of their own."""
    level = copy(side)
    for name in ("factor", "score_gradient"):
        if (x := getattr(side, name)) is not None:
            setattr(level, name, x[k])
    if side.statistics is not None:
        planes = problem.traits.statistics
        level.statistics = side.statistics[k * planes : (k + 1) * planes]
    if side.loss is not None:
        level.loss = torch.empty_like(side.loss)
    return level
