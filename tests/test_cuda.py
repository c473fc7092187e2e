"""What only the CUDA backend has. Its accuracy is tested with the others': by the emulator, and on a device if any."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import smartclip_kernels as sk
from bench import cuda_ahead
from smartclip_kernels import backends, ops, reference, testing
from smartclip_kernels.backends import cpu, cuda
from smartclip_kernels.problem import Problem
from smartclip_kernels.testing import check_loss, make_inputs
from tests.emulator import build
from tests.emulator.kernels import changed_kernels
from tests.simulated import NOT_SIMULATED

emulated = pytest.mark.skipif("cuda" not in sk.available_backends(), reason="no g++ to build the emulator with")


def has_kernels() -> bool:
    try:
        return hasattr(cpu.compiled(), "cuda")
    except ImportError:
        return False


@emulated
def test_traits_of_objectives_are_those_of_the_compiled_code() -> None:
    number = torch.ones(1)
    for name, traits in reference.OBJECTIVES.items():
        side = {"size": 1}
        launch = cuda.compiled().Launch(
            architecture="sm_80", element="float32", similarity="dot", objective=name, row=side, column=side,
            scale=number.data_ptr(), multiprocessors=1,
        )  # fmt: skip
        assert launch.statistics_planes == traits.statistics
        assert launch.anchor_planes == traits.anchor
        assert launch.needs_statistics == traits.needs_statistics
        assert launch.both_sides == traits.both_sides


@emulated
@pytest.mark.parametrize("order", ["order=reverse", "order=random,seed=1", "copies=earliest", "copies=random,seed=2"])
@pytest.mark.parametrize("similarity", ["dot", "masked_cosine"])
@pytest.mark.parametrize("objective", ["softmax", "sigmoid"])
@pytest.mark.parametrize("architecture", cuda.ARCHITECTURES)
def test_no_order_of_the_machine_shows(
    architecture: str,
    order: str,
    similarity: Any,
    objective: str,
    monkeypatch: pytest.MonkeyPatch,
    poisoned: None,
) -> None:
    """Blocks, warps and engines run in whatever order: the same bits."""
    monkeypatch.setattr(cuda, "ARCHITECTURE", architecture)
    inputs = make_inputs(140, 150, 72, similarity=similarity, objective=objective, dtype=torch.bfloat16, ids=True)
    monkeypatch.setenv("SMARTCLIP_EMULATOR", "")
    expected = testing.evaluate(inputs, testing.fused_loss("cuda")).values
    monkeypatch.setenv("SMARTCLIP_EMULATOR", order)
    for name, value in testing.evaluate(inputs, testing.fused_loss("cuda")).values.items():
        assert torch.equal(value, expected[name]), name


@emulated
@pytest.mark.parametrize("similarity", ["dot", "masked_cosine"])
@pytest.mark.parametrize("objective", ["softmax", "sigmoid"])
def test_tf32_is_multiplied_as_such_and_only_when_asked_for(
    similarity: Any, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operands have ten digits then: wrong by 2⁻¹¹ or so, and right to float32 for features that have no more."""
    inputs = make_inputs(140, 150, 72, similarity=similarity, objective=objective)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    if similarity == "dot":
        image, text = ((x * 2**6).round() / 2**6 for x in (inputs.image, inputs.text))
        check_loss(replace(inputs, image=image, text=text), backend="cuda")
    got = testing.evaluate(inputs, testing.fused_loss("cuda")).values
    for name, true in testing.truth(inputs).values.items():
        off = (got[name].double() - true).abs().max() / true.abs().max()
        assert off < 0.02, f"{name}: {off}"
    with pytest.raises(AssertionError):
        check_loss(inputs, backend="cuda")


def launch_of(architecture: str, objective: str, multiprocessors: int = 1) -> Any:
    return cuda.compiled().Launch(
        architecture=architecture, element="bfloat16", similarity="dot", objective=objective, row={"size": 1},
        column={"size": 1}, scale=torch.ones(1).data_ptr(), multiprocessors=multiprocessors,
    )  # fmt: skip


@emulated
@pytest.mark.parametrize("architecture", cuda.ARCHITECTURES)
def test_walks_of_several_tiles(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One multiprocessor: a block goes over several tiles, and keeps the states of one side meanwhile."""
    monkeypatch.setattr(cuda, "_multiprocessors", lambda _: 1)
    monkeypatch.setattr(cuda, "ARCHITECTURE", architecture)
    for objective in ("softmax", "sigmoid"):
        inputs = make_inputs(300, 1700, 16, objective=objective, dtype=torch.bfloat16, bias=-1.0, ignore=True)
        launch = launch_of(architecture, objective)
        row_tiles, column_tiles = launch.tiles(300, 1700)
        of_rows, of_columns, _ = launch.slots(300, 1700, False)
        if architecture == "sm_80":
            assert row_tiles == 3 == of_columns and 1 < of_rows < column_tiles
        else:
            assert row_tiles == 3 and of_columns < 2 * row_tiles and of_rows == column_tiles
        check_loss(inputs, backend="cuda")


@emulated
@pytest.mark.parametrize("d", [1, 3, 9, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_any_length_and_stride(d: int, dtype: torch.dtype) -> None:
    """Rows that do not start at multiples of 16 bytes are copied to such, once; what lies between them is not read."""
    inputs = make_inputs(40, 30, d, dtype=dtype)
    wide = torch.full((40, 2 * d + 5), torch.nan, dtype=dtype)
    wide[:, 1 : d + 1] = inputs.image
    check_loss(replace(inputs, image=wide[:, 1 : d + 1]), backend="cuda")
    check_loss(make_inputs(40, 30, d, dtype=dtype, similarity="masked_cosine", mask="soft"), backend="cuda")


@emulated
def test_addresses_are_checked() -> None:
    x, scale = torch.ones(8, 8), torch.ones(1)
    side = {"size": 8}
    arguments = {
        "architecture": "sm_80",
        "element": "float32",
        "similarity": "dot",
        "objective": "softmax",
        "scale": scale.data_ptr(),
    }
    make = cuda.compiled().Launch
    launch = make(**arguments, row=side, column=side, multiprocessors=1)
    panel = ([x.data_ptr()], 8)
    box = (0, 8, 0, 8)
    with pytest.raises(ValueError, match="id is given for one side only"):
        make(**arguments, row=side | {"id": x.data_ptr()}, column=side, multiprocessors=1)
    with pytest.raises(ValueError, match="statistics or loss is null"):
        launch.gather((x.data_ptr(), 1, 8, 0, True), (x.data_ptr(), 1, 8, 0, True))
    filled = side | {"statistics": x.data_ptr(), "loss": x.data_ptr()}
    launch = make(**arguments, row=filled, column=filled, multiprocessors=1)
    whole = (x.data_ptr(), 1, 8, 0, True)
    with pytest.raises(ValueError, match="merged where they are anchors"):
        launch.gather(whole, None)
    with pytest.raises(ValueError, match="outside the side"):
        launch.gather(whole, (x.data_ptr(), 1, 9, 0, True))
    with pytest.raises(ValueError, match="by the last block to arrive"):
        launch.gather(whole, whole, "sum", 0, x.data_ptr(), x.data_ptr())
    with pytest.raises(ValueError, match="outside the scores"):
        launch.statistics((0, 9, 0, 8), 8, panel, panel, 0, x.data_ptr(), x.data_ptr())
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        launch.statistics(box, 8, ([x.data_ptr() + 4], 8), panel, 0, x.data_ptr(), x.data_ptr())
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        launch.statistics(box, 7, ([x.data_ptr()], 7), panel, 0, x.data_ptr(), x.data_ptr())
    with pytest.raises(ValueError, match="less than a row"):
        launch.statistics(box, 9, panel, panel, 0, x.data_ptr(), x.data_ptr())
    with pytest.raises(ValueError, match="no kernel for sm_80, float8"):
        make(**arguments | {"element": "float8"}, row=side, column=side, multiprocessors=1)
    with pytest.raises(ValueError, match="factor is null"):
        make(**arguments | {"similarity": "masked_cosine"}, row=side, column=side, multiprocessors=1)


@emulated
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("grad", [True, False])
def test_float64_is_refused(reduction: Any, grad: bool) -> None:
    x = torch.eye(20, dtype=torch.float64, requires_grad=grad)
    with pytest.raises(TypeError, match=r"image: got torch\.float64, needs .* on backend 'cuda'"):
        sk.clip_loss(x, x, 1.0, reduction=reduction, backend="cuda")


# On a GPU the library multiplies half precision as it is: nothing is widened.
NO_LAUNCH = {"to", "_to_copy", "empty", "new_empty", "empty_like"}
NO_LAUNCH |= {"expand", "select", "slice", "unbind", "t", "numpy_T", "permute", "view", "detach"}


class Launches(TorchDispatchMode):
    """The names of what a GPU would be sent: torch's operations that are more than a view, and the kernels."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: list[str] = []
        real = cuda.compiled()

        def make(**arguments: Any) -> Any:
            return Recorded(real.Launch(**arguments), self.names)

        monkeypatch.setattr(cuda, "compiled", lambda: SimpleNamespace(**vars(real) | {"Launch": make}))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if func.namespace == "smartclip":
            with self:
                return getattr(ops.kernels, f"_{name}")(*args, **(kwargs or {}))
        if name not in NO_LAUNCH:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class Recorded:
    def __init__(self, launch: Any, names: list[str]) -> None:
        self.launch, self.names = launch, names

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            if name != "slots":
                self.names.append(name)
            return getattr(self.launch, name)(*arguments)

        return call


@emulated
def test_how_many_launches_a_small_batch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a batch is one tile, launches are what it costs. `ones_like` is autograd's own."""
    image, text = (torch.randn(40, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    scale = torch.tensor(10.0, requires_grad=True)
    with Launches(monkeypatch) as launches:
        loss = sk.clip_loss(image, text, scale, backend="cuda")
        assert launches.names == ["statistics", "gather"]
        launches.names.clear()
        loss.backward()
        products = ["addmm_", "mul", "addmm_", "mul"]  # each times the gain, and rounded
        assert sorted(launches.names) == sorted(
            ["ones_like", "mul", "anchors", "gradient", *products, "parameter_gradient"]
        )
        launches.names.clear()
        loss = sk.siglip_loss(image, text, scale, backend="cuda")
        assert sorted(launches.names) == sorted(
            ["new_full", "anchors", "gradient", "gather", *["addmm_", "mul_"] * 2, "parameter_gradient"]
        )


@emulated
@pytest.mark.parametrize("similarity", ["dot", "masked_cosine"])
def test_products_of_float32_are_kept_where_they_fit(
    similarity: Any, monkeypatch: pytest.MonkeyPatch, set_workspace: Callable[[float], None]
) -> None:
    """Then the backward sweep has no products to make: it does not even look at the operands."""
    inputs = make_inputs(140, 261, 24, similarity=similarity, objective="softmax", ids=True, bias=-1.0)
    check_loss(inputs, backend="cuda")
    kept = testing.evaluate(inputs, testing.fused_loss("cuda")).values
    problem = Problem(inputs.image, inputs.text, inputs.mask, torch.ones(()), workspace=1 << 20)
    assert backends.load("cuda").kept_shape(problem)[0] == (1 if similarity == "dot" else 2)
    real = cuda.CudaLaunch._part

    def without_operands(self: Any, tile: Any) -> Any:
        if tile.accumulators and self.image.anchor is not None:
            nan = [tuple(torch.full_like(x, torch.nan) for x in tile[k]) for k in (2, 3)]
            tile = self.nan = tile._replace(row_operands=nan[0], column_operands=nan[1])
        return real(self, tile)

    monkeypatch.setattr(cuda.CudaLaunch, "_part", without_operands)
    for name, value in testing.evaluate(inputs, testing.fused_loss("cuda")).values.items():
        assert torch.equal(value, kept[name]), name
    monkeypatch.undo()
    set_workspace(0.2)
    for name, value in testing.evaluate(inputs, testing.fused_loss("cuda")).values.items():
        assert (value - kept[name]).abs().max() <= 1e-5 * kept[name].abs().max(), name


KEPT = """
import torch
from smartclip_kernels import backends
from smartclip_kernels.problem import Problem
from smartclip_kernels.testing import check_loss, make_inputs
for similarity in ("dot", "masked_cosine"):
    inputs = make_inputs(140, 261, 72, similarity=similarity, dtype=torch.bfloat16, ids=True, mask="soft")
    problem = Problem(inputs.image, inputs.text, inputs.mask, torch.ones(()), workspace=1 << 22)
    assert len(backends.load("cuda").kept_shape(problem)) == 3
    check_loss(inputs, backend="cuda")
print("kept")
"""


@emulated
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("family", cuda_ahead.FAMILIES)
def test_products_of_half_precision_are_kept_where_that_is_switched_on(
    family: str, tmp_path: Path, run_python: Any
) -> None:
    switch = "#define SK_KEEPS_HALF 0", "#define SK_KEEPS_HALF 1"
    module = changed_kernels(tmp_path, f"{family}/config.h", *switch)
    environment = {
        "SMARTCLIP_CUDA_EMULATOR": str(module),
        "SMARTCLIP_CUDA_ARCHITECTURE": cuda_ahead.FAMILIES[family],
        "PYTHONPATH": str(build.ROOT),
    }
    for order in ("", "copies=earliest", "order=random,copies=random,seed=1"):
        result = run_python(KEPT, SMARTCLIP_EMULATOR=order, **environment)
        assert result.stdout == "kept\n", result.stderr[-2000:]


@emulated
@pytest.mark.parametrize("objective", ["softmax", "sigmoid"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_is_reduced_over_all_parts(
    objective: str, reduction: str, set_workspace: Callable[[float], None]
) -> None:
    """By the last block of the last part: whatever the order of blocks, and where some are no anchors."""
    inputs = make_inputs(700, 1100, 8, objective=objective, dtype=torch.bfloat16, ids=True)
    set_workspace(1)
    check_loss(inputs, reduction, backend="cuda")


def test_it_is_the_default_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "triton"):
        monkeypatch.setattr(backends.load(name), "unavailable", lambda: "")
        monkeypatch.setattr(backends.load(name), "runs_on", lambda device: device == "cuda")
    assert backends.default("cuda") == "cuda"
    assert backends.default("cpu") == "cpu"


def test_without_a_gpu_it_says_why(run_python: Any) -> None:
    code = "import smartclip_kernels as sk, torch\nx = torch.eye(4)\nsk.clip_loss(x, x, 1.0, backend='cuda')"
    result = run_python(code, **NOT_SIMULATED, CUDA_VISIBLE_DEVICES="")
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: backend: 'cuda' is not available: ")
    assert ("sees no NVIDIA GPU" if has_kernels() else "nvcc") in last


@pytest.mark.skipif(not has_kernels(), reason="the module was built without nvcc")
@pytest.mark.skipif(cuda_ahead.find_cuobjdump() is None, reason="no cuobjdump")
def test_no_kernel_spills() -> None:
    instances = cuda_ahead.report()
    assert {x.kernel for x in instances} == set(cuda_ahead.KERNELS)
    assert {x.element for x in instances if x.threads} == set(cuda_ahead.ELEMENTS)
    assert len([x for x in instances if x.threads]) >= 4 * (4 + 4 + 2 + 1)
    assert not [repr(x) for x in instances if not x.sound]
    half = [x for x in instances if x.threads and x.element in ("bfloat16", "float16")]
    assert {x.family for x in half} == set(cuda_ahead.FAMILIES)
    assert min(x.blocks for x in half if x.family == "sm80") == 2  # one multiplies while the other is in its epilogue
    assert len([x for x in half if x.family == "sm90"]) == 2 * 2 * (4 + 4 + 1 + 2)


@emulated
def test_an_architecture_is_asked_for_by_name(run_python: Any) -> None:
    """The best one here is the default; a name that there is not, or that this GPU cannot run, is refused."""
    code = """
import torch
from smartclip_kernels.backends import cuda
for element in ("bfloat16", "float32"):
    print(cuda.architecture(torch.device("cpu"), element, "dot", "softmax"))
"""
    assert run_python(code).stdout.split() == ["sm_90a", "sm_80"]
    assert run_python(code, SMARTCLIP_CUDA_ARCHITECTURE="sm_80").stdout.split() == ["sm_80", "sm_80"]
    result = run_python(code, SMARTCLIP_CUDA_ARCHITECTURE="sm_70")
    assert "got 'sm_70', needs one of sm_80, sm_90a" in result.stderr


@emulated
def test_an_architecture_that_the_gpu_has_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_capability", lambda _: (8, 6))
    assert cuda.architecture(torch.device("cpu"), "bfloat16", "dot", "softmax") == "sm_80"
    monkeypatch.setattr(cuda, "ARCHITECTURE", "sm_90a")
    with pytest.raises(RuntimeError, match=r"this GPU has compute capability 8\.6"):
        cuda.architecture(torch.device("cpu"), "bfloat16", "dot", "softmax")
    assert cuda.architecture(torch.device("cpu"), "float32", "dot", "softmax") == "sm_80"


@emulated
def test_an_architecture_that_was_not_built_is_the_default_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_built", lambda *_: False)
    assert cuda.architecture(torch.device("cpu"), "bfloat16", "dot", "softmax") == "sm_80"
    monkeypatch.setattr(cuda, "ARCHITECTURE", "sm_90a")
    with pytest.raises(RuntimeError, match=r"its kernels were not built: .* 90a in CUDA_ARCHS"):
        cuda.architecture(torch.device("cpu"), "bfloat16", "dot", "softmax")


@emulated
@pytest.mark.parametrize("size", [1, 128, 512, 1024, 1536, 2048, 3072, 4096, 8192, 16384, 65536])
def test_walks_are_shared_out_among_the_processors(size: int) -> None:
    """Of 132: small batches have narrow tiles, a walk each; from there on two thirds or more are at work to the end."""
    launch = launch_of("sm_90a", "softmax", multiprocessors=132)
    (row_tiles, column_tiles), (of_rows, of_columns, of_all) = launch.tiles(size, size), launch.slots(size, size, False)
    walks = of_all // 2
    assert row_tiles == -(-size // 128) and of_rows == column_tiles and of_columns * column_tiles == of_all
    assert column_tiles in (-(-size // 64), -(-size // 256))
    if size <= 1024:
        assert walks == row_tiles * column_tiles == -(-size // 128) * -(-size // 64)
    else:
        assert walks / (-(-walks // 132) * 132) > 2 / 3
    if size >= 16384:
        assert walks / (-(-walks // 132) * 132) > 0.96
