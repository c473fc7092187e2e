"""The sweeps over all ranks' rows, forward and backward, and what autograd sees of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from smartclip_kernels.ceilings import best_positives, correction_of
from smartclip_kernels.distributed.call import Call, Inputs
from smartclip_kernels.distributed.exchange import Exchange
from smartclip_kernels.ops import first_order
from smartclip_kernels.problem import Correction, Tensors
from smartclip_kernels.reference import least_logits
from smartclip_kernels.states import STATES

_ops = torch.ops.smartclip


def _add(sums: dict[int, Tensor], grads: Tensors, places: list[int]) -> None:
    for place in places:
        sums[place] = sums[place].add_(grads[place]) if place in sums else grads[place]


def _first_order(grads: list[Tensor | None], inputs: tuple[Any, ...]) -> list[Tensor | None]:
    marked = iter(first_order(tuple(x for x in grads if x is not None), inputs))
    return [None if x is None else next(marked) for x in grads]


class Loss(torch.autograd.Function):
    """Losses of own rows and own columns, and how many positives each has."""

    @staticmethod
    def forward(ctx: Any, call: Call, *inputs: Tensor | None) -> Any:
        state = STATES[call.objective]
        blocks = call.strategy.prepare(call.travelling(inputs))
        if call.margin is not None:
            call = _with_ceilings(call, call.margin, inputs, blocks)
        parts: dict[int, tuple[Tensor, Tensor]] = {}
        kept: dict[int, Tensor] = {}

        def visit(window: slice, block: Tensors) -> Tensors:
            *_, row_states, column_states, products = _ops.loss(
                *call.arguments(inputs, window, block), *call.correction_of(window)
            )
            parts[window.start] = call.sides(row_states, column_states)
            # What a call may keep of its products is for all of its blocks together.
            room = call.workspace // 2 - sum(x.nbytes for x in kept.values())
            kept[window.start] = products if products.nbytes <= room else products.new_empty(0)
            return ()

        call.strategy.sweep(blocks, visit)
        own_parts, travelling_parts = zip(*(parts[start] for start in sorted(parts)), strict=True)
        own = state.merge(torch.stack(own_parts)) if own_parts[0].shape[1] else own_parts[0]
        travelling = torch.cat(travelling_parts, dim=1)
        if travelling.shape[1]:
            pieces = call.exchange.swap(travelling.split(call.travelling_rows, dim=1))
            travelling = state.merge(torch.stack(pieces))
        scale, bias = inputs[3:]
        assert scale is not None
        least = least_logits(scale.reshape(()), None if bias is None else bias.reshape(()), own.new_empty(()))
        losses = [
            state.loss(x, call.label_smoothing, tau, least) if x.shape[1] else x[0]
            for x, tau in zip((own, travelling), call.sides(*call.own[:2]), strict=True)
        ]
        positives = [x[0].clone() for x in (own, travelling)]
        ctx.call, ctx.starts = call, list(kept)
        ctx.save_for_backward(*inputs, own, travelling, *kept.values(), *blocks)
        outputs = *call.sides(*losses), *call.sides(*positives)
        ctx.mark_non_differentiable(*outputs[2:])
        return outputs

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> Any:
        ctx.call.exchange.agree("backward", {})
        with torch.no_grad(), ctx.call.exchange.reported("backward"):
            grads = Loss.gradients(ctx, *weights)
        return None, *_first_order(grads, (*weights, *ctx.saved_tensors))

    @staticmethod
    def gradients(ctx: Any, *weights: Tensor) -> list[Tensor | None]:
        call: Call = ctx.call
        inputs, (own, travelling, *rest) = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        kept, blocks = dict(zip(ctx.starts, rest, strict=False)), tuple(rest[len(ctx.starts) :])
        own_weight, travelling_weight = call.sides(*weights[:2])
        if travelling.shape[1]:
            message = torch.cat([travelling, travelling_weight[None]]).T
            (whole,) = call.exchange.gather((message,), call.travelling_rows)
            whole = whole.T.contiguous()
            travelling, travelling_weight = whole[:-1], whole[-1]
        sums: dict[int, Tensor] = {}

        def visit(window: slice, block: Tensors) -> Tensors:
            states = call.sides(own, travelling[:, window])
            u, v = call.sides(own_weight, travelling_weight[window])
            arguments = *states, kept[window.start], *call.arguments(inputs, window, block)
            correction = call.correction_of(window)
            if call.semantics.sides_apart:
                grads = _apart(u, v, arguments, call.needs, correction)
            else:
                grads = _ops.loss_backward(u, v, *arguments, call.needs, True, *correction)
            _add(sums, grads, call.own_gradients())
            return tuple(grads[place] for place in call.home_gradients())

        home = call.strategy.sweep(blocks, visit)
        return call.finish(inputs, sums, home)


def _apart(u: Tensor, v: Tensor, arguments: tuple[Any, ...], needs: list[bool], correction: Correction) -> Tensors:
    """image's gradient of the rows' losses, text's and mask's of the columns', scale's and bias's of both."""
    image, text, mask, *scalars = needs
    of_rows = _ops.loss_backward(u, 0 * v, *arguments, [image, False, False, *scalars], True, *correction)
    of_columns = _ops.loss_backward(0 * u, v, *arguments, [False, text, mask, *scalars], True, *correction)
    return of_rows[0], *of_columns[1:3], *(x + y for x, y in zip(of_rows[3:], of_columns[3:], strict=True))


def _with_ceilings(call: Call, margin: float, inputs: Inputs, blocks: Tensors) -> Call:
    """What ids make positive may be at any rank: the best of each row is looked for in a sweep over all."""
    parts: dict[int, tuple[Tensor, Tensor]] = {}

    def visit(window: slice, block: Tensors) -> Tensors:
        image, text, mask, _, _, *ids = call.arguments(inputs, window, block)[:7]
        assert image is not None and text is not None
        parts[window.start] = call.sides(*best_positives(image, text, mask, ids, call.backend))
        return ()

    call.strategy.sweep(blocks, visit)
    own_parts, travelling_parts = zip(*(parts[start] for start in sorted(parts)), strict=True)
    pieces = call.exchange.swap(torch.cat(travelling_parts).split(call.travelling_rows))
    best = call.sides(*(torch.stack(list(x)).amax(0) for x in (own_parts, pieces)))
    scale, bias = inputs[3:]
    assert scale is not None
    own = correction_of(call.own, best, margin, scale, bias)
    return replace(call, own=own, correction=gathered(own, call.exchange, call.rows, call.image_travels))


class LossSum(torch.autograd.Function):
    """The sum of the losses of all pairs that this rank scores, and its gradients in the same sweep."""

    @staticmethod
    def forward(ctx: Any, call: Call, *inputs: Tensor | None) -> Any:
        ctx.call = call
        ctx.save_for_backward(*inputs)
        loss, *ctx.grads = _one_sweep(call, inputs, None)
        return loss

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> Any:
        theirs = ctx.call.exchange.agree("backward", {"Weight": float(weight).hex()})
        equal = all(it["Weight"] == theirs[0]["Weight"] for it in theirs)
        with torch.no_grad(), ctx.call.exchange.reported("backward"):
            grads = LossSum.gradients(ctx, weight, equal)
        return None, *_first_order(grads, (weight, *ctx.saved_tensors))

    @staticmethod
    def gradients(ctx: Any, weight: Tensor, equal: bool) -> list[Tensor | None]:
        call: Call = ctx.call
        inputs = ctx.saved_tensors  # raises where they were changed since, or are gone
        grads, ctx.grads = ctx.grads, None  # scaled in place: for one backward pass
        if grads is None or not equal:
            # Sums over ranks are there for equal weights only, which a mean over ranks has.
            own, home = _one_sweep(call, inputs, weight)[1:]
        else:
            own, home = ({k: x.mul_(weight) for k, x in grads[0].items()}, tuple(x.mul_(weight) for x in grads[1]))
        return call.finish(inputs, own, home)


def _one_sweep(call: Call, inputs: Inputs, weight: Tensor | None) -> tuple[Tensor, dict[int, Tensor], Tensors]:
    """Loss, own gradients and those that came home, times this rank's weight."""
    losses: list[Tensor] = []
    sums: dict[int, Tensor] = {}

    def visit(window: slice, block: Tensors) -> Tensors:
        if not any(call.needs):
            losses.append(_ops.reduced_loss(*call.arguments(inputs, window, block), "sum"))
            return ()
        loss, *grads = _ops.loss_and_gradients(*call.arguments(inputs, window, block), call.needs, "sum")
        if weight is not None:
            grads = [x.mul_(weight) for x in grads]
        losses.append(loss)
        _add(sums, grads, call.own_gradients())
        return tuple(grads[place] for place in call.home_gradients())

    home = call.strategy.sweep(call.strategy.prepare(call.travelling(inputs)), visit)
    return torch.stack(losses).sum(), sums, home


class SameValue(torch.autograd.Function):
    """The mean over ranks, with the gradient of this rank's own number."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, exchange: Exchange) -> Any:
        (values,) = exchange.gather((value.reshape(1),), [1] * exchange.size)
        return values.mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


def gathered(own: Correction, exchange: Exchange, rows: tuple[list[int], list[int]], image_travels: bool) -> Correction:
    """Image's and text's. The travelling side's of all ranks: whoever scores its rows makes their part of G."""
    whole = list(own)
    for moving in (0, 2) if image_travels else (1, 3):
        if (moves := whole[moving]) is not None:
            (gathered,) = exchange.gather((moves[:, None],), rows[moving % 2])
            whole[moving] = gathered[:, 0].contiguous()
    return Correction(*whole)
