"""The order of work, shared by the backends: tiles, workspace, accumulation.

Scores are made tile by tile in a bounded buffer, reduced at once, and made again in the backward pass, unless the
workspace holds all of them. Tiles come row panel by row panel, from the left to the right. Where a similarity or an
objective differs it is asked (how many accumulators? does it need statistics?), never named.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from smartclip_kernels.operands import Dot, MaskedCosine, Operands, operands_class
from smartclip_kernels.problem import Needs, Problem, Tensors, empty_gradients, ranks_of_ids

# Rows and columns of a tile, the best first: the largest that fits is taken.
TILES = ((2048, 4096), (2048, 2048), (1024, 2048), (1024, 1024), (512, 1024), (512, 512), (256, 512), (256, 256))
SMALLEST_TILES = ((128, 128), (64, 64), (32, 32), (16, 16))


class Batch:
    """One side's vectors (N or M numbers each) on their way to the kernels; the addresses of what is set go there."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.id: Tensor | None = None
        self.ignore: Tensor | None = None
        self.factor: Tensor | None = None
        self.statistics: Tensor | None = None
        self.loss: Tensor | None = None
        self.weight: Tensor | None = None
        self.anchor: Tensor | None = None
        self.score_gradient: Tensor | None = None


class Launch(Protocol):
    """A backend's kernels, bound to one problem. `accumulators` are a tile's products; `out` may be the same."""

    def statistics(self, rows: slice, columns: slice, accumulators: list[Tensor]) -> None: ...
    def loss(self) -> None: ...
    def anchor(self) -> None: ...
    def gradient(
        self, rows: slice, columns: slice, accumulators: list[Tensor], out: list[Tensor], statistics: bool
    ) -> None: ...
    def similarity(self, rows: slice, columns: slice, accumulators: list[Tensor], out: Tensor) -> None: ...
    def derivative(
        self, rows: slice, columns: slice, accumulators: list[Tensor], grad_sim: Tensor, out: list[Tensor]
    ) -> None: ...
    def topk(
        self, rows: slice, columns: slice, accumulators: list[Tensor], values: Tensor, indices: Tensor
    ) -> None: ...
    def best_positive(
        self, rows: slice, columns: slice, accumulators: list[Tensor], values: Tensor, indices: Tensor
    ) -> None: ...
    def rank(
        self, rows: slice, columns: slice, accumulators: list[Tensor], values: Tensor, indices: Tensor, ranks: Tensor
    ) -> None: ...


class MakeLaunch(Protocol):
    def __call__(
        self,
        problem: Problem,
        similarity: str,
        row: Batch,
        column: Batch,
        parameter_gradient: Tensor | None,
        swapped: bool,
    ) -> Launch: ...


class Tiles:
    """A walk over the scores in tiles that fit a workspace, with their buffers."""

    def __init__(
        self, problem: Problem, operands: Operands, workspace: int, extra: int = 0, swapped: bool = False
    ) -> None:
        self.problem, self.operands, self.swapped, self.extra = problem, operands, swapped, extra
        self.sizes = (problem.m, problem.n) if swapped else (problem.n, problem.m)
        self.shape = tile_shape(problem, workspace, extra, self.sizes)

    @cached_property
    def buffers(self) -> Tensor:
        """One tile for each accumulator, and the extra ones; not made where all products are kept elsewhere."""
        count = self.operands.accumulators + self.extra
        return self.problem.scale.new_empty(count, self.shape[0] * self.shape[1], dtype=self.problem.dtype)

    def row_panels(self) -> Iterator[tuple[slice, Tensors]]:
        make = self.operands.columns if self.swapped else self.operands.rows
        for start in range(0, self.sizes[0], self.shape[0]):
            panel = slice(start, min(start + self.shape[0], self.sizes[0]))
            yield panel, make(panel)

    def column_panels(self) -> Iterator[tuple[slice, Tensors]]:
        make = self.operands.rows if self.swapped else self.operands.columns
        for start in range(0, self.sizes[1], self.shape[1]):
            panel = slice(start, min(start + self.shape[1], self.sizes[1]))
            yield panel, make(panel)

    def buffer(self, k: int, rows: slice, columns: slice) -> Tensor:
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        return self.buffers[k, : shape[0] * shape[1]].view(shape)

    def accumulators(self, rows: slice, columns: slice, kept: Tensor | None = None) -> list[Tensor]:
        """Where a tile's products go: its place among those kept, else the buffers."""
        count = range(self.operands.accumulators)
        return [self.buffer(k, rows, columns) if kept is None else kept[k, rows, columns] for k in count]

    def scores(self, kept: Tensor | None = None) -> Iterator[tuple[slice, slice, list[Tensor]]]:
        """Every tile with its products made."""
        for rows, row_operands in self.row_panels():
            for columns, column_operands in self.column_panels():
                accumulators = self.accumulators(rows, columns, kept)
                multiply(row_operands, column_operands, accumulators)
                yield rows, columns, accumulators


def tile_shape(problem: Problem, workspace: int, extra: int, sizes: tuple[int, int]) -> tuple[int, int]:
    """The first of TILES that fits with the panels of its operands; the smallest where none does."""
    operands = operands_class(problem)
    itemsize = problem.dtype.itemsize
    for rows, columns in TILES + SMALLEST_TILES:
        rows, columns = min(rows, sizes[0]), min(columns, sizes[1])
        tile = (operands.accumulators + extra) * rows * columns
        if (tile + operands.panel_numbers(problem) * (rows + columns)) * itemsize <= workspace:
            break
    return rows, columns


def multiply(rows: Tensors, columns: Tensors, accumulators: list[Tensor]) -> None:
    for row, column, accumulator in zip(rows, columns, accumulators, strict=True):
        torch.mm(row, column.T, out=accumulator)


class TiledBackend:
    """The operations of a backend whose launches work on tiles of products."""

    name: str

    def __init__(self, name: str, make_launch: MakeLaunch) -> None:
        self.name, self.make_launch = name, make_launch

    def kept_shape(self, problem: Problem) -> tuple[int, ...]:
        """All products are kept where they take at most half of the workspace; tiles have the other half."""
        accumulators = operands_class(problem).accumulators
        keep = accumulators * problem.n * problem.m * problem.dtype.itemsize <= problem.workspace // 2
        return (accumulators, problem.n, problem.m) if keep and problem.traits.needs_statistics else (0,)

    def loss(self, problem: Problem) -> Tensors:
        operands, row, column = _sides(problem)
        empty = problem.scale.new_empty
        losses, statistics = [], []
        for side, count in ((row, problem.n), (column, problem.m if problem.traits.both_sides else 0)):
            side.statistics = empty(problem.traits.statistics, count, dtype=problem.dtype)
            side.loss = empty(count, dtype=problem.dtype)
            losses.append(side.loss)
            statistics.append(side.statistics)
        products = empty(self.kept_shape(problem), dtype=problem.dtype)
        kept = products if products.numel() else None
        launch = self.make_launch(problem, operands.name, row, column, None, False)
        tiles = Tiles(problem, operands, problem.workspace - products.nbytes)
        for rows, columns, accumulators in tiles.scores(kept):
            launch.statistics(rows, columns, accumulators)
        launch.loss()
        return *losses, *statistics, products

    def loss_backward(self, problem: Problem, saved: Tensors, weights: Tensors, needs: Needs) -> Tensors:
        operands, row, column = _sides(problem)
        row.statistics, column.statistics, products = (x.contiguous() for x in saved)
        row.weight, column.weight = (x.contiguous() for x in weights)
        return self._gradients(problem, operands, row, column, needs, products, one_sweep=False)[1]

    def loss_one_sweep(self, problem: Problem, needs: Needs) -> Tensors:
        operands, row, column = _sides(problem)
        row.statistics = problem.scale.new_empty(problem.traits.statistics, problem.n, dtype=problem.dtype)
        row.loss = problem.scale.new_empty(problem.n, dtype=problem.dtype)
        row.weight = problem.scale.new_ones(problem.n, dtype=problem.dtype)
        launch, grads = self._gradients(
            problem, operands, row, column, needs, problem.scale.new_empty(0), one_sweep=True
        )
        launch.loss()
        return row.loss.sum(), *grads

    def _gradients(
        self,
        problem: Problem,
        operands: Operands,
        row: Batch,
        column: Batch,
        needs: Needs,
        products: Tensor,
        one_sweep: bool,
    ) -> tuple[Launch, Tensors]:
        """G of every tile, and from it everything asked for; with `one_sweep` statistics, too."""
        empty = problem.scale.new_empty
        planes = problem.traits.anchor
        row.anchor = empty(planes, problem.n, dtype=problem.dtype)
        column.anchor = empty(planes, problem.m if problem.traits.both_sides else 0, dtype=problem.dtype)
        parameters = empty(problem.n, 2, dtype=torch.float64)
        if needs.text and operands.column_factor is not None:
            column.score_gradient = empty(problem.m, dtype=problem.dtype)
        launch = self.make_launch(problem, operands.name, row, column, parameters, False)
        launch.anchor()

        def gradient(rows: slice, columns: slice, accumulators: list[Tensor], out: list[Tensor]) -> None:
            launch.gradient(rows, columns, accumulators, out, one_sweep)

        tiles = Tiles(problem, operands, problem.workspace - products.nbytes)
        kept = products if products.numel() else None
        grads = _accumulate(problem, tiles, needs, column.score_gradient, gradient, kept, unrounded=one_sweep)
        sums = parameters.sum(0) if needs.scale or needs.bias else parameters
        if needs.scale:
            grads[3].copy_(sums[0].reshape(grads[3].shape))
        if needs.bias:
            grads[4].copy_(sums[1].reshape(grads[4].shape))
            if problem.traits.shift_invariant:
                grads[4].zero_()
        return launch, tuple(grads)

    def masked_similarity(self, problem: Problem) -> Tensor:
        operands, row, column = _sides(problem)
        launch = self.make_launch(problem, operands.name, row, column, None, False)
        sim = problem.scale.new_empty(problem.n, problem.m)
        for rows, columns, accumulators in Tiles(problem, operands, problem.workspace).scores():
            launch.similarity(rows, columns, accumulators, sim[rows, columns])
        return sim

    def masked_similarity_backward(self, problem: Problem, grad_sim: Tensor, needs: Needs) -> Tensors:
        operands, row, column = _sides(problem)
        if needs.text:
            column.score_gradient = problem.scale.new_empty(problem.m)
        launch = self.make_launch(problem, operands.name, row, column, None, False)
        tiles = Tiles(problem, operands, problem.workspace, extra=1)

        def gradient(rows: slice, columns: slice, products: list[Tensor], out: list[Tensor]) -> None:
            given = tiles.buffer(operands.accumulators, rows, columns).copy_(grad_sim[rows, columns])
            launch.derivative(rows, columns, products, given, out)

        return tuple(_accumulate(problem, tiles, needs, column.score_gradient, gradient)[:3])

    def masked_topk(self, problem: Problem, k: int, per_text: bool) -> tuple[Tensor, Tensor]:
        launch, tiles = self._retrieval(problem, per_text)
        anchors, candidates = tiles.sizes
        values = problem.scale.new_empty(anchors, min(k, candidates))
        indices = torch.empty_like(values, dtype=torch.int64)
        for rows, columns, accumulators in tiles.scores():
            launch.topk(rows, columns, accumulators, values, indices)
        return values, indices

    def retrieval_ranks(self, problem: Problem, per_text: bool) -> Tensor:
        """Two sweeps over the same tiles, so that a score is the same number in both: best positives, then ranks."""
        launch, tiles = self._retrieval(problem, per_text)
        best = problem.scale.new_empty(tiles.sizes[0])
        index = torch.empty_like(best, dtype=torch.int64)
        ranks = torch.empty_like(index)
        for rows, columns, accumulators in tiles.scores():
            launch.best_positive(rows, columns, accumulators, best, index)
        for rows, columns, accumulators in tiles.scores():
            launch.rank(rows, columns, accumulators, best, index, ranks)
        return ranks

    def _retrieval(self, problem: Problem, swapped: bool) -> tuple[Launch, Tiles]:
        """Anchors are the rows, so for texts the sides are swapped."""
        operands, row, column = _sides(problem)
        if swapped:
            row, column = column, row
        launch = self.make_launch(problem, operands.name, row, column, None, swapped)
        return launch, Tiles(problem, operands, problem.workspace, swapped=swapped)


class TileGradient(Protocol):
    def __call__(self, rows: slice, columns: slice, accumulators: list[Tensor], out: list[Tensor], /) -> None: ...


def _accumulate(
    problem: Problem,
    tiles: Tiles,
    needs: Needs,
    score_gradient: Tensor | None,
    gradient: TileGradient,
    kept: Tensor | None = None,
    unrounded: bool = False,
) -> list[Tensor]:
    """Gradients of image, text and mask from dL/daccumulator of every tile; those of scale and bias left to fill."""
    operands, grads = tiles.operands, empty_gradients(problem, needs, unrounded=unrounded)
    column_sums = operands.column_sums(grads, needs)
    for rows, row_operands in tiles.row_panels():
        row_sums = operands.row_sums(grads, rows, needs)
        for columns, column_operands in tiles.column_panels():
            out = tiles.accumulators(rows, columns)
            products = out if kept is None else tiles.accumulators(rows, columns, kept)
            if kept is None:
                multiply(row_operands, column_operands, out)
            gradient(rows, columns, products, out)
            # beta = 0 does not read what it overwrites, so sums need no clearing.
            for total, d, operand in zip(row_sums, out, column_operands, strict=False):
                total.addmm_(d, operand, beta=0 if columns.start == 0 else 1)
            for total, d, operand in zip(column_sums, out, row_operands, strict=False):
                total[columns].addmm_(d.T, operand, beta=0 if rows.start == 0 else 1)
        operands.store_rows(grads, rows, row_operands, row_sums)
    operands.store_columns(grads, column_sums, needs, score_gradient)
    return grads


def _sides(problem: Problem) -> tuple[Operands, Batch, Batch]:
    operands = Dot(problem) if problem.mask is None else MaskedCosine(problem)
    row, column = Batch(problem.n), Batch(problem.m)
    row.factor, column.factor = operands.row_factor, operands.column_factor
    if problem.image_ids is not None and problem.text_ids is not None:
        row.id, column.id = ranks_of_ids(problem.image_ids, problem.text_ids)
    else:
        diagonal = torch.arange(max(problem.n, problem.m), dtype=torch.int32, device=problem.image.device)
        row.id, column.id = diagonal[: problem.n], diagonal[: problem.m]
    if problem.image_ignore is not None and problem.text_ignore is not None:
        row.ignore, column.ignore = ranks_of_ids(problem.image_ignore, problem.text_ignore)
    return operands, row, column
