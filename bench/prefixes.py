"""Matryoshka prefixes on the CPU: all in one sweep, one of our losses after the other, and open_clip's formula.

Forward and backward of each, gradients of features and scale; the prefixes are normalised by all three.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter, process_time

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import smartclip_kernels as sk
from bench import report
from bench.cases import Case, make_inputs
from bench.rows import Figure

CASE, QUICK, ROUNDS = Case("dot", "softmax", 4096), Case("dot", "softmax", 96, d=64), 7
DIMS = {512: (64, 128, 256, 512), 64: (8, 16, 32, 64)}
ONE_SWEEP, LOOP, EAGER = SUBJECTS = ("one sweep", "one after the other", "eager")


@dataclass
class PrefixesRow:
    subject: str
    n: int
    d: int
    dims: tuple[int, ...]
    total_ms: Figure  # forward + backward
    cpu_ms: Figure  # what a busy machine changes little
    times_ours: Figure  # its CPU time over that of one sweep, within each round
    rounds: int


def one_sweep(image: Tensor, text: Tensor, scale: Tensor, dims: tuple[int, ...]) -> Tensor:
    loss: Tensor = sk.clip_loss(image, text, scale, dims=dims, backend="cpu")
    return loss


def loop(image: Tensor, text: Tensor, scale: Tensor, dims: tuple[int, ...]) -> Tensor:
    losses = [sk.clip_loss(*_normalised(image, text, d), logit_scale=scale, backend="cpu") for d in dims]
    return torch.stack(losses).sum()


def eager(image: Tensor, text: Tensor, scale: Tensor, dims: tuple[int, ...]) -> Tensor:
    labels, losses = torch.arange(len(image)), []
    for d in dims:
        x, y = _normalised(image, text, d)
        losses += [F.cross_entropy(scale * x @ y.T, labels) / 2, F.cross_entropy(scale * y @ x.T, labels) / 2]
    return torch.stack(losses).sum()


def _normalised(image: Tensor, text: Tensor, width: int) -> tuple[Tensor, Tensor]:
    return F.normalize(image[:, :width], dim=1), F.normalize(text[:, :width], dim=1)


LOSSES: dict[str, Callable[..., Tensor]] = dict(zip(SUBJECTS, (one_sweep, loop, eager), strict=True))


def run(subject: str, leaves: list[Tensor], dims: tuple[int, ...]) -> list[Tensor]:
    loss = LOSSES[subject](*leaves, dims)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def verify(leaves: list[Tensor], dims: tuple[int, ...]) -> None:
    """All against eager in float64.

    Raises:
        RuntimeError: one of them is off.
    """
    true = run(EAGER, [x.detach().double().requires_grad_() for x in leaves], dims)
    for subject in SUBJECTS:
        for name, value, expected in zip(
            ("loss", "image", "text", "scale"), run(subject, leaves, dims), true, strict=True
        ):
            error = float((value - expected).abs().max() / expected.abs().max())
            if not error < 1e-4:
                raise RuntimeError(f"{subject}: {name} is off by {error:.1e} of its largest")


def measure(case: Case, rounds: int) -> list[PrefixesRow]:
    """A B C, A B C, …: whatever the machine does meanwhile, it does to all."""
    inputs, dims = make_inputs(case), DIMS[case.d]
    leaves = [inputs.image, inputs.text, inputs.scale]
    verify(leaves, dims)
    wall: dict[str, list[float]] = {name: [] for name in SUBJECTS}
    cpu: dict[str, list[float]] = {name: [] for name in SUBJECTS}
    for _ in range(rounds):
        for name in SUBJECTS:
            start, start_cpu = perf_counter(), process_time()
            run(name, leaves, dims)
            wall[name].append(1e3 * (perf_counter() - start))
            cpu[name].append(1e3 * (process_time() - start_cpu))
    return [
        PrefixesRow(
            name,
            case.n,
            case.d,
            dims,
            Figure.of(wall[name]),
            Figure.of(cpu[name]),
            Figure.of([ms / ours for ms, ours in zip(cpu[name], cpu[ONE_SWEEP], strict=True)]),
            rounds,
        )
        for name in SUBJECTS
    ]


def main(directory: Path, console: Console, *, quick: bool) -> int:
    about = report.environment()
    rows = measure(QUICK, 1) if quick else measure(CASE, ROUNDS)
    title = f"{about['device']}, {about['threads']} threads: N = {rows[0].n}, dims {rows[0].dims}"
    table = Table("who", "ms", "CPU ms", f"CPU × {ONE_SWEEP}", title=title)
    for row in rows:
        figures = report.milliseconds(row.total_ms), report.milliseconds(row.cpu_ms)
        table.add_row(row.subject, *figures, report.cell(row.times_ours, ".2f"))
    console.print(table)
    directory.mkdir(parents=True, exist_ok=True)
    results = {"environment": about, "rows": [asdict(row) for row in rows]}
    (directory / "prefixes.json").write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"written: prefixes.json in {directory}")
    return 0
