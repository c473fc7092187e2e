"""The CPU backend: torch's matrix products, and one fused pass of compiled code over each tile while it is in cache."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from smartclip_kernels.engine import TiledBackend
from smartclip_kernels.launch import Side, write_sums
from smartclip_kernels.problem import Problem, Tensors
from smartclip_kernels.reference import paired_similarity
from smartclip_kernels.tiles import Method, Tile


@cache
def compiled() -> ModuleType:
    return importlib.import_module("smartclip_kernels._C")


class CpuLaunch:
    """Addresses for smartclip_kernels._C; holds the tensors behind them."""

    def __init__(self, problem: Problem, similarity: str, row: Side, column: Side, swapped: bool = False) -> None:
        dtype, empty = problem.dtype, problem.scale.new_empty
        scale = problem.scale.to(dtype)
        bias = None if problem.bias is None else problem.bias.to(dtype)
        self._parameters: Tensor | None = None
        for side in (row, column):
            if side.weight is not None:
                side.weight = side.weight.contiguous()
        if row.weight is not None:
            row.anchor = empty(problem.traits.anchor, problem.n, dtype=dtype)
            column.anchor = empty(problem.traits.anchor, problem.m if problem.traits.both_sides else 0, dtype=dtype)
            self._parameters = empty(problem.n, 2, dtype=torch.float64)
        self._problem = problem
        self._alive = scale, bias, row, column
        self._swapped = swapped
        launch = compiled().LaunchFloat64 if dtype == torch.float64 else compiled().LaunchFloat32
        self._launch = launch(
            similarity=similarity,
            objective=problem.objective,
            row=_addresses(row),
            column=_addresses(column),
            scale=scale.data_ptr(),
            bias=0 if bias is None else bias.data_ptr(),
            label_smoothing=problem.label_smoothing,
            parameter_gradient=0 if self._parameters is None else self._parameters.data_ptr(),
            threads=torch.get_num_threads(),
        )

    def statistics(self, tile: Tile) -> None:
        self._launch.statistics(_box(tile), *_matrices(tile.accumulators))

    def loss(self) -> Tensors:
        problem, empty = self._problem, self._problem.scale.new_empty
        if problem.reduction == "none":
            self._launch.loss()
            return empty(0), empty(0)
        shares = tuple(problem.shares) if problem.traits.both_sides else (1.0,)
        loss, weights = empty((), dtype=problem.dtype), empty(len(shares), dtype=problem.dtype)
        mean = problem.reduction == "mean"
        self._launch.loss(shares, mean, problem.counts_anchors, loss.data_ptr(), weights.data_ptr())
        return loss, weights

    def anchor(self) -> None:
        self._launch.anchor()

    def gain(self, grad_sim: Tensor) -> None:
        return None

    def gradient(self, tile: Tile, out: list[Tensor], statistics: bool) -> None:
        self._launch.gradient(_box(tile), *_matrices(tile.accumulators), *_matrices(out), statistics)

    def parameter_gradient(self, scale: Tensor | None, bias: Tensor | None) -> None:
        assert self._parameters is not None
        write_sums(self._parameters.sum(0), scale, bias)

    def similarity(self, tile: Tile, out: Tensor) -> None:
        self._launch.similarity(_box(tile), *_matrices(tile.accumulators), out.data_ptr(), out.stride(0))

    def derivative(self, tile: Tile, grad_sim: Tensor, out: list[Tensor]) -> None:
        self._launch.derivative(_box(tile), *_matrices(tile.accumulators), grad_sim.data_ptr(), *_matrices(out))

    def topk(self, tile: Tile, values: Tensor, indices: Tensor) -> None:
        self._search("topk", tile, values.data_ptr(), indices.data_ptr(), values.shape[1])

    def best_positive(self, tile: Tile, values: Tensor, indices: Tensor) -> None:
        self._search("best_positive", tile, values.data_ptr(), indices.data_ptr())

    def rank(self, tile: Tile, values: Tensor, indices: Tensor, ranks: Tensor) -> None:
        self._search("rank", tile, values.data_ptr(), indices.data_ptr(), ranks.data_ptr())

    def _search(self, name: str, tile: Tile, *arguments: int) -> None:
        getattr(self._launch, name)(_box(tile), *_matrices(tile.accumulators), self._swapped, *arguments)


def _addresses(side: Side) -> dict[str, int]:
    return {name: x.data_ptr() if isinstance(x, Tensor) else x for name, x in vars(side).items() if x is not None}


def _box(tile: Tile) -> tuple[int, int, int, int]:
    rows, columns = tile.rows, tile.columns
    return rows.start, rows.stop - rows.start, columns.start, columns.stop - columns.start


def _matrices(tile: list[Tensor]) -> tuple[list[int], int]:
    return [x.data_ptr() for x in tile], tile[0].stride(0)


# Matrix products of 1,024 × 2,048 and up reach 93 to 95 % of a large one's rate, of 256 × 512 only 80 %.
METHOD = Method(
    tiles=((2048, 4096), (2048, 2048), (1024, 2048), (1024, 1024), (512, 1024), (512, 512), (256, 512)), fused=False
)
# A pass for each level over the same tile: larger ones take up to 1.4 times as long.
NESTED = replace(METHOD, tiles=((512, 1024), (512, 512), (256, 512)))


_PAIRS = 4096  # whose features are gathered at a time


class CpuBackend(TiledBackend):
    def __init__(self) -> None:
        super().__init__("cpu", METHOD, CpuLaunch, nested=NESTED)

    def best_positive(self, problem: Problem, per_text: bool) -> Tensor:
        """Of the positive pairs alone, which are few: no sweep."""
        image_ids, text_ids = problem.image_ids, problem.text_ids
        if image_ids is None or text_ids is None:
            image_ids = text_ids = torch.arange(problem.n)
        text_ids, order = text_ids.sort()
        begin, end = (torch.searchsorted(text_ids, image_ids, right=right) for right in (False, True))
        count = end - begin
        image = torch.arange(problem.n).repeat_interleave(count)
        place = torch.arange(len(image)) - (count.cumsum(0) - count)[image]  # among an image's texts
        text = order[begin[image] + place]
        best = problem.scale.new_full((problem.m if per_text else problem.n,), -torch.inf, dtype=problem.dtype)
        for i, j in zip(image.split(_PAIRS), text.split(_PAIRS), strict=True):
            mask = None if problem.mask is None else problem.mask[j]
            sim = paired_similarity(problem.image[i], problem.text[j], mask)
            best.scatter_reduce_(0, j if per_text else i, sim, "amax")
        return best

    def unavailable(self) -> str:
        try:
            compiled().isa()
        except ModuleNotFoundError:
            return (
                "its compiled module, smartclip_kernels._C, was not built; install g++ and install the package again "
                "without SMARTCLIP_BUILD=0"
            )
        except ImportError as error:
            return f"its compiled module does not load ({error}); install the package again on this machine"
        return ""

    def runs_on(self, device_type: str) -> bool:
        return device_type == "cpu"


BACKEND = CpuBackend()
