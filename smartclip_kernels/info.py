"""What is installed and what would run: `python -m smartclip_kernels.info [--sizes N M D] [--dtype bfloat16]`."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch

from smartclip_kernels import backends
from smartclip_kernels.backends import cuda

Lines = list[tuple[str, str]]

DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
}
STATISTICS_BYTES = 64  # per row and per column, an upper bound
PACKAGE = Path(__file__).parent
INSTALL = "pip install --force-reinstall --no-deps smartclip-kernels (in a checkout: pip install -e .)"


def compiled_module() -> tuple[ModuleType | None, str]:
    """`smartclip_kernels._C`, or None with the reason why it cannot be loaded and what would help."""
    try:
        return importlib.import_module("smartclip_kernels._C"), ""
    except ModuleNotFoundError as error:
        if error.name != "smartclip_kernels._C":
            raise
    except ImportError as error:
        return None, f"it does not load ({error}); build it again for this Python and machine: {INSTALL}"
    if others := sorted(path.name for path in PACKAGE.glob("_C*.so")):
        return None, f"it was built for another Python ({', '.join(others)}); build it for this one: {INSTALL}"
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if compiler:
        return (
            None,
            f"it was left out of this installation; {compiler} could compile it: unset SMARTCLIP_BUILD, then {INSTALL}",
        )
    return None, f"it was left out of this installation; install a C++ compiler (g++ or clang++), then {INSTALL}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def versions() -> Lines:
    """Of ourselves and of what we stand on."""
    return [
        ("smartclip_kernels", f"{_version('smartclip_kernels')}, {PACKAGE}"),
        ("python", f"{platform.python_version()}, {sys.executable}"),
        ("torch", torch.__version__),
        ("triton", _version("triton")),
    ]


def devices() -> Lines:
    """The processor and the accelerators that torch sees."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines = [("cpu", f"{_processor()}, {cores} cores for this process")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        lines.append((f"cuda:{index}", f"{properties.name}, {capability}, {properties.total_memory / 2**30:.1f} GiB"))
    if len(lines) == 1:
        lines.append(("cuda", "no device that torch can use"))
    return lines


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in _read(cpuinfo) if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _read(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def module() -> Lines:
    """How `_C` was built, what it chose on this machine and on whose threads it runs."""
    compiled, missing = compiled_module()
    if compiled is None:
        return [("_C", f"missing: {missing}")]
    build = compiled.build
    runtime = compiled.parallel_runtime()
    forced = os.environ.get("SMARTCLIP_CPU_ISA")
    why = f"SMARTCLIP_CPU_ISA={forced}" if forced else "the widest that this processor runs"
    threads = torch.get_num_threads()
    kernels = "left out, as no nvcc was found; " + cuda.REBUILD
    if device := getattr(compiled, "cuda", None):
        kernels = f"for {device.architectures} (as CMake names them), nvcc {device.nvcc}"
    return [
        ("_C", f"{build['version']}, {compiled.__file__}"),
        ("compiler", build["compiler"]),
        ("built for", ", ".join(build["isas"])),
        ("chosen", f"{compiled.isa()} ({why})"),
        ("CUDA kernels", kernels),
        ("OpenMP", f"{runtime}, {threads} threads" if runtime else "torch has mapped no runtime: one thread"),
    ]


def choice() -> Lines:
    """Which backend runs for the tensors of each device and why, and why the others do not."""
    status = backends.status()
    available = ", ".join(name for name, reason in status.items() if not reason)
    forced = os.environ.get("SMARTCLIP_BACKEND")
    lines: Lines = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        name, why = (
            (forced, "SMARTCLIP_BACKEND") if forced else (backends.default(device), f"first choice of {available}")
        )
        lines.append((f"{device} tensors", f"{name} ({why})"))
    return lines + [(name, f"not available: {reason}") for name, reason in status.items() if reason]


def memory(images: int, texts: int, width: int, dtype: torch.dtype, device: torch.device) -> Lines:
    """What forward and backward of one loss take beyond its inputs and their gradients, at most, in bytes.

    Statistics of 64 bytes for every row and column; the workspace; for half inputs a float32 accumulator (M, D) for
    each gradient of the column side: one for the plain losses, two (text and mask) for the masked ones. (A locked text
    under a learned mask takes one for other inputs too.)
    """
    statistics = STATISTICS_BYTES * (images + texts)
    workspace = backends.workspace_bytes(device)
    accumulator = 4 * texts * width if dtype.itemsize == 2 else 0
    lines = [("statistics", _size(statistics)), ("workspace", _size(workspace))]
    for name, count in (("clip_loss, siglip_loss", 1), ("smartclip_loss", 2)):
        total = statistics + workspace + count * accumulator
        lines.append((name, f"{_size(total)} in all, of which accumulators {_size(count * accumulator)}"))
    scores = max(4, dtype.itemsize) * images * texts
    return [*lines, ("for comparison", f"one N x M matrix of scores {_size(scores)}")]


def _size(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def report(sizes: Sequence[int] | None = None, dtype: torch.dtype = torch.float32) -> str:
    """All of it as text; with `sizes` (N, M, D) also the memory that a loss of these sizes takes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workspace = [(name, _size(backends.workspace_bytes(torch.device(name)))) for name in ("cpu", "cuda")]
    sections = {
        "versions": versions(),
        "devices": devices(),
        "compiled module": module(),
        "backends": choice(),
        "workspace": workspace,
    }
    if sizes is not None:
        images, texts, width = sizes
        title = f"memory on {device.type}, N = {images:,}, M = {texts:,}, D = {width:,}, {dtype}"
        sections[title] = memory(images, texts, width, dtype, device)
    column = max(len(name) for lines in sections.values() for name, _ in lines)
    blocks = [
        "\n".join([title, *(f"  {name:<{column}}  {text}" for name, text in lines)])
        for title, lines in sections.items()
    ]
    return "\n\n".join(blocks)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {number}, needs a positive number")
    return number


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m smartclip_kernels.info", description="What is installed and what would run."
    )
    parser.add_argument(
        "--sizes",
        nargs=3,
        type=_positive,
        metavar=("N", "M", "D"),
        help="images, texts, width: print the memory a loss takes",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of image and text")
    options = parser.parse_args(arguments)
    print(report(options.sizes, DTYPES[options.dtype]))


if __name__ == "__main__":
    main()
