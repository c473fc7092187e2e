from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from smartclip_kernels.train import checkpoint


def model(value: float) -> nn.Linear:
    layer = nn.Linear(3, 2)
    nn.init.constant_(layer.weight, value)
    return layer


class KilledError(BaseException):
    """Stands for a kill: nothing catches it."""


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "c", 7, model(7.0), {"optimizer": {"x": torch.arange(3)}, "note": "n"})
    found = checkpoint.newest(tmp_path / "c")
    assert found is not None
    assert (found.step, found.path, found.state["note"]) == (7, path, "n")
    assert torch.equal(found.weights["weight"], torch.full((2, 3), 7.0))
    assert torch.equal(found.state["optimizer"]["x"], torch.arange(3))


def test_none_yet(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "nowhere") is None


def test_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 30):
        checkpoint.save(tmp_path, step, model(step), {})
    assert checkpoint.steps(tmp_path) == [10, 30]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000030"]


@pytest.mark.parametrize("moment", range(17))
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(
    tmp_path: Path, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call that touches the disk is a moment: the process ends there, before the call or half way through it."""
    for step in (1, 2):
        checkpoint.save(tmp_path, step, model(step), {"step": step})
    calls = iter(range(100))

    def deadly(real: Any, halfway: bool = False) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == moment:
                raise KilledError
            result = real(*args, **kwargs)
            if halfway and next(calls) == moment:
                raise KilledError
            return result

        return call

    def half_a_removal(path: Path) -> None:
        for file in sorted(path.iterdir()):
            file.unlink()
            if next(calls) == moment:
                raise KilledError
        path.rmdir()

    with monkeypatch.context() as patch:
        patch.setattr("smartclip_kernels.train.checkpoint.save_file", deadly(save_file, halfway=True))
        patch.setattr(torch, "save", deadly(torch.save, halfway=True))
        patch.setattr(checkpoint, "flush", deadly(checkpoint.flush))
        patch.setattr(Path, "rename", deadly(Path.rename, halfway=True))
        patch.setattr(shutil, "rmtree", half_a_removal)
        try:
            checkpoint.save(tmp_path, 3, model(3.0), {"step": 3})
            killed = False
        except KilledError:
            killed = True
    assert killed == (moment < 16), "the moments of this test no longer cover a save"
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step in (2, 3)
    assert found.state["step"] == found.step
    assert torch.equal(found.weights["weight"], torch.full((2, 3), float(found.step)))
    checkpoint.save(tmp_path, 4, model(4.0), {})  # and the next save finds its way
    last = checkpoint.newest(tmp_path)
    assert last is not None
    assert last.step == 4
    assert not list(tmp_path.glob("being-*"))


def test_files_reach_the_disk_before_the_name_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    flush, rename = checkpoint.flush, Path.rename

    def logged_flush(path: Path) -> None:
        events.append(f"flush {path.name}")
        flush(path)

    def logged_rename(path: Path, to: Path) -> Path:
        events.append(f"rename to {to.name}")
        return rename(path, to)

    monkeypatch.setattr(checkpoint, "flush", logged_flush)
    monkeypatch.setattr(Path, "rename", logged_rename)
    checkpoint.save(tmp_path / "c", 5, model(5.0), {})
    assert sorted(events[:3]) == ["flush SHA256SUMS", "flush model.safetensors", "flush state.pt"]
    assert events[3:] == ["flush being-written", "rename to step-00000005", "flush c"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "emptied"])
@pytest.mark.parametrize("file", ["model.safetensors", "state.pt", "SHA256SUMS"])
def test_damage_is_found_and_the_whole_one_named(tmp_path: Path, file: str, damage: str) -> None:
    older, newest = (checkpoint.save(tmp_path, step, model(step), {"x": torch.arange(9)}) for step in (1, 2))
    content = (newest / file).read_bytes()
    (newest / file).unlink()
    if damage != "missing":
        middle = len(content) // 2
        kept = {"cut": content[:-2], "emptied": b""}
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        (newest / file).write_bytes(kept.get(damage, flipped))
    with pytest.raises(checkpoint.BrokenCheckpointError) as error:
        checkpoint.newest(tmp_path)
    assert f"{older} is whole: to go on from there, remove {newest}" in str(error.value)
    if file != "SHA256SUMS":
        assert str(newest / file) in str(error.value)
    shutil.rmtree(newest)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 1


def test_sums_are_those_of_sha256sum(tmp_path: Path) -> None:
    tool = shutil.which("sha256sum")
    if tool is None:
        pytest.skip("no sha256sum here")
    path = checkpoint.save(tmp_path, 1, model(1.0), {})
    subprocess.run([tool, "--check", "--strict", "SHA256SUMS"], cwd=path, check=True)


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file.json"
    checkpoint.replace(file, "old")

    def killed(path: Path) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "flush", killed)
        with pytest.raises(KilledError):
            checkpoint.replace(file, "new")
    assert file.read_text() == "old"
    checkpoint.replace(file, "new")
    assert file.read_text() == "new"
