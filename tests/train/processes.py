"""Runs of the trainer in processes of their own, started in a moment: a server that has imported all forks them."""

from __future__ import annotations

import dataclasses
import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from smartclip_kernels.train import checkpoint
from smartclip_kernels.train.config import Config
from smartclip_kernels.train.loop import train

TIMEOUT = 120
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["pytest", "matplotlib.figure", "torch.utils.tensorboard", "smartclip_kernels.train.loop", "tests.train.processes"]
)


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


def start(config: Config) -> ForkServerProcess:
    process = FORKS.Process(target=train, args=(config,), kwargs={"quiet": True})
    process.start()
    return process


def finish(process: ForkServerProcess) -> int:
    """Its exit status."""
    process.join(TIMEOUT)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"a run of the trainer takes more than {TIMEOUT} s")
    assert process.exitcode is not None
    return process.exitcode


def ranks(world: int, folder: Path, target: Callable[..., Any], *args: Any) -> list[Any]:
    """What `target(*args)` returns, or the text of what it raises, on each of `world` gloo ranks."""
    folder.mkdir()
    processes = [FORKS.Process(target=_rank, args=(rank, world, folder, target, args)) for rank in range(world)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            finish(process)
        return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(world)]
    finally:
        for process in processes:
            process.kill()


def _rank(rank: int, world: int, folder: Path, target: Callable[..., Any], args: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    try:
        result = target(*args)
    except Exception:
        result = traceback.format_exc()
    torch.save(result, folder / f"rank-{rank}.pt")


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint, which has to be that of this step."""
    found = checkpoint.newest(out / "checkpoints")
    assert found is not None
    assert found.step == step
    return found.weights
