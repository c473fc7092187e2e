"""The order of work, shared by the backends: tiles, workspace, accumulation.

Scores are made tile by tile, reduced at once, and made again in the backward pass, unless the workspace holds all of
them. Where a similarity or an objective differs it is asked (how many accumulators? does it need statistics?), never
named; so is a backend (who makes the products?).
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from smartclip_kernels.launch import Launch, LossLaunch, MakeLaunch, Side
from smartclip_kernels.nested import NestedLaunch, Prefixes
from smartclip_kernels.operands import Dot, MaskedCosine, Operands
from smartclip_kernels.problem import Needs, Problem, Tensors, empty_gradients, of_anchors, ranks_of_ids
from smartclip_kernels.tiles import Method, Tile, Tiles


class TiledBackend:
    """The operations of a backend whose launches work on tiles."""

    def __init__(
        self,
        name: str,
        method: Method,
        make_launch: MakeLaunch,
        *,
        nested: Method | None = None,
        cuts_sums: bool = False,
        needs_ids: bool = False,
    ) -> None:
        """`nested`: the method for prefixes. `needs_ids`: kernels have to be told that row i matches column i."""
        self.name, self.method, self.make_launch, self.needs_ids = name, method, make_launch, needs_ids
        self.rounds_scores, self.cuts_sums = method.fused, cuts_sums
        self.nests, self.nested = nested is not None, nested or method

    def kept_shape(self, problem: Problem) -> tuple[int, ...]:
        """All products are kept where they take at most half of the workspace; tiles have the other half."""
        shape = (operands_class(problem).accumulators * problem.levels, problem.n, self.method.padded(problem.m))
        fits = math.prod(shape) * problem.dtype.itemsize <= problem.workspace // 2
        return shape if fits and problem.traits.needs_statistics and self.keeps(problem) else (0,)

    def keeps(self, problem: Problem) -> bool:
        """Whether its kernels can leave products, and it saves time."""
        return not self.method.fused

    def loss(self, problem: Problem) -> Tensors:
        """A reduced loss keeps no products: where they fit, its gradients are made with it."""
        return self._loss(problem, *self._sides(problem), keep=problem.reduction == "none")

    def _loss(self, problem: Problem, operands: Operands, row: Side, column: Side, keep: bool) -> Tensors:
        empty = problem.scale.new_empty
        losses, statistics = [], []
        for side, count in ((row, problem.n), (column, problem.m if problem.traits.both_sides else 0)):
            side.statistics = empty(problem.planes, count, dtype=problem.dtype)
            side.loss = empty(count, dtype=problem.dtype)
            losses.append(side.loss)
            statistics.append(side.statistics)
        products = empty(self.kept_shape(problem) if keep else (0,), dtype=problem.dtype)
        kept = products if products.numel() else None
        if kept is not None and kept.shape[2] > problem.m:
            kept[:, :, problem.m :].zero_()  # nobody reads it, but the op returns it
        launch = self._launch(problem, operands, row, column)
        for tile in self._tiles(problem, operands, products.nbytes).scores(kept):
            launch.statistics(tile)
        return *launch.loss(), *losses, *statistics, products

    def loss_backward(
        self, problem: Problem, saved: Tensors, weights: Tensors, needs: Needs, unrounded: bool
    ) -> Tensors:
        operands, row, column = self._sides(problem)
        row.statistics, column.statistics, products = (x.contiguous() for x in saved)
        row.weight, column.weight = weights
        return self._gradients(problem, operands, row, column, needs, products, False, unrounded)[1]

    def loss_and_gradients(self, problem: Problem, needs: Needs) -> Tensors:
        operands, row, column = self._sides(problem)
        if problem.traits.needs_statistics:
            loss, weights, rows, columns, _, _, products = self._loss(problem, operands, row, column, keep=True)
            row.weight, column.weight = of_anchors(weights, (len(rows), len(columns)))
            row.loss = column.loss = None  # they are made
            return loss, *self._gradients(problem, operands, row, column, needs, products, False, True)[1]
        row.statistics = problem.scale.new_empty(problem.planes, problem.n, dtype=problem.dtype)
        row.loss = problem.scale.new_empty(problem.n, dtype=problem.dtype)
        weight = 1 / problem.n if problem.reduction == "mean" else 1.0
        row.weight = problem.scale.new_full((), weight, dtype=problem.dtype).expand(problem.n)
        launch, grads = self._gradients(problem, operands, row, column, needs, problem.scale.new_empty(0), True, True)
        return launch.loss()[0], *grads

    def _gradients(
        self,
        problem: Problem,
        operands: Operands,
        row: Side,
        column: Side,
        needs: Needs,
        products: Tensor,
        one_sweep: bool,
        unrounded: bool,
    ) -> tuple[LossLaunch, Tensors]:
        """G of every tile, and from it everything asked for; with `one_sweep` statistics, too."""
        for side, wanted in ((row, needs.image and operands.nested), (column, needs.text)):
            if wanted and side.factor is not None:
                side.score_gradient = torch.empty_like(side.factor)
        launch = self._launch(problem, operands, row, column)
        gain = launch.anchor()

        def gradient(tile: Tile, out: list[Tensor]) -> None:
            launch.gradient(tile, out, one_sweep)

        tiles = self._tiles(problem, operands, products.nbytes, buffers=operands.accumulators)
        kept = products if products.numel() else None
        grads = _accumulate(tiles, needs, row, column, gradient, gain, kept, unrounded=unrounded)
        if needs.bias and problem.traits.shift_invariant:
            grads[4].zero_()
        bias = grads[4] if needs.bias and not problem.traits.shift_invariant else None
        if needs.scale or bias is not None:
            launch.parameter_gradient(grads[3] if needs.scale else None, bias)
        return launch, tuple(grads)

    def masked_similarity(self, problem: Problem) -> Tensor:
        operands, row, column = self._sides(problem)
        launch = self.make_launch(problem, operands.name, row, column)
        sim = problem.scale.new_empty(problem.n, problem.m)
        for tile in self._tiles(problem, operands).scores():
            launch.similarity(tile, sim[tile.rows, tile.columns])
        return sim

    def masked_similarity_backward(self, problem: Problem, grad_sim: Tensor, needs: Needs) -> Tensors:
        operands, row, column = self._sides(problem)
        if needs.text:
            column.score_gradient = problem.scale.new_empty(problem.m)
        launch = self.make_launch(problem, operands.name, row, column)
        gain = launch.gain(grad_sim)
        tiles = self._tiles(problem, operands, buffers=operands.accumulators, score_bytes=problem.dtype.itemsize)

        def gradient(tile: Tile, out: list[Tensor]) -> None:
            launch.derivative(tile, grad_sim[tile.rows, tile.columns].contiguous(), out)

        return tuple(_accumulate(tiles, needs, row, column, gradient, gain)[:3])

    def masked_topk(self, problem: Problem, k: int, per_text: bool) -> tuple[Tensor, Tensor]:
        launch, tiles = self._retrieval(problem, per_text)
        anchors, candidates = tiles.sizes
        values = problem.scale.new_empty(anchors, min(k, candidates))
        indices = torch.empty_like(values, dtype=torch.int64)
        for tile in tiles.scores():
            launch.topk(tile, values, indices)
        return values, indices

    def retrieval_ranks(self, problem: Problem, per_text: bool) -> Tensor:
        """Two sweeps over the same tiles, so that a score is the same number in both: best positives, then ranks."""
        launch, tiles = self._retrieval(problem, per_text)
        best, index = self._best_positive(launch, tiles)
        ranks = torch.empty_like(index)
        for tile in tiles.scores():
            launch.rank(tile, best, index, ranks)
        return ranks

    def best_positive(self, problem: Problem, per_text: bool) -> Tensor:
        return self._best_positive(*self._retrieval(problem, per_text))[0]

    def _best_positive(self, launch: Launch, tiles: Tiles) -> tuple[Tensor, Tensor]:
        best = tiles.problem.scale.new_empty(tiles.sizes[0])
        index = torch.empty_like(best, dtype=torch.int64)
        for tile in tiles.scores():
            launch.best_positive(tile, best, index)
        return best, index

    def _retrieval(self, problem: Problem, swapped: bool) -> tuple[Launch, Tiles]:
        """Anchors are the rows, so for texts the sides are swapped."""
        operands, row, column = self._sides(problem)
        if swapped:
            row, column = column, row
        launch = self.make_launch(problem, operands.name, row, column, swapped)
        return launch, self._tiles(problem, operands, score_bytes=self.method.search_bytes, swapped=swapped)

    def _launch(self, problem: Problem, operands: Operands, row: Side, column: Side) -> LossLaunch:
        if operands.nested:
            return NestedLaunch(self.make_launch, problem, operands.name, row, column)
        return self.make_launch(problem, operands.name, row, column)

    def _sides(self, problem: Problem) -> tuple[Operands, Side, Side]:
        operands = operands_class(problem)(problem, native=self.method.fused)
        row, column = Side(problem.n), Side(problem.m)
        row.factor, column.factor = operands.row_factor, operands.column_factor
        if problem.image_ids is not None and problem.text_ids is not None:
            row.id, column.id = ranks_of_ids(problem.image_ids, problem.text_ids)
        elif self.needs_ids:
            diagonal = torch.arange(max(problem.n, problem.m), dtype=torch.int32, device=problem.image.device)
            row.id, column.id = diagonal[: problem.n], diagonal[: problem.m]
        if problem.image_ignore is not None and problem.text_ignore is not None:
            row.ignore, column.ignore = ranks_of_ids(problem.image_ignore, problem.text_ignore)
        row.tau, column.tau, row.ceiling, column.ceiling = (
            None if x is None else x.contiguous() for x in problem.correction
        )
        return operands, row, column

    def _tiles(
        self,
        problem: Problem,
        operands: Operands,
        kept_bytes: int = 0,
        *,
        buffers: int | None = None,
        score_bytes: float = 0.0,
        swapped: bool = False,
    ) -> Tiles:
        """`buffers` for gradients, made in the products' place; None: what the products need."""
        if buffers is None:
            buffers = 0 if self.method.fused else 1 if operands.nested else operands.accumulators
        return Tiles(
            problem,
            operands,
            self.nested if operands.nested else self.method,
            problem.workspace - kept_bytes,
            buffers=buffers,
            score_bytes=score_bytes,
            swapped=swapped,
        )


def operands_class(problem: Problem) -> type[Operands]:
    if problem.dims:
        return Prefixes
    return Dot if problem.mask is None else MaskedCosine


class TileGradient(Protocol):
    def __call__(self, tile: Tile, out: list[Tensor], /) -> None: ...


def _accumulate(
    tiles: Tiles,
    needs: Needs,
    row: Side,
    column: Side,
    gradient: TileGradient,
    gain: Tensor | None = None,
    kept: Tensor | None = None,
    unrounded: bool = False,
) -> list[Tensor]:
    """Gradients of image, text and mask from dL/daccumulator of every tile; those of scale and bias left to fill."""
    operands, grads = tiles.operands, empty_gradients(tiles.problem, needs, unrounded=unrounded)
    column_sums = operands.column_sums(grads, needs)
    for rows in tiles.row_panels():
        row_sums = operands.row_sums(grads, rows[0], needs)
        for columns in tiles.column_panels():
            box = rows[0], columns[0]
            out = tiles.outputs(*box)
            if kept is None:
                tile = tiles.tile(rows, columns, out)
            else:
                tile = Tile(*box, rows[1], columns[1], [x[box] for x in kept])
            gradient(tile, out)
            for total, d, operand in zip(row_sums, out, columns[1], strict=False):
                _add_product(total, d, operand, start=columns[0].start == 0)
            for total, d, operand in zip(column_sums, out, rows[1], strict=False):
                _add_product(total[columns[0]], d.T, operand, start=rows[0].start == 0)
        operands.store_rows(grads, rows[0], rows[1], row_sums, row.score_gradient, gain)
    operands.store_columns(grads, column_sums, needs, column.score_gradient, gain)
    return grads


def _add_product(total: Tensor, a: Tensor, b: Tensor, start: bool) -> None:
    """total += a @ b in total's precision; at the start total is only written, and needs no clearing."""
    beta = 0 if start else 1
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=beta)
    elif a.is_cuda:
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=beta)
