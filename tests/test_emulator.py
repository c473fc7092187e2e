"""The emulator of the CUDA kernels: every instruction does what PTX says, every planted fault is found.

Layouts are stated once more here, as the tables of the PTX ISA manual have them, in numpy. On a device the same
micro-kernels run too, and what they give is compared with the emulator.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from smartclip_kernels import backends, testing
from tests.emulator import build
from tests.emulator.kernels import kernels_module
from tests.emulator.micro import GOLDEN, Micro, bits, check_same, for_device, keep, keep_if_asked, kept, sanitized

MICRO = build.EMULATOR / "micro.cu"
NAN = float("nan")

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no g++")

ORDERS = ["order=ascending", "order=reverse", "order=random,seed=1", "order=random,seed=2"]
COPIES = ["copies=latest", "copies=earliest", "copies=random,seed=1", "copies=random,seed=2"]
ELEMENTS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32}
elements = pytest.mark.parametrize("element", ELEMENTS)


@pytest.fixture(scope="module")
def micro() -> Micro:
    return Micro(build.build([MICRO], "micro"))


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda options: monkeypatch.setenv("SMARTCLIP_EMULATOR", options)


def random(shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random numbers; of an integer dtype random bits."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(*shape, generator=generator).to(dtype)
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max, tuple(shape), dtype=dtype, generator=generator)


# What every kernel computes


def identities() -> Tensor:
    thread = torch.arange(64).repeat(3)
    block = torch.arange(3).repeat_interleave(64)
    return torch.stack([thread, block, thread % 32, thread // 32], 1).int()


def test_identities(micro: Micro) -> None:
    expected = identities()
    assert torch.equal(micro("identities", [], torch.empty_like(expected), blocks=3), expected)


SHUFFLED = {"float": torch.float32, "uint32": torch.int32, "double": torch.float64, "int64": torch.int64}


@pytest.mark.parametrize("mask", [0, 1, 2, 4, 8, 16, 21, 31])
@pytest.mark.parametrize("name", SHUFFLED)
def test_shuffle(micro: Micro, name: str, mask: int) -> None:
    x = random([128], SHUFFLED[name])
    out = micro(f"shuffle_{name}", [x], x, [mask], blocks=2)
    assert torch.equal(out, x[torch.arange(128) ^ mask])


def test_shuffle_beyond_the_warp_is_refused(micro: Micro) -> None:
    with pytest.raises(RuntimeError, match=r"shuffle_xor \(micro\.cu:\d+\): mask 32"):
        micro("shuffle_float", [random([64])], random([64]), [32])


def any_in_warp(x: Tensor) -> Tensor:
    return x.reshape(-1, 32).any(1, keepdim=True).expand(-1, 32).reshape(x.shape).int()


def test_any_in_warp(micro: Micro) -> None:
    x = torch.zeros(128, dtype=torch.int32)
    x[17] = x[127] = 1
    assert torch.equal(micro("any", [x], x, blocks=2), any_in_warp(x))


def loaded_matrices(rows: Tensor, address: Tensor) -> Tensor:
    """ldmatrix.x4: threads 8 m to 8 m + 7 give the rows of matrix m; a row's 8 numbers of 16 bits go, two by two, to
    threads 4 row to 4 row + 3."""
    numbers = rows.view(torch.int16).reshape(32, 8)
    out = torch.empty(32, 4, 2, dtype=torch.int16)
    for m in range(4):
        for row in range(8):
            for column in range(8):
                out[4 * row + column // 2, m, column % 2] = numbers[address[8 * m + row], column]
    return out.view(torch.int32).reshape(32, 4)


def test_load_matrices(micro: Micro) -> None:
    rows = random([32, 4], torch.int32)
    for address in (torch.arange(32), torch.randperm(32), torch.randint(0, 32, (32,))):
        out = micro("load_matrices", [rows, address.int()], rows)
        assert torch.equal(out, loaded_matrices(rows, address))


def fragment_indices(element: str) -> dict[str, NDArray[np.int64]]:
    """Row and column of each number that a thread holds of a (M × K), b (K × N) and c (M × N): the manual's "Matrix
    Fragments for mma.m16n8k16 with floating point type" and "Matrix Fragments for mma.m16n8k8"."""
    lane = np.arange(32)
    group, thread = lane >> 2, lane % 4
    places: dict[str, list[tuple[Any, Any]]] = {}
    if element == "tf32":
        places["a"] = [
            (group, thread),  # a0
            (group + 8, thread),  # a1
            (group, thread + 4),  # a2
            (group + 8, thread + 4),  # a3
        ]
        places["b"] = [(thread, group), (thread + 4, group)]
    else:
        places["a"] = [
            (
                group if 0 <= i < 2 or 4 <= i < 6 else group + 8,
                thread * 2 + (i & 1) if i < 4 else thread * 2 + (i & 1) + 8,
            )
            for i in range(8)
        ]
        places["b"] = [(thread * 2 + (i & 1) if i < 2 else thread * 2 + (i & 1) + 8, group) for i in range(4)]
    places["c"] = [(group if i < 2 else group + 8, thread * 2 + (i & 1)) for i in range(4)]
    return {name: np.array(pairs).transpose(2, 0, 1) for name, pairs in places.items()}  # (lane, number, 2)


def fragments(element: str, integers: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A product's matrices in float64, and the fragments that the threads hold of them."""
    dtype = ELEMENTS[element]
    depth = 8 if element == "tf32" else 16
    shapes = {"a": (16, depth), "b": (depth, 8), "c": (16, 8)}
    matrices, held = {}, {}
    for seed, (name, shape) in enumerate(shapes.items()):
        matrix = random(shape, torch.float32 if name == "c" else dtype, seed)
        if integers:
            matrix = (4 * matrix.float()).round().to(matrix.dtype)
        elif element == "tf32" and name != "c":
            matrix = tf32(matrix)
        index = fragment_indices(element)[name]
        matrices[name] = matrix.double()
        held[name] = matrix[index[..., 0], index[..., 1]].contiguous()
    return matrices, held


def tf32(x: Tensor) -> Tensor:
    """cvt.rna.tf32: 11 significant digits, fewer below 2⁻¹²⁶, to the nearest, ties away from zero."""
    exponent = torch.frexp(x.double())[1].clamp(min=-125)
    digits = torch.ldexp(x.double().abs(), 11 - exponent)
    rounded = torch.ldexp((digits + 0.5).floor(), exponent - 11).copysign(x).float()
    return torch.where(x.isfinite(), rounded, x)


@elements
def test_multiply_add_is_exact_in_integers(micro: Micro, element: str) -> None:
    matrices, held = fragments(element, integers=True)
    index = fragment_indices(element)["c"]
    expected = matrices["c"] + matrices["a"] @ matrices["b"]
    out = micro(f"multiply_add_{element}", list(held.values()), held["c"])
    assert torch.equal(out.double(), expected[index[..., 0], index[..., 1]])


def product_bound(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """What sums in float32 may err, in any order and if every one of them is cut off instead of rounded."""
    return 2.0**-23 * (a.shape[-1] + 1) * (a.double().abs() @ b.double().abs() + c.double().abs())


@elements
def test_multiply_add(micro: Micro, element: str) -> None:
    matrices, held = fragments(element, integers=False)
    index = fragment_indices(element)["c"]
    expected = matrices["c"] + matrices["a"] @ matrices["b"]
    bound = product_bound(**matrices)
    out = torch.full_like(matrices["c"], NAN)
    out[index[..., 0], index[..., 1]] = micro(f"multiply_add_{element}", list(held.values()), held["c"]).double()
    assert ((out - expected).abs() <= bound).all()


def test_operands_that_nobody_rounded_are_refused(micro: Micro) -> None:
    _, held = fragments("tf32", integers=False)
    held["a"][9, 2] = 1.0 + 2.0**-20
    assert micro("multiply_add_tf32", list(held.values()), held["c"], [0]).isfinite().all()
    with pytest.raises(RuntimeError, match=r"lane 9.*multiply_add<Tf32>.*not rounded"):
        micro("multiply_add_tf32", list(held.values()), held["c"], [1])


def copied(source: Tensor, sizes: Tensor) -> Tensor:
    """cp.async: `sizes` bytes, and zeros up to 16. Lane l reads what lane l ^ 1 copied."""
    kept = torch.arange(16)[None] < sizes[:, None]
    return torch.where(kept, source.view(torch.uint8).reshape(32, 16), 0)[torch.arange(32) ^ 1]


@pytest.mark.parametrize("options", COPIES)
def test_copy(micro: Micro, options: str, choose: Callable[[str], None]) -> None:
    choose(options)
    source = random([32, 4], torch.int32)
    for sizes in (torch.arange(32) % 17, torch.full((32,), 16), torch.zeros(32, dtype=torch.int64)):
        out = micro("copy", [source, sizes.int()], source)
        assert torch.equal(out.view(torch.uint8), copied(source, sizes))


def test_a_copy_reads_no_more_than_it_says(micro: Micro) -> None:
    """Beyond the last page that can be read: what is not to be read may not be there."""
    page = os.sysconf("SC_PAGE_SIZE")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, *[ctypes.c_size_t] * 5]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = libc.mmap(None, 2 * page, 3, 0x22, 2**64 - 1, 0)
    assert libc.mprotect(start + page, page, 0) == 0
    held = (ctypes.c_uint8 * (31 * 16)).from_address(start + page - 31 * 16)
    source = torch.frombuffer(held, dtype=torch.uint8)
    source.copy_(torch.arange(31 * 16) % 251)
    assert source.data_ptr() % 16 == 0
    sizes = torch.full((32,), 16, dtype=torch.int32)
    sizes[31] = 0
    out = micro("copy", [source, sizes], random([32, 4], torch.int32))
    padded = torch.cat([source, torch.zeros(16, dtype=torch.uint8)])
    assert torch.equal(out.view(torch.uint8), copied(padded, sizes.long()))
    sizes[31] = 1
    with pytest.raises(RuntimeError, match=r"thread 31 .*touches address 0x[0-9a-f]+, where nothing is"):
        micro("copy", [source, sizes], random([32, 4], torch.int32))


def hard_numbers() -> Tensor:
    """Random bits, every neighbourhood of a tie of half precision, and the ends of the formats."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    known = torch.cat([halves.view(torch.float16).float(), halves.view(torch.bfloat16).float()])
    near = known.view(torch.int32)[:, None] + torch.tensor([-1, 0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001])
    ends = torch.tensor([0.0, -0.0, NAN, np.inf, -np.inf, 65504.0, 65519.9, 65520.0, -1e9, 3.4e38, 1e-45, 2.0**-25])
    return torch.cat([random([2**16], torch.int32).view(torch.float32), near.int().flatten().view(torch.float32), ends,
                      torch.zeros(-(2**16 + near.numel() + ends.numel()) % 64)])  # fmt: skip


@pytest.mark.parametrize("element", ["float32", "bfloat16", "float16"])
def test_narrow(micro: Micro, element: str) -> None:
    x = hard_numbers()
    dtype = getattr(torch, element)
    out = micro(f"narrow_{element}", [x], x.to(dtype), blocks=len(x) // 64)
    expected = (x.clamp(-65504.0, 65504.0) if element == "float16" else x).to(dtype)
    nan = x.isnan()
    assert out[nan].isnan().all() and nan.any()
    assert torch.equal(bits(out[~nan]), bits(expected[~nan]))


def test_round_operands(micro: Micro) -> None:
    x = hard_numbers()
    x = torch.cat([x, torch.zeros(-len(x) % 256)])
    out = micro("round_operands", [x], x, blocks=len(x) // 256)
    nan = x.isnan()
    assert out[nan].isnan().all()
    assert torch.equal(bits(out[~nan]), bits(tf32(x)[~nan]))


def exp2_without_subnormals(x: Tensor) -> Tensor:
    y = torch.exp2(x)
    return torch.where(y < 2.0**-126, 0.0, y)


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "exp2": (exp2_without_subnormals, 2.0**-22),
    "square_root": (torch.sqrt, 2.0**-23),
    "log": (torch.log, 2.0**-23),
    "log1p": (torch.log1p, 2.0**-23),
}


BOUNDS = {name: bound for name, (_, bound) in FUNCTIONS.items()}


def arguments(function: str) -> Tensor:
    x = torch.cat([random([4000]), random([4000]) * 100, 10.0 ** (random([4000]) * 10)])
    x = torch.cat(
        [x, torch.tensor([0.0, -0.0, np.inf, -np.inf, NAN, -126.0, -126.5, -149.0, 127.99, 128.0, 1.0, -1.0])]
    )
    x = torch.cat([x, torch.zeros(-len(x) % 64)])
    return x if function == "exp2" else torch.where(x.abs() < 2.0**-126, 0.0, x)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions(micro: Micro, function: str) -> None:
    x = arguments(function)
    exact, bound = FUNCTIONS[function]
    expected = exact(x.double())
    out = micro(function, [x], x, blocks=len(x) // 64).double()
    finite = expected.float().isfinite()
    assert torch.equal(out[~finite].nan_to_num(nan=7.0), expected[~finite].float().double().nan_to_num(nan=7.0))
    assert ((out - expected).abs() <= bound * expected.abs())[finite].all()


# A product, and the orders that the machine is free to choose


def operands(element: str, depth: int = 203, rows: int = 128, columns: int = 192) -> tuple[list[Tensor], list[int]]:
    """Rows are padded with NaN up to the next 16 bytes, which no copy may bring."""
    dtype = ELEMENTS[element]
    stride = -(-depth // 8) * 8
    a, b = (random([count, stride], dtype, seed) for seed, count in enumerate((rows, columns)))
    for x in (a, b):
        x[:, depth:] = NAN
    return [a, b], [rows, columns, depth, stride]


def product(micro: Micro, name: str, given: tuple[list[Tensor], list[int]]) -> Tensor:
    inputs, numbers = given
    rows, columns = numbers[:2]
    return micro(name, inputs, torch.empty(rows, columns), numbers, blocks=rows * columns // 64**2)


def errors(out: Tensor, given: tuple[list[Tensor], list[int]]) -> Tensor:
    """In units of what a sum in float32 may err; NaN is an error too."""
    a, b = (tf32(x[:, : given[1][2]]) if x.dtype == torch.float32 else x[:, : given[1][2]] for x in given[0])
    expected = a.double() @ b.double().T
    bound = product_bound(a.double(), b.double().T, torch.zeros_like(out))
    return ((out.double() - expected).abs() / bound).nan_to_num(nan=np.inf)


@elements
@pytest.mark.parametrize("depth", [1, 31, 64, 203])
def test_product(micro: Micro, element: str, depth: int) -> None:
    given = operands(element, depth)
    assert errors(product(micro, f"product_{element}", given), given).max() <= 1


def tickets(micro: Micro) -> Tensor:
    """Block and thread of all, in the order in which they came by."""
    return micro("tickets", [], torch.empty(1 + 13 * 64, dtype=torch.int32), blocks=13)[1:].reshape(13, 64)


def test_orders(micro: Micro, choose: Callable[[str], None]) -> None:
    every = torch.arange(13 * 64, dtype=torch.int32).reshape(13, 64)
    assert torch.equal(tickets(micro), every)
    choose("order=reverse")
    assert torch.equal(tickets(micro), every.flip(0, 1))
    choose("order=random,seed=1")
    drawn = tickets(micro)
    assert torch.equal(drawn, tickets(micro))
    assert torch.equal(drawn.flatten().sort().values, every.flatten())
    blocks, threads = drawn // 64, drawn % 64
    assert (blocks == blocks[:, :1]).all()  # one at a time
    assert not torch.equal(blocks[:, 0], every[:, 0] // 64) and not (threads == threads[:1]).all(1)[1:].any()
    choose("seed=2,order=random")
    assert not torch.equal(tickets(micro), drawn)


@elements
def test_no_order_changes_a_bit(micro: Micro, element: str, choose: Callable[[str], None]) -> None:
    given = operands(element)
    first = product(micro, f"product_{element}", given)
    for order in ORDERS:
        for copies in COPIES:
            choose(f"{order},{copies}")
            assert torch.equal(product(micro, f"product_{element}", given), first), (order, copies)


def test_launches_from_several_threads(micro: Micro) -> None:
    given = operands("float16")
    first = product(micro, "product_float16", given)
    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(lambda _: product(micro, "product_float16", given), range(12)):
            assert torch.equal(out, first)


def test_lanes_may_part_between_collectives(micro: Micro) -> None:
    """A compiler would copy a vote into both branches; lanes would then meet in two places, and be called divided."""
    lane = torch.arange(32, dtype=torch.int32).repeat(2)
    low, y = lane < 16, torch.arange(64, dtype=torch.int32)
    y = y + low.int()
    y = torch.where(low, 2 * y + any_in_warp(y == 33), y)
    vote = any_in_warp(y == 34)
    y = torch.where(low, y * y + vote, y ^ vote)
    assert torch.equal(micro("parted", [lane], lane), y + any_in_warp(y == 100))


def test_blocks_begin_with_poison(micro: Micro) -> None:
    """Each block leaves zeros in shared memory; none finds those of the one before."""
    assert micro("left_behind", [], torch.empty(5, 32), blocks=5).isnan().all()


# Faults


PRODUCT_FAULTS = {
    "product_no_barrier_after_wait": "copies=latest",
    "product_no_barrier_before_copy": "copies=earliest",
    "product_groups": "copies=latest",
    "product_unwritten": "",
    "product_fragment": "",
    "product_swizzle": "",
}


@pytest.mark.parametrize("name", PRODUCT_FAULTS)
def test_a_faulty_product_is_wrong(micro: Micro, name: str, choose: Callable[[str], None]) -> None:
    given = operands("float16")
    choose(PRODUCT_FAULTS[name])
    wrong = errors(product(micro, name, given), given) > 1
    assert wrong.any()
    if name == "product_unwritten":
        assert wrong.sum() == wrong.numel() // 32


def test_a_missing_barrier_is_seen(micro: Micro) -> None:
    x = random([256])
    expected = 2 * x.roll(32)[torch.arange(256) ^ 1]
    assert torch.equal(micro("hand_over", [x], x, [0]), expected)
    out = micro("hand_over", [x], x, [1])
    assert out[:32].isnan().all()  # the first warp is ahead of the last, whose numbers it reads
    out = micro("hand_over", [x], x, [2])
    assert not torch.equal(out, expected)  # and one warp is ahead of its reader


WRONG: dict[str, tuple[str, list[int], str]] = {
    "another instruction": (
        "divided_warp", [],
        r"thread 16 \(warp 0, lane 16\): any_in_warp \(micro\.cu:\d+\): the warp is divided: "
        r".*lanes 0-15 wait in shuffle_xor",
    ),
    "another place": ("divided_places", [], r"lane 16\): shuffle_xor .* divided: .*lanes 0-15 wait in shuffle_xor"),
    "another barrier": ("divided_block", [], r"sync_block .*: the block is divided: warps 0: lanes 0-31 wait"),
    "half a block at a barrier": ("half_a_block", [], r"nobody can go on: .*0-31 wait in sync_block .*0-31 have ended"),
    "lanes that have ended": ("lanes_end", [], r"lanes 0-2 have ended, lanes 3-31 wait in any_in_warp"),
    "a deadlock": (
        "deadlock", [],
        r"block 0: nobody can go on: warps 0: lanes 0-31 wait in sync_block \(micro\.cu:\d+\); "
        r"warps 1: lanes 0-15 wait in sync_block \(micro\.cu:\d+\), lanes 16-31 wait in any_in_warp",
    ),
    "shared memory, far beyond": ("write_shared", [100_000, 1], r"thread 5 .*: touches byte 100000 of 1000"),
    "shared memory, beyond a page": ("write_shared", [1024, 1], r"thread 5 .*: touches byte 1024 of 1000"),
    "shared memory, the byte behind": ("write_shared", [1000, 1], r"block 0: a thread wrote to byte 1000 of 1000"),
    "shared memory, the byte before": ("write_shared", [-1, 1], r"block 0: a thread wrote to byte -1 of 1000"),
    "shared memory, far before": ("write_shared", [-200_000, 1], r"thread 5 .*: touches byte -200000 of 1000"),
    "ldmatrix of odd rows": ("load_anywhere", [8], r"load_matrices .*: a row of 16 bytes at byte 8 of 512"),
    "ldmatrix behind": ("load_anywhere", [512], r"load_matrices .*: a row of 16 bytes at byte 512 of 512"),
    "ldmatrix before": ("load_anywhere", [-16], r"load_matrices .*: a row of 16 bytes at byte -16 of 512"),
    "a copy to an odd place": ("copy", [8, 0], r"copy_async_16 .*: byte 8 of 512 .* is no multiple of 16"),
    "a copy from an odd place": ("copy", [0, 4], r"copy_async_16 .*: the global address is no multiple of 16"),
    "a copy behind": ("copy", [16, 0], r"thread 31 .*: copy_async_16 .*: 16 bytes at byte 512 of 512"),
    "a null pointer": ("touch", [0], r"thread 7 .*: touches address 0, where nothing is"),
    "no address at all": ("touch", [2**62], r"thread 7 .*: touches address .*, where nothing is"),
    "a division by zero": ("divide", [5, 3], r"thread 3 .*: divides an integer by zero"),
    "a large array": ("large_array", [160 * 1024], r"thread 0 .*: its stack is full"),
    "too little shared memory": ("too_little_shared", [], r"shared_storage .*: 1024 bytes, the launch gave 1023"),
    "too much shared memory": ("too_much_shared", [], r"232449 bytes of shared memory, there are 232448"),
    "half a warp": ("odd_threads", [], r"48 threads, needs a multiple of 32 up to 1024"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_a_fault_is_named(micro: Micro, fault: str) -> None:
    """And the next launch is as good as ever."""
    name, numbers, message = WRONG[fault]
    x = torch.full((256,), 16, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=f"^smartclip_kernels emulator: kernel '{name}'.*{message}"):
        micro(name, [x, x], x, numbers)
    y = random([64])
    assert torch.equal(micro("shuffle_float", [y], y, [1]), y[torch.arange(64) ^ 1])


@pytest.mark.parametrize(
    "fault", ["another instruction", "half a block at a barrier", "lanes that have ended", "a deadlock"]
)
@pytest.mark.parametrize("order", ORDERS[1:])
def test_a_division_is_found_in_any_order(micro: Micro, fault: str, order: str, choose: Callable[[str], None]) -> None:
    choose(order)
    x = torch.full((256,), 16, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"divided|end|nobody"):
        micro(WRONG[fault][0], [x], x)


@pytest.mark.parametrize("blocks", [0, -1, 2**31])
def test_blocks_that_no_grid_has(micro: Micro, blocks: int) -> None:
    with pytest.raises(RuntimeError, match=f"{blocks} blocks, needs 1 to 2147483647"):
        micro("identities", [], identities(), blocks=blocks)


@pytest.mark.parametrize("options", ["order=backwards", "copies", "latest", "seed"])
def test_options_that_there_are_not(micro: Micro, options: str, choose: Callable[[str], None]) -> None:
    choose(f"order=reverse,{options}")
    with pytest.raises(RuntimeError, match=f"SMARTCLIP_EMULATOR: got '{options}', needs order=ascending"):
        micro("identities", [], identities(), blocks=3)


# Races: ThreadSanitizer sees the accesses of kernels, in the order that barriers and waits give them and no other


PIPELINE = "product_bfloat16,6,128,192,99,104"
CLEAN = ["hand_over,1,0", "hand_over_in_warp,1,0", "two_blocks,3,32", "arrivals,5,5,0", "own_copy,1,0", "left_behind,5",
         PIPELINE, "product_tf32,6,128,192,20,104"]  # fmt: skip
RACES = ["hand_over,1,1", "hand_over,1,2", "hand_over_in_warp,1,1", "two_blocks,2,0", "arrivals,5,5,1", "own_copy,1,1",
         "product_no_barrier_after_wait,1,64,64,99,104", "product_no_barrier_before_copy,1,64,64,99,104"]  # fmt: skip


@pytest.fixture
def sanitizer() -> None:
    reason = build.why_not_sanitized()
    if reason is not None:
        pytest.skip(reason)


def arrivals(micro: Micro) -> Tensor:
    return micro("arrivals", [torch.zeros(1, dtype=torch.int32)], torch.empty(6, dtype=torch.int32), [5], blocks=5)


@pytest.mark.parametrize("order", ["", *ORDERS])
def test_the_last_block_to_arrive_sees_what_all_wrote(micro: Micro, order: str, choose: Callable[[str], None]) -> None:
    choose(order)
    assert arrivals(micro).tolist() == [60, 10, 11, 12, 13, 14]


@pytest.mark.usefixtures("sanitizer")
@pytest.mark.parametrize("options", ["", "order=random,seed=1"])
def test_correct_kernels_have_no_race(options: str, choose: Callable[[str], None]) -> None:
    choose(options)
    code, reports = sanitized(MICRO, CLEAN)
    assert code == 0 and not any(reports.values()), reports


@pytest.mark.usefixtures("sanitizer")
def test_faults_are_named_there_too() -> None:
    code, reports = sanitized(MICRO, ["deadlock,1", "touch,1,0", "hand_over,1,0", "touch,1,0"])
    assert code == 0
    for report, what in zip(reports.values(), ("nobody can go on", "touches address 0", ""), strict=False):
        assert what in report and "ThreadSanitizer" not in report and report.count("\n") == bool(what)


@pytest.mark.usefixtures("sanitizer")
@pytest.mark.parametrize("race", RACES)
def test_every_race_is_found(race: str) -> None:
    """After a launch that has used up the clocks of newer sanitizers, too."""
    code, reports = sanitized(MICRO, [PIPELINE, race])
    assert code == 66 and not reports[PIPELINE]
    assert "WARNING: ThreadSanitizer: data race" in reports[race] and "micro.cu" in reports[race], reports[race]


# The library's own kernels


LIBRARY = """
import torch
import smartclip_kernels as sk
from smartclip_kernels import testing

torch.set_num_threads(1)
for similarity in ("dot", "masked_cosine"):
    for objective in ("softmax", "sigmoid"):
        for dtype in (torch.bfloat16, torch.float32):
            inputs = testing.make_inputs(140, 270, 40, similarity=similarity, objective=objective, dtype=dtype,
                                         mask="soft", ids=True)
            testing.check_loss(inputs, backend="cuda")
for per in ("text", "image"):
    sk.masked_topk(inputs.image, inputs.text, inputs.mask, 5, per=per, backend="cuda")
    sk.retrieval_ranks(inputs.image, inputs.text, inputs.mask, image_ids=inputs.image_ids, text_ids=inputs.text_ids,
                       per=per, backend="cuda")
print("fine")
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("sanitizer")
@pytest.mark.parametrize("options", ["", "order=random,seed=1"])
def test_the_library_has_no_race(options: str, choose: Callable[[str], None]) -> None:
    choose(options)
    environment = {"SMARTCLIP_CUDA_EMULATOR": str(kernels_module("tsan")), "PYTHONPATH": str(build.ROOT)}
    done = build.sanitized(["-c", LIBRARY], timeout=900, environment=environment)
    assert done.stdout == "fine\n" and done.returncode == 0, done.stderr[-8000:]


@pytest.mark.skipif("cuda" not in backends.available_backends(), reason="the CUDA backend does not run here")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a device chooses its own order")
@pytest.mark.parametrize("objective", ["softmax", "sigmoid"])
@pytest.mark.parametrize("similarity", ["dot", "masked_cosine"])
def test_no_order_changes_a_bit_of_the_library(similarity: Any, objective: str, choose: Callable[[str], None]) -> None:
    inputs = testing.make_inputs(
        140, 270, 40, similarity=similarity, objective=objective, dtype=torch.bfloat16, mask="soft", ids=True
    )
    first = testing.evaluate(inputs, testing.fused_loss("cuda")).values
    for order, copies in zip(ORDERS, reversed(COPIES), strict=True):
        choose(f"{order},{copies}")
        again = testing.evaluate(inputs, testing.fused_loss("cuda")).values
        assert all(torch.equal(again[name], value) for name, value in first.items()), (order, copies)


# Building


TWINS = sorted((build.CSRC / "cuda" / "ptx").glob("*.h"))


def declared(header: Path) -> set[tuple[str, int]]:
    """Names and numbers of parameters of a header's functions, and the macros that it leaves."""
    text = re.sub(r"//.*", "", header.read_text())
    found = {(name, -1) for name in {*re.findall(r"#define (\w+)", text)} - {*re.findall(r"#undef (\w+)", text)}}
    for match in re.finditer(r"(?:SK_DEVICE[^(;{]*?|^void |^TensorMap )\b(\w+)(?:<[\w:]+>)?\(", text, re.MULTILINE):
        depth, parameters = 1, [""]
        for letter in text[match.end() :]:
            depth += {"(": 1, ")": -1}.get(letter, 0)
            if depth == 0:
                break
            if letter == "," and depth == 1:
                parameters.append("")
            else:
                parameters[-1] += letter
        found.add((match[1], sum(p.strip() not in ("", "SK_HERE") for p in parameters)))
    return found


@pytest.mark.parametrize("header", TWINS, ids=lambda path: path.name)
def test_twins_declare_the_same(header: Path) -> None:
    ours = declared(header)
    assert len(ours) > 2
    assert ours <= declared(build.EMULATOR / "ptx" / header.name)


PROGRAM = """
#include "formulas.h"  // it stands beside csrc/cuda/ptx, and must find ours
#include <ptx/launch.h>

struct Parameters { float* out; };
SK_KERNEL(32, 1)
exponential(SK_PARAMETER Parameters p) {
  p.out[smartclip::ptx::thread_index()] = smartclip::device::exp(-0.25f * smartclip::ptx::thread_index());
}
inline float run() {
  float out[32];
  smartclip::cuda::launch("exponential", exponential, {1, 32}, nullptr, Parameters{out});
  return out[8];
}
"""
MAIN = """
#include <cstdio>
int main() { std::printf("%.6f\\n", run()); }
"""
MODULE = """
#include <pybind11/pybind11.h>
PYBIND11_MODULE(_emulated, m) { m.def("run", run); }
"""


def test_an_executable(tmp_path: Path) -> None:
    source = tmp_path / "program.cpp"
    source.write_text(PROGRAM + MAIN)
    program = build.build([source], "program", kind="executable")
    assert subprocess.run([program], capture_output=True, text=True, check=True).stdout == "0.135335\n"
    before = program.stat().st_mtime_ns
    assert build.build([source], "program", kind="executable").stat().st_mtime_ns == before
    source.write_text((PROGRAM + MAIN).replace("-0.25f", "-0.5f"))
    assert build.build([source], "program", kind="executable") != program


@pytest.mark.slow
def test_a_module(tmp_path: Path, run_python: Any) -> None:
    source = tmp_path / "module.cpp"
    source.write_text(PROGRAM + MODULE)
    module = build.build([source], "_emulated", kind="module")
    code = "import sys; sys.path.insert(0, sys.argv[1]); import _emulated; print(_emulated.run())"
    assert float(run_python(code, str(module.parent)).stdout) == pytest.approx(np.exp(-2), rel=1e-6)


@pytest.mark.slow
def test_fibres_without_our_assembly(micro: Micro) -> None:
    """The way that other processors take."""
    portable = Micro(build.build([MICRO], "micro", definitions={"SMARTCLIP_EMULATOR_UCONTEXT": "1"}))
    given = operands("bfloat16")
    assert torch.equal(product(portable, "product_bfloat16", given), product(micro, "product_bfloat16", given))
    with pytest.raises(RuntimeError, match=r"thread 7 .*touches address 0"):
        portable("touch", [], random([1]), [0])


# Devices


def every_output(micro: Micro) -> dict[str, Tensor]:
    x, rows = random([64]), random([32, 4], torch.int32)
    hard = hard_numbers()
    hard = hard[torch.randperm(len(hard), generator=torch.Generator().manual_seed(0))[:4096]]
    sizes, address = torch.arange(32, dtype=torch.int32) % 17, torch.arange(32, dtype=torch.int32).flip(0)
    outputs = {
        "identities": micro("identities", [], identities(), blocks=3),
        "any": micro("any", [(x > 2).int()], x.int()),
        "arrivals": arrivals(micro),
        "load_matrices": micro("load_matrices", [rows, address], rows),
        "copy": micro("copy", [rows, sizes], rows),
        "round_operands": micro("round_operands", [hard], hard, blocks=len(hard) // 256),
    }
    for name, dtype in SHUFFLED.items():
        outputs[f"shuffle_{name}"] = micro(f"shuffle_{name}", [random([64], dtype)], random([64], dtype), [21])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = f"narrow_{dtype}".replace("torch.", "")
        outputs[name] = micro(name, [hard], hard.to(dtype), blocks=len(hard) // 64)
    for element in ELEMENTS:
        for integers in (True, False):
            held = fragments(element, integers)[1]
            name = f"multiply_add_{element}"
            outputs[f"{name}_exact" if integers else name] = micro(name, list(held.values()), held["c"])
        outputs[f"product_{element}"] = product(micro, f"product_{element}", operands(element, 99, 64, 64))
    for name in FUNCTIONS:
        outputs[name] = micro(name, [arguments(name)], arguments(name), blocks=len(arguments(name)) // 64)
    return outputs


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which("nvcc") is None or not torch.cuda.is_available(), reason="needs nvcc and a GPU")
def test_a_device_gives_the_same(micro: Micro, tmp_path: Path) -> None:
    """SMARTCLIP_WRITE_GOLDEN=1 keeps what the device gave, for the machines that have none."""
    found = every_output(for_device(MICRO, tmp_path))
    keep_if_asked(GOLDEN, found)
    check_same(found, every_output(micro), BOUNDS)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.npz")), ids=lambda path: path.stem)
def test_what_a_device_gave(micro: Micro, path: Path) -> None:
    expected = every_output(micro)
    check_same(kept(path, expected), expected, BOUNDS)


def test_golden_values_are_compared(micro: Micro, tmp_path: Path) -> None:
    """The way to a file and back, and that one wrong bit is found."""
    outputs = every_output(micro)
    keep(tmp_path / "device.npz", outputs)
    again = kept(tmp_path / "device.npz", outputs)
    check_same(again, outputs, BOUNDS)
    for name, value in again.items():
        changed = value.clone()
        changed.view(torch.uint8).flatten()[-3:] ^= 0x7F
        with pytest.raises(AssertionError):
            check_same({**again, name: changed}, outputs, BOUNDS)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_micro_kernels_compile_for_a_device(tmp_path: Path) -> None:
    command = ["nvcc", "-std=c++17", "-arch=sm_80", "-cubin", f"-I{build.CSRC / 'cuda'}", f"-I{build.CSRC}", str(MICRO)]
    subprocess.run([*command, "-o", str(tmp_path / "micro.cubin")], check=True)
