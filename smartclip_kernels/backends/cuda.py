"""The CUDA backend: hand-written kernels for NVIDIA's GPUs of compute capability 8.0 and later."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from smartclip_kernels.backends.device import METHOD, DeviceLaunch, Panel, Slots, size
from smartclip_kernels.engine import TiledBackend, operands_class
from smartclip_kernels.launch import Launch, Side
from smartclip_kernels.problem import Problem, Tensors
from smartclip_kernels.tiles import Tile

EMULATOR = os.environ.get("SMARTCLIP_CUDA_EMULATOR", "")
"""Path of the module that tests/emulator builds: the same kernels, compiled for the CPU. For tests; slow."""
MULTIPROCESSORS_EMULATED = 4
ARCHITECTURE = os.environ.get("SMARTCLIP_CUDA_ARCHITECTURE", "")
"""Which kernels run: "sm_80", or "sm_90a", half precision on compute capability 9.0. Empty: the best there are."""
ARCHITECTURES = ("sm_80", "sm_90a")
HOPPER_ELEMENTS = ("bfloat16", "float16")
OLDEST = (8, 0)
_VECTORS = ("id", "ignore", "factor", "tau", "ceiling", "statistics", "loss", "weight", "anchor")
_ELEMENTS = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
REBUILD = "install the CUDA toolkit (nvcc) and install the package again"


@cache
def compiled() -> ModuleType:
    """The module that has `Launch`.

    Raises:
        ImportError: it was not built, or does not load.
    """
    if EMULATOR:
        spec = importlib.util.spec_from_file_location("_emulated", EMULATOR)
        assert spec is not None and spec.loader is not None
        emulated = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(emulated)
        return emulated
    module = importlib.import_module("smartclip_kernels._C")
    if not hasattr(module, "cuda"):
        raise ImportError("smartclip_kernels._C was built without CUDA")
    device: ModuleType = module.cuda
    return device


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if not EMULATOR else MULTIPROCESSORS_EMULATED


def _element(dtype: torch.dtype) -> str:
    """What the products multiply. float32 is exact, unless torch's own setting asks for TF32."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return _ELEMENTS[dtype]


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if not EMULATOR else (9, 0)


@cache
def _built(name: str, element: str, similarity: str, objective: str) -> bool:
    return bool(compiled().resources(name, element, similarity, objective))


@cache
def _keeps(name: str, element: str, similarity: str, objective: str) -> bool:
    return bool(compiled().keeps(name, element, similarity, objective))


def architecture(device: torch.device, element: str, similarity: str, objective: str) -> str:
    """Whose kernels run: those of sm_90a where they were built and this device has its instructions.

    float32 has kernels of sm_80 alone, whichever are asked for.

    Raises:
        RuntimeError: SMARTCLIP_CUDA_ARCHITECTURE names none, such as this device cannot run, or such as were not built.
    """
    if ARCHITECTURE not in ("", *ARCHITECTURES):
        names = ", ".join(ARCHITECTURES)
        raise RuntimeError(f"SMARTCLIP_CUDA_ARCHITECTURE: got {ARCHITECTURE!r}, needs one of {names}")
    if ARCHITECTURE == "sm_80" or element not in HOPPER_ELEMENTS:
        return "sm_80"
    here, built = _capability(device) == (9, 0), _built("sm_90a", element, similarity, objective)
    if here and built:
        return "sm_90a"
    if ARCHITECTURE == "sm_90a":
        name = "{}.{}".format(*_capability(device))
        reason = f"this GPU has compute capability {name}"
        if here:
            reason = "its kernels were not built: install the package again with 90a in CUDA_ARCHS"
        raise RuntimeError(f"SMARTCLIP_CUDA_ARCHITECTURE: got 'sm_90a', but {reason}")
    return "sm_80"


class CudaLaunch(DeviceLaunch):
    """Addresses for the compiled module; holds the tensors behind them."""

    name = "cuda"

    def __init__(self, problem: Problem, similarity: str, row: Side, column: Side, swapped: bool = False) -> None:
        super().__init__(problem, row, column, swapped)
        device = problem.image.device
        self._split = problem.mask is not None and problem.image.dtype != problem.dtype
        element = _element(problem.image.dtype)
        weights = [side.weight for side in (row, column) if side.weight is not None]
        self._uniform = bool(weights) and all(x.stride(0) == 0 for x in weights)
        for side in (row, column):
            if side.weight is not None and not self._uniform:
                side.weight = side.weight.contiguous()
        # What the launches add up, and where the loss and what each side counts in it go.
        self._reduced: Tensors | None = None
        self._sums = arrived = None
        if problem.reduction != "none" and row.loss is not None:
            sides = 2 if problem.traits.both_sides else 1
            self._reduced = self.scale.new_empty(()), self.scale.new_empty(sides)
            blocks = sum(-(-side.size // compiled().ANCHORS_A_BLOCK) for side in (row, column)[:sides])
            self._sums = self.scale.new_empty(blocks, 2, dtype=torch.float64)
            arrived = self._arrived = self.scale.new_empty((), dtype=torch.int32)
        with self.on_device():
            self._launch = compiled().Launch(
                architecture=architecture(device, element, similarity, problem.objective),
                element=element,
                similarity=similarity,
                objective=problem.objective,
                row=_addresses(self.image),
                column=_addresses(self.text),
                scale=self.scale.data_ptr(),
                bias=_address(self.bias),
                label_smoothing=problem.label_smoothing,
                multiprocessors=_multiprocessors(device),
                stream=torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0,
                arrived=_address(arrived),
            )

    def slots(self, kernel: str, tile: Tile) -> Slots:
        return Slots(*self._launch.slots(size(tile.rows), size(tile.columns), kernel == "scores"))

    def run_statistics(self, tile: Tile, row_partials: Tensor, column_partials: Tensor | None) -> None:
        with self.on_device():
            partials = row_partials.data_ptr(), _address(column_partials)
            self._launch.statistics(*self._part(tile), *partials, _panel(tile.accumulators))

    def run_gather(self, panels: Sequence[Panel], last: bool) -> None:
        merges = [(x.partials.data_ptr(), *x.partials.shape[1:], x.start, x.first) for x in panels]
        sums = _address(self._sums)
        loss, weights = (_address(x) if last else 0 for x in (self._reduced or (None, None)))
        with self.on_device():
            of_all = (self.problem.reduction, sums, loss, weights, tuple(self.problem.shares))
            self._launch.gather(merges[0], (*merges, None)[1], *of_all)

    def loss(self) -> Tensors:
        return self._reduced or super().loss()

    def run_anchors(self, sides: Sequence[Side], gain: Tensor) -> None:
        weights = [side.weight for side in sides if side.weight is not None]
        if self.unit is not None and not self._uniform:
            self.run_unit(weights[0], weights[-1], self.room(), self.unit, gain)
        with self.on_device():
            self._launch.anchors(self._uniform, self.room(), _address(self.unit), gain.data_ptr())

    def run_unit(self, x: Tensor, y: Tensor, room: float, unit: Tensor, gain: Tensor | None) -> None:
        sizes = (x.data_ptr(), x.numel(), y.data_ptr(), y.numel())
        with self.on_device():
            self._launch.unit(*sizes, room, unit.data_ptr(), _address(gain))

    def parameter_gradient(self, scale: Tensor | None, bias: Tensor | None) -> None:
        sums = self.parameter_sums()
        outputs = (_address(self.unit), _address(scale), _address(bias))
        with self.on_device():
            self._launch.parameter_gradient(sums.data_ptr(), len(sums), *outputs)

    def run_gradient(
        self,
        tile: Tile,
        out: list[Tensor],
        parameters: Tensor,
        column_scores: Tensor | None,
        row_partials: Tensor | None,
    ) -> None:
        sums = (parameters.data_ptr(), _address(column_scores), _address(row_partials))
        with self.on_device():
            self._launch.gradient(*self._part(tile), _panel(out), *sums, _panel(tile.accumulators))

    def run_derivative(self, tile: Tile, grad_sim: Tensor, out: list[Tensor], column_scores: Tensor | None) -> None:
        given = (grad_sim.data_ptr(), _address(self.unit))
        with self.on_device():
            self._launch.derivative(*self._part(tile), *given, _panel(out), _address(column_scores))

    def run_scores(
        self, what: str, tile: Tile, out: Tensor, strides: tuple[int, ...], first: int, best: Tensor | None
    ) -> None:
        search = (what, self.swapped, first, out.data_ptr(), *strides, _address(best))
        with self.on_device():
            self._launch.search(*self._part(tile), *search)

    def _part(self, tile: Tile) -> tuple[Any, ...]:
        """Where a tile lies, D, its operands, and whether the low halves of the columns' count."""
        rows, columns = tile.rows, tile.columns
        box = (rows.start, size(rows), columns.start, size(columns))
        operands: Sequence[Tensor] = tile.column_operands
        inexact: Tensor | None = None
        if self._split:
            *operands, inexact = operands
        return box, self.problem.d, _panel(tile.row_operands), _panel(operands), _address(inexact)


def _addresses(side: Side) -> dict[str, int]:
    vectors = ((name, getattr(side, name)) for name in _VECTORS)
    return {"size": side.size} | {name: x.data_ptr() for name, x in vectors if x is not None}


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _panel(matrices: Sequence[Tensor]) -> tuple[list[int], int]:
    return [x.data_ptr() for x in matrices], matrices[0].stride(0) if matrices else 0


class CudaBackend(TiledBackend):
    def __init__(self) -> None:
        super().__init__("cuda", METHOD, _launch, cuts_sums=True)

    def keeps(self, problem: Problem) -> bool:
        if problem.image.dtype not in _ELEMENTS:
            return False  # the launch will refuse it
        kernels = _element(problem.image.dtype), operands_class(problem).name, problem.objective
        return _keeps(architecture(problem.image.device, *kernels), *kernels)

    def unavailable(self) -> str:
        try:
            compiled()
        except ImportError as error:
            return f"its kernels are not there ({error}); {REBUILD}"
        if EMULATOR:
            return ""
        if not torch.cuda.is_available() or torch.version.hip:
            return "torch sees no NVIDIA GPU here"
        capability = torch.cuda.get_device_capability()
        if capability < OLDEST:
            name = "{}.{}".format(*capability)
            return f"this GPU has compute capability {name}, its kernels need 8.0; backend='triton' may run on it"
        return ""

    def runs_on(self, device_type: str) -> bool:
        return device_type == ("cpu" if EMULATOR else "cuda")


def _launch(problem: Problem, similarity: str, row: Side, column: Side, swapped: bool = False) -> Launch:
    return CudaLaunch(problem, similarity, row, column, swapped)


BACKEND = CudaBackend()
