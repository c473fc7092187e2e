"""The gradients that autograd sees, of first order alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from smartclip_kernels import backends
from smartclip_kernels.ops.arguments import reduced_problem
from smartclip_kernels.ops.library import complete, library
from smartclip_kernels.problem import Correction, of_anchors

_ops = torch.ops.smartclip


def needed_gradients(*inputs: Tensor | None) -> list[bool]:
    """Which inputs want a gradient; all False where gradients are off."""
    enabled = torch.is_grad_enabled()
    return [enabled and x is not None and x.requires_grad for x in inputs]


def below_autograd(op: Any, keyset: Any, *arguments: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op.default.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)


def _or_none(grads: tuple[Tensor, ...], needs: list[bool]) -> tuple[Tensor | None, ...]:
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


class _FirstOrder(torch.autograd.Function):
    """Gradients that depend on `inputs` in a way that nobody can differentiate: trying raises."""

    @staticmethod
    def forward(ctx: Any, count: int, *grads_and_inputs: Any) -> Any:
        return grads_and_inputs[:count]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("smartclip_kernels: second derivatives are not implemented")


def first_order(grads: tuple[Tensor, ...], inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The gradients; to differentiate them once more raises."""
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    if not any(needed_gradients(*tensors)):
        return grads
    marked: tuple[Tensor, ...] = _FirstOrder.apply(len(grads), *grads, *tensors)
    return marked


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, *arguments: Any) -> Any:
        outputs = below_autograd(_ops.loss, keyset, *arguments)
        ctx.save_for_backward(*arguments[13:17], *outputs[2:], *arguments[:9])
        ctx.constants, ctx.dims = arguments[9:13], arguments[17]
        ctx.mark_non_differentiable(*outputs[2:])
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor, grad_columns: Tensor, *_: Any) -> Any:
        needs = list(ctx.needs_input_grad[1:6])
        correction, saved = Correction(*ctx.saved_tensors[:4]), ctx.saved_tensors[4:]
        tail = needs, False, *correction, ctx.dims
        grads = _ops.loss_backward(grad_rows, grad_columns, *saved, *ctx.constants, *tail)
        return (None, *_or_none(grads, needs), *([None] * 13))


class _ReducedLoss(torch.autograd.Function):
    """As `_Loss`, for one incoming number: all of a side's weights are the same."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, *arguments: Any) -> Any:
        loss, *saved = below_autograd(_ops.loss_forward, keyset, *arguments)
        ctx.save_for_backward(*arguments[15:19], *saved, *arguments[:9])
        ctx.constants, ctx.dims = arguments[9:13], arguments[19]
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        needs = list(ctx.needs_input_grad[1:6])
        correction, (weights, *statistics) = Correction(*ctx.saved_tensors[:4]), ctx.saved_tensors[4:7]
        expanded = of_anchors(weights * grad_loss, [x.shape[1] for x in statistics])
        saved = *statistics, weights.new_empty(0), *ctx.saved_tensors[7:]
        grads = _ops.loss_backward(*expanded, *saved, *ctx.constants, needs, False, *correction, ctx.dims)
        return (None, *_or_none(grads, needs), *([None] * 15))


class _LossAndGradients(torch.autograd.Function):
    """The incoming gradient is one number, so that the forward pass can make the gradients up to that factor."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, *arguments: Any) -> Any:
        ctx.save_for_backward(*arguments[:9], *arguments[15:19])
        ctx.needs = list(ctx.needs_input_grad[1:6])
        ctx.constants, ctx.dims = (*arguments[9:13], ctx.needs, *arguments[13:15]), arguments[19]
        loss, *ctx.grads = below_autograd(
            _ops.loss_and_gradients, keyset, *arguments[:9], *ctx.constants, *arguments[15:]
        )
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        # In place: a second set of gradients would double their memory. So they serve one backward pass only; another
        # one over a retained graph makes them anew.
        grads, ctx.grads = ctx.grads, None
        with torch.no_grad():
            if grads is None:
                inputs, correction = ctx.saved_tensors[:9], ctx.saved_tensors[9:]
                grads = _ops.loss_and_gradients(*inputs, *ctx.constants, *correction, ctx.dims)[1:]
            # Not rounded before the factor, a gradient scaler's for one: it decides what half precision can hold.
            scaled = tuple(
                grad.mul_(grad_loss).to(x.dtype) if need else grad
                for grad, x, need in zip(grads, ctx.saved_tensors, ctx.needs, strict=False)
            )
        scaled = first_order(scaled, (grad_loss, *ctx.saved_tensors))
        return (None, *_or_none(scaled, ctx.needs), *([None] * 15))


class _MaskedSimilarity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, image: Tensor, text: Tensor, mask: Tensor, backend: str) -> Any:
        ctx.save_for_backward(image, text, mask)
        ctx.backend = backend
        return below_autograd(_ops.masked_similarity, keyset, image, text, mask, backend)

    @staticmethod
    def backward(ctx: Any, grad_sim: Tensor) -> Any:
        needs = list(ctx.needs_input_grad[1:4])
        grads = _ops.masked_similarity_backward(grad_sim, *ctx.saved_tensors, ctx.backend, needs)
        return (None, *_or_none(grads, needs), None)


def _resolved(arguments: tuple[Any, ...], at: int) -> tuple[Any, ...]:
    """The arguments with the backend (at index `at`) and, where one follows, the workspace decided."""
    device = arguments[0].device
    decided: list[Any] = list(arguments)
    decided[at] = backends.resolve(arguments[at], device).name
    if len(arguments) > at + 1 and not arguments[at + 1]:  # a workspace
        decided[at + 1] = backends.workspace_bytes(device)
    return tuple(decided)


def _with_autograd(name: str, backend_at: int, function: Callable[..., Any]) -> None:
    """`function` gives the arguments the autograd function that runs where a gradient is wanted."""
    op = getattr(_ops, name)

    def kernel(keyset: Any, *arguments: Any) -> Any:
        arguments = _resolved(complete(name, arguments), backend_at)
        if any(needed_gradients(*(x for x in arguments if isinstance(x, Tensor)))):
            return function(*arguments).apply(keyset, *arguments)
        return below_autograd(op, keyset, *arguments)

    library.impl(name, kernel, "Autograd", with_keyset=True)


def _reduced_function(*arguments: Any) -> Any:
    """Gradients are made with the loss where that makes no products twice."""
    problem = reduced_problem(*arguments)
    at_once = not problem.traits.needs_statistics or backends.load(arguments[11]).kept_shape(problem) != (0,)
    return _LossAndGradients if at_once else _ReducedLoss


_with_autograd("loss", 11, lambda *_: _Loss)
_with_autograd("reduced_loss", 11, _reduced_function)
_with_autograd("masked_similarity", 3, lambda *_: _MaskedSimilarity)


def _with_first_order(name: str) -> None:
    op = getattr(_ops, name)

    def kernel(keyset: Any, *arguments: Any) -> Any:
        return first_order(below_autograd(op, keyset, *arguments), arguments)

    library.impl(name, kernel, "Autograd", with_keyset=True)


def _without_gradient(name: str) -> None:
    op = getattr(_ops, name)

    def kernel(keyset: Any, *arguments: Any) -> Any:
        return below_autograd(op, keyset, *arguments)

    library.impl(name, kernel, "Autograd", with_keyset=True)


_without_gradient("masked_topk")
_without_gradient("best_positive")
_without_gradient("retrieval_ranks")
_without_gradient("loss_forward")
_with_first_order("loss_backward")
_with_first_order("loss_and_gradients")
_with_first_order("masked_similarity_backward")
