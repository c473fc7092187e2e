"""What ranks do in the tests of distribution. Imports little: every process imports it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import smartclip_kernels as sk
from smartclip_kernels.distributed.call import Call
from smartclip_kernels.distributed.exchange import Exchange
from smartclip_kernels.testing import Inputs, make_inputs


@dataclass(frozen=True)
class Options:
    strategy: str = "gather"
    reduction: str = "mean"
    backend: str | None = None
    incoming: tuple[float, ...] = ()  # by rank; default 0.75 everywhere


def part(inputs: Inputs, rows: list[int], columns: list[int], rank: int) -> Inputs:
    """A rank's rows of a whole batch."""
    a, b = (slice(*list(accumulate([0, *sizes]))[rank : rank + 2]) for sizes in (rows, columns))
    cut: dict[str, Any] = {"image": inputs.image[a], "text": inputs.text[b]}
    if inputs.mask is not None:
        cut["mask"] = inputs.mask[b]
    if inputs.image_ids is not None and inputs.text_ids is not None:
        cut |= {"image_ids": inputs.image_ids[a], "text_ids": inputs.text_ids[b]}
    if inputs.ignore_ids is not None:
        cut["ignore_ids"] = (inputs.ignore_ids[0][a], inputs.ignore_ids[1][b])
    if isinstance(inputs.tau_plus, tuple):
        cut["tau_plus"] = (inputs.tau_plus[0][a], inputs.tau_plus[1][b])
    return replace(inputs, **cut)


def distributed_loss(x: Inputs, group: dist.ProcessGroup, options: Options) -> Any:
    common: dict[str, Any] = {"image_ids": x.image_ids, "text_ids": x.text_ids, "ignore_ids": x.ignore_ids}
    common |= {"reduction": options.reduction, "backend": options.backend}
    common |= {"group": group, "strategy": options.strategy}
    if x.objective == "softmax":
        common |= {"tau_plus": x.tau_plus, "margin": x.margin, "directions": x.directions}
    if x.mask is not None:
        return sk.smartclip_loss(
            x.image,
            x.text,
            x.mask,
            x.logit_scale,
            x.logit_bias,
            objective=cast(Any, x.objective),
            label_smoothing=x.label_smoothing,
            **common,
        )
    if x.objective == "sigmoid":
        return sk.siglip_loss(x.image, x.text, x.logit_scale, x.logit_bias, **common)
    return sk.clip_loss(x.image, x.text, x.logit_scale, x.logit_bias, label_smoothing=x.label_smoothing, **common)


def leaves(x: Inputs) -> tuple[Inputs, dict[str, Tensor]]:
    wanted = {name: value.detach().clone().requires_grad_() for name, value in x.leaves.items()}
    return replace(x, **cast(dict[str, Any], wanted)), wanted


def evaluate(
    group: dist.ProcessGroup, whole: Inputs, rows: list[int], columns: list[int], options: Options, times: int = 1
) -> list[dict[str, Tensor]]:
    """Loss(es) and gradients of this rank, `times` times."""
    rank = dist.get_rank(group)
    found = []
    for _ in range(times):
        x, wanted = leaves(part(whole, rows, columns, rank))
        result = distributed_loss(x, group, options)
        losses = result if isinstance(result, tuple) else (result,)
        values = {f"loss{i}": value.detach() for i, value in enumerate(losses)}
        if wanted:
            weight = options.incoming[rank] if options.incoming else 0.75
            grads = torch.autograd.grad(losses, list(wanted.values()), [torch.full_like(y, weight) for y in losses])
            values |= {f"grad_{name}": grad for name, grad in zip(wanted, grads, strict=True)}
        found.append(values)
    return found


def set_workspace(group: dist.ProcessGroup, megabytes: float | None) -> int:
    sk.set_workspace(megabytes)
    return 0


def prefixes(group: dist.ProcessGroup, whole: Inputs, rows: list[int], dims: Any) -> list[Tensor]:
    x, wanted = leaves(part(whole, rows, rows, dist.get_rank(group)))
    loss = sk.clip_loss(x.image, x.text, x.logit_scale, x.logit_bias, dims=dims, group=group)
    return [loss.detach(), *torch.autograd.grad(loss, list(wanted.values()))]


def prefixes_of_one_rank(group: dist.ProcessGroup, at_one: tuple[int, ...], at_others: tuple[int, ...] | None) -> str:
    """What the others hear of it."""
    x = make_inputs(4, d=8)
    try:
        sk.clip_loss(x.image, x.text, 2.0, dims=at_one if dist.get_rank(group) == 1 else at_others, group=group)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "nothing was raised"


class Towers(nn.Module):
    """Two small towers, a mask head, scale and bias; the same in every process."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.image, self.text, self.to_mask = (nn.Linear(10, 16, dtype=dtype) for _ in range(3))
        self.log_scale = nn.Parameter(torch.tensor(2.5, dtype=dtype))
        self.bias = nn.Parameter(torch.tensor(-1.0, dtype=dtype))
        with torch.no_grad():
            for p in (*self.image.parameters(), *self.text.parameters(), *self.to_mask.parameters()):
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        image, text = F.normalize(self.image(x).tanh(), dim=1), F.normalize(self.text(y).tanh(), dim=1)
        return image, text, self.to_mask(y).sigmoid(), self.log_scale.exp(), 1 * self.bias


def train_step(
    group: dist.ProcessGroup | None, objective: str, strategy: str, rows: list[int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Loss and gradients of all parameters: of this process alone on the whole batch, or under DDP on its rows."""
    generator = torch.Generator().manual_seed(4)
    x, y = (torch.randn(sum(rows), 10, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    model: nn.Module = Towers(dtype)
    if group is not None:
        rank = dist.get_rank(group)
        x, y = x.split(rows)[rank], y.split(rows)[rank]
        model = nn.parallel.DistributedDataParallel(model, process_group=group, find_unused_parameters=True)
    image, text, mask, scale, bias = model(x, y)
    common: dict[str, Any] = {"group": group, "strategy": strategy}
    if objective == "smartclip":
        loss = sk.smartclip_loss(image, text, mask, scale, bias, **common)
    else:
        loss = (sk.clip_loss if objective == "softmax" else sk.siglip_loss)(image, text, scale, bias, **common)
    loss.backward()
    grads = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return {"loss": loss.detach()} | {name: grad for name, grad in grads.items() if grad is not None and grad.any()}


def under_autocast(group: dist.ProcessGroup, objective: str) -> list[tuple[torch.dtype, Tensor, Tensor]]:
    """Gradients under autocast and what they are near."""
    rows, rank = [4, 4, 4], dist.get_rank(group)
    whole = make_inputs(12, d=16, objective=objective)
    found = []
    for autocast in (True, False):
        x, wanted = leaves(part(whole, rows, rows, rank))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = distributed_loss(x, group, Options())
        found.append(torch.autograd.grad(loss, list(wanted.values())))
    return [(a.dtype, a, b) for a, b in zip(*found, strict=True)]


def second_derivative(group: dist.ProcessGroup) -> None:
    rows = [3, 3]
    x, wanted = leaves(part(make_inputs(6, d=8), rows, rows, dist.get_rank(group)))
    (grad,) = torch.autograd.grad(distributed_loss(x, group, Options()), wanted["image"], create_graph=True)
    grad.sum().backward()


def backward_twice(group: dist.ProcessGroup, objective: str) -> tuple[Tensor, Tensor]:
    rows = [3, 3, 3]
    x, wanted = leaves(
        part(make_inputs(9, d=8, objective=objective, dtype=torch.float64), rows, rows, dist.get_rank(group))
    )
    loss = distributed_loss(x, group, Options("ring"))
    first, second = (torch.autograd.grad(loss, wanted["text"], retain_graph=True)[0] for _ in range(2))
    return first, second


def compiled(group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    rows = [3, 3]
    x = part(make_inputs(6, d=8), rows, rows, dist.get_rank(group))

    def function(image: Tensor) -> Any:
        return 2 * sk.clip_loss(image.relu(), x.text, 3.0, group=group)

    return torch.compile(function, backend="eager")(x.image), function(x.image)


def smartclip_module(group: dist.ProcessGroup, whole: Inputs, rows: list[int]) -> tuple[Tensor, Tensor]:
    x, wanted = leaves(part(whole, rows, rows, dist.get_rank(group)))
    assert x.mask is not None
    loss = sk.SmartClipLoss(sparsity_weight=0.7, group=group)(x.image, x.text, x.mask, x.logit_scale, x.logit_bias)
    assert isinstance(loss, Tensor)
    return loss.detach(), torch.autograd.grad(loss, wanted["mask"])[0]


DISAGREEMENTS: dict[str, str] = {
    "width": "embedding width: all ranks of the group need the same, got rank 1 9; ranks 0, 2 8",
    "dtype": "dtype: all ranks of the group need the same, got rank 1 torch.float64; ranks 0, 2 torch.float32",
    "objective": "objective: all ranks of the group need the same, got rank 1 sigmoid; ranks 0, 2 softmax",
    "mask": "mask: all ranks of the group need the same, got rank 1 torch.bool; ranks 0, 2 None",
    "bias": "logit_bias: all ranks of the group need the same, got rank 1 given; ranks 0, 2 absent",
    "ids": "image_ids and text_ids: all ranks of the group need the same, got rank 1 given; ranks 0, 2 absent",
    "ignore": "ignore_ids: all ranks of the group need the same, got rank 1 given; ranks 0, 2 absent",
    "smoothing": "label_smoothing: all ranks of the group need the same, got rank 1 0.1; ranks 0, 2 0.0",
    "margin": "margin: all ranks of the group need the same, got rank 1 0.1; ranks 0, 2 None",
    "tau": "tau_plus: all ranks of the group need the same, got rank 1 given; ranks 0, 2 absent",
    "directions": "directions: all ranks of the group need the same, got rank 1 ['text_to_image']; ranks 0, 2 ['image_",
    "reduction": "reduction: all ranks of the group need the same, got rank 1 sum; ranks 0, 2 mean",
    "strategy": "strategy: all ranks of the group need the same, got rank 1 ring; ranks 0, 2 gather",
    "locked": "gradients wanted: all ranks of the group need the same, got rank 1 ['text']; ranks 0, 2 ['image', ",
    "flags": "semantics: all ranks of the group need the same, got rank 1 {",
}


def disagree(group: dist.ProcessGroup, what: str) -> str:
    """Rank 1 calls otherwise. What it comes to, here; after it the group is as good as before."""
    odd = dist.get_rank(group) == 1
    width, dtype = 9 if odd and what == "width" else 8, torch.float64 if odd and what == "dtype" else torch.float32
    image, text = (torch.randn(4, width, dtype=dtype, requires_grad=True) for _ in range(2))
    if odd and what == "locked":
        image = image.detach()
    ids = torch.arange(4)
    options: dict[str, dict[str, Any]] = {
        "bias": {"logit_bias": 1.0},
        "ids": {"image_ids": ids, "text_ids": ids},
        "ignore": {"ignore_ids": (ids, ids)},
        "smoothing": {"label_smoothing": 0.1},
        "reduction": {"reduction": "sum"},
        "strategy": {"strategy": "ring"},
        "tau": {"tau_plus": 0.1},
        "margin": {"margin": 0.1},
        "directions": {"directions": ("text_to_image",)},
    }
    changes = options.get(what, {}) if odd else {}
    try:
        if odd and what == "objective":
            sk.siglip_loss(image, text, 2.0, group=group)
        elif odd and what == "mask":
            sk.smartclip_loss(image, text, text > 0, 2.0, group=group)
        elif what == "flags":
            flags = {"rank": dist.get_rank(group), "world_size": dist.get_world_size(group)}
            sk.ClipLoss(local_loss=odd, group=group, **cast(dict[str, Any], flags))(image, text, 2.0)
        else:
            sk.clip_loss(image, text, 2.0, group=group, **changes)
    except RuntimeError as error:
        sk.clip_loss(torch.ones(2, 3), torch.ones(2, 3), 1.0, group=group)
        return str(error)
    return "nothing was raised"


def one_bad_input(group: dist.ProcessGroup) -> tuple[str, str]:
    image = torch.ones(4, 8)
    text = torch.ones(4, 7) if dist.get_rank(group) == 1 else torch.ones(4, 8)
    try:
        sk.clip_loss(image, text, 2.0, group=group)
    except (RuntimeError, ValueError) as error:
        return type(error).__name__, str(error)
    return "nothing", "was raised"


def out_of_step(group: dist.ProcessGroup, objective: str) -> str:
    """Rank 1 goes backward while the others begin another step."""
    x, _ = leaves(make_inputs(4, d=8, objective=objective))
    loss = distributed_loss(x, group, Options())
    try:
        if dist.get_rank(group) == 1:
            loss.backward()
        else:
            distributed_loss(x, group, Options())
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


def lose_one(group: dist.ProcessGroup, when: str, objective: str, strategy: str) -> str:
    """Rank 1 ends, or hangs, between two steps or in the middle of one. What becomes of the others' next step."""
    x, _ = leaves(make_inputs(4, d=8, objective=objective))
    distributed_loss(x, group, Options(strategy)).backward()
    if dist.get_rank(group) == 1:
        if when == "between":
            os.kill(os.getpid(), signal.SIGKILL)
        elif when == "hang":
            time.sleep(3600)
        visits = {"forward": 1, "backward": 2 if strategy == "gather" else 1 + dist.get_world_size(group)}
        _at_visit(visits[when], partial(os.kill, os.getpid(), signal.SIGKILL))
    try:
        distributed_loss(x, group, Options(strategy)).backward()
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


def fail_in_one(group: dist.ProcessGroup, when: str, objective: str, strategy: str) -> str:
    """Rank 1 runs out of memory in the middle of a step, and lives on."""
    x, _ = leaves(make_inputs(4, d=8, objective=objective))
    if dist.get_rank(group) == 1:
        visits = {"forward": 1, "backward": 2 if strategy == "gather" else 1 + dist.get_world_size(group)}
        _at_visit(visits[when], _no_memory)
    try:
        distributed_loss(x, group, Options(strategy)).backward()
    except (RuntimeError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def _no_memory() -> None:
    raise MemoryError("not enough")


def _at_visit(last: int, action: Callable[[], None]) -> None:
    """In this process, `action` is what becomes of the last of so many blocks that are about to be scored."""
    arguments, visits = Call.arguments, iter(range(1, last))

    def until_then(call: Call, *where: Any) -> Any:
        if next(visits, None) is None:
            action()
        return arguments(call, *where)

    Call.arguments = until_then  # type: ignore[assignment, method-assign]


def beside_open_clip(group: dist.ProcessGroup, loss: str, flags: dict[str, Any]) -> list[tuple[str, Tensor, Tensor]]:
    """Ours and theirs: this rank's loss, and all gradients of a model after DDP's averaging."""
    import open_clip.loss

    rank, size = dist.get_rank(group), dist.get_world_size(group)
    generator = torch.Generator().manual_seed(rank)
    x, y = (torch.randn(5, 10, generator=generator, dtype=torch.float64) for _ in range(2))
    found = []
    for make in (getattr(sk, loss), getattr(open_clip.loss, loss)):
        towers = Towers(torch.float64)
        model = nn.parallel.DistributedDataParallel(towers, process_group=group, find_unused_parameters=True)
        image, text, _, scale, bias = model(x, y)
        value = make(rank=rank, world_size=size, **flags)(image, text, scale, bias)
        value.backward()
        grads = {name: p.grad for name, p in towers.named_parameters() if p.grad is not None}
        found.append({"loss": value.detach()} | grads)
    return [(name, value, found[1][name]) for name, value in found[0].items()]


def products(group: dist.ProcessGroup, n: int, d: int) -> list[dict[str, float]]:
    """Operations of matrix products and bytes sent in one step of a rank: of ours, gather and ring, and open_clip's."""
    import open_clip.loss

    from bench.distributed import sent_bytes

    rank, size = dist.get_rank(group), dist.get_world_size(group)
    flags: dict[str, Any] = {"local_loss": True, "gather_with_grad": True, "rank": rank, "world_size": size}
    image, text = (torch.randn(n // size, d, requires_grad=True) for _ in range(2))
    found = []
    for module in (
        sk.ClipLoss(**flags),
        sk.ClipLoss(**flags, strategy="ring"),
        open_clip.loss.ClipLoss(**flags),
    ):
        with sent_bytes() as sizes, torch.profiler.profile(record_shapes=True) as profile:
            module(image, text, torch.tensor(2.0)).backward()
        operations = 0.0
        for event in profile.events():
            if event.name in ("aten::mm", "aten::addmm_"):
                a, b = event.input_shapes[:2] if event.name == "aten::mm" else event.input_shapes[1:3]
                operations += 2.0 * a[0] * a[1] * b[1]
        found.append({"operations": operations, "bytes": float(sum(sizes))})
    return found


def evaluate_as_with_nccl(group: dist.ProcessGroup, *arguments: Any) -> list[dict[str, Tensor]]:
    """`evaluate` by NCCL's way: grouped messages, and collectives where rows are even."""
    made = Exchange.__init__

    def init(exchange: Exchange, group: dist.ProcessGroup) -> None:
        made(exchange, group)
        exchange.backends = {"cpu": "nccl"}

    with mock.patch.object(Exchange, "__init__", init):
        return evaluate(group, *arguments)
