"""Results files keep their format, bars find their rows, and the README has a table for each kind of device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command
from bench import report
from bench.cases import Bar, Case
from bench.peers import OURS
from bench.plots import of_one_kind
from bench.rows import Figure, Row

ROOT = Path(__file__).resolve().parents[2]
MEASURED = [path for path in ROOT.glob("bench/results/*/results.json") if '"environment"' in path.read_text()]
CASE = Case("dot", "softmax", 1024, ("eager",), dtype="bfloat16", backend="cuda", device="cuda")
ABOUT: dict[str, Any] = {
    "device": "NVIDIA X1",
    "capability": "sm_90",
    "driver": "580.1",
    "cuda": "13.0",
    "threads": 16,
    "python": "3.12.3",
    "versions": {"torch": "2.11.0"},
    "commit": "abc",
    "date": "2026-11-25T00:00:00",
    "product": 8192,
}


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.parent.name)
def test_results_are_written_as_they_were(path: Path, tmp_path: Path) -> None:
    about, rows, verdicts = report.read_json(path)
    report.write_all(tmp_path, rows, verdicts, about)
    for name in ("results.json", "results.csv"):
        assert (tmp_path / name).read_bytes() == path.with_name(name).read_bytes()


def row(case: Case, subject: str, milliseconds: float, times_ours: float = 1.0) -> Row:
    made = Row.of(case, subject)
    made.forward_ms, made.total_ms = Figure(milliseconds / 4, 0, 9), Figure(milliseconds, 0, 9)
    made.floor_percent, made.times_ours = Figure(50.0, 0, 99), Figure(times_ours, 0, 9)
    made.product_gflops = Figure(case.forward_operations / 1e6, 0, 9)  # the forward pass's products take 1 ms
    return made


def test_bars_are_of_their_backend_width_and_dtype() -> None:
    other = replace(CASE, backend="triton")
    rows = [row(CASE, OURS, 8), row(CASE, "eager", 16, 2.0), row(other, OURS, 32), row(other, "eager", 16, 0.5)]
    bar = Bar("clip", 1024, "eager", 1.0, dtype="bfloat16", backend="cuda")
    bars = [bar, replace(bar, backend="triton"), replace(bar, d=768), replace(bar, dtype="float16"), replace(bar, n=8)]
    verdicts = report.judge(bars, rows)
    assert [(v.bar.backend, v.measured, v.met) for v in verdicts] == [("cuda", 2.0, True), ("triton", 0.5, False)]
    assert str(verdicts[0]) == ("clip N=1024 D=512 bfloat16 (cuda): 2.00 × as fast as eager, bar: at least 1.00: met")


def test_forward_floor_and_running_are_bars_too() -> None:
    bar = Bar("clip", 1024, "forward floor", 0.6, dtype="bfloat16", backend="cuda")
    bars = [bar, replace(bar, what="runs", value=1.0)]
    own = row(CASE, OURS, 8)
    assert [v.measured for v in report.judge(bars, [own])] == [pytest.approx(0.5), 1.0]  # 1 ms of 2 ms
    assert [v.met for v in report.judge(bars, [replace(own, forward_ms=None, total_ms=None)])] == [None, False]


def test_what_is_inaccurate_meets_no_bar() -> None:
    own = replace(row(CASE, OURS, 8), status="inaccurate: loss")
    verdicts = report.judge([Bar("clip", 1024, "floor", 0.1, dtype="bfloat16", backend="cuda")], [own])
    assert [verdict.met for verdict in verdicts] == [None]


def test_notes_and_new_fields_survive_the_files(tmp_path: Path) -> None:
    rows = [row(CASE, OURS, 8), replace(row(CASE, "eager", 16, 2.0), note="no gradient of scale")]
    bars = [Bar("clip", 1024, "eager", 1.0, dtype="bfloat16", backend="cuda"), Bar("clip", 1024, "floor", 0.5)]
    report.write_all(tmp_path, rows, [report.Verdict(bar, 0.7) for bar in bars], ABOUT)
    about, read, verdicts = report.read_json(tmp_path / "results.json")
    assert (about, read, [verdict.bar for verdict in verdicts]) == (ABOUT, rows, bars)
    assert "no gradient of scale" in (tmp_path / "results.csv").read_text()


def test_a_file_is_replaced_or_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    report.replace_file(path, "old")

    def full(self: Path, text: str) -> int:
        with self.open("w") as file:
            file.write(text[:1])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        report.replace_file(path, "new")
    assert path.read_text() == "old"


def test_the_readme_has_a_table_for_the_gpu(tmp_path: Path) -> None:
    refused = replace(Row.of(replace(CASE, n=65536), "open_clip"), status="out of memory: 16 GiB")
    left_out = row(replace(CASE, n=512), OURS, 1)
    report.write_all(tmp_path, [row(CASE, OURS, 8), row(CASE, "eager", 16, 2.0), refused, left_out], [], ABOUT)
    page = tmp_path / "README.md"
    cpu = "<!-- bench:begin -->of the CPU<!-- bench:end -->"
    page.write_text(f"{cpu} <!-- bench-gpu:begin -->old<!-- bench-gpu:end --> after")
    assert command.main(["readme", str(tmp_path / "results.json"), "--readme", str(page)]) == 0
    text = page.read_text()
    assert text.startswith(f"{cpu} <!-- bench-gpu:begin -->\nMeasured on NVIDIA X1 (sm_90, driver 580.1, CUDA 13.0)")
    assert text.endswith("<!-- bench-gpu:end --> after") and "old" not in text
    assert "|clip, D = 512, bfloat16|1,024|**ours (cuda)**|8.000||50 (8NMD)||" in text
    assert "|clip, D = 512, bfloat16|1,024|eager|16.0|2.00|50 (8NMD)||" in text
    assert "|clip, D = 512, bfloat16|65,536|open_clip|out of memory||||" in text
    assert "|512|" not in text and "own 8192³ product" in text


def test_a_line_of_a_plot_is_of_one_width_and_dtype() -> None:
    wide, half = replace(CASE, d=768), replace(CASE, n=4096)
    rows = [row(case, OURS, 8) for case in (CASE, wide, half, replace(CASE, dtype="float32"))]
    assert of_one_kind(rows) == [rows[0], rows[2]]
