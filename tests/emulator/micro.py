"""Calls the kernels of micro.cu and micro_hopper.cu."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


class Micro:
    """Calls the kernels of micro.cu by name, with tensors of any device."""

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
