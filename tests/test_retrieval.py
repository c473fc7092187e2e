"""masked_similarity, masked_topk and retrieval_ranks: values, order, ties, and what is not a number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import smartclip_kernels as sk
from smartclip_kernels import backends, reference, testing
from smartclip_kernels.testing import make_inputs
from tests.simulated import SIMULATED

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
sides = pytest.mark.parametrize("per", ["text", "image"])
SHAPES = [(1, 1, 8), (7, 252, 16), (129, 127, 640), (252, 507, 96)]


def masked(n: int, m: int, d: int, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    x = make_inputs(n, m, d, similarity="masked_cosine", dtype=dtype, mask="soft", **options)
    assert x.mask is not None
    return x.image, x.text, x.mask


def integers(n: int, m: int, d: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Features of ±1 and masks of ones: similarities are multiples of 1/16, exact in every precision, and tie."""
    generator = torch.Generator().manual_seed(n * 1000 + m)
    image, text = (torch.randint(0, 2, (rows, d), generator=generator) * 2.0 - 1 for rows in (n, m))
    return image, text, torch.ones(m, d)


@dtypes
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def test_masked_similarity(backend: str, dtype: torch.dtype, n: int, m: int, d: int) -> None:
    inputs = masked(n, m, d, dtype)

    def run(call: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in tensors]
        sim = call(*leaves)
        incoming = torch.linspace(-1, 1, n * m, dtype=torch.float64).reshape(n, m).to(sim.dtype)
        return (sim.detach(), *torch.autograd.grad(sim, leaves, incoming))

    actual = run(lambda *x: sk.masked_similarity(*x, backend=backend), inputs)
    true = run(reference.similarity, tuple(x.double() for x in inputs))
    eager = run(reference.similarity, inputs)
    assert actual[0].dtype == reference.compute_dtype(dtype)
    unit = testing.TOLERANCES[dtype].unit * testing.score_units(backends.load(backend), dtype, d)
    rounding = testing.TOLERANCES[dtype].score_rounding if backends.load(backend).rounds_scores else 0.0
    wide = testing.Inputs(inputs[0].double(), inputs[1].double(), inputs[2].double())
    incoming = torch.linspace(-1, 1, n * m, dtype=torch.float64).reshape(n, m)
    terms = testing.feature_gradient_terms(wide, true[0], incoming.abs())
    testing.assert_accurate(actual[0], torch.zeros_like(true[0]), true[0], 4 * unit, name="sim")
    names = ("image", "text", "mask")
    for name, ours, theirs, exact, term in zip(names, actual[1:], eager[1:], true[1:], terms, strict=True):
        # Sums over the other side cancel, so eager's error is chance; what is summed is of this size.
        allowance = 4 * unit * exact.abs().amax() + unit * max(n, m) ** 0.5 + rounding * term
        testing.assert_accurate(ours, (theirs.double() - exact).abs(), exact, allowance, name=f"grad_{name}")
        assert ours.dtype == dtype


def test_masked_similarity_needs_no_gradient(backend: str) -> None:
    image, text, mask = masked(20, 30, 16)
    sim = sk.masked_similarity(image, text, mask > 0.5, backend=backend)
    assert not sim.requires_grad
    torch.testing.assert_close(sim, reference.similarity(image, text, mask > 0.5))


@dtypes
@sides
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
@pytest.mark.parametrize("k", [1, 5, 100])
@pytest.mark.parametrize("megabytes", [0.05, 64])
def test_topk(
    backend: str,
    dtype: torch.dtype,
    per: Any,
    n: int,
    m: int,
    d: int,
    k: int,
    megabytes: float,
    set_workspace: Callable[[float], None],
) -> None:
    # A simulated GPU takes tens of milliseconds for a tile.
    set_workspace(max(megabytes, 0.5) if backend in SIMULATED else megabytes)
    image, text, mask = masked(n, m, d, dtype)
    values, indices = sk.masked_topk(image, text, mask, k, per=per, backend=backend)
    sim = reference.similarity(image.double(), text.double(), mask.double())
    sim = sim.T if per == "text" else sim
    k = min(k, sim.shape[1])
    assert values.shape == indices.shape == (sim.shape[0], k)
    assert values.dtype == reference.compute_dtype(dtype) and indices.dtype == torch.int64
    close = 4 * testing.TOLERANCES[dtype].unit * testing.score_units(backends.load(backend), dtype, d)
    assert ((sim.gather(1, indices) - values).abs() <= close).all(), "a value is not its index's similarity"
    assert (values.diff(dim=1) <= 0).all(), "best first"
    assert (indices.sort(1).values.diff(dim=1) > 0).all(), "an index stands twice"
    assert ((sim.topk(k, 1).values - values).abs() <= close).all(), "a better one was left out"


@sides
@pytest.mark.parametrize(("n", "m"), [(1, 1), (40, 300), (300, 41), (513, 129)])
@pytest.mark.parametrize("k", [1, 7, 1000])
@pytest.mark.parametrize("megabytes", [0.02, 64])
def test_ties_go_to_the_lower_index(
    backend: str, per: Any, n: int, m: int, k: int, megabytes: float, set_workspace: Callable[[float], None]
) -> None:
    """Over tiles too: which tile came first must not show."""
    # A simulated GPU takes tens of milliseconds for a tile.
    set_workspace(max(megabytes, 0.5) if backend in SIMULATED else megabytes)
    image, text, mask = integers(n, m)
    values, indices = sk.masked_topk(image, text, mask, k, per=per, backend=backend)
    sim = image @ text.T / 16
    expected_values, expected_indices = reference.topk(sim.T if per == "text" else sim, k)
    assert torch.equal(values, expected_values)
    assert torch.equal(indices, expected_indices)


@sides
@pytest.mark.parametrize("similarity", ["dot", "masked_cosine"])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (40, 300), (300, 41), (513, 129)])
@pytest.mark.parametrize("megabytes", [0.02, 64])
def test_ranks_with_ties(
    backend: str, per: Any, similarity: str, n: int, m: int, megabytes: float, set_workspace: Callable[[float], None]
) -> None:
    # A simulated GPU takes tens of milliseconds for a tile.
    set_workspace(max(megabytes, 0.5) if backend in SIMULATED else megabytes)
    image, text, mask = integers(n, m)
    generator = torch.Generator().manual_seed(0)
    image_ids, text_ids = (torch.randint(0, 60, (size,), generator=generator) - 30 for size in (n, m))
    ids = {"image_ids": image_ids, "text_ids": text_ids}
    given = mask if similarity == "masked_cosine" else None
    ranks = sk.retrieval_ranks(image, text, given, **ids, per=per, backend=backend)
    sim, positive = image @ text.T, image_ids[:, None] == text_ids
    expected = reference.ranks(sim.T, positive.T) if per == "text" else reference.ranks(sim, positive)
    assert ranks.dtype == torch.int64
    assert torch.equal(ranks, expected)
    best = torch.ops.smartclip.best_positive(image, text, given, image_ids, text_ids, per, backend)
    if given is None:
        expected = torch.where(positive, sim, -torch.inf).amax(0 if per == "text" else 1)
        assert torch.equal(best, expected)
    if n == 513 and per == "image":
        assert (ranks == m + 1).any(), "no anchor without a positive was tried"


@dtypes
@sides
@pytest.mark.parametrize("with_mask", [True, False])
def test_ranks_of_a_diagonal(backend: str, dtype: torch.dtype, per: Any, with_mask: bool) -> None:
    image, text, mask = masked(200, 200, 24, dtype, ids=False)
    given = mask if with_mask else None
    ranks = sk.retrieval_ranks(image, text, given, per=per, backend=backend)
    sim = reference.similarity(image.double(), text.double(), None if given is None else given.double())
    sim = sim.T if per == "text" else sim
    best = sim.diagonal()[:, None]
    close = 8 * testing.TOLERANCES[dtype].unit
    least, most = (sim > best + close).sum(1) + 1, (sim >= best - close).sum(1)
    assert ((ranks >= least) & (ranks <= most)).all()
    assert (ranks == 1).any() and (ranks > 1).any()


@sides
def test_recall_is_the_mean(backend: str, per: Any) -> None:
    image, text, _ = masked(64, 64, 8, ids=False)
    ranks = sk.retrieval_ranks(image, text, per=per, backend=backend)
    sim = image @ text.T
    top = (sim.T if per == "text" else sim).topk(5, 1).indices
    assert (ranks <= 5).float().mean() == (top == torch.arange(64)[:, None]).any(1).float().mean()


@sides
def test_nan(backend: str, per: Any) -> None:
    """NaN stands before all in a top k, as in `torch.topk`; an anchor whose positive is NaN ranks behind all others."""
    image, text, mask = masked(30, 30, 16, ids=False)
    image[4], text[9] = torch.nan, torch.nan
    values, indices = sk.masked_topk(image, text, mask, 3, per=per, backend=backend)
    anchor, candidate = (9, 4) if per == "text" else (4, 9)
    assert values[anchor].isnan().all()
    others = [i for i in range(30) if i != anchor]
    assert values[others, 0].isnan().all() and (indices[others, 0] == candidate).all()
    assert values[others, 1:].isfinite().all()
    ranks = sk.retrieval_ranks(image, text, mask, per=per, backend=backend)
    sim = reference.similarity(image, text, mask)
    expected = reference.ranks(sim.T if per == "text" else sim, torch.eye(30, dtype=torch.bool))
    assert torch.equal(ranks, expected)
    assert ranks[anchor] == 30 and ranks[candidate] == 30
    best = torch.ops.smartclip.best_positive(image, text, mask, None, None, per, backend)
    assert best.isnan().nonzero().flatten().tolist() == [4, 9]


def test_no_gradient_flows(backend: str) -> None:
    image, text, mask = (x.requires_grad_() for x in masked(10, 10, 8, ids=False))
    values, indices = sk.masked_topk(image, text, mask, 3, backend=backend)
    assert not values.requires_grad and not indices.requires_grad
    assert not sk.retrieval_ranks(image, text, mask, backend=backend).requires_grad
