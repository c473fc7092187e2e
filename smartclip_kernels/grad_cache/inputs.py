"""Encoders and their inputs: nested tensors, chunks of them, what an encoder holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


def name_of(model: Callable[..., Any]) -> str:
    return getattr(model, "__qualname__", type(model).__name__)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for x in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(x)


def rows_of(value: Any, start: int, size: int) -> Any:
    """The same structure with rows [start, start + size) of its tensors. Mappings become dicts."""
    if isinstance(value, Tensor):
        return value[start : start + size] if value.dim() else value
    if isinstance(value, Mapping):
        return {key: rows_of(x, start, size) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        items = [rows_of(x, start, size) for x in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def is_args_and_kwargs(model_input: Any) -> bool:
    """A tuple of a list and a mapping."""
    return (
        type(model_input) is tuple
        and len(model_input) == 2
        and isinstance(model_input[0], list)
        and isinstance(model_input[1], Mapping)
    )


def module_of(model: Callable[..., Any]) -> nn.Module | None:
    """The module behind an encoder: itself, or the one whose bound method it is (``clip.encode_image``)."""
    owner = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def state_of(model: Callable[..., Any]) -> Iterator[Tensor]:
    module = module_of(model)
    return iter(()) if module is None else chain(module.parameters(), module.buffers())


def devices_of(model: Callable[..., Any], chunks: Sequence[Any]) -> list[torch.device]:
    """Where the encoder's inputs, parameters and buffers live, the CPU left out."""
    devices = {x.device for x in chain(tensors_in(list(chunks)), state_of(model))}
    return sorted((d for d in devices if d.type not in ("cpu", "meta")), key=str)


def may_need_gradient(model: Callable[..., Any], chunks: Sequence[Any]) -> bool:
    """Whether its outputs can need gradients. Of a function we cannot know: its first chunk will tell."""
    inside = chain(tensors_in(list(chunks)), state_of(model))
    return module_of(model) is None or any(x.requires_grad for x in inside)
