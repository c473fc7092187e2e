"""Time ours and theirs in turns, and make rows of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch

from bench import memory, truth, verify
from bench.cases import Case, Inputs, make_inputs
from bench.devices import Device, Host
from bench.peers import OURS, REPLAYED, SUBJECTS, LossFn, Replay
from bench.rows import Figure, Row
from bench.timing import DiffersError, attempt, interleave, product_rate
from bench.truth import Truth

PROBE_N = 4096
TRUTH = "the truth"
"""Who is about to run, where it is no subject."""

Log = Callable[[str], None]
Measured = dict[tuple[str, int, str, str], dict[int, int]]
"""Of a loss, D, dtype and subject: extra bytes by N."""


@dataclass(frozen=True)
class Effort:
    """How hard to measure."""

    product: int = 2048  # rows, columns and depth of the matrix product that gives the platform's rate
    seconds: float = 20.0  # for more than the fewest rounds of a case


@dataclass(frozen=True)
class Session:
    """Where it is measured and how hard, and who hears of it."""

    device: Device
    effort: Effort
    log: Log
    at: Log = lambda subject: None  # who is about to run
    measured: Measured = field(default_factory=dict)

    def history(self, case: Case, subject: str) -> dict[int, int]:
        return self.measured.setdefault((case.loss, case.d, case.dtype, subject), {})

    def refuse(self, case: Case, row: Row) -> None:
        """Raises:
        MemoryRefusedError: a peer that holds N×M would take more than there is, by what it took at a smaller size.
        """
        if row.subject == OURS or SUBJECTS[row.subject].linear:
            return
        measured = self.history(case, row.subject)
        try:
            memory.refuse_if_too_large(case, measured, self.device.free_bytes())
        except memory.MemoryRefusedError:
            predicted = memory.predicted_bytes(case, measured)
            row.predicted_mib = None if predicted is None else predicted / 2**20
            raise


def prepare(case: Case, name: str, inputs: Inputs, true: Truth) -> tuple[LossFn | Replay, str, str]:
    """Build a subject and verify it, which also warms it up.

    Returns:
        The loss, its row's status and its row's note. Ours is timed, and its row says so, where it computes the loss
        less accurately than it has to.

    Raises:
        DiffersError: it computes something else.
        Exception: whatever it fails of.
    """
    subject = SUBJECTS[name]
    loss = subject.build(case)
    value, gradients = verify.run(loss, inputs)
    status, notes = "ok", [true.note]
    try:
        if name in (OURS, REPLAYED):
            inaccurate = verify.check_own(value, gradients, true, inputs)
            status = f"inaccurate: {inaccurate}" if inaccurate else "ok"
        else:
            notes.append(verify.check_peer(value, gradients, true, inputs, subject.lacks))
    except AssertionError as error:
        raise DiffersError(error) from error
    notes += [f"no gradient of {name}" for name in subject.lacks if name in inputs.named()]
    if case.overhead:
        notes.append("time of the caller, not of the device")
    return loss, status, "; ".join(filter(None, notes))


@lru_cache(maxsize=1)
def inputs_and_truth(case: Case) -> tuple[Inputs, Truth]:
    """Of a case without its subjects: backends that are measured one after the other have them in common."""
    inputs = make_inputs(case)
    return inputs, truth.truth(case, inputs)


def time_case(case: Case, rows: dict[str, Row], session: Session) -> None:
    session.at(TRUTH)
    inputs, true = inputs_and_truth(replace(case, backend="", peers=(), memory_of=(), left_out=(), overhead=False))
    torch.compiler.reset()  # dynamo's limit of recompilations is for a process
    device = Host() if case.overhead else session.device
    ready: dict[str, LossFn | Replay] = {}

    def enter(name: str) -> None:
        session.at(name)
        probe(case, name, session)
        session.refuse(case, rows[name])
        loss, status, rows[name].note = prepare(case, name, inputs, true)
        if status != "ok":  # what its memory's measurement failed of stays
            rows[name].status = status
        extra = None if isinstance(loss, Replay) else device.extra_bytes(lambda: verify.run(loss, inputs))
        if extra is not None:
            session.history(case, name)[case.n] = extra
            rows[name].extra_mib = extra / 2**20
        ready[name] = loss

    for name in rows:
        if reason := attempt(enter, name, session.device):
            rows[name].status = reason
    if not ready:
        return
    product = product_rate(case, session.effort.product, session.device)
    samples, rates, failed = interleave(ready, inputs, product, session.effort.seconds, device, session.at)
    for name, reason in failed.items():
        rows[name].status = reason
    for name, sample in samples.items():
        row = rows[name]
        row.rounds = len(rates)
        if any(sample.forward):
            row.forward_ms = Figure.of([1e3 * t for t in sample.forward])
        row.total_ms = Figure.of([1e3 * t for t in sample.total])
        if not case.overhead:
            row.product_gflops = Figure.of([rate / 1e9 for rate in rates])
            floors = [case.floor_operations / rate for rate in rates]
            row.floor_percent = Figure.of([100 * floor / t for floor, t in zip(floors, sample.total, strict=True)])
        if OURS in samples:
            pairs = zip(sample.total, samples[OURS].total, strict=True)
            row.times_ours = Figure.of([theirs / own for theirs, own in pairs])


def probe(case: Case, name: str, session: Session) -> None:
    """On a GPU: what a peer takes at a small size, before a large one is tried that no smaller one came before."""
    measured, subject, device = session.history(case, name), SUBJECTS[name], session.device
    if device.type == "cpu" or subject.linear or name.endswith("-compiled") or measured or case.n <= PROBE_N:
        return
    small = replace(case, n=PROBE_N)
    inputs, loss = make_inputs(small), subject.build(small)
    verify.run(loss, inputs)  # what is made once does not count
    extra = device.extra_bytes(lambda: verify.run(loss, inputs))
    if extra is not None:
        measured[small.n] = extra


def measure_memory(case: Case, row: Row, session: Session) -> None:
    try:
        session.refuse(case, row)
        extra = memory.measure(case, row.subject)
    except memory.MemoryRefusedError as error:
        row.status = str(error)
    else:
        session.history(case, row.subject)[case.n] = extra
        row.extra_mib = extra / 2**20


def run_case(case: Case, session: Session) -> list[Row]:
    """Rows of a case, ours first. Sizes should ascend: the smaller ones predict what a peer takes."""
    session.log(f"{case}: {', '.join((OURS, *case.peers)) if case.timed else 'memory'}")
    rows = {name: Row.of(case, name) for name in dict.fromkeys((OURS, *case.peers, *case.memory_of))}
    if case.memory:
        for name in dict.fromkeys((OURS, *case.memory_of)):
            measure_memory(case, rows[name], session)
    if case.timed:
        time_case(case, {name: rows[name] for name in (OURS, *case.peers)}, session)
    left_out = [replace(Row.of(case, name), status=reason) for name, reason in case.left_out]
    return [*rows.values(), *left_out]


def run_cases(cases: list[Case], log: Log, effort: Effort) -> Iterator[Row]:
    """All of them, on the CPU, one after the other."""
    session = Session(Host(), effort, log)
    for case in cases:
        yield from run_case(case, session)
