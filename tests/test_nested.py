"""Prefixes (`dims`): every level against the definition in float64, and what all of them take together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import smartclip_kernels as sk
from smartclip_kernels import backends, reference, testing
from smartclip_kernels.testing import Inputs, check_loss, make_inputs

pytestmark = pytest.mark.usefixtures("poisoned")

D = 24
one_sweep = pytest.mark.parametrize("nesting", [x for x in sk.available_backends() if backends.load(x).nests])
objectives = pytest.mark.parametrize("objective", reference.OBJECTIVES)
reductions = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=lambda d: str(d).removeprefix("torch.")
)


def prefixes(n: int, m: int, d: int = D, *, dims: tuple[int, ...] = (5, 16, 22), **options: Any) -> Inputs:
    """Of lengths from 2⁻⁴ to 2⁴, and with NaN where no prefix reaches."""
    inputs = make_inputs(n, m, d, normalize=False, **options)
    lengths = (2.0 ** torch.linspace(-4, 4, rows).round()[:, None].to(inputs.dtype) for rows in (n, m))
    image, text = (x * length for x, length in zip((inputs.image, inputs.text), lengths, strict=True))
    image[:, dims[-1] :] = text[:, dims[-1] :] = torch.nan
    return replace(inputs, image=image, text=text, dims=dims)


EVERYTHING: dict[str, dict[str, Any]] = {
    "ids": {"n": 61, "m": 40, "bias": -1.0},
    "ignored": {"n": 40, "m": 61, "ids": True, "ignore": True, "bias": 0.5},
    "smoothed": {"n": 33, "m": 33, "label_smoothing": 0.1},
    "debiased": {"n": 33, "m": 29, "tau_plus": 0.02, "label_smoothing": 0.1},
    "of texts": {"n": 33, "m": 29, "directions": ("text_to_image",)},
    "one pair": {"n": 1, "m": 1},
}


@one_sweep
@objectives
@dtypes
@reductions
@pytest.mark.parametrize("case", EVERYTHING)
def test_options(nesting: str, objective: str, dtype: torch.dtype, reduction: str, case: str) -> None:
    options = dict(EVERYTHING[case])
    changes = {name: options.pop(name) for name in ("tau_plus", "directions") if name in options}
    if objective == "sigmoid" and (changes or "label_smoothing" in options):
        pytest.skip("for a softmax")
    inputs = prefixes(objective=objective, dtype=dtype, scale=9.0, **options)
    values = check_loss(replace(inputs, **changes), reduction, backend=nesting).values
    assert not values["grad_image"][:, 22:].any() and not values["grad_text"][:, 22:].any()


@objectives
@pytest.mark.parametrize("ignore", [True, False])
def test_one_after_the_other(backend: str, objective: str, ignore: bool) -> None:
    """What the other backends do. tests/test_accuracy.py has half precision: it is rounded after the norms there."""
    tau_plus = 0.02 if objective == "softmax" else 0.0
    inputs = prefixes(19, 23, objective=objective, scale=9.0, ignore=ignore, bias=-1.0)
    check_loss(replace(inputs, tau_plus=tau_plus), "none", backend=backend)


@one_sweep
@objectives
@dtypes
@pytest.mark.parametrize("dims", [(1,), (D,), (1, 2, 3, D), tuple(range(3, D))], ids=len)
def test_widths(nesting: str, objective: str, dtype: torch.dtype, dims: tuple[int, ...]) -> None:
    bias = -2.0 if objective == "sigmoid" else None
    check_loss(prefixes(37, 37, dims=dims, objective=objective, dtype=dtype, bias=bias), backend=nesting)


@one_sweep
@objectives
@dtypes
@pytest.mark.parametrize("megabytes", [0.001, 0.3, 2, 1024])
def test_many_tiles(
    nesting: str, objective: str, dtype: torch.dtype, megabytes: float, set_workspace: Callable[[float], None]
) -> None:
    """The workspace decides how the scores are cut, and whether all levels' products are kept; never the result."""
    set_workspace(megabytes)
    inputs = prefixes(300, 277, 72, dims=(5, 40, 70), objective=objective, dtype=dtype, bias=0.5)
    check_loss(replace(inputs, ignore_ids=(torch.arange(300) % 9, torch.arange(277) % 9)), "none", backend=nesting)


@pytest.mark.slow
@objectives
@pytest.mark.parametrize("megabytes", [8, 64])
def test_default_tiles(objective: str, megabytes: float, set_workspace: Callable[[float], None]) -> None:
    set_workspace(megabytes)
    check_loss(prefixes(1303, 1179, 64, dims=(8, 16, 64), objective=objective, bias=-1.0), backend="cpu")


@one_sweep
@objectives
@dtypes
@pytest.mark.parametrize("layout", ["transposed", "columns", "odd address"])
def test_strides(nesting: str, objective: str, dtype: torch.dtype, layout: str) -> None:
    inputs = prefixes(30, 30, objective=objective, dtype=dtype, bias=0.0)

    def strided(x: torch.Tensor) -> torch.Tensor:
        if layout == "transposed":
            return x.T.contiguous().T
        if layout == "columns":
            return torch.stack([x, torch.full_like(x, torch.nan)], 2).reshape(30, 2 * D)[:, ::2]
        return torch.cat([torch.full((1,), torch.nan, dtype=dtype), x.reshape(-1)])[1:].reshape(30, D)

    check_loss(replace(inputs, image=strided(inputs.image), text=strided(inputs.text)), backend=nesting)


@one_sweep
@objectives
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "wanted", [("image",), ("text",), ("logit_scale",), ("logit_bias",), ("text", "logit_scale"), ()]
)
def test_only_the_gradients_that_are_wanted(
    nesting: str, objective: str, dtype: torch.dtype, wanted: tuple[str, ...]
) -> None:
    check_loss(replace(prefixes(40, 31, objective=objective, dtype=dtype, bias=-0.5), wanted=wanted), backend=nesting)


@one_sweep
@objectives
@dtypes
def test_zero_rows(nesting: str, objective: str, dtype: torch.dtype) -> None:
    """A row, or its first columns, of length 0: its cosines are 0, and its gradient is that of x / 1e-12."""
    inputs = prefixes(30, 30, objective=objective, dtype=dtype, bias=0.0)
    inputs.image[3] = 0
    inputs.text[[4, 7], :5] = 0
    check_loss(replace(inputs, wanted=("logit_scale", "logit_bias")), backend=nesting)
    if dtype != torch.float16:  # which ends at 65,504
        values = check_loss(inputs, backend=nesting).values
        assert values["grad_image"][3].abs().max() > 1e6


@one_sweep
@objectives
@pytest.mark.parametrize("factor", [0.5, 0.99, 1.01, 2.0])
def test_the_smallest_norms(nesting: str, objective: str, factor: float) -> None:
    """Around 1e-12, below which a norm has no gradient."""
    inputs = prefixes(20, 20, objective=objective, dtype=torch.float64, bias=0.0)
    for x in (inputs.image[:3], inputs.text[2:6]):
        x.mul_(1e-12 * factor / x[:, :16].norm(dim=1, keepdim=True))
    check_loss(inputs, backend=nesting)


@one_sweep
@objectives
@dtypes
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["image", "text"])
def test_nan_is_seen(nesting: str, objective: str, dtype: torch.dtype, where: str, bad: float) -> None:
    """In the last segment: levels before it do not notice."""
    inputs = prefixes(30, 30, objective=objective, dtype=dtype, bias=0.0)
    getattr(inputs, where)[13, 20] = bad
    values = testing.evaluate(inputs, testing.fused_loss(nesting)).values
    assert values["loss"].isnan() and values[f"grad_{where}"][13, :22].isnan().all()
    earlier = testing.evaluate(replace(inputs, dims=(5, 16)), testing.fused_loss(nesting)).values
    assert all(value.isfinite().all() for value in earlier.values())


@one_sweep
@objectives
def test_a_retained_graph_gives_the_same_bits_again(nesting: str, objective: str) -> None:
    inputs = prefixes(40, 31, objective=objective)
    leaf = inputs.image.clone().requires_grad_()
    loss = testing.fused_loss(nesting)(replace(inputs, image=leaf), "mean")
    assert isinstance(loss, torch.Tensor)
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_with_a_margin(backend: str) -> None:
    """A bound for every level, by the best positive of its own cosines."""
    inputs = prefixes(40, 31, ids=True)
    options: dict[str, Any] = {"image_ids": inputs.image_ids, "text_ids": inputs.text_ids, "backend": backend}
    whole = sk.clip_loss(inputs.image, inputs.text, 9.0, margin=0.1, dims=(5, 16), **options)
    levels = [(reference.normalised(inputs.image, d), reference.normalised(inputs.text, d)) for d in (5, 16)]
    parts = [sk.clip_loss(image, text, 9.0, margin=0.1, **options) for image, text in levels]
    torch.testing.assert_close(whole, sum(parts), rtol=1e-6, atol=0)


def multiply_adds(run: Callable[[], Any]) -> int:
    """Of all matrix products within."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        run()
    total = 0
    for event in recorded.events() or ():
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            first = 0 if event.name == "aten::mm" else 1
            (rows, depth), (_, columns) = event.input_shapes[first : first + 2]
            total += rows * depth * columns
    return total


@objectives
@pytest.mark.parametrize("megabytes", [0.3, 64], ids=["made again", "kept"])
def test_products_are_those_of_the_longest(
    objective: str, megabytes: float, set_workspace: Callable[[float], None]
) -> None:
    """However many levels: N·M·D multiply-adds for the scores, made once or twice, and N·M·D for either gradient."""
    set_workspace(megabytes)
    inputs = prefixes(150, 130, dims=(3, 9, 20, D), objective=objective)
    call = testing.fused_loss("cpu")
    unit = 150 * 130 * D
    assert multiply_adds(lambda: call(inputs, "mean")) == unit
    swept = 3 if objective == "sigmoid" or megabytes == 64 else 4
    assert multiply_adds(lambda: testing.evaluate(inputs, call)) == swept * unit
    short = replace(inputs, dims=(3, 9, 20))
    assert multiply_adds(lambda: testing.evaluate(short, call)) == swept * 150 * 130 * 20
