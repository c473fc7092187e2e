"""The torch ops `smartclip::*`: schema, implementation, fake, autograd, autocast.

Ops return per-anchor losses; reductions are made above them, so the anchors' weights u and v of the backward pass are
simply the incoming gradients. `backend` "" and `workspace` 0 are resolved once, in the forward pass, and handed to the
backward pass, which runs on another thread. Registered with `Library.define` and a thin autograd kernel instead of
`custom_op`, which costs several times as much a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from smartclip_kernels import backends, checks
from smartclip_kernels.problem import Correction, Needs, Problem, empty_gradients
from smartclip_kernels.reference import OBJECTIVES, SYMMETRIC, compute_dtype

_library = torch.library.Library("smartclip", "DEF")
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
    "Tensor column_statistics, Tensor kept)",
    "loss_one_sweep": f"({_LOSS}, bool[] needs, str reduction='sum', int[] dims=[]) -> (Tensor loss, {_GRADS})",
    "masked_similarity": "(Tensor image, Tensor text, Tensor mask, str backend) -> Tensor",
    "masked_similarity_backward": "(Tensor grad_sim, Tensor image, Tensor text, Tensor mask, str backend, "
    "bool[] needs) -> (Tensor grad_image, Tensor grad_text, Tensor grad_mask)",
    "masked_topk": "(Tensor image, Tensor text, Tensor mask, int k, str per, str backend) "
    "-> (Tensor values, Tensor indices)",
    "best_positive": f"({_RETRIEVAL}) -> Tensor",
    "retrieval_ranks": f"({_RETRIEVAL}) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)
_DEFAULTS = {name: tuple(x.default_value for x in getattr(_ops, name).default._schema.arguments) for name in _SCHEMAS}


def _complete(name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """All arguments of an op: torch leaves out what is a default."""
    return *arguments, *_DEFAULTS[name][len(arguments) :]


def _completed(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: kernel(*_complete(name, arguments))


def needed_gradients(*inputs: Tensor | None) -> list[bool]:
    """Which inputs want a gradient; all False where gradients are off."""
    enabled = torch.is_grad_enabled()
    return [enabled and x is not None and x.requires_grad for x in inputs]


def _implement(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        completed = _completed(name, kernel)
        _library.impl(name, completed, "CompositeExplicitAutograd")
        return completed

    return register


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.register_fake(f"smartclip::{name}", _completed(name, kernel), lib=_library)
        return kernel

    return register


def _problem(*loss_arguments: Any) -> Problem:
    """A checked problem, and the workspace that its backend gets."""
    *arguments, _, workspace = loss_arguments[:13]
    *numbers, dims = loss_arguments[13:]
    correction = Correction(*numbers)
    checks.problem(*arguments)
    problem = Problem(*arguments)
    checks.correction(correction, problem.image, problem.text, problem.objective)
    if dims:
        checks.dims(dims, problem.image)
        backend = backends.resolve(loss_arguments[11], problem.image.device)
        checks.one_sweep(problem.mask, correction.image_ceiling, backend.name, backend.nests)
    workspace = workspace or backends.workspace_bytes(problem.image.device)
    return problem._replace(workspace=workspace, correction=correction, dims=dims)


def _similarity_problem(image: Tensor, text: Tensor, mask: Tensor | None) -> Problem:
    checks.features(image, text)
    if mask is not None:
        checks.text_mask(mask, image, text)
    one = torch.ones((), dtype=compute_dtype(image.dtype), device=image.device)
    return Problem(image, text, mask, one, workspace=backends.workspace_bytes(image.device))


# --- implementations ---------------------------------------------------------------------------------------------


@_implement("loss")
def _loss(*arguments: Any) -> tuple[Tensor, ...]:
    problem = _problem(*arguments)
    return backends.resolve(arguments[11], problem.image.device).loss(problem)[2:]


@_implement("loss_backward")
def _loss_backward(
    grad_rows: Tensor,
    grad_columns: Tensor,
    row_statistics: Tensor,
    column_statistics: Tensor,
    kept: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    loss_arguments, needs, unrounded = _split_backward(arguments)
    problem = _problem(*loss_arguments)
    backend = backends.resolve(loss_arguments[11], problem.image.device)
    saved = (row_statistics, column_statistics, kept)
    return backend.loss_backward(problem, saved, (grad_rows, grad_columns), Needs(*needs), unrounded)


def _split_backward(arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[bool], bool]:
    """Those of the loss, `needs` and `unrounded`."""
    needs, unrounded, *tail = arguments[13:]
    return (*arguments[:13], *tail), needs, unrounded


@_implement("reduced_loss")
def _reduced_loss(*arguments: Any) -> Tensor:
    return _loss_forward(*arguments)[0]


@_implement("loss_forward")
def _loss_forward(*arguments: Any) -> tuple[Tensor, ...]:
    """What the backward pass of a reduced loss needs beside the loss: no anchor's own loss."""
    problem = _reduced_problem(*arguments)
    loss, weights, _, _, *kept = backends.resolve(arguments[11], problem.image.device).loss(problem)
    return loss, weights, *kept


def _reduced_problem(*arguments: Any) -> Problem:
    reduction, shares, *tail = arguments[13:]
    checks.choice("reduction", reduction, ("sum", "mean"))
    return _problem(*arguments[:13], *tail)._replace(reduction=reduction, shares=shares)


@_implement("loss_one_sweep")
def _loss_one_sweep(*arguments: Any) -> tuple[Tensor, ...]:
    problem = _one_sweep_problem(*arguments)
    return backends.resolve(arguments[11], problem.image.device).loss_one_sweep(problem, Needs(*arguments[13]))


def _one_sweep_problem(*arguments: Any) -> Problem:
    reduction, dims = arguments[14:]
    problem = _reduced_problem(*arguments[:13], reduction, SYMMETRIC, *Correction(), dims)
    if OBJECTIVES[problem.objective].needs_statistics:
        raise ValueError(f"objective: got {problem.objective!r}, needs one whose gradient takes no statistics")
    return problem


@_implement("masked_similarity")
def _masked_similarity(image: Tensor, text: Tensor, mask: Tensor, backend: str) -> Tensor:
    return backends.resolve(backend, image.device).masked_similarity(_similarity_problem(image, text, mask))


@_implement("masked_similarity_backward")
def _masked_similarity_backward(
    grad_sim: Tensor, image: Tensor, text: Tensor, mask: Tensor, backend: str, needs: list[bool]
) -> tuple[Tensor, ...]:
    problem = _similarity_problem(image, text, mask)
    return backends.resolve(backend, image.device).masked_similarity_backward(problem, grad_sim, _feature_needs(needs))


@_implement("masked_topk")
def _masked_topk(image: Tensor, text: Tensor, mask: Tensor, k: int, per: str, backend: str) -> tuple[Tensor, Tensor]:
    problem = _similarity_problem(image, text, mask)
    _check_topk(k, per)
    return backends.resolve(backend, image.device).masked_topk(problem, k, per == "text")


@_implement("best_positive")
def _best_positive(
    image: Tensor,
    text: Tensor,
    mask: Tensor | None,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    per: str,
    backend: str,
) -> Tensor:
    problem = _ranks_problem(image, text, mask, image_ids, text_ids, per)
    return backends.resolve(backend, image.device).best_positive(problem, per == "text")


@_implement("retrieval_ranks")
def _retrieval_ranks(
    image: Tensor,
    text: Tensor,
    mask: Tensor | None,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    per: str,
    backend: str,
) -> Tensor:
    problem = _ranks_problem(image, text, mask, image_ids, text_ids, per)
    return backends.resolve(backend, image.device).retrieval_ranks(problem, per == "text")


def _feature_needs(needs: list[bool]) -> Needs:
    return Needs(needs[0], needs[1], needs[2], False, False)


def _check_topk(k: int, per: str) -> None:
    checks.choice("per", per, checks.SIDES)
    if k < 1:
        raise ValueError(f"k: got {k}, needs at least 1")


def _ranks_problem(
    image: Tensor,
    text: Tensor,
    mask: Tensor | None,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    per: str,
) -> Problem:
    problem = _similarity_problem(image, text, mask)
    checks.ids(("image_ids", "text_ids"), (image_ids, text_ids), image, text)
    checks.paired(image, text, image_ids)
    checks.choice("per", per, checks.SIDES)
    return problem._replace(image_ids=image_ids, text_ids=text_ids)


# --- fake: the shapes and dtypes of the results ------------------------------------------------------------------


@_fake("loss")
def _loss_fake(*arguments: Any) -> tuple[Tensor, ...]:
    problem = _problem(*arguments)
    m = problem.m if problem.traits.both_sides else 0
    return problem.scale.new_empty(problem.n), problem.scale.new_empty(m), *_kept_fake(problem, arguments[11])


def _kept_fake(problem: Problem, backend: str) -> tuple[Tensor, ...]:
    """Statistics of both sides, and products."""
    m = problem.m if problem.traits.both_sides else 0
    products = backends.resolve(backend, problem.image.device).kept_shape(problem)
    shapes = (problem.planes, problem.n), (problem.planes, m), products
    return tuple(problem.scale.new_empty(shape) for shape in shapes)


@_fake("loss_backward")
def _loss_backward_fake(
    grad_rows: Tensor,
    grad_columns: Tensor,
    row_statistics: Tensor,
    column_statistics: Tensor,
    kept: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    loss_arguments, needs, unrounded = _split_backward(arguments)
    return tuple(empty_gradients(_problem(*loss_arguments), Needs(*needs), unrounded=unrounded))


@_fake("reduced_loss")
def _reduced_loss_fake(*arguments: Any) -> Tensor:
    return _reduced_problem(*arguments).scale.new_empty(())


@_fake("loss_forward")
def _loss_forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    problem = _reduced_problem(*arguments)
    weights = problem.scale.new_empty(2 if problem.traits.both_sides else 1)
    return problem.scale.new_empty(()), weights, *_kept_fake(problem, arguments[11])


@_fake("loss_one_sweep")
def _loss_one_sweep_fake(*arguments: Any) -> tuple[Tensor, ...]:
    problem = _one_sweep_problem(*arguments)
    return problem.scale.new_empty(()), *empty_gradients(problem, Needs(*arguments[13]), unrounded=True)


@_fake("masked_similarity")
def _masked_similarity_fake(image: Tensor, text: Tensor, mask: Tensor, backend: str) -> Tensor:
    problem = _similarity_problem(image, text, mask)
    return problem.scale.new_empty(problem.n, problem.m)


@_fake("masked_similarity_backward")
def _masked_similarity_backward_fake(
    grad_sim: Tensor, image: Tensor, text: Tensor, mask: Tensor, backend: str, needs: list[bool]
) -> tuple[Tensor, ...]:
    return tuple(empty_gradients(_similarity_problem(image, text, mask), _feature_needs(needs))[:3])


@_fake("masked_topk")
def _masked_topk_fake(
    image: Tensor, text: Tensor, mask: Tensor, k: int, per: str, backend: str
) -> tuple[Tensor, Tensor]:
    problem = _similarity_problem(image, text, mask)
    _check_topk(k, per)
    anchors, candidates = (problem.m, problem.n) if per == "text" else (problem.n, problem.m)
    values = problem.scale.new_empty(anchors, min(k, candidates))
    return values, torch.empty_like(values, dtype=torch.int64)


@_fake("best_positive")
def _best_positive_fake(
    image: Tensor,
    text: Tensor,
    mask: Tensor | None,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    per: str,
    backend: str,
) -> Tensor:
    problem = _ranks_problem(image, text, mask, image_ids, text_ids, per)
    return problem.scale.new_empty(problem.m if per == "text" else problem.n)


@_fake("retrieval_ranks")
def _retrieval_ranks_fake(
    image: Tensor,
    text: Tensor,
    mask: Tensor | None,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    per: str,
    backend: str,
) -> Tensor:
    problem = _ranks_problem(image, text, mask, image_ids, text_ids, per)
    return image.new_empty(problem.m if per == "text" else problem.n, dtype=torch.int64)


# --- autograd ----------------------------------------------------------------------------------------------------


def _below_autograd(op: Any, keyset: Any, *arguments: Any) -> Any:
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
        outputs = _below_autograd(_ops.loss, keyset, *arguments)
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
        loss, *kept = _below_autograd(_ops.loss_forward, keyset, *arguments)
        ctx.save_for_backward(*arguments[15:19], *kept, *arguments[:9])
        ctx.constants, ctx.dims = arguments[9:13], arguments[19]
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        needs = list(ctx.needs_input_grad[1:6])
        correction, (weights, *saved) = Correction(*ctx.saved_tensors[:4]), ctx.saved_tensors[4:]
        # Expanded, not copied: a backend can tell that they are all the same.
        of_side = (*(weights * grad_loss).unbind(), grad_loss)  # columns that are no anchors take none of it
        expanded = (weight.expand(x.shape[1]) for weight, x in zip(of_side, saved[:2], strict=False))
        grads = _ops.loss_backward(*expanded, *saved, *ctx.constants, needs, False, *correction, ctx.dims)
        return (None, *_or_none(grads, needs), *([None] * 15))


class _ReducedLossOneSweep(torch.autograd.Function):
    """The incoming gradient is one number, so that the forward pass can make the gradients up to that factor."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, *arguments: Any) -> Any:
        checks.correction(Correction(*arguments[15:19]), arguments[0], arguments[1], arguments[9])
        ctx.save_for_backward(*arguments[:9])
        ctx.needs = list(ctx.needs_input_grad[1:6])
        ctx.constants = *arguments[9:13], ctx.needs, arguments[13], arguments[19]
        loss, *ctx.grads = _below_autograd(_ops.loss_one_sweep, keyset, *arguments[:9], *ctx.constants)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        # In place: a second set of gradients would double their memory. So they serve one backward pass only; another
        # one over a retained graph makes them anew.
        grads, ctx.grads = ctx.grads, None
        with torch.no_grad():
            if grads is None:
                grads = _ops.loss_one_sweep(*ctx.saved_tensors, *ctx.constants)[1:]
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
        return _below_autograd(_ops.masked_similarity, keyset, image, text, mask, backend)

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
        arguments = _resolved(_complete(name, arguments), backend_at)
        if any(needed_gradients(*(x for x in arguments if isinstance(x, Tensor)))):
            return function(*arguments).apply(keyset, *arguments)
        return _below_autograd(op, keyset, *arguments)

    _library.impl(name, kernel, "Autograd", with_keyset=True)


def _reduced_function(*arguments: Any) -> Any:
    checks.choice("objective", arguments[9], tuple(OBJECTIVES))
    return _ReducedLoss if OBJECTIVES[arguments[9]].needs_statistics else _ReducedLossOneSweep


_with_autograd("loss", 11, lambda *_: _Loss)
_with_autograd("reduced_loss", 11, _reduced_function)
_with_autograd("masked_similarity", 3, lambda *_: _MaskedSimilarity)


def _with_first_order(name: str) -> None:
    op = getattr(_ops, name)

    def kernel(keyset: Any, *arguments: Any) -> Any:
        return first_order(_below_autograd(op, keyset, *arguments), arguments)

    _library.impl(name, kernel, "Autograd", with_keyset=True)


def _without_gradient(name: str) -> None:
    op = getattr(_ops, name)

    def kernel(keyset: Any, *arguments: Any) -> Any:
        return _below_autograd(op, keyset, *arguments)

    _library.impl(name, kernel, "Autograd", with_keyset=True)


_without_gradient("masked_topk")
_without_gradient("best_positive")
_without_gradient("retrieval_ranks")
_without_gradient("loss_forward")
_with_first_order("loss_backward")
_with_first_order("loss_one_sweep")
_with_first_order("masked_similarity_backward")


# --- autocast: image, text and a floating mask go to the autocast dtype, as `mm` would send them -------------------


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

    _library.impl(name, kernel, key)


_LOSSES = ("loss", "reduced_loss", "loss_one_sweep")
for _op in (*_LOSSES, "masked_similarity", "masked_topk", "best_positive", "retrieval_ranks"):
    _with_autocast(_op, "AutocastCPU")
    _with_autocast(_op, "AutocastCUDA")
