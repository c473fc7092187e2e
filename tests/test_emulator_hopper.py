"""The emulator's engines of sm_90a: boxes, mbarriers, products of warpgroups. What each does, and every planted fault.

Layouts are stated once more here, as the PTX ISA manual has them, in numpy.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.emulator import build
from tests.emulator.micro import Micro

HOPPER = build.EMULATOR / "micro_hopper.cu"
ORDERS = ["", "order=reverse", "order=random,copies=random,seed=1", "order=random,copies=random,seed=2",
          "copies=earliest"]  # fmt: skip
COLUMNS = [64, 128, 256]
ELEMENTS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
(NONE, NO_FENCE, NO_BEGIN, NO_WAIT, WRONG_SWIZZLE, DIVIDED, EARLY_RELEASE, WRONG_PARITY, TOO_FEW_BYTES, TOO_MANY_BYTES,
 BARRIER_NO_FENCE, TOO_MANY_REGISTERS, WRONG_COUNT, ARRIVE_TWICE) = range(14)  # fmt: skip

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no g++")


@pytest.fixture(scope="module")
def micro() -> Micro:
    return Micro(build.build([HOPPER], "micro_hopper"))


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda options: monkeypatch.setenv("SMARTCLIP_EMULATOR", options)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- boxes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ORDERS)
@pytest.mark.parametrize(("row", "depth"), [(0, 0), (64, 64), (70, 8), (-3, -5), (90, 120), (300, 0)])
def test_a_box_is_swizzled_and_zero_beyond_the_matrix(
    micro: Micro, choose: Callable[[str], None], options: str, row: int, depth: int
) -> None:
    """PTX ISA, "Tensor swizzling modes": chunk k of 16 bytes of a row of 128 is at k ^ (row % 8)."""
    choose(options)
    rows, deep, stride = 100, 130, 136
    matrix = random(rows, stride, dtype=torch.bfloat16)
    place = torch.tensor([row, depth], dtype=torch.int32)
    out = micro("box", [matrix, place], torch.empty(64 * 128, dtype=torch.uint8), [rows, deep, stride, 64 * 128])
    wide = np.zeros((rows + 1000, 1000), np.int16)
    wide[500 : 500 + rows, 500 : 500 + deep] = matrix[:, :deep].contiguous().view(torch.int16).numpy()
    expected = wide[500 + row : 564 + row, 500 + depth : 564 + depth].reshape(64, 8, 8)
    chunks = np.arange(8)[None, :] ^ (np.arange(64)[:, None] % 8)
    swizzled = np.take_along_axis(expected, chunks[:, :, None], axis=1)
    assert np.array_equal(out.numpy().view(np.int16).reshape(64, 8, 8), swizzled)


@pytest.mark.parametrize(
    ("bytes_", "error"), [(64 * 128 - 16, "nobody can go on"), (64 * 128 + 16, "nobody can go on")]
)
def test_a_barrier_counts_bytes(micro: Micro, bytes_: int, error: str) -> None:
    matrix, place = random(64, 64, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="nobody can go on"):
        micro("box", [matrix, place], torch.empty(64 * 128, dtype=torch.uint8), [64, 64, 64, bytes_])


@pytest.mark.parametrize("stride", [68, 63])
def test_a_matrix_whose_rows_are_not_aligned_has_no_map(micro: Micro, stride: int) -> None:
    matrix, place = random(64, 80, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="cuTensorMapEncodeTiled"):
        micro("box", [matrix, place], torch.empty(64 * 128, dtype=torch.uint8), [64, 60, stride, 64 * 128])


# --- products --------------------------------------------------------------------------------------------------------


def cut(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """float32, towards zero."""
    near = x.astype(np.float32)
    return np.where(np.abs(near.astype(np.float64)) > np.abs(x), np.nextafter(near, np.float32(0)), near)


def expected_product(rows: Tensor, columns: Tensor, start: Tensor | None) -> np.ndarray[Any, Any]:
    a, b = rows.double().numpy(), columns.double().numpy()
    total = np.zeros((a.shape[0], b.shape[0]), np.float32) if start is None else start.numpy()
    for k in range(0, a.shape[1], 8):
        exact = total.astype(np.float64)
        for step in range(k, k + 8):
            exact = exact + a[:, step, None] * b[None, :, step]
        total = cut(exact)
    return total


def run_product(micro: Micro, columns: int, element: str, steps: int, add: bool, fault: int = NONE) -> tuple[Any, Any]:
    dtype = ELEMENTS[element]
    a, b = random(64, 64 * steps, dtype=dtype), random(columns, 64 * steps, dtype=dtype, seed=1)
    start = random(64, columns, seed=2)
    out = micro(f"product_{element}_{columns}", [a, b, start], torch.empty(64, columns), [steps, add, fault])
    return out.numpy(), expected_product(a, b, start if add else None)


@pytest.mark.parametrize("options", ORDERS)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("element", ELEMENTS)
def test_a_product(
    micro: Micro, choose: Callable[[str], None], element: str, columns: int, add: bool, options: str
) -> None:
    choose(options)
    found, expected = run_product(micro, columns, element, 2, add)
    assert np.array_equal(found, expected)


PRODUCT_FAULTS = {
    NO_FENCE: "without a fence_async",
    NO_BEGIN: "no begin_products",
    NO_WAIT: "products of warpgroup 0 were waited for",
    DIVIDED: "the warpgroup is divided",
}


@pytest.mark.parametrize("fault", PRODUCT_FAULTS)
def test_faults_of_a_product_are_told(micro: Micro, fault: int) -> None:
    with pytest.raises(RuntimeError, match=PRODUCT_FAULTS[fault]):
        run_product(micro, 64, "bfloat16", 1, False, fault)


def test_a_wrong_swizzle_gives_wrong_numbers(micro: Micro) -> None:
    found, expected = run_product(micro, 64, "bfloat16", 1, False, WRONG_SWIZZLE)
    assert not np.allclose(found, expected, rtol=0.1)


# --- a ring of stages ------------------------------------------------------------------------------------------------


def run_ring(micro: Micro, steps: int, fault: int = NONE) -> tuple[Any, Any]:
    a, b = (random(64, 64 * steps, dtype=torch.bfloat16, seed=seed) for seed in (3, 4))
    out = micro("ring", [a, b], torch.empty(64, 64), [steps, 0, fault], blocks=2)
    return out.numpy(), expected_product(a, b, None)


@pytest.mark.parametrize("options", ORDERS)
def test_a_ring_of_stages(micro: Micro, choose: Callable[[str], None], options: str) -> None:
    choose(options)
    found, expected = run_ring(micro, 5)
    assert np.array_equal(found, expected)


RING_FAULTS = {
    TOO_FEW_BYTES: "nobody can go on|bytes had come",
    TOO_MANY_BYTES: "nobody can go on",
    BARRIER_NO_FENCE: "does not know the barrier",
    TOO_MANY_REGISTERS: r"nobody can go on: warps 0-3: lanes 0-31 wait in set_registers",
    WRONG_COUNT: "sync_threads .*others wait for",
    ARRIVE_TWICE: "more arrivals than|nobody can go on",
}


@pytest.mark.parametrize("fault", RING_FAULTS)
def test_faults_of_a_ring_are_told(micro: Micro, fault: int) -> None:
    with pytest.raises(RuntimeError, match=RING_FAULTS[fault]):
        run_ring(micro, 5, fault)


@pytest.mark.parametrize("fault", [EARLY_RELEASE, WRONG_PARITY])
def test_faults_of_a_ring_that_give_wrong_numbers(micro: Micro, choose: Callable[[str], None], fault: int) -> None:
    """In some order that the machine may choose: engines as late as they can, or as early."""
    seen = False
    for options in ORDERS:
        choose(options)
        try:
            found, expected = run_ring(micro, 5, fault)
        except RuntimeError:
            seen = True
        else:
            seen |= not np.array_equal(found, expected, equal_nan=True)
    assert seen


def test_a_deadlock_is_told_as_who_waits_for_what(micro: Micro) -> None:
    with pytest.raises(RuntimeError, match=r"warps 0-3: lanes 0-31 wait in wait_for \(micro_hopper.cu:\d+\)"):
        run_ring(micro, 5, TOO_MANY_BYTES)


@pytest.mark.slow
def test_the_kernels_compile_for_a_device(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    target = ["-gencode", "arch=compute_90a,code=sm_90a", "-cubin"]
    command = ["nvcc", "-std=c++17", *target, f"-I{build.CSRC / 'cuda'}", f"-I{build.CSRC}", str(HOPPER)]
    subprocess.run([*command, "-o", str(tmp_path / "micro.cubin")], check=True)


# --- a device --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which("nvcc") is None or not torch.cuda.is_available(), reason="needs nvcc and a GPU")
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("element", ELEMENTS)
def test_a_device_gives_the_same_products(device_micro: Micro, element: str, columns: int) -> None:
    """Also how its matrix unit cuts sums off."""
    found, expected = run_product(device_micro, columns, element, 2, True)
    assert np.array_equal(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which("nvcc") is None or not torch.cuda.is_available(), reason="needs nvcc and a GPU")
def test_a_device_gives_the_same_ring_and_boxes(device_micro: Micro, choose: Callable[[str], None]) -> None:
    found, expected = run_ring(device_micro, 5)
    assert np.array_equal(found, expected)
    for row, depth in ((0, 0), (70, 8), (-3, -5)):
        test_a_box_is_swizzled_and_zero_beyond_the_matrix(device_micro, choose, "", row, depth)


@pytest.fixture(scope="module")
def device_micro(tmp_path_factory: pytest.TempPathFactory) -> Micro:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("compute capability 9.0 alone has these instructions")
    library = tmp_path_factory.mktemp("hopper") / "micro.so"
    target = ["-gencode", "arch=compute_90a,code=sm_90a", "-shared", "-Xcompiler", "-fPIC"]
    command = ["nvcc", "-std=c++17", *target, f"-I{build.CSRC / 'cuda'}", f"-I{build.CSRC}", str(HOPPER)]
    subprocess.run([*command, "-o", str(library)], check=True)
    return Micro(library, "cuda")
