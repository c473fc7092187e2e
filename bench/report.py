"""Rows to a terminal table, CSV and JSON; what they were measured on; what they say about the bars."""

from __future__ import annotations

import csv
import io
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

from bench.cases import FORWARD_NMD, Bar
from bench.peers import OURS, SUBJECTS
from bench.rows import Figure, Row

PACKAGES = ("smartclip-kernels", "torch", "open_clip_torch", "numpy")
GPU_PACKAGES = ("triton", "memeff", "siglip-kernel", "inf-cl")
FIGURES = ("forward_ms", "total_ms", "product_gflops", "floor_percent", "times_ours")


def device_name() -> str:
    """The processor's own name, and how many cores there are."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return f"{found[1].strip() if found else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """Of this checkout, marked where files differ from it; "" outside one. BENCH_COMMIT says it for a mere copy."""
    if named := os.environ.get("BENCH_COMMIT"):
        return named
    root = Path(__file__).resolve().parent
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def floor_note(about: dict[str, Any]) -> str:
    return (
        f"Floor: the matrix products alone, at the rate of torch's own {about.get('product', 2048)}³ product in the "
        "same rounds, a softmax's scores computed twice. Who keeps the N×M scores needs 6NMD for 8NMD (12 for 16) and "
        "can pass 100 %."
    )


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


def gpu_environment(product: int) -> dict[str, Any]:
    """The same for a GPU; `product` is the size of the matrix product that rates are measured with."""
    about, properties = environment(), torch.cuda.get_device_properties(0)
    return {
        **about,
        "device": properties.name,
        "host": about["device"],
        "capability": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "driver": nvidia_smi("driver_version"),
        "power_limit": nvidia_smi("power.limit"),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "versions": about["versions"] | {package: version(package) for package in GPU_PACKAGES},
        "product": product,
    }


def nvidia_smi(what: str) -> str:
    try:
        command = ["nvidia-smi", "--id=0", f"--query-gpu={what}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


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
            "forward floor": "of the forward pass's floor",
            "runs": "(1: it runs)",
        }.get(bar.what, f"× as fast as {bar.what}")
        got = "not measured" if self.measured is None else f"{self.measured:.2f}"
        relation = "at most" if bar.what == "memory" else "at least"
        word = {True: "met", False: "MISSED", None: "-"}[self.met]
        where = "" if bar.backend == "cpu" else f" D={bar.d} {bar.dtype} ({bar.backend})"
        return f"{bar.loss} N={bar.n}{where}: {got} {subject}, bar: {relation} {bar.value:.2f}: {word}"


def judge(bars: list[Bar], rows: list[Row]) -> list[Verdict]:
    """The figures of the bars whose case is among the rows. What is inaccurate has none."""
    # On the CPU a peer's row names no backend.
    found = {(row.loss, row.n, row.d, row.dtype, row.backend or "cpu", row.subject): row for row in rows}

    def row_of(bar: Bar, subject: str) -> Row | None:
        return found.get((bar.loss, bar.n, bar.d, bar.dtype, bar.backend, subject))

    def measured(bar: Bar) -> float | None:
        own, peer = row_of(bar, OURS), row_of(bar, bar.what)
        if own is None or own.status.startswith("inaccurate"):
            return None
        if bar.what == "memory":
            return own.extra_mib
        if bar.what == "floor":
            return own.floor_percent.median / 100 if own.floor_percent else None
        if bar.what == "forward floor":
            return forward_floor(own)
        if bar.what == "runs":
            return 1.0 if own.total_ms else 0.0
        return peer.times_ours.median if peer and peer.times_ours else None

    return [Verdict(bar, measured(bar)) for bar in bars if row_of(bar, OURS)]


def forward_floor(row: Row) -> float | None:
    """The same fraction as `floor_percent`, of the forward pass's products alone, of medians."""
    if not (row.forward_ms and row.product_gflops):
        return None
    return FORWARD_NMD[row.similarity] * row.n**2 * row.d / row.product_gflops.median / row.forward_ms.median / 1e6


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


def status(row: Row) -> str:
    return f"{row.status} ({row.note})" if row.note else row.status


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
        status(row),
    )


def print_table(rows: list[Row], about: dict[str, Any], console: Console) -> None:
    table = Table(title=Text("median [quartiles] over the rounds"), header_style="bold")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("loss", "who", "status") else "right", overflow="fold")
    for previous, row in zip([None, *rows], rows, strict=False):
        if previous and case_of(previous) != case_of(row):
            table.add_section()
        table.add_row(*map(Text, cells(row)), style="bold" if row.subject == OURS else "")
    console.print(table)
    for name in dict.fromkeys(row.subject for row in rows):
        console.print(f"{name}: {SUBJECTS[name].description}", highlight=False)
    console.print(floor_note(about), highlight=False)


def case_of(row: Row) -> tuple[str, int, int, str]:
    return row.loss, row.n, row.d, row.dtype


def replace_file(path: Path, text: str) -> None:
    """Whenever the process ends, there is the old file or the new one."""
    aside = path.with_name(f".{path.name}.new")
    aside.write_text(text)
    aside.replace(path)


def write_json(path: Path, rows: list[Row], verdicts: list[Verdict], about: dict[str, Any]) -> None:
    """What came to rows and bars with GPUs is left out where it says nothing."""
    plain = [{k: v for k, v in asdict(row).items() if k != "note" or v} for row in rows]
    bars = [
        {f.name: getattr(v.bar, f.name) for f in fields(v.bar) if getattr(v.bar, f.name) != f.default}
        | {"measured": v.measured, "met": v.met}
        for v in verdicts
    ]
    document = {"environment": about, "rows": plain, "bars": bars}
    replace_file(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


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
    names = [f.name for f in fields(Row) if f.name != "note" or any(row.note for row in rows)]
    parts = ("median", "low", "high")
    header = [f"{name}_{part}" for name in names if name in FIGURES for part in parts]
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow([name for name in names if name not in FIGURES] + header)
    for row in rows:
        plain = [getattr(row, name) for name in names if name not in FIGURES]
        figures = [getattr(row, name) for name in names if name in FIGURES]
        writer.writerow(plain + [getattr(figure, part, None) for figure in figures for part in parts])
    replace_file(path, file.getvalue())


def write_all(directory: Path, rows: list[Row], verdicts: list[Verdict], about: dict[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_csv(directory / "results.csv", rows)
    write_json(directory / "results.json", rows, verdicts, about)
