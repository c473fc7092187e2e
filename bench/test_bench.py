"""The benchmark's cases one by one, for tracking regressions: ``pytest bench --benchmark-only``."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import memory, verify
from bench.cases import Case, cpu_cases
from bench.measure import inputs_and_truth, prepare
from bench.peers import OURS

PAIRS = [(case, subject) for case in cpu_cases() if case.timed for subject in (OURS, *case.peers)]


@pytest.mark.parametrize(("case", "subject"), PAIRS, ids=[f"{case}-{subject}" for case, subject in PAIRS])
def test_forward_backward(benchmark: BenchmarkFixture, case: Case, subject: str) -> None:
    if subject != OURS and (needed := 4 * case.n**2 * 4) > memory.available_bytes():
        pytest.skip(f"holds several N×M matrices: four are {needed / 2**30:.1f} GiB, more than is free")
    inputs, true = inputs_and_truth(case)
    torch.compiler.reset()
    try:
        loss, *_ = prepare(case, subject, inputs, true)
    except ImportError as error:
        pytest.skip(str(error))
    rounds = 3 if case.n >= 8192 else 10
    iterations = 10 if case.n <= 512 and subject != "literal" else 1
    benchmark.group = str(case)
    benchmark.extra_info |= {"floor_operations": case.floor_operations, "threads": torch.get_num_threads()}
    benchmark.pedantic(verify.run, args=(loss, inputs), rounds=rounds, iterations=iterations)
