"""Which backend runs, and with how much workspace."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import smartclip_kernels as sk
from smartclip_kernels import backends, reference, testing
from smartclip_kernels.backends import cpu
from smartclip_kernels.ops import kernels
from tests.simulated import NOT_SIMULATED, SIMULATED

CPU = torch.device("cpu")


def test_the_default_is_the_fused_one() -> None:
    assert [name for name in sk.available_backends() if name not in SIMULATED] == ["cpu", "reference"]
    assert backends.resolve("", CPU).name == "cpu"


def test_use_backend_nests_and_ends() -> None:
    with sk.use_backend("reference"):
        assert backends.resolve("", CPU).name == "reference"
        with sk.use_backend("cpu"):
            assert backends.resolve("", CPU).name == "cpu"
        assert backends.resolve("", CPU).name == "reference"
        assert backends.resolve("cpu", CPU).name == "cpu"  # a name in the call goes before the context
    assert backends.resolve("", CPU).name == "cpu"


def test_use_backend_ends_when_its_block_raises() -> None:
    with pytest.raises(KeyError), sk.use_backend("reference"):
        raise KeyError
    assert backends.resolve("", CPU).name == "cpu"


def test_use_backend_is_for_its_thread_only() -> None:
    seen = []
    with sk.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.resolve("", CPU).name))
        thread.start()
        thread.join()
    assert seen == ["cpu"]


def test_the_forward_pass_decides_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = testing.make_inputs(20)
    image = inputs.image.requires_grad_()
    with sk.use_backend("reference"):
        loss = sk.clip_loss(image, inputs.text, 3.0)

    def refuse(*_: Any) -> None:
        raise AssertionError("the cpu backend ran")

    monkeypatch.setattr(cpu.CpuBackend, "loss_backward", refuse)
    loss.backward()
    assert image.grad is not None


@pytest.mark.parametrize("name", ["tpu", "", 3])
def test_unknown_names(name: Any) -> None:
    x = torch.eye(4)
    message = r"backend: got .*, needs one of 'cpu', 'cuda', 'triton', 'reference'"
    with pytest.raises(ValueError, match=message):
        sk.clip_loss(x, x, 1.0, backend=name)
    with pytest.raises(ValueError, match=message), sk.use_backend(name):
        pass


def test_the_environment_chooses(run_python: Any) -> None:
    code = "import torch\nfrom smartclip_kernels import backends\nprint(backends.resolve('', torch.device('cpu')).name)"
    assert run_python(code).stdout.strip() == "cpu"
    assert run_python(code, SMARTCLIP_BACKEND="reference").stdout.strip() == "reference"


WITHOUT_MODULE = """
import sys, warnings
sys.modules["smartclip_kernels._C"] = None  # as if it had not been built
import torch, smartclip_kernels as sk
x = torch.eye(4)
"""


def test_without_the_compiled_module(run_python: Any) -> None:
    """A named backend raises with the remedy; unnamed, the reference runs and says so."""
    result = run_python(
        WITHOUT_MODULE + "print(sk.available_backends()); sk.clip_loss(x, x, 1.0, backend='cpu')", **NOT_SIMULATED
    )
    assert result.stdout.strip() == "['reference']"  # of those that need no variable in the environment
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: backend: 'cpu' is not available") and "install" in last
    result = run_python(WITHOUT_MODULE + "print(float(sk.clip_loss(x, x, 1.0)))", **NOT_SIMULATED)
    assert result.returncode == 0
    assert "RuntimeWarning" in result.stderr and "smartclip_kernels.info" in result.stderr
    quiet = run_python(WITHOUT_MODULE + "warnings.simplefilter('error'); sk.clip_loss(x, x, 1.0, backend='reference')")
    assert quiet.returncode == 0, quiet.stderr


def test_workspace(set_workspace: Callable[[float | None], None]) -> None:
    assert backends.workspace_bytes(CPU) == 64 * 2**20
    set_workspace(1.5)
    assert backends.workspace_bytes(CPU) == 3 * 2**19
    set_workspace(None)
    assert backends.workspace_bytes(CPU) == 64 * 2**20


def test_workspace_from_the_environment(run_python: Any) -> None:
    code = "import torch\nfrom smartclip_kernels import backends\nprint(backends.workspace_bytes(torch.device('cpu')))"
    assert run_python(code, SMARTCLIP_WORKSPACE_MB="7").stdout.strip() == str(7 * 2**20)


def test_products_are_kept_only_where_they_fit(set_workspace: Callable[[float | None], None]) -> None:
    x = torch.randn(64, 8)
    arguments = (x, x, None, torch.tensor(1.0), None, None, None, None, None, "softmax", 0.0, "cpu")
    needed = 64 * 64 * 4
    assert torch.ops.smartclip.loss(*arguments, 2 * needed)[4].shape == (1, 64, 64)
    assert torch.ops.smartclip.loss(*arguments, 2 * needed - 2)[4].numel() == 0


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "smartclip":
            with self:
                return getattr(kernels, "_" + func.__name__.split(".")[0])(*args, **(kwargs or {}))
        self.count += func.__name__.split(".")[0] in ("mm", "addmm", "addmm_")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("objective", "megabytes", "expected"),
    [("softmax", 64, (3, 0)), ("softmax", 0.03, (1, 3)), ("sigmoid", 64, (3, 0)), ("sigmoid", 0.03, (3, 0))],
)
def test_gradients_are_made_with_the_loss_where_no_product_is_made_twice(
    objective: str, megabytes: float, expected: tuple[int, int], set_workspace: Callable[[float | None], None]
) -> None:
    """Products forward and backward. In 0.03 MiB one tile of all scores has room, but not twice."""
    set_workspace(megabytes)
    loss_of = sk.clip_loss if objective == "softmax" else sk.siglip_loss
    x, y = (torch.randn(64, 8, requires_grad=True) for _ in range(2))
    with Products() as products:
        loss = loss_of(x, y, 5.0, backend="cpu")
        forward, products.count = products.count, 0
        loss.backward()
        assert (forward, products.count) == expected
        products.count = 0
        with torch.no_grad():
            loss_of(x, y, 5.0, backend="cpu")
        assert products.count == 1


def test_a_reduction_without_its_shares_is_refused() -> None:
    one = torch.ones(9)
    side = {"size": 1, "statistics": one.data_ptr(), "loss": one.data_ptr()}
    launch = cpu.compiled().LaunchFloat32(
        similarity="dot", objective="softmax", row=side, column=side, scale=one.data_ptr(), threads=1
    )
    with pytest.raises(ValueError, match="needs a share for each side that has losses"):
        launch.loss([0.5], True, False, one.data_ptr(), one.data_ptr())
    with pytest.raises(ValueError, match="weights is null"):
        launch.loss([0.5, 0.5], True, False, one.data_ptr())
    with pytest.raises(ValueError, match="id is given for one side only"):
        cpu.compiled().LaunchFloat32(
            similarity="dot",
            objective="softmax",
            row=side | {"id": one.data_ptr()},
            column=side,
            scale=one.data_ptr(),
            threads=1,
        )


def test_traits_of_objectives_are_those_of_the_compiled_code() -> None:
    """Each objective is written down twice; what the order of work asks of it must be the same in both."""
    compiled = cpu.compiled()
    number = torch.ones(1)
    for name, traits in reference.OBJECTIVES.items():
        side = {"size": 1}
        launch = compiled.LaunchFloat32(
            similarity="dot", objective=name, row=side, column=side, scale=number.data_ptr(), threads=1
        )
        assert launch.statistics_planes == traits.statistics
        assert launch.anchor_planes == traits.anchor
        assert launch.needs_statistics == traits.needs_statistics
        assert launch.both_sides == traits.both_sides
