"""Autocast: image, text and a floating mask go to the autocast dtype, as `mm` would send them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smartclip_kernels.ops.library import library

_ops = torch.ops.smartclip


def autocast(*features: Any) -> tuple[Any, ...]:
    """As autocast, where it is on, would have them."""

    def cast(x: Any) -> Any:
        eligible = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        if not eligible or not torch.is_autocast_enabled(x.device.type):
            return x
        return x.to(torch.get_autocast_dtype(x.device.type))

    return tuple(map(cast, features))


def _with_autocast(name: str, key: str) -> None:
    op = getattr(_ops, name)

    def kernel(*arguments: Any) -> Any:
        features = autocast(*arguments[:3])
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
            return op(*features, *arguments[3:])

    library.impl(name, kernel, key)


_LOSSES = ("loss", "reduced_loss", "loss_and_gradients")
for _op in (*_LOSSES, "masked_similarity", "masked_topk", "best_positive", "retrieval_ranks"):
    _with_autocast(_op, "AutocastCPU")
    _with_autocast(_op, "AutocastCUDA")
