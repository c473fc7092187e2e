"""Triton's kernels compiled ahead of time, without a GPU: ``python -m bench report``.

Every kernel at every size in the backend's tables, for every architecture there: registers, spilled bytes and shared
memory, as the GPU's own assembler counts them. Must run without TRITON_INTERPRET, which leaves nothing to compile.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from smartclip_kernels.backends.triton import backward, config, forward, retrieval
from smartclip_kernels.backends.triton.launch import ANCHORS, PARTIALS
from smartclip_kernels.reference import OBJECTIVES

CAPABILITIES = {"sm_80": 80, "sm_86": 86, "sm_89": 89, "sm_90": 90, "sm_100": 100, "default": 80}
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227}
"""KiB that one block can have (CUDA C++ Programming Guide, technical specifications per compute capability)."""
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Variant:
    """A kernel as one of the library's functions launches it."""

    kernel: str
    similarity: str = "dot"
    objective: str = "softmax"
    dtype: torch.dtype = torch.bfloat16
    extra: tuple[tuple[str, Any], ...] = ()

    @property
    def half(self) -> bool:
        return self.dtype.itemsize == 2

    def __str__(self) -> str:
        words = [self.kernel, self.similarity, self.objective, NAMES[self.dtype], *(str(v) for _, v in self.extra)]
        return " ".join(words)


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes of an SM."""

    variant: Variant
    architecture: str
    sizes: config.Config | None
    registers: int
    spilled: int  # bytes of local memory, a thread
    shared: int  # bytes, a block
    matrix: str  # the instruction of the products: wgmma, tcgen05, mma; fma, where they are made number by number
    atomics: bool

    @property
    def fits(self) -> bool:
        return self.shared <= SHARED_MEMORY[CAPABILITIES[self.architecture]] * 1024


KERNELS = {
    "statistics": forward.statistics,
    "gather": forward.gather,
    "gradient": backward.gradient,
    "derivative": backward.derivative,
    "anchors": backward.anchors,
    "unit_of": backward.unit_of,
    "scores": retrieval.scores,
}
SIZES_OF = {"statistics": "statistics", "gradient": "gradient", "derivative": "gradient", "scores": "scores"}


def variants(dtypes: tuple[torch.dtype, ...]) -> Iterator[Variant]:
    """Everything that the backend launches for inputs of these dtypes."""
    for dtype, similarity in itertools.product(dtypes, ("dot", "masked_cosine")):
        for kernel, objective in itertools.product(("statistics", "gradient"), OBJECTIVES):
            yield Variant(kernel, similarity, objective, dtype)
            for known in ("ignore", "ceiling") if OBJECTIVES[objective].both_sides else ("ignore",):
                yield Variant(kernel, similarity, objective, dtype, ((known, known),))
        if dtype == torch.float32:
            for kernel in ("statistics", "gradient"):
                yield Variant(kernel, similarity, "softmax", dtype, (("PRECISION", "tf32"),))
        for what in ("sim", "keys", "positive", "ahead"):
            if what != "sim" or similarity == "masked_cosine":
                yield Variant("scores", similarity, "softmax", dtype, (("WHAT", what),))
    for dtype in dtypes:
        yield Variant("derivative", "masked_cosine", "softmax", dtype)
    for objective in OBJECTIVES:
        yield Variant("gather", objective=objective)
        yield Variant("anchors", objective=objective)
    yield Variant("unit_of")


def compile_variant(variant: Variant, architecture: str, sizes: config.Config | None = None) -> Usage:
    """One kernel for one architecture, at the table's sizes or at those given."""
    capability = CAPABILITIES[architecture]
    if variant.kernel in SIZES_OF and sizes is None:
        sizes = config.config(architecture, variant.similarity, variant.dtype, SIZES_OF[variant.kernel])
    kernel = KERNELS[variant.kernel]
    types = _types(variant)
    constants = _constants(variant, sizes)
    signature: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for at, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = types[name]
        if isinstance(types[name], tuple):
            attributes |= {(at, k): [["tt.divisibility", 16]] for k in range(len(types[name]))}
        elif types[name].startswith("*") or name in ("d", "row_stride", "column_stride", "out_stride"):
            attributes[(at,)] = [["tt.divisibility", 16]]
    constants = {name: value for name, value in constants.items() if name in signature}
    options = {"num_warps": 4} if sizes is None else {"num_warps": sizes.warps, "num_stages": sizes.stages}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spilled = _resources(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    matrix = next((name for name in ("tcgen05.mma", "wgmma.mma", "mma.sync") if name in ptx), "fma")
    atomics = re.search(r"\b(atom|red)\.(global|shared)", ptx) is not None
    shared = compiled.metadata.shared
    return Usage(variant, architecture, sizes, registers, spilled, shared, matrix.partition(".")[0], atomics)


def _types(variant: Variant) -> dict[str, Any]:
    """Of every parameter that any kernel has: parameters of one name are of one type."""
    x = "*" + NAMES[variant.dtype]
    masked, split = variant.similarity != "dot", variant.similarity != "dot" and variant.half
    rows = (x,) * (3 if split else 2 if masked else 1)
    columns = (x, x, x, x, "*i32") if split else (x,) * (2 if masked else 1)
    integers = "row_stride column_stride out_stride n m d row_start column_start row_size column_size"
    numbers = "row_factor column_factor scale bias row_partials column_partials partials into losses statistics"
    more = "weight unit tau row_anchor column_anchor column_scores grad_sim x y"
    types: dict[str, Any] = dict.fromkeys(f"{integers} blocks count start size first".split(), "i32")
    types |= dict.fromkeys(f"{numbers} {more} row_ceiling column_ceiling".split(), "*fp32")
    types |= dict.fromkeys(["row_id", "column_id", "row_ignore", "column_ignore"], "*i32")
    types |= dict.fromkeys(("size", "first", "out_stride_n", "out_stride_m", "x_size", "y_size"), "i32")
    outs = {"sim": "*fp32", "ahead": "*i32"}
    extra = dict(variant.extra)
    types |= {"rows": rows, "columns": columns, "out_a": x, "out_b": x, "smoothing": "fp32", "room": "fp32"}
    out = "*fp32" if variant.kernel == "anchors" else outs.get(extra.get("WHAT", ""), "*i64")
    return types | {"parameters": "*fp64", "out": out, "best": "*i64"}


def _constants(variant: Variant, sizes: config.Config | None) -> dict[str, Any]:
    traits, extra = OBJECTIVES[variant.objective], dict(variant.extra)
    absent = [name for name in ("ignore", "ceiling") if extra.pop(name, None) is None]
    constants: dict[str, Any] = {
        "SIMILARITY": variant.similarity,
        "OBJECTIVE": variant.objective,
        "PLANES": traits.statistics if variant.kernel != "anchors" or traits.needs_statistics else 0,
        "ANCHOR": traits.anchor,
        "PARTIAL_PLANES": 0 if traits.needs_statistics else traits.statistics,
        "BOTH_SIDES": traits.both_sides,
        "SMOOTHING": False,
        "SPLIT": variant.half and variant.similarity != "dot",
        "EVEN": True,
        "WIDEN": False,
        "PRECISION": "ieee",
        "PER_TEXT": True,
        "BLOCKS": PARTIALS,
        "BLOCK": 4096 if variant.kernel == "unit_of" else ANCHORS,
        **(sizes.constants() if sizes else {}),
        **extra,
    }
    constants |= dict.fromkeys(f"{side}_{name}" for side in ("row", "column") for name in absent)
    if variant.similarity == "dot":
        constants |= {"row_factor": None, "column_factor": None, "column_scores": None}
    if not variant.half:
        constants["unit"] = None
    return constants


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory of a thread: what the compiler spilled, as no kernel here has an array."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    text = done.stdout + done.stderr
    registers, stack, local = (re.search(rf"{name}:(\d+)", text) for name in ("REG", "STACK", "LOCAL"))
    if not (registers and stack and local):
        raise RuntimeError(f"cuobjdump: no resource usage in {text!r}")
    return int(registers[1]), int(stack[1]) + int(local[1])


def table(usages: list[Usage]) -> str:
    """Markdown."""
    heads = ("kernel", "architecture", "blocks n·m·d / parts, warps, stages", "registers", "spilled", "shared KiB")
    lines = ["| " + " | ".join((*heads, "products by")) + " |", "|---|---|---|---:|---:|---:|---|"]
    for usage in usages:
        s = usage.sizes
        sizes = "" if s is None else f"{s.block_n}·{s.block_m}·{s.block_d} / {s.parts}, {s.warps}, {s.stages}"
        matrix = usage.matrix if usage.variant.kernel in SIZES_OF else ""
        lines.append(
            f"| {usage.variant} | {usage.architecture} | {sizes} | {usage.registers} | {usage.spilled} | "
            f"{usage.shared / 1024:.0f} | {matrix} |"
        )
    return "\n".join(lines) + "\n"


def report(dtypes: tuple[torch.dtype, ...], architectures: tuple[str, ...]) -> list[Usage]:
    """Every kernel of every architecture."""
    return [compile_variant(v, a) for a in architectures for v in variants(dtypes)]


def main(path: Path | None, quick: bool) -> int:
    """Compiles, writes the table to `path` or the terminal, and returns 1 where a kernel spills or does not fit."""
    if quick:
        usages = [compile_variant(v, "sm_90") for v in variants((torch.bfloat16,)) if not v.extra]
    else:
        usages = report(tuple(NAMES), tuple(CAPABILITIES))
    about = f"Triton {triton.__version__}; registers and spilled bytes are a thread's, shared memory a block's.\n\n"
    text = about + table(usages)
    if path is None:
        print(text)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    bad = [usage for usage in usages if usage.spilled or not usage.fits or usage.atomics]
    for usage in bad:
        print(f"{usage.variant}, {usage.architecture}: {usage.spilled} bytes spilled, {usage.shared} bytes shared")
    return 1 if bad else 0
