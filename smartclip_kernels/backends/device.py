"""What the launches of the GPU backends have in common: partial states, units, searches by keys. Nothing here waits.

A backend's own launch derives from `DeviceLaunch` and runs the kernels, `run_*`; their outputs are allocated here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smartclip_kernels.launch import Side, reduced, write_sums
from smartclip_kernels.problem import Problem, Tensors
from smartclip_kernels.tiles import Method, Tile

# Near square: thin strips would read and write the gradients' sums again and again. A partial state is 28 bytes for
# every 64 or more scores of a row, and the same of a column; a search holds keys of 8 bytes, and top-k's copies.
METHOD = Method(
    tiles=((16384, 16384), (8192, 16384), (8192, 8192), (4096, 8192), (4096, 4096), (2048, 4096), (2048, 2048),
           (1024, 2048), (1024, 1024), (512, 1024), (512, 512)),
    fused=True,
    smallest=128,  # what a block has; launches count on whole ones
    score_bytes=0.9,
    search_bytes=24.0,
)  # fmt: skip
MOST_PARTS = 64  # whose sums for scale and bias wait to be added up
ROOM = {torch.float16: 64.0}
"""What the largest weight of a gradient becomes: float16 is precise from 2⁻¹⁴ up only, and ends at 2¹⁶."""
NAN_KEY = 0x7FFFFFFF  # the upper half of a key whose score is NaN; the lower half counts candidates down from it

NO_KEY = -(2**63)  # worse than every key


class Slots(NamedTuple):
    """How many partial results a kernel leaves of a tile."""

    of_rows: int
    of_columns: int
    of_all: int


class Panel(NamedTuple):
    """Partial states (planes, slots, anchors) of a side's anchors from `start` on; `first`: none were merged before."""

    side: Side
    partials: Tensor
    start: int
    first: bool


class DeviceLaunch(ABC):
    """The kernels, bound to one problem. `row` is the image's side, unless the search is per text."""

    name: str

    def __init__(self, problem: Problem, row: Side, column: Side, swapped: bool) -> None:
        if problem.image.dtype == torch.float64:
            raise TypeError(
                "image: got torch.float64, needs torch.float16, torch.bfloat16 or torch.float32 on backend "
                f"{self.name!r}; backend='reference' takes float64"
            )
        self.problem, self.swapped = problem, swapped
        self.image, self.text = (column, row) if swapped else (row, column)
        self.scale = problem.scale.to(problem.dtype)
        self.bias = None if problem.bias is None else problem.bias.to(problem.dtype)
        self.unit: Tensor | None = None
        self._parameters: list[Tensor] = []
        self._best: Tensor | None = None
        for side in (row, column):
            if side.weight is not None:
                side.anchor = self.scale.new_empty(problem.traits.anchor, side.size)

    # --- what a backend does -------------------------------------------------------------------------------------

    @abstractmethod
    def slots(self, kernel: str, tile: Tile) -> Slots:
        """Of "statistics", "gradient" (also for a given derivative) or "scores"."""

    @abstractmethod
    def run_statistics(self, tile: Tile, row_partials: Tensor, column_partials: Tensor | None) -> None:
        """Partial states, (planes, slots, rows or columns)."""

    @abstractmethod
    def run_gather(self, panels: Sequence[Panel], last: bool) -> None:
        """Merges partial states, in order, into their side's statistics, and writes the losses. Rows, then columns.

        `last`: all of the problem's states have been merged then.
        """

    @abstractmethod
    def run_anchors(self, sides: Sequence[Side], gain: Tensor) -> None:
        """`anchor` of the sides from statistics and weights. In half precision the latter are divided by the unit.

        Writes the unit, for the largest weight, and the gain, scale times that, where there is a unit.
        """

    @abstractmethod
    def run_unit(self, x: Tensor, y: Tensor, room: float, unit: Tensor, gain: Tensor | None) -> None:
        """The power of two that brings the largest of both into [1, 2), over `room`; 1 where there is no such.

        `gain` becomes scale times that.
        """

    @abstractmethod
    def run_gradient(
        self,
        tile: Tile,
        out: list[Tensor],
        parameters: Tensor,
        column_scores: Tensor | None,
        row_partials: Tensor | None,
    ) -> None:
        """dL/daccumulator into `out`; Σ G·sim and Σ G into `parameters` (slots, 2); Σ_i G·sim, (slots, columns)."""

    @abstractmethod
    def run_derivative(self, tile: Tile, grad_sim: Tensor, out: list[Tensor], column_scores: Tensor | None) -> None:
        """The same from a dL/dsim, dense, that is divided by the unit."""

    @abstractmethod
    def run_scores(
        self, what: str, tile: Tile, out: Tensor, strides: tuple[int, ...], first: int, best: Tensor | None
    ) -> None:
        """ "sim" or "keys", by strides; "positive" or "ahead" of each anchor, (slots, anchors). Images are the rows.

        Candidates are counted from `first`.
        """

    # --- forward -------------------------------------------------------------------------------------------------

    def statistics(self, tile: Tile) -> None:
        slots = self.slots("statistics", tile)
        row_partials = self._partials(slots.of_rows, size(tile.rows))
        column_partials = None
        if self.problem.traits.both_sides:
            column_partials = self._partials(slots.of_columns, size(tile.columns))
        self.run_statistics(tile, row_partials, column_partials)
        self._gather(tile, row_partials, column_partials)

    def loss(self) -> Tensors:
        """Anchors' losses are there: they are written with the statistics."""
        return reduced(self.problem, self.image, self.text)

    # --- backward ------------------------------------------------------------------------------------------------

    def anchor(self) -> Tensor:
        """What G needs of anchors. In half precision their weights are divided by a unit; the gain brings it back."""
        sides = [self.image, self.text] if self.problem.traits.both_sides else [self.image]
        self._parameters = []
        self.unit = self._new_unit()
        gain = self.scale if self.unit is None else torch.empty_like(self.unit)
        self.run_anchors(sides, gain)
        return gain

    def gain(self, grad_sim: Tensor) -> Tensor | None:
        dense = grad_sim.contiguous()
        self.unit = self._new_unit()
        if self.unit is not None:
            self.run_unit(dense, dense[:0], self.room(), self.unit, None)
        return self.unit

    def room(self) -> float:
        return ROOM.get(self.problem.image.dtype, 1.0)

    def gradient(self, tile: Tile, out: list[Tensor], statistics: bool) -> None:
        slots = self.slots("gradient", tile)
        parameters = self.scale.new_empty(slots.of_all, 2, dtype=torch.float64)
        column_scores = self._column_scores(slots, tile)
        row_partials = self._partials(slots.of_rows, size(tile.rows)) if statistics else None
        self.run_gradient(tile, out, parameters, column_scores, row_partials)
        self._parameters.append(parameters)
        if len(self._parameters) == MOST_PARTS:  # so that memory does not grow with their number
            self._parameters = [self.parameter_sums().sum(0, keepdim=True)]
        self._add_column_scores(column_scores, tile)
        if row_partials is not None:
            self._gather(tile, row_partials, None)

    def parameter_gradient(self, scale: Tensor | None, bias: Tensor | None) -> None:
        sums = self.parameter_sums().sum(0)
        write_sums(sums if self.unit is None else sums * self.unit, scale, bias)

    def parameter_sums(self) -> Tensor:
        """(slots, 2), of all tiles: Σ G·sim and Σ G, divided by the unit."""
        return self._parameters[0] if len(self._parameters) == 1 else torch.cat(self._parameters)

    def derivative(self, tile: Tile, grad_sim: Tensor, out: list[Tensor]) -> None:
        column_scores = self._column_scores(self.slots("gradient", tile), tile)
        self.run_derivative(tile, grad_sim, out, column_scores)
        self._add_column_scores(column_scores, tile)

    # --- scores --------------------------------------------------------------------------------------------------

    def similarity(self, tile: Tile, out: Tensor) -> None:
        self.run_scores("sim", tile, out, out.stride(), 0, None)

    def topk(self, tile: Tile, values: Tensor, indices: Tensor) -> None:
        k, candidates = values.shape[1], size(tile.columns)
        keys = torch.empty(size(tile.rows), candidates, dtype=torch.int64, device=values.device)
        strides = keys.stride()[::-1] if self.swapped else keys.stride()
        self.run_scores("keys", self._straight(tile), keys, strides, tile.columns.start, None)
        best = keys.topk(min(k, candidates), dim=1).values
        if tile.columns.start > 0:
            assert self._best is not None
            both = torch.cat([self._best, best], dim=1)
            best = both.topk(min(k, both.shape[1]), dim=1).values
        self._best = best
        if best.shape[1] == k:
            values[tile.rows] = _values(best)
            indices[tile.rows] = NAN_KEY - (best & 0xFFFFFFFF)

    def best_positive(self, tile: Tile, values: Tensor, indices: Tensor) -> None:
        """`indices` gets keys, which `rank` takes."""
        keys = self._per_anchor("positive", tile, torch.int64).amax(0)
        if tile.columns.start > 0:
            keys = torch.maximum(keys, indices[tile.rows])
        indices[tile.rows] = keys
        if tile.columns.stop == self._candidates:
            values[tile.rows] = torch.where(keys == NO_KEY, -torch.inf, _values(keys))

    def rank(self, tile: Tile, values: Tensor, indices: Tensor, ranks: Tensor) -> None:
        best = indices[tile.rows]
        ahead = self._per_anchor("ahead", tile, torch.int32, best).sum(0)
        ranks[tile.rows] = ahead + (1 if tile.columns.start == 0 else ranks[tile.rows])
        if tile.columns.stop == self._candidates:
            ranks[tile.rows] = torch.where(best >> 32 == NAN_KEY, self._candidates, ranks[tile.rows])

    @property
    def _candidates(self) -> int:
        return (self.image if self.swapped else self.text).size

    def _per_anchor(self, what: str, tile: Tile, dtype: torch.dtype, best: Tensor | None = None) -> Tensor:
        straight = self._straight(tile)
        slots = self.slots("scores", straight)
        count = slots.of_columns if self.swapped else slots.of_rows
        out = torch.empty(count, size(tile.rows), dtype=dtype, device=self.scale.device)
        self.run_scores(what, straight, out, (0, 0), tile.columns.start, best)
        return out

    def _straight(self, tile: Tile) -> Tile:
        """Images in the rows, also where texts are the anchors."""
        if not self.swapped:
            return tile
        return Tile(tile.columns, tile.rows, tile.column_operands, tile.row_operands, [])

    # --- common --------------------------------------------------------------------------------------------------

    def on_device(self) -> AbstractContextManager[Any]:
        """Kernels are launched on the current device, whichever device their arguments are on."""
        return torch.cuda.device(self.scale.device) if self.scale.is_cuda else nullcontext()

    def _gather(self, tile: Tile, row_partials: Tensor, column_partials: Tensor | None) -> None:
        panels = [Panel(self.image, row_partials, tile.rows.start, tile.columns.start == 0)]
        if column_partials is not None:
            panels.append(Panel(self.text, column_partials, tile.columns.start, tile.rows.start == 0))
        last = (tile.rows.stop, tile.columns.stop) == (self.image.size, self.text.size)
        self.run_gather(panels, last)

    def _new_unit(self) -> Tensor | None:
        """Room for a power of two, so that half precision holds what is divided by it."""
        return None if self.problem.image.dtype == self.problem.dtype else self.scale.new_empty(())

    def _partials(self, slots: int, count: int) -> Tensor:
        return self.scale.new_empty(self.problem.traits.statistics, slots, count)

    def _column_scores(self, slots: Slots, tile: Tile) -> Tensor | None:
        if self.text.score_gradient is None:
            return None
        return self.scale.new_empty(slots.of_columns, size(tile.columns))

    def _add_column_scores(self, partial: Tensor | None, tile: Tile) -> None:
        if partial is None:
            return
        assert self.text.score_gradient is not None
        into = self.text.score_gradient[tile.columns]
        if tile.rows.start == 0:
            into.copy_(partial.sum(0))
        else:
            into += partial.sum(0)


def _values(keys: Tensor) -> Tensor:
    """The scores that keys were made of."""
    ordered = keys >> 32
    bits = torch.where(ordered < 0, ordered ^ NAN_KEY, ordered).to(torch.int32)
    return bits.view(torch.float32)


def size(panel: slice) -> int:
    return int(panel.stop - panel.start)
