"""On a device: the accuracy grid at sizes of several tiles, memory, CUDA graphs, and that nothing waits for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import smartclip_kernels as sk
from smartclip_kernels import backends, reference, testing
from smartclip_kernels.testing import check_loss, make_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch sees"),
]
BACKENDS = [name for name in backends.NAMES if name not in ("cpu", "reference")]
SHAPES = [(1, 1, 8), (129, 127, 40), (1000, 1500, 768), (2503, 2179, 1152)]

fused = pytest.mark.parametrize("fused", BACKENDS)
similarities = pytest.mark.parametrize("similarity", ["dot", "masked_cosine"])
objectives = pytest.mark.parametrize("objective", ["softmax", "sigmoid"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@fused
@similarities
@objectives
@dtypes
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def test_grid(fused: str, similarity: Any, objective: str, dtype: torch.dtype, n: int, m: int, d: int) -> None:
    bias = -3.0 if objective == "sigmoid" else None
    inputs = make_inputs(n, m, d, similarity=similarity, objective=objective, dtype=dtype, bias=bias, device="cuda")
    check_loss(inputs, backend=fused)


@fused
@similarities
@objectives
@pytest.mark.parametrize("megabytes", [1, 16, 256])
def test_everything_at_once(
    fused: str, similarity: Any, objective: str, megabytes: float, set_workspace: Callable[[float], None]
) -> None:
    set_workspace(megabytes)
    inputs = make_inputs(
        1500,
        1300,
        96,
        similarity=similarity,
        objective=objective,
        dtype=torch.bfloat16,
        mask="soft",
        bias=-1.5,
        ignore=True,
        label_smoothing=0.1 if objective == "softmax" else 0.0,
        device="cuda",
    )
    for reduction in ("mean", "sum", "none"):
        check_loss(inputs, reduction, backend=fused)


@fused
@pytest.mark.parametrize("wanted", [("image",), ("text", "mask"), ("logit_scale",)])
def test_locked_towers(fused: str, wanted: tuple[str, ...]) -> None:
    inputs = make_inputs(700, 650, 64, similarity="masked_cosine", dtype=torch.bfloat16, device="cuda")
    check_loss(replace(inputs, wanted=wanted), backend=fused)


@fused
@pytest.mark.parametrize("per", ["text", "image"])
def test_searches(fused: str, per: Any) -> None:
    inputs = make_inputs(1500, 1300, 96, similarity="masked_cosine", mask="soft", device="cuda")
    assert inputs.mask is not None
    arguments = (inputs.image, inputs.text, inputs.mask)
    values, indices = sk.masked_topk(*arguments, 10, per=per, backend=fused)
    sim = reference.similarity(*(x.double() for x in arguments))
    scores = sim.T if per == "text" else sim
    assert (scores.gather(1, indices) - values).abs().max() < 1e-5
    assert (scores.topk(10).values - values).abs().max() < 1e-5
    ranks = sk.retrieval_ranks(*arguments, image_ids=inputs.image_ids, text_ids=inputs.text_ids, per=per, backend=fused)
    positive = reference.positive_pairs(inputs.image, inputs.text, inputs.image_ids, inputs.text_ids)
    expected = reference.ranks(scores, positive.T if per == "text" else positive)
    assert (ranks != expected).float().mean() < 0.01  # scores that are equal but for their last digits


@fused
@similarities
@objectives
def test_nothing_waits_for_the_device(fused: str, similarity: Any, objective: str) -> None:
    inputs = make_inputs(512, 400, 64, similarity=similarity, objective=objective, dtype=torch.bfloat16, device="cuda")
    loss = testing.fused_loss(fused)
    testing.evaluate(inputs, loss)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        leaves: dict[str, Any] = {name: x.clone().requires_grad_() for name, x in inputs.leaves.items()}
        value = loss(replace(inputs, **leaves), "mean")
        assert isinstance(value, torch.Tensor)
        torch.autograd.grad(value, list(leaves.values()))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@fused
def test_a_cuda_graph_replays_it(fused: str) -> None:
    inputs = make_inputs(256, d=64, dtype=torch.bfloat16, device="cuda")
    image = inputs.image.clone().requires_grad_()

    def step() -> tuple[torch.Tensor, ...]:
        loss = sk.clip_loss(image, inputs.text, inputs.logit_scale, backend=fused)
        return loss, *torch.autograd.grad(loss, image)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        image.copy_(image.flip(0))
    graph.replay()
    for replayed, fresh in zip(captured, step(), strict=True):
        assert torch.equal(replayed, fresh)


@fused
@similarities
def test_memory_stays_linear(fused: str, similarity: Any) -> None:
    """At 32,768 the scores would be 4 GiB. Beyond inputs and gradients: the workspace, statistics, accumulators."""
    n, d = 32768, 256
    inputs = make_inputs(n, d=d, similarity=similarity, dtype=torch.bfloat16, device="cuda")
    leaves: dict[str, Any] = {name: x.clone().requires_grad_() for name, x in inputs.leaves.items()}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value = testing.fused_loss(fused)(replace(inputs, **leaves), "mean")
    assert isinstance(value, torch.Tensor)
    gradients = torch.autograd.grad(value, list(leaves.values()))
    own = sum(gradient.nbytes for gradient in gradients)
    accumulators = 4 * n * d * (1 if similarity == "dot" else 2)
    assert torch.cuda.max_memory_allocated() - before - own <= 256 * 2**20 + 64 * 2 * n + accumulators + 32 * 2**20


@fused
@similarities
@objectives
def test_same_bits(fused: str, similarity: Any, objective: str) -> None:
    inputs = make_inputs(
        1500, 1300, 96, similarity=similarity, objective=objective, dtype=torch.bfloat16, device="cuda"
    )
    first = testing.evaluate(inputs, testing.fused_loss(fused)).values
    for _ in range(3):
        again = testing.evaluate(inputs, testing.fused_loss(fused)).values
        assert all(torch.equal(again[name], value) for name, value in first.items())


@fused
def test_more_scores_than_32_bits_count(fused: str) -> None:
    """65,536 × 40,000: the sum of all losses against the same in blocks of float64."""
    inputs = make_inputs(65536, 40000, 16, dtype=torch.bfloat16, ids=True, device="cuda")
    leaf = inputs.image.clone().requires_grad_()
    rows, columns = testing.fused_loss(fused)(replace(inputs, image=leaf), "none")
    (rows.sum() + columns.sum()).backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()
    text, scale = inputs.text.double(), torch.as_tensor(inputs.logit_scale).double()
    assert inputs.image_ids is not None
    for start in (0, 65536 - 256):
        block = slice(start, start + 256)
        image = inputs.image[block].double()
        positive = reference.positive_pairs(image, text, inputs.image_ids[block], inputs.text_ids)
        expected = reference.softmax_losses(image @ text.T * scale, positive, torch.ones_like(positive), 0.0)
        assert (rows[block] - expected).abs().max() < 1e-4
