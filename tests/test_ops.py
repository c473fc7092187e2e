"""The torch ops: opcheck, compile, export, tracing, autocast, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import smartclip_kernels as sk
from smartclip_kernels import backends, reference, testing
from tests.simulated import SIMULATED

ops = torch.ops.smartclip
N, M, D = 9, 7, 16
EVERY = [True] * 5


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    """Dynamo's limit of recompilations is for a process, and every backend compiles the same functions."""
    torch.compiler.reset()


def tensors(*, n: int = N, m: int = M, grad: bool = True) -> dict[str, Tensor]:
    """All differentiable inputs of a masked loss, leaves if `grad`."""
    inputs = testing.make_inputs(n, m, D, similarity="masked_cosine", mask="soft", bias=-1.0, ids=False)
    return {name: x.requires_grad_(grad) for name, x in inputs.leaves.items()}


def ids() -> tuple[Tensor, ...]:
    return torch.arange(N) % 5, torch.arange(M) % 6, torch.arange(N) % 3, torch.arange(M) % 4


def loss_arguments(objective: str, backend: str, *, masked: bool = True, grad: bool = True) -> tuple[Any, ...]:
    x = tensors(grad=grad)
    smoothing = 0.1 if reference.OBJECTIVES[objective].both_sides else 0.0
    mask = x["mask"] if masked else None
    return x["image"], x["text"], mask, x["logit_scale"], x["logit_bias"], *ids(), objective, smoothing, backend, 2**20


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("objective", reference.OBJECTIVES)
def test_opcheck_loss(backend: str, objective: str, masked: bool) -> None:
    torch.library.opcheck(ops.loss.default, loss_arguments(objective, backend, masked=masked))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("objective", reference.OBJECTIVES)
def test_opcheck_reduced_loss(backend: str, objective: str, masked: bool) -> None:
    torch.library.opcheck(ops.reduced_loss.default, (*loss_arguments(objective, backend, masked=masked), "mean"))


@pytest.mark.parametrize("objective", reference.OBJECTIVES)
def test_opcheck_loss_backward(backend: str, objective: str) -> None:
    arguments = loss_arguments(objective, backend, grad=False)
    rows, columns, *saved = ops.loss(*arguments)
    weights = torch.rand_like(rows), torch.rand_like(columns)
    torch.library.opcheck(ops.loss_backward.default, (*weights, *saved, *arguments, EVERY, False))


def test_opcheck_debiased_and_masked_in_one_direction(backend: str) -> None:
    tau = torch.linspace(0, 0.1, N), torch.linspace(0.1, 0, M)
    correction = *tau, torch.linspace(-9, 9, N), torch.linspace(9, -9, M)
    arguments = *loss_arguments("softmax", backend)[:-1], 2000  # bytes: no products are kept, whose padding is anything
    torch.library.opcheck(ops.loss.default, (*arguments, *correction))
    torch.library.opcheck(ops.reduced_loss.default, (*arguments, "sum", [0.0, 1.0], *correction))
    plain = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    rows, columns, *saved = ops.loss(*plain, *correction)
    torch.library.opcheck(ops.loss_backward.default, (rows, columns, *saved, *plain, EVERY, False, *correction))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("objective", reference.OBJECTIVES)
def test_opcheck_loss_and_gradients(backend: str, objective: str, masked: bool) -> None:
    arguments = loss_arguments(objective, backend, masked=masked, grad=False)
    tail = [True, True, masked, True, True], "mean"
    torch.library.opcheck(ops.loss_and_gradients.default, (*arguments, *tail))
    if reference.OBJECTIVES[objective].both_sides:
        tau = torch.linspace(0, 0.1, N), torch.linspace(0.1, 0, M)
        torch.library.opcheck(ops.loss_and_gradients.default, (*arguments, *tail, [0.25, 0.75], *tau))


@pytest.mark.parametrize("objective", reference.OBJECTIVES)
def test_opcheck_prefixes(backend: str, objective: str) -> None:
    arguments, tail = loss_arguments(objective, backend, masked=False), {"dims": [3, 8, 15]}
    plain = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    if not backends.load(backend).nests:
        with pytest.raises(ValueError, match=f"dims: got some, needs one loss for each on backend '{backend}'"):
            ops.loss(*plain, **tail)
        return
    torch.library.opcheck(ops.loss.default, arguments, tail)
    torch.library.opcheck(ops.reduced_loss.default, (*arguments, "sum"), tail)
    rows, columns, *saved = ops.loss(*plain, **tail)
    torch.library.opcheck(ops.loss_backward.default, (rows, columns, *saved, *plain, EVERY[:2] + [False] * 3), tail)
    needs = [True, True, False, True, True]
    torch.library.opcheck(ops.loss_and_gradients.default, (*plain, needs, "sum"), tail)


def test_prefixes_that_an_op_does_not_take() -> None:
    masked, plain = (loss_arguments("softmax", "cpu", masked=masked, grad=False) for masked in (True, False))
    with pytest.raises(ValueError, match="mask: got a tensor, needs None with dims"):
        ops.loss(*masked, dims=[4])
    with pytest.raises(ValueError, match="dims: got some and ceilings"):
        ops.loss(*plain, image_ceiling=torch.zeros(N), text_ceiling=torch.zeros(M), dims=[4])
    with pytest.raises(ValueError, match=r"dims: got \[4, 17\], needs strictly increasing numbers"):
        ops.reduced_loss(*plain, "mean", dims=[4, 17])


def test_opcheck_similarity(backend: str) -> None:
    x = list(tensors().values())[:3]
    torch.library.opcheck(ops.masked_similarity.default, (*x, backend))
    given = [torch.rand(N, M), *(t.detach() for t in x)]
    torch.library.opcheck(ops.masked_similarity_backward.default, (*given, backend, EVERY[:3]))


@pytest.mark.parametrize("per", ["text", "image"])
def test_opcheck_retrieval(backend: str, per: str) -> None:
    x = list(tensors(grad=False).values())[:3]
    torch.library.opcheck(ops.masked_topk.default, (*x, 3, per, backend))
    torch.library.opcheck(ops.retrieval_ranks.default, (*x, *ids()[:2], per, backend))
    torch.library.opcheck(ops.best_positive.default, (*x, *ids()[:2], per, backend))


def everything(backend: str) -> Callable[..., Tensor]:
    """One scalar of all losses, on inputs as `tensors` gives them with as many texts as images."""

    def total(image: Tensor, text: Tensor, mask: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        b: dict[str, Any] = {"backend": backend}
        row, column = sk.clip_loss(image, text, scale, reduction="none", label_smoothing=0.1, **b)
        loss: Tensor = sk.clip_loss(image, text, scale, bias, **b) + row[1] + column[2]
        loss = (
            loss + sk.siglip_loss(image, text, scale, bias, **b) + sk.siglip_loss(image, text, 2.0, dims=(7, 16), **b)
        )
        debiased: dict[str, Any] = {"tau_plus": 0.05, "margin": 0.1, "directions": ("text_to_image",)}
        loss = loss + sk.clip_loss(image, text, scale, dims=(7, 12), **b)
        loss = loss + sk.smartclip_loss(image, text, mask, scale, reduction="sum", **debiased, **b)
        loss = loss + sk.smartclip_loss(image, text, mask, scale, bias, objective="sigmoid", **b)
        return loss + sk.masked_similarity(image, text, mask, **b).sum()

    return total


def gradients(function: Callable[..., Tensor], x: tuple[Tensor, ...]) -> list[Tensor]:
    loss = function(*x)
    return [loss, *torch.autograd.grad(loss, x)]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_compile(backend: str) -> None:
    x = tuple(tensors(m=N).values())
    compiled = torch.compile(everything(backend), fullgraph=True)
    assert_same(gradients(compiled, x), gradients(everything(backend), x))


def test_compile_with_dynamic_sizes(backend: str) -> None:
    compiled = torch.compile(everything(backend), fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (N, 12, 33):
        x = tuple(tensors(n=n, m=n).values())
        assert_same(gradients(compiled, x), gradients(everything(backend), x))


def test_compile_under_autocast(backend: str) -> None:
    x = tuple(tensors(m=N).values())
    compiled = torch.compile(everything(backend), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = gradients(compiled, x), gradients(everything(backend), x)
    # Compiled, the losses share one cast, whose gradient is summed in bfloat16.
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * float(b.detach().abs().max()))


def test_export(backend: str) -> None:
    class Loss(torch.nn.Module):
        def forward(self, *x: Tensor) -> Tensor:
            return everything(backend)(*x)

    x = tuple(tensors(m=N, grad=False).values())
    exported = torch.export.export(Loss(), x)
    assert any("smartclip.loss" in str(node.target) for node in exported.graph.nodes)
    assert_same([exported.module()(*x)], [everything(backend)(*x)])


def test_make_fx(backend: str) -> None:
    x = tuple(tensors(m=N).values())
    expected = gradients(everything(backend), x)
    traced = make_fx(lambda *x: gradients(everything(backend), x))(*x)
    targets = {str(node.target) for node in traced.graph.nodes}
    assert {"smartclip.loss.default", "smartclip.loss_backward.default"} <= targets
    with torch.no_grad():  # the trace holds the backward pass itself
        assert_same(list(traced(*x)), expected)


def test_autocast_leaves_float64_alone(backend: str) -> None:
    if backend in SIMULATED:
        pytest.skip("float64 is for the CPU and reference backends")
    image, text = (x.detach().double() for x in list(tensors(m=N).values())[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sk.clip_loss(image, text, 3.0, backend=backend).dtype == torch.float64


def test_mixed_dtypes_meet_under_autocast(backend: str) -> None:
    image, text = (x.detach() for x in list(tensors(m=N).values())[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = sk.clip_loss(image, text.bfloat16(), 3.0, backend=backend)
        assert torch.equal(mixed, sk.clip_loss(image.bfloat16(), text.bfloat16(), 3.0, backend=backend))
    with pytest.raises(TypeError, match=r"text: got dtype torch\.bfloat16, needs image's"):
        sk.clip_loss(image, text.bfloat16(), 3.0, backend=backend)


SCALARS: dict[str, Callable[..., Tensor]] = {
    "clip": lambda i, t, m, s, b, backend: sk.clip_loss(i, t, s, b, backend=backend),
    "siglip": lambda i, t, m, s, b, backend: sk.siglip_loss(i, t, s, b, backend=backend),
    "siglip none": lambda i, t, m, s, b, backend: sk.siglip_loss(i, t, s, reduction="none", backend=backend).sum(),
    "smartclip": lambda i, t, m, s, b, backend: sk.smartclip_loss(i, t, m, s, b, backend=backend),
    "similarity": lambda i, t, m, s, b, backend: sk.masked_similarity(i, t, m, backend=backend).square().sum(),
}


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", SCALARS)
def test_autocast_casts_features_only(backend: str, name: str, half: torch.dtype) -> None:
    """As `mm` would: image, text and mask are rounded to the autocast dtype; loss, scale and bias stay float32."""
    x = tuple(tensors(m=N).values())
    with torch.autocast("cpu", dtype=half):
        loss = SCALARS[name](*x, backend)
    actual = torch.autograd.grad(loss, x, allow_unused=True)
    rounded = (*(t.detach().to(half).requires_grad_() for t in x[:3]), *x[3:])
    expected = SCALARS[name](*rounded, backend)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    assert not torch.equal(loss, SCALARS[name](*x, backend))
    for a, e in zip(actual, torch.autograd.grad(expected, rounded, allow_unused=True), strict=True):
        assert (a is None) == (e is None)
        if a is not None and e is not None:
            assert a.dtype == torch.float32 and torch.equal(a, e.float())


@pytest.mark.parametrize("name", SCALARS)
def test_second_derivatives_raise(backend: str, name: str) -> None:
    x = tuple(tensors(m=N).values())
    (first,) = torch.autograd.grad(SCALARS[name](*x, backend), x[0], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        first.square().sum().backward()


@pytest.mark.parametrize("name", SCALARS)
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_retained_graph_gives_the_same_bits_again(backend: str, name: str, create_graph: bool) -> None:
    x = tuple(tensors(m=N).values())
    wanted = x if name == "smartclip" else x[:2]
    loss = SCALARS[name](*x, backend)
    first = torch.autograd.grad(loss, wanted, retain_graph=True, create_graph=create_graph)
    second = torch.autograd.grad(loss, wanted, create_graph=create_graph)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", SCALARS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(backend: str, name: str, mode: Any) -> None:
    x = tuple(tensors(m=N).values())
    expected = SCALARS[name](*x, backend)
    with mode():
        actual = SCALARS[name](*x, backend)
    assert not actual.requires_grad
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-6, atol=1e-6)


def test_only_gradients_asked_for_are_made(backend: str) -> None:
    arguments = loss_arguments("softmax", backend, grad=False)
    rows, columns, *saved = ops.loss(*arguments)
    for i in range(5):
        needs = [i == k for k in range(5)]
        grads = ops.loss_backward(torch.ones_like(rows), torch.ones_like(columns), *saved, *arguments, needs, False)
        assert [g.shape == x.shape and g.numel() > 0 for g, x in zip(grads, arguments, strict=False)] == needs
