"""The schemas, and how implementations are registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from smartclip_kernels.problem import Correction

library = torch.library.Library("smartclip", "DEF")
_ops = torch.ops.smartclip

_LOSS = (
    "Tensor image, Tensor text, Tensor? mask, Tensor scale, Tensor? bias, Tensor? image_ids, Tensor? text_ids, "
    "Tensor? image_ignore, Tensor? text_ignore, str objective, float label_smoothing, str backend, int workspace"
)
_REDUCTION = "str reduction, float[] shares=[0.5, 0.5]"
_TAIL = ", ".join((*(f"Tensor? {name}=None" for name in Correction._fields), "int[] dims=[]"))
_RETRIEVAL = "Tensor image, Tensor text, Tensor? mask, Tensor? image_ids, Tensor? text_ids, str per, str backend"
_GRADS = "Tensor grad_image, Tensor grad_text, Tensor grad_mask, Tensor grad_scale, Tensor grad_bias"

_SCHEMAS = {
    "loss": f"({_LOSS}, {_TAIL}) -> (Tensor rows, Tensor columns, Tensor row_statistics, "
    "Tensor column_statistics, Tensor kept)",
    "loss_backward": f"(Tensor grad_rows, Tensor grad_columns, Tensor row_statistics, Tensor column_statistics, "
    f"Tensor kept, {_LOSS}, bool[] needs, bool unrounded=False, {_TAIL}) -> ({_GRADS})",
    "reduced_loss": f"({_LOSS}, {_REDUCTION}, {_TAIL}) -> Tensor",
    "loss_forward": f"({_LOSS}, {_REDUCTION}, {_TAIL}) -> (Tensor loss, Tensor weights, Tensor row_statistics, "
    "Tensor column_statistics)",
    "loss_and_gradients": f"({_LOSS}, bool[] needs, {_REDUCTION}, {_TAIL}) -> (Tensor loss, {_GRADS})",
    "masked_similarity": "(Tensor image, Tensor text, Tensor mask, str backend) -> Tensor",
    "masked_similarity_backward": "(Tensor grad_sim, Tensor image, Tensor text, Tensor mask, str backend, "
    "bool[] needs) -> (Tensor grad_image, Tensor grad_text, Tensor grad_mask)",
    "masked_topk": "(Tensor image, Tensor text, Tensor mask, int k, str per, str backend) "
    "-> (Tensor values, Tensor indices)",
    "best_positive": f"({_RETRIEVAL}) -> Tensor",
    "retrieval_ranks": f"({_RETRIEVAL}) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    library.define(_name + _schema)
_DEFAULTS = {name: tuple(x.default_value for x in getattr(_ops, name).default._schema.arguments) for name in _SCHEMAS}


def complete(name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """All arguments of an op: torch leaves out what is a default."""
    return *arguments, *_DEFAULTS[name][len(arguments) :]


def _completed(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: kernel(*complete(name, arguments))


def implement(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        completed = _completed(name, kernel)
        library.impl(name, completed, "CompositeExplicitAutograd")
        return completed

    return register


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.register_fake(f"smartclip::{name}", _completed(name, kernel), lib=library)
        return kernel

    return register
