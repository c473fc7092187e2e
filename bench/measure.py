"""Time ours and theirs in turns, and make rows of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter

import torch

from bench import memory, verify
from bench.cases import Case, Inputs, make_inputs
from bench.peers import OURS, SUBJECTS, LossFn
from bench.verify import Truth

ROUND_SECONDS = 0.02
"""A subject is called for about this long in every round: one call of a small batch is too short to time."""
MIN_ROUNDS, MAX_ROUNDS = 3, 20

Log = Callable[[str], None]
Refuse = Callable[[str], None]


@dataclass(frozen=True)
class Effort:
    """How hard to measure."""

    product: int = 2048  # rows, columns and depth of the matrix product that gives the platform's rate
    seconds: float = 20.0  # a case goes on for more than MIN_ROUNDS while this lasts, up to MAX_ROUNDS


@dataclass(frozen=True)
class Figure:
    """Median over the rounds, and the quartiles as its spread."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Figure:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(median, low, high)


@dataclass
class Row:
    """What came out for one subject at one case. Figures are absent where it did not run: `status` says why."""

    loss: str
    similarity: str
    objective: str
    n: int
    d: int
    dtype: str
    subject: str
    backend: str  # of ours; a peer has none
    status: str = "ok"
    rounds: int = 0
    floor_name: str = ""
    forward_ms: Figure | None = None  # with the graph recorded; a sigmoid's gradients may be formed here already
    total_ms: Figure | None = None  # forward + backward
    product_gflops: Figure | None = None  # the platform's, in the same rounds
    floor_percent: Figure | None = None
    times_ours: Figure | None = None  # this subject's time over ours, within each round
    extra_mib: float | None = None  # peak beyond inputs and gradients
    predicted_mib: float | None = None  # where refused

    @classmethod
    def of(cls, case: Case, subject: str) -> Row:
        backend = case.backend if subject == OURS else ""
        return cls(
            case.loss, case.similarity, case.objective, case.n, case.d, case.dtype, subject, backend,
            floor_name=case.floor_name,
        )  # fmt: skip


@dataclass
class Samples:
    """Seconds per call, one entry a round."""

    forward: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)


def time_calls(loss: LossFn, inputs: Inputs, calls: int) -> tuple[float, float]:
    """Seconds per call of the forward pass, and of forward + backward."""
    leaves, forward, total = inputs.leaves(), 0.0, 0.0
    for _ in range(calls):
        start = perf_counter()
        value = loss(inputs)
        middle = perf_counter()
        gradients = torch.autograd.grad(value, leaves)
        end = perf_counter()
        forward += middle - start
        total += end - start
        del value, gradients  # freed outside the timed span, and before the next subject needs the memory
    return forward / calls, total / calls


def product_rate(dtype: torch.dtype, size: int) -> Callable[[], float]:
    """A function that times the platform's own large matrix product: operations per second."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)

    def rate() -> float:
        start = perf_counter()
        a @ b
        return 2 * size**3 / (perf_counter() - start)

    rate()
    return rate


def interleave(
    losses: dict[str, LossFn], inputs: Inputs, product: Callable[[], float], seconds: float
) -> tuple[dict[str, Samples], list[float]]:
    """A B C product, A B C product, …: whatever the machine does meanwhile, it does to all."""
    first = {name: time_calls(loss, inputs, 1)[1] for name, loss in losses.items()} if len(inputs.image) <= 4096 else {}
    calls = {name: max(1, int(ROUND_SECONDS / first[name])) if name in first else 1 for name in losses}
    samples: dict[str, Samples] = {name: Samples() for name in losses}
    rates: list[float] = []
    start = perf_counter()
    while len(rates) < MIN_ROUNDS or (len(rates) < MAX_ROUNDS and perf_counter() - start < seconds):
        for name, loss in losses.items():
            forward, total = time_calls(loss, inputs, calls[name])
            samples[name].forward.append(forward)
            samples[name].total.append(total)
        rates.append(product())
    return samples, rates


def prepare(case: Case, name: str, inputs: Inputs, true: Truth) -> LossFn:
    """Build a subject and verify it, which also warms it up.

    Raises:
        AssertionError: it computes something else.
        Exception: whatever it fails of.
    """
    loss = SUBJECTS[name].build(case)
    verify.check(*verify.run(loss, inputs), true, inputs, slack=1.0 if name == OURS else verify.PEER_SLACK)
    return loss


def why_not(error: Exception) -> str:
    """In a row's status: why a subject was not timed."""
    message = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, memory.MemoryRefusedError):
        return message
    if isinstance(error, ImportError):
        return f"not installed: {message}"
    if isinstance(error, AssertionError):
        return f"not timed, differs from the truth: {message}"
    return f"failed: {type(error).__name__}: {message}"


def time_case(case: Case, rows: dict[str, Row], refuse: Refuse, effort: Effort) -> None:
    inputs = make_inputs(case)
    true = verify.truth(case, inputs)
    torch.compiler.reset()  # dynamo's limit of recompilations is for a process
    ready: dict[str, LossFn] = {}

    def enter(name: str) -> None:
        try:
            refuse(name)
            ready[name] = prepare(case, name, inputs, true)
        except Exception as error:  # whatever a peer fails of is its result
            rows[name].status = why_not(error)

    for name in rows:
        enter(name)
    if not ready:
        return
    samples, rates = interleave(ready, inputs, product_rate(case.torch_dtype, effort.product), effort.seconds)
    for name, sample in samples.items():
        row = rows[name]
        row.rounds = len(rates)
        row.forward_ms = Figure.of([1e3 * t for t in sample.forward])
        row.total_ms = Figure.of([1e3 * t for t in sample.total])
        row.product_gflops = Figure.of([rate / 1e9 for rate in rates])
        floors = [case.floor_operations / rate for rate in rates]
        row.floor_percent = Figure.of([100 * floor / t for floor, t in zip(floors, sample.total, strict=True)])
        if OURS in samples:
            pairs = zip(sample.total, samples[OURS].total, strict=True)
            row.times_ours = Figure.of([theirs / own for theirs, own in pairs])


def measure_memory(case: Case, row: Row, measured: dict[int, int]) -> None:
    try:
        if row.subject != OURS:
            memory.refuse_if_too_large(case, measured)
        extra = memory.measure(case, row.subject)
    except memory.MemoryRefusedError as error:
        row.status = str(error)
        predicted = memory.predicted_bytes(case, measured)
        row.predicted_mib = None if predicted is None else predicted / 2**20
    else:
        measured[case.n] = extra
        row.extra_mib = extra / 2**20


def run_cases(cases: list[Case], log: Log, effort: Effort) -> Iterator[Row]:
    """Rows of all cases, ours first in each, in the order given; sizes must ascend so that they predict each other."""
    measured: dict[tuple[str, str], dict[int, int]] = {}
    for case in cases:
        log(f"{case}: {', '.join((OURS, *case.peers)) if case.timed else 'memory'}")
        names = dict.fromkeys((OURS, *case.peers, *case.memory_of))
        rows = {name: Row.of(case, name) for name in names}
        history = {name: measured.setdefault((case.loss, name), {}) for name in names}
        if case.memory:
            for name in dict.fromkeys((OURS, *case.memory_of)):
                measure_memory(case, rows[name], history[name])

        def refuse(name: str, case: Case = case, history: dict[str, dict[int, int]] = history) -> None:
            if name != OURS:
                memory.refuse_if_too_large(case, history[name])

        if case.timed:
            time_case(case, {name: rows[name] for name in (OURS, *case.peers)}, refuse, effort)
        yield from rows.values()
        for name, reason in case.left_out:
            row = Row.of(case, name)
            row.status = reason
            yield row
