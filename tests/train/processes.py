"""Runs of the trainer in processes of their own, and what such processes run."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import traceback
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from smartclip_kernels.train import checkpoint
from smartclip_kernels.train.batches import Batch, batches
from smartclip_kernels.train.config import Config
from smartclip_kernels.train.loop import prepare_folder, train
from smartclip_kernels.train.ranks import Ranks
from smartclip_kernels.train.run import Run

PATIENCE = 120.0  # seconds for a run of the trainer


class Runner:
    """One run of the trainer at a time, in a process of its own, forked from one that has imported everything."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.server = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.server.start()
        self.pid = 0

    def start(self, config: Config) -> None:
        self.pipe.send(config)
        self.pid = self.pipe.recv()

    def running(self) -> bool:
        return not self.pipe.poll()

    def kill(self) -> None:
        if self.running():
            os.kill(self.pid, signal.SIGKILL)

    def finish(self) -> int:
        """Its exit status, below 0 for a signal."""
        if not self.pipe.poll(PATIENCE):
            self.kill()
            raise AssertionError(f"a run of the trainer takes more than {PATIENCE:.0f} s")
        status: int = self.pipe.recv()
        return status

    def close(self) -> None:
        self.server.kill()
        self.server.join()


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    for module in ("matplotlib.figure", "torch.utils.tensorboard"):
        import_module(module)
    while True:
        config = pipe.recv()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                train(config, quiet=True)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        pipe.send(pid)
        pipe.send(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint, which has to be that of this step."""
    found = checkpoint.newest(out / "checkpoints")
    assert found is not None
    assert found.step == step
    return found.weights


def options(config: Config, prefix: str = "--") -> list[str]:
    """The command line that makes this configuration."""
    words: list[str] = []
    for field in dataclasses.fields(config):
        value: Any = getattr(config, field.name)
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            words += options(value, f"{name}.")  # type: ignore[arg-type]
        elif isinstance(value, bool):
            words += [name if value else f"{prefix}no-{field.name.replace('_', '-')}"]
        else:
            words += [name, str(value)]
    return words


Steps = tuple[list[dict[str, float]], list[tuple[int, list[str]]], dict[str, torch.Tensor]]


def take_steps(group: Any, config: Config, last: int = -1, poisoned: int = -1) -> Steps:
    """Trains to step `last`, without evaluation and pictures: what is logged, images and problems, the weights.

    In a group, every rank calls. On rank `poisoned` a weight becomes NaN before step 2.
    """
    ranks = Ranks() if group is None else Ranks(dist.get_rank(group), dist.get_world_size(group), group)
    run = Run(config, ranks.from_first(lambda: prepare_folder(config)), ranks)
    logged, read = [], []
    for batch in batches(run.source, config, run.step, ranks):
        if run.step == 2 and ranks.rank == poisoned:
            next(run.model.image.projection.parameters()).data[0, 0] = torch.nan
        logged.append(run.train_step(batch))
        read.append((batch.n_images, batch.problems))
        if run.step == last:
            break
    if ranks.first:
        run.save()
    return logged, read, {name: x.clone() for name, x in run.model.state_dict().items()}


def take_step_of_own(group: Any, config: Config) -> tuple[list[str], list[int]]:
    """What a rank alone knows: its first batch's records, and the random numbers of steps −1 and 0."""
    ranks = Ranks(dist.get_rank(group), dist.get_world_size(group), group)
    run = Run(config, ranks.from_first(lambda: prepare_folder(config)), ranks)
    batch: Batch = next(batches(run.source, config, 0, ranks))
    numbers = []
    for step in (-1, 0):
        run.seed_step(step)
        numbers.append(int(torch.randint(2**31, ())))
    return [record.key for record in batch.records], numbers


def whole_run(group: Any, config: Config) -> dict[str, float]:
    return train(config, quiet=True)
