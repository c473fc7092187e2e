"""The processes of a run: one, or those that torchrun started.

Every rank takes its share of each batch's positions, holds all weights and makes the same update. Gradients are
averaged by one all-reduce of one flat vector after gradient caching is through. DistributedDataParallel would do it per
encoder and call, and knows only what runs through a module's forward: the text tower is called once per caption, and
the learned scales and biases belong to the loss. The loss rides along, so that a NaN on one rank is one everywhere, and
all stop at the same step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

T = TypeVar("T")
PATIENCE = timedelta(minutes=30)
"""How long ranks wait for one that writes a checkpoint, or reads images from a slow disk."""


@dataclass(frozen=True)
class Ranks:
    """This process, number `rank` of `world`. Without a group it is alone."""

    rank: int = 0
    world: int = 1
    group: Any = None  # torch.distributed.ProcessGroup

    @property
    def first(self) -> bool:
        """Whether this one writes, evaluates and speaks for all."""
        return self.rank == 0

    def share(self, numbers: range) -> range:
        """This rank's part of them; the parts follow each other and differ by at most one in length."""
        n = len(numbers)
        return numbers[n * self.rank // self.world : n * (self.rank + 1) // self.world]

    def gather(self, value: T) -> list[T]:
        """Every rank's value."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns or raises on rank 0, on all ranks."""
        if self.group is None:
            return make()
        box: list[Any] = [None, None]
        if self.first:
            try:
                box[0] = make()
            except Exception as error:  # raised below, and by the others, who would wait for it in vain
                box[1] = error
        dist.broadcast_object_list(box, src=0, group=self.group)
        if box[1] is not None:
            raise box[1]
        made: T = box[0]
        return made

    @torch.no_grad()
    def share_state(self, model: nn.Module) -> None:
        """Rank 0's parameters and buffers for all: other processors may have rounded theirs otherwise."""
        if self.group is not None:
            for x in model.state_dict().values():
                dist.broadcast(x, src=0, group=self.group)

    @torch.no_grad()
    def average_gradients(self, parameters: Sequence[Tensor], loss: Tensor) -> Tensor:
        """Puts the ranks' mean into every .grad and returns that of the losses.

        A parameter that no rank has a gradient for keeps None, as it would in one process.
        """
        if self.group is None:
            return loss
        used = torch.tensor([float(p.grad is not None) for p in parameters], dtype=loss.dtype, device=loss.device)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([loss.reshape(1), used, *(g.reshape(-1) for g in gradients)])
        dist.all_reduce(flat, group=self.group)
        flat /= self.world
        loss, used, *means = flat.split([1, len(parameters), *(p.numel() for p in parameters)])
        for parameter, mean, anywhere in zip(parameters, means, used.tolist(), strict=True):
            parameter.grad = mean.view_as(parameter).to(parameter.dtype) if anywhere else None
        return loss[0]


@contextmanager
def start(device: str) -> Iterator[Ranks]:
    """The group that torchrun's environment describes (gloo between CPUs, NCCL between GPUs), or one process alone."""
    if dist.is_initialized():  # by whoever calls us
        yield Ranks(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    elif "WORLD_SIZE" not in os.environ:
        yield Ranks()
    else:
        on_gpu = torch.device(device).type == "cuda"
        if on_gpu:
            torch.cuda.set_device(device)
        # Counts and errors travel between CPUs in any case.
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE)
        yield Ranks(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
        dist.destroy_process_group()  # not after an error: it would wait for ranks that know nothing of it


def device_of_rank(device: str) -> str:
    """A GPU of this rank's own for "cuda" under torchrun."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device
