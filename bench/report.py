"""Rows to a terminal table, CSV, JSON, plots, and the table of the README."""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.cases import Bar
from bench.measure import Figure, Row
from bench.peers import OURS, SUBJECTS
from bench.plots import plot

PACKAGES = ("smartclip-kernels", "torch", "open_clip_torch", "numpy")
FIGURES = ("forward_ms", "total_ms", "product_gflops", "floor_percent", "times_ours")
FLOOR_NOTE = (
    "Floor: the matrix products alone, at the rate of torch's own 2048³ product in the same rounds, a softmax's scores "
    "computed twice. Who keeps the N×M scores needs 6NMD for 8NMD (12 for 16) and can pass 100 %."
)
README_LEAVES_OUT = (8, 256, 1024, 4096)
"""Sizes that are in the results' own files only."""
README_MARKERS = ("<!-- bench:begin -->", "<!-- bench:end -->")


def device_name() -> str:
    """The processor's own name, and how many cores there are."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return f"{found[1].strip() if found else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """Of this checkout, marked where files differ from it; "" outside one."""
    root = Path(__file__).resolve().parent
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def environment() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "settings": {name: value for name, value in os.environ.items() if name.startswith(("SMARTCLIP_", "OMP_"))},
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


@dataclass(frozen=True)
class Verdict:
    """A bar beside the figure that was measured for it; None where nothing was."""

    bar: Bar
    measured: float | None

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.bar.value if self.bar.what == "memory" else self.measured >= self.bar.value

    def __str__(self) -> str:
        bar = self.bar
        subject = {
            "memory": "MiB beyond inputs and gradients",
            "floor": "of floor",
        }.get(bar.what, f"× as fast as {bar.what}")
        got = "not measured" if self.measured is None else f"{self.measured:.2f}"
        relation = "at most" if bar.what == "memory" else "at least"
        word = {True: "met", False: "MISSED", None: "-"}[self.met]
        return f"{bar.loss} N={bar.n}: {got} {subject}, bar: {relation} {bar.value:.2f}: {word}"


def judge(bars: list[Bar], rows: list[Row]) -> list[Verdict]:
    """The figures of the bars whose case is among the rows."""
    found = {(row.loss, row.n, row.subject): row for row in rows}

    def measured(bar: Bar) -> float | None:
        own = found[bar.loss, bar.n, OURS]
        if bar.what == "memory":
            return own.extra_mib
        if bar.what == "floor":
            return own.floor_percent.median / 100 if own.floor_percent else None
        peer = found.get((bar.loss, bar.n, bar.what))
        return peer.times_ours.median if peer and peer.times_ours else None

    return [Verdict(bar, measured(bar)) for bar in bars if (bar.loss, bar.n, OURS) in found]


def cell(figure: Figure | None, digits: str = ".3g", *, spread: bool = True) -> str:
    if figure is None:
        return ""
    text = f"{figure.median:{digits}}"
    return f"{text} [{figure.low:{digits}}–{figure.high:{digits}}]" if spread else text


def milliseconds(figure: Figure | None) -> str:
    return cell(figure, ".1f" if figure and figure.median >= 10 else ".3f")


def mebibytes(row: Row) -> str:
    if row.extra_mib is not None:
        return f"{row.extra_mib:,.0f}"
    return "" if row.predicted_mib is None else f"(predicted {row.predicted_mib:,.0f})"


COLUMNS = ("loss", "N", "who", "forward ms", "forward + backward ms", "% of floor", "floor", "× ours", "MiB", "status")


def cells(row: Row) -> tuple[str, ...]:
    who = f"{OURS} ({row.backend})" if row.subject == OURS else row.subject
    return (
        f"{row.loss} D={row.d} {row.dtype}",
        str(row.n),
        who,
        milliseconds(row.forward_ms),
        milliseconds(row.total_ms),
        cell(row.floor_percent, ".1f"),
        row.floor_name if row.floor_percent else "",
        "" if row.subject == OURS else cell(row.times_ours, ".2f"),
        mebibytes(row),
        row.status,
    )


def print_table(rows: list[Row], console: Console) -> None:
    table = Table(title=Text("median [quartiles] over the rounds"), header_style="bold")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("loss", "who", "status") else "right", overflow="fold")
    for previous, row in zip([None, *rows], rows, strict=False):
        if previous and (previous.loss, previous.n) != (row.loss, row.n):
            table.add_section()
        table.add_row(*map(Text, cells(row)), style="bold" if row.subject == OURS else "")
    console.print(table)
    for name, subject in SUBJECTS.items():
        console.print(f"{name}: {subject.description}", highlight=False)
    console.print(FLOOR_NOTE, highlight=False)


def write_json(path: Path, rows: list[Row], verdicts: list[Verdict], about: dict[str, Any]) -> None:
    bars = [{**asdict(v.bar), "measured": v.measured, "met": v.met} for v in verdicts]
    document = {"environment": about, "rows": [asdict(row) for row in rows], "bars": bars}
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> tuple[dict[str, Any], list[Row], list[Verdict]]:
    document = json.loads(path.read_text())
    rows = [Row(**row) for row in document["rows"]]
    for row in rows:
        for name in FIGURES:
            value = getattr(row, name)
            setattr(row, name, value and Figure(**value))
    bars = [{k: v for k, v in bar.items() if k != "met"} for bar in document["bars"]]
    return document["environment"], rows, [Verdict(measured=bar.pop("measured"), bar=Bar(**bar)) for bar in bars]


def write_csv(path: Path, rows: list[Row]) -> None:
    """One line a row; a figure takes three columns."""
    names = [f.name for f in fields(Row)]
    parts = ("median", "low", "high")
    header = [f"{name}_{part}" for name in names if name in FIGURES for part in parts]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([name for name in names if name not in FIGURES] + header)
        for row in rows:
            plain = [getattr(row, name) for name in names if name not in FIGURES]
            figures = [getattr(row, name) for name in names if name in FIGURES]
            writer.writerow(plain + [getattr(figure, part, None) for figure in figures for part in parts])


def write_all(directory: Path, rows: list[Row], verdicts: list[Verdict], about: dict[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_csv(directory / "results.csv", rows)
    write_json(directory / "results.json", rows, verdicts, about)
    plot(directory, rows, about)


def readme_table(about: dict[str, Any], rows: list[Row], verdicts: list[Verdict]) -> str:
    """Markdown: the machine, a table of sizes against subjects, and the bars. All sizes are in the results."""
    versions = ", ".join(f"{name} {value}" for name, value in about["versions"].items())
    lines = [
        f"Measured on {about['device']}, {about['threads']} threads, Python {about['python']}, {versions}; "
        f"commit {about['commit']}, {about['date'][:10]}. Forward + backward, median of interleaved rounds; "
        f"“× ours” is a peer's time over ours; memory is the peak beyond inputs and gradients. {FLOOR_NOTE}",
        "",
        "|Loss|N = M|Who|ms|× ours|% of floor|MiB|",
        "|---|--:|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        if row.n in README_LEAVES_OUT:
            continue
        time = cell(row.total_ms, ".1f" if row.total_ms and row.total_ms.median >= 10 else ".3f", spread=False)
        floor = f"{cell(row.floor_percent, '.0f', spread=False)} ({row.floor_name})" if row.floor_percent else ""
        time = time or ("" if row.status == "ok" else row.status.split(":")[0])
        who = f"**{OURS}**" if row.subject == OURS else row.subject
        ratio = "" if row.subject == OURS else cell(row.times_ours, ".2f", spread=False)
        lines.append(f"|{row.loss}|{row.n:,}|{who}|{time}|{ratio}|{floor}|{mebibytes(row)}|")
    lines += ["", "Against the bars that were set before:", "", *(f"- {verdict}" for verdict in verdicts)]
    return "\n".join(lines)


def update_readme(readme: Path, results: Path) -> None:
    """Put the table between the README's markers.

    Raises:
        ValueError: the README has no such markers.
    """
    text, (begin, end) = readme.read_text(), README_MARKERS
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{readme}: needs the markers {begin} and {end}, in this order")
    readme.write_text(f"{before}{begin}\n{readme_table(*read_json(results))}\n{end}{after}")
