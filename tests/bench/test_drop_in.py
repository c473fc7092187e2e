"""The benchmark of the drop-ins: both subjects do the same steps, and what it writes can be read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import drop_in

SMALL = [replace(case, n=16, d=16) for case in drop_in.CASES if case.n == 1024]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.codebase}-{case.loss}")
def test_both_subjects_do_the_same_steps(case: drop_in.Case) -> None:
    shipped, own = ([step() for _ in range(3)] for step in (drop_in.make_step(case, x) for x in drop_in.SUBJECTS))
    assert own == pytest.approx(shipped, rel=1e-5)
    assert len(set(own)) == 3


def test_what_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drop_in, "CASES", SMALL[:1])
    monkeypatch.setattr(drop_in, "measure_memory", lambda case, subject: 2**20)
    assert drop_in.main(tmp_path, quick=True) == 0
    (directory,) = tmp_path.iterdir()
    rows = json.loads((directory / "drop_in.json").read_text())["rows"]
    assert [row["subject"] for row in rows] == list(drop_in.SUBJECTS)
    assert rows[0]["first_loss"] == pytest.approx(rows[1]["first_loss"], rel=1e-5)
    header, *lines = (directory / "drop_in.csv").read_text().splitlines()
    assert "step_ms_median" in header
    assert len(lines) == 2


def test_a_difference_is_a_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drop_in, "CASES", SMALL[:1])
    monkeypatch.setattr(drop_in, "measure_memory", lambda case, subject: 0)
    monkeypatch.setattr(drop_in, "make_step", lambda case, subject: lambda: float(len(subject)))
    assert drop_in.main(tmp_path, quick=True) == 1
