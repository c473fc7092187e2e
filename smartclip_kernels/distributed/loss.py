"""The loss over all ranks of a group: what the package's docstring describes, step by step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from smartclip_kernels import backends, checks
from smartclip_kernels.distributed.exchange import Exchange
from smartclip_kernels.distributed.strategies import STRATEGIES, Strategy
from smartclip_kernels.ops import autocast, first_order, needed_gradients
from smartclip_kernels.problem import LossCall, Needs, Problem, Tensors
from smartclip_kernels.reference import DIRECTIONS, asked_for
from smartclip_kernels.states import STATES

_ops = torch.ops.smartclip


@dataclass(frozen=True)
class Semantics:
    """What else than the exact gradients is wanted, for open_clip's flags."""

    sides_apart: bool = False
    """image and text receive the gradients of their own anchors' losses alone"""
    features_divided: bool = False
    """gradients of the features are divided by the number of ranks, that of the scale is not"""
    same_value: bool = False
    """all ranks return the same number, the mean over them"""


EXACT = Semantics()


@dataclass(frozen=True)
class Call:
    """One distributed loss on this rank: what the sweeps of both passes have in common. Both sides have ids."""

    exchange: Exchange
    strategy: Strategy
    problem: Problem  # of own rows, on a backend that is decided
    backend: str
    needs: list[bool]
    semantics: Semantics
    rows: tuple[list[int], list[int]]  # of image and text, by rank
    image_travels: bool
    ids: tuple[Tensor | None, ...]  # image's, text's, and ignore ids: the travelling side's those of all ranks
    tau: tuple[Tensor | None, ...]  # image's and text's, likewise

    @property
    def travelling_rows(self) -> list[int]:
        return self.rows[0 if self.image_travels else 1]

    def travelling(self) -> Tensors:
        image, text, mask = self.problem[:3]
        return (image,) if self.image_travels else (text,) if mask is None else (text, mask)

    def arguments(self, window: slice, block: Tensors) -> tuple[Any, ...]:
        """Of an op, for own rows × those rows of the travelling side."""
        problem = self.problem
        features = (*block, *problem[1:3]) if self.image_travels else (problem.image, *block, None)[:3]
        moving = (0, 2) if self.image_travels else (1, 3)
        ids = (x[window] if k in moving and x is not None else x for k, x in enumerate(self.ids))
        constants = problem.objective, problem.label_smoothing, self.backend, problem.workspace
        return *features, problem.scale, problem.bias, *ids, *constants

    def tau_of(self, window: slice) -> tuple[Tensor | None, ...]:
        """Of an op, for the same rows."""
        moving = 0 if self.image_travels else 1
        return tuple(x[window] if k == moving and x is not None else x for k, x in enumerate(self.tau))

    def sides(self, own: Tensor, travelling: Tensor) -> tuple[Tensor, Tensor]:
        """In the order of rows and columns."""
        return (travelling, own) if self.image_travels else (own, travelling)

    def own_gradients(self) -> list[int]:
        """Places among `Needs` of what stays here; of scale and bias this rank's share."""
        return [place for place in range(5) if self.needs[place] and place not in self.home_gradients()]

    def home_gradients(self) -> list[int]:
        """Places of what has travelled."""
        places = (0,) if self.image_travels else (1, 2)
        return [place for place in places if self.needs[place]]

    def finish(self, own: dict[int, Tensor], home: Tensors) -> list[Tensor | None]:
        """Gradients in the inputs' dtypes."""
        found = own | dict(zip(self.home_gradients(), home, strict=True))
        if self.semantics.features_divided:
            found = {k: x / self.exchange.size if k < 3 else x for k, x in found.items()}
        inputs = self.problem.inputs()
        return [None if x is None or k not in found else found[k].to(x.dtype) for k, x in enumerate(inputs)]


def _add(sums: dict[int, Tensor], grads: Tensors, places: list[int]) -> None:
    for place in places:
        sums[place] = sums[place].add_(grads[place]) if place in sums else grads[place]


def _first_order(grads: list[Tensor | None], inputs: tuple[Any, ...]) -> list[Tensor | None]:
    marked = iter(first_order(tuple(x for x in grads if x is not None), inputs))
    return [None if x is None else next(marked) for x in grads]


class _Loss(torch.autograd.Function):
    """Losses of own rows and own columns, and how many positives each has."""

    @staticmethod
    def forward(ctx: Any, call: Call, *inputs: Tensor | None) -> Any:
        problem, state = call.problem, STATES[call.problem.objective]
        parts: dict[int, tuple[Tensor, Tensor]] = {}
        kept: dict[int, Tensor] = {}

        def visit(window: slice, block: Tensors) -> Tensors:
            *_, row_states, column_states, products = _ops.loss(*call.arguments(window, block), *call.tau_of(window))
            parts[window.start] = call.sides(row_states, column_states)
            # What a call may keep of its products is for all of its blocks together.
            room = problem.workspace // 2 - sum(x.nbytes for x in kept.values())
            kept[window.start] = products if products.nbytes <= room else products.new_empty(0)
            return ()

        call.strategy.sweep(call.travelling(), visit)
        own_parts, travelling_parts = zip(*(parts[start] for start in sorted(parts)), strict=True)
        own = state.merge(torch.stack(own_parts)) if own_parts[0].shape[1] else own_parts[0]
        travelling = torch.cat(travelling_parts, dim=1)
        if travelling.shape[1]:
            pieces = call.exchange.swap(travelling.split(call.travelling_rows, dim=1))
            travelling = state.merge(torch.stack(pieces))
        tau = problem.image_tau, problem.text_tau
        losses = [
            state.loss(x, problem.label_smoothing, t, problem.least_logit()) if x.shape[1] else x[0]
            for x, t in zip((own, travelling), reversed(tau) if call.image_travels else tau, strict=True)
        ]
        positives = [x[0].clone() for x in (own, travelling)]
        ctx.call, ctx.kept = call, kept
        ctx.save_for_backward(own, travelling, *inputs)
        outputs = *call.sides(*losses), *call.sides(*positives)
        ctx.mark_non_differentiable(*outputs[2:])
        return outputs

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> Any:
        with torch.no_grad():
            grads = _Loss.gradients(ctx, *weights)
        return None, *_first_order(grads, (*weights, *ctx.saved_tensors))

    @staticmethod
    def gradients(ctx: Any, *weights: Tensor) -> list[Tensor | None]:
        call: Call = ctx.call
        call.exchange.agree("backward", {})
        own, travelling = ctx.saved_tensors[:2]
        own_weight, travelling_weight = call.sides(*weights[:2])
        if travelling.shape[1]:
            message = torch.cat([travelling, travelling_weight[None]]).T
            (whole,) = call.exchange.gather((message,), call.travelling_rows)
            travelling, travelling_weight = whole.T[:-1], whole.T[-1]
        sums: dict[int, Tensor] = {}

        def visit(window: slice, block: Tensors) -> Tensors:
            states = call.sides(own, travelling[:, window])
            u, v = call.sides(own_weight, travelling_weight[window])
            arguments = *states, ctx.kept[window.start], *call.arguments(window, block)
            tau = call.tau_of(window)
            if not call.semantics.sides_apart:
                grads = _ops.loss_backward(u, v, *arguments, call.needs, True, *tau)
            else:
                image, text, mask, *scalars = call.needs
                of_rows = _ops.loss_backward(u, 0 * v, *arguments, [image, False, False, *scalars], True, *tau)
                of_columns = _ops.loss_backward(0 * u, v, *arguments, [False, text, mask, *scalars], True, *tau)
                grads = [
                    of_rows[0],
                    *of_columns[1:3],
                    *(x + y for x, y in zip(of_rows[3:], of_columns[3:], strict=True)),
                ]
            _add(sums, grads, call.own_gradients())
            return tuple(grads[place] for place in call.home_gradients())

        home = call.strategy.sweep(call.travelling(), visit)
        return call.finish(sums, home)


class _LossSum(torch.autograd.Function):
    """The sum of the losses of all pairs that this rank scores, and its gradients in the same sweep."""

    @staticmethod
    def forward(ctx: Any, call: Call, *inputs: Tensor | None) -> Any:
        ctx.call = call
        ctx.save_for_backward(*inputs)
        loss, *ctx.grads = _one_sweep(call, None)
        return loss

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> Any:
        inputs = ctx.saved_tensors  # raises where they were changed since, or are gone
        with torch.no_grad():
            grads = _LossSum.gradients(ctx, weight)
        return None, *_first_order(grads, (weight, *inputs))

    @staticmethod
    def gradients(ctx: Any, weight: Tensor) -> list[Tensor | None]:
        call: Call = ctx.call
        grads, ctx.grads = ctx.grads, None  # scaled in place: for one backward pass
        theirs = call.exchange.agree("backward", {"Weight": float(weight).hex()})
        if grads is None or any(it["Weight"] != theirs[0]["Weight"] for it in theirs):
            # Sums over ranks are there for equal weights only, which a mean over ranks has.
            own, home = _one_sweep(call, weight)[1:]
        else:
            own, home = ({k: x.mul_(weight) for k, x in grads[0].items()}, tuple(x.mul_(weight) for x in grads[1]))
        return call.finish(own, home)


def _one_sweep(call: Call, weight: Tensor | None) -> tuple[Tensor, dict[int, Tensor], Tensors]:
    """Loss, own gradients and those that came home, times this rank's weight."""
    losses: list[Tensor] = []
    sums: dict[int, Tensor] = {}

    def visit(window: slice, block: Tensors) -> Tensors:
        if not any(call.needs):
            losses.append(_ops.reduced_loss(*call.arguments(window, block), "sum"))
            return ()
        loss, *grads = _ops.loss_one_sweep(*call.arguments(window, block), call.needs)
        if weight is not None:
            grads = [x.mul_(weight) for x in grads]
        losses.append(loss)
        _add(sums, grads, call.own_gradients())
        return tuple(grads[place] for place in call.home_gradients())

    home = call.strategy.sweep(call.travelling(), visit)
    return torch.stack(losses).sum(), sums, home


class _SameValue(torch.autograd.Function):
    """The mean over ranks, with the gradient of this rank's own number."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, exchange: Exchange) -> Any:
        (values,) = exchange.gather((value.reshape(1),), [1] * exchange.size)
        return values.mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def loss(
    make: Callable[[], LossCall],
    group: dist.ProcessGroup,
    strategy: str,
    semantics: Semantics = EXACT,
) -> Any:
    """The loss over all ranks of `group`, as `clip_loss` describes it.

    Args:
        make: gives the loss of own rows. What it raises, every rank hears of.
    """
    exchange = Exchange(group)
    error: Exception | None = None
    has: dict[str, Any] = {}
    try:
        asked = make()
        arguments, reduction = (*autocast(*asked.arguments[:3]), *asked.arguments[3:]), asked.reduction
        checks.problem(*arguments[:-2])
        checks.tau(asked.tau, arguments[0], arguments[1], arguments[9])
        device = arguments[0].device
        exchange.check_device(device)
        backend = backends.resolve(arguments[-2], device)
        has = _header(asked._replace(arguments=arguments), strategy, semantics)
    except (TypeError, ValueError, RuntimeError) as failure:
        error = failure
    everyone = exchange.agree("forward", has, error)
    workspace = arguments[-1] or backends.workspace_bytes(device)
    problem = Problem(*arguments[:-2])._replace(
        workspace=workspace, shares=asked.shares, image_tau=asked.tau[0], text_tau=asked.tau[1]
    )
    rows = [it["Images"] for it in everyone], [it["Texts"] for it in everyone]
    # The lighter side: a masked text is as wide as two images.
    image_travels = sum(rows[0]) < sum(rows[1]) * (1 if problem.mask is None else 2)
    moving = rows[0 if image_travels else 1]
    needs = needed_gradients(*problem.inputs())
    ids = _ids(problem, exchange, rows, image_travels)
    call = Call(
        exchange,
        STRATEGIES[strategy](exchange, moving),
        problem,
        backend.name,
        needs,
        semantics,
        rows,
        image_travels,
        ids,
        _tau(problem, exchange, rows, image_travels),
    )
    inputs = problem.inputs()
    if reduction != "none" and not problem.traits.needs_statistics:
        share = _LossSum.apply(call, *inputs)
        if reduction == "mean":
            share = share / sum(rows[0])
    else:
        rows_, columns, *positives = _Loss.apply(call, *inputs)
        if reduction == "none":
            return asked_for(rows_, columns, problem.objective, problem.shares)
        share = _share(call, reduction, rows_, columns, *positives)
    value = exchange.size * share
    return _SameValue.apply(value, exchange) if semantics.same_value else value


def mean(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's share of the mean of all ranks' elements, times the number of ranks: its mean over ranks is that."""
    exchange = Exchange(group)
    sizes = [it["Size"] for it in exchange.agree("a mean", {"Size": x.numel()})]
    return exchange.size * x.sum() / sum(sizes)


def _share(call: Call, reduction: str, rows: Tensor, columns: Tensor, *positives: Tensor) -> Tensor:
    """Of the loss over all ranks: that of own rows and columns."""
    if not call.problem.traits.both_sides:
        return rows.sum() / sum(call.rows[0]) if reduction == "mean" else rows.sum()
    sides = zip((rows, columns), call.problem.shares, strict=True)
    # A side without a share is left out: 0 times its infinity would be NaN.
    sums = [share * x.sum() if share else x.new_zeros(()) for x, share in sides]
    if reduction == "sum":
        return sums[0] + sums[1]
    if call.problem.image_ids is None:
        return (sums[0] + sums[1]) / sum(call.rows[0])
    own = torch.stack([(x > 0).sum() for x in positives])[None]
    (counts,) = call.exchange.gather((own,), [1] * call.exchange.size)
    anchors = counts.sum(0).clamp(min=1)
    return sums[0] / anchors[0] + sums[1] / anchors[1]


def _header(call: LossCall, strategy: str, semantics: Semantics) -> dict[str, Any]:
    """What the ranks have to agree on, and, with a capital letter, how many rows each has."""
    arguments = call.arguments
    image, text, mask, _, bias = arguments[:5]
    wants = zip(Needs._fields, needed_gradients(*arguments[:5]), strict=True)
    return {
        "embedding width": image.shape[1],
        "dtype": str(image.dtype),
        "mask": None if mask is None else str(mask.dtype),
        "logit_bias": "absent" if bias is None else "given",
        "image_ids and text_ids": "absent" if arguments[5] is None else "given",
        "ignore_ids": "absent" if arguments[7] is None else "given",
        "objective": arguments[9],
        "label_smoothing": arguments[10],
        "tau_plus": "absent" if call.tau[0] is None else "given",
        "directions": [name for name, share in zip(DIRECTIONS, call.shares, strict=True) if share],
        "reduction": call.reduction,
        "strategy": strategy,
        "gradients wanted": [name for name, wanted in wants if wanted],
        "semantics": asdict(semantics),
        "Images": len(image),
        "Texts": len(text),
    }


def _ids(
    problem: Problem, exchange: Exchange, rows: tuple[list[int], list[int]], image_travels: bool
) -> tuple[Tensor | None, ...]:
    """Image's, text's and both ignore ids. By default a row matches the other side's row of its rank and place."""
    ids = [problem.image_ids, problem.text_ids, problem.image_ignore, problem.text_ignore]
    moving = [k for k in ((0, 2) if image_travels else (1, 3)) if ids[k] is not None]
    if moving:
        (whole,) = exchange.gather(
            (torch.stack([x for k in moving if (x := ids[k]) is not None], dim=1),), rows[0 if image_travels else 1]
        )
        for k, column in zip(moving, whole.unbind(1), strict=True):
            ids[k] = column.contiguous()
    if problem.image_ids is None:
        everyone = torch.arange(sum(rows[0]), device=problem.image.device)
        start = [0, *accumulate(rows[0])][exchange.who]
        own = everyone[start : start + problem.n]
        ids[:2] = (everyone, own) if image_travels else (own, everyone)
    return tuple(ids)


def _tau(
    problem: Problem, exchange: Exchange, rows: tuple[list[int], list[int]], image_travels: bool
) -> tuple[Tensor | None, ...]:
    """Image's and text's. The travelling side's of all ranks: whoever scores its rows makes their part of G."""
    moving = 0 if image_travels else 1
    tau = [problem.image_tau, problem.text_tau]
    if (own := tau[moving]) is not None:
        (whole,) = exchange.gather((own[:, None],), rows[moving])
        tau[moving] = whole[:, 0].contiguous()
    return tuple(tau)
