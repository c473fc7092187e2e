"""Any shape, any ids, any tiles: hypothesis looks for what the grid does not think of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import smartclip_kernels as sk
from smartclip_kernels import reference, testing
from tests.simulated import SIMULATED

profile = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
int64 = st.integers(-(2**63), 2**63 - 1)
sizes = st.integers(1, 70)


@st.composite
def id_pairs(draw: st.DrawFn, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Ids of both sides from a few numbers, the ends of int64 among them, so that equal ones and lone ones occur."""
    pool = draw(st.lists(st.one_of(int64, st.sampled_from([-(2**63), 2**63 - 1, 0])), min_size=1, max_size=12))
    choose = st.sampled_from(pool)
    rows, columns = (draw(st.lists(choose, min_size=size, max_size=size)) for size in (n, m))
    return torch.tensor(rows), torch.tensor(columns)


@st.composite
def problems(draw: st.DrawFn) -> testing.Inputs:
    objective = draw(st.sampled_from(tuple(reference.OBJECTIVES)))
    n, m, d = draw(sizes), draw(sizes), draw(st.integers(1, 40))
    inputs = testing.make_inputs(
        n,
        m,
        d,
        similarity=draw(st.sampled_from(["dot", "masked_cosine"])),
        objective=objective,
        dtype=draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])),
        mask=draw(st.sampled_from(["bool", "hard", "soft"])),
        scale=draw(st.sampled_from([0.0, 0.01, 1.0, 14.3, 100.0])),
        bias=draw(st.sampled_from([None, 0.0, -10.0])),
        seed=draw(st.integers(0, 1000)),
    )
    image_ids, text_ids = draw(id_pairs(n, m))
    return replace(
        inputs,
        image_ids=image_ids,
        text_ids=text_ids,
        ignore_ids=draw(st.one_of(st.none(), id_pairs(n, m))),
        label_smoothing=draw(st.sampled_from([0.0, 0.1, 0.9])) if objective == "softmax" else 0.0,
    )


def takes(backend: str, inputs: testing.Inputs) -> None:
    assume(backend not in SIMULATED or inputs.dtype != torch.float64)


def workspace(backend: str, megabytes: float) -> float:
    """A simulated GPU takes tens of milliseconds for a tile, of which the smallest workspaces make dozens."""
    return max(megabytes, 0.25) if backend in SIMULATED else megabytes


@profile
@given(
    inputs=problems(), reduction=st.sampled_from(["mean", "sum", "none"]), megabytes=st.sampled_from([0.001, 0.01, 64])
)
def test_losses(backend: str, inputs: testing.Inputs, reduction: str, megabytes: float, set_workspace: Any) -> None:
    takes(backend, inputs)
    set_workspace(workspace(backend, megabytes))
    testing.check_loss(inputs, reduction, backend=backend)


@profile
@given(data=st.data(), n=sizes, m=sizes, k=st.integers(1, 80), megabytes=st.sampled_from([0.001, 0.01, 64]))
def test_retrieval(
    backend: str, data: st.DataObject, n: int, m: int, k: int, megabytes: float, set_workspace: Any
) -> None:
    """Similarities are multiples of ¼, exact, and tie: order and ranks must be the definition's own."""
    set_workspace(workspace(backend, megabytes))
    generator = torch.Generator().manual_seed(n * 100 + m)
    image, text = (torch.randint(0, 2, (rows, 4), generator=generator) * 2.0 - 1 for rows in (n, m))
    image_ids, text_ids = data.draw(id_pairs(n, m))
    mask, sim, positive = torch.ones(m, 4), image @ text.T / 4, image_ids[:, None] == text_ids
    for per, scores, right in (("text", sim.T, positive.T), ("image", sim, positive)):
        values, indices = sk.masked_topk(image, text, mask, k, per=per, backend=backend)  # type: ignore[arg-type]
        expected = reference.topk(scores, k)
        assert torch.equal(values, expected[0]) and torch.equal(indices, expected[1])
        ids: dict[str, Any] = {"image_ids": image_ids, "text_ids": text_ids, "per": per, "backend": backend}
        for given_mask in (None, mask):
            assert torch.equal(sk.retrieval_ranks(image, text, given_mask, **ids), reference.ranks(scores, right))


@profile
@given(inputs=problems(), seed=st.integers(0, 1000))
def test_the_order_of_rows_does_not_matter(backend: str, inputs: testing.Inputs, seed: int) -> None:
    """Shuffled images and texts give the shuffled losses."""
    takes(backend, inputs)
    inputs = replace(inputs, wanted=())
    generator = torch.Generator().manual_seed(seed)
    i, j = (torch.randperm(len(x), generator=generator) for x in (inputs.image, inputs.text))
    assert inputs.image_ids is not None and inputs.text_ids is not None
    shuffled = replace(
        inputs,
        image=inputs.image[i],
        text=inputs.text[j],
        mask=None if inputs.mask is None else inputs.mask[j],
        image_ids=inputs.image_ids[i],
        text_ids=inputs.text_ids[j],
        ignore_ids=None if inputs.ignore_ids is None else (inputs.ignore_ids[0][i], inputs.ignore_ids[1][j]),
    )
    before, after = (testing.evaluate(x, testing.fused_loss(backend), "none").values for x in (inputs, shuffled))
    for name, order in (("loss_row", i), ("loss_column", j), ("loss", i)):
        if name in before:
            torch.testing.assert_close(after[name], before[name][order], rtol=1e-5, atol=2e-4)
