"""Pins reference.py, the truth of all other tests, to formulas written out pair by pair, to torch and to open_clip."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from smartclip_kernels import reference, testing
from smartclip_kernels.testing import Inputs, make_inputs

REDUCTIONS = ("mean", "sum", "none")


def exact(*args: Any, **kwargs: Any) -> Inputs:
    return make_inputs(*args, dtype=torch.float64, **kwargs)


def literal_similarity(x: Inputs, i: int, j: int) -> float:
    image, text = x.image[i].tolist(), x.text[j].tolist()
    if x.mask is None:
        return sum(a * b for a, b in zip(image, text, strict=True))
    image = [a * m for a, m in zip(image, x.mask[j].tolist(), strict=True)]
    image_norm, text_norm = math.hypot(*image), math.hypot(*text)
    if image_norm <= 1e-6 or text_norm <= 1e-12:
        return 0.0
    return sum(a * b for a, b in zip(image, text, strict=True)) / (image_norm * text_norm)


def literal_loss(x: Inputs, reduction: str) -> Any:
    """The formulas of the documentation, pair by pair, in Python's own floats."""
    n, m = len(x.image), len(x.text)
    scale, bias = float(x.logit_scale), 0.0 if x.logit_bias is None else float(x.logit_bias)
    s = [[scale * literal_similarity(x, i, j) + bias for j in range(m)] for i in range(n)]

    def positive(i: int, j: int) -> bool:
        if x.image_ids is None or x.text_ids is None:
            return i == j
        return int(x.image_ids[i]) == int(x.text_ids[j])

    def counts(i: int, j: int) -> bool:
        return positive(i, j) or x.ignore_ids is None or int(x.ignore_ids[0][i]) != int(x.ignore_ids[1][j])

    if x.objective == "sigmoid":
        rows = [
            sum(math.log1p(math.exp(-s[i][j] if positive(i, j) else s[i][j])) for j in range(m) if counts(i, j))
            for i in range(n)
        ]
        return {"none": rows, "sum": sum(rows), "mean": sum(rows) / n}[reduction]

    def anchor(pairs: list[tuple[int, int]], tau: float) -> float | None:
        right = [s[i][j] for i, j in pairs if positive(i, j)]
        if not right:
            return None
        if x.margin is not None:
            below = [(i, j) for i, j in pairs if positive(i, j) or s[i][j] - max(right) <= scale * x.margin]
            masked.append(len(pairs) - len(below))
            left.append(len(below) - len(right))
            pairs = below
        every = [s[i][j] for i, j in pairs if counts(i, j)]
        e = x.label_smoothing
        negatives = sum(math.exp(s[i][j]) for i, j in pairs if counts(i, j) and not positive(i, j))
        if tau:
            count, mean = len(every) - len(right), sum(math.exp(v) for v in right) / len(right)
            debiased = (negatives - count * tau * mean) / (1 - tau)
            negatives = max(debiased, count * math.exp(bias - scale))
            floored.append(debiased < negatives)
        lse = math.log(sum(math.exp(v) for v in right) + negatives)
        return lse - (1 - e) * sum(right) / len(right) - e * sum(every) / len(every)

    floored: list[bool] = []
    masked: list[int] = []
    left: list[int] = []
    tau = [v.tolist() for v in x.tau_plus] if isinstance(x.tau_plus, tuple) else [[x.tau_plus] * n, [x.tau_plus] * m]
    sides = [
        [anchor([(i, j) for j in range(m)], tau[0][i]) for i in range(n)],
        [anchor([(i, j) for i in range(n)], tau[1][j]) for j in range(m)],
    ]
    assert x.margin is None or (any(masked) and any(left)), "above the margin and below"
    assert not x.tau_plus or (any(floored) and not all(floored)), "both ends of the maximum"
    if len(x.directions) == 1:
        only = [v for v in sides[reference.DIRECTIONS.index(x.directions[0])] if v is not None]
        every = [v or 0.0 for v in sides[reference.DIRECTIONS.index(x.directions[0])]]
        return {"none": every, "sum": sum(only), "mean": sum(only) / max(len(only), 1)}[reduction]
    found = [[v for v in side if v is not None] for side in sides]
    if reduction == "none":
        return [[v or 0.0 for v in side] for side in sides]
    if reduction == "sum":
        return sum(map(sum, found)) / 2
    return sum(sum(side) / max(len(side), 1) for side in found) / 2


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": -2.0},
    "wide": {"m": 9},
    "tall": {"m": 5},
    "ids": {"ids": True},
    "ignored": {"ids": True, "ignore": True},
    "ignored on the diagonal": {"ignore": True},
    "smooth": {"label_smoothing": 0.2, "ids": True, "ignore": True},
    "of images": {"directions": ("image_to_text",), "ids": True},
    "of texts": {"directions": ("text_to_image",), "m": 9, "label_smoothing": 0.1},
    "debiased": {"tau_plus": 0.2},
    "debiased by row": {"tau_plus": tuple(torch.linspace(0, 0.3, 7, dtype=torch.float64) for _ in range(2))},
    "debiased everything": {"tau_plus": 0.15, "ids": True, "ignore": True, "label_smoothing": 0.2, "bias": 0.7},
    "masked": {"margin": 0.1, "bias": 2.0},
    "masked by a negative margin": {"margin": -0.3, "m": 9},
    "masked everything": {"margin": 0.05, "tau_plus": 0.15, "ids": True, "ignore": True, "label_smoothing": 0.2},
    "masked texts": {"margin": 0.0, "directions": ("text_to_image",), "ids": True},
    "debiased texts": {"tau_plus": 0.2, "directions": ("text_to_image",), "bias": -1.0},
}
OF_SOFTMAX = ("label_smoothing", "tau_plus", "margin", "directions")
ARGUMENTS = ("tau_plus", "margin", "directions")


@pytest.mark.parametrize("similarity", ["dot", "masked_cosine"])
@pytest.mark.parametrize("objective", ["softmax", "sigmoid"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", CASES)
def test_losses_pair_by_pair(similarity: Any, objective: str, reduction: str, case: str) -> None:
    options: dict[str, Any] = dict(CASES[case])
    if objective == "sigmoid":
        options = {name: value for name, value in options.items() if name not in OF_SOFTMAX}
    changes = {name: options.pop(name) for name in ARGUMENTS if name in options}
    x = exact(7, options.pop("m", 7), 5, similarity=similarity, objective=objective, mask="soft", scale=3.0, **options)
    x = replace(x, **changes)
    if x.ignore_ids is not None:
        x = replace(x, ignore_ids=(x.ignore_ids[0] % 3, x.ignore_ids[1] % 3))
    actual, expected = testing.eager_loss(x, reduction), literal_loss(x, reduction)
    pairs = zip(actual, expected, strict=True) if isinstance(actual, tuple) else [(actual, expected)]
    for a, b in pairs:
        torch.testing.assert_close(a, torch.tensor(b, dtype=torch.float64), rtol=1e-13, atol=1e-13)


def test_masked_similarity_is_the_papers() -> None:
    x = exact(6, 8, 16, similarity="masked_cosine", mask="soft")
    assert x.mask is not None
    actual = reference.similarity(x.image, x.text, x.mask)
    torch.testing.assert_close(
        actual, reference.literal_masked_similarity(x.image, x.text, x.mask), rtol=1e-13, atol=1e-13
    )
    for i, j in itertools.product(range(6), range(8)):
        assert actual[i, j].item() == pytest.approx(literal_similarity(x, i, j), rel=1e-13)


def test_undefined_similarities_are_zero_without_gradient() -> None:
    x = exact(6, 8, 16, similarity="masked_cosine", mask="soft")
    assert x.mask is not None
    x.mask[2], x.text[3], x.image[4] = 0, 0, 0
    leaves = [v.requires_grad_() for v in (x.image, x.text, x.mask)]
    sim = reference.similarity(*leaves)
    assert not sim[:, [2, 3]].any() and not sim[4].any() and sim[0, 0] != 0
    grads = torch.autograd.grad(sim.square().sum() + sim.sum(), leaves)
    assert all(g.isfinite().all() for g in grads)
    assert not grads[0][4].any() and not grads[1][[2, 3]].any() and not grads[2][[2, 3]].any()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_clip_is_cross_entropy(label_smoothing: float) -> None:
    x = exact(33, 33, 16, label_smoothing=label_smoothing)
    logits, target = x.image @ x.text.T * x.logit_scale, torch.arange(33)
    rows, columns = (F.cross_entropy(s, target, label_smoothing=label_smoothing) for s in (logits, logits.T))
    torch.testing.assert_close(testing.eager_loss(x, "mean"), (rows + columns) / 2, rtol=1e-13, atol=1e-13)


def test_open_clip_agrees() -> None:
    open_clip = pytest.importorskip("open_clip.loss")
    clip, siglip = exact(33, 33, 16, scale=15.0), exact(33, 33, 16, objective="sigmoid", scale=15.0, bias=-4.0)
    theirs = open_clip.ClipLoss()(clip.image, clip.text, clip.logit_scale)
    torch.testing.assert_close(testing.eager_loss(clip, "mean"), theirs, rtol=1e-13, atol=1e-13)
    theirs = open_clip.SigLipLoss()(siglip.image, siglip.text, siglip.logit_scale, siglip.logit_bias)
    torch.testing.assert_close(testing.eager_loss(siglip, "mean"), theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("similarity", ["dot", "masked_cosine"])
@pytest.mark.parametrize("objective", ["softmax", "sigmoid"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients(similarity: Any, objective: str, reduction: str) -> None:
    x = exact(
        5, 6, 4, similarity=similarity, objective=objective, mask="soft", scale=2.0, bias=0.3, ids=True, ignore=True
    )
    leaves = {name: value.clone().requires_grad_() for name, value in x.leaves.items()}

    def loss(*values: Tensor) -> Any:
        given: dict[str, Any] = dict(zip(leaves, values, strict=True))
        return testing.eager_loss(replace(x, **given), reduction)

    assert torch.autograd.gradcheck(loss, tuple(leaves.values()))


def test_gradients_of_debiased_losses() -> None:
    """Of the features and the bias, whichever side of the maximum holds; of the scale where its floor does not."""
    for tau, wanted in ((0.02, testing.DIFFERENTIABLE), (0.2, ("image", "text", "logit_bias"))):
        x = replace(exact(5, 6, 4, scale=2.0, bias=0.3, ids=True, ignore=True), tau_plus=tau, wanted=wanted)
        literal_loss(x, "mean") if tau > 0.1 else None
        leaves = {name: value.clone().requires_grad_() for name, value in x.leaves.items()}

        def loss(*values: Tensor, x: Inputs = x, names: tuple[str, ...] = tuple(leaves)) -> Any:
            given: dict[str, Any] = dict(zip(names, values, strict=True))
            return testing.eager_loss(replace(x, **given), "mean")

        assert torch.autograd.gradcheck(loss, tuple(leaves.values()))


def test_no_gradient_goes_through_a_margin() -> None:
    """Its bound is a constant: the gradient is that of a loss from which the pairs above it are ignored."""
    x = testing.clear_margin(exact(6, 7, 4, scale=2.0, ids=True), 0.1)
    leaves = {name: value.clone().requires_grad_() for name, value in x.leaves.items()}

    def loss(*values: Tensor) -> Any:
        given: dict[str, Any] = dict(zip(leaves, values, strict=True))
        return testing.eager_loss(replace(x, **given), "mean")

    literal_loss(x, "mean")
    assert torch.autograd.gradcheck(loss, tuple(leaves.values()))


@pytest.mark.parametrize("backend_reduction", REDUCTIONS)
@pytest.mark.parametrize("similarity", ["dot", "masked_cosine"])
@pytest.mark.parametrize("objective", ["softmax", "sigmoid"])
def test_the_reference_backend_differentiates_the_reference(
    similarity: Any, objective: str, backend_reduction: str
) -> None:
    """The backend's gradients are formulas; the truth's are autograd's. One is no good without the other."""
    smoothing = 0.1 if objective == "softmax" else 0.0
    x = exact(30, 26, 12, similarity=similarity, objective=objective, mask="soft", bias=0.5, ids=True, ignore=True)
    x = replace(x, label_smoothing=smoothing, tau_plus=0.05 if smoothing and similarity == "dot" else 0.0)
    if objective == "softmax":
        x = testing.clear_margin(x, 0.1)
    actual = testing.evaluate(x, testing.fused_loss("reference"), backend_reduction).values
    expected = testing.evaluate(x, testing.eager_loss, backend_reduction).values
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-12, atol=1e-13, msg=name)


def test_topk_and_ranks_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    sim = torch.randint(-3, 4, (40, 23), generator=generator).double()  # ties everywhere
    positive = torch.rand(40, 23, generator=generator) < 0.07
    values, indices = reference.topk(sim, 5)
    ranks = reference.ranks(sim, positive)
    assert (positive.sum(1) == 0).any() and (positive.sum(1) > 1).any()
    for i, row in enumerate(sim.tolist()):
        order = [j for _, j in sorted((-score, j) for j, score in enumerate(row))]
        assert indices[i].tolist() == order[:5]
        assert values[i].tolist() == [row[j] for j in order[:5]]
        places = [order.index(j) + 1 for j in range(23) if positive[i, j]]
        assert int(ranks[i]) == (min(places) if places else 24)


def test_the_assertion_sees_faults() -> None:
    """What the other tests stand on: a gradient off by one part in ten thousand, one bad row, a NaN, a wrong dtype."""
    x = make_inputs(64, 48, 32, scale=1.0)
    good = testing.evaluate(x, testing.eager_loss)
    testing.check_outputs(good, x)
    for name, value in good.values.items():
        if name != "loss":
            with pytest.raises(AssertionError, match=name):
                testing.check_outputs(testing.Outputs({**good.values, name: value * (1 + 1e-4)}), x)
    bad_row, nan = good.values["grad_text"].clone(), good.values["grad_image"].clone()
    bad_row[17, 3] *= 1.001
    with pytest.raises(AssertionError, match="row 17, element 3"):
        testing.check_outputs(testing.Outputs({**good.values, "grad_text": bad_row}), x)
    nan[5, 6] = torch.nan
    with pytest.raises(AssertionError, match="row 5, element 6"):
        testing.check_outputs(testing.Outputs({**good.values, "grad_image": nan}), x)
    with pytest.raises(AssertionError, match="loss"):
        testing.check_outputs(testing.Outputs({**good.values, "loss": good.values["loss"] + 2e-5}), x)
    with pytest.raises(AssertionError, match="float64"):
        testing.check_outputs(testing.Outputs({**good.values, "grad_image": good.values["grad_image"].double()}), x)
    with pytest.raises(AssertionError, match="need"):
        testing.check_outputs(testing.Outputs({"loss": good.values["loss"]}), x)
