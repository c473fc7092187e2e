"""The Triton backend: portable to what Triton targets. Kernels make products, statistics and G of a tile on chip.

`similarity.py` and `objective.py` hold the formulas, `tile.py` what every kernel shares, `forward.py`, `backward.py`
and `retrieval.py` the kernels, `config.py` their sizes, `launch.py` the launches.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from smartclip_kernels.engine import Launch, Side, TiledBackend
from smartclip_kernels.problem import Problem
from smartclip_kernels.tiles import Method

# Near square: thin strips would read and write the gradients' sums again and again. A partial state is 28 bytes for
# every 64 or more scores of a row, and the same of a column; a search holds keys of 8 bytes, and top-k's copies.
METHOD = Method(
    tiles=((16384, 16384), (8192, 16384), (8192, 8192), (4096, 8192), (4096, 4096), (2048, 4096), (2048, 2048),
           (1024, 2048), (1024, 1024), (512, 1024), (512, 512)),
    fused=True,
    score_bytes=0.9,
    search_bytes=24.0,
)  # fmt: skip


def interpreted() -> bool:
    """Triton's interpreter runs the kernels in Python, on a CPU. Triton reads the variable when they are defined."""
    return os.environ.get("TRITON_INTERPRET", "") not in ("", "0")


def _launch(problem: Problem, similarity: str, row: Side, column: Side, swapped: bool = False) -> Launch:
    from smartclip_kernels.backends.triton.launch import TritonLaunch  # needs triton

    return TritonLaunch(problem, similarity, row, column, swapped)


class TritonBackend(TiledBackend):
    def __init__(self) -> None:
        super().__init__("triton", METHOD, _launch)

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
