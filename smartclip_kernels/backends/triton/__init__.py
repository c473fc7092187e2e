"""The Triton backend: portable to what Triton targets. Kernels make products, statistics and G of a tile on chip.

`similarity.py` and `objective.py` hold the formulas, `tile.py` what every kernel shares, `forward.py`, `backward.py`
and `retrieval.py` the kernels, `config.py` their sizes, `launch.py` the launches.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from smartclip_kernels.backends.device import METHOD
from smartclip_kernels.engine import TiledBackend
from smartclip_kernels.launch import Launch, Side
from smartclip_kernels.problem import Problem


def interpreted() -> bool:
    """Triton's interpreter runs the kernels in Python, on a CPU. Triton reads the variable when they are defined."""
    return os.environ.get("TRITON_INTERPRET", "") not in ("", "0")


def _launch(problem: Problem, similarity: str, row: Side, column: Side, swapped: bool = False) -> Launch:
    from smartclip_kernels.backends.triton.launch import TritonLaunch  # needs triton

    return TritonLaunch(problem, similarity, row, column, swapped)


class TritonBackend(TiledBackend):
    def __init__(self) -> None:
        super().__init__("triton", METHOD, _launch, cuts_sums=not interpreted(), needs_ids=True)

    def unavailable(self) -> str:
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed; pip install triton (it comes with torch's builds for GPUs)"
        if not torch.cuda.is_available() and not interpreted():
            return (
                "torch sees no GPU here; on a CPU, TRITON_INTERPRET=1 in the environment runs its kernels in Python, "
                "slowly, for tests"
            )
        return ""

    def runs_on(self, device_type: str) -> bool:
        return device_type == ("cpu" if interpreted() else "cuda")


BACKEND = TritonBackend()
