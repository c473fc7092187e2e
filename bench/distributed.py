"""Losses over processes on one machine, ours and open_clip's in turns: time and bytes of forward + backward.

Each process has one thread and its share of the batch. Before anything is timed, loss and gradients of all processes
are put together and verified against float64.
"""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from bench import report, verify
from bench.cases import Case, Inputs, make_inputs
from bench.rows import Figure
from bench.truth import truth

Loss = Callable[[Inputs], Tensor]
SUBJECTS = ("ours gather", "ours ring", "open_clip")
PEER = SUBJECTS[-1]
"""local_loss + gather_with_grad, which it recommends; of SigLIP its default, the exchange in both directions."""
CASES = (Case("dot", "softmax", 8192), Case("dot", "sigmoid", 8192))
QUICK = tuple(replace(case, n=256, d=64) for case in CASES)
BARS = {"clip": (1.6, 55.0)}
"""By loss: how many times as fast as open_clip `ours gather` is at least, and its bytes in % of open_clip's at most."""


@dataclass(frozen=True)
class Row:
    """What came out for one subject: seconds of the slowest process, bytes that one process sends."""

    loss: str
    n: int
    d: int
    dtype: str
    processes: int
    subject: str
    status: str
    rounds: int
    total_ms: Figure
    times_ours: Figure  # its time over ours with `gather`, within each round
    sent_bytes: int
    sent_percent: float  # of open_clip's


@contextmanager
def sent_bytes() -> Iterator[list[int]]:
    """Sizes of all messages that this process sends meanwhile; a collective's count for every other rank."""
    sizes: list[int] = []
    send, allgather, scatter = (getattr(dist.ProcessGroup, name) for name in ("send", "allgather", "scatter"))

    def counted_send(group: Any, tensors: list[Tensor], *arguments: Any) -> Any:
        sizes.extend(x.nbytes for x in tensors)
        return send(group, tensors, *arguments)

    def counted_allgather(group: Any, into: Any, tensors: list[Tensor], *arguments: Any) -> Any:
        sizes.extend(x.nbytes * (group.size() - 1) for x in tensors)
        return allgather(group, into, tensors, *arguments)

    def counted_scatter(group: Any, into: list[Tensor], parts: list[list[Tensor]], *arguments: Any) -> Any:
        sizes.extend(x[0].nbytes * (group.size() - 1) for x in parts)  # empty, but at the source
        return scatter(group, into, parts, *arguments)

    with (
        mock.patch.object(dist.ProcessGroup, "send", counted_send),
        mock.patch.object(dist.ProcessGroup, "allgather", counted_allgather),
        mock.patch.object(dist.ProcessGroup, "scatter", counted_scatter),
    ):
        yield sizes


def build(subject: str, case: Case) -> Loss:
    import open_clip.loss

    import smartclip_kernels as sk

    ranks: dict[str, Any] = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    module: torch.nn.Module
    if case.objective == "softmax":
        flags: dict[str, Any] = {"local_loss": True, "gather_with_grad": True, **ranks}
        if subject == PEER:
            module = open_clip.loss.ClipLoss(**flags)
        else:
            module = sk.ClipLoss(**flags, strategy="ring" if subject == "ours ring" else "gather")
    elif subject == PEER:
        module = open_clip.loss.SigLipLoss(**ranks)
    else:
        module = sk.SigLipLoss(**ranks, dist_impl="bidir" if subject == "ours ring" else "gather")

    def loss(x: Inputs) -> Tensor:
        value: Tensor = module(x.image, x.text, x.scale, x.bias)
        return value

    return loss


def own_share(whole: Inputs) -> Inputs:
    rank, size = dist.get_rank(), dist.get_world_size()

    def rows(x: Tensor) -> Tensor:
        return x.detach().chunk(size)[rank].clone().requires_grad_()

    return replace(whole, image=rows(whole.image), text=rows(whole.text))


def whole_outcome(loss: Loss, x: Inputs) -> verify.Outcome:
    """Loss and gradients of the whole batch, as averaging over ranks makes them."""
    value, gradients = verify.run(loss, x)
    dist.all_reduce(value)
    found: list[Tensor | None] = []
    for gradient in gradients:
        assert gradient is not None
        if gradient.ndim:
            parts = [torch.empty_like(gradient) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, gradient.contiguous())
            gradient = torch.cat(parts)
        else:
            dist.all_reduce(gradient)
        found.append(gradient / dist.get_world_size())
    return value / dist.get_world_size(), found


def one_step(loss: Loss, x: Inputs) -> float:
    """Seconds until the last process is done."""
    dist.barrier()
    start = perf_counter()
    value = loss(x)
    gradients = torch.autograd.grad(value, x.leaves(), allow_unused=True)
    seconds = torch.tensor(perf_counter() - start)
    del value, gradients
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)


def measure(case: Case, rounds: int) -> list[Row]:
    """In every process; rank 0's rows are the result."""
    whole = make_inputs(case)
    x = own_share(whole)
    losses = {subject: build(subject, case) for subject in SUBJECTS}
    status, sent = {}, {}
    true = truth(case, whole) if dist.get_rank() == 0 else None
    for subject, loss in losses.items():
        outcome = whole_outcome(loss, x)
        if true is not None:
            slack = verify.PEER_SLACK if subject == PEER else 1.0
            try:
                verify.check(*outcome, true, whole, slack=slack)
                status[subject] = "ok"
            except AssertionError as error:
                status[subject] = f"inaccurate: {error}"
        with sent_bytes() as sizes:
            one_step(loss, x)
        sent[subject] = sum(sizes)
    seconds: dict[str, list[float]] = {subject: [] for subject in SUBJECTS}
    for _ in range(rounds):
        for subject, loss in losses.items():
            seconds[subject].append(one_step(loss, x))
    return [
        Row(
            case.loss,
            case.n,
            case.d,
            case.dtype,
            dist.get_world_size(),
            subject,
            status.get(subject, ""),
            rounds,
            Figure.of([1e3 * t for t in times]),
            Figure.of([t / own for t, own in zip(times, seconds[SUBJECTS[0]], strict=True)]),
            sent[subject],
            100 * sent[subject] / sent[PEER],
        )
        for subject, times in seconds.items()
    ]


def _serve(rank: int, size: int, store: str, cases: tuple[Case, ...], rounds: int, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(minutes=10)
    )
    for case in cases:
        rows = measure(case, rounds)
        if rank == 0:
            results.put(rows)
    dist.destroy_process_group()


def run(cases: tuple[Case, ...], rounds: int, processes: int = 2) -> Iterator[list[Row]]:
    """Rows of each case.

    Raises:
        RuntimeError: a process ended before its time.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as directory:
        arguments = processes, f"{directory}/store", cases, rounds, results
        started = [context.Process(target=_serve, args=(rank, *arguments), daemon=True) for rank in range(processes)]
        for process in started:
            process.start()
        for _ in cases:
            while results.empty():
                for process in started:
                    process.join(0.2)
                    if process.exitcode:
                        raise RuntimeError(f"a process of the benchmark ended with {process.exitcode}")
            yield results.get()
        for process in started:
            process.join()


def verdicts(rows: list[Row]) -> list[dict[str, Any]]:
    """The bars beside what was measured."""
    found = {(row.loss, row.subject): row for row in rows}
    judged = []
    for loss, (speed, bytes_percent) in BARS.items():
        own, peer = found.get((loss, SUBJECTS[0])), found.get((loss, PEER))
        if own is None or peer is None:
            continue
        fast, light = peer.times_ours.median, own.sent_percent
        correct = own.status == "ok"
        judged += [
            {"loss": loss, "what": f"times as fast as {PEER}", "bar": speed, "measured": fast,
             "met": correct and fast >= speed},
            {"loss": loss, "what": f"% of the bytes that {PEER} sends", "bar": bytes_percent, "measured": light,
             "met": correct and light <= bytes_percent},
        ]  # fmt: skip
    return judged


def write(directory: Path, rows: list[Row], about: dict[str, Any], judged: list[dict[str, Any]]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    document = {"environment": about, "rows": [asdict(row) for row in rows], "bars": judged}
    report.replace_file(directory / "distributed.json", json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    file = io.StringIO()
    flat = [
        {f"{k}_{part}" if part else k: v for k, value in asdict(row).items()
         for part, v in (value.items() if isinstance(value, dict) else [("", value)])}
        for row in rows
    ]  # fmt: skip
    writer = csv.DictWriter(file, flat[0])
    writer.writeheader()
    writer.writerows(flat)
    report.replace_file(directory / "distributed.csv", file.getvalue())
