"""What is measured on a GPU covers the bars, the most important first."""

from __future__ import annotations

import pytest

from bench.gpu_cases import GPU_BARS, HUGE, cases_in_order, gpu_cases, gpu_quick_cases, key, memory_bar
from bench.peers import REPLAYED, SUBJECTS

ALL = ["cuda", "triton"]


@pytest.mark.parametrize("name", GPU_BARS)
def test_every_bar_has_a_case_that_measures_it(name: str) -> None:
    cases = {(*key(case), case.dtype, case.backend): case for case in gpu_cases(ALL)}
    for bar in GPU_BARS[name]:
        case = cases[bar.loss, bar.n, bar.d, bar.dtype, bar.backend]
        assert bar.what in ("floor", "forward floor", "memory", "runs", *case.peers), bar


def test_no_case_is_measured_twice() -> None:
    cases = gpu_cases(ALL)
    assert len({str(case) + case.backend + str(case.overhead) for case in cases}) == len(cases)
    assert all(peer in SUBJECTS for case in cases for peer in case.peers)


def test_bars_come_first() -> None:
    with_bars = {(bar.loss, bar.n, bar.d, bar.dtype) for bars in GPU_BARS.values() for bar in bars}
    order = [(*key(case), case.dtype) in with_bars for case in cases_in_order()]
    last = max(i for i, has_bar in enumerate(order) if has_bar)
    assert order[:5] == [True] * 5
    assert order[: last + 1].count(False) <= 1  # the price of a call, which is soon told


def test_other_backends_meet_the_peers_of_their_bars_alone() -> None:
    cases = gpu_cases(ALL)
    assert [case.backend for case in cases[:2]] == ALL  # one after the other: they have inputs and truth in common
    first, second = cases[:2]
    assert second.peers == ("memeff",) and set(second.peers) < set(first.peers)
    assert {peer for case in gpu_cases(["triton"])[:1] for peer in case.peers} == set(first.peers)
    replayed = [case for case in cases if REPLAYED in case.peers]
    assert {case.backend for case in replayed} == set(ALL)


def test_memory_bars_are_those_of_the_design() -> None:
    clip, siglip, smartclip = (
        next(c for c in cases_in_order() if (c.loss, c.n, c.d) == (loss, HUGE, 768))
        for loss in ("clip", "siglip", "smartclip")
    )
    tower = HUGE * 768 * 4 / 2**20  # one side's gradient in float32, MiB
    fixed = 256 + 64 * 2 * HUGE / 2**20 + 32
    assert memory_bar(clip) == fixed + tower
    assert memory_bar(siglip) == fixed + 2 * tower
    assert memory_bar(smartclip) == fixed + 2 * tower + 3 * tower / 2


def test_a_quick_run_has_every_loss() -> None:
    cases = gpu_quick_cases(["triton"], "cpu")
    assert {case.loss for case in cases} == {"clip", "siglip", "smartclip", "smartclip-sigmoid"}
    assert max(case.n * case.d for case in cases) <= 2048
