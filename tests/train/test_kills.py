"""SIGKILL at random moments of real processes: whatever they were at, the run goes on and ends with the same bits."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from smartclip_kernels.train import checkpoint
from smartclip_kernels.train.config import Config
from smartclip_kernels.train.report import read_metrics
from tests.train.processes import Runner, weights

Configure = Callable[..., Config]
STEPS = 8


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    runner = Runner()
    yield runner
    runner.close()


@pytest.mark.parametrize("kills", [4, pytest.param(25, marks=pytest.mark.slow)])
def test_killed_at_random_moments(config: Configure, runner: Runner, tmp_path: Path, kills: int) -> None:
    """Half of the kills come at any moment of a run, from its start to its last picture; the others while a checkpoint
    is being written or dropped."""
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")  # pytest shows it if the test fails
    rng = random.Random(seed)

    def settings(name: str) -> Config:
        return config(out=tmp_path / name, resume=True, steps=STEPS, checkpoint_every=1)

    began = time.monotonic()
    runner.start(settings("whole"))
    assert runner.finish() == 0
    duration = time.monotonic() - began

    killed = in_writing = runs = 0
    for _ in range(6 * kills):
        if killed >= kills and in_writing >= kills // 4:
            break
        now = settings(f"run {runs}")
        folder = Path(str(now.out)) / "checkpoints"
        runner.start(now)
        if rng.random() < 0.5:
            time.sleep(rng.uniform(0, duration))
        else:
            wait_for_writing(runner, folder, after=newest_step(folder) + rng.randrange(3))
            time.sleep(rng.uniform(0, 0.003))
        runner.kill()
        status = runner.finish()
        assert status in (0, -signal.SIGKILL)
        if status:
            killed += 1
            in_writing += any(folder.glob("being-*"))
        else:
            compare(tmp_path / "whole", Path(str(now.out)))
            runs += 1
    assert killed >= kills
    assert in_writing >= kills // 4
    runner.start(settings(f"run {runs}"))
    assert runner.finish() == 0
    compare(tmp_path / "whole", tmp_path / f"run {runs}")
    print(f"{killed} kills, {in_writing} while a checkpoint was being written or dropped, {runs + 1} runs")


def newest_step(folder: Path) -> int:
    return max(checkpoint.steps(folder), default=0)


def wait_for_writing(runner: Runner, folder: Path, after: int) -> None:
    """Until a checkpoint behind step `after` is being written, or an old one dropped, or the process has ended."""
    while runner.running():
        for _ in range(50):
            if any(folder.glob("being-*")) and newest_step(folder) >= after:
                return


def compare(whole: Path, killed: Path) -> None:
    expected, found = weights(whole, STEPS), weights(killed, STEPS)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert sorted(p.name for p in (killed / "checkpoints").iterdir()) == ["step-00000007", "step-00000008"]
    assert [line["step"] for line in read_metrics(killed / "metrics.jsonl")] == list(range(1, STEPS + 1))
    evaluations = [json.loads((folder / "evaluation.json").read_text()) for folder in (whole, killed)]
    assert evaluations[0] == evaluations[1]
