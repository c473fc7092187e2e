from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from bench import report
from bench.trainer_memory import Row, Setting, measure, measured_before, run, table, write

ROWS = [
    Row("ours", 1024, 1100.0, 500.0, "ok"),
    Row("ours", 2048, 1150.0, 500.0, "ok"),
    Row("eager", 1024, 1500.0, 500.0, "ok"),
    Row("eager", 2048, None, None, "stopped by memory: more than 6 GiB"),
]


def test_the_table_says_who_was_stopped() -> None:
    assert table(ROWS).splitlines()[2:] == [
        "|1,024|1,100 MiB|1,500 MiB|",
        "|2,048|1,150 MiB|stopped by memory: more than 6 GiB|",
    ]


def test_files(tmp_path: Path) -> None:
    write(tmp_path / "results", ROWS, {**report.environment(), **asdict(Setting(6.0, 1, 32))})
    results = tmp_path / "results" / "trainer-memory.json"
    found = json.loads(results.read_text())
    about = found["environment"]
    assert measured_before(results, about) == ROWS
    assert measured_before(results, {**about, "image_size": 16}) == []
    assert measured_before(tmp_path / "none.json", about) == []
    assert [Row(**row) for row in found["rows"]] == ROWS
    with (tmp_path / "results" / "trainer-memory.csv").open(newline="") as file:
        assert [row["status"] for row in csv.DictReader(file)] == [row.status for row in ROWS]
    assert (tmp_path / "results" / "trainer-memory.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_eager_ends_where_it_is_first_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(subject: str, size: int, setting: Setting) -> Row:
        return Row(subject, size, None if (subject, size) == ("eager", 2) else 1.0, None, "")

    monkeypatch.setattr("bench.trainer_memory.measure", measured)
    rows = list(run([1, 2, 4], Setting(1.0, 1, 16)))
    assert [(row.subject, row.batch_size) for row in rows] == [
        ("ours", 4), ("ours", 2), ("ours", 1), ("eager", 1), ("eager", 2),
    ]  # fmt: skip


@pytest.mark.slow
def test_a_run_is_measured_and_stopped_at_the_limit() -> None:
    row = measure("ours", 64, Setting(4.0, 1, 16))
    assert row.status == "ok"
    assert row.peak_mib is not None
    assert 200 < row.peak_mib < 4096
    stopped = measure("eager", 6144, Setting(1.0, 1, 16))  # a matrix of scores takes 144 MiB, and there are several
    assert stopped.peak_mib is None
    assert stopped.status == "stopped by memory: more than 1 GiB"
