"""Memory beyond inputs and gradients, as the process takes it."""

from __future__ import annotations

from typing import Any

import pytest

N, D = 12_288, 64
STATISTICS = 64 * 2 * N
SLACK = 32 * 2**20

CODE = """
import sys, torch
import smartclip_kernels as sk
kind, n, d, dtype = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), getattr(torch, sys.argv[4])
backend = sys.argv[5]
torch.set_num_threads(2)

def peak(reset=False):
    if reset:
        open("/proc/self/clear_refs", "w").write("5")
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024

def step(image, text, mask):
    if kind == "clip":
        loss = sk.clip_loss(image, text, 10.0, backend=backend)
    elif kind == "prefixes":
        loss = sk.clip_loss(image, text, 10.0, dims=(8, 16, 32, d), backend=backend)
    elif kind == "siglip":
        loss = sk.siglip_loss(image, text, 10.0, -10.0, backend=backend)
    elif kind == "smartclip":
        loss = sk.smartclip_loss(image, text, mask, 10.0, backend=backend)
    elif kind == "topk":
        sk.masked_topk(image.detach(), text.detach(), mask.detach(), 5, backend=backend)
        return
    else:
        sk.retrieval_ranks(image.detach(), text.detach(), backend=backend)
        return
    torch.autograd.grad(loss, (image, text) + ((mask,) if kind == "smartclip" else ()))

def inputs(n):
    return [torch.rand(n, d).to(dtype).requires_grad_() for _ in range(3)]

step(*inputs(64))  # what the first call of anything loads
x = inputs(n)
before = peak(reset=True)
step(*x)
print(peak() - before)
"""


def beyond(run_python: Any, kind: str, dtype: str = "float32", backend: str = "cpu", n: int = N) -> int:
    """Bytes at the peak, beyond the inputs; gradients not yet taken off."""
    result = run_python(CODE, kind, str(n), str(D), dtype, backend)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


@pytest.mark.parametrize("kind", ["clip", "siglip", "smartclip", "topk", "ranks"])
def test_memory_is_linear(run_python: Any, kind: str) -> None:
    """The N×M scores alone would take 576 MiB."""
    gradients = {"clip": 2, "siglip": 2, "smartclip": 3}.get(kind, 0) * N * D * 4
    assert beyond(run_python, kind) - gradients <= 64 * 2**20 + STATISTICS + SLACK


def test_prefixes_add_statistics_alone(run_python: Any) -> None:
    assert beyond(run_python, "prefixes") - 2 * N * D * 4 <= 64 * 2**20 + 4 * STATISTICS + SLACK


@pytest.mark.parametrize("kind", ["clip", "smartclip"])
def test_half_precision_adds_an_accumulator(run_python: Any, kind: str) -> None:
    """One float32 tensor for each gradient of the text's side, besides the gradients themselves."""
    columns = 1 if kind == "clip" else 2
    gradients = (columns + 1) * N * D * 2 + columns * N * D * 4
    assert beyond(run_python, kind, "bfloat16") - gradients <= 64 * 2**20 + STATISTICS + SLACK


def test_the_measure_sees_a_matrix(run_python: Any) -> None:
    """It can fail: the reference holds N×M scores."""
    n = 4096
    assert beyond(run_python, "clip", backend="reference", n=n) > n * n * 4
