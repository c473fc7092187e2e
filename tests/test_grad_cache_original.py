"""What users of the original gradient caching package write (github.com/luyug/GradCache), with ours in its place."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smartclip_kernels.grad_cache import GradCache

N, LENGTH, WIDTH = 10, 7, 8


class Output(OrderedDict[str, Tensor]):
    """Several outputs by key and by attribute, as transformers' encoders return."""

    def __getattr__(self, name: str) -> Tensor:
        return self[name]


class Encoder(nn.Module):
    """As BERT is called, and what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(50, WIDTH)
        self.dropout = nn.Dropout(0.1)
        self.pooler = nn.Linear(WIDTH, WIDTH)
        self.unused = nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Output:
        states = self.dropout(self.embeddings(input_ids)) * attention_mask[..., None]
        if token_type_ids is not None:
            states = states + token_type_ids[..., None]
        return Output(last_hidden_state=states, pooler_output=torch.tanh(self.pooler(states[:, 0])))


def tokenized(n: int) -> UserDict[str, Tensor]:
    lengths = torch.randint(1, LENGTH, (n, 1))
    return UserDict(input_ids=torch.randint(50, (n, LENGTH)), attention_mask=torch.arange(LENGTH) < lengths)


class PairLoss:
    """One direction, several candidates for each query: the first of each group is its own."""

    def __call__(self, x: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        target = torch.arange(0, len(y), len(y) // len(x))
        return F.cross_entropy(x @ y.T, target, reduction=reduction)


def gradients(modules: list[nn.Module]) -> list[Tensor]:
    found = [p.grad for m in modules for p in m.parameters() if p.grad is not None]
    for m in modules:
        m.zero_grad()
    return found


def pooled(encoder: Encoder, x: Any, size: int) -> Tensor:
    return torch.cat([encoder(**{k: v[i : i + size] for k, v in x.items()}).pooler_output for i in range(0, N, size)])


@pytest.mark.parametrize("keep_graph", [0, 3, 99, "1GiB"])
def test_two_encoders_and_a_tied_one(keep_graph: int | str) -> None:
    torch.manual_seed(0)
    one, other = Encoder(), Encoder()
    xx, yy = tokenized(N), tokenized(N)
    cases: list[dict[str, Any]] = [{"reduction": "mean"}, {"reduction": "sum"}, {}]
    for encoders in ([one, other], [one, one]):
        for kwargs in cases:
            torch.manual_seed(1)
            expected_loss = PairLoss()(pooled(encoders[0], xx, 4), pooled(encoders[1], yy, 4), **kwargs)
            expected_loss.backward()
            expected = gradients([one, other])
            assert len(expected) == 3 * len({*encoders})  # `unused` has none
            torch.manual_seed(1)
            gc = GradCache(
                models=encoders,
                chunk_sizes=4,
                loss_fn=PairLoss(),
                get_rep_fn=lambda v: v.pooler_output,
                keep_graph=keep_graph,
            )
            loss = gc(xx, yy, **kwargs)
            assert not loss.requires_grad
            torch.testing.assert_close(loss, expected_loss.detach())
            for mine, theirs in zip(gradients([one, other]), expected, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_positional_arguments_are_the_originals() -> None:
    """models, chunk_sizes, loss_fn, split_input_fn, get_rep_fn, fp16, scaler."""
    torch.manual_seed(0)
    encoder, xx, yy = Encoder(), tokenized(N), tokenized(2 * N)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    seen: list[tuple[int, torch.dtype, bool]] = []

    def split(x: Any, size: int) -> list[dict[str, Tensor]]:
        return [{k: v[i : i + size] for k, v in x.items()} for i in range(0, len(x["input_ids"]), size)]

    def rep(output: Output) -> Tensor:
        seen.append((len(output.pooler_output), output.pooler_output.dtype, torch.is_autocast_enabled("cpu")))
        return output.pooler_output

    class Loss(PairLoss):
        def __call__(self, x: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
            loss = super().__call__(x, y, reduction)
            seen.append((len(y), loss.dtype, torch.is_autocast_enabled("cpu")))  # the loss is under autocast, too
            return loss

    gc = GradCache([encoder, encoder], [5, 20], Loss(), split, rep, True, scaler)
    gc.cache_step(xx, yy, no_sync_except_last=False, reduction="mean")
    half = torch.float16
    assert seen[:4] == [(5, half, False), (5, half, False), (20, half, False), (20, torch.float32, True)]
    assert not torch.is_autocast_enabled("cpu")
    optimizer = torch.optim.AdamW(encoder.parameters())
    before = encoder.pooler.weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(encoder.pooler.weight, before)


@pytest.mark.parametrize(
    ("model_input", "call"),
    [
        (lambda x, m: x, lambda x: x),
        (lambda x, m: [x, m], lambda x, m: x * m),
        (lambda x, m: {"x": x, "m": m}, lambda *, x, m: x * m),
        (lambda x, m: UserDict(x=x, m=m), lambda *, x, m: x * m),
        (lambda x, m: ([x], {"m": m}), lambda x, *, m: x * m),
        (lambda x, m: ([], UserDict(x=x, m=m)), lambda *, x, m: x * m),
    ],
    ids=["tensor", "list", "dict", "UserDict", "list and dict", "empty list and UserDict"],
)
def test_natively_supported_inputs(model_input: Callable[..., Any], call: Callable[..., Tensor]) -> None:
    weight = nn.Parameter(torch.ones(()))
    x, m = torch.randn(7, 3), torch.randn(7, 3)

    def encode(*args: Any, **kwargs: Any) -> Tensor:
        return weight * call(*args, **kwargs)

    loss = GradCache([encode], 3, lambda y: y.square().sum())(model_input(x, m))
    torch.testing.assert_close(weight.grad, 2 * loss)
