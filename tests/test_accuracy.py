"""Every loss, forward and backward, against the definition in float64: the grid and the hard corners."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import smartclip_kernels as sk
from smartclip_kernels import backends, reference, testing
from smartclip_kernels.testing import Inputs, check_loss, make_inputs
from tests.simulated import SIMULATED

pytestmark = pytest.mark.usefixtures("poisoned")

SIMILARITIES = ("dot", "masked_cosine")
OBJECTIVES = tuple(reference.OBJECTIVES)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)

similarities = pytest.mark.parametrize("similarity", SIMILARITIES)
objectives = pytest.mark.parametrize("objective", OBJECTIVES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
reductions = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])

SHAPES = [
    (1, 1, 8),
    (7, 7, 64),
    (1, 252, 16),
    (252, 1, 16),
    (7, 127, 640),
    (129, 127, 768),
    (127, 127, 1000),
    (252, 129, 1152),
    (252, 252, 2048),
    (507, 507, 40),
    (507, 252, 512),
]


@similarities
@objectives
@dtypes
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def test_grid(backend: str, similarity: Any, objective: str, dtype: torch.dtype, n: int, m: int, d: int) -> None:
    bias = -3.0 if objective == "sigmoid" else None
    check_loss(
        make_inputs(n, m, d, similarity=similarity, objective=objective, dtype=dtype, bias=bias), backend=backend
    )


@similarities
@objectives
@dtypes
@reductions
@pytest.mark.parametrize("megabytes", [0.001, 0.25, 2, 1024])
def test_many_tiles(
    backend: str,
    similarity: Any,
    objective: str,
    dtype: torch.dtype,
    reduction: str,
    megabytes: float,
    set_workspace: Callable[[float], None],
) -> None:
    """The workspace decides how the scores are cut, and whether they are kept; never the result."""
    if backend in SIMULATED and megabytes < 0.25:
        pytest.skip("hundreds of tiles, of which a simulated GPU takes tens of milliseconds each")
    set_workspace(megabytes)
    inputs = make_inputs(300, 277, 72, similarity=similarity, objective=objective, dtype=dtype, ids=True, bias=0.5)
    check_loss(replace(inputs, ignore_ids=(torch.arange(300) % 9, torch.arange(277) % 9)), reduction, backend=backend)


@pytest.mark.slow
@similarities
@objectives
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("megabytes", [8, 64, 512])
def test_default_tiles(
    backend: str,
    similarity: Any,
    objective: str,
    dtype: torch.dtype,
    megabytes: float,
    set_workspace: Callable[[float], None],
) -> None:
    """Tiles of the shapes that speed is made of, several each way; and all products kept."""
    if backend != "cpu":
        pytest.skip("small sizes only: it has no tiles, or is simulated")
    set_workspace(megabytes)
    inputs = make_inputs(2503, 2179, 64, similarity=similarity, objective=objective, dtype=dtype, bias=-1.0)
    check_loss(inputs, backend=backend)


@similarities
@objectives
@dtypes
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_scale(backend: str, similarity: Any, objective: str, dtype: torch.dtype, scale: float) -> None:
    inputs = make_inputs(129, 127, 96, similarity=similarity, objective=objective, dtype=dtype, scale=scale)
    check_loss(inputs, backend=backend)


@objectives
@dtypes
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("related", [True, False])
def test_unnormalised_features(backend: str, objective: str, dtype: torch.dtype, scale: float, related: bool) -> None:
    """Logits in the ten thousands: related pairs win by far more than float32 can tell from certainty."""
    inputs = make_inputs(127, 127, 64, objective=objective, dtype=dtype, scale=scale, normalize=False, seed=3)
    if not related:
        inputs = replace(inputs, text=inputs.text.roll(1, 0))
    check_loss(inputs, backend=backend)


@objectives
@dtypes
def test_unnormalised_masked(backend: str, objective: str, dtype: torch.dtype) -> None:
    """The masked cosine knows no lengths, not even of images whose squares leave half precision."""
    inputs = make_inputs(60, 61, 64, similarity="masked_cosine", objective=objective, dtype=dtype, normalize=False)
    lengths = 2.0 ** torch.linspace(-8, 9, 60).round()[:, None].to(dtype)
    check_loss(replace(inputs, image=inputs.image * lengths), backend=backend)


@similarities
@dtypes
def test_scale_100_and_no_cosine_above_5_percent(backend: str, similarity: Any, dtype: torch.dtype) -> None:
    """e^(s − scale) underflows for every pair of the row here: only a maximum that was seen will do as a shift."""
    inputs = make_inputs(127, 127, 512, similarity=similarity, dtype=dtype, mask="soft", scale=100.0)
    true_image = torch.nn.functional.normalize(
        inputs.image.double() - inputs.image.double() @ torch.linalg.pinv(inputs.text.double()) @ inputs.text.double()
    )
    if similarity == "dot":
        inputs = replace(inputs, image=(true_image + 0.02 * inputs.text.double()).to(dtype))
        sim = reference.similarity(inputs.image.double(), inputs.text.double())
        assert sim.abs().max() < 0.05
    else:
        inputs = replace(inputs, image=-inputs.image)  # cosines of the right pairs are the lowest of their rows
    check_loss(inputs, backend=backend)
    far = replace(inputs, logit_bias=torch.tensor(-200.0, dtype=reference.compute_dtype(dtype)))
    values = testing.evaluate(far, testing.fused_loss(backend)).values
    assert values["loss"].isfinite() and values["grad_image"].abs().max() > 0


@similarities
@dtypes
@pytest.mark.parametrize("scale", [30.0, 45.0, 100.0])
def test_neighbours_that_lie_far_apart(backend: str, similarity: Any, dtype: torch.dtype, scale: float) -> None:
    """Every other image points the other way: side by side, rows whose logits are all near scale and all near -scale.

    A shift that neighbours share would leave nothing of the lower ones; and most of their candidates are not positive.
    """
    inputs = make_inputs(64, 200, 48, similarity=similarity, dtype=dtype, mask="soft", scale=scale, ids=True)
    way = torch.nn.functional.normalize(torch.ones(1, 48), dim=1)
    sign = torch.tensor([1.0, -1.0]).repeat(32)[:, None]
    image, text = ((way + 0.1 * torch.nn.functional.normalize(x.float(), dim=1)) for x in (inputs.image, inputs.text))
    text_ids = torch.cat([torch.arange(1000, 1136), torch.arange(64)])
    mask = None if inputs.mask is None else (1 + inputs.mask) / 2
    inputs = replace(inputs, image=(sign * image).to(dtype), text=text.to(dtype), mask=mask,
                     image_ids=torch.arange(64), text_ids=text_ids)  # fmt: skip
    sim = reference.similarity(inputs.image.double(), inputs.text.double(), mask)
    assert sim[0].min() > 0.8 and sim[1].max() < -0.8
    check_loss(inputs, backend=backend)


@similarities
@objectives
@dtypes
def test_scale_zero(backend: str, similarity: Any, objective: str, dtype: torch.dtype) -> None:
    """Features get no gradient at α = 0; the scale does."""
    inputs = make_inputs(127, 129, 64, similarity=similarity, objective=objective, dtype=dtype, scale=0.0, bias=-1.0)
    values = check_loss(inputs, backend=backend).values
    assert not values["grad_image"].any() and not values["grad_text"].any()
    assert values["grad_logit_scale"].abs() > 0


@similarities
@dtypes
def test_bias_of_a_softmax(backend: str, similarity: Any, dtype: torch.dtype) -> None:
    values = check_loss(make_inputs(64, 64, 32, similarity=similarity, dtype=dtype, bias=2.5), backend=backend).values
    assert values["grad_logit_bias"] == 0  # not about: exactly


@similarities
@objectives
@reductions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_everything_at_once(backend: str, similarity: Any, objective: str, reduction: str, dtype: torch.dtype) -> None:
    """Several positives, rows without any, ignored pairs, smoothing, bias, soft masks, N ≠ M."""
    inputs = make_inputs(
        252,
        190,
        40,
        similarity=similarity,
        objective=objective,
        dtype=dtype,
        mask="soft",
        bias=-1.5,
        ids=True,
        ignore=True,
        label_smoothing=0.1 if objective == "softmax" else 0.0,
    )
    positive = reference.positive_pairs(inputs.image, inputs.text, inputs.image_ids, inputs.text_ids)
    assert (positive.sum(1) == 0).any() and (positive.sum(1) > 1).any() and (positive.sum(0) == 0).any()
    check_loss(inputs, reduction, backend=backend)


@similarities
@reductions
@pytest.mark.parametrize("label_smoothing", [0.01, 0.5, 0.999])
def test_label_smoothing(backend: str, similarity: Any, reduction: str, label_smoothing: float) -> None:
    inputs = make_inputs(90, 70, 24, similarity=similarity, label_smoothing=label_smoothing, bias=1.0)
    check_loss(inputs, reduction, backend=backend)


def taus(n: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Some of them 0."""
    return torch.linspace(-0.1, 0.2, n).clamp(min=0), torch.linspace(0.1, -0.1, m).clamp(min=0)


DEBIASED: dict[str, dict[str, Any]] = {
    "a little": {"tau_plus": 0.01, "scale": 5.0},
    "down to the floor": {"tau_plus": 0.3, "bias": 2.0},
    "by row": {"tau_plus": taus(70, 61), "m": 61, "ignore": True, "bias": -1.0, "label_smoothing": 0.1},
    "of images": {"tau_plus": 0.02, "directions": ("image_to_text",), "m": 61},
}


@similarities
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["float32", "float64", "bfloat16"]
)
@pytest.mark.parametrize("case", DEBIASED)
def test_debiased(backend: str, similarity: Any, dtype: torch.dtype, case: str) -> None:
    """One positive and several, τ of 0 among others; at the floor, and away from it."""
    options = dict(DEBIASED[case])
    changes = {name: options.pop(name) for name in ("tau_plus", "directions") if name in options}
    m = options.pop("m", 70)
    inputs = replace(make_inputs(70, m, 24, similarity=similarity, dtype=dtype, mask="soft", **options), **changes)
    for reduction in ("mean", "none"):
        check_loss(inputs, reduction, backend=backend)


def test_debiased_in_several_tiles(backend: str, set_workspace: Callable[[float], None]) -> None:
    set_workspace(0.25)
    check_loss(replace(make_inputs(300, 277, 8), tau_plus=taus(300, 277)), backend=backend)


@dtypes
def test_debiased_far_below_the_floor(backend: str, dtype: torch.dtype) -> None:
    """Of features that are not of length 1 all logits may lie further below β − α than an exponential reaches."""
    inputs = make_inputs(40, d=24, dtype=dtype)
    away = torch.nn.functional.normalize(torch.ones(1, 24)).to(dtype)
    inputs = replace(inputs, image=inputs.image + 8 * away, text=inputs.text - 8 * away, tau_plus=0.1)
    check_loss(inputs, "none", backend=backend)


@dtypes
def test_a_tau_of_zero_changes_no_bit(backend: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(70, 61, 24, dtype=dtype, ids=True)
    zero = replace(inputs, tau_plus=(torch.zeros(70), torch.zeros(61)))
    plain, named = (testing.evaluate(x, testing.fused_loss(backend), "none").values for x in (inputs, zero))
    for name, value in plain.items():
        # The reference has a formula of its own for τ, of other roundings.
        tolerance = (64 if backend == "reference" else 0) * torch.finfo(value.dtype).eps
        torch.testing.assert_close(named[name], value, rtol=tolerance, atol=tolerance, msg=name)


MASKED: dict[str, tuple[float, dict[str, Any]]] = {
    "few": (0.1, {"bias": 0.5}),
    "most": (-0.4, {"m": 61, "scale": 5.0}),
    "everything": (0.0, {"m": 61, "ignore": True, "bias": -1.0, "label_smoothing": 0.1, "tau_plus": 0.02}),
    "of texts": (0.05, {"directions": ("text_to_image",), "m": 61}),
}


@similarities
@dtypes
@pytest.mark.parametrize("case", MASKED)
def test_masked_by_a_margin(backend: str, similarity: Any, dtype: torch.dtype, case: str) -> None:
    """A pair may count for its row, for its column, for both or for neither."""
    near, options = MASKED[case][0], dict(MASKED[case][1])
    changes = {name: options.pop(name) for name in ("tau_plus", "directions") if name in options}
    m = options.pop("m", 70)
    inputs = replace(make_inputs(70, m, 24, similarity=similarity, dtype=dtype, mask="soft", **options), **changes)
    inputs = testing.clear_margin(inputs, near)
    assert_masks_either_side(inputs)
    for reduction in ("mean", "none"):
        check_loss(inputs, reduction, backend=backend)


def assert_masks_either_side(inputs: Inputs) -> None:
    exact = inputs.to(torch.float64)
    logits = reference.similarity(exact.image, exact.text, exact.mask) * exact.logit_scale
    positive = reference.positive_pairs(exact.image, exact.text, exact.image_ids, exact.text_ids)
    row, column = reference.ceiling_vectors(exact.margin, logits, positive, exact.logit_scale)
    assert row is not None and column is not None
    of_row, of_column = logits > row[:, None], logits > column
    for what in (of_row & of_column, of_row & ~of_column, ~of_row & of_column, ~of_row & ~of_column):
        assert (what & ~positive).any()


@dtypes
@pytest.mark.parametrize("m", [300, 277])
def test_masked_by_a_margin_in_several_tiles(
    backend: str, dtype: torch.dtype, m: int, set_workspace: Callable[[float], None]
) -> None:
    """Parts of them without a positive, as most are, and without a pair above a bound, or with some."""
    set_workspace(0.25)
    inputs = testing.clear_margin(make_inputs(300, m, 64, dtype=dtype), -0.2)
    assert_masks_either_side(inputs)
    check_loss(inputs, backend=backend)


@dtypes
def test_a_margin_that_masks_nothing_changes_no_bit(backend: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(70, 61, 24, dtype=dtype, ids=True, ignore=True)
    plain, named = (
        testing.evaluate(x, testing.fused_loss(backend), "none").values for x in (inputs, replace(inputs, margin=3.0))
    )
    for name, value in plain.items():
        assert torch.equal(named[name], value), name


def test_a_margin_lets_a_nan_through(backend: str) -> None:
    inputs = make_inputs(70, 61, 24, ids=True)
    inputs.text[5] = torch.nan
    inputs.image[3] = torch.inf
    outputs = testing.evaluate(replace(inputs, margin=0.1), testing.fused_loss(backend), "none").values
    positive = reference.positive_pairs(inputs.image, inputs.text, inputs.image_ids, inputs.text_ids)
    assert outputs["loss_row"][positive.any(1)].isnan().all()


@reductions
@pytest.mark.parametrize("direction", reference.DIRECTIONS)
def test_one_direction(backend: str, direction: str, reduction: str) -> None:
    inputs = make_inputs(70, 61, 24, ids=True, ignore=True, bias=0.5, label_smoothing=0.1)
    check_loss(replace(inputs, directions=(direction,)), reduction, backend=backend)


def test_the_side_that_is_not_asked_for_may_be_infinite(backend: str) -> None:
    """Text 0 prefers image 1 by more than float32 holds; images by less."""
    far = 2e38
    image, text = torch.tensor([[-far, 0.0], [far, far]]), torch.eye(2)
    loss = sk.clip_loss(image, text, 1.0, directions=("image_to_text",), backend=backend)
    torch.testing.assert_close(loss, torch.tensor(far / 2), rtol=1e-6, atol=0)
    assert sk.clip_loss(image, text, 1.0, backend=backend) == torch.inf


@objectives
@dtypes
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_prefixes(backend: str, objective: str, dtype: torch.dtype, reduction: str) -> None:
    """The sum of the definition's losses of normalised prefixes."""
    inputs = make_inputs(40, 31, 24, objective=objective, dtype=dtype, normalize=False, scale=9.0, bias=-1.0)
    dims = (5, 16, 24)
    loss: Any = sk.clip_loss if objective == "softmax" else sk.siglip_loss

    def evaluate(x: Inputs, level: int | None) -> list[torch.Tensor]:
        leaves: dict[str, Any] = {name: value.detach().requires_grad_() for name, value in x.leaves.items()}
        ids: dict[str, Any] = {"image_ids": x.image_ids, "text_ids": x.text_ids, "reduction": reduction}
        image, text, *scalars = leaves.values()
        if level is None:
            result = loss(image, text, *scalars, dims=dims, backend=backend, **ids)
        else:
            image, text = (torch.nn.functional.normalize(f[:, :level], dim=1) for f in (image, text))
            result = reference.loss(image, text, None, *scalars, objective=objective, **ids)
        losses = result if isinstance(result, tuple) else (result,)
        weights = [torch.linspace(1, 2, value.numel()).to(value).reshape(value.shape) for value in losses]
        grads = torch.autograd.grad(losses, list(leaves.values()), weights)
        assert len(losses) == 1 + (objective == "softmax" and reduction == "none")
        return [value.detach().double() for value in (*losses, *grads)]

    parts = zip(*(evaluate(inputs.to(torch.float64), level) for level in dims), strict=True)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.004}[dtype]
    for got, of_levels in zip(evaluate(inputs, None), parts, strict=True):
        true = torch.stack(of_levels).sum(0)
        scale = 1.0 if true.ndim == 0 and true.abs() < 1e-9 else true.abs().max()  # the bias of a softmax
        assert (got - true).abs().max() <= tolerance * scale


@similarities
@objectives
@reductions
def test_nothing_is_positive(backend: str, similarity: Any, objective: str, reduction: str) -> None:
    """No anchor at all: the softmax costs nothing and pulls nowhere, the sigmoid pushes every pair apart."""
    inputs = make_inputs(33, 29, 16, similarity=similarity, objective=objective, bias=-1.0)
    inputs = replace(inputs, image_ids=torch.arange(33), text_ids=-1 - torch.arange(29))
    values = check_loss(inputs, reduction, backend=backend).values
    if objective == "softmax":
        assert not any(value.any() for value in values.values())


@similarities
@objectives
@reductions
def test_everything_is_positive(backend: str, similarity: Any, objective: str, reduction: str) -> None:
    inputs = make_inputs(33, 29, 16, similarity=similarity, objective=objective, bias=1.0)
    inputs = replace(inputs, image_ids=torch.full((33,), 2**62), text_ids=torch.full((29,), 2**62))
    check_loss(inputs, reduction, backend=backend)


@similarities
@objectives
def test_ids_that_differ_in_their_high_bits_only(backend: str, similarity: Any, objective: str) -> None:
    inputs = make_inputs(64, 64, 16, similarity=similarity, objective=objective, bias=0.0)
    ids = (torch.arange(64) << 56) + 5
    assert (ids.int() == 5).all()
    check_loss(replace(inputs, image_ids=ids, text_ids=ids.flip(0)), backend=backend)


@similarities
@objectives
@reductions
def test_a_row_whose_every_negative_is_ignored(backend: str, similarity: Any, objective: str, reduction: str) -> None:
    """And rows without a positive that have no candidate left."""
    inputs = make_inputs(40, 30, 16, similarity=similarity, objective=objective, bias=0.25)
    ignore = (torch.zeros(40, dtype=torch.int64), torch.zeros(30, dtype=torch.int64))
    check_loss(replace(inputs, ignore_ids=ignore), reduction, backend=backend)


@similarities
@objectives
def test_ids_on_the_diagonal_are_the_default(backend: str, similarity: Any, objective: str) -> None:
    inputs = make_inputs(65, 65, 16, similarity=similarity, objective=objective, bias=0.0)
    ids = torch.randperm(65) - 30
    explicit = replace(inputs, image_ids=ids, text_ids=ids)
    plain, named = (testing.evaluate(x, testing.fused_loss(backend)).values for x in (inputs, explicit))
    for name, value in plain.items():
        torch.testing.assert_close(named[name], value, rtol=1e-6, atol=1e-7, msg=f"{name}: {named[name]} for {value}")


@objectives
@dtypes
@pytest.mark.parametrize("kind", ["bool", "hard", "soft"])
@pytest.mark.parametrize("mask_dtype", [None, *DTYPES], ids=str)
def test_mask_dtypes(
    backend: str, objective: str, dtype: torch.dtype, kind: Any, mask_dtype: torch.dtype | None
) -> None:
    """Masks need not have the features' dtype; their gradient has the mask's."""
    if kind == "bool" and mask_dtype is not None:
        pytest.skip("a bool mask has no other dtype")
    inputs = make_inputs(60, 50, 48, similarity="masked_cosine", objective=objective, dtype=dtype, mask=kind, bias=0.0)
    assert inputs.mask is not None
    check_loss(replace(inputs, mask=inputs.mask if mask_dtype is None else inputs.mask.to(mask_dtype)), backend=backend)


@objectives
@dtypes
def test_empty_masks_and_zero_texts(backend: str, objective: str, dtype: torch.dtype) -> None:
    """Undefined cosines are 0 and pass no gradient; others in the same tile do not notice."""
    inputs = make_inputs(
        64, 64, 32, similarity="masked_cosine", objective=objective, dtype=dtype, mask="soft", bias=0.0
    )
    assert inputs.mask is not None
    image, text, mask = inputs.image.clone(), inputs.text.clone(), inputs.mask.clone()
    mask[[0, 5, 63]] = 0
    text[[1, 5, 40]] = 0
    image[[2, 63]] = 0
    image[3, :16] = 0
    mask[7, 16:] = 0  # where image 3 is zero
    inputs = replace(inputs, image=image, text=text, mask=mask)
    values = check_loss(inputs, backend=backend).values
    assert not values["grad_text"][[0, 1, 5, 40, 63]].any()
    assert not values["grad_mask"][[0, 1, 5, 40, 63]].any()
    assert not values["grad_image"][[2, 63]].any()


@objectives
@pytest.mark.parametrize("factor", [0.5, 0.99, 1.01, 2.0])
def test_the_smallest_norms(backend: str, objective: str, factor: float) -> None:
    """‖image ⊙ mask‖ just under and just over 1e-6, ‖text‖ around 1e-12."""
    if backend in SIMULATED:
        pytest.skip("float64 is for the CPU and reference backends")
    inputs = make_inputs(32, 32, 16, similarity="masked_cosine", objective=objective, dtype=torch.float64, bias=0.0)
    assert inputs.mask is not None
    norm = (inputs.image[:8] * inputs.mask[3]).norm(dim=1, keepdim=True)
    image = torch.cat([inputs.image[:8] / norm * 1e-6 * factor, inputs.image[8:]])
    text = torch.cat([inputs.text[:4] / inputs.text[:4].norm(dim=1, keepdim=True) * 1e-12 * factor, inputs.text[4:]])
    check_loss(replace(inputs, image=image, text=text, wanted=("logit_scale",)), backend=backend)


@similarities
@objectives
@dtypes
@pytest.mark.parametrize("layout", ["transposed", "every_other", "columns", "expanded", "negative_offset"])
def test_strides(backend: str, similarity: Any, objective: str, dtype: torch.dtype, layout: str) -> None:
    inputs = make_inputs(50, 50, 24, similarity=similarity, objective=objective, dtype=dtype, mask="soft", bias=0.0)

    def strided(x: torch.Tensor | None) -> torch.Tensor | None:
        if x is None:
            return None
        if layout == "transposed":
            return x.T.contiguous().T
        if layout == "every_other":
            return torch.stack([x, torch.full_like(x, torch.nan)], 1).reshape(100, 24)[::2]
        if layout == "columns":
            return torch.stack([x, torch.full_like(x, torch.nan)], 2).reshape(50, 48)[:, ::2]
        if layout == "expanded":
            return x[:1].expand(50, 24)
        return torch.cat([torch.full((1,), torch.nan, dtype=dtype), x.reshape(-1)])[1:].reshape(50, 24)  # odd address

    ids = torch.stack([torch.arange(50), torch.zeros(50, dtype=torch.int64)], 1)[:, 0]
    layouts: dict[str, Any] = {name: strided(getattr(inputs, name)) for name in ("image", "text", "mask")}
    check_loss(replace(inputs, **layouts, image_ids=ids, text_ids=ids.clone()), backend=backend)


@objectives
@similarities
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize(
    "wanted", [*((name,) for name in testing.DIFFERENTIABLE), ("image", "logit_scale"), ("text", "mask")]
)
def test_only_the_gradients_that_are_wanted(
    backend: str, similarity: Any, objective: str, dtype: torch.dtype, wanted: tuple[str, ...]
) -> None:
    """A locked tower, a fixed scale: each gradient is right without the others, and nobody else gets one."""
    if wanted == ("mask",) and similarity == "dot":
        pytest.skip("the dot product has no mask")
    inputs = make_inputs(129, 100, 32, similarity=similarity, objective=objective, dtype=dtype, bias=-0.5, mask="soft")
    check_loss(replace(inputs, wanted=wanted), backend=backend)
    fixed = replace(inputs, image=inputs.image.clone(), text=inputs.text.clone(), wanted=wanted)
    leaves = {name: value.clone().requires_grad_() for name, value in fixed.leaves.items()}
    loss = testing.fused_loss(backend)(replace(fixed, **leaves), "mean")  # type: ignore[arg-type]
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    for name in testing.DIFFERENTIABLE:
        value = leaves.get(name, getattr(fixed, name))
        if isinstance(value, torch.Tensor):
            assert (value.grad is not None) == (name in leaves), name


def as_given(value: float, form: str, dtype: torch.dtype) -> torch.Tensor | float:
    forms: dict[str, torch.Tensor | float] = {
        "float": value,
        "int": int(value),
        "0-D": torch.tensor(value, dtype=dtype),
        "(1,)": torch.tensor([value], dtype=dtype),
        "(1, 1)": torch.tensor([[value]], dtype=dtype),
    }
    return forms[form]


@similarities
@objectives
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["float32", "float64", "bfloat16"]
)
@pytest.mark.parametrize("form", ["float", "int", "0-D", "(1,)", "(1, 1)"])
def test_forms_of_scale_and_bias(backend: str, similarity: Any, objective: str, dtype: torch.dtype, form: str) -> None:
    """Gradients of scale and bias have their shape and dtype, whichever floating dtype that is."""
    inputs = make_inputs(40, 40, 24, similarity=similarity, objective=objective, dtype=dtype)
    for scalar in (torch.float32, reference.compute_dtype(dtype), torch.float64):
        scale, bias = as_given(12, form, scalar), as_given(-2, form, scalar)
        check_loss(replace(inputs, logit_scale=scale, logit_bias=bias), backend=backend)


@similarities
@objectives
@dtypes
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["image", "text"])
def test_nan_is_seen(backend: str, similarity: Any, objective: str, dtype: torch.dtype, where: str, bad: float) -> None:
    """A NaN in one row reaches the loss and that row's gradient: nothing swallows it, and nothing hangs."""
    inputs = make_inputs(70, 70, 24, similarity=similarity, objective=objective, dtype=dtype, bias=0.0)
    broken = getattr(inputs, where).clone()
    broken[13, 5] = bad
    if inputs.mask is not None:
        inputs.mask[:, 5] = 1
    values = testing.evaluate(replace(inputs, **{where: broken}), testing.fused_loss(backend)).values
    assert not values["loss"].isfinite()
    if bad != bad:
        assert values[f"grad_{where}"][13].isnan().all()


@objectives
def test_nan_in_a_mask_is_seen(backend: str, objective: str) -> None:
    inputs = make_inputs(70, 70, 24, similarity="masked_cosine", objective=objective, mask="soft", bias=0.0)
    assert inputs.mask is not None
    inputs.mask[13, 5] = torch.nan
    values = testing.evaluate(inputs, testing.fused_loss(backend)).values
    assert values["loss"].isnan()
    assert values["grad_mask"][13].isnan().any() and values["grad_text"][13].isnan().any()


@similarities
@objectives
@pytest.mark.parametrize("which", ["logit_scale", "logit_bias"])
def test_nan_in_a_scalar_is_seen(backend: str, similarity: Any, objective: str, which: str) -> None:
    inputs = make_inputs(20, 20, 24, similarity=similarity, objective=objective, bias=0.0)
    given: dict[str, Any] = {which: torch.tensor(torch.nan)}
    values = testing.evaluate(replace(inputs, **given), testing.fused_loss(backend)).values
    assert values["loss"].isnan()
    assert values["grad_image"].isnan().all()


@similarities
@objectives
@pytest.mark.parametrize("dtype", HALF, ids=["bfloat16", "float16"])
def test_small_gradients_survive_half_precision(
    backend: str, similarity: Any, objective: str, dtype: torch.dtype
) -> None:
    """The mean's 1/N and an incoming gradient go in before the only rounding: 2¹⁶ × and 2⁻¹⁶ × cancel."""
    inputs = make_inputs(100, 100, 32, similarity=similarity, objective=objective, dtype=dtype, scale=1.0)
    loss = testing.fused_loss(backend)
    leaf = inputs.image.clone().requires_grad_()
    x: Inputs = replace(inputs, image=leaf)
    small = loss(x, "mean")
    assert isinstance(small, torch.Tensor)
    (scaled,) = torch.autograd.grad(small * 2.0**10, leaf)
    true = testing.truth(replace(inputs, wanted=("image",)), "mean").values["grad_image"] / 0.7 * 2.0**10
    rounded = testing.TOLERANCES[dtype].score_rounding if backends.load(backend).rounds_scores else 0
    testing.assert_accurate(scaled, torch.zeros_like(true), true, (1e-5 + rounded) * true.abs().amax(1, keepdim=True))


def test_gradients_accumulate_over_two_uses(backend: str) -> None:
    """One graph, two backward passes: the second is as right as the first."""
    for similarity in SIMILARITIES:
        for objective in OBJECTIVES:
            inputs = make_inputs(50, 50, 24, similarity=similarity, objective=objective, bias=0.0)  # type: ignore[arg-type]
            leaves = {name: value.clone().requires_grad_() for name, value in inputs.leaves.items()}
            loss: Any = testing.fused_loss(backend)(replace(inputs, **leaves), "mean")  # type: ignore[arg-type]
            first = torch.autograd.grad(loss, list(leaves.values()), torch.tensor(2.0), retain_graph=True)
            second = torch.autograd.grad(loss, list(leaves.values()), torch.tensor(2.0))
            for a, b in zip(first, second, strict=True):
                assert torch.equal(a, b)


@similarities
@pytest.mark.parametrize("dtype", HALF, ids=["bfloat16", "float16"])
def test_sums_that_half_precision_cannot_hold(backend: str, similarity: Any, dtype: torch.dtype) -> None:
    """A batch's gradients summed are far outside of float16; their mean is not."""
    inputs = make_inputs(1500, 1500, 16, similarity=similarity, objective="sigmoid", dtype=dtype, scale=100.0, ids=True)
    same = inputs.text[:1].expand(1500, 16).contiguous()
    inputs = replace(inputs, image=same.clone(), text=same, logit_bias=0.0)
    if similarity == "dot":
        summed = testing.truth(inputs, "sum").values["grad_image"]
        assert summed.abs().max() > 2**15
    check_loss(inputs, backend=backend)
