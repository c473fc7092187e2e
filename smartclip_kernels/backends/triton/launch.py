"""The launches: tensors in, kernels out. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from smartclip_kernels.backends.device import DeviceLaunch, Panel, Slots, size
from smartclip_kernels.backends.triton import backward, config, forward, interpreted, retrieval
from smartclip_kernels.launch import Side
from smartclip_kernels.problem import Problem
from smartclip_kernels.tiles import Tile

INTERPRETED = interpreted()
ANCHORS, PARTIALS = 64, 16  # a program of `gather` merges that many partial states of that many anchors at a time


class TritonLaunch(DeviceLaunch):
    name = "triton"

    def __init__(self, problem: Problem, similarity: str, row: Side, column: Side, swapped: bool = False) -> None:
        super().__init__(problem, row, column, swapped)
        dtype, device = problem.image.dtype, problem.image.device
        half = dtype != problem.dtype
        self._common: dict[str, Any] = {
            "SIMILARITY": similarity,
            "SPLIT": half and similarity != "dot",
            # The interpreter multiplies the bits of bfloat16 as if they were integers.
            "WIDEN": INTERPRETED and dtype == torch.bfloat16,
            "PRECISION": "tf32" if not half and torch.get_float32_matmul_precision() != "highest" else "ieee",
        }
        architecture = config.architecture(None if INTERPRETED else device.index)
        self._config = {k: config.config(architecture, similarity, dtype, k) for k in config.KERNELS}

    def slots(self, kernel: str, tile: Tile) -> Slots:
        sizes = self._config[kernel]
        row_blocks = triton.cdiv(size(tile.rows), sizes.block_n)
        column_blocks = triton.cdiv(size(tile.columns), sizes.block_m)
        parts = 1 if kernel == "scores" else sizes.parts
        return Slots(column_blocks * parts, row_blocks, row_blocks * column_blocks * parts)

    def run_statistics(self, tile: Tile, row_partials: Tensor, column_partials: Tensor | None) -> None:
        traits = self.problem.traits
        self._tile_kernel(
            forward.statistics,
            tile,
            "statistics",
            *self._pairs(tile),
            *self._factors(tile),
            self.scale,
            self.bias,
            row_partials,
            column_partials,
            OBJECTIVE=self.problem.objective,
            PLANES=traits.statistics,
            BOTH_SIDES=traits.both_sides,
            SMOOTHING=self.problem.label_smoothing > 0 or self.image.tau is not None,
        )

    def run_gather(self, panels: Sequence[Panel], last: bool) -> None:
        for panel in panels:
            planes, blocks, count = panel.partials.shape
            with self.on_device():
                forward.gather[(triton.cdiv(count, ANCHORS),)](
                    panel.partials,
                    panel.side.statistics,
                    panel.side.loss,
                    panel.side.tau,
                    self.scale,
                    self.bias,
                    self.problem.label_smoothing,
                    blocks,
                    count,
                    panel.start,
                    panel.side.size,
                    int(panel.first),
                    OBJECTIVE=self.problem.objective,
                    PLANES=planes,
                    BLOCKS=PARTIALS,
                    BLOCK=ANCHORS,
                    num_warps=4,
                )

    def run_anchors(self, sides: Sequence[Side], gain: Tensor) -> None:
        weights = [side.weight.contiguous() for side in sides if side.weight is not None]
        if self.unit is not None:
            self.run_unit(weights[0], weights[-1], self.room(), self.unit, gain)
        traits = self.problem.traits
        for side, weight in zip(sides, weights, strict=True):
            with self.on_device():
                backward.anchors[(triton.cdiv(side.size, ANCHORS),)](
                    side.statistics,
                    weight,
                    self.unit,
                    side.tau,
                    self.scale,
                    self.bias,
                    self.problem.label_smoothing,
                    side.anchor,
                    side.size,
                    OBJECTIVE=self.problem.objective,
                    PLANES=traits.statistics if traits.needs_statistics else 0,
                    ANCHOR=traits.anchor,
                    BLOCK=ANCHORS,
                    num_warps=4,
                )

    def run_unit(self, x: Tensor, y: Tensor, room: float, unit: Tensor, gain: Tensor | None) -> None:
        with self.on_device():
            backward.unit_of[(1,)](x, y, unit, x.numel(), y.numel(), room, BLOCK=4096, num_warps=8)
        if gain is not None:
            torch.mul(self.scale, unit, out=gain)

    def run_gradient(
        self,
        tile: Tile,
        out: list[Tensor],
        parameters: Tensor,
        column_scores: Tensor | None,
        row_partials: Tensor | None,
    ) -> None:
        image, text, traits = self.image, self.text, self.problem.traits
        self._tile_kernel(
            backward.gradient,
            tile,
            "gradient",
            *self._pairs(tile),
            *self._factors(tile),
            self.scale,
            self.bias,
            image.anchor,
            image.anchor if text.anchor is None else text.anchor,
            tile.rows.start,
            tile.columns.start,
            image.size,
            text.size,
            out[0],
            out[-1],
            out[0].stride(0),
            parameters,
            column_scores,
            row_partials,
            OBJECTIVE=self.problem.objective,
            ANCHOR=traits.anchor,
            PARTIAL_PLANES=0 if row_partials is None else traits.statistics,
            BOTH_SIDES=traits.both_sides,
            SMOOTHING=self.problem.label_smoothing > 0,
        )

    def run_derivative(self, tile: Tile, grad_sim: Tensor, out: list[Tensor], column_scores: Tensor | None) -> None:
        factors, stride = self._factors(tile), out[0].stride(0)
        arguments = (*factors, grad_sim, self.unit, out[0], out[-1], stride, column_scores)
        self._tile_kernel(backward.derivative, tile, "gradient", *arguments)

    def run_scores(
        self, what: str, tile: Tile, out: Tensor, strides: tuple[int, ...], first: int, best: Tensor | None
    ) -> None:
        row_id, column_id, *_ = self._pairs(tile)
        self._tile_kernel(
            retrieval.scores,
            tile,
            "scores",
            row_id,
            column_id,
            *self._factors(tile),
            out,
            best,
            strides[0],
            strides[1],
            start=first,
            WHAT=what,
            PER_TEXT=self.swapped,
        )

    def _tile_kernel(self, kernel: Any, tile: Tile, sizes: str, *arguments: Any, **constants: Any) -> None:
        """A kernel of one program per tile: operands, their strides, `arguments`, N, M, D and constants."""
        n, m, d = size(tile.rows), size(tile.columns), self.problem.d
        chosen = self._config[sizes]
        rows, columns = tile.row_operands, tile.column_operands
        with self.on_device():
            kernel[(triton.cdiv(n, chosen.block_n) * triton.cdiv(m, chosen.block_m),)](
                rows,
                columns,
                rows[0].stride(0),
                columns[0].stride(0),
                *arguments,
                n=n,
                m=m,
                d=d,
                EVEN=d % chosen.block_d == 0,
                num_warps=chosen.warps,
                num_stages=chosen.stages,
                **chosen.constants(),
                **self._common,
                **constants,
            )

    def _pairs(self, tile: Tile) -> tuple[Tensor | None, ...]:
        """What says which pairs are positive, and which count."""
        row, column = self.image, self.text
        return tuple(
            None if x is None else x[panel]
            for x, panel in (
                (row.id, tile.rows),
                (column.id, tile.columns),
                (row.ignore, tile.rows),
                (column.ignore, tile.columns),
                (row.ceiling, tile.rows),
                (column.ceiling, tile.columns),
            )
        )

    def _factors(self, tile: Tile) -> tuple[Tensor | None, Tensor | None]:
        row, column = self.image.factor, self.text.factor
        return (None if row is None else row[tile.rows], None if column is None else column[tile.columns])
