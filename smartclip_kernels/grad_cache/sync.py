"""Gradient reduction between processes: `DistributedDataParallel` and FSDP2 (`fully_shard`), told when not to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn

from smartclip_kernels.grad_cache.inputs import module_of


def decides_in_forward(model: Callable[..., Any]) -> bool:
    """Whether a backward pass reduces is settled by the latest forward pass (DDP), not when it runs (FSDP2)."""
    return hasattr(model, "no_sync")


def _modules(model: Callable[..., Any]) -> Iterator[Any]:
    module = module_of(model)
    return iter(()) if module is None else module.modules()


def _sharded(model: Callable[..., Any]) -> list[Any]:
    return [module for module in _modules(model) if hasattr(module, "set_requires_gradient_sync")]


def can_skip_reduction(model: Callable[..., Any]) -> bool:
    return decides_in_forward(model) or bool(_sharded(model))


def communicates_in_forward(model: Callable[..., Any]) -> bool:
    """Its forward pass waits for other processes: sharded parameters (FSDP2, and FSDP1), SyncBatchNorm."""
    sharding = ("set_requires_gradient_sync", "summon_full_params")
    return any(isinstance(x, nn.SyncBatchNorm) or any(hasattr(x, s) for s in sharding) for x in _modules(model))


def forward_without_reduction(model: Callable[..., Any]) -> AbstractContextManager[Any]:
    """For a forward pass whose backward pass comes later, after others."""
    return model.no_sync() if decides_in_forward(model) else nullcontext()  # type: ignore[attr-defined]


@contextmanager
def without_reduction(model: Callable[..., Any]) -> Iterator[None]:
    """Gradients stay in this process and add up."""
    with forward_without_reduction(model):
        sharded = [] if decides_in_forward(model) else _sharded(model)
        for module in sharded:
            module.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for module in sharded:
                module.set_requires_gradient_sync(True, recurse=False)
