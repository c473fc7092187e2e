"""Checkpoints that are whole or not there.

A checkpoint is a folder `step-00000100` with the weights (safetensors, for anyone to read) and all else that a run
needs to go on. It is written under another name, flushed to the disk and renamed: a process killed at any moment leaves
the older ones as they were, and a folder of that name is always complete. Two are kept.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

KEEP = 2
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """After `step` steps: `state` is what went with the weights."""

    step: int
    path: Path
    weights: dict[str, Tensor]
    state: dict[str, Any]


def save(folder: Path, step: int, model: nn.Module, state: Mapping[str, Any]) -> Path:
    """Writes `folder`/step-N, then drops all but the newest two. `state`: tensors, numbers, texts, lists and dicts."""
    folder.mkdir(parents=True, exist_ok=True)
    path, aside, dropped = folder / f"step-{step:08d}", folder / "being-written", folder / "being-dropped"
    for left in (aside, dropped):  # by a killed process
        if left.exists():
            shutil.rmtree(left)
    if path.exists():  # the same run was here before: a step's weights are always the same
        return path
    aside.mkdir()
    save_file({name: x.detach().contiguous() for name, x in model.state_dict().items()}, aside / "model.safetensors")
    torch.save(dict(state), aside / "state.pt")
    for file in (*aside.iterdir(), aside):
        flush(file)
    aside.rename(path)
    flush(folder)
    for old in steps(folder)[:-KEEP]:
        (folder / f"step-{old:08d}").rename(dropped)  # first out of the way: half a checkpoint must not look like one
        shutil.rmtree(dropped)
    return path


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of a run, on the CPU, or None."""
    found = steps(folder)
    if not found:
        return None
    path = folder / f"step-{found[-1]:08d}"
    state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    return Checkpoint(found[-1], path, load_file(path / "model.safetensors"), state)


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints there, in order."""
    names = (_NAME.fullmatch(path.name) for path in folder.iterdir()) if folder.exists() else ()
    return sorted(int(match[1]) for match in names if match)


def flush(path: Path) -> None:
    """To the disk: a rename that outlives a power cut must not find its files empty."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
