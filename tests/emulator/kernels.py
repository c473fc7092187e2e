"""The library's own kernels, built for the emulator: the module that SMARTCLIP_CUDA_EMULATOR names."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tests.emulator import build

ELEMENTS = {"bfloat16": "__nv_bfloat16", "float16": "__half", "float32": "float", "tf32": "ptx::Tf32"}
MODULE = build.EMULATOR / "module"


def kernels_module(
    variant: build.Variant = "plain", *, csrc: Path = build.CSRC, elements: Iterable[str] = tuple(ELEMENTS)
) -> Path:
    """As CMakeLists.txt compiles them for a device; of `csrc`, for these elements."""
    cuda, bindings = csrc / "cuda", build.ROOT / "bindings"
    kernels: list[build.Source] = [
        (cuda / "sm80" / "kernels.cu", {"SK_ELEMENT": ELEMENTS[name], "SK_FIND": f"find_{name}"})
        if name in elements
        else (MODULE / "missing.cpp", {"SK_FIND": f"find_{name}"})
        for name in ELEMENTS
    ]
    sources = [*kernels, cuda / "dispatch.cu", bindings / "cuda.cpp", MODULE / "module.cpp"]
    return build.build(sources, "_emulated", kind="module", variant=variant, includes=[bindings], csrc=csrc)
