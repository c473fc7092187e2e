"""The emulator sees faults in the kernels themselves: one planted at a time, each has to be reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import smartclip_kernels as sk
from bench import cuda_ahead
from tests.emulator import build
from tests.emulator.kernels import changed_kernels, family_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif("cuda" not in sk.available_backends(), reason="no g++ to build the emulator with"),
]

FAULTS = {
    "a wrong swizzle": ("sm80/products.cuh", "to + swizzled<Config::kRowBytes>(row, chunk_)",
                        "to + row * Config::kRowBytes + 16 * chunk_"),
    "a wrong number of groups": ("sm80/products.cuh", "wait_for_copies<kStages - 2>", "wait_for_copies<kStages - 1>"),
    "a wrong fragment index": ("tile/layout.h", "ptx::lane_index() / 4 + r % 2 * 8",
                               "ptx::lane_index() / 4 * 2 + r % 2"),
    "an output left unwritten": ("tile/store.h", "if (row < tile.rows && place.column + column < tile.columns)",
                                 "if (row + 1 < tile.rows && place.column + column < tile.columns)"),
    "states of one warp alone": ("sm80/forward.cuh", "for (int warp = 1; warp < Config::kWarpsN; ++warp) state.merge",
                                 "for (int warp = 1; warp < 1; ++warp) state.merge"),
    "a stage that products still read": ("sm90/pipeline.cuh", "ptx::wait_for_products<1>(sum);", ""),
    "the wrong phase": ("sm90/pipeline.cuh", "wait_for(pipeline_.full[turn_.stage], turn_.parity)",
                        "wait_for(pipeline_.full[turn_.stage], turn_.parity ^ 1)"),
    "a stage not waited for": ("sm90/pipeline.cuh", "ptx::wait_for(pipeline.empty[turn.stage], turn.parity ^ 1);", ""),
    "too few bytes": ("sm90/pipeline.cuh", "arrive_expecting(full, Config::kStageBytes)",
                      "arrive_expecting(full, Config::kStageBytes - 128)"),
    "a barrier without its fence": ("sm90/pipeline.cuh", "      ptx::fence_async();\n", ""),
    "products not begun": ("sm90/pipeline.cuh", "        ptx::begin_products();\n", ""),
    "rows of the other warpgroup": ("sm90/pipeline.cuh", "consumer * Config::kConsumerRows", "0 * consumer"),
    "a shift that is not a row's": ("sm90/forward.cuh", "shift = Lanes<1, 32>::max(shift);", ""),
    "sums too small to be exact": ("sm90/forward.cuh", "kLeast = 7.8886090522101181e-31f", "kLeast = 0"),
    "shares of shifts too far away": ("sm90/sums.cuh", "kReach = 40", "kReach = 1e30f"),
    "columns of one warp alone": ("sm90/forward.cuh",
                                  "for (int warp = 0; warp < 4; ++warp)\n        if (exchange_.plain",
                                  "for (int warp = 0; warp < 1; ++warp)\n        if (exchange_.plain"),
    "a column's number in a wrong lane": ("sm90/chunks.cuh", "const bool upper = g & half;",
                                          "const bool upper = !(g & half);"),
    "ids of a chunk not looked at": ("sm90/chunks.cuh",
                                     "mixed |= ids.id.chunks_with({side.id_of(row[0]), side.id_of(row[1])});", ""),
    "the ceilings of columns alone": ("tile/pairs.h", "scores_.problem.row.is_above(row(r), logit)",
                                      "scores_.problem.column.is_above(column(c), logit)"),
    "pairs above a ceiling taken for plain": ("sm80/forward.cuh", "plain_pairs<Config>(p, place, logit_at)",
                                               "plain_ids<Config>(p, place)"),
    "chunks with pairs above a ceiling": ("sm90/chunks.cuh", "    plain &= ~above;\n    mixed |= above;\n", ""),
    "a loss that does not wait for all blocks": ("vectors.cuh", "shared.last = p.loss && ptx::arrive_last(p.arrived);",
                                                 "shared.last = p.loss && ptx::block_index() == 0;"),
    "arrivals counted on from before": ("tile/scores.h", "*p.arrived = 0;", "(void)p.arrived;"),
    "a chunk not put back": ("sm90/backward.cuh", "    unpark(parked, chunk, fragment);\n    if (keeps",
                             "    if (keeps"),
}  # fmt: skip
CHECK = """
import torch
from dataclasses import replace
from smartclip_kernels.testing import check_loss, clear_margin, make_inputs
torch.use_deterministic_algorithms(True)
inputs = make_inputs(140, 600, 328, dtype=torch.bfloat16)
check_loss(inputs, backend="cuda")
check_loss(clear_margin(inputs, -0.35), backend="cuda")
check_loss(clear_margin(make_inputs(256, d=72, dtype=torch.bfloat16), -0.25), backend="cuda")  # few positives
# Rows side by side whose logits are all near 100 and all near -100.
way = torch.nn.functional.normalize(torch.ones(1, 328), dim=1)
image, text = (way + 0.1 * x.float() for x in (inputs.image, inputs.text))
image[::2] *= -1
far = replace(inputs, image=image.bfloat16(), text=text.bfloat16(), logit_scale=torch.tensor(100.0))
check_loss(far, backend="cuda")
"""


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault: str, tmp_path: Path, run_python: Any) -> None:
    """In some order that the machine may choose."""
    file = FAULTS[fault][0]
    module = changed_kernels(tmp_path, *FAULTS[fault])
    environment = {
        "SMARTCLIP_CUDA_EMULATOR": str(module),
        "SMARTCLIP_CUDA_ARCHITECTURE": cuda_ahead.FAMILIES[family_of(file)],
        "PYTHONPATH": str(Path.cwd()),
    }
    for order in ("", "copies=earliest", "order=random,copies=random,seed=1", "order=reverse"):
        result = run_python(CHECK, SMARTCLIP_EMULATOR=order, **environment)
        if result.returncode != 0:
            break
    else:
        pytest.fail("it was not found")
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(("AssertionError: ", "RuntimeError: ")), last


BARRIERS = {
    "of the block, before a stage is used again": (
        "sm80/products.cuh", "ptx::wait_for_copies<kStages - 2>();\n      ptx::sync_block();",
        "ptx::wait_for_copies<kStages - 2>();"),
    "of a warpgroup, before its sums of columns are read": (
        "sm90/forward.cuh", "    Warpgroup<Config>::sync();\n    merge_plain_columns(column);",
        "    merge_plain_columns(column);"),
    "of an mbarrier, before a stage is filled again": (
        "sm90/pipeline.cuh", "ptx::wait_for(pipeline.empty[turn.stage], turn.parity ^ 1);", ""),
    "none is taken out of sm_80": ("sm80/products.cuh", "wait_for_copies<0>();", "wait_for_copies<0>();"),
    "none is taken out of sm_90a": ("sm90/pipeline.cuh", "wait_for_products<0>(sum);", "wait_for_products<0>(sum);"),
}  # fmt: skip


@pytest.mark.parametrize("barrier", BARRIERS)
def test_a_missing_barrier_is_a_race(barrier: str, tmp_path: Path) -> None:
    """ThreadSanitizer sees threads and engines as fibres that only barriers order."""
    if reason := build.why_not_sanitized():
        pytest.skip(reason)
    file = BARRIERS[barrier][0]
    module = changed_kernels(tmp_path, *BARRIERS[barrier], variant="tsan")
    environment = {
        "SMARTCLIP_CUDA_EMULATOR": str(module),
        "SMARTCLIP_CUDA_ARCHITECTURE": cuda_ahead.FAMILIES[family_of(file)],
    }
    result = build.sanitized(["-c", CHECK], environment=environment)
    if barrier.startswith("none"):
        assert result.returncode == 0, result.stderr[-2000:]
    elif barrier.startswith("of an mbarrier"):  # the emulator itself comes first: the ring overtakes its barriers
        assert "smartclip_kernels emulator" in result.stderr, result.stderr[-2000:]
    else:
        assert "ThreadSanitizer: data race" in result.stderr, result.stderr[-2000:]
