"""Inputs, truth and the accuracy assertion: for our tests, and for anyone who checks a backend on another machine.

    from smartclip_kernels import testing

    inputs = testing.make_inputs(507, 252, 640, similarity="masked_cosine", dtype=torch.bfloat16)
    testing.check_loss(inputs, backend="cpu")

Truth is `reference.py` in float64 on the inputs as they were rounded. An output may err 1.25 times as much as the
same formulas in eager float32 do in that row, or in their worst in proportion to the terms of its sums, plus a floor.
Rows are judged one by one, element by element, so that a bad row cannot hide in a norm. `TOLERANCES` is the one table
of these numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from smartclip_kernels import backends, reference
from smartclip_kernels.problem import Backend

EAGER_FACTOR = 1.25
"""How much larger than eager's largest error of the row an error may be."""


@dataclass(frozen=True)
class Tolerance:
    """Relative errors that outputs of one input dtype may have."""

    unit: float  # of the precision of scores and sums: times 1 + the row's largest logit
    loss: float  # of a loss: times |loss| + the row's largest logit
    score_rounding: float  # where a backend rounds G to the inputs' dtype before the products


# In float64 the truth is no more precise than what it judges, and sums have nothing wider to be made in.
TOLERANCES = {
    torch.float64: Tolerance(unit=2.0**-50, loss=1e-6 * 2.0**-28, score_rounding=0.0),
    torch.float32: Tolerance(unit=2.0**-23, loss=1e-6, score_rounding=0.0),
    torch.bfloat16: Tolerance(unit=2.0**-23, loss=1e-6, score_rounding=2.0**-7),
    torch.float16: Tolerance(unit=2.0**-23, loss=1e-6, score_rounding=2.0**-9),
}

DIFFERENTIABLE = ("image", "text", "mask", "logit_scale", "logit_bias")


@dataclass(frozen=True)
class Inputs:
    """One call of a loss: its tensors and options, and which arguments are to receive gradients."""

    image: Tensor  # (N, D)
    text: Tensor  # (M, D)
    mask: Tensor | None = None  # (M, D)
    logit_scale: Tensor | float = 1.0
    logit_bias: Tensor | float | None = None
    objective: str = "softmax"
    image_ids: Tensor | None = None
    text_ids: Tensor | None = None
    ignore_ids: tuple[Tensor, Tensor] | None = None
    label_smoothing: float = 0.0
    tau_plus: tuple[Tensor, Tensor] | float = 0.0
    margin: float | None = None  # see `clear_margin`
    directions: tuple[str, ...] = reference.DIRECTIONS
    dims: tuple[int, ...] | None = None
    wanted: tuple[str, ...] = DIFFERENTIABLE

    @property
    def dtype(self) -> torch.dtype:
        return self.image.dtype

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The floating tensors that gradients are wanted for, by name."""
        return self._floating(self.wanted)

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values in another precision."""
        widened: dict[str, Any] = {name: value.to(dtype) for name, value in self._floating(DIFFERENTIABLE).items()}
        return replace(self, **widened)

    def _floating(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        values = {name: getattr(self, name) for name in names}
        return {k: v for k, v in values.items() if isinstance(v, Tensor) and v.is_floating_point()}


@dataclass(frozen=True)
class Outputs:
    """What a loss gave: `values` holds "loss" (or "loss_row", "loss_column") and "grad_…" of every leaf."""

    values: dict[str, Tensor]
    magnitudes: dict[str, Tensor] = field(default_factory=dict)  # of each output's terms, broadcastable; truth only
    rounded: dict[str, Tensor] = field(default_factory=dict)  # what rounding G is relative to; truth only


Loss = Callable[[Inputs, str], "Tensor | tuple[Tensor, Tensor]"]


def make_inputs(
    n: int,
    m: int | None = None,
    d: int = 64,
    *,
    similarity: Literal["dot", "masked_cosine"] = "dot",
    objective: str = "softmax",
    dtype: torch.dtype = torch.float32,
    mask: Literal["bool", "hard", "soft"] = "hard",
    scale: float = 20.0,
    bias: float | None = None,
    normalize: bool = True,
    ids: bool | None = None,
    ignore: bool = False,
    label_smoothing: float = 0.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Inputs:
    """Correlated image and text features (N, D), (M, D), rounded to `dtype`, with everything else that a loss takes.

    With `ids` (by default where N ≠ M) rows have several positives, one or none, and ids are spread over all of int64;
    with `ignore` about one pair in sixteen has equal ignore ids. `logit_scale` and `logit_bias` are 0-D tensors of the
    precision of the scores.
    """
    m = n if m is None else m
    ids = n != m if ids is None else ids
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def randint(high: int, size: int) -> Tensor:
        return torch.randint(high, (size,), generator=generator)

    concepts = max(1, (3 * max(n, m)) // 4)
    image_concept = randint(concepts, n) if ids else torch.arange(n)
    text_concept = randint(concepts, m) if ids else torch.arange(m)
    meaning = randn(max(n, m), d)
    image = meaning[image_concept] + randn(n, d)
    text = meaning[text_concept] + randn(m, d)
    if normalize:
        image, text = F.normalize(image), F.normalize(text)
    masks = None
    if similarity == "masked_cosine":
        soft = torch.rand(m, d, generator=generator, dtype=torch.float64)
        masks = {"bool": soft < 0.6, "hard": (soft < 0.6).to(dtype), "soft": soft.to(dtype)}[mask].to(device)
    # An odd multiplier permutes the integers modulo 2⁶⁴: ids stay equal or different, and use every bit.
    spread = 0x1E3779B97F4A7C15
    ignore_ids = (randint(16, n).to(device), randint(16, m).to(device)) if ignore else None
    precision = reference.compute_dtype(dtype)
    return Inputs(
        image=image.to(device, dtype),
        text=text.to(device, dtype),
        mask=masks,
        logit_scale=torch.tensor(scale, dtype=precision, device=device),
        logit_bias=None if bias is None else torch.tensor(bias, dtype=precision, device=device),
        objective=objective,
        image_ids=(image_concept * spread).to(device) if ids else None,
        text_ids=(text_concept * spread).to(device) if ids else None,
        ignore_ids=ignore_ids,
        label_smoothing=label_smoothing,
    )


def clear_margin(inputs: Inputs, near: float, within: float = 0.02) -> Inputs:
    """With the margin near a number that the fewest roundings decide: in the middle of a gap between pairs' own."""
    exact = inputs.to(torch.float64)
    sim = reference.similarity(exact.image, exact.text, exact.mask)
    positive = reference.positive_pairs(exact.image, exact.text, exact.image_ids, exact.text_ids)
    best = torch.where(positive, sim, -torch.inf)
    over = torch.cat([(sim - best.amax(side, keepdim=True))[~positive] for side in (1, 0)])
    over = over[(over - near).abs() <= within]
    steps = torch.cat([over, over.new_tensor([near - within, near + within])]).sort().values
    widest = int(steps.diff().argmax())
    return replace(inputs, margin=float(steps[widest] + steps[widest + 1]) / 2)


def fused_loss(backend: str | None = None) -> Loss:
    """The library's own loss for given inputs: `clip_loss`, `siglip_loss` or `smartclip_loss` on `backend`."""
    from smartclip_kernels import functional

    def call(x: Inputs, reduction: str) -> Tensor | tuple[Tensor, Tensor]:
        common: dict[str, Any] = {"image_ids": x.image_ids, "text_ids": x.text_ids, "ignore_ids": x.ignore_ids}
        common |= {"reduction": reduction, "backend": backend}
        prefixes: dict[str, Any] = {"dims": x.dims}
        of_softmax: dict[str, Any] = {"tau_plus": x.tau_plus, "margin": x.margin, "directions": x.directions}
        if x.mask is not None:
            return functional.smartclip_loss(
                x.image,
                x.text,
                x.mask,
                x.logit_scale,
                x.logit_bias,
                objective=cast(Literal["softmax", "sigmoid"], x.objective),
                label_smoothing=x.label_smoothing,
                **of_softmax,
                **common,
            )
        if x.objective == "sigmoid":
            return functional.siglip_loss(x.image, x.text, x.logit_scale, x.logit_bias, **prefixes, **common)
        of_softmax |= {"label_smoothing": x.label_smoothing}
        return functional.clip_loss(x.image, x.text, x.logit_scale, x.logit_bias, **of_softmax, **prefixes, **common)

    return call


def eager_loss(x: Inputs, reduction: str) -> Tensor | tuple[Tensor, Tensor]:
    """The definition, in the precision of `x`."""
    return reference.loss(
        x.image,
        x.text,
        x.mask,
        x.logit_scale,
        x.logit_bias,
        objective=x.objective,
        reduction=reduction,
        image_ids=x.image_ids,
        text_ids=x.text_ids,
        ignore_ids=x.ignore_ids,
        label_smoothing=x.label_smoothing,
        tau_plus=x.tau_plus,
        margin=x.margin,
        directions=x.directions,
        dims=x.dims or (),
    )


def evaluate(inputs: Inputs, loss: Loss, reduction: str = "mean") -> Outputs:
    """Loss and gradients. The incoming gradient is 0.7, and with "none" another one for every anchor, some negative."""
    leaves: dict[str, Any] = {name: value.detach().requires_grad_() for name, value in inputs.leaves.items()}
    result = loss(replace(inputs, **leaves), reduction)
    losses = result if isinstance(result, tuple) else (result,)
    values = dict(zip(("loss",) if len(losses) == 1 else ("loss_row", "loss_column"), losses, strict=True))
    gradients = torch.autograd.grad(losses, list(leaves.values()), _incoming(losses)) if leaves else ()
    values |= {f"grad_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return Outputs({name: value.detach() for name, value in values.items()})


def _incoming(losses: tuple[Tensor, ...]) -> list[Tensor]:
    return [
        torch.linspace(-0.5, 1.5, x.numel()).to(x).reshape(x.shape) if x.ndim else torch.tensor(0.7).to(x)
        for x in losses
    ]


def truth(inputs: Inputs, reduction: str = "mean") -> Outputs:
    """The definition in float64, with the magnitude of what each output is made of: logits, terms of sums."""
    exact = inputs.to(torch.float64)
    n, m = len(exact.image), len(exact.text)
    # A bias for every pair: its gradient is G.
    pair_bias = exact.image.new_zeros(n, m) + (0.0 if exact.logit_bias is None else exact.logit_bias)
    exact = replace(exact, logit_bias=pair_bias, wanted=(*inputs.wanted, "logit_bias"))
    values = evaluate(exact, eager_loss, reduction).values
    score_gradient = values.pop("grad_logit_bias")
    if "logit_bias" in inputs.leaves:
        values["grad_logit_bias"] = score_gradient.sum()
    # Every prefix is normalised by itself, and they add up.
    levels = [replace(exact, image=exact.image[:, :d], text=exact.text[:, :d], dims=(d,)) for d in exact.dims or ()]
    magnitudes, rounded = (
        [of(level, pair_bias, reduction) for level in levels or [exact]] for of in (_magnitudes, _rounded_magnitudes)
    )
    return Outputs(values, _added(magnitudes), _added(rounded))


def _added(levels: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([level[name] for level in levels]).sum(0) for name in levels[0]}


def _features(exact: Inputs) -> tuple[Tensor, Tensor]:
    """Of which a score is made: of a prefix, normalised."""
    if not exact.dims:
        return exact.image, exact.text
    (width,) = exact.dims
    return reference.normalised(exact.image, width), reference.normalised(exact.text, width)


def _magnitudes(exact: Inputs, pair_bias: Tensor, reduction: str) -> dict[str, Tensor]:
    """What the roundings of an output are relative to: logits for a loss, the terms of its sum for a gradient.

    Terms, not their sum: a row's sum of terms may cancel to less than the terms' own roundings, and by how much eager
    errs there is chance. (The sum's own size would fail eager itself, once its sums run in another order.)
    """
    sim = reference.similarity(*_features(exact), exact.mask)
    logits = sim * exact.logit_scale + pair_bias
    row, column = logits.abs().amax(1, keepdim=True), logits.abs().amax(0)[:, None]
    if exact.objective == "softmax":
        of_rows, of_columns = _softmax_sides(exact, logits)
        row, column = row * of_rows.condition, column * of_columns.condition
    of_image, of_text = reference.shares_of(exact.directions)
    whole = column if not of_image else torch.cat([row, column]) if of_text and exact.tau_plus else row
    terms = _score_gradient_terms(exact, logits, reduction, _logit_terms(exact, pair_bias))
    image_terms, text_terms, mask_terms = feature_gradient_terms(exact, sim, terms)
    return {
        "loss": whole if reduction == "none" else whole.mean() if reduction == "mean" else whole.sum(),
        "loss_row": row,
        "loss_column": column,
        "grad_image": image_terms,
        "grad_text": text_terms,
        "grad_mask": mask_terms,
        "grad_logit_scale": (terms * sim).abs().sum(),
        "grad_logit_bias": terms.sum(),
    }


def _rounded_magnitudes(exact: Inputs, pair_bias: Tensor, reduction: str) -> dict[str, Tensor]:
    """What rounding G is relative to: the terms of the products that G enters, before they cancel."""
    sim = reference.similarity(*_features(exact), exact.mask)
    terms = _score_gradient_terms(exact, sim * exact.logit_scale + pair_bias, reduction, None)
    return dict(zip(("grad_image", "grad_text", "grad_mask"), feature_gradient_terms(exact, sim, terms), strict=True))


def _logit_terms(exact: Inputs, pair_bias: Tensor) -> Tensor:
    """(N, M): |logits| with every term of their sums taken absolute."""
    mask = None if exact.mask is None else exact.mask.double().abs()
    image, text = (x.abs() for x in _features(exact))
    sim = image @ (text if mask is None else text * mask).T
    if mask is not None:
        norms = (exact.image.square() @ mask.square().T).sqrt() * exact.text.norm(dim=1)
        sim = torch.where(norms > 0, sim / norms, 0)
    return sim * torch.as_tensor(exact.logit_scale).abs() + pair_bias.abs()


def _score_gradient_terms(exact: Inputs, logits: Tensor, reduction: str, logit_terms: Tensor | None) -> Tensor:
    """(N, M): G with every term of its formula taken absolute; times 1 + the largest of its anchor's logit terms.

    Terms of a logit, not the logit: its error is that of its sum over D, whatever the sum cancels to.
    """
    positive = reference.positive_pairs(exact.image, exact.text, exact.image_ids, exact.text_ids)
    columns = logits.shape[1] if reference.OBJECTIVES[exact.objective].both_sides else 0
    anchors = logits.new_zeros(len(logits)).requires_grad_(), logits.new_zeros(columns).requires_grad_()
    counts = positive.sum(1).to(logits), positive.sum(0).to(logits)
    shares = reference.shares_of(exact.directions)
    reduced = reference.reduce(*anchors, *counts, objective=exact.objective, reduction=reduction, shares=shares)
    losses = reduced if isinstance(reduced, tuple) else (reduced,)
    u, v = torch.autograd.grad(losses, anchors, _incoming(losses), materialize_grads=True, allow_unused=True)

    # A cosine's derivative rounds its root and its division besides.
    roundings = 1 if exact.mask is None and not exact.dims else 2

    def of_anchors(terms: Tensor, logits: Tensor | None, weight: Tensor) -> Tensor:
        return terms * (weight.abs() * (1 if logits is None else roundings + logits.amax(1)))[:, None]

    def softmax(side: _Side, positive: Tensor, weight: Tensor, logit_terms: Tensor | None) -> Tensor:
        candidate = side.candidate
        lone = positive & (positive.sum(1, keepdim=True) == 1)
        smooth = candidate / candidate.sum(1, keepdim=True).clamp(min=1) * exact.label_smoothing
        target = positive / positive.sum(1, keepdim=True).clamp(min=1) * (1 - exact.label_smoothing) + smooth
        # Of a lone positive, 1 − probability is known as precisely as a small number is.
        certain = side.others[:, None] + 2 * exact.label_smoothing
        terms = torch.where(lone, certain, side.probability + target) * side.condition
        return of_anchors(torch.where(candidate & positive.any(1, keepdim=True), terms, 0), logit_terms, weight)

    if not columns:
        candidate = reference.candidate_pairs(positive, *(exact.ignore_ids or (None, None)))
        return of_anchors(torch.where(candidate, torch.where(positive, -logits, logits).sigmoid(), 0), logit_terms, u)
    rows, turned = _softmax_sides(exact, logits)
    of_columns = softmax(turned, positive.T, v, None if logit_terms is None else logit_terms.T)
    return softmax(rows, positive, u, logit_terms) + of_columns.T


class _Side(NamedTuple):
    """Of a softmax's rows, every term taken absolute."""

    candidate: Tensor  # (N, M) bool: which pairs count
    probability: Tensor  # (N, M): e^s ∂(P + g)/∂e^s over P + g
    others: Tensor  # (N,): what G of the others adds up to
    condition: Tensor  # (N, 1): how often roundings of P and O are in P + g


def _softmax_sides(exact: Inputs, logits: Tensor) -> tuple[_Side, _Side]:
    """Of the rows and of the columns."""
    positive = reference.positive_pairs(exact.image, exact.text, exact.image_ids, exact.text_ids)
    candidate = reference.candidate_pairs(positive, *(exact.ignore_ids or (None, None)))
    least = reference.least_logits(exact.logit_scale, exact.logit_bias, logits)
    of_rows, of_columns = reference.tau_vectors(exact.tau_plus, *logits.shape, like=logits)
    row_ceiling, column_ceiling = reference.ceiling_vectors(exact.margin, logits, positive, exact.logit_scale)
    counts = reference.below_ceiling(logits, positive, candidate, row_ceiling)
    rows = _softmax_side(logits, positive, counts, of_rows, least)
    counts = reference.below_ceiling(logits.T, positive.T, candidate.T, column_ceiling)
    return rows, _softmax_side(logits.T, positive.T, counts, of_columns, least.T)


def _softmax_side(logits: Tensor, positive: Tensor, candidate: Tensor, tau: Tensor | None, least: Tensor) -> _Side:
    if tau is None:
        probability = logits.masked_fill(~candidate, -torch.inf).softmax(1)
        others = reference.others_advantage(logits, positive, candidate).sigmoid()
        return _Side(candidate, probability, others, torch.ones_like(probability[:, :1]))
    arguments = logits, positive, candidate, tau
    negatives = reference.debiased_others(*arguments, least)
    floored = negatives > reference.debiased_others(*arguments, torch.full_like(least, -torch.inf))
    right = logits.masked_fill(~positive, -torch.inf).logsumexp(1)
    among = (candidate & ~positive).sum(1) * tau / positive.sum(1).clamp(min=1)
    by_positive = torch.where(floored, 1, 1 + among / (1 - tau))[:, None]
    by_other = torch.where(floored, 0, 1 / (1 - tau))[:, None]
    probability = (logits - torch.logaddexp(right, negatives)[:, None]).masked_fill(~candidate, -torch.inf).exp()
    probability = probability * torch.where(positive, by_positive, by_other)
    others = torch.where(floored, (negatives - right).sigmoid(), torch.where(positive, 0, probability).sum(1))
    return _Side(candidate, probability, others, probability.sum(1, keepdim=True).clamp(min=1))


def feature_gradient_terms(exact: Inputs, sim: Tensor, terms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N, 1), (M, 1), (M, 1): the largest element of each gradient's row, with every term taken absolute."""
    terms = terms * torch.as_tensor(exact.logit_scale).abs()
    image, text = (x.abs() for x in _features(exact))
    if exact.dims:
        pull = terms * sim.abs()
        image_norm, text_norm = (
            x.norm(dim=1, keepdim=True).clamp(min=reference.MIN_NORM) for x in (exact.image, exact.text)
        )
        of_image, of_text = terms @ text + image * pull.sum(1)[:, None], terms.T @ image + text * pull.sum(0)[:, None]
        return _row_max(of_image / image_norm), _row_max(of_text / text_norm), terms.new_zeros(())
    if exact.mask is None:
        return _row_max(terms @ text), _row_max(terms.T @ image), terms.new_zeros(())
    mask, sim = exact.mask.double().abs(), sim.abs()
    square = image.square() @ mask.square().T
    text_square = text.square().sum(1)
    defined = (square > reference.MIN_IMAGE_NORM**2) & (text_square > reference.MIN_TEXT_NORM**2)
    product = torch.where(defined, terms / (square * text_square).sqrt(), 0)
    shrink = torch.where(defined, terms * sim / square, 0)
    pull = torch.where(defined, terms * sim / text_square, 0).sum(0)[:, None]
    along = product.T @ image
    return (
        _row_max(product @ (mask * text) + image * (shrink @ mask.square())),
        _row_max(along * mask + text * pull),
        _row_max(along * text + mask * (shrink.T @ image.square())),
    )


def _row_max(value: Tensor) -> Tensor:
    return value.abs().amax(1, keepdim=True)


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance from |value| to the next number of `dtype`, in float64.

    At least 2¹⁰ of the smallest normal number of the scores' precision: exponentials below that number may be flushed
    to 0 before scale and features multiply them.
    """
    info, scores = torch.finfo(dtype), torch.finfo(reference.compute_dtype(dtype))
    exponent = torch.frexp(value.double()).exponent - 1
    distance = torch.ldexp(torch.full_like(value, info.eps, dtype=torch.float64), exponent)
    return distance.clamp(min=max(info.tiny * info.eps, 2**10 * scores.tiny))


def assert_accurate(
    actual: Tensor, eager_error: Tensor, true: Tensor, allowance: Tensor | float, *, name: str = "output"
) -> None:
    """|actual − true| ≤ 1.25 × the row's largest `eager_error` + `allowance` + 1 ulp of `actual`, element by element.

    Args:
        actual: (rows, columns) in any dtype; fewer dimensions are one row, or rows of one element.
        eager_error: |eager − true|, as `actual`.
        true: float64, as `actual`.
        allowance: what else is allowed, broadcastable over rows × columns.

    Raises:
        AssertionError: names the worst row and element, its error and what was allowed.
    """
    rows = true.reshape(-1, 1) if true.ndim < 2 else true
    got = actual.to(torch.float64).reshape(rows.shape)
    error = (got - rows).abs()
    eager_row = eager_error.reshape(rows.shape).amax(1, keepdim=True)
    allowed = EAGER_FACTOR * eager_row + allowance + ulp(rows, actual.dtype)
    # Negated, so that a NaN is bad; equal infinities are as good as equal numbers.
    bad = ~((error <= allowed) | (got == rows))
    if not bad.any():
        return
    ratio = torch.where(bad, (error / allowed).nan_to_num(nan=torch.inf), 0)
    i, j = divmod(int(ratio.argmax()), rows.shape[1])
    raise AssertionError(
        f"{name} {list(actual.shape)} {actual.dtype}: {int(bad.any(1).sum())} of {len(rows)} rows are wrong. "
        f"Worst is row {i}, element {j}: got {got[i, j]:.9g}, true {rows[i, j]:.9g}, error {error[i, j]:.3g} = "
        f"{ratio[i, j]:.3g} × the allowed {allowed[i, j]:.3g}; eager's largest here {eager_row[i, 0]:.3g}"
    )


def eager_errors(inputs: Inputs, true: Outputs, reduction: str = "mean") -> dict[str, Tensor]:
    """|eager − truth| of every output, eager being the definition as a user would write it: scores in float32.

    For float64, where eager is the truth: float32's errors, scaled to float64.
    """
    if inputs.dtype != torch.float64:
        values = evaluate(inputs, eager_loss, reduction).values
        return {name: (value.double() - true.values[name]).abs() for name, value in values.items()}
    narrow = inputs.to(torch.float32)
    errors = eager_errors(narrow, truth(narrow, reduction), reduction)
    finer = TOLERANCES[torch.float64].unit / TOLERANCES[torch.float32].unit
    return {name: error * finer for name, error in errors.items()}


def check_outputs(
    actual: Outputs,
    inputs: Inputs,
    reduction: str = "mean",
    *,
    scores_rounded: bool = False,
    score_units: float = 1.0,
) -> None:
    """Assert that `actual` has the shapes and dtypes of what it is the output for, and is accurate.

    `scores_rounded`: the backend rounds G to the inputs' half precision before the gradients' products. `score_units`:
    see `score_units`.
    """
    true = truth(inputs, reduction)
    errors = eager_errors(inputs, true, reduction)
    tolerance = TOLERANCES[inputs.dtype]
    assert actual.values.keys() == true.values.keys(), f"got {list(actual.values)}, need {list(true.values)}"
    for name, expected in true.values.items():
        value = actual.values[name]
        if name.startswith("loss"):
            assert value.dtype == reference.compute_dtype(inputs.dtype), f"{name} is {value.dtype}"
            assert value.shape == expected.shape, f"{name} has shape {tuple(value.shape)}"
            rows = expected.reshape(-1, 1)
            allowed = tolerance.loss * (rows.abs() + true.magnitudes[name])
            # A loss has a bound of its own: eager's error is no excuse.
            assert_accurate(value, torch.zeros_like(expected), expected, allowed, name=name)
            continue
        leaf = inputs.leaves[name.removeprefix("grad_")]
        assert value.dtype == leaf.dtype, f"{name} is {value.dtype}, its argument {leaf.dtype}"
        assert value.shape == leaf.shape, f"{name} has shape {tuple(value.shape)}, its argument {tuple(leaf.shape)}"
        magnitude = true.magnitudes[name]
        allowed = tolerance.unit * magnitude * score_units
        # How lucky eager is in one row is chance: in proportion to the terms, its worst row speaks for all.
        worst = torch.where(magnitude > 0, errors[name] / magnitude, 0).amax()
        eager = torch.maximum(errors[name], worst * magnitude)
        if scores_rounded and name in true.rounded:
            allowed = allowed + tolerance.score_rounding * true.rounded[name]
        assert_accurate(value, eager, expected, allowed, name=name)


def check_loss(inputs: Inputs, reduction: str = "mean", *, backend: str | None = None) -> Outputs:
    """Run the library's loss on `inputs`, forward and backward, and assert that all of it is accurate; returns it."""
    actual = evaluate(inputs, fused_loss(backend), reduction)
    ran = backends.resolve(backend or "", inputs.image.device)
    units = score_units(ran, inputs.dtype, inputs.image.shape[1])
    check_outputs(actual, inputs, reduction, scores_rounded=ran.rounds_scores, score_units=units)
    return actual


def score_units(backend: Backend, dtype: torch.dtype, depth: int) -> float:
    """How many units of float32 a score may be off, of those that a sum rounded to the nearest would be.

    A matrix unit adds 8 products of half precision at a time and cuts the sum off to float32 instead of rounding it
    (Fasi et al., "Numerical behavior of NVIDIA tensor cores", 2021): after D / 8 steps a score is too small by up to
    D / 8 units. A quarter of that is allowed.
    """
    return 1 + depth / 32 if backend.cuts_sums and dtype.itemsize == 2 else 1.0
