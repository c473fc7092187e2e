"""The README's tables of results: one for a CPU and one for a GPU, each between its own markers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.peers import OURS
from bench.report import Verdict, cell, floor_note, mebibytes, read_json
from bench.rows import Row

MARKERS = {
    "cpu": ("<!-- bench:begin -->", "<!-- bench:end -->"),
    "gpu": ("<!-- bench-gpu:begin -->", "<!-- bench-gpu:end -->"),
}
LEAVES_OUT = {"cpu": (8, 256, 1024, 4096), "gpu": (8, 256, 512, 2048, 16384)}
"""Sizes that are in the results' own files only."""


def kind(about: dict[str, Any]) -> str:
    return "gpu" if "driver" in about else "cpu"


def machine(about: dict[str, Any]) -> str:
    if kind(about) == "cpu":
        return f"{about['device']}, {about['threads']} threads"
    return f"{about['device']} ({about['capability']}, driver {about['driver']}, CUDA {about['cuda']})"


def table(about: dict[str, Any], rows: list[Row], verdicts: list[Verdict]) -> str:
    """Markdown: the machine, a table of sizes against subjects, and the bars. All sizes are in the results."""
    gpu = kind(about) == "gpu"
    versions = ", ".join(f"{name} {value}" for name, value in about["versions"].items())
    lines = [
        f"Measured on {machine(about)}, Python {about['python']}, {versions}; "
        f"commit {about['commit']}, {about['date'][:10]}. Forward + backward, median of interleaved rounds; "
        f"“× ours” is a peer's time over ours; memory is the peak beyond inputs and gradients. {floor_note(about)}",
        "",
        "|Loss|N = M|Who|ms|× ours|% of floor|MiB|",
        "|---|--:|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        if row.n in LEAVES_OUT[kind(about)]:
            continue
        time = cell(row.total_ms, ".1f" if row.total_ms and row.total_ms.median >= 10 else ".3f", spread=False)
        floor = f"{cell(row.floor_percent, '.0f', spread=False)} ({row.floor_name})" if row.floor_percent else ""
        time = time or ("" if row.status == "ok" else row.status.split(":")[0])
        own = f"{OURS} ({row.backend})" if gpu else OURS
        who = f"**{own}**" if row.subject == OURS else row.subject
        ratio = "" if row.subject == OURS else cell(row.times_ours, ".2f", spread=False)
        loss = f"{row.loss}, D = {row.d}, {row.dtype}" if gpu else row.loss
        lines.append(f"|{loss}|{row.n:,}|{who}|{time}|{ratio}|{floor}|{mebibytes(row)}|")
    lines += ["", "Against the bars that were set before:", "", *(f"- {verdict}" for verdict in verdicts)]
    return "\n".join(lines)


def update(readme: Path, results: Path) -> None:
    """Put the table of these results between the README's markers for their kind of device.

    Raises:
        ValueError: the README has no such markers.
    """
    about, rows, verdicts = read_json(results)
    text, (begin, end) = readme.read_text(), MARKERS[kind(about)]
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{readme}: needs the markers {begin} and {end}, in this order")
    readme.write_text(f"{before}{begin}\n{table(about, rows, verdicts)}\n{end}{after}")
