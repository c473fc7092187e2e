"""Processes that crash, hang and run out of time cost their own subject, and nothing that was measured before."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from bench import __main__ as command
from bench import worker
from bench.cases import Case
from bench.measure import TRUTH
from bench.peers import OURS
from bench.rows import Row
from bench.worker import NO_TIME, run_cases

CASES = [
    Case("dot", "softmax", n, ("eager", "open_clip"), d=8, backend="cuda", device="cuda") for n in (16, 32, 64, 128)
]
Crash = Callable[[Case, str], str]
"""What happens to the process at a subject: "" nothing, "hang", or how it ends."""


class Fake:
    """A worker that gives each subject a row, and crashes where it is told to."""

    def __init__(self, cases: list[Case], crash: Crash) -> None:
        self._messages: list[tuple[str, Any]] = []
        self._end = ""
        for case in cases:
            names = (OURS, *case.peers)
            for name in names:
                self._messages.append(("at", name))
                if end := crash(case, name):
                    self._end = end
                    return
            left_out = [replace(Row.of(case, name), status=why) for name, why in case.left_out]
            self._messages.append(("rows", [Row.of(case, name) for name in names] + left_out))

    def receive(self, timeout: float) -> tuple[str, Any] | None:
        if self._messages:
            return self._messages.pop(0)
        if self._end == "hang":
            return None
        raise EOFError

    def end(self) -> str:
        return "it was killed" if self._end == "hang" else self._end


def statuses(crash: Crash, cases: list[Case] = CASES) -> dict[tuple[int, str], str]:
    starts: list[int] = []

    def start(todo: list[Case]) -> Fake:
        starts.append(len(todo))
        return Fake(todo, crash)

    rows = [row for rows in run_cases(cases, start, monotonic() + 60, lambda text: None) for row in rows]
    found = {(row.n, row.subject): row.status for row in rows}
    assert len(found) == len(rows) == sum(1 + len(case.peers) for case in cases)
    return found


def test_without_a_crash_every_row_is_there_in_order() -> None:
    found = statuses(lambda case, name: "")
    assert list(found) == [(case.n, name) for case in CASES for name in (OURS, *case.peers)]
    assert set(found.values()) == {"ok"}


@pytest.mark.parametrize(
    ("end", "reason"),
    [("exit status -11", "failed: exit status -11"), ("hang", "failed: no sign of life for 60 s; it was killed")],
)
def test_a_peer_that_ends_the_process_is_left_out_of_its_case(end: str, reason: str) -> None:
    found = statuses(lambda case, name: end if (case.n, name) == (32, "eager") else "")
    assert found.pop((32, "eager")) == reason
    assert set(found.values()) == {"ok"}


def test_a_peer_that_does_it_again_is_left_out_for_good() -> None:
    found = statuses(lambda case, name: "exit status -6" if name == "eager" else "")
    assert [found[n, "eager"] for n in (16, 32)] == ["failed: exit status -6"] * 2
    assert [found[n, "eager"] for n in (64, 128)] == ["left out: it ended 2 processes before"] * 2
    assert all(status == "ok" for (_, name), status in found.items() if name != "eager")


def test_ours_ending_the_process_fails_its_case() -> None:
    found = statuses(lambda case, name: "exit status -11" if (case.n, name) == (32, OURS) else "")
    assert {n: found[n, OURS] for n in (16, 32, 64)} == {16: "ok", 32: "failed: exit status -11", 64: "ok"}
    assert found[32, "eager"] == "failed: exit status -11"  # nothing to compare it with


def test_nobody_is_blamed_for_an_end_between_cases() -> None:
    class Between(Fake):
        def receive(self, timeout: float) -> tuple[str, Any] | None:
            message = super().receive(timeout)
            if message and message[0] == "rows" and message[1][0].n == 16:
                self._messages.clear()
                self._end = "exit status 1"
            return message

    results = run_cases(CASES, lambda todo: Between(todo, lambda case, name: ""), monotonic() + 60, print)
    found = {(row.n, row.subject): row.status for rows in results for row in rows}
    assert {found[32, name] for name in (OURS, "eager", "open_clip")} == {"failed: exit status 1"}
    assert {status for (n, _), status in found.items() if n != 32} == {"ok"}


def test_ours_is_left_out_where_it_did_it_twice() -> None:
    other = [replace(case, backend="triton") for case in CASES[-1:]]
    crash = lambda case, name: "hang" if name == OURS and case.backend == "cuda" else ""  # noqa: E731
    rows = [
        row
        for rows in run_cases([*CASES, *other], lambda todo: Fake(todo, crash), monotonic() + 60, print)
        for row in rows
    ]
    own = {(row.n, row.backend): row.status for row in rows if row.subject == OURS}
    assert own[128, "triton"] == "ok"
    assert own[16, "cuda"].startswith("failed: no sign of life")
    assert own[64, "cuda"].startswith("failed: left out, as 2 processes ended so: failed: no sign")


def test_a_process_that_cannot_start_does_not_start_for_ever() -> None:
    class Dead(Fake):
        def __init__(self, cases: list[Case], crash: Crash) -> None:
            super().__init__([], crash)
            starts.append(len(cases))
            self._messages = [("failed", "failed: RuntimeError: no device")]
            self._end = "exit status 1"

    starts: list[int] = []
    results = run_cases(CASES, lambda todo: Dead(todo, lambda case, name: ""), monotonic() + 60, print)
    rows = [row for rows in results for row in rows]
    assert len(starts) == 2
    assert len(rows) == 12 and all("RuntimeError: no device" in row.status for row in rows)


def test_time_that_is_up_leaves_rows_that_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(worker, "monotonic", lambda: now[0])

    class Slow(Fake):
        """As a worker does, it begins nothing when the time is up."""

        def receive(self, timeout: float) -> tuple[str, Any] | None:
            message = super().receive(timeout)
            if message and message[0] == "rows":
                now[0] += 40
                if now[0] > 60:
                    self._messages.clear()
            return message

    results = run_cases(CASES, lambda todo: Slow(todo, lambda case, name: ""), 60.0, print)
    rows = [row for rows in results for row in rows]
    assert [row.status for row in rows] == ["ok"] * 6 + [NO_TIME] * 6


def test_the_last_case_may_go_on_for_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(worker, "monotonic", lambda: now[0])
    allowed: list[float] = []

    class Hangs(Fake):
        def receive(self, timeout: float) -> tuple[str, Any] | None:
            allowed.append(timeout)
            if len(allowed) == 1:
                now[0] = 130.0  # within the case the time runs out
                return ("at", "eager-compiled")
            now[0] += timeout
            return None

    rows = [row for rows in run_cases(CASES, lambda todo: Hangs(todo, lambda c, n: ""), 120.0, print) for row in rows]
    assert allowed == [worker.PATIENCE, 120.0 + worker.GRACE - 130.0]
    assert {row.status for row in rows} == {NO_TIME}


def test_compiling_may_take_longer() -> None:
    assert worker.patience("open_clip-compiled") > worker.patience("open_clip") == worker.PATIENCE
    assert worker.patience(TRUTH) > worker.PATIENCE


def results_of(directory: Path) -> dict[str, Any]:
    (found,) = directory.glob("*/results.json")
    document: dict[str, Any] = json.loads(found.read_text())
    return document


def test_what_is_cut_off_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are written after each case: here the whole command is interrupted in its third."""

    class Interrupted(Fake):
        def __init__(self, job: worker.Job) -> None:
            super().__init__(job.cases, lambda case, name: "")
            self.given = 0

        def receive(self, timeout: float) -> tuple[str, Any] | None:
            message = super().receive(timeout)
            self.given += message is not None and message[0] == "rows"
            if self.given == 3:
                raise KeyboardInterrupt
            return message

    monkeypatch.setattr(worker, "Process", Interrupted)
    monkeypatch.setattr(command, "gpu_backends", lambda device: ["triton"])
    with pytest.raises(KeyboardInterrupt):
        command.main(["gpu", "--quick", "--device", "cpu", "--out", str(tmp_path)])
    rows = results_of(tmp_path)["rows"]
    assert list(dict.fromkeys(row["loss"] for row in rows)) == ["clip", "siglip"]
    (table,) = tmp_path.glob("*/results.csv")
    assert len(table.read_text().splitlines()) == 1 + len(rows)
    assert not [path for path in table.parent.iterdir() if path.name.startswith(".")]


def test_rows_are_sorted_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are measured by importance, and read by size."""
    cases = [replace(case, backend=backend) for case in reversed(CASES) for backend in ("triton", "cuda")]
    monkeypatch.setattr(worker, "Process", lambda job: Fake(job.cases, lambda case, name: ""))
    monkeypatch.setattr(command, "gpu_backends", lambda device: ["triton", "cuda"])
    monkeypatch.setattr(command, "gpu_quick_cases", lambda backends, device: cases)
    assert command.main(["gpu", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    rows = [(row["n"], row["backend"], row["subject"]) for row in results_of(tmp_path)["rows"]]
    order = [(n, backend) for n in (16, 32, 64, 128) for backend in ("triton", "cuda")]
    assert rows == [(*key, name) for key in order for name in (OURS, "eager", "open_clip")]


def test_no_gpu_and_no_backend_are_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert command.main(["gpu"]) == 2
    assert "torch sees no GPU here" in capsys.readouterr().out
    monkeypatch.setattr(command, "gpu_backends", lambda device: [])
    assert command.main(["gpu", "--device", "cpu"]) == 2
    assert "no backend runs on 'cpu' here" in capsys.readouterr().out
    assert command.main(["gpu", "--device", "cpu", "--backend", "cuda"]) == 2
    assert "cuda: not among those that run on 'cpu' here" in capsys.readouterr().out


@pytest.mark.skipif("triton" not in command.gpu_backends("cpu"), reason="triton's interpreter does not run here")
def test_the_whole_command_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In Triton's interpreter, in a process of its own; the table, the files and the exit status."""
    arguments = ["gpu", "--quick", "--device", "cpu", "--backend", "triton", "--only", "siglip", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    own, eager, absent = results_of(tmp_path)["rows"]
    assert (own["subject"], own["backend"], own["status"]) == (OURS, "triton", "ok")
    assert own["dtype"] == "bfloat16" and own["total_ms"]["median"] > 0
    assert eager["times_ours"]["median"] > 0
    assert absent["subject"] == "siglip-kernel" and absent["total_ms"] is None
    out = capsys.readouterr().out
    assert "ours (triton)" in out and "siglip-64x32-bfloat16" in out
    (directory,) = tmp_path.iterdir()
    assert {path.name for path in directory.iterdir()} == {"results.csv", "results.json", "time.png", "memory.png"}
