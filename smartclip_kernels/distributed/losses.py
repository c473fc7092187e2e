"""The loss over all ranks of a group: what the package's docstring describes, step by step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from smartclip_kernels import backends, checks
from smartclip_kernels.ceilings import with_ceilings
from smartclip_kernels.distributed.call import EXACT, Call, Inputs, Semantics
from smartclip_kernels.distributed.exchange import Exchange
from smartclip_kernels.distributed.functions import Loss, LossSum, SameValue, gathered
from smartclip_kernels.distributed.strategies import STRATEGIES
from smartclip_kernels.ops import autocast, needed_gradients
from smartclip_kernels.problem import LossCall, Needs, Problem, Tensors
from smartclip_kernels.reference import DIRECTIONS, asked_for


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
        checks.correction(asked.correction, arguments[0], arguments[1], arguments[9])
        device = arguments[0].device
        exchange.check_device(device)
        backend = backends.resolve(arguments[-2], device)
        has = _header(asked._replace(arguments=arguments), strategy, semantics)
    except (TypeError, ValueError, RuntimeError) as failure:
        error = failure
    everyone = exchange.agree("forward", has, error)
    problem = Problem(*arguments[:-2])
    workspace = arguments[-1] or backends.workspace_bytes(device)
    with exchange.reported("forward"):
        rows = [it["Images"] for it in everyone], [it["Texts"] for it in everyone]
        # The lighter side: a masked text is as wide as two images.
        image_travels = sum(rows[0]) < sum(rows[1]) * (1 if problem.mask is None else 2)
        by_ids = problem.image_ids is not None
        own = asked.correction if by_ids else with_ceilings(asked._replace(arguments=arguments))
        call = Call(
            exchange,
            STRATEGIES[strategy](exchange, rows[0 if image_travels else 1]),
            needed_gradients(*problem.inputs()),
            semantics,
            rows,
            image_travels,
            _ids(problem, exchange, rows, image_travels),
            by_ids,
            asked.margin if by_ids else None,
            own,
            gathered(own, exchange, rows, image_travels),
            asked.shares,
            problem.objective,
            problem.label_smoothing,
            backend.name,
            workspace,
        )
        return _result(call, problem.inputs(), reduction)


def _result(call: Call, inputs: Inputs, reduction: str) -> Any:
    if reduction != "none" and not call.traits.needs_statistics:
        share = LossSum.apply(call, *inputs)
        if reduction == "mean":
            share = share / sum(call.rows[0])
    else:
        *losses, row_positives, column_positives = Loss.apply(call, *inputs)
        if reduction == "none":
            return asked_for(losses[0], losses[1], call.objective, call.shares)
        share = _share(call, reduction, losses, (row_positives, column_positives))
    value = call.exchange.size * share
    return SameValue.apply(value, call.exchange) if call.semantics.same_value else value


def mean(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's share of the mean of all ranks' elements, times the number of ranks: its mean over ranks is that."""
    exchange = Exchange(group)
    sizes = [it["Size"] for it in exchange.agree("a mean", {"Size": x.numel()})]
    return exchange.size * x.sum() / sum(sizes)


def _share(call: Call, reduction: str, losses: list[Tensor], positives: Tensors) -> Tensor:
    """Of the loss over all ranks: that of own rows and columns."""
    if not call.traits.both_sides:
        rows = losses[0].sum()
        return rows / sum(call.rows[0]) if reduction == "mean" else rows
    # A side without a share is left out: 0 times its infinity would be NaN.
    sides = zip(losses, call.shares, strict=True)
    rows, columns = (share * x.sum() if share else x.new_zeros(()) for x, share in sides)
    if reduction == "sum":
        return rows + columns
    if not call.by_ids:
        return (rows + columns) / sum(call.rows[0])
    own = torch.stack([(x > 0).sum() for x in positives])[None]
    (counts,) = call.exchange.gather((own,), [1] * call.exchange.size)
    anchors = counts.sum(0).clamp(min=1)
    return rows / anchors[0] + columns / anchors[1]


def _header(call: LossCall, strategy: str, semantics: Semantics) -> dict[str, Any]:
    """What the ranks have to agree on, and, with a capital letter, how many rows each has."""
    arguments = call.arguments
    image, text, mask, _, bias = arguments[:5]
    wants = zip(Needs._fields, needed_gradients(*arguments[:5]), strict=True)
    return {
        "embedding width": image.shape[1],
        "dims": call.width,
        "dtype": str(image.dtype),
        "mask": None if mask is None else str(mask.dtype),
        "logit_bias": "absent" if bias is None else "given",
        "image_ids and text_ids": "absent" if arguments[5] is None else "given",
        "ignore_ids": "absent" if arguments[7] is None else "given",
        "objective": arguments[9],
        "label_smoothing": arguments[10],
        "tau_plus": "absent" if call.correction.image_tau is None else "given",
        "margin": call.margin,
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
