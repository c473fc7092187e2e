"""Choosing sizes of blocks: with a timer that a test makes, and a table that stays as it is kept."""

from __future__ import annotations

import json
from concurrent.futures import Executor, Future
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bench import __main__ as command
from bench import tune
from bench.tune import FAMILIES, Trial, choose
from smartclip_kernels.backends.triton import config
from smartclip_kernels.backends.triton.config import Config

PRESENT, A, B, C = (Config(128, 128, depth, 4, 8, 8, 3) for depth in (64, 32, 16, 128))
TABLE = json.loads(config.TABLES.read_text())


def chosen(seconds: dict[Config, float], holds: tuple[Config, ...] = (PRESENT, A, B, C), **out: Config) -> Config:
    def time(sizes: Config) -> float:
        if sizes not in seconds:
            raise RuntimeError("out of resource: shared memory")
        return seconds[sizes]

    trials = [Trial(sizes, "spills 8 bytes" if sizes in out.values() else "") for sizes in (PRESENT, A, B, C)]
    return choose(trials, PRESENT, time, lambda sizes: sizes in holds)[0]


def test_the_fastest_is_chosen() -> None:
    assert chosen({PRESENT: 1.0, A: 0.9, B: 0.8, C: 1.1}) == B


def test_no_change_for_a_difference_that_may_be_noise() -> None:
    assert chosen({PRESENT: 1.0, A: 0.995, B: 1.0, C: 1.1}) == PRESENT


def test_what_spills_or_does_not_run_is_out() -> None:
    assert chosen({PRESENT: 1.0, A: 0.9, B: 0.8, C: 1.1}, spills=B) == A
    assert chosen({PRESENT: 1.0, A: 0.9}) == A
    assert chosen({}) == PRESENT


def test_the_fastest_has_to_hold_in_every_variant() -> None:
    assert chosen({PRESENT: 1.0, A: 0.9, B: 0.8, C: 1.1}, holds=(A,)) == A
    assert chosen({PRESENT: 1.0, A: 0.9, B: 0.8, C: 1.1}, holds=()) == PRESENT


def test_a_present_size_that_does_not_run_here_is_replaced() -> None:
    assert chosen({A: 2.0, B: 3.0}) == A


def test_finalists_are_timed_again_in_turns() -> None:
    calls: list[Config] = []
    first = {PRESENT: 1.0, A: 0.5, B: 0.9, C: 0.8}  # A was lucky once

    def time(sizes: Config) -> float:
        calls.append(sizes)
        return first[sizes] if calls.count(sizes) == 1 or sizes != A else 2.0

    winner, trials = choose([Trial(s) for s in first], PRESENT, time, lambda sizes: True)
    assert winner == C
    finals = calls[4:]
    assert finals == finals[:4] * tune.ROUNDS and len(set(finals[:4])) == 4
    assert {t.sizes: t.seconds for t in trials}[A] == 2.0


def test_the_present_size_is_always_among_the_finalists() -> None:
    sizes = [PRESENT, *(Config(64, 64, 2**k, 1, 8, 4, 2) for k in range(4, 10))]
    seconds = {size: 1.0 - 0.0001 * rank for rank, size in enumerate(sizes)}  # the present one is the slowest, just so
    winner, _ = choose([Trial(s) for s in sizes], PRESENT, seconds.__getitem__, lambda sizes: True)
    assert winner == PRESENT


def test_the_table_is_written_as_it_is_kept() -> None:
    assert tune.text_of(TABLE) == config.TABLES.read_text()


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_candidates_can_be_launched(family: tune.Family) -> None:
    """tl.dot wants 16 of everything; tiles are halved at most twice, and powers of two."""
    found = tune.candidates(family)
    assert len(set(found)) == len(found) > 10
    for s in found:
        assert min(s.block_n, s.block_m, s.block_d) >= 16 and s.parts in (1, 2, 4) and s.warps in (4, 8)
        assert all(size & (size - 1) == 0 for size in (s.block_n, s.block_m, s.block_d))
        assert family.kernel != "scores" or s.parts == 1


def test_families_are_all_entries_of_the_table() -> None:
    assert {(family.kind, family.kernel) for family in FAMILIES} == {
        (kind, kernel) for kind, kernels in TABLE["sm_90"].items() for kernel in kernels
    }
    for family in FAMILIES:
        assert family.variant in family.variants()


class Inline(Executor):
    """Runs a job at once, in the process of the test."""

    def submit(self, job: Any, /, *arguments: Any, **options: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(job(*arguments, **options))
        return done


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything compiles but what takes three stages, and nothing has to wait for it."""

    def try_out(family: Any, sizes: Config, architecture: str, every_variant: bool, run: bool) -> Trial:
        return Trial(sizes, "too much shared memory" if sizes.stages == 3 and not every_variant else "")

    monkeypatch.setattr(tune, "try_out", try_out)


@pytest.mark.usefixtures("compiles")
def test_only_the_asked_architecture_is_rewritten(tmp_path: Path) -> None:
    best = Config(64, 128, 64, 2, 8, 8, 2)
    out = tmp_path / "tables.json"
    lines = list(tune.tune("sm_90", out, monotonic() + 60, Inline(), lambda f, s: 1.0 - 0.5 * (s == best), run=False))
    assert any(line.endswith("chosen") for line in lines)
    assert any("too much shared memory" in line for line in lines)
    written = json.loads(out.read_text())
    assert written["sm_90"]["dot half"]["statistics"] == list(best)
    assert written["sm_90"]["dot half"]["scores"] != list(best)  # which takes no parts
    assert {name: kinds for name, kinds in written.items() if name != "sm_90"} == {
        name: kinds for name, kinds in TABLE.items() if name != "sm_90"
    }
    assert out.read_text() == tune.text_of(written)


@pytest.mark.usefixtures("compiles")
def test_what_was_chosen_is_written_before_the_next_kernel(tmp_path: Path) -> None:
    out, best = tmp_path / "tables.json", Config(64, 128, 64, 2, 8, 8, 2)

    def interrupted(family: tune.Family, sizes: Config) -> float:
        if family != FAMILIES[0]:
            raise KeyboardInterrupt
        return 1.0 - 0.5 * (sizes == best)

    with pytest.raises(KeyboardInterrupt):
        list(tune.tune("sm_90", out, monotonic() + 60, Inline(), interrupted, run=False))
    assert json.loads(out.read_text())["sm_90"]["dot half"]["statistics"] == list(best)


@pytest.mark.usefixtures("compiles")
def test_when_the_time_is_up_nothing_is_begun(tmp_path: Path) -> None:
    def never(family: tune.Family, sizes: Config) -> float:
        raise AssertionError

    out = tmp_path / "tables.json"
    lines = list(tune.tune("sm_90", out, monotonic() - 1, Inline(), never, run=False))
    assert lines == [f"{family}: no time left" for family in FAMILIES]
    assert not out.exists()


def test_timing_takes_the_sizes_that_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend reads its table at every launch: what a timer puts there is what runs."""
    seen: list[Config] = []
    tables = json.loads(json.dumps(TABLE))
    monkeypatch.setattr(config, "tables", lambda: tables)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    config.architecture.cache_clear()

    def once(self: tune.Timer, family: tune.Family) -> float:
        seen.append(config.config("sm_90", family.similarity, torch.float16, family.kernel))
        return float(len(seen))

    monkeypatch.setattr(tune.Timer, "_once", once)
    timer = tune.Timer(device=None)  # type: ignore[arg-type]
    try:
        assert timer(FAMILIES[0], A) == 4.0  # the median of five calls after the first, which compiles
        timer(FAMILIES[0], B)
        assert seen == [A] * 6 + [B] * 6
        assert config.config("sm_90", "dot", torch.bfloat16, "gradient") == Config(
            *TABLE["sm_90"]["dot half"]["gradient"]
        )
    finally:
        config.architecture.cache_clear()
        config.config.cache_clear()


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["tune"]) == 2
    assert "torch sees no GPU here" in capsys.readouterr().out


TRY = """
from bench import tune
from smartclip_kernels.backends.triton.config import Config
family = tune.FAMILIES[0]
for sizes in (Config(64, 64, 32, 1, 8, 4, 2), Config(256, 256, 128, 4, 8, 8, 4)):
    print(tune.try_out(family, sizes, "sm_90", False, False).reason)
"""


@pytest.mark.slow
def test_candidates_are_compiled(run_python: Any) -> None:
    result = run_python(TRY, TRITON_INTERPRET=None, PYTHONPATH=str(Path.cwd()))
    assert result.returncode == 0, result.stderr[-2000:]
    good, bad = result.stdout.splitlines()
    assert good == "" and ("spills" in bad or "shared memory" in bad)
