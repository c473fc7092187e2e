"""Where losses run: how long a call takes there, and what memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from time import perf_counter
from typing import Any, Protocol

import torch

from bench import memory
from bench.verify import Outcome

COLD_BYTES = 64 * 2**20
"""What is written between calls is at least this much, and twice the cache."""


class Device(Protocol):
    """Between `settle` and the last `mark` of a call nothing but the call happens."""

    type: str

    def settle(self) -> None:
        """Nothing of what was before is in flight, or in the cache."""

    def mark(self) -> Any:
        """A moment."""

    def seconds(self, start: Any, end: Any) -> float:
        """Between two moments; waits for the second."""

    def extra_bytes(self, step: Callable[[], Outcome]) -> int | None:
        """Peak of a call that has been made before, beyond inputs, loss and gradients; None: cannot be told in here."""

    def allocations(self) -> int:
        """How often the driver was asked for memory so far."""

    def free_bytes(self) -> int: ...

    def release(self) -> None:
        """What nobody holds any more is free again."""

    def check(self) -> None:
        """Raises:
        RuntimeError: the device is of no more use to this process.
        """


class Host:
    """Time as the caller sees it: for tensors of a GPU, that of launching alone."""

    type = "cpu"

    def settle(self) -> None:
        pass

    def mark(self) -> float:
        return perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def extra_bytes(self, step: Callable[[], Outcome]) -> int | None:
        return None  # `memory.measure` takes a process of its own

    def allocations(self) -> int:
        return 0

    def free_bytes(self) -> int:
        return memory.available_bytes()

    def release(self) -> None:
        gc.collect()

    def check(self) -> None:
        pass


class Cuda:
    """Time of the device, from an idle one on: launches that it has to wait for are in it. Caches are cold."""

    type = "cuda"

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._cold = torch.empty(max(COLD_BYTES, 2 * cache), dtype=torch.uint8, device=self.type)

    def settle(self) -> None:
        self._cold.fill_(1)
        torch.cuda.synchronize()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def extra_bytes(self, step: Callable[[], Outcome]) -> int | None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        value, gradients = step()
        torch.cuda.synchronize()
        own = value.nbytes + sum(gradient.nbytes for gradient in gradients if gradient is not None)
        return torch.cuda.max_memory_allocated() - before - own

    def allocations(self) -> int:
        return int(torch.cuda.memory_stats().get("num_device_alloc", 0))

    def free_bytes(self) -> int:
        """Of the card, and of what torch holds without using it."""
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def check(self) -> None:
        # An error of a kernel shows at the next call that waits; after some, every call fails.
        torch.cuda.synchronize()


def device(name: str) -> Device:
    return Cuda() if name == "cuda" else Host()
