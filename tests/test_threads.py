"""Cores: as many as torch says, one OpenMP runtime, several callers at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from smartclip_kernels import testing

compiled = pytest.importorskip("smartclip_kernels._C", reason="the compiled backend was not built")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_one_openmp_runtime_is_mapped(run_python: Any) -> None:
    """torch's own, and the kernels call that one."""
    code = """
import torch, smartclip_kernels as sk
from smartclip_kernels import _C
x = torch.randn(300, 16, requires_grad=True)
sk.clip_loss(x, x.detach(), 1.0, backend="cpu").backward()
paths = {line.split()[-1] for line in open("/proc/self/maps")}
runtimes = {p for p in paths if any(name in p.rsplit("/", 1)[-1] for name in ("libgomp", "libomp", "libiomp"))}
assert len(runtimes) == 1, runtimes
assert _C.parallel_runtime() in runtimes, _C.parallel_runtime()
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_as_many_threads_as_torch_says(run_python: Any) -> None:
    """Counted in the process: one thread starts no other, three start two and no pool of their own besides."""
    code = """
import os, torch
torch.set_num_threads(1)
import smartclip_kernels as sk
image, text = torch.randn(3000, 32, requires_grad=True), torch.randn(3000, 32)
counts = [len(os.listdir("/proc/self/task"))]
for threads in (1, 3):
    torch.set_num_threads(threads)
    sk.clip_loss(image, text, 1.0, backend="cpu").backward()
    counts.append(len(os.listdir("/proc/self/task")))
before, one, three = counts
assert (one, three) == (before, before + 2), counts
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("similarity", ["dot", "masked_cosine"])
@pytest.mark.parametrize("objective", ["softmax", "sigmoid"])
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads(similarity: Any, objective: str, threads: int) -> None:
    """More than there are cores, rows or columns; none of the work is lost or done twice."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for n, m in ((1, 5), (5, 1), (6, 130), (150, 90)):
            inputs = testing.make_inputs(n, m, 24, similarity=similarity, objective=objective, ids=True, bias=0.0)
            testing.check_loss(inputs, backend="cpu")
    finally:
        torch.set_num_threads(before)


def test_callers_at_once_get_their_own_bits() -> None:
    sides = ("dot", "masked_cosine")
    batches = [testing.make_inputs(400, 300, 32, similarity=s, seed=i) for i in range(4) for s in sides]  # type: ignore[arg-type]

    def run(inputs: testing.Inputs) -> dict[str, torch.Tensor]:
        return testing.evaluate(inputs, testing.fused_loss("cpu")).values

    alone = [run(inputs) for inputs in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, batches * 3))
    for i, values in enumerate(together):
        for name, value in alone[i % len(batches)].items():
            assert torch.equal(values[name], value), name


def test_the_launch_refuses_what_cannot_be() -> None:
    """Sizes, alignment and nulls are checked where addresses come in."""
    number, ids = torch.ones(8), torch.zeros(8, dtype=torch.int32)

    def launch(**changes: Any) -> Any:
        side = {"size": 4, "id": ids.data_ptr(), "statistics": number.data_ptr(), "anchor": number.data_ptr()}
        arguments: dict[str, Any] = {
            "similarity": "dot",
            "objective": "softmax",
            "row": side,
            "column": side,
            "scale": number.data_ptr(),
            "threads": 1,
        }
        return compiled.LaunchFloat32(**(arguments | changes))

    tile = [number.data_ptr()]
    for changes, message in (
        ({"threads": 0}, "threads"),
        ({"objective": "hinge"}, "no kernel for dot and hinge"),
        ({"similarity": "masked_cosine"}, "factor is null"),
        ({"row": {"size": 0}}, "no rows"),
        ({"scale": 0}, "scale is null"),
        ({"scale": number.data_ptr() + 1}, "not aligned"),
    ):
        with pytest.raises(ValueError, match=message):
            launch(**changes)
    for box, stride, message in (
        ((0, 5, 0, 4), 4, "outside"),
        ((-1, 1, 0, 4), 4, "outside"),
        ((0, 0, 0, 4), 4, "outside"),
        ((0, 4, 1, 4), 4, "outside"),
        ((0, 4, 0, 4), 3, "stride"),
    ):
        with pytest.raises(ValueError, match=message):
            launch().statistics(box, tile, stride)
    with pytest.raises(ValueError, match="number of accumulators"):
        launch().statistics((0, 4, 0, 4), tile * 2, 4)
    with pytest.raises(ValueError, match="accumulator is null"):
        launch().statistics((0, 4, 0, 4), [0], 4)
    with pytest.raises(ValueError, match="parameter_gradient is null"):
        launch().gradient((0, 4, 0, 4), tile, 4, tile, 4, False)
