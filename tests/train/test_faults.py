"""What can go wrong in a long run, and how it ends: with a message that says what is left, and with that whole."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from smartclip_kernels.train import checkpoint
from smartclip_kernels.train.__main__ import main
from smartclip_kernels.train.batches import batches
from smartclip_kernels.train.config import Config
from smartclip_kernels.train.loop import prepare_folder, train
from smartclip_kernels.train.run import Run, StoppedError
from tests.train.processes import options

Configure = Callable[..., Config]


def ends_with(config: Config, patch: pytest.MonkeyPatch) -> str:
    """The last words of the command line, which has to fail."""
    patch.setattr(sys, "argv", ["smartclip-train", *options(config)])
    with pytest.raises(SystemExit) as end:
        main()
    assert isinstance(end.value.code, str)  # which makes the exit status 1
    return end.value.code


def until(config: Config, step: int) -> Run:
    """A run that has come so far, with a checkpoint there; `train` without evaluation and pictures."""
    run = Run(config, prepare_folder(config))
    for batch in batches(run.source, config, run.step):
        run.train_step(batch)
        if run.step == step:
            break
    run.save()
    return run


def end(config: Config) -> dict[str, torch.Tensor]:
    """The last step's weights; a run that had stopped goes on."""
    return until(config, config.steps).model.state_dict()


@pytest.fixture
def expected(config: Configure, tmp_path: Path) -> dict[str, torch.Tensor]:
    """The weights of an undisturbed run."""
    return end(config(out=tmp_path / "whole"))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=4m", "none", folder], check=False).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk(
    config: Configure, small_disk: Path, expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(out=small_disk / "run", resume=True)
    until(settings, 2)
    size = sum(file.stat().st_size for file in (small_disk / "run" / "checkpoints").rglob("*"))
    free = os.statvfs(small_disk)
    with (small_disk / "ballast").open("wb") as ballast:
        ballast.write(bytes(free.f_bavail * free.f_frsize - size // 2))  # the next one gets half way
    said = ends_with(settings, monkeypatch)
    folder = small_disk / "run" / "checkpoints"
    assert re.search(r"step 4: .*step-00000004 cannot be written: .*[Nn]o space left", said, re.DOTALL), said
    assert said.endswith(f"last good checkpoint: {folder / 'step-00000002'}")
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]
    (small_disk / "ballast").unlink()
    assert same(end(settings), expected)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A write beyond it fails like one on a full disk, with another number; Python ignores the signal."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("file", ["model.safetensors", "state.pt"])
def test_a_write_that_fails(
    config: Configure, expected: dict[str, torch.Tensor], file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For those who may not mount a disk."""
    settings = config(resume=True)
    run = until(settings, 2)
    folder = run.checkpoints
    size = (folder / "step-00000002" / file).stat().st_size
    with files_of_at_most(size - 1):
        said = ends_with(settings, monkeypatch)
    assert "step 4: " in said
    assert "step-00000004 cannot be written" in said
    assert said.endswith(f"last good checkpoint: {folder / 'step-00000002'}")
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]
    assert same(end(settings), expected)


@pytest.mark.parametrize("file", ["model.safetensors", "state.pt"])
def test_a_truncated_checkpoint(
    config: Configure, expected: dict[str, torch.Tensor], file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """test_checkpoint.py has other damage."""
    settings = config(resume=True)
    until(settings, 2)
    run = until(settings, 4)
    newest = run.checkpoints / "step-00000004"
    os.truncate(newest / file, (newest / file).stat().st_size // 2)
    said = ends_with(settings, monkeypatch)
    assert f"checkpoint: {newest / file} is not what was written" in said
    assert f"{run.checkpoints / 'step-00000002'} is whole: to go on from there, remove {newest}" in said
    shutil.rmtree(newest)
    assert same(end(settings), expected)


def test_no_checkpoint_is_whole(config: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    run = until(config(), 2)
    (run.checkpoints / "step-00000002" / "state.pt").write_bytes(b"")
    said = ends_with(config(resume=True), monkeypatch)
    assert said.endswith("state.pt is not what was written (0 bytes, other checksum); no other checkpoint is whole")


def test_a_checkpoint_of_another_configuration(
    config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where it was copied into a run's folder, and would fit."""
    until(config(lr=1e-4, out=tmp_path / "other"), 2)
    ours = config(resume=True, data=dataclasses.replace(config().data, workers=1), checkpoint_every=1)
    until(ours, 1)
    copied = Path(str(ours.out)) / "checkpoints" / "step-00000002"
    shutil.copytree(tmp_path / "other" / "checkpoints" / "step-00000002", copied)
    said = ends_with(ours, monkeypatch)
    assert said == f"smartclip-train: resume: {copied} was made with other settings: lr=0.0001"
    inner = dataclasses.replace(ours, model=dataclasses.replace(ours.model, embed_dim=24), lr=1e-4)
    assert ends_with(inner, monkeypatch).endswith("other settings: model.embed_dim=16")


@pytest.mark.parametrize("more", [True, False])
def test_other_data_under_a_checkpoint(
    config: Configure, shapes: Path, more: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More pairs would come in another order, other words would have other numbers."""
    run = until(config(), 2)
    captions = shapes / "captions.jsonl"
    lines = captions.read_text().splitlines(keepends=True)
    captions.write_text("".join([*lines, *lines] if more else lines).replace("disc", "disc" if more else "disk"))
    said = ends_with(config(resume=True), monkeypatch)
    assert f"resume: {shapes} has changed since {run.checkpoints / 'step-00000002'}: " in said
    assert ("training images: got 74, was 37" in said) == more
    assert ("words: got" in said) or more


def test_a_reader_that_dies(
    config: Configure, expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(resume=True, data=dataclasses.replace(config().data, workers=2))
    step, killed = Run.train_step, list[int]()

    def deadly(self: Run, batch: Any) -> dict[str, float]:
        if self.step == 3 and not killed:
            for child in multiprocessing.active_children():
                killed.append(child.pid or 0)
                child.kill()
        return step(self, batch)

    monkeypatch.setattr(Run, "train_step", deadly)
    said = ends_with(settings, monkeypatch)
    assert killed
    assert re.search(r"step [345]: DataLoader worker \(pid", said), said
    assert any(str(pid) in said for pid in killed)
    assert f"last good checkpoint: {Path(str(settings.out)) / 'checkpoints' / 'step-00000002'}" in said
    assert same(end(dataclasses.replace(settings, data=config().data)), expected)  # it goes on with fewer of them


def test_a_loss_that_is_no_number(config: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """test_loop.py sees that it stops before the weights; here, how it ends."""
    until(config(), 2)
    loss = Run.loss
    monkeypatch.setattr(Run, "loss", lambda *args, **kwargs: loss(*args, **kwargs) * float("nan"))
    said = ends_with(config(resume=True), monkeypatch)
    out = Path(str(config().out))
    assert said.startswith("smartclip-train: step 2: loss nan, gradient norm nan. ")
    assert f"The batch is in {out / 'non-finite-step-2.json'}" in said
    assert said.endswith(f"last good checkpoint: {out / 'checkpoints' / 'step-00000002'}")


def test_no_image_can_be_read(config: Configure, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in shapes.glob("*.png"):
        path.unlink()
    assert "none of" in ends_with(config(), monkeypatch)


def test_ctrl_c(config: Configure, expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(resume=True)
    step = Run.train_step

    def interrupted(self: Run, batch: Any) -> dict[str, float]:
        if self.step == 3:
            signal.raise_signal(signal.SIGINT)
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_step", interrupted)
        assert "--resume goes on from the newest checkpoint" in ends_with(settings, monkeypatch)
    assert checkpoint.steps(Path(str(settings.out)) / "checkpoints") == [2]
    assert same(end(settings), expected)


def test_other_errors_keep_their_own_words(config: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Run, batch: Any) -> dict[str, float]:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(Run, "train_step", wrong)
    with pytest.raises(RuntimeError, match="a mistake of ours") as error:
        train(config(), quiet=True)
    assert not isinstance(error.value, StoppedError)
