"""Sizes of blocks, for each architecture. `python -m bench tune` measures and rewrites tables.json.

Nothing is tuned at run time: the same machine always runs the same kernels.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

TABLES = Path(__file__).parent / "tables.json"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "default", "interpreter")
KERNELS = ("statistics", "gradient", "scores")
"""A given derivative takes the sizes of gradient."""


class Config(NamedTuple):
    """How a tile kernel is launched."""

    block_n: int
    block_m: int
    block_d: int
    parts: int  # of a tile's columns, one after the other, once the products are there
    group: int
    warps: int
    stages: int

    def constants(self) -> dict[str, int]:
        return {
            "BLOCK_N": self.block_n,
            "BLOCK_M": self.block_m,
            "BLOCK_D": self.block_d,
            "PARTS": self.parts,
            "GROUP": self.group,
        }


def operand_kind(similarity: str, dtype: torch.dtype) -> str:
    """Kernels whose operands are of one kind share a size: half precision of either type, or float32."""
    return f"{similarity} {'half' if dtype.itemsize == 2 else 'float32'}"


@cache
def tables() -> dict[str, Any]:
    """Architecture → kind of operands → kernel → sizes."""
    loaded: dict[str, Any] = json.loads(TABLES.read_text())
    return loaded


@cache
def architecture(device_index: int | None) -> str:
    """Of a GPU: the newest of the tables' that is not newer than it; "interpreter" for none."""
    if device_index is None:
        return "interpreter"
    if torch.version.hip:
        return "default"
    major, minor = torch.cuda.get_device_capability(device_index)
    known = [int(name[3:]) for name in ARCHITECTURES if name.startswith("sm_")]
    fitting = [number for number in known if number <= 10 * major + minor]
    return f"sm_{max(fitting)}" if fitting else "default"


@cache
def config(architecture: str, similarity: str, dtype: torch.dtype, kernel: str) -> Config:
    return Config(*tables()[architecture][operand_kind(similarity, dtype)][kernel])
