"""The memory budget of gradient caching: fewer forward passes, the same bits."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from smartclip_kernels.functional import clip_loss, smartclip_loss
from smartclip_kernels.grad_cache import GradCache, keep
from smartclip_kernels.grad_cache.keep import Graphs, Limit, free_on_host, parse_keep_graph
from tests.test_grad_cache import Counting, D, N, Setup, assert_same, take_gradients, uncached

KEPT = (0, 1, 4, 99, "0B", "1GiB", "auto")
CHUNKS = 8


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def copies_to_host(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """As if the host were another device: what is offloaded is copied. The copies' originals."""
    copied: list[Tensor] = []
    copy_to_host = keep._copy_to_host

    def copy(x: Tensor) -> Tensor:
        copied.append(x)
        return copy_to_host(x)

    monkeypatch.setattr(keep, "_is_on_host", lambda x: False)
    monkeypatch.setattr(keep, "_copy_to_host", copy)
    return copied


def same_bits(got: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    assert sum(e is not None and bool(e.abs().max() > 0) for e in expected) >= 2
    for mine, other in zip(got, expected, strict=True):
        assert (mine is None) == (other is None)
        assert mine is None or other is None or torch.equal(mine, other)


def compare(
    step: Callable[..., Tensor], parameters: Sequence[Tensor], budgets: Sequence[int | str] = KEPT, **options: Any
) -> None:
    """`step(keep_graph=…)` with every budget: loss, gradients and the random numbers that follow, bit for bit."""
    torch.manual_seed(5)
    expected_loss = step(keep_graph=0)
    expected, following = take_gradients(parameters), torch.rand(3)
    for keep_graph in budgets:
        torch.manual_seed(5)
        loss = step(keep_graph=keep_graph, **options)
        assert torch.equal(loss, expected_loss)
        same_bits(take_gradients(parameters), expected)
        assert torch.equal(torch.rand(3), following)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("as_mapping", [False, True], ids=["tuple", "mapping"])
def test_no_budget_changes_a_bit(as_mapping: bool, precision: str) -> None:
    """Dropout, masks, mappings, uneven chunks, in three and five of them; autocast with its copies of weights; fp16."""
    setup = Setup(torch.float32, with_mask=True, as_mapping=as_mapping)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if precision == "float16" else None

    def loss_fn(image: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        return smartclip_loss(image, text, mask, setup.log_scale.exp(), setup.bias)

    def step(**budget: Any) -> Tensor:
        cache = GradCache(
            [setup.image, setup.text], [8, 5], loss_fn, fp16=precision == "float16", scaler=scaler, **budget
        )
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            return cache(setup.pixels, setup.tokens)

    compare(step, setup.trained())


def test_offloading_changes_no_bit(copies_to_host: list[Tensor]) -> None:
    """What is saved and neither parameter nor input goes to the host and comes back, with its strides."""
    setup = Setup(torch.float32, with_mask=True)

    def loss_fn(image: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        return smartclip_loss(image, text, mask, setup.log_scale.exp(), setup.bias)

    def step(**budget: Any) -> Tensor:
        return GradCache([setup.image, setup.text], [8, 5], loss_fn, **budget)(setup.pixels, setup.tokens)

    counts = []
    for keep_graph in (1, 4, 99, "1GiB", "auto"):
        copies_to_host.clear()
        compare(step, setup.trained(), [keep_graph], offload=True)
        counts.append(len(copies_to_host))
        storages = {x.untyped_storage().data_ptr() for x in (*setup.trained(), setup.pixels, *setup.tokens.values())}
        assert not storages & {x.untyped_storage().data_ptr() for x in copies_to_host}
    assert 0 < counts[0] < counts[1] < counts[2] == counts[3] == counts[4]
    # On the host already: nothing to copy.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keep, "_is_on_host", lambda x: True)
        copies_to_host.clear()
        compare(step, setup.trained(), [99], offload=True)
        assert not copies_to_host
    transposed = torch.arange(6.0).reshape(2, 3).T
    saved = Graphs(Limit(), offload=True)._pack(transposed)
    assert saved is not None and saved.tensor is not None
    assert (saved.tensor.stride(), saved.tensor.data_ptr() == transposed.data_ptr()) == ((1, 3), False)


class Tower(nn.Module):
    """Counts the rows that it encodes, and what it was called with."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first = nn.Linear(9, width)
        self.rest = nn.Sequential(nn.GELU(), nn.Dropout(0.1), nn.Linear(width, D))
        self.seen: list[tuple[int, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((int(x[0, 0]) // 8, torch.is_grad_enabled()))
        return self.rest(self.first(x))

    def passes(self) -> float:
        """Forward passes over its chunks, since the last call."""
        passes = len(self.seen) / CHUNKS
        self.seen.clear()
        return passes


def numbered(width: int = 9) -> Tensor:
    """Eight chunks of eight rows that know their number."""
    x = torch.randn(8 * CHUNKS, width)
    x[:, 0] = torch.arange(8 * CHUNKS)
    return x


def two_towers_loss(image: Tensor, text: Tensor) -> Tensor:
    return clip_loss(image, text, 0.01)


def saved_bytes(tower: nn.Module, x: Tensor) -> int:
    """Of one chunk's graph, counted apart from the code under test."""
    outside = {p.untyped_storage().data_ptr() for p in (*tower.parameters(), x)}
    storages = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in outside:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        output = tower(x)  # the graph, so that no address is used twice
    assert output.requires_grad
    return sum(storages.values())


def test_a_budget_for_half_of_the_chunks_saves_half_of_the_second_pass() -> None:
    """Encoder work, in chunks: 2 passes without a budget, 1 with all; what is kept comes first, within the budget."""
    towers, x = [Tower(), Tower()], numbered()
    of_a_chunk = saved_bytes(towers[0], x[:8])
    assert of_a_chunk > 8 * 64 * 4
    alive: list[int] = []

    def loss_fn(image: Tensor, text: Tensor) -> Tensor:
        tensors = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        alive.append(sum(storages.values()))
        return two_towers_loss(image, text)

    def passes(keep_graph: int | str) -> float:
        for tower in towers:
            tower.seen.clear()
        GradCache(towers, 8, loss_fn, keep_graph=keep_graph)(x, x)
        return sum(len(tower.seen) for tower in towers) / (2 * CHUNKS)

    for budget, expected in (
        (0, 2.0), (CHUNKS, 1.5), (3, 2 - 3 / 16), (2 * CHUNKS, 1.0), (99, 1.0), ("auto", 1.0),
        (f"{CHUNKS * of_a_chunk}B", 1.5), (f"{CHUNKS * of_a_chunk - 1}B", 2 - 7 / 16),
        (f"{2 * CHUNKS * of_a_chunk}B", 1.0), (f"{of_a_chunk - 1}B", 2.0),
    ):  # fmt: skip
        assert passes(budget) == expected
    assert passes(f"{CHUNKS * of_a_chunk}B") <= 1.55
    # What the loss sees alive: the kept graphs and nothing of the one that did not fit.
    passes(0)
    nothing = alive[-1]
    passes(f"{5 * of_a_chunk + of_a_chunk // 2}B")
    some = alive[-1]
    outputs = 5 * 8 * D * 4
    assert 5 * of_a_chunk <= some - nothing <= 5 * of_a_chunk + outputs
    # In order: first pass, where chunk 0 tells what needs a gradient and two more are kept, then who was not kept.
    towers[0].seen.clear()
    GradCache(towers, 8, two_towers_loss, keep_graph=3)(x, x)
    assert towers[0].seen == [(i, i < 3) for i in range(CHUNKS)] + [(i, True) for i in range(3, CHUNKS)]


def test_frozen_encoders_take_no_part_of_the_budget() -> None:
    frozen, trained, x = Tower().requires_grad_(False), Tower(), numbered()
    models: list[Any] = [lambda y: frozen(y), frozen, trained]
    budgets = (CHUNKS, f"{CHUNKS * saved_bytes(trained, x[:8])}B")
    trained.seen.clear()
    for keep_graph in budgets:
        GradCache(models, 8, lambda a, b, c: two_towers_loss(a + b, c), keep_graph=keep_graph)(x, x, x)
        assert (trained.passes(), frozen.passes()) == (1.0, 2.0)  # twice there, once each


def test_shared_and_tied_encoders() -> None:
    """One module for both sides; two whose first weight is one: sums of gradients in the same order."""
    one, other, x = Tower(), Tower(), numbered()
    y = x.roll(1, 1)
    y[:, 0] = x[:, 0]
    other.first.weight = one.first.weight
    for models in ([one, one], [one, other]):
        parameters = list({id(p): p for m in models for p in m.parameters()}.values())
        compare(
            partial(lambda models, **budget: GradCache(models, 8, two_towers_loss, **budget)(x, y), models),
            parameters,
            [*KEPT, 11],
        )


def test_random_numbers_are_drawn_once_for_what_is_kept() -> None:
    draws: list[float] = []
    weight = nn.Parameter(torch.ones(()))

    def encode(x: Tensor) -> Tensor:
        draws.append(torch.rand(()).item())
        return weight * x * draws[-1]

    GradCache([encode], 2, torch.sum, keep_graph=2)(torch.randn(10, 3))
    assert len(set(draws)) == 5
    assert draws[5:] == draws[2:5]


def test_several_steps_add_up() -> None:
    tower, x = Tower(), numbered()

    def steps(**budget: Any) -> Tensor:
        cache = GradCache([tower, tower], 8, two_towers_loss, **budget)
        with cache.no_sync():  # nothing to hold back in one process
            cache(x, x + 1)
        return cache(x + 1, x)

    compare(steps, list(tower.parameters()), [5, "1GiB"])


def test_an_overflow_skips_the_step_with_kept_graphs_too() -> None:
    """GradScaler finds what did not fit in float16, skips the update and halves its scale."""
    for keep_graph in (0, 3, "1GiB"):
        tower, x = Tower(), numbered() / 64
        before = tower.first.weight.detach().clone()
        optimizer = torch.optim.SGD(tower.parameters(), lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1)
        cache = GradCache([tower, tower], 8, two_towers_loss, fp16=True, scaler=scaler, keep_graph=keep_graph)
        cache(x, x)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(tower.first.weight, before)
        assert scaler.get_scale() == 2.0**39
        optimizer.zero_grad()
        scaler.update(1.0)
        cache(x, x)
        scaler.step(optimizer)
        scaler.update()
        assert not torch.equal(tower.first.weight, before)
        assert scaler.get_scale() == 2.0


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # without a graph, rightly none has
def test_encoders_that_recompute(use_reentrant: bool) -> None:
    """Activation checkpoints within an encoder: of a kept graph only their inputs wait."""
    setup = Setup(torch.float64, with_mask=False)
    setup.pixels.requires_grad_()  # what a reentrant checkpoint asks for

    def image(x: Tensor) -> Tensor:
        for layer in setup.image.layers:
            x = checkpoint(layer, x, use_reentrant=use_reentrant)
        return x

    def step(**budget: Any) -> Tensor:
        def loss_fn(i: Tensor, t: Tensor) -> Tensor:
            return clip_loss(i, t, 0.5)

        return GradCache([image, setup.text], 8, loss_fn, **budget)(setup.pixels, setup.tokens)

    compare(step, [*setup.image.parameters(), *setup.text.parameters(), setup.pixels], [1, 99, "1GiB"])


def test_compiled_encoders() -> None:
    """Compiled once with a graph and once without, whatever is kept; recording bytes compiles nothing anew."""
    torch.compiler.reset()
    setup = Setup(torch.float64, with_mask=False)
    counter = CompileCounterWithBackend("aot_eager")
    models: list[Any] = [torch.compile(setup.image, backend=counter, dynamic=False), setup.text]

    def loss_fn(image: Tensor, text: Tensor) -> Tensor:
        return clip_loss(image, text, 9.0)

    x, tokens = setup.pixels[:20], {k: v[:20] for k, v in setup.tokens.items()}  # five equal chunks
    uncached([setup.image, setup.text], [x, tokens], [4, 5], loss_fn)
    take_gradients(setup.trained())
    for keep_graph in (2, "1GiB", 0):
        torch.manual_seed(5)
        uncached([setup.image, setup.text], [x, tokens], [4, 5], loss_fn)
        expected = take_gradients(setup.trained())
        torch.manual_seed(5)
        GradCache(models, [4, 5], loss_fn, keep_graph=keep_graph)(x, tokens)
        assert_same(take_gradients(setup.trained()), expected, 1e-10)
    assert counter.frame_count == 2
    torch.compiler.reset()


def test_what_changes_in_place_is_found_out() -> None:
    """Autograd does not look at versions where hooks keep its tensors: we do."""

    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.calls: Tensor
            self.register_buffer("calls", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * (self.weight * self.calls)

    x = torch.randn(6, 3)
    GradCache([Counter()], 2, torch.sum)(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        GradCache([Counter()], 2, torch.sum, keep_graph=2)(x)
    with pytest.raises(RuntimeError, match=r"keep_graph: a tensor of shape \(3,\) .* changed in place"):
        GradCache([Counter()], 2, torch.sum, keep_graph="1GiB")(x)


def test_what_is_counted() -> None:
    """Every storage once, over all chunks; not parameters, not even through views of a function's; not the input."""
    weight = nn.Parameter(torch.randn(3, 5))
    x = torch.randn(2, 3, requires_grad=True)
    graphs = Graphs(Limit(bytes=1000), outside=[x])
    shared = torch.randn(5, 5, requires_grad=True).exp()
    outputs = []
    for _ in range(2):
        with graphs.record(True):
            y = (x @ weight) @ shared  # saves x, weight's view, x @ weight (2, 5), shared (5, 5)
            outputs.append((y.exp() * weight[0, 0], y))  # saves exp's output (2, 5), twice
        assert not graphs.full
    assert graphs.bytes == 4 * (25 + 2 * (10 + 10))
    with graphs.record(False):
        assert (x @ weight).exp().requires_grad  # only looked at: nothing is saved
    assert graphs.bytes == 4 * (25 + 2 * (10 + 10))
    with graphs.record(True):
        first = (x @ weight).exp()
        z = first
        for _ in range(40):
            z = z.exp()
    assert graphs.full and not graphs.open
    assert graphs.bytes <= 1000
    assert sum(type(o) is keep.Saved and o.tensor is None for o in gc.get_objects()) > 5  # let go at once


def test_sizes() -> None:
    sizes = {
        "0B": 0,
        "7 B": 7,
        "1.5KiB": 1536,
        "2KB": 2000,
        "512MiB": 2**29,
        "3MB": 3 * 10**6,
        "2GiB": 2**31,
        "1TiB": 2**40,
    }
    assert {s: parse_keep_graph(s).bytes for s in sizes} == sizes
    assert all(parse_keep_graph(s).chunks is None for s in sizes)
    assert parse_keep_graph(3) == Limit(chunks=3)
    assert parse_keep_graph("auto").is_auto
    for wrong in ("", "12", "2Gb", "2gib", "-1GiB", "1e3B", "GiB", "2  GiB", " 2GiB", "2GiB ", "Auto", "٣B", "1.B"):
        with pytest.raises(ValueError, match=r"keep_graph: got '.*', needs a number of chunks, 'auto' or a size"):
            parse_keep_graph(wrong)
    with pytest.raises(ValueError, match="keep_graph: got -1, needs"):
        parse_keep_graph(-1)
    for kind in (True, 2.0, None):
        with pytest.raises(TypeError, match=f"keep_graph: got {type(kind).__name__}, needs a number of chunks"):
            parse_keep_graph(kind)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="offload: got True with keep_graph=0"):
        GradCache([nn.Linear(2, 2)], 2, torch.sum, offload=True)
    synchronised = nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2))
    with pytest.raises(ValueError, match="keep_graph: got a size with Sequential, whose forward pass waits"):
        GradCache([synchronised], 2, torch.sum, keep_graph="1MiB")(torch.randn(4, 2))


def test_auto_takes_a_share_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the fullest device, its allocator's unused blocks included, less gradients that are yet to come."""
    devices = {
        torch.device("cuda", 0): SimpleNamespace(free=1000, reserved=500, allocated=100),
        torch.device("cuda", 1): SimpleNamespace(free=9000, reserved=0, allocated=0),
    }
    module = SimpleNamespace(
        mem_get_info=lambda d: (devices[d].free, 10**6),
        memory_reserved=lambda d: devices[d].reserved,
        memory_allocated=lambda d: devices[d].allocated,
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(keep, "free_on_host", lambda: 4000)
    parameters = [nn.Parameter(torch.zeros(25)), nn.Parameter(torch.zeros(25), requires_grad=False)]
    assert keep.auto_budget(list(devices), parameters, offload=False) == 0.75 * (1400 - 100)
    assert keep.auto_budget(list(devices), parameters, offload=True) == 0.75 * 4000
    assert keep.auto_budget([], parameters, offload=False) == 0.75 * (4000 - 100)
    parameters[0].grad = torch.zeros(25)
    assert keep.auto_budget([], parameters, offload=False) == 0.75 * 4000
    parameters[0].grad = None
    assert keep.auto_budget([], parameters * 50, offload=False) == 0
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    with pytest.raises(RuntimeError, match="'auto' cannot tell the free memory of mps:0, needs a size"):
        keep.auto_budget([torch.device("mps", 0)], parameters, offload=False)


def test_free_memory_of_the_host(tmp_path: Path) -> None:
    """What Linux has available, or what the tightest of the process's control groups leaves, its page cache added."""
    with pytest.raises(RuntimeError, match="'auto' finds no /proc/meminfo here"):
        free_on_host(tmp_path)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 900 kB\nMemAvailable:   500 kB\n")
    assert free_on_host(tmp_path) == 500 * 1024
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/job/1\n3:cpuset:/\n0::/job\n")

    def group(path: str, **files: str) -> None:
        (tmp_path / "sys/fs/cgroup" / path).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (tmp_path / "sys/fs/cgroup" / path / name.replace("__", ".")).write_text(f"{text}\n")

    group("job", memory__max="max")
    assert free_on_host(tmp_path) == 500 * 1024
    group("", memory__max="300000", memory__current="100000", memory__stat="anon 5\ninactive_file 7000")
    assert free_on_host(tmp_path) == 207_000
    group(
        "memory/job/1",
        memory__limit_in_bytes="90000",
        memory__usage_in_bytes="30000",
        memory__stat="inactive_file 1\ntotal_inactive_file 500",
    )
    assert free_on_host(tmp_path) == 60_500
    assert free_on_host() > 0  # here


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch sees")
def test_on_a_device() -> None:
    """Budgets and offloading where there is a device to offload from."""
    torch.manual_seed(0)
    towers = [Tower(256).cuda(), Tower(256).cuda()]
    parameters = list(chain.from_iterable(t.parameters() for t in towers))
    x = numbered().cuda()
    for offload in (False, True):

        def step(keep_graph: int | str, offload: bool = False) -> Tensor:
            return GradCache(towers, 8, two_towers_loss, keep_graph=keep_graph, offload=offload and keep_graph != 0)(
                x, x
            )

        compare(step, parameters, [5, 99, "1GiB", "auto"], offload=offload)


def test_counting_is_not_in_the_way() -> None:
    """The first test file's counting tower: a kept chunk is called once, with a graph."""
    tower = Counting(nn.Linear(9, D))
    GradCache([tower, tower], 8, two_towers_loss, keep_graph=99)(torch.randn(N, 9), torch.randn(N, 9))
    assert (tower.calls, tower.rows_with_graph) == (6, 8)


class Token:
    pass


class Marked(torch.autograd.Function):
    """Its graph holds a token."""

    alive: weakref.WeakSet[Token]

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.token = Token()
        Marked.alive.add(ctx.token)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@pytest.mark.parametrize(("keep_graph", "most"), [(0, [0] * 9), (2, [0, 1, 2, 2, 2, 0, 0])])
def test_graphs_live_as_long_as_they_are_needed(keep_graph: int, most: list[int]) -> None:
    """None of another chunk when a chunk is encoded or the loss is taken, but those that are kept."""
    weight, alive = nn.Parameter(torch.ones(())), []
    Marked.alive = weakref.WeakSet()

    def encode(x: Tensor) -> Tensor:
        alive.append(len(Marked.alive))
        return Marked.apply(weight * x)

    def loss_fn(y: Tensor) -> Tensor:
        alive.append(len(Marked.alive))
        return y.sum()

    GradCache([encode], 2, loss_fn, keep_graph=keep_graph)(torch.randn(8, 3))
    assert alive == most
    assert not Marked.alive


@pytest.mark.parametrize("keep_graph", [99, "1GiB", "100B"])
def test_graphs_that_nobody_differentiates_are_freed(keep_graph: int | str) -> None:
    """An output that the loss leaves alone, and a loss that fails."""
    weight = nn.Parameter(torch.ones(()))
    Marked.alive = weakref.WeakSet()

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        return weight * x, (Marked.apply(weight * x).exp()).tanh()

    def fails(y: Tensor, z: Tensor) -> Tensor:
        assert keep_graph == "100B" or len(Marked.alive) == 4
        raise ArithmeticError

    GradCache([encode], 2, lambda y, z: y.sum(), keep_graph=keep_graph)(torch.randn(8, 3))
    assert not Marked.alive
    with pytest.raises(ArithmeticError):
        GradCache([encode], 2, fails, keep_graph=keep_graph)(torch.randn(8, 3))
    assert not Marked.alive
