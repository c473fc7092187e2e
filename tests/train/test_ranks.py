"""Several processes with one batch train as one process does."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from smartclip_kernels.train import checkpoint
from smartclip_kernels.train.config import Config
from smartclip_kernels.train.data import open_source
from smartclip_kernels.train.report import read_metrics
from tests.ranks import Ranks
from tests.train.processes import (
    Steps,
    options,
    take_step_of_own,
    take_steps,
    weights,
    whole_run,
)

Configure = Callable[..., Config]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(2, tmp_path_factory.mktemp("ranks") / "store")
    yield ranks
    ranks.close()


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], relative: float = 1e-8) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= relative * a[name].abs().max(), name


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def agree(alone: Steps, together: list[Steps]) -> None:
    """Weights to 1e-8, what is logged to 1e-9; ranks have the same bits."""
    for logged, read, parameters in together:
        close(alone[2], parameters)
        for ours, theirs in zip(alone[0], logged, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-9)
        assert read == alone[1]
        assert same(parameters, together[0][2])


@pytest.mark.parametrize(
    ("changes", "captions"),
    [
        ({"objective": "clip", "strategy": "ring"}, "mixed"),
        ({"objective": "siglip"}, "short"),
        ({"objective": "smartclip", "strategy": "gather"}, "both"),
        ({"objective": "smartclip", "strategy": "ring", "loss_backend": "reference"}, "both"),
    ],
)
def test_two_ranks_train_as_one_process_does(
    config: Configure, two: Ranks, tmp_path: Path, shapes: Path, changes: dict[str, Any], captions: str
) -> None:
    """An odd batch that holds images twice, some unreadable on one rank only; 3 steps in float64."""
    base = config(batch_size=49, steps=3, precision="float64", captions=captions, **changes)
    base = dataclasses.replace(base, mask=dataclasses.replace(base.mask, sparsity=0.1))
    (shapes / open_source(base.data).records["train"][3].key).write_bytes(b"")
    alone = take_steps(None, dataclasses.replace(base, out=tmp_path / "alone"))
    assert all(problems for _, problems in alone[1])
    agree(alone, two.run(take_steps, dataclasses.replace(base, out=tmp_path / "together")))


def test_one_rank_is_one_process_bit_for_bit(config: Configure, two: Ranks, tmp_path: Path) -> None:
    alone = take_steps(None, config(out=tmp_path / "alone"))
    (together,) = two.run(take_steps, config(out=tmp_path / "together"), among=1)
    assert together[0] == alone[0]
    assert same(together[2], alone[2])


def test_rank_0_alone_writes_and_evaluates(config: Configure, two: Ranks, tmp_path: Path) -> None:
    settings = config(out=tmp_path / "run")
    first, second = two.run(whole_run, settings)
    assert "keyword mAP" in first
    assert second == {}
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 7))
    assert {line["images"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")} == {24}
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [4, 6]
    for outcome in two.outcomes(whole_run, settings):  # and what rank 0 finds wrong is every rank's error
        assert "FileExistsError: out: " in outcome


def test_ranks_share_the_batch_and_draw_numbers_of_their_own(config: Configure, two: Ranks, tmp_path: Path) -> None:
    (first, one), (second, other) = two.run(take_step_of_own, config(out=tmp_path / "run"))
    assert len(first) == len(second) == 12
    assert not {*first} & {*second}
    assert one[0] == other[0]  # the weights' at the start
    assert one[1] != other[1]


def test_resumed_by_as_many_ranks_or_others(config: Configure, two: Ranks, tmp_path: Path) -> None:
    def settings(name: str) -> Config:
        return config(out=tmp_path / name, resume=True, precision="float64")

    whole = two.run(take_steps, settings("whole"))[0][2]
    two.run(take_steps, settings("stopped"), 3)
    assert same(two.run(take_steps, settings("stopped"))[0][2], whole)
    two.run(take_steps, settings("fewer"), 3)
    close(take_steps(None, settings("fewer"))[2], whole)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_nan_on_one_rank_stops_all(config: Configure, two: Ranks, tmp_path: Path, rank: int) -> None:
    settings = config(out=tmp_path / "run", resume=True)
    two.run(take_steps, settings, 1)
    for outcome in two.outcomes(take_steps, settings, -1, rank):
        assert "NonFiniteError: step 2: loss nan" in outcome
        assert outcome.strip().endswith(f"last good checkpoint: {tmp_path / 'run' / 'checkpoints' / 'step-00000001'}")
    batch = json.loads((tmp_path / "run" / "non-finite-step-2.json").read_text())["batch"]
    assert len(batch) == 24


def test_no_image_of_a_rank_can_be_read(config: Configure, two: Ranks, tmp_path: Path, shapes: Path) -> None:
    settings = config(out=tmp_path / "run", batch_size=4)
    (_, _), (second, _) = two.run(take_step_of_own, settings)
    for name in second:
        (shapes / name).unlink()
    for outcome in two.outcomes(take_steps, settings):
        assert "UnreadableImageError: step 0: none of 2 images of rank 1 can be read; the first: " in outcome


def torchrun(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    return subprocess.Popen(
        [*command, "smartclip_kernels.train", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_torchrun(config: Configure, tmp_path: Path) -> None:
    """The command line, 20 steps in float64."""
    base = config(steps=20, checkpoint_every=20, precision="float64")
    process = torchrun(*options(dataclasses.replace(base, out=tmp_path / "together")))
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    alone = take_steps(None, dataclasses.replace(base, out=tmp_path / "alone"))
    close(alone[2], weights(tmp_path / "together", 20))
    losses = [line["loss"] for line in read_metrics(tmp_path / "together" / "metrics.jsonl")]
    assert losses == pytest.approx([numbers["loss"] for numbers in alone[0]], rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_torchrun_loses_a_rank_and_goes_on(config: Configure, tmp_path: Path, victim: int) -> None:
    psutil = pytest.importorskip("psutil")
    base = config(steps=40, checkpoint_every=1, resume=True)
    whole = torchrun(*options(dataclasses.replace(base, out=tmp_path / "whole")))
    assert whole.wait(240) == 0
    killed = options(dataclasses.replace(base, out=tmp_path / "killed"))
    process = torchrun(*killed)
    while process.poll() is None and max(checkpoint.steps(tmp_path / "killed" / "checkpoints"), default=0) < 3:
        pass
    ranks = {child.environ().get("RANK"): child for child in psutil.Process(process.pid).children(recursive=True)}
    ranks[str(victim)].send_signal(signal.SIGKILL)
    said, _ = process.communicate(timeout=240)
    assert process.returncode != 0, said
    assert checkpoint.steps(tmp_path / "killed" / "checkpoints")[-1] < 40
    again = torchrun(*killed)
    said, _ = again.communicate(timeout=240)
    assert again.returncode == 0, said
    assert same(weights(tmp_path / "whole", 40), weights(tmp_path / "killed", 40))
