"""Same inputs, threads and workspace: same bits, forward and backward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import smartclip_kernels as sk
from smartclip_kernels import testing
from smartclip_kernels.testing import make_inputs
from tests.simulated import SIMULATED

SMALL = (260, 190)  # several tiles of a simulated GPU, which is slow


def run(inputs: testing.Inputs, backend: str, reduction: str = "mean") -> dict[str, torch.Tensor]:
    return testing.evaluate(inputs, testing.fused_loss(backend), reduction).values


@pytest.mark.parametrize("similarity", ["dot", "masked_cosine"])
@pytest.mark.parametrize("objective", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_losses(backend: str, similarity: Any, objective: str, dtype: torch.dtype, reduction: str) -> None:
    n, m = SMALL if backend in SIMULATED else (1100, 900)
    inputs = make_inputs(n, m, 48, similarity=similarity, objective=objective, dtype=dtype, bias=0.5, ignore=True)
    first = run(inputs, backend, reduction)
    for seed in range(3):
        run(make_inputs(300 + seed, 200, 64, seed=seed), backend)  # other work, which leaves other memory behind
        # Other addresses, of another alignment.
        moved = torch.cat([torch.zeros(1 + seed, dtype=dtype), inputs.image.reshape(-1)])[1 + seed :].view(n, 48)
        again = run(replace(inputs, image=moved), backend, reduction)
        for name, value in first.items():
            assert torch.equal(again[name], value), name


def test_retrieval(backend: str) -> None:
    inputs = make_inputs(*(SMALL if backend in SIMULATED else (1100, 900)), 48, similarity="masked_cosine", mask="soft")
    image, text, mask = inputs.image, inputs.text, inputs.mask
    assert mask is not None
    sim = sk.masked_similarity(image, text, mask, backend=backend)
    values, indices = sk.masked_topk(image, text, mask, 10, backend=backend)
    for _ in range(3):
        assert torch.equal(sk.masked_similarity(image, text, mask, backend=backend), sim)
        again = sk.masked_topk(image, text, mask, 10, backend=backend)
        assert torch.equal(again[0], values) and torch.equal(again[1], indices)


@pytest.mark.parametrize("objective", ["softmax", "sigmoid"])
def test_across_processes(backend: str, objective: str, run_python: Any) -> None:
    code = """
import sys, hashlib, torch
from smartclip_kernels import testing
backend, objective = sys.argv[1:]
inputs = testing.make_inputs(700, 650, 48, similarity="masked_cosine", objective=objective)
values = testing.evaluate(inputs, testing.fused_loss(backend)).values
print(hashlib.sha256(b"".join(v.numpy().tobytes() for v in values.values())).hexdigest())
"""
    results = [run_python(code, backend, objective) for _ in range(2)]
    assert all(r.returncode == 0 for r in results), results[0].stderr
    assert len(results[0].stdout.strip()) == 64
    assert results[0].stdout == results[1].stdout
