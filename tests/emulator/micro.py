"""Calls the kernels of micro.cu and micro_hopper.cu; what devices gave, kept in golden/ for machines that have none."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.emulator import build

GOLDEN = build.EMULATOR / "golden"


class Micro:
    """Calls the kernels of a library by name, with tensors of any device."""

    def __init__(self, path: Path, device: str = "cpu") -> None:
        self.device = device
        self._call = ctypes.CDLL(str(path)).micro
        self._call.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p,
                               ctypes.c_int]  # fmt: skip

    def __call__(
        self, name: str, inputs: Sequence[Tensor], out: Tensor, numbers: Sequence[int] = (), blocks: int = 1
    ) -> Tensor:
        """`out` comes back on the CPU; what the kernel leaves of it is NaN, or all ones in an integer."""
        here = [x.to(self.device).contiguous() for x in inputs]
        result = torch.empty(out.shape, dtype=out.dtype, device=self.device)
        result.view(torch.uint8).fill_(0xFF)
        addresses = [x.data_ptr() for x in here] + [0] * (3 - len(here)) + [result.data_ptr()]
        error = ctypes.create_string_buffer(8192)
        failed = self._call(
            name.encode(),
            (ctypes.c_void_p * 4)(*addresses),
            (ctypes.c_int64 * 4)(*numbers, *[0] * (4 - len(numbers))),
            blocks,
            error,
            len(error),
        )
        if failed:
            raise RuntimeError(error.value.decode())
        return result.cpu()


def for_device(source: Path, folder: Path, *target: str) -> Micro:
    """`source` compiled by nvcc for the GPU that is here, or for `target`."""
    library = folder / f"{source.stem}.so"
    options = ["-std=c++17", *(target or ("-arch=native",)), "-shared", "-Xcompiler", "-fPIC"]
    includes = [f"-I{build.CSRC / 'cuda'}", f"-I{build.CSRC}"]
    subprocess.run(["nvcc", *options, *includes, str(source), "-o", str(library)], check=True)
    return Micro(library, "cuda")


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor], functions: Mapping[str, float]) -> None:
    """Bits, but where the machine is free: sums of products to 2⁻¹⁶ of the largest, functions to twice their bound."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name in functions:
            torch.testing.assert_close(found[name], value, rtol=2 * functions[name], atol=0, equal_nan=True)
        elif name.startswith(("multiply_add", "product")) and not name.endswith("exact"):
            assert (found[name] - value).abs().max() <= 2.0**-16 * value.abs().max(), name
        else:
            assert torch.equal(bits(found[name]), bits(value)), name


def keep(path: Path, outputs: dict[str, Tensor]) -> None:
    arrays: dict[str, Any] = {name: bits(value).numpy() for name, value in outputs.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)


def keep_if_asked(folder: Path, outputs: dict[str, Tensor]) -> None:
    """Of the GPU that is here, where SMARTCLIP_WRITE_GOLDEN=1."""
    if os.environ.get("SMARTCLIP_WRITE_GOLDEN") == "1":
        name = re.sub(r"\W+", "-", torch.cuda.get_device_name().lower())
        keep(folder / f"{name}.npz", outputs)


def kept(path: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    with np.load(path) as file:
        return {name: torch.from_numpy(file[name]).view(like[name].dtype).reshape(like[name].shape) for name in file}


# Numbers of a case: four for the kernel, then those that its second input begins with. Memory is 0 otherwise.
SANITIZED = """
import ctypes, sys
micro = ctypes.CDLL(sys.argv[1]).micro
memory = ctypes.create_string_buffer(5 << 20)
start = (ctypes.addressof(memory) + (1 << 20) - 1 >> 20) << 20
for case in sys.argv[2:]:
    print(f"case {case}", file=sys.stderr, flush=True)
    name, blocks, *numbers = case.split(",")
    error = ctypes.create_string_buffer(1000)
    pointers = (ctypes.c_void_p * 4)(*(start + (k << 20) for k in range(4)))
    second = (ctypes.c_int * 32)(*map(int, numbers[4:]))
    ctypes.memmove(start + (1 << 20), second, ctypes.sizeof(second))
    numbers = (ctypes.c_int64 * 4)(*map(int, numbers[:4]))
    if micro(name.encode(), pointers, numbers, ctypes.c_int64(int(blocks)), error, 1000):
        print(error.value.decode(), file=sys.stderr, flush=True)
"""


def sanitized(source: Path, cases: list[str]) -> tuple[int, dict[str, str]]:
    """The exit code, and what ThreadSanitizer reports of each case: "kernel,blocks,number,…"."""
    library = build.build([source], source.stem, variant="tsan")
    done = build.sanitized(["-c", SANITIZED, str(library), *cases])
    parts = re.split("^case (.*)\n", done.stderr, flags=re.MULTILINE)
    assert parts[1::2] == cases, done.stderr[-3000:]
    return done.returncode, dict(zip(parts[1::2], parts[2::2], strict=True))
