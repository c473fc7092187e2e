"""Gradient caching against the same chunks, with the same dropout, under one graph."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Sequence
from itertools import chain
from types import SimpleNamespace
from typing import Any, NamedTuple

import open_clip
import pytest
import torch
from open_clip.loss import ClipLoss as OpenClipLoss
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from smartclip_kernels.functional import clip_loss, siglip_loss, smartclip_loss
from smartclip_kernels.grad_cache import GradCache
from smartclip_kernels.grad_cache.inputs import devices_of
from smartclip_kernels.modules import ClipLoss, MaskHead, SmartClipLoss

N, D = 22, 12
TOLERANCES = {torch.float64: 1e-10, torch.float32: 5e-6}  # relative to the largest gradient of a tensor
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class ImageTower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(9, 32), nn.GELU(), nn.Dropout(0.3), nn.Linear(32, D))

    def forward(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.layers(pixels), dim=-1)


class TextTower(nn.Module):
    """Nested input, dropout, and a mask beside the embedding."""

    def __init__(self, *, with_mask: bool = True, as_mapping: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 16)
        self.dropout = nn.Dropout(0.2)
        self.projection = nn.Linear(16, D)
        self.head = MaskHead(16, D, initial_keep=0.6, explore=True) if with_mask else None
        self.as_mapping = as_mapping

    def forward(self, tokens: Tensor, padding: Tensor, scaling: float = 1.0) -> Any:
        states = self.dropout(self.embedding(tokens)) * scaling
        text = F.normalize(self.projection(states.masked_fill(padding[..., None], 0).sum(1)), dim=-1)
        if self.head is None:
            return text
        mask = self.head(states, padding)
        return {"mask": mask, "text": text} if self.as_mapping else (text, mask)


class Setup:
    """Two towers, a learned scale and bias, and inputs; `parameters` names everything that is trained."""

    def __init__(self, dtype: torch.dtype, *, with_mask: bool, as_mapping: bool = False) -> None:
        self.image = ImageTower().to(dtype)
        self.text = TextTower(with_mask=with_mask, as_mapping=as_mapping).to(dtype)
        self.log_scale = nn.Parameter(torch.tensor(2.3, dtype=dtype))
        self.bias = nn.Parameter(torch.tensor(-4.0, dtype=dtype))
        self.pixels = torch.randn(N, 9, dtype=dtype)
        self.tokens = {"tokens": torch.randint(30, (N, 5)), "padding": torch.arange(5) >= torch.randint(1, 6, (N, 1))}

    def trained(self) -> list[Tensor]:
        return [*self.image.parameters(), *self.text.parameters(), self.log_scale, self.bias]


def chunks_of(x: Any, size: int) -> list[Any]:
    """Chunks as a user would write them, not as GradCache does."""
    if isinstance(x, Tensor):
        return list(x.split(size))
    return [dict(zip(x, parts, strict=True)) for parts in zip(*(v.split(size) for v in x.values()), strict=True)]


def uncached(
    models: list[Any], inputs: list[Any], sizes: list[int], loss_fn: Callable[..., Tensor], **loss_kwargs: Any
) -> Tensor:
    """The same chunks in the same order under one graph."""
    positional, keywords = [], dict(loss_kwargs)
    for model, x, size in zip(models, inputs, sizes, strict=True):
        outputs = [model(**c) if isinstance(c, dict) else model(c) for c in chunks_of(x, size)]
        if isinstance(outputs[0], Tensor):
            positional.append(torch.cat(outputs))
        elif isinstance(outputs[0], tuple):
            positional += [torch.cat(parts) for parts in zip(*outputs, strict=True)]
        else:
            keywords |= {key: torch.cat([o[key] for o in outputs]) for key in outputs[0]}
    loss = loss_fn(*positional, **keywords)
    loss.backward()
    return loss.detach()


def take_gradients(tensors: Sequence[Tensor]) -> list[Tensor | None]:
    found = [x.grad for x in tensors]
    for x in tensors:
        x.grad = None
    return found


def assert_same(got: list[Tensor | None], expected: list[Tensor | None], tolerance: float) -> None:
    assert sum(g is not None and bool(g.abs().max() > 0) for g in expected) >= 2
    for mine, other in zip(got, expected, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None and other is not None:
            torch.testing.assert_close(mine, other, rtol=0, atol=tolerance * float(other.abs().max()))


def compare(
    setup: Setup, sizes: list[int], loss_fn: Callable[..., Tensor], dtype: torch.dtype, **loss_kwargs: Callable[[], Any]
) -> None:
    """Loss, gradients and the random numbers that follow, cached and not. Keyword arguments are made anew for each."""
    models, inputs = [setup.image, setup.text], [setup.pixels, setup.tokens]
    torch.manual_seed(5)
    expected_loss = uncached(models, inputs, sizes, loss_fn, **{k: v() for k, v in loss_kwargs.items()})
    expected, expected_random = take_gradients(setup.trained()), torch.rand(3)
    torch.manual_seed(5)
    loss = GradCache(models, sizes, loss_fn)(*inputs, **{k: v() for k, v in loss_kwargs.items()})
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected_loss, rtol=TOLERANCES[dtype], atol=0)
    assert_same(take_gradients(setup.trained()), expected, TOLERANCES[dtype])
    assert torch.equal(torch.rand(3), expected_random)


SIZES = pytest.mark.parametrize("sizes", [[8, 5], [22, 22], [1, 100], [11, 22]], ids=str)


@DTYPES
@SIZES
@pytest.mark.parametrize("loss", [clip_loss, siglip_loss], ids=["clip", "siglip"])
def test_equals_uncached(loss: Any, sizes: list[int], dtype: torch.dtype) -> None:
    setup = Setup(dtype, with_mask=False)
    compare(setup, sizes, lambda i, t: loss(i, t, setup.log_scale.exp(), setup.bias), dtype)


@DTYPES
@SIZES
@pytest.mark.parametrize("objective", ["softmax", "sigmoid"])
@pytest.mark.parametrize("as_mapping", [False, True], ids=["tuple", "mapping"])
def test_equals_uncached_with_a_mask_head(
    as_mapping: bool, objective: Any, sizes: list[int], dtype: torch.dtype
) -> None:
    setup = Setup(dtype, with_mask=True, as_mapping=as_mapping)
    module = SmartClipLoss(objective, sparsity_weight=0.3)

    def loss_fn(image: Tensor, text: Tensor, mask: Tensor, **scale_and_bias: Tensor) -> Tensor:
        return module(image, text, mask, **scale_and_bias)

    # Scale and bias by keyword, with a graph of their own behind them.
    compare(setup, sizes, loss_fn, dtype, logit_scale=lambda: setup.log_scale.exp(), logit_bias=lambda: setup.bias * 1)


@DTYPES
def test_equals_uncached_with_any_callable(dtype: torch.dtype) -> None:
    setup = Setup(dtype, with_mask=True)

    def loss_fn(image: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        noisy = image + 0.1 * torch.randn_like(image)  # a loss may draw random numbers too
        return (noisy @ (text * mask).T * setup.log_scale.exp() + setup.bias).square().mean()

    compare(setup, [8, 5], loss_fn, dtype)


def test_several_captions_an_image_and_ids() -> None:
    """Chunks differ in number from model to model; the text encoder's output has more rows than its input."""
    setup = Setup(torch.float64, with_mask=False)
    tokens = torch.randint(30, (N, 3, 5))

    def encode_text(tokens: Tensor) -> Tensor:
        return setup.text(tokens.flatten(0, 1), torch.zeros(tokens.flatten(0, 1).shape, dtype=torch.bool))

    ids = torch.arange(N)

    def loss_fn(image: Tensor, text: Tensor) -> Tensor:
        return clip_loss(image, text, setup.log_scale.exp(), image_ids=ids, text_ids=ids.repeat_interleave(3))

    models: list[Callable[..., Any]] = [setup.image, encode_text]
    inputs = [setup.pixels, tokens]
    torch.manual_seed(5)
    uncached(models, inputs, [8, 5], loss_fn)
    expected = take_gradients(setup.trained())
    torch.manual_seed(5)
    GradCache(models, [8, 5], loss_fn)(*inputs)
    assert_same(take_gradients(setup.trained()), expected, 1e-10)


def test_one_module_twice_and_gradients_accumulate() -> None:
    setup = Setup(torch.float64, with_mask=False)
    other = torch.randn(N, 9, dtype=torch.float64)

    def loss_fn(a: Tensor, b: Tensor) -> Tensor:
        return clip_loss(a, b, setup.log_scale.exp())

    models, inputs = [setup.image, setup.image], [setup.pixels, other]
    cache = GradCache(models, 5, loss_fn)
    for _ in range(2):
        uncached(models, inputs, [5, 5], loss_fn)
    expected = take_gradients(setup.trained())
    torch.manual_seed(0)  # another dropout: shows that the comparison below sees it
    for _ in range(2):
        cache(*inputs)
    different = take_gradients(setup.trained())
    assert not torch.allclose(different[0], expected[0], rtol=1e-3)  # type: ignore[arg-type]
    torch.manual_seed(1)
    for _ in range(2):
        uncached(models, inputs, [5, 5], loss_fn)
    expected = take_gradients(setup.trained())
    torch.manual_seed(1)
    for _ in range(2):
        cache.cache_step(*inputs)
    assert_same(take_gradients(setup.trained()), expected, 1e-10)


class Pair(NamedTuple):
    left: Tensor
    right: list[Tensor]


def test_nested_inputs() -> None:
    """Everything with a dimension is split, in place; the rest goes to every chunk."""
    seen: list[Any] = []
    weight = nn.Parameter(torch.ones(()))

    def encode(pair: Pair, *, options: dict[str, Any], scaling: Tensor) -> Tensor:
        seen.append((pair, options, scaling))
        return weight * scaling * (pair.left + pair.right[0] + options["more"]["x"])

    x = torch.arange(14.0).reshape(7, 2)
    batch = UserDict(pair=Pair(x, [2 * x]), options={"more": UserDict(x=3 * x), "name": "n"}, scaling=torch.tensor(2.0))
    loss = GradCache([encode], 3, lambda y: y.sum())(batch)
    assert loss.item() == 12 * x.sum().item()
    assert weight.grad == loss
    assert len(seen) == 6  # three chunks, twice
    for i, (pair, options, scaling) in enumerate(seen):
        rows = x[3 * (i % 3) : 3 * (i % 3) + 3]
        assert type(pair) is Pair
        assert torch.equal(pair.left, rows)
        assert torch.equal(pair.right[0], 2 * rows)
        assert torch.equal(options["more"]["x"], 3 * rows)
        assert (options["name"], scaling.item()) == ("n", 2)
    weight.grad = None
    GradCache([lambda a, b: weight * (a + b)], 3, lambda y: y.sum())((x, x))
    assert weight.grad == 2 * x.sum()


def test_split_input_fn_and_get_rep_fn() -> None:
    """Inputs that only the user can split, outputs that only the user can read."""
    weight = nn.Parameter(torch.ones(()))

    class Output:
        def __init__(self, lengths: Tensor) -> None:
            self.lengths = lengths

    def encode(*words: str) -> Output:
        return Output(weight * torch.tensor([[float(len(w))] for w in words]))

    cache = GradCache(
        [encode],
        2,
        lambda lengths, *, power: lengths.pow(power).sum(),
        split_input_fn=lambda words, size: [words[i : i + size] for i in range(0, len(words), size)],
        get_rep_fn=lambda output: {"lengths": output.lengths},
    )
    assert cache(["a", "bb", "cccc"], power=2) == 21
    assert weight.grad == 42


class Counting(nn.Module):
    """Counts calls, and the most rows that it saw with a graph."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls, self.rows_with_graph = inner, 0, 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        if torch.is_grad_enabled():
            self.rows_with_graph = max(self.rows_with_graph, len(x))
        return self.inner(x)


def test_a_frozen_tower_is_encoded_once_and_asks_for_no_gradient() -> None:
    frozen, trained = Counting(nn.Linear(9, D).requires_grad_(False)), Counting(nn.Linear(9, D))
    x = torch.randn(N, 9)
    asked: dict[str, bool] = {}

    def loss_fn(image: Tensor, text: Tensor) -> Tensor:
        asked.update(image=image.requires_grad, text=text.requires_grad)
        return clip_loss(image, text, 1.0)

    GradCache([frozen, trained], 8, loss_fn)(x, x)
    assert asked == {"image": False, "text": True}
    assert (frozen.calls, frozen.rows_with_graph) == (3, 0)
    assert (trained.calls, trained.rows_with_graph) == (6, 8)
    # Of a function nobody knows before its first chunk; of a bound method its module tells.
    for model in (lambda y: frozen(y), frozen.forward):
        frozen.calls = 0
        GradCache([model, trained], 8, loss_fn)(x, x)
        assert frozen.calls == 3
    assert asked["image"] is False
    # Prompt tuning: a frozen tower whose input is trained.
    prompt = x.clone().requires_grad_()
    GradCache([frozen, trained], 8, loss_fn)(prompt, x)
    clip_loss(frozen.inner(x_leaf := x.clone().requires_grad_()), trained.inner(x), 1.0).backward()
    torch.testing.assert_close(prompt.grad, x_leaf.grad, rtol=0, atol=1e-6)


def test_outputs_without_gradient() -> None:
    """Integers, booleans, None, detached outputs, and outputs that the loss leaves alone."""
    tower = nn.Linear(9, D).double()
    x = torch.randn(N, 9, dtype=torch.float64)

    def encode(x: Tensor) -> tuple[Any, ...]:
        y = tower(x)
        return y, y.argmax(1), y > 0, None, y.detach(), 2 * y

    def loss_fn(y: Tensor, best: Tensor, positive: Tensor, nothing: None, detached: Tensor, unused: Tensor) -> Tensor:
        assert (best.dtype, positive.dtype, nothing) == (torch.int64, torch.bool, None)
        return (y * positive * detached).sum() + y[torch.arange(N), best].sum()

    GradCache([encode], 8, loss_fn)(x)
    got = take_gradients(list(tower.parameters()))
    loss_fn(*encode(x)).backward()
    assert_same(got, take_gradients(list(tower.parameters())), 1e-10)


def test_under_autocast() -> None:
    """Both passes in bfloat16, a float32 island included, and a backward pass that autocast does not lower."""
    island, other_island = nn.Parameter(torch.randn(9, 9)), nn.Parameter(torch.randn(D, D))
    towers = [nn.Sequential(nn.Linear(9, 32), nn.Dropout(0.3), nn.Linear(32, D)) for _ in range(2)]
    x = torch.randn(N, 9)

    def image(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            x = x @ island
        return F.normalize(towers[0](x), dim=-1)

    models: list[Callable[..., Any]] = [image, towers[1]]
    parameters = [island, other_island, *chain.from_iterable(t.parameters() for t in towers)]

    def loss_fn(a: Tensor, b: Tensor) -> Tensor:
        assert a.dtype == b.dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            a = (a.float() @ other_island).to(a.dtype)
        return clip_loss(a, b, 3.0)

    torch.manual_seed(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_fn(*[torch.cat([model(c) for c in x.split(8)]) for model in models])
    loss.backward()
    expected = take_gradients(parameters)
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = GradCache(models, 8, loss_fn)(x, x)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(got, loss.detach())
    got_gradients = take_gradients(parameters)
    # There, autocast's one copy of a weight sums its chunks' gradients in bfloat16; here they are summed in float32.
    assert_same(got_gradients, expected, 2**-7)
    assert_same(got_gradients[:2], expected[:2], 5e-6)  # the islands have no such copies


def test_scaler_and_fp16() -> None:
    towers = [nn.Linear(9, D), nn.Linear(9, D)]
    parameters = list(chain.from_iterable(t.parameters() for t in towers))
    x, y = torch.randn(N, 9), torch.randn(N, 9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    dtypes = []

    def loss_fn(a: Tensor, b: Tensor) -> Tensor:
        dtypes.append(a.dtype)
        return clip_loss(a, b, 3.0)

    plain = GradCache(towers, 8, loss_fn)(x, y)
    expected = take_gradients(parameters)
    scaled = GradCache(towers, 8, loss_fn, scaler=scaler)(x, y)
    assert torch.equal(scaled, plain)
    assert_same([p.grad for p in parameters], [e * 2**10 for e in expected if e is not None], 5e-6)
    take_gradients(parameters)
    GradCache(towers, 8, loss_fn, None, None, True, scaler)(x, y)
    assert dtypes == [torch.float32, torch.float32, torch.float16]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    scaler.unscale_(optimizer)
    assert_same(take_gradients(parameters), expected, 1e-2)


def test_checkpointed_encoder() -> None:
    """Recomputing inside the backward pass replays the second pass's random numbers, which are the first's."""
    setup = Setup(torch.float64, with_mask=False)

    def image(x: Tensor) -> Tensor:
        return checkpoint(setup.image, x, use_reentrant=False)

    def loss_fn(i: Tensor, t: Tensor) -> Tensor:
        return clip_loss(i, t, 9.0)

    torch.manual_seed(5)
    uncached([setup.image, setup.text], [setup.pixels, setup.tokens], [8, 8], loss_fn)
    expected = take_gradients(setup.trained())
    torch.manual_seed(5)
    GradCache([image, setup.text], 8, loss_fn)(setup.pixels, setup.tokens)
    assert_same(take_gradients(setup.trained()), expected, 1e-10)


def test_ddp_reduces_once_for_each_model(tmp_path: Any) -> None:
    from torch import distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain = [nn.Linear(9, D).double(), nn.Linear(9, D).double()]
        towers = [nn.parallel.DistributedDataParallel(copy.deepcopy(t)) for t in plain]
        reductions: list[Tensor] = []

        def count(state, bucket):  # type: ignore[no-untyped-def]  # DDP compares annotations, not strings
            reductions.append(bucket.buffer().abs().sum())
            future: torch.futures.Future[Tensor] = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        for tower in towers:
            tower.register_comm_hook(None, count)
        x = torch.randn(N, 9, dtype=torch.float64)

        def loss_fn(a: Tensor, b: Tensor) -> Tensor:
            return clip_loss(a, b, 3.0)

        uncached(plain, [x, x], [8, 8], loss_fn)
        expected = take_gradients([p for t in plain for p in t.parameters()])
        GradCache(towers, 8, loss_fn)(x, x, no_sync_except_last=True)
        assert len(reductions) == 2
        for reduced, pair in zip(reductions, (expected[:2], expected[2:]), strict=True):  # all chunks are in
            torch.testing.assert_close(reduced, sum(g.abs().sum() for g in pair if g is not None))
        parameters = [p for t in towers for p in t.parameters()]
        assert_same(take_gradients(parameters), expected, 1e-10)
        GradCache(towers, 8, loss_fn)(x, x)
        assert len(reductions) == 2 + 6
        assert_same(take_gradients(parameters), expected, 1e-10)
    finally:
        dist.destroy_process_group()


class FakeDevice:
    """A device module with one generator for each device; `takes_device` as CUDA's, not as MPS's."""

    def __init__(self, takes_device: bool) -> None:
        self.takes_device, self.generators = takes_device, {}  # type: ignore[var-annotated]

    def generator(self, *where: torch.device) -> torch.Generator:
        assert len(where) == self.takes_device
        return self.generators.setdefault(where, torch.Generator())

    def get_rng_state(self, *where: torch.device) -> Tensor:
        return self.generator(*where).get_state()

    def set_rng_state(self, state: Tensor, *where: torch.device) -> None:
        self.generator(*where).set_state(state)


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_generators_of_devices_are_replayed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where = (torch.device(kind, 1),) if kind == "cuda" else ()
    module = FakeDevice(takes_device=kind == "cuda")
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr("smartclip_kernels.grad_cache.cache.devices_of", lambda model, chunks: [torch.device(kind, 1)])
    weight, draws = nn.Parameter(torch.ones(())), []

    def encode(x: Tensor) -> Tensor:
        draws.append(torch.rand((), generator=module.generator(*where)).item())
        return weight * x

    GradCache([encode], 2, torch.sum)(X)
    assert len(set(draws)) == 2
    assert draws[:2] == draws[2:]
    assert torch.rand((), generator=module.generator(*where)).item() not in draws  # it goes on from the first pass


def test_devices_are_found_in_inputs_parameters_and_buffers() -> None:
    assert devices_of(nn.Linear(2, 2), [X]) == []
    assert devices_of(nn.Linear(2, 2, device="meta"), [X]) == []
    places = [SimpleNamespace(device=torch.device(d)) for d in ("cuda:1", "cpu", "cuda:0", "cuda:1")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smartclip_kernels.grad_cache.inputs.tensors_in", lambda value: iter(places))
        assert devices_of(nn.Linear(2, 2), [X]) == [torch.device("cuda:0"), torch.device("cuda:1")]


def test_an_open_clip_model() -> None:
    """Bound methods of one open_clip model, patch dropout included, and its own scale; the three-line swap."""
    vision = {"layers": 1, "width": 32, "head_width": 16, "image_size": 16, "patch_size": 4, "patch_dropout": 0.5}
    text = {"context_length": 6, "vocab_size": 40, "width": 32, "heads": 2, "layers": 1}
    model = open_clip.CLIP(16, vision, text).double()
    images, tokens = torch.randn(10, 3, 16, 16, dtype=torch.float64), torch.randint(1, 40, (10, 6))
    parameters = list(model.parameters())
    models, inputs = [model.encode_image, model.encode_text], [(images, True), (tokens, True)]
    theirs, ours = OpenClipLoss(), ClipLoss()
    torch.manual_seed(5)
    features = [torch.cat([m(c, True) for c in x.split(4)]) for m, (x, _) in zip(models, inputs, strict=True)]
    theirs(*features, model.logit_scale.exp()).backward()
    expected = take_gradients(parameters)
    torch.manual_seed(5)
    GradCache(models, 4, ours)(*inputs, logit_scale=model.logit_scale.exp())
    assert_same(take_gradients(parameters), expected, 1e-10)


LINEAR = nn.Linear(2, 2)
X = torch.randn(4, 2)


@pytest.mark.parametrize(
    ("error", "says", "step"),
    [
        (TypeError, "models: got one Linear", lambda: GradCache(LINEAR, 2, torch.sum)),  # type: ignore[arg-type]
        (ValueError, "models: got none", lambda: GradCache([], 2, torch.sum)),
        (ValueError, "chunk_sizes: got 0, needs at least 1", lambda: GradCache([LINEAR], 0, torch.sum)),
        (ValueError, "chunk_sizes: got 2, needs one, or", lambda: GradCache([LINEAR], [2, 2], torch.sum)),
        (TypeError, "chunk_sizes: got float", lambda: GradCache([LINEAR], [2.0], torch.sum)),  # type: ignore[list-item]
        (ValueError, "scaler: got None with fp16=True", lambda: GradCache([LINEAR], 2, torch.sum, fp16=True)),
        (ValueError, "model_inputs: got 2, needs one for each of 1", lambda: GradCache([LINEAR], 2, torch.sum)(X, X)),
        (ValueError, r"got tensors of \[3, 4\] rows", lambda: GradCache([LINEAR], 2, torch.sum)((X, X[:3]))),
        (ValueError, "got a batch of 0 rows", lambda: GradCache([LINEAR], 2, torch.sum)(X[:0])),
        (TypeError, "got str with no tensor to split", lambda: GradCache([LINEAR], 2, torch.sum)("words")),
        (ValueError, r"loss_fn: returned shape \(4, 2\)", lambda: GradCache([LINEAR], 2, lambda y: y)(X)),
        (TypeError, "loss_fn: returned float", lambda: GradCache([LINEAR], 2, lambda y: 1.0)(X)),
        (TypeError, "returned dict, .* sum the terms", lambda: GradCache([LINEAR], 2, lambda y: {"a": y})(X)),
        (ValueError, "a loss without gradient", lambda: GradCache([LINEAR], 2, lambda y: y.detach().sum())(X)),
        (ValueError, "output 0 has no dimension", lambda: GradCache([lambda x: x.sum()], 2, torch.sum)(X)),
        (TypeError, "output 1 is str", lambda: GradCache([lambda x: (x, "no")], 2, torch.sum)(X)),
        (ValueError, "outputs differ", lambda: GradCache([lambda x: (x,) * len(x)], 3, torch.sum)(X)),
        (ValueError, "output 0 is None for some", lambda: GradCache([lambda x: x if len(x) > 1 else None], 3, sum)(X)),
        (ValueError, "got 'y' twice", lambda: GradCache([lambda x: {"y": x}], 2, torch.sum)(X, y=1)),
        (ValueError, "split_input_fn: got no chunks", lambda: GradCache([LINEAR], 2, sum, lambda x, n: [])(X)),
        (TypeError, r"Linear has no no_sync\(\)", lambda: GradCache([LINEAR], 2, sum)(X, no_sync_except_last=True)),
    ],
)
def test_errors(error: type[Exception], says: str, step: Callable[[], Any]) -> None:
    with pytest.raises(error, match=says):
        step()


def test_smartclip_loss_without_the_module() -> None:
    """The function as loss_fn, its outputs in its own positional order."""
    setup = Setup(torch.float64, with_mask=True)
    compare(
        setup,
        [8, 5],
        smartclip_loss,
        torch.float64,
        logit_scale=lambda: setup.log_scale.exp(),
        logit_bias=lambda: setup.bias,
    )
