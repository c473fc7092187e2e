"""Ranks that disagree, fail, die or hang: every other one ends with an error that names them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import smartclip_kernels as sk
from tests import distributed_runs as runs
from tests import ranks as processes
from tests.ranks import Ranks

Start = Callable[..., Ranks]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(3, tmp_path_factory.mktemp("ranks") / "store")
    yield started
    started.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Processes that will not be fit for anything else."""
    started: list[Ranks] = []

    def begin(size: int, timeout: float) -> Ranks:
        started.append(Ranks(size, tmp_path / "store", timeout))
        return started[-1]

    yield begin
    for it in started:
        it.close()


@pytest.mark.parametrize("what", runs.DISAGREEMENTS)
def test_disagreement(ranks: Ranks, what: str) -> None:
    for outcome in ranks.outcomes(runs.disagree, what):
        assert outcome.startswith(runs.DISAGREEMENTS[what])


def test_an_error_of_one_is_an_error_of_all(ranks: Ranks) -> None:
    found = ranks.run(runs.one_bad_input)
    own = "text: got embedding width 7, needs image's, 8"
    assert found[1] == ("ValueError", own)
    for kind, message in (found[0], found[2]):
        assert kind == "RuntimeError"
        assert message.startswith("rank 1 failed in forward of call") and message.endswith(f"ValueError: {own}")


@pytest.mark.parametrize("objective", ["softmax", "sigmoid"])
def test_out_of_step(start: Start, objective: str) -> None:
    for outcome in start(3, 60).outcomes(runs.out_of_step, objective):
        assert outcome.startswith(
            "step: all ranks of the group need the same, got rank 1 backward of call 1; ranks 0, 2"
        )
        assert outcome.endswith("forward of call 2")


@pytest.mark.parametrize(
    ("when", "objective", "strategy", "size"),
    [
        ("between", "softmax", "gather", 3),
        ("forward", "softmax", "gather", 3),
        ("backward", "softmax", "gather", 3),
        ("backward", "softmax", "ring", 4),
        ("forward", "sigmoid", "ring", 4),
        ("forward", "softmax", "ring", 4),
        ("between", "sigmoid", "ring", 2),
        ("forward", "sigmoid", "gather", 3),
    ],
)
def test_a_rank_that_dies(start: Start, when: str, objective: str, strategy: str, size: int) -> None:
    """At once: the group's timeout is longer than the test's patience."""
    outcomes = start(size, 10 * processes.PATIENCE).outcomes(runs.lose_one, when, objective, strategy)
    assert outcomes.pop(1) is None
    for outcome in outcomes:
        assert "rank 1 closed the connection" in outcome, outcome


def test_a_rank_that_hangs(start: Start) -> None:
    """The others end with the group's timeout. Only rank 1 is named."""
    pool = start(3, 4)
    pool.begin(runs.lose_one, "hang", "softmax", "gather", among=3)
    for rank in (0, 2):
        outcome = pool.outcome(rank)
        assert outcome.startswith("rank 1 did not answer within the group's timeout"), outcome


def test_no_process_group(tmp_path: Path) -> None:
    x = torch.ones(2, 3)
    assert not dist.is_initialized()
    for module in (sk.ClipLoss(world_size=2), sk.SigLipLoss(rank=1, world_size=2)):
        with pytest.raises(
            RuntimeError, match=r"group: torch\.distributed is not initialised; call .*init_process_group"
        ):
            module(x, x, 1.0)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for bad in ("gloo", 3):
            with pytest.raises(TypeError, match=r"group: got \w+, needs a torch\.distributed\.ProcessGroup"):
                sk.clip_loss(x, x, 1.0, group=bad)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="group: got one that this process is not a member of"):
            sk.clip_loss(x, x, 1.0, group=dist.GroupMember.NON_GROUP_MEMBER)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="strategy: got 'tree', needs one of 'gather', 'ring'"):
            sk.clip_loss(x, x, 1.0, group=dist.group.WORLD, strategy="tree")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="rank, world_size: got 1, 2, needs the group's, 0, 1"):
            sk.ClipLoss(rank=1, world_size=2)(x, x, 1.0)
    finally:
        dist.destroy_process_group()
