"""The measurement of gradient caching, on encoders too small to time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from torch import Tensor

from bench import caching


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "VISION", caching.VISION | {"layers": 1, "width": 64, "image_size": 16})
    monkeypatch.setattr(caching, "TEXT", caching.TEXT | {"layers": 1, "width": 64, "heads": 1, "context_length": 5})


def test_it_reports_passes_time_and_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def measured_elsewhere(subject: str, batch: int) -> float:
        asked.append(subject)
        return 3.0

    monkeypatch.setattr(caching, "measured_elsewhere", measured_elsewhere)
    assert caching.main(tmp_path / "device", Console(quiet=True), quick=True) == 0
    results = json.loads((tmp_path / "device" / "caching.json").read_text())
    assert results["environment"]["versions"]["torch"]
    assert [row["passes"] for row in results["rows"]] == [1.0, 2.0, 1.5, 1.0, 1.0]
    assert [row["subject"] for row in results["rows"]] == asked == list(caching.SUBJECTS)
    assert all(row["step_ms"]["median"] > 0 and row["extra_mib"] == 3.0 for row in results["rows"])
    assert caching.extra_bytes("keep half", 16) >= 0


def test_wrong_gradients_are_not_timed() -> None:
    step = caching.Step(16)

    def skewed() -> Tensor:
        loss = step.whole()
        next(p.grad for p in step.model.parameters() if p.grad is not None).mul_(1.01)
        return loss

    runners = {name: step.runner(name) for name in caching.SUBJECTS[:2]}
    with pytest.raises(RuntimeError, match="keep half: other bits than keep 0"):
        caching.verify(step, runners | {"keep half": skewed})
    with pytest.raises(RuntimeError, match="keep 0: not the whole batch's"):
        caching.verify(step, {caching.PLAIN: step.whole, "keep 0": skewed})
