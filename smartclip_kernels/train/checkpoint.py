"""Checkpoints that are whole or not there.

A checkpoint is a folder `step-00000100` with the weights (safetensors, for anyone to read), all else that a run needs
to go on, and the sums of both (`sha256sum -c SHA256SUMS`). It is written under another name, flushed to the disk and
renamed: a process killed at any moment, or a disk that is full, leaves the older ones as they were, and a folder of
that name is complete. What becomes of it later is checked before it is used. Two are kept.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

KEEP = 2
WEIGHTS, STATE, SUMS = "model.safetensors", "state.pt", "SHA256SUMS"
_NAME = re.compile(r"step-(\d{8})")


class BrokenCheckpointError(RuntimeError):
    """A checkpoint that is not what was written; the message names the file, what is whole and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """After `step` steps: `state` is what went with the weights."""

    step: int
    path: Path
    weights: dict[str, Tensor]
    state: dict[str, Any]


def save(folder: Path, step: int, model: nn.Module, state: Mapping[str, Any]) -> Path:
    """Writes `folder`/step-N, then drops all but the newest two. `state`: tensors, numbers, texts, lists and dicts.

    Raises:
        OSError: it cannot be written; the message names it. The older ones are as they were.
    """
    path, aside, dropped = folder / f"step-{step:08d}", folder / "being-written", folder / "being-dropped"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in (aside, dropped):  # by a killed process
            if left.exists():
                shutil.rmtree(left)
        if path.exists():  # the same run was here before: a step's weights are always the same
            return path
        aside.mkdir()
        save_file({name: x.detach().contiguous() for name, x in model.state_dict().items()}, aside / WEIGHTS)
        with (aside / STATE).open("wb") as file:
            torch.save(dict(state), file)
        (aside / SUMS).write_text("".join(f"{sha256(aside / name)}  {name}\n" for name in (WEIGHTS, STATE)))
        for written in (*aside.iterdir(), aside):
            flush(written)
        aside.rename(path)
        flush(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)  # whoever makes room should find it
        # torch covers the error of a full disk with one of its own.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"{path} cannot be written: {reason}") from error
    for old in steps(folder)[:-KEEP]:
        (folder / f"step-{old:08d}").rename(dropped)  # first out of the way: half a checkpoint must not look like one
        shutil.rmtree(dropped)
    return path


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of a run, on the CPU, or None.

    Raises:
        BrokenCheckpointError: it is not what was written. Going on from an older one is left to the user.
    """
    found = [folder / f"step-{step:08d}" for step in steps(folder)]
    if not found:
        return None
    path = found.pop()
    if broken := damage(path):
        whole = next((older for older in reversed(found) if not damage(older)), None)
        remedy = f"{whole} is whole: to go on from there, remove {path}" if whole else "no other checkpoint is whole"
        raise BrokenCheckpointError(f"checkpoint: {broken}; {remedy}")
    state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    return Checkpoint(int(path.name.removeprefix("step-")), path, load_file(path / WEIGHTS), state)


def damage(path: Path) -> str:
    """What of a checkpoint is not as it was written; empty if all is."""
    try:
        lines = (line.split("  ") for line in (path / SUMS).read_text().splitlines())
        sums = {name: digest for digest, name in lines}
    except (OSError, ValueError) as error:
        return f"{path / SUMS} cannot be read: {error}"
    for name in (WEIGHTS, STATE):
        if not (path / name).exists():
            return f"{path / name} is missing"
        if sha256(path / name) != sums.get(name):
            return f"{path / name} is not what was written ({(path / name).stat().st_size:,} bytes, other checksum)"
    return ""


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints there, in order."""
    names = (_NAME.fullmatch(path.name) for path in folder.iterdir()) if folder.exists() else ()
    return sorted(int(match[1]) for match in names if match)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def replace(path: Path, text: str) -> None:
    """Writes a text file that is the old one or the new one, whenever the process is killed."""
    aside = path.with_name(f"{path.name}.being-written")
    aside.write_text(text, encoding="utf-8")
    flush(aside)
    aside.replace(path)


def flush(path: Path) -> None:
    """To the disk: a rename that outlives a power cut must not find its files empty."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
