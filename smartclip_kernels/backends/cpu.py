"""The CPU backend: torch's matrix products, and one fused pass of compiled code over each tile while it is in cache."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from smartclip_kernels.engine import Batch, TiledBackend
from smartclip_kernels.problem import Problem

_VECTORS = ("id", "ignore", "factor", "statistics", "loss", "weight", "anchor", "score_gradient")


def compiled() -> ModuleType:
    return importlib.import_module("smartclip_kernels._C")


class CpuLaunch:
    """Addresses for smartclip_kernels._C; holds the tensors behind them."""

    def __init__(
        self,
        problem: Problem,
        similarity: str,
        row: Batch,
        column: Batch,
        parameter_gradient: Tensor | None,
        swapped: bool,
    ) -> None:
        scale = problem.scale.to(problem.dtype)
        bias = None if problem.bias is None else problem.bias.to(problem.dtype)
        self._alive = (row, column, scale, bias, parameter_gradient)
        self._swapped = swapped
        launch = compiled().LaunchFloat64 if problem.dtype == torch.float64 else compiled().LaunchFloat32
        self._launch = launch(
            similarity=similarity,
            objective=problem.objective,
            row=_addresses(row),
            column=_addresses(column),
            scale=scale.data_ptr(),
            bias=0 if bias is None else bias.data_ptr(),
            label_smoothing=problem.label_smoothing,
            parameter_gradient=0 if parameter_gradient is None else parameter_gradient.data_ptr(),
            threads=torch.get_num_threads(),
        )

    def statistics(self, rows: slice, columns: slice, accumulators: list[Tensor]) -> None:
        self._launch.statistics(_box(rows, columns), *_matrices(accumulators))

    def loss(self) -> None:
        self._launch.loss()

    def anchor(self) -> None:
        self._launch.anchor()

    def gradient(
        self, rows: slice, columns: slice, accumulators: list[Tensor], out: list[Tensor], statistics: bool
    ) -> None:
        self._launch.gradient(_box(rows, columns), *_matrices(accumulators), *_matrices(out), statistics)

    def similarity(self, rows: slice, columns: slice, accumulators: list[Tensor], out: Tensor) -> None:
        self._launch.similarity(_box(rows, columns), *_matrices(accumulators), out.data_ptr(), out.stride(0))

    def derivative(
        self, rows: slice, columns: slice, accumulators: list[Tensor], grad_sim: Tensor, out: list[Tensor]
    ) -> None:
        self._launch.derivative(_box(rows, columns), *_matrices(accumulators), grad_sim.data_ptr(), *_matrices(out))

    def topk(self, rows: slice, columns: slice, accumulators: list[Tensor], values: Tensor, indices: Tensor) -> None:
        self._search("topk", rows, columns, accumulators, values.data_ptr(), indices.data_ptr(), values.shape[1])

    def best_positive(
        self, rows: slice, columns: slice, accumulators: list[Tensor], values: Tensor, indices: Tensor
    ) -> None:
        self._search("best_positive", rows, columns, accumulators, values.data_ptr(), indices.data_ptr())

    def rank(
        self, rows: slice, columns: slice, accumulators: list[Tensor], values: Tensor, indices: Tensor, ranks: Tensor
    ) -> None:
        self._search("rank", rows, columns, accumulators, values.data_ptr(), indices.data_ptr(), ranks.data_ptr())

    def _search(self, name: str, rows: slice, columns: slice, accumulators: list[Tensor], *arguments: int) -> None:
        getattr(self._launch, name)(_box(rows, columns), *_matrices(accumulators), self._swapped, *arguments)


def _addresses(side: Batch) -> dict[str, int]:
    vectors = ((name, getattr(side, name)) for name in _VECTORS)
    return {"size": side.size} | {name: x.data_ptr() for name, x in vectors if x is not None}


def _box(rows: slice, columns: slice) -> tuple[int, int, int, int]:
    return rows.start, rows.stop - rows.start, columns.start, columns.stop - columns.start


def _matrices(tile: list[Tensor]) -> tuple[list[int], int]:
    return [x.data_ptr() for x in tile], tile[0].stride(0)


class CpuBackend(TiledBackend):
    def __init__(self) -> None:
        super().__init__("cpu", CpuLaunch)

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
