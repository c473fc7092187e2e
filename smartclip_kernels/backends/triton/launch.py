"""The launches: tensors in, kernels out. Nothing here waits for the device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from smartclip_kernels.backends.triton import backward, config, forward, interpreted, retrieval
from smartclip_kernels.engine import Side
from smartclip_kernels.problem import Problem
from smartclip_kernels.tiles import Tile

INTERPRETED = interpreted()
ANCHORS, PARTIALS = 64, 16  # a program of `gather` merges that many partial states of that many anchors at a time
ROOM = {torch.float16: 64.0}
"""What the largest weight of a gradient becomes: float16 is precise from 2⁻¹⁴ up only, and ends at 2¹⁶."""


class TritonLaunch:
    """The kernels, bound to one problem. `row` is the image's side, unless the search is per text."""

    def __init__(self, problem: Problem, similarity: str, row: Side, column: Side, swapped: bool = False) -> None:
        if problem.image.dtype == torch.float64:
            raise TypeError(
                "image: got torch.float64, needs torch.float16, torch.bfloat16 or torch.float32 on backend 'triton'; "
                "backend='reference' takes float64"
            )
        self._problem, self._swapped = problem, swapped
        self._image, self._text = (column, row) if swapped else (row, column)
        self._scale = problem.scale.to(problem.dtype)
        self._bias = None if problem.bias is None else problem.bias.to(problem.dtype)
        self._unit: Tensor | None = None
        self._parameters: Tensor | None = None
        self._best: Tensor | None = None
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

    # --- forward -------------------------------------------------------------------------------------------------

    def statistics(self, tile: Tile) -> None:
        sizes, problem = self._config["statistics"], self._problem
        traits = problem.traits
        n, m = _size(tile.rows), _size(tile.columns)
        row_partials = self._partials(triton.cdiv(m, sizes.block_m) * sizes.parts, n)
        column_partials = self._partials(triton.cdiv(n, sizes.block_n), m) if traits.both_sides else None
        self._tile_kernel(
            forward.statistics,
            tile,
            "statistics",
            *self._ids(tile),
            *self._factors(tile),
            self._scale,
            self._bias,
            row_partials,
            column_partials,
            OBJECTIVE=problem.objective,
            PLANES=traits.statistics,
            BOTH_SIDES=traits.both_sides,
            SMOOTHING=problem.label_smoothing > 0,
        )
        self._gather(row_partials, self._image, tile.rows, first=tile.columns.start == 0)
        if column_partials is not None:
            self._gather(column_partials, self._text, tile.columns, first=tile.rows.start == 0)

    def loss(self) -> None:
        """The losses are there: `gather` writes them with the statistics."""

    # --- backward ------------------------------------------------------------------------------------------------

    def anchor(self) -> Tensor:
        """What G needs of anchors. In half precision their weights are divided by a unit; the gain brings it back."""
        problem = self._problem
        sides = [self._image, self._text] if problem.traits.both_sides else [self._image]
        self._parameters = self._scale.new_zeros(2, dtype=torch.float64)
        weights = [side.weight for side in sides if side.weight is not None]
        self._unit = self._unit_of(weights[0], weights[-1])
        for side in sides:
            side.anchor = self._scale.new_empty(problem.traits.anchor, side.size)
            with _on(self._scale.device):
                backward.anchors[(triton.cdiv(side.size, ANCHORS),)](
                    side.statistics,
                    side.weight,
                    self._unit,
                    problem.label_smoothing,
                    side.anchor,
                    side.size,
                    OBJECTIVE=problem.objective,
                    PLANES=problem.traits.statistics if problem.traits.needs_statistics else 0,
                    ANCHOR=problem.traits.anchor,
                    BLOCK=ANCHORS,
                    num_warps=4,
                )
        return self._scale if self._unit is None else self._scale * self._unit

    def gain(self, grad_sim: Tensor) -> Tensor | None:
        dense = grad_sim.contiguous()
        self._unit = self._unit_of(dense, dense[:0])
        return self._unit

    def gradient(self, tile: Tile, out: list[Tensor], statistics: bool) -> None:
        sizes, problem = self._config["gradient"], self._problem
        traits, image, text = problem.traits, self._image, self._text
        n, m = _size(tile.rows), _size(tile.columns)
        row_blocks, column_blocks = triton.cdiv(n, sizes.block_n), triton.cdiv(m, sizes.block_m)
        parameters = self._scale.new_empty(row_blocks * column_blocks * sizes.parts, 2, dtype=torch.float64)
        column_scores = None if text.score_gradient is None else self._scale.new_empty(row_blocks, m)
        row_partials = self._partials(column_blocks * sizes.parts, n) if statistics else None
        self._tile_kernel(
            backward.gradient,
            tile,
            "gradient",
            *self._ids(tile),
            *self._factors(tile),
            self._scale,
            self._bias,
            image.anchor,
            image.anchor if text.anchor is None else text.anchor,
            tile.rows.start,
            tile.columns.start,
            image.size,
            text.size,
            out[0],
            out[-1],
            parameters,
            column_scores,
            row_partials,
            OBJECTIVE=problem.objective,
            ANCHOR=traits.anchor,
            PARTIAL_PLANES=traits.statistics if statistics else 0,
            BOTH_SIDES=traits.both_sides,
            SMOOTHING=problem.label_smoothing > 0,
        )
        assert self._parameters is not None
        self._parameters += parameters.sum(0)
        self._add_column_scores(column_scores, tile)
        if row_partials is not None:
            self._gather(row_partials, image, tile.rows, first=tile.columns.start == 0)

    def parameter_gradient(self) -> Tensor:
        assert self._parameters is not None
        return self._parameters if self._unit is None else self._parameters * self._unit

    def derivative(self, tile: Tile, grad_sim: Tensor, out: list[Tensor]) -> None:
        row_blocks = triton.cdiv(_size(tile.rows), self._config["gradient"].block_n)
        scores = None
        if self._text.score_gradient is not None:
            scores = self._scale.new_empty(row_blocks, _size(tile.columns))
        arguments = (*self._factors(tile), grad_sim, self._unit, out[0], out[-1], scores)
        self._tile_kernel(backward.derivative, tile, "gradient", *arguments)
        self._add_column_scores(scores, tile)

    # --- scores --------------------------------------------------------------------------------------------------

    def similarity(self, tile: Tile, out: Tensor) -> None:
        self._scores("sim", tile, out, out.stride())

    def topk(self, tile: Tile, values: Tensor, indices: Tensor) -> None:
        k, candidates = values.shape[1], _size(tile.columns)
        keys = torch.empty(_size(tile.rows), candidates, dtype=torch.int64, device=values.device)
        self._scores("keys", tile, keys, keys.stride()[::-1] if self._swapped else keys.stride())
        best = keys.topk(min(k, candidates), dim=1).values
        if tile.columns.start > 0:
            assert self._best is not None
            both = torch.cat([self._best, best], dim=1)
            best = both.topk(min(k, both.shape[1]), dim=1).values
        self._best = best
        if best.shape[1] == k:
            ordered = best >> 32
            bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(torch.int32)
            values[tile.rows] = bits.view(torch.float32)
            indices[tile.rows] = 0x7FFFFFFF - (best & 0xFFFFFFFF)

    def best_positive(self, tile: Tile, values: Tensor, indices: Tensor) -> None:
        """`indices` gets keys: they hold the values, too."""
        keys = self._per_anchor("positive", tile, torch.int64).amax(0)
        if tile.columns.start > 0:
            keys = torch.maximum(keys, indices[tile.rows])
        indices[tile.rows] = keys

    def rank(self, tile: Tile, values: Tensor, indices: Tensor, ranks: Tensor) -> None:
        best = indices[tile.rows]
        ahead = self._per_anchor("ahead", tile, torch.int32, best).sum(0)
        ranks[tile.rows] = ahead + (1 if tile.columns.start == 0 else ranks[tile.rows])
        candidates = (self._image if self._swapped else self._text).size
        if tile.columns.stop == candidates:
            ranks[tile.rows] = torch.where(best >> 32 == 0x7FFFFFFF, candidates, ranks[tile.rows])

    def _per_anchor(self, what: str, tile: Tile, dtype: torch.dtype, best: Tensor | None = None) -> Tensor:
        sizes = self._config["scores"]
        block = sizes.block_n if self._swapped else sizes.block_m
        blocks, anchors = triton.cdiv(_size(tile.columns), block), _size(tile.rows)
        out = torch.empty(blocks, anchors, dtype=dtype, device=self._scale.device)
        self._scores(what, tile, out, (0, 0), best)
        return out

    def _scores(self, what: str, tile: Tile, out: Tensor, strides: tuple[int, ...], best: Tensor | None = None) -> None:
        given, tile = tile, self._straight(tile)
        row_id, column_id, *_ = self._ids(tile)
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
            start=given.columns.start,
            WHAT=what,
            PER_TEXT=self._swapped,
        )

    # --- common --------------------------------------------------------------------------------------------------

    def _straight(self, tile: Tile) -> Tile:
        """Images in the rows, also where texts are the anchors."""
        if not self._swapped:
            return tile
        return Tile(tile.columns, tile.rows, tile.column_operands, tile.row_operands, [])

    def _tile_kernel(self, kernel: Any, tile: Tile, sizes: str, *arguments: Any, **constants: Any) -> None:
        """A kernel of one program per tile: operands, their strides, `arguments`, N, M, D and constants."""
        n, m, d = _size(tile.rows), _size(tile.columns), self._problem.d
        chosen = self._config[sizes]
        rows, columns = tile.row_operands, tile.column_operands
        with _on(self._scale.device):
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

    def _gather(self, partials: Tensor, side: Side, panel: slice, first: bool) -> None:
        planes, blocks, count = partials.shape
        with _on(self._scale.device):
            forward.gather[(triton.cdiv(count, ANCHORS),)](
                partials,
                side.statistics,
                side.loss,
                self._problem.label_smoothing,
                blocks,
                count,
                panel.start,
                side.size,
                int(first),
                OBJECTIVE=self._problem.objective,
                PLANES=planes,
                BLOCKS=PARTIALS,
                BLOCK=ANCHORS,
                num_warps=4,
            )

    def _unit_of(self, x: Tensor, y: Tensor) -> Tensor | None:
        """A power of two near the largest of them, so that half precision holds what is divided by it."""
        if self._problem.image.dtype == self._problem.dtype:
            return None
        unit = self._scale.new_empty(())
        room = ROOM.get(self._problem.image.dtype, 1.0)
        with _on(unit.device):
            backward.unit_of[(1,)](x, y, unit, x.numel(), y.numel(), room, BLOCK=4096, num_warps=8)
        return unit

    def _partials(self, blocks: int, count: int) -> Tensor:
        return self._scale.new_empty(self._problem.traits.statistics, blocks, count)

    def _ids(self, tile: Tile) -> tuple[Tensor | None, ...]:
        row, column = self._image, self._text
        return tuple(
            None if x is None else x[panel]
            for x, panel in (
                (row.id, tile.rows),
                (column.id, tile.columns),
                (row.ignore, tile.rows),
                (column.ignore, tile.columns),
            )
        )

    def _factors(self, tile: Tile) -> tuple[Tensor | None, Tensor | None]:
        row, column = self._image.factor, self._text.factor
        return (None if row is None else row[tile.rows], None if column is None else column[tile.columns])

    def _add_column_scores(self, partial: Tensor | None, tile: Tile) -> None:
        if partial is None:
            return
        assert self._text.score_gradient is not None
        into = self._text.score_gradient[tile.columns]
        if tile.rows.start == 0:
            into.copy_(partial.sum(0))
        else:
            into += partial.sum(0)


def _size(panel: slice) -> int:
    return int(panel.stop - panel.start)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whichever device its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
