"""What comes out of a measurement."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from bench.cases import Case
from bench.peers import OURS


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
    backend: str  # of ours; on a GPU, where there are several, of the ours that a peer is compared with
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
    note: str = ""  # what else its reader has to know

    @classmethod
    def of(cls, case: Case, subject: str) -> Row:
        backend = case.backend if subject == OURS or case.device != "cpu" else ""
        return cls(
            case.loss, case.similarity, case.objective, case.n, case.d, case.dtype, subject, backend,
            floor_name=case.floor_name,
        )  # fmt: skip
