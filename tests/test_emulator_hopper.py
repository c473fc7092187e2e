"""The emulator's engines of sm_90a: boxes, mbarriers, products of warpgroups. What each does, and every planted fault.

Layouts are stated once more here, as the PTX ISA manual has them, in numpy. On a device the same micro-kernels run too,
without faults, and what they give is compared with the emulator.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.emulator import build
from tests.emulator import micro as micros
from tests.emulator.micro import Micro

HOPPER = build.EMULATOR / "micro_hopper.cu"
GOLDEN = micros.GOLDEN / "hopper"
ORDERS = ["", "order=reverse", "copies=earliest", "order=random,copies=random,seed=1",
          "order=random,copies=random,seed=2", "order=random,copies=latest,seed=3"]  # fmt: skip
COLUMNS = [64, 128, 256]
ELEMENTS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
FAULTS = ["none", "no fence", "no init", "init twice", "wrong place", "overwritten", "no wait", "never wait",
          "no barrier", "wrong parity", "more arrivals", "fewer bytes", "more bytes", "wrong count", "wrong number",
          "divided", "leaves", "too many", "too few", "bad number", "no begin", "no commit", "touched before",
          "touched after", "other sums", "wrong swizzle", "overlap", "early release"]  # fmt: skip
FAULT = {name: number for number, name in enumerate(FAULTS)}

Array = NDArray[Any]
Choose = Callable[[str], None]

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no g++")
everywhere = pytest.mark.parametrize("options", ORDERS)


@pytest.fixture(scope="module")
def micro() -> Micro:
    return Micro(build.build([HOPPER], HOPPER.stem))


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Choose:
    return lambda options: monkeypatch.setenv("SMARTCLIP_EMULATOR", options)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def swizzled(rows: Array) -> Array:
    """ "Swizzling modes", 128 bytes: chunk k of 16 bytes of row r, of 64 numbers of 2 bytes, is at k ^ (r % 8)."""
    out = np.empty_like(rows)
    for r in range(len(rows)):
        for k in range(8):
            at = k ^ (r % 8)
            out[r, 8 * at : 8 * at + 8] = rows[r, 8 * k : 8 * k + 8]
    return out


# Boxes

SHAPE = (300, 130, 136)
"""Rows, depth and stride of a matrix; what lies between depth and stride must not come."""


def run_box(
    micro: Micro, row: int = 0, depth: int = 0, box_rows: int = 64, more: int = 0, late: bool = False,
    fault: str = "none", shape: tuple[int, int, int] = SHAPE, skip: int = 0,
) -> Tensor:  # fmt: skip
    matrix = random(shape[0] + 1, shape[2], dtype=torch.bfloat16).flatten()[skip:]
    details = torch.tensor([row, depth, box_rows * 128 + more, late, FAULT[fault]], dtype=torch.int32)
    out = torch.empty(max(box_rows, 0) * 128, dtype=torch.uint8)
    return micro("box", [matrix, details], out, [*shape, box_rows])


def expected_box(row: int, depth: int, box_rows: int) -> Array:
    rows, deep, stride = SHAPE
    matrix = random(rows + 1, stride, dtype=torch.bfloat16).view(torch.int16).numpy()
    wide = np.zeros((rows + 1000, deep + 1000), np.int16)
    wide[500 : 500 + rows, 500 : 500 + deep] = matrix[:rows, :deep]
    return swizzled(wide[500 + row : 500 + row + box_rows, 500 + depth : 564 + depth]).view(np.uint8).flatten()


PLACES = [(0, 0), (64, 64), (270, 8), (-3, -5), (290, 120), (400, 0), (0, 130), (-64, -64)]


@everywhere
@pytest.mark.parametrize(("row", "depth"), PLACES)
def test_a_box_is_swizzled_and_zero_beyond_the_matrix(
    micro: Micro, choose: Choose, options: str, row: int, depth: int
) -> None:
    choose(options)
    for box_rows in (64, 8, 1, 256):
        out = run_box(micro, row, depth, box_rows)
        assert np.array_equal(out.numpy(), expected_box(row, depth, box_rows))


@everywhere
def test_bytes_may_come_before_they_are_expected(micro: Micro, choose: Choose, options: str) -> None:
    choose(options)
    assert np.array_equal(run_box(micro, 5, 8, late=True).numpy(), expected_box(5, 8, 64))


@everywhere
@pytest.mark.parametrize(("more", "missing"), [(-16, -16), (16, 16), (2**19, 2**19)])
def test_a_phase_ends_with_the_bytes_that_it_expects(
    micro: Micro, choose: Choose, options: str, more: int, missing: int
) -> None:
    choose(options)
    with pytest.raises(
        RuntimeError,
        match=r"nobody can go on: warps 0: lanes 0-31 wait in wait_for \(micro_barriers\.cuh:\d+\), parity 0 of the "
        rf"barrier at byte 32768 of .*: 0 arrivals and {missing} bytes are missing",
    ):
        run_box(micro, more=more)


@pytest.mark.parametrize(
    "refused",
    [{"shape": (64, 60, 68)}, {"shape": (64, 60, 63)}, {"shape": (64, 72, 64)}, {"shape": (0, 64, 64)},
     {"box_rows": 0}, {"box_rows": 257}, {"skip": 1}],
    ids=str,
)  # fmt: skip
def test_a_map_that_the_driver_refuses(micro: Micro, refused: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="cuTensorMapEncodeTiled"):
        run_box(micro, **refused)


BOX_FAULTS = {
    "no fence": "arrive .*: the copy engine does not know the barrier: no fence_async after init_barrier",
    "no init": "arrive .*: no barrier was initialised at byte 32768",
    "init twice": "init_barrier .*: there is a barrier at byte 32768",
    "wrong place": "copy_box .*: byte 512 of .* is no multiple of 1024",
    "overwritten": "arrive .*: something else was written over the barrier at byte 32768",
    "never wait": r"it ended before a box had come that nobody waits for: copy_box \(micro_barriers\.cuh:\d+\)",
    "more arrivals": "arrive .*: more arrivals than the barrier is for: 1",
    "overlap": "copy_box .*: threads wrote to byte 0 of .* without a fence_async after it",
}


@pytest.mark.parametrize("fault", BOX_FAULTS)
def test_a_fault_of_a_box_is_named(micro: Micro, fault: str) -> None:
    with pytest.raises(RuntimeError, match=f"kernel 'box', block 0.*{BOX_FAULTS[fault]}"):
        run_box(micro, fault=fault)
    assert np.array_equal(run_box(micro).numpy(), expected_box(0, 0, 64))


def test_an_engine_that_does_not_know_its_barrier(micro: Micro) -> None:
    with pytest.raises(RuntimeError, match=r"copy_box .*: the copy engine does not know the barrier"):
        run_box(micro, late=True, fault="no fence")


def test_a_barrier_that_others_may_not_see_yet(micro: Micro, choose: Choose) -> None:
    choose("order=reverse")
    with pytest.raises(RuntimeError, match=r"lane 31.*wait_for .*: no barrier was initialised"):
        run_box(micro, fault="no barrier")


def test_a_box_comes_late(micro: Micro) -> None:
    assert (run_box(micro, fault="no wait") == 0xFF).all()


# Barriers


def run_phases(micro: Micro, fault: str = "none") -> tuple[Tensor, Tensor]:
    x = integers(7, 32)
    out = micro("phases", [x], x, [7, FAULT[fault]], blocks=2)
    return out, x[:, torch.arange(32) ^ 1]


@everywhere
def test_phases(micro: Micro, choose: Choose, options: str) -> None:
    choose(options)
    assert torch.equal(*run_phases(micro))


def differs_somewhere(choose: Choose, run: Callable[[], tuple[Any, Any]], orders: Sequence[str] = ORDERS) -> bool:
    """Whether some order shows a fault, by an error or by wrong numbers."""
    for options in orders:
        choose(options)
        try:
            found, expected = run()
        except RuntimeError:
            return True
        if not np.array_equal(np.asarray(found), np.asarray(expected)):
            return True
    return False


@pytest.mark.parametrize("fault", ["no wait", "wrong parity", "more arrivals"])
def test_a_fault_of_phases_is_seen(micro: Micro, choose: Choose, fault: str) -> None:
    assert differs_somewhere(choose, lambda: run_phases(micro, fault))


def run_named(micro: Micro, fault: str = "none") -> tuple[Tensor, Tensor]:
    x = integers(128) % 1000
    expected = x.reshape(2, 64)
    turned = [expected[half].roll(-40 * (3 + 2 * half)) + 3 + 2 * half for half in range(2)]
    turned[1][:32] += turned[0][32:]
    return micro("named", [x], x, [FAULT[fault]], blocks=2), torch.cat(turned)


@everywhere
def test_named_barriers(micro: Micro, choose: Choose, options: str) -> None:
    choose(options)
    assert torch.equal(*run_named(micro))


NAMED_FAULTS = {
    "wrong count": "sync_threads .*: (96 threads, others wait for 64|64 threads, others wait for 96)",
    "wrong number": "lane 6.*: sync_threads .*: barrier 16, needs 1 to 15",
    "bad number": "sync_threads .*: 48 threads, needs whole warps",
    "leaves": r"nobody can go on: .*wait in sync_threads \(.*\), barrier 1: 63 of 64 threads",
    "divided": "sync_threads .*: a warp is divided: .*warps 0: lanes 0-15 wait in sync_threads",
}


@pytest.mark.parametrize("fault", NAMED_FAULTS)
def test_a_fault_of_a_named_barrier_is_named(micro: Micro, fault: str) -> None:
    with pytest.raises(RuntimeError, match=NAMED_FAULTS[fault]):
        run_named(micro, fault)


def test_a_missing_named_barrier_is_seen(micro: Micro, choose: Choose) -> None:
    assert differs_somewhere(choose, lambda: run_named(micro, "no barrier"))


def run_registers(micro: Micro, fault: str = "none") -> Tensor:
    return micro("registers", [], torch.empty(384, dtype=torch.int32), [FAULT[fault]], blocks=2)


@everywhere
def test_registers(micro: Micro, choose: Choose, options: str) -> None:
    choose(options)
    assert torch.equal(run_registers(micro), torch.arange(384, dtype=torch.int32))


REGISTER_FAULTS = {
    "too many": "nobody can go on: (warps 0-3: lanes 0-31 have ended; )?warps .*: lanes 0-31 wait in take_registers",
    "too few": "(give_registers .*: 176|take_registers .*: 160) registers, the warpgroup has 168",
    "bad number": "give_registers .*: 20 registers, needs a multiple of 8 from 24 to 256",
    "divided": r"give_registers .*: the warpgroup is divided: others came to give_registers \(",
}


@everywhere
@pytest.mark.parametrize("fault", REGISTER_FAULTS)
def test_a_fault_of_registers_is_named(micro: Micro, choose: Choose, options: str, fault: str) -> None:
    choose(options)
    with pytest.raises(RuntimeError, match=REGISTER_FAULTS[fault]):
        run_registers(micro, fault)


# Products


def in_registers(sums: Array) -> Array:
    """(64, N), as (thread, N / 2): "Register fragments", matrix D of wgmma.mma_async, .m64nNk16."""
    threads, count = np.arange(128), sums.shape[1] // 2
    out = np.empty((128, count), sums.dtype)
    for i in range(count):
        row = threads // 32 * 16 + threads % 32 // 4 + (8 if i % 4 >= 2 else 0)
        column = i // 4 * 8 + threads % 4 * 2 + i % 2
        out[:, i] = sums[row, column]
    return out


def in_stages(operand: Tensor, swizzle: bool = True) -> Tensor:
    """(rows, 64 steps), as it lies in shared memory step by step."""
    steps = operand.contiguous().view(torch.int16).numpy().reshape(len(operand), -1, 64).swapaxes(0, 1)
    return torch.from_numpy(np.stack([swizzled(step) if swizzle else step for step in steps]))


def cut(x: Array) -> Array:
    """float32, towards zero."""
    near = x.astype(np.float32)
    return np.where(np.abs(near.astype(np.float64)) > np.abs(x), np.nextafter(near, np.float32(0)), near)


def sums_of(rows: Tensor, columns: Tensor, start: Tensor | None = None) -> Array:
    """In float32, 8 of the depth at a time."""
    a, b = rows.double().numpy(), columns.double().numpy()
    total = np.zeros((len(a), len(b)), np.float32) if start is None else start.numpy()
    for first in range(0, a.shape[1], 8):
        exact = total.astype(np.float64)
        for k in range(first, first + 8):
            exact = exact + a[:, k, None] * b[None, :, k]
        total = cut(exact)
    return total


def run_product(
    micro: Micro, columns: int = 64, element: str = "bfloat16", steps: int = 2, add: bool = False, fault: str = "none",
    wrong: int = 0, exact: bool = False,
) -> tuple[Array, Array]:  # fmt: skip
    a, b, start = random(64, 64 * steps), random(columns, 64 * steps, seed=1), random(64, columns, seed=2)
    if exact:
        a, b, start = ((4 * x).round() for x in (a, b, start))
    a, b = a.to(ELEMENTS[element]), b.to(ELEMENTS[element])
    expected = in_registers(sums_of(a, b, start if add else None))
    layouts = [in_stages(x, swizzle=fault != "wrong swizzle") for x in (a, b)]
    inputs = [*layouts, torch.from_numpy(in_registers(start.numpy()))]
    numbers = [steps, int(add), FAULT[fault], wrong if wrong < 2**63 else wrong - 2**64]
    out = micro(f"product_{element}_{columns}", inputs, torch.empty(expected.shape), numbers)
    return out.numpy(), expected


@everywhere
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("element", ELEMENTS)
def test_a_product(micro: Micro, choose: Choose, element: str, columns: int, add: bool, options: str) -> None:
    choose(options)
    assert np.array_equal(*run_product(micro, columns, element, add=add))


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("element", ELEMENTS)
def test_a_product_is_exact_in_integers(micro: Micro, element: str, columns: int) -> None:
    found, sums = run_product(micro, columns, element, exact=True, add=True)
    assert np.array_equal(found, sums)
    assert np.array_equal(sums, sums.round())
    assert np.abs(sums).max() < 2**20


PRODUCT_FAULTS = {
    "no fence": r"block 0: multiply_add_async \(micro_products\.cuh:\d+\): threads wrote to byte .* without a "
    "fence_async after it",
    "no begin": "multiply_add_async .*: no begin_products since threads had the sums",
    "no commit": "it ended before thread 0 waited for multiply_add_async",
    "never wait": "it ended before thread 0 waited for multiply_add_async",
    "divided": r"thread 77 .*multiply_add_async .*: the warpgroup is divided: another thread's product is another",
    "touched before": "thread 77 .*multiply_add_async .*: a thread changed the sums after begin_products",
    "touched after": "thread 77 .*wait_for_products .*: a thread wrote to sums while products were under way",
    "wrong place": "shared_address .*: an operand at byte 8 of .*, needs a multiple of 16",
}


@everywhere
@pytest.mark.parametrize("fault", PRODUCT_FAULTS)
def test_a_fault_of_a_product_is_named(micro: Micro, choose: Choose, options: str, fault: str) -> None:
    choose(options)
    pattern = PRODUCT_FAULTS[fault]
    if options.startswith("order"):  # another thread may be the one that sees it
        pattern = re.sub(r"(thread|byte) (0|77)\b", r"\1 \\d+", pattern)
    with pytest.raises(RuntimeError, match=pattern):
        run_product(micro, fault=fault)


DESCRIPTORS = {
    "no swizzling": (1 << 62, "with swizzling 0, needs 1"),
    "swizzling of 64 bytes": (3 << 62, "with swizzling 2, needs 1"),
    "a base offset": (1 << 49, "with a base offset"),
    "another bit": (1 << 46, "with bits that mean nothing"),
    "groups of 4 rows": ((64 ^ 32) << 32, "whose groups of 8 rows are 512 bytes apart"),
    "no distance": (64 << 32, "whose groups of 8 rows are 0 bytes apart"),
    "groups further apart": ((64 ^ 1024) << 32, "of 17408 bytes at byte .* of 16384"),
    "another row": (128 >> 4, "of byte 128 of .*, needs the first row of 1024 bytes"),
    "beyond the row": (112 >> 4, "of byte 112 of .*, needs 32 bytes of one row"),
    "beyond the memory": (1 << 13, "of 2048 bytes at byte 13.* of"),
}


@pytest.mark.parametrize("descriptor", DESCRIPTORS)
def test_a_wrong_descriptor_is_refused(micro: Micro, descriptor: str) -> None:
    wrong, text = DESCRIPTORS[descriptor]
    with pytest.raises(RuntimeError, match=rf"multiply_add_async \(.*\): a descriptor {text}"):
        run_product(micro, wrong=wrong)


def test_a_wrong_swizzle_gives_wrong_numbers(micro: Micro) -> None:
    found, expected = run_product(micro, fault="wrong swizzle")
    assert not np.allclose(found, expected, rtol=0.1)


@pytest.mark.parametrize("fault", ["no wait", "other sums"])
@everywhere
def test_sums_are_nobodys_before_a_wait(micro: Micro, choose: Choose, options: str, fault: str) -> None:
    choose(options)
    assert np.isnan(run_product(micro, steps=1, fault=fault)[0]).all()


def run_groups(micro: Micro, fault: str = "none", name: str = "groups") -> tuple[Array, Array]:
    a, b = random(64, 64, dtype=torch.bfloat16), random(128, 64, dtype=torch.bfloat16, seed=1)
    first, second = sums_of(a, b[:64]), sums_of(a, b[64:])
    expected = [first, second, sums_of(a, b[:64], torch.from_numpy(first))]
    out = micro(name, [in_stages(a), in_stages(b)], torch.empty(3, 128, 32), [FAULT[fault]])
    return out.numpy(), np.stack([in_registers(sums) for sums in expected])


@everywhere
def test_groups_end_one_after_the_other(micro: Micro, choose: Choose, options: str) -> None:
    choose(options)
    assert np.array_equal(*run_groups(micro))


@everywhere
def test_a_group_that_was_not_waited_for(micro: Micro, choose: Choose, options: str) -> None:
    choose(options)
    found, expected = run_groups(micro, "no wait")
    assert np.isnan(found[1]).all()
    assert np.array_equal(found[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize(
    ("fault", "name", "error"),
    [
        ("no begin", "groups", "no begin_products since threads had the sums"),
        ("overlap", "groups", "products are under way to some of these sums"),
        ("none", "no_warpgroup", "begin_products .*: the block's last warps are no warpgroup"),
    ],
)
def test_a_fault_of_groups_is_named(micro: Micro, fault: str, name: str, error: str) -> None:
    with pytest.raises(RuntimeError, match=error):
        run_groups(micro, fault, name)


def run_store(micro: Micro, byte: int = 0, unordered: bool = False) -> tuple[Tensor, Tensor]:
    """stmatrix.x4: lanes 4 row to 4 row + 3 have the 8 numbers of a row of matrix m, two each; it goes where lane
    8 m + row says."""
    words, address = integers(32, 4), torch.randperm(32, generator=torch.Generator().manual_seed(0))
    numbers = words.view(torch.int16).reshape(32, 4, 2)
    stored = torch.empty(32, 8, dtype=torch.int16)
    for m in range(4):
        for row in range(8):
            for column in range(8):
                stored[address[8 * m + row], column] = numbers[4 * row + column // 2, m, column % 2]
    out = micro("store_matrices", [words, address.int()], words, [byte, unordered])
    return out, stored.view(torch.int32)[torch.arange(32) ^ 8]


@everywhere
def test_store_matrices(micro: Micro, choose: Choose, options: str) -> None:
    choose(options)
    assert torch.equal(*run_store(micro))


def test_faults_of_store_matrices(micro: Micro) -> None:
    for byte in (8, 512, -512):
        with pytest.raises(RuntimeError, match=r"store_matrices .*: a row of 16 bytes at byte"):
            run_store(micro, byte)
    found, expected = run_store(micro, unordered=True)
    assert not torch.equal(found, expected)


# A ring of stages


def run_ring(micro: Micro, fault: str = "none", steps: int = 7) -> tuple[Array, Array]:
    a, b = (random(64, 64 * steps, dtype=torch.bfloat16, seed=seed) for seed in (3, 4))
    out = micro("ring", [a, b], torch.empty(128, 32), [steps, FAULT[fault]], blocks=2)
    return out.numpy(), in_registers(sums_of(a, b))


@everywhere
def test_a_ring_of_stages(micro: Micro, choose: Choose, options: str) -> None:
    choose(options)
    assert np.array_equal(*run_ring(micro))


RING_FAULTS = {
    "no fence": "arrive .*: the copy engine does not know the barrier",
    "no barrier": "arrive .*: more arrivals than the barrier is for: 1",
    "no wait": r"multiply_add_async .*: a box is under way to its operands: copy_box \(micro_products",
    "early release": r"copy_box .*: products under way read what is there: multiply_add_async \(micro_products",
    "fewer bytes": "nobody can go on: .*arrivals and -1024 bytes are missing",
    "more bytes": r"nobody can go on: warps 0-3: lanes 0-31 wait in wait_for \(micro_products.cuh:\d+\), parity 0 .*: "
    r"0 arrivals and 1024 bytes are missing; warps 4: lanes 0 wait in wait_for \(.*\), parity 0 .*: 4 arrivals and 0 "
    "bytes are missing, lanes 1-31 have ended",
}


@pytest.mark.parametrize("fault", RING_FAULTS)
def test_a_fault_of_a_ring_is_named(micro: Micro, fault: str) -> None:
    with pytest.raises(RuntimeError, match=RING_FAULTS[fault]):
        run_ring(micro, fault)


@pytest.mark.parametrize("fault", ["no wait", "wrong parity"])
def test_a_fault_of_a_ring_is_seen(micro: Micro, choose: Choose, fault: str) -> None:
    assert differs_somewhere(choose, lambda: run_ring(micro, fault))


# Races

SANITIZED = {
    "box": "box,1,300,130,136,64,5,8,8192,0",
    "a late box": "box,1,300,130,136,64,5,8,8192,1",
    "phases": "phases,1,7,0",
    "named barriers": "named,1,0",
    "registers": "registers,1,0",
    "product": "product_bfloat16_64,1,2,1,0,0",
    "groups": "groups,1,0",
    "store_matrices": ",".join(["store_matrices", "1", "0", "0", "0", "0", *map(str, range(32))]),
    "ring": "ring,1,9,0",
}
RACES = {
    "a box": ("box,1,300,130,136,64,5,8,8192,0,{}", "no wait"),
    "a barrier": ("box,1,300,130,136,64,5,8,8192,0,{}", "no barrier"),
    "phases": ("phases,1,7,{}", "no wait"),
    "named barriers": ("named,1,{}", "no barrier"),
    "a product": ("product_bfloat16_64,1,2,0,{}", "no barrier"),
    "store_matrices": (",".join(["store_matrices", "1", "0", "1", "0", "0", *map(str, range(32))]), "none"),
    "a stage released": ("ring,1,9,{}", "early release"),
    "a stage that has not come": ("ring,1,9,{}", "no wait"),
}


@pytest.fixture
def sanitizer() -> None:
    reason = build.why_not_sanitized()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.usefixtures("sanitizer")
@pytest.mark.parametrize("options", ["", "copies=earliest", "order=random,copies=random,seed=1"])
def test_correct_kernels_have_no_race(choose: Choose, options: str) -> None:
    choose(options)
    code, reports = micros.sanitized(HOPPER, 2 * list(SANITIZED.values()))
    assert code == 0 and not any(reports.values()), reports


@pytest.mark.usefixtures("sanitizer")
@pytest.mark.parametrize("race", RACES)
def test_every_race_is_found(choose: Choose, race: str) -> None:
    """After launches that have used up the clocks of newer sanitizers, too. Where engines are late, some of these are
    errors at once."""
    choose("copies=earliest")
    case = RACES[race][0].format(FAULT[RACES[race][1]])
    before = SANITIZED["ring"]
    code, reports = micros.sanitized(HOPPER, [before, case])
    assert code == 66 and not reports[before]
    assert "WARNING: ThreadSanitizer: data race" in reports[case] and ".cuh" in reports[case], reports[case]


# Devices


def every_output(micro: Micro) -> dict[str, Tensor]:
    outputs = {
        "phases": run_phases(micro)[0],
        "named": run_named(micro)[0],
        "registers": run_registers(micro),
        "store_matrices": run_store(micro)[0],
        "product_groups": torch.from_numpy(run_groups(micro)[0]),
        "product_ring": torch.from_numpy(run_ring(micro)[0]),
    }
    for row, depth in PLACES:
        for box_rows in (64, 256):
            outputs[f"box_{row}_{depth}_{box_rows}"] = run_box(micro, row, depth, box_rows)
    outputs["box_late"] = run_box(micro, late=True)
    for element in ELEMENTS:
        for columns in COLUMNS:
            for exact in (False, True):
                name = f"product_{element}_{columns}" + ("_exact" if exact else "")
                outputs[name] = torch.from_numpy(run_product(micro, columns, element, add=True, exact=exact)[0])
    return outputs


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which("nvcc") is None or not torch.cuda.is_available(), reason="needs nvcc and a GPU")
def test_a_device_gives_the_same(micro: Micro, tmp_path: Path) -> None:
    """SMARTCLIP_WRITE_GOLDEN=1 keeps what the device gave, for the machines that have none."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("compute capability 9.0 alone has these instructions")
    found = every_output(micros.for_device(HOPPER, tmp_path, *TARGET))
    micros.keep_if_asked(GOLDEN, found)
    micros.check_same(found, every_output(micro), {})


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.npz")), ids=lambda path: path.stem)
def test_what_a_device_gave(micro: Micro, path: Path) -> None:
    expected = every_output(micro)
    micros.check_same(micros.kept(path, expected), expected, {})


def test_golden_values_are_compared(micro: Micro, tmp_path: Path) -> None:
    outputs = every_output(micro)
    micros.keep(tmp_path / "device.npz", outputs)
    again = micros.kept(tmp_path / "device.npz", outputs)
    micros.check_same(again, outputs, {})
    for name, value in again.items():
        changed = value.clone()
        changed.view(torch.uint8).flatten()[-3:] ^= 0x7F
        with pytest.raises(AssertionError):
            micros.check_same({**again, name: changed}, outputs, {})


TARGET = ("-gencode", "arch=compute_90a,code=sm_90a")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_micro_kernels_compile_for_a_device(tmp_path: Path) -> None:
    command = ["nvcc", "-std=c++17", *TARGET, "-cubin", f"-I{build.CSRC / 'cuda'}", f"-I{build.CSRC}", str(HOPPER)]
    subprocess.run([*command, "-o", str(tmp_path / "micro.cubin")], check=True)
