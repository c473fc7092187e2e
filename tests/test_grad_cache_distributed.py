"""Gradient caching under DistributedDataParallel and FSDP2: two processes, gloo, every gradient reduced once a step."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.nn.functional import all_gather
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from smartclip_kernels.functional import clip_loss
from smartclip_kernels.grad_cache import GradCache

RANKS, N, D, CHUNK = 2, 11, 6, 4  # three chunks in each process, the last one smaller
KEPT = (0, 2, 99)


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(9, 16), nn.GELU(), nn.Linear(16, D))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.layers(x), dim=-1)


class TwoTowers(nn.Module):
    """One module that encodes either side, as an open_clip model does."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = Tower(), Tower()

    def encode_image(self, x: Tensor) -> Tensor:
        return self.image(x)

    def encode_text(self, x: Tensor) -> Tensor:
        return self.text(x)

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> Tensor:
        if image is not None:
            return self.image(image)
        assert text is not None
        return self.text(text)


class Inside(nn.Module):
    """A wrapped module within a module."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.tower(x)


def loss_fn(image: Tensor, text: Tensor) -> Tensor:
    return clip_loss(image, text, 5.0)


def gathered_loss(image: Tensor, text: Tensor) -> Tensor:
    """The loss of all processes' rows, in each of them."""
    return loss_fn(torch.cat(list(all_gather(image))), torch.cat(list(all_gather(text))))


class Bench:
    """Two encoders, alike in all processes, and rows of all: everyone knows what the gradients have to be."""

    def __init__(self, rank: int) -> None:
        torch.manual_seed(0)
        self.towers = [Tower().double(), Tower().double()]
        self.images, self.texts = torch.randn(2, 3, RANKS, N, 9, dtype=torch.float64)  # of three steps
        self.rank = rank

    def inputs(self, step: int = 0) -> tuple[Tensor, Tensor]:
        return self.images[step, self.rank], self.texts[step, self.rank]

    def expected(self, encode: list[Any], parameters: list[Tensor], *, steps: int = 1, gather: bool = True) -> Any:
        """The gradients of one process with everything; not gathered: the mean over processes of their own losses."""
        for step in range(steps):
            image, text = encode[0](self.images[step].flatten(0, 1)), encode[1](self.texts[step].flatten(0, 1))
            if gather:
                loss_fn(image, text).backward()
            else:
                pairs = zip(image.split(N), text.split(N), strict=True)
                torch.stack([loss_fn(i, t) for i, t in pairs]).mean().backward()
        return [p.grad for p in parameters]


def same(module: nn.Module | Sequence[nn.Module], expected: list[Tensor | None]) -> None:
    """Gradients as expected, sharded or not; then forgotten."""
    modules = [module] if isinstance(module, nn.Module) else module
    parameters = [p for m in modules for p in m.parameters()]
    assert sum(e is not None for e in expected) >= 4
    for p, e in zip(parameters, expected, strict=True):
        got = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        assert (got is None) == (e is None)
        if e is not None:
            torch.testing.assert_close(got, e, rtol=0, atol=1e-12)
        p.grad = None


def ddp(module: nn.Module, reductions: list[int], **options: Any) -> DistributedDataParallel:
    """Counts its reductions: a small module is one bucket."""
    wrapped = DistributedDataParallel(module, **options)

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP compares annotations, not strings
        reductions.append(len(bucket.parameters()))
        return (
            distributed.all_reduce(bucket.buffer().div_(RANKS), async_op=True)
            .get_future()
            .then(lambda done: done.value()[0])
        )

    wrapped.register_comm_hook(None, hook)
    return wrapped


def ddp_reduces_once_for_each_model(rank: int) -> None:
    bench = Bench(rank)
    plain = copy.deepcopy(bench.towers)
    expected = bench.expected(plain, [p for t in plain for p in t.parameters()])
    for keep_graph in (*KEPT, "1MiB", "auto"):
        reductions: list[int] = []
        towers = [ddp(copy.deepcopy(t), reductions) for t in bench.towers]
        for _ in range(3):  # DDP lays out its buckets anew in the second step
            reductions.clear()
            GradCache(towers, CHUNK, gathered_loss, keep_graph=keep_graph)(*bench.inputs(), no_sync_except_last=True)
            assert reductions == [4, 4]
            same(towers, expected)
        reductions.clear()
        GradCache(towers, CHUNK, gathered_loss, keep_graph=keep_graph)(*bench.inputs())
        assert len(reductions) == {0: 6, 2: 4, 99: 2, "1MiB": 2, "auto": 2}[keep_graph]  # a kept chunk reduces nothing
        same(towers, expected)


def ddp_with_a_loss_of_each_process(rank: int) -> None:
    bench = Bench(rank)
    plain = copy.deepcopy(bench.towers)
    expected = bench.expected(plain, [p for t in plain for p in t.parameters()], gather=False)
    for keep_graph in KEPT:
        towers = [ddp(copy.deepcopy(t), []) for t in bench.towers]
        GradCache(towers, CHUNK, loss_fn, keep_graph=keep_graph)(*bench.inputs(), no_sync_except_last=True)
        same(towers, expected)


def one_ddp_for_both_sides_reduces_once(rank: int) -> None:
    """The same tower; a module that holds two; a module within others: all sides of one are reduced together."""
    bench = Bench(rank)
    plain = copy.deepcopy(bench.towers[0])
    expected = bench.expected([plain, plain], list(plain.parameters()))
    for keep_graph in KEPT:
        reductions: list[int] = []
        tower = ddp(copy.deepcopy(bench.towers[0]), reductions)
        cache = GradCache([tower, tower], CHUNK, gathered_loss, keep_graph=keep_graph)
        for _ in range(2):
            cache(*bench.inputs(), no_sync_except_last=True)
            same(tower, expected)
        assert reductions == [4, 4]
    both = TwoTowers().double()
    plain_both = copy.deepcopy(both)
    expected = bench.expected([plain_both.image, plain_both.text], list(plain_both.parameters()))
    image, text = bench.inputs()
    for keep_graph in KEPT:
        reductions = []
        wrapped = ddp(copy.deepcopy(both), reductions, find_unused_parameters=True)
        cache = GradCache([wrapped, wrapped], CHUNK, gathered_loss, keep_graph=keep_graph)
        for _ in range(2):
            cache({"image": image}, {"text": text}, no_sync_except_last=True)
            same(wrapped, expected)
        assert reductions == [8, 8]
    plain = copy.deepcopy(bench.towers[0])
    expected = bench.expected([lambda x: 2 * plain(x), plain], list(plain.parameters()))
    for keep_graph in KEPT:
        reductions = []
        tower = ddp(copy.deepcopy(bench.towers[0]), reductions)
        cache = GradCache([Inside(tower), tower], CHUNK, gathered_loss, keep_graph=keep_graph)
        cache(*bench.inputs(), no_sync_except_last=True)
        same(tower, expected)
        assert reductions == [4]


def the_last_side_may_be_frozen(rank: int) -> None:
    """Locked-image tuning in one module: the side that comes last needs no gradient, and the first is reduced."""
    bench = Bench(rank)
    both = TwoTowers().double()
    both.image.requires_grad_(False)
    plain = copy.deepcopy(both)
    expected = bench.expected([plain.text, plain.image], list(plain.parameters()))
    text, image = bench.inputs()
    for keep_graph in KEPT:
        reductions: list[int] = []
        wrapped = ddp(copy.deepcopy(both), reductions, find_unused_parameters=True)
        cache = GradCache([wrapped, wrapped], CHUNK, gathered_loss, keep_graph=keep_graph)
        cache({"text": text}, {"image": image}, no_sync_except_last=True)
        assert reductions == [4]
        same(wrapped, expected)


def ddp_accumulates_over_steps(rank: int) -> None:
    """Three steps, one reduction: within the cache's no_sync, or within DDP's own."""
    bench = Bench(rank)
    plain = copy.deepcopy(bench.towers)
    expected = bench.expected(plain, [p for t in plain for p in t.parameters()], steps=3)
    for keep_graph in KEPT:
        reductions: list[int] = []
        towers = [ddp(copy.deepcopy(t), reductions) for t in bench.towers]
        cache = GradCache(towers, CHUNK, gathered_loss, keep_graph=keep_graph)
        for step in range(3):
            with nullcontext() if step == 2 else cache.no_sync():
                cache(*bench.inputs(step), no_sync_except_last=step > 0)
        assert len(reductions) == 2
        same(towers, expected)
        for step in range(3):
            with (
                nullcontext() if step == 2 else towers[0].no_sync(),
                nullcontext() if step == 2 else towers[1].no_sync(),
            ):
                cache(*bench.inputs(step), no_sync_except_last=True)
        assert len(reductions) == 4
        same(towers, expected)


def ddp_with_scaler_checkpoints_and_buffers(rank: int) -> None:
    """What else a step may have: a scaler, recomputing encoders, buffers that DDP sends around."""
    bench = Bench(rank)

    class Checkpointed(nn.Module):
        def __init__(self, tower: nn.Module) -> None:
            super().__init__()
            self.tower = tower
            self.calls: Tensor
            self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return checkpoint(self.tower, x, use_reentrant=False)

    plain = copy.deepcopy(bench.towers)
    expected = bench.expected(plain, [p for t in plain for p in t.parameters()])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
    for keep_graph in KEPT:
        for options in ({}, {"gradient_as_bucket_view": True}):
            reductions: list[int] = []
            towers = [ddp(Checkpointed(copy.deepcopy(t)), reductions, **options) for t in bench.towers]
            optimizer = torch.optim.SGD([p for t in towers for p in t.parameters()])
            cache = GradCache(towers, CHUNK, gathered_loss, scaler=scaler, keep_graph=keep_graph)
            for _ in range(3):
                reductions.clear()
                cache(*bench.inputs(), no_sync_except_last=True)
                scaler.unscale_(optimizer)
                assert reductions == [4, 4]
                same(towers, expected)
                scaler.update()


def shard(module: nn.Module, *inner: nn.Module) -> Any:
    mesh = init_device_mesh("cpu", (RANKS,))
    for one in inner:
        fully_shard(one, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def reduce_scatters(cache: GradCache, inputs: tuple[Tensor, Tensor], *, once: bool = True) -> int:
    """A step's, of parameters' gradients; `all_gather`'s own backward pass works otherwise under gloo."""
    with CommDebugMode() as mode:
        cache(*inputs, no_sync_except_last=once)
    return sum(count for op, count in mode.get_comm_counts().items() if "reduce_scatter" in str(op))


def fsdp2_reduces_once(rank: int) -> None:
    """Two towers of two sharded groups each; one tower for both sides; two methods of one module."""
    bench = Bench(rank)
    plain = copy.deepcopy(bench.towers)
    expected = bench.expected(plain, [p for t in plain for p in t.parameters()])
    alone = copy.deepcopy(bench.towers[0])
    expected_alone = bench.expected([alone, alone], list(alone.parameters()))
    both = TwoTowers().double()
    plain_both = copy.deepcopy(both)
    expected_both = bench.expected([plain_both.image, plain_both.text], list(plain_both.parameters()))
    for keep_graph, offload in ((0, False), (2, False), (99, False), (2, True)):  # offload: through its hooks
        towers = [copy.deepcopy(t) for t in bench.towers]
        towers = [shard(t, t.layers[0]) for t in towers]
        cache = GradCache(towers, CHUNK, gathered_loss, keep_graph=keep_graph, offload=offload)
        for _ in range(2):
            assert reduce_scatters(cache, bench.inputs()) == 4
            same(towers, expected)
        assert reduce_scatters(cache, bench.inputs(), once=False) == 12
        same(towers, expected)
        tower = shard(copy.deepcopy(bench.towers[0]))
        cache = GradCache([tower, tower], CHUNK, gathered_loss, keep_graph=keep_graph)
        assert reduce_scatters(cache, bench.inputs()) == 1
        same(tower, expected_alone)
        clip = copy.deepcopy(both)
        shard(clip, clip.image, clip.text)
        register_fsdp_forward_method(clip, "encode_image")
        register_fsdp_forward_method(clip, "encode_text")
        cache = GradCache([clip.encode_image, clip.encode_text], CHUNK, gathered_loss, keep_graph=keep_graph)
        assert reduce_scatters(cache, bench.inputs()) == 2
        same(clip, expected_both)


def fsdp2_accumulates_over_steps(rank: int) -> None:
    bench = Bench(rank)
    plain = copy.deepcopy(bench.towers)
    expected = bench.expected(plain, [p for t in plain for p in t.parameters()], steps=3)
    for keep_graph in KEPT:
        towers = [shard(copy.deepcopy(t)) for t in bench.towers]
        cache = GradCache(towers, CHUNK, gathered_loss, keep_graph=keep_graph)
        for step in range(3):
            with nullcontext() if step == 2 else cache.no_sync():
                count = reduce_scatters(cache, bench.inputs(step))
            assert count == (2 if step == 2 else 0)
        same(towers, expected)


def what_would_hang_or_hide_is_refused(rank: int) -> None:
    bench = Bench(rank)
    towers = [shard(copy.deepcopy(t)) for t in bench.towers]
    for keep_graph, says in (("1GiB", "got a size with FSDPTower"), ("auto", "got auto with FSDPTower")):
        with pytest.raises(ValueError, match=f"keep_graph: {says}, .* needs a number of chunks, the same in all"):
            GradCache(towers, CHUNK, loss_fn, keep_graph=keep_graph)(*bench.inputs())
    hidden = ddp(copy.deepcopy(bench.towers[0]), [])
    functions: list[Callable[[Tensor], Tensor]] = [lambda x: hidden(x), lambda x: hidden(x)]
    with pytest.raises(ValueError, match="a function, where there are several processes"):
        GradCache(functions, CHUNK, loss_fn, keep_graph=2)(*bench.inputs())
    plain = copy.deepcopy(bench.towers[0])
    expected = bench.expected([plain, plain], list(plain.parameters()))
    GradCache(functions, CHUNK, gathered_loss)(*bench.inputs())  # without kept graphs they are as ever
    same(hidden, expected)


CHECKS: list[Callable[[int], None]] = [
    ddp_reduces_once_for_each_model,
    ddp_with_a_loss_of_each_process,
    one_ddp_for_both_sides_reduces_once,
    the_last_side_may_be_frozen,
    ddp_accumulates_over_steps,
    ddp_with_scaler_checkpoints_and_buffers,
    fsdp2_reduces_once,
    fsdp2_accumulates_over_steps,
    what_would_hang_or_hide_is_refused,
]


def work(rank: int, directory: Path) -> None:
    """All checks in one process; what came of each is a file. After a failure the processes are out of step."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=RANKS)
    for check in CHECKS:
        try:
            check(rank)
            outcome = ""
        except Exception:
            outcome = traceback.format_exc()
        (directory / f"{check.__name__}-{rank}").write_text(outcome)
        if outcome:
            return
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ranks")
    processes = [
        multiprocessing.get_context("spawn").Process(target=work, args=(rank, directory), daemon=True)
        for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
        process.kill()
        process.join()
    return directory


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_two_processes(check: Callable[[int], None], outcomes: Path) -> None:
    for rank in range(RANKS):
        found = outcomes / f"{check.__name__}-{rank}"
        assert found.exists(), "not reached: see the checks before it"
        assert found.read_text() == ""
