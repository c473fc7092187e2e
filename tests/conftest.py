"""What every test file uses: the backends that run here, a workspace for one test, poisoned memory, subprocesses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.simulated import SIMULATED, simulate

# Compiled graphs of an earlier checkout would be taken for this one: their key holds the names of our ops, not shapes.
os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"

if not torch.cuda.is_available():
    simulate()

import smartclip_kernels as sk
from smartclip_kernels.backends import cuda

BACKENDS = sk.available_backends()

Run = Callable[..., "subprocess.CompletedProcess[str]"]


OLDER = pytest.param("cuda", id="cuda_sm_80", marks=pytest.mark.architecture("sm_80"))
HALVES = (torch.float16, torch.bfloat16)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "architecture(name): whose CUDA kernels run, where it is not the newest's")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every backend; cuda a second time, with the kernels that are not a default here."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", [*BACKENDS, *([OLDER] if "cuda" in BACKENDS else [])])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Simulated GPUs are slow, and float16 takes bfloat16's way: outside of the grid it is for `make test-all`.

    float32 has the same kernels on every architecture, and is tested once.
    """
    same = []
    for item in items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        half = torch.float16 in parameters.values() and not item.name.startswith("test_grid")
        large = parameters.get("backend") == "triton" and item.name.startswith("test_sums_that_half_precision")
        if (parameters.get("backend") in SIMULATED and half) or large:
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("architecture") and not any(half in parameters.values() for half in HALVES):
            same.append(item)
    excluded = {id(item) for item in same}
    items[:] = [item for item in items if id(item) not in excluded]


@pytest.fixture(autouse=True)
def architecture_of_the_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if marker := request.node.get_closest_marker("architecture"):
        monkeypatch.setattr(cuda, "ARCHITECTURE", marker.args[0])


@pytest.fixture(autouse=True)
def only_dtypes_that_there_are(request: pytest.FixtureRequest) -> None:
    callspec = getattr(request.node, "callspec", None)
    parameters = {} if callspec is None else callspec.params
    if parameters.get("backend") in SIMULATED and torch.float64 in parameters.values():
        pytest.skip("float64 is for the CPU and reference backends")


@pytest.fixture
def set_workspace() -> Iterator[Callable[[float], None]]:
    """`sk.set_workspace` for one test."""
    yield sk.set_workspace
    sk.set_workspace(None)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory from `torch.empty` arrives full of NaN: whoever leaves an output or a buffer unwritten is found out."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def run_python() -> Run:
    """Run a piece of Python in a process of its own, with `environment` on top of ours (None takes a variable away)."""

    def run(
        code: str, *arguments: str, timeout: float = 300, **environment: str | None
    ) -> subprocess.CompletedProcess[str]:
        merged = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, env=merged, capture_output=True, text=True, timeout=timeout, check=False)

    return run
