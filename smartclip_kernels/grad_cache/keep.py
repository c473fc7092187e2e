"""The memory budget: whose graphs are kept from the first pass for the backward pass, and where they wait."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

AUTO_SHARE = 0.75
"""Of the free memory; the rest is for the loss, for one chunk's gradients, and for what an allocator cannot use."""

UNITS = {"B": 1} | {
    f"{prefix}{ending}": base**power
    for power, prefix in enumerate("KMGT", 1)
    for ending, base in (("iB", 1024), ("B", 1000))
}


@dataclass(frozen=True)
class Limit:
    """At most so many chunks, so many bytes; None: any number."""

    chunks: int | None = None
    bytes: int | None = None

    @property
    def is_auto(self) -> bool:
        return self.chunks is None and self.bytes is None


def parse_keep_graph(keep_graph: int | str) -> Limit:
    """
    Raises:
        TypeError, ValueError: it is neither a number of chunks, nor "auto", nor a size with its unit.
    """
    needs = "needs a number of chunks, 'auto' or a size with its unit, '512MiB' for one"
    if isinstance(keep_graph, bool) or not isinstance(keep_graph, (int, str)):
        raise TypeError(f"keep_graph: got {type(keep_graph).__name__}, {needs}")
    if isinstance(keep_graph, int):
        if keep_graph < 0:
            raise ValueError(f"keep_graph: got {keep_graph}, {needs}")
        return Limit(chunks=keep_graph)
    if keep_graph == "auto":
        return Limit()
    size = re.fullmatch(rf"([0-9]+(?:\.[0-9]+)?) ?({'|'.join(UNITS)})", keep_graph)
    if size is None:
        raise ValueError(f"keep_graph: got {keep_graph!r}, {needs}")
    return Limit(bytes=int(float(size[1]) * UNITS[size[2]]))


class Saved:
    """A tensor that a graph needs, here or on the host. Autograd's own check of versions ends where hooks begin."""

    __slots__ = ("device", "tensor", "version")

    def __init__(self, tensor: Tensor, device: torch.device) -> None:
        self.tensor: Tensor | None = tensor
        self.device, self.version = device, tensor._version


class Graphs:
    """The graphs that one step keeps.

    Bytes are those of what the graphs save for their backward passes: storages, each once, without parameters and
    without `outside`. They are counted while a chunk is encoded; the chunk with which they would exceed the budget
    lets go at once of all that it had saved, and no later one is kept.
    """

    def __init__(self, limit: Limit, *, offload: bool = False, outside: Iterable[Tensor] = ()) -> None:
        self.limit, self.offload = limit, offload
        self.chunks, self.bytes, self.full = 0, 0, False
        self._hooked = limit.bytes is not None or offload
        # Address -> bytes. An address may be reused by something larger: the most is counted, so never too few.
        self._counted = dict(chain.from_iterable(map(_storages, outside))) if self._hooked else {}
        self._of_this_chunk: list[Saved] = []

    @property
    def open(self) -> bool:
        """Whether the next chunk may be kept."""
        return not self.full and (self.limit.chunks is None or self.chunks < self.limit.chunks)

    @contextmanager
    def record(self, keep: bool) -> Iterator[None]:
        """For encoding a chunk with its graph: to keep it, or only to see which outputs need gradients."""
        with self._hooks(keep):
            yield
        self._of_this_chunk.clear()

    def _hooks(self, keep: bool) -> AbstractContextManager[Any]:
        if not self._hooked:
            return nullcontext()
        return saved_tensors_hooks(self._pack if keep else lambda x: None, _unpack)

    def _pack(self, x: Tensor) -> Saved | None:
        if self.full:
            return None
        saved = x.detach()  # an operation's output would hold the operation, which holds it: nobody would free either
        new = 0
        if not isinstance(x if x._base is None else x._base, nn.Parameter):
            sizes = {address: size for address, size in _storages(x) if size > self._counted.get(address, 0)}
            if self.offload and sizes and not _is_on_host(x):
                saved, new = _copy_to_host(saved), x.nbytes
            else:
                new = sum(size - self._counted.get(address, 0) for address, size in sizes.items())
                self._counted |= sizes
        if self.limit.bytes is not None and self.bytes + new > self.limit.bytes:
            self.full = True
            for one in self._of_this_chunk:
                one.tensor = None
            return None
        self.bytes += new
        self._of_this_chunk.append(Saved(saved, x.device))
        return self._of_this_chunk[-1]


def _unpack(saved: Saved) -> Tensor:
    assert saved.tensor is not None
    if saved.tensor._version != saved.version:
        raise RuntimeError(
            f"keep_graph: a tensor of shape {tuple(saved.tensor.shape)} that a kept graph needs was changed in place "
            "before its backward pass; an encoder that does so can only be encoded again (keep_graph=0)"
        )
    return saved.tensor.to(saved.device, non_blocking=True)


def _storages(x: Any) -> Iterator[tuple[int, int]]:
    """Addresses and bytes of what keeping a tensor keeps alive; a sparse one is taken for dense."""
    if is_traceable_wrapper_subclass(x):  # such as DTensor
        for inner in (getattr(x, name) for name in x.__tensor_flatten__()[0]):
            yield from _storages(inner) if isinstance(inner, Tensor) else ()
    elif x.layout is torch.strided:
        yield x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()
    else:
        yield id(x), x.numel() * x.element_size()


def _is_on_host(x: Tensor) -> bool:
    return x.device.type == "cpu" or is_traceable_wrapper_subclass(x)  # the latter stays where it is


def _copy_to_host(x: Tensor) -> Tensor:
    """Pinned, so that neither way waits: both copies are in the order of the device's stream."""
    host = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda)
    return host.copy_(x, non_blocking=True)


def auto_budget(devices: Sequence[torch.device], parameters: Iterable[Tensor], *, offload: bool) -> int:
    """Bytes for "auto": a share of what is free now where graphs wait, less the gradients that are not there yet.

    Raises:
        RuntimeError: nothing here tells how much memory is free.
    """
    to_come = sum(p.nbytes for p in parameters if p.requires_grad and p.grad is None)
    if offload or not devices:
        return max(0, int(AUTO_SHARE * (free_on_host() - (0 if devices else to_come))))
    return max(0, int(AUTO_SHARE * (min(free_on(device) for device in devices) - to_come)))


def free_on(device: torch.device) -> int:
    """Bytes that the device has free, and those that torch's allocator holds unused."""
    module = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        raise RuntimeError(f"keep_graph: 'auto' cannot tell the free memory of {device}, needs a size such as '2GiB'")
    free, _ = module.mem_get_info(device)
    return int(free + module.memory_reserved(device) - module.memory_allocated(device))


def free_on_host(root: Path = Path("/")) -> int:
    """Bytes that Linux has available, or that this process's control groups leave."""
    meminfo = root / "proc/meminfo"
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE) if meminfo.exists() else None
    if found is None:
        raise RuntimeError("keep_graph: 'auto' finds no /proc/meminfo here, needs a size such as '2GiB'")
    return min([int(found[1]) * 1024, *_left_by_groups(root)])


def _left_by_groups(root: Path) -> Iterator[int]:
    """Limit less usage of every memory control group, from this process's own up to the outermost (versions 1, 2)."""
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, usage, cache = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, usage = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        own = root / top / path.lstrip("/")
        for group in (own, *own.parents):
            if (group / limit).exists() and (most := (group / limit).read_text().strip()) != "max":
                found = re.search(rf"^{cache} (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
                # The page cache is counted as usage, and is given up before anything else.
                yield int(most) - int((group / usage).read_text()) + (int(found[1]) if found else 0)
            if group == root / top:
                break
