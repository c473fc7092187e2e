"""Cases in a process of their own. A kernel may crash it, or never end: who did is left out, and the others go on."""

from __future__ import annotations

import faulthandler
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from time import monotonic
from typing import Any, Protocol

from bench import devices, measure
from bench.cases import Case
from bench.measure import Effort, Log, Session
from bench.peers import OURS
from bench.rows import Row
from bench.timing import why_not

PATIENCE = 60.0
"""Seconds without a word from a process, after which it is taken to hang; a subject's name is a word."""
PATIENCE_LONG = 150.0
"""The same, while torch.compile is at work, or a truth in float64."""
GRACE = 45.0
"""Seconds that the last case may go on when the time is up."""
ENOUGH = 2
"""So many processes ended, and a subject is left out for good."""
NO_TIME = "left out: no time left"


class Worker(Protocol):
    """A process that measures cases. What it says: ("log", text), ("at", subject), ("rows", rows), ("failed", why)."""

    def receive(self, timeout: float) -> tuple[str, Any] | None:
        """What it says next; None after so many seconds of silence.

        Raises:
            EOFError, OSError: it has ended.
        """

    def end(self) -> str:
        """Ends it by force, where it has not ended; returns how it ended, "" for well."""


@dataclass(frozen=True)
class Job:
    cases: list[Case]
    device: str
    effort: Effort
    deadline: float  # of time.monotonic; no case begins later


def work(connection: Connection, job: Job) -> None:
    """In the process: rows of one case after the other."""
    faulthandler.enable()

    def say(kind: str) -> Log:
        return lambda what: connection.send((kind, what))

    try:
        session = Session(devices.device(job.device), job.effort, say("log"), say("at"))
        for case in job.cases:
            if monotonic() > job.deadline:
                break
            rows = measure.run_case(case, session)
            session.device.check()
            connection.send(("rows", rows))
    except Exception as error:
        connection.send(("failed", why_not(error)))
        raise
    finally:
        connection.close()


class Process:
    """A `Worker`."""

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._connection, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=work, args=(theirs, job))
        self._process.start()
        theirs.close()

    def receive(self, timeout: float) -> tuple[str, Any] | None:
        if not self._connection.poll(timeout):
            return None
        message: tuple[str, Any] = self._connection.recv()
        return message

    def end(self) -> str:
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(timeout=30)
            return "it was killed"
        code = self._process.exitcode
        return "" if code == 0 else f"exit status {code}"


def patience(at: str) -> float:
    return PATIENCE_LONG if at.endswith("-compiled") or at == measure.TRUTH else PATIENCE


def rows_of_none(case: Case, status: str) -> list[Row]:
    """Of a case that was not measured."""
    return [replace(Row.of(case, name), status=status) for name in (OURS, *case.peers)]


def without(case: Case, peer: str, reason: str) -> Case:
    peers = tuple(name for name in case.peers if name != peer)
    return replace(case, peers=peers, left_out=(*case.left_out, (peer, reason))) if peer in case.peers else case


class Blame:
    """Who ended processes, and so is left out of which cases."""

    def __init__(self) -> None:
        self._ended: Counter[tuple[str, ...]] = Counter()

    def put(self, todo: list[Case], subject: str, reason: str) -> tuple[list[Case], list[Row]]:
        """The first of `todo` ended a process, at this subject.

        Returns:
            What is left to do, and rows of what is not to be done.
        """
        case, *rest = todo
        is_peer = subject in case.peers
        key = (subject,) if is_peer else (subject, case.backend, case.loss)
        self._ended[key] += 1
        enough = self._ended[key] >= ENOUGH
        if is_peer:
            again = f"left out: it ended {ENOUGH} processes before"
            later = [without(other, subject, again) for other in rest] if enough else rest
            return [without(case, subject, reason), *later], []
        rows = rows_of_none(case, reason)
        if not enough:
            return rest, rows
        same = [other for other in rest if not subject or (other.backend, other.loss) == (case.backend, case.loss)]
        for other in same:
            rows += rows_of_none(other, f"failed: left out, as {ENOUGH} processes ended so: {reason}")
        return [other for other in rest if other not in same], rows


def run_cases(
    cases: list[Case], start: Callable[[list[Case]], Worker], deadline: float, log: Log
) -> Iterator[list[Row]]:
    """Rows of each case, whatever happens to the processes that measure them; in the order given, but for the crashed.

    Args:
        deadline: of time.monotonic. The case that is running then may go on for GRACE seconds.
    """
    todo, blame = list(cases), Blame()
    while todo and monotonic() < deadline:
        worker, at, why = start(todo), "", ""
        try:
            while True:
                allowed = max(0.0, min(patience(at), deadline + GRACE - monotonic()))
                if (message := worker.receive(allowed)) is None:
                    why = f"no sign of life for {allowed:.0f} s"
                    break
                kind, what = message
                if kind == "rows":
                    todo, at = todo[1:], ""
                    yield what
                elif kind == "at":
                    at = what
                elif kind == "failed":
                    why = what
                else:
                    log(what)
        except (EOFError, OSError):
            pass
        finally:
            how = worker.end()
        if todo and monotonic() < deadline:
            reason = f"failed: {'; '.join(filter(None, (why, how))) or 'it ended without a word'}"
            log(f"{todo[0]}, at {at or 'the start'}: {reason}")
            todo, rows = blame.put(todo, at, reason)
            if rows:
                yield rows
    for case in todo:
        yield rows_of_none(case, NO_TIME)
