"""What one pass over a chunk has to do as another did: its random numbers, its precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor


class RandomState:
    """torch's generators, of the CPU and of some devices, as they are now."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.cpu = torch.get_rng_state()
        self.devices = {d: torch.get_device_module(d).get_rng_state(*_index(d)) for d in devices}

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            torch.get_device_module(device).set_rng_state(state, *_index(device))

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Random numbers as they were then; afterwards the generators go on from where they are now."""
        now = RandomState(list(self.devices))
        self.restore()
        try:
            yield
        finally:
            now.restore()


def _index(device: torch.device) -> tuple[torch.device, ...]:
    """What the random state functions of a device's module take to find it: there is one MPS, and they take nothing."""
    return () if device.type == "mps" else (device,)


@contextmanager
def autocast_off(*tensors: Tensor) -> Iterator[None]:
    """A backward pass runs in the precision of its forward; autocast would lower what was kept in float32 there."""
    with ExitStack() as stack:
        for device_type in {"cpu", *(x.device.type for x in tensors)}:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield
