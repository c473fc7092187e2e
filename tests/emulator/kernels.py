"""The library's own kernels, built for the emulator: the module that SMARTCLIP_CUDA_EMULATOR names."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from tests.emulator import build

ELEMENTS = {"bfloat16": "__nv_bfloat16", "float16": "__half", "float32": "float", "tf32": "ptx::Tf32"}
ARCHITECTURES = {"sm80": tuple(ELEMENTS), "sm90": ("bfloat16", "float16")}
MODULE = build.EMULATOR / "module"


def kernels_module(
    variant: build.Variant = "plain",
    *,
    csrc: Path = build.CSRC,
    elements: Iterable[str] = tuple(ELEMENTS),
    architectures: Iterable[str] = tuple(ARCHITECTURES),
) -> Path:
    """As CMakeLists.txt compiles them for a device; of `csrc`, for these elements and architectures."""
    cuda, bindings = csrc / "cuda", build.ROOT / "bindings"
    kernels: list[build.Source] = []
    for architecture, names in ARCHITECTURES.items():
        for name in names:
            find = {"SK_FIND": f"find_{name}"}
            if name in elements and architecture in architectures:
                kernels.append((cuda / architecture / "kernels.cu", find | {"SK_ELEMENT": ELEMENTS[name]}))
            else:
                kernels.append((MODULE / "missing.cpp", find | {"SK_ARCHITECTURE": architecture}))
    sources = [*kernels, (cuda / "dispatch.cu", {"SK_SM90": "1"}), bindings / "cuda.cpp", MODULE / "module.cpp"]
    return build.build(sources, "_emulated", kind="module", variant=variant, includes=[bindings], csrc=csrc)


def changed_kernels(folder: Path, file: str, right: str, wrong: str, variant: build.Variant = "plain") -> Path:
    """The bfloat16 kernels of a file's architecture, with one place of it changed; the sources go into `folder`."""
    csrc = folder / "csrc"
    shutil.copytree(build.CSRC, csrc)
    text = (csrc / "cuda" / file).read_text()
    assert text.count(right) == 1, f"{file} has it {text.count(right)} times: {right}"
    (csrc / "cuda" / file).write_text(text.replace(right, wrong))
    return kernels_module(variant, csrc=csrc, elements=("bfloat16",), architectures=(family_of(file),))


def family_of(file: str) -> str:
    return "sm90" if file.startswith("sm90") else "sm80"
