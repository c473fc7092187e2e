"""Gradient reduction between processes: `DistributedDataParallel` and FSDP2 (`fully_shard`), told when not to.

Whether a backward pass reduces, DDP settles in the latest forward pass before it, FSDP2 when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import distributed, nn

from smartclip_kernels.grad_cache.inputs import module_of

DDP, FSDP2, FSDP1 = "no_sync", "set_requires_gradient_sync", "summon_full_params"
"""Methods that tell them: the classes themselves are imported only by those who use them."""


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    if hasattr(module, DDP) or hasattr(module, FSDP2):
        yield module
    else:
        for child in module.children():
            yield from _outermost(child)


def reducers_of(model: Callable[..., Any]) -> list[nn.Module]:
    """The wrapped modules in an encoder: itself, or such of its children."""
    module = module_of(model)
    return [] if module is None else list({id(x): x for x in _outermost(module)}.values())


def settles_in_forward(reducer: nn.Module) -> bool:
    return hasattr(reducer, DDP)


@contextmanager
def without_reduction(reducers: Sequence[Any]) -> Iterator[None]:
    """Gradients stay in this process and add up."""
    with ExitStack() as stack:
        for reducer in reducers:
            if settles_in_forward(reducer):
                stack.enter_context(reducer.no_sync())
            else:
                reducer.set_requires_gradient_sync(False)
                stack.callback(reducer.set_requires_gradient_sync, True)
        yield


def communicates_in_forward(model: Callable[..., Any]) -> bool:
    """Its forward pass waits for other processes: it gathers parameters or statistics."""
    module = module_of(model)
    return module is not None and any(
        isinstance(x, nn.SyncBatchNorm) or hasattr(x, FSDP2) or hasattr(x, FSDP1) for x in module.modules()
    )


def several_processes() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
