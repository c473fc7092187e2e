"""The walk over the scores: row panel by row panel, from the left to the right, in tiles that fit a workspace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from smartclip_kernels.operands import Operands
from smartclip_kernels.problem import Problem, Tensors

SMALLEST_TILES = ((256, 256), (128, 128), (64, 64), (32, 32), (16, 16))


@dataclass(frozen=True)
class Method:
    """How a backend takes its tiles."""

    tiles: tuple[tuple[int, int], ...]
    """rows and columns, the best first: the largest that fits the workspace is taken"""
    fused: bool
    """the kernels make the products, of operands in the inputs' precision; else torch does, widened, in buffers"""
    score_bytes: float = 0.0
    """what the kernels allocate themselves for every score of a tile"""
    smallest: int = 16
    """rows and columns of the smallest tile, which is taken where none fits"""
    search_bytes: float = 0.0
    """the same, in a search for the best scores"""

    def padded(self, columns: int) -> int:
        """The kernels write rows in pieces of 16 bytes, and Triton asks for multiples of 16 numbers."""
        return -(-columns // 16) * 16 if self.fused else columns


class Tile(NamedTuple):
    """A part of the scores: what its products are made of, and the products, or none where the kernels make them."""

    rows: slice
    columns: slice
    row_operands: Tensors
    column_operands: Tensors
    accumulators: list[Tensor]
    level: int = 0  # of nested operands, where the accumulator of one is made


class Tiles:
    """A walk over the scores in tiles that fit a workspace, with their buffers."""

    def __init__(
        self,
        problem: Problem,
        operands: Operands,
        method: Method,
        workspace: int,
        *,
        buffers: int,
        score_bytes: float = 0.0,
        swapped: bool = False,
    ) -> None:
        self.problem, self.operands, self.method, self.swapped = problem, operands, method, swapped
        self.count = buffers
        self.sizes = (problem.m, problem.n) if swapped else (problem.n, problem.m)
        score_bytes += method.score_bytes + buffers * operands.dtype.itemsize
        self.shape = tile_shape(method, self.sizes, score_bytes, operands.panel_bytes(problem), workspace)

    @cached_property
    def buffers(self) -> Tensor:
        """Tiles in the precision of the operands; not made where nobody asks for one."""
        numbers = self.shape[0] * self.method.padded(self.shape[1])
        return self.problem.image.new_empty(self.count, numbers, dtype=self.operands.dtype)

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
        shape = (rows.stop - rows.start, self.method.padded(columns.stop - columns.start))
        return self.buffers[k, : shape[0] * shape[1]].view(shape)[:, : columns.stop - columns.start]

    def outputs(self, rows: slice, columns: slice) -> list[Tensor]:
        """A buffer for each accumulator; the same for all, where there is but one."""
        return [self.buffer(min(k, self.count - 1), rows, columns) for k in range(self.operands.accumulators)]

    def tile(self, rows: tuple[slice, Tensors], columns: tuple[slice, Tensors], out: list[Tensor]) -> Tile:
        """With its products made in `out`, unless the kernels make them."""
        if self.method.fused:
            return Tile(rows[0], columns[0], rows[1], columns[1], [])
        for k in range(len(out)):
            self._multiply(k, rows[1], columns[1], out)
        return Tile(rows[0], columns[0], rows[1], columns[1], out)

    def _multiply(self, k: int, rows: Tensors, columns: Tensors, out: list[Tensor]) -> None:
        if k and self.operands.nested:
            torch.addmm(out[k - 1], rows[k], columns[k].T, out=out[k])
        else:
            torch.mm(rows[k], columns[k].T, out=out[k])

    def scores(self, kept: Tensor | None = None) -> Iterator[Tile]:
        """Every tile; its products are, or the kernels leave them, among those kept; else they are in the buffers.

        Of nested operands level by level, each as soon as its products are there: the next may be made in their place.
        """
        for rows in self.row_panels():
            for columns in self.column_panels():
                box = rows[0], columns[0]
                out = [x[box] for x in kept] if kept is not None else [] if self.method.fused else self.outputs(*box)
                if self.operands.nested:
                    for k, accumulator in enumerate(out):
                        self._multiply(k, rows[1], columns[1], out)
                        yield Tile(*box, rows[1], columns[1], [accumulator], level=k)
                else:
                    yield self.tile(rows, columns, out)._replace(accumulators=out)


def tile_shape(
    method: Method, sizes: tuple[int, int], score_bytes: float, panel_bytes: int, workspace: int
) -> tuple[int, int]:
    """The first of the method's tiles that fits with the panels of its operands; the smallest where none does."""
    smallest = tuple(tile for tile in SMALLEST_TILES if tile[0] >= method.smallest)
    for rows, columns in method.tiles + smallest:
        rows, columns = min(rows, sizes[0]), min(columns, sizes[1])
        if score_bytes * rows * columns + panel_bytes * (rows + columns) <= workspace:
            break
    return rows, columns
