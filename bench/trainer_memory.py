"""``python -m bench.trainer_memory``: what the trainer takes at its peak, against the batch, under a limit.

Every figure is a run of ``smartclip-train`` with its default model, data and objective, in a process of its own: a few
steps, evaluation and pictures, and the process's high-water mark of resident memory. Ours is the trainer as it is;
eager the same with the naive losses, whose N×M scores lie in memory, and with the whole batch through the encoders at
once. The limit is the system's own on a process's data: who asks for more is refused, and its row says so.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from bench import report
from bench.memory import ROOT, resident

GIB = 2**30
SIZES = (1024, 2048, 4096, 8192, 16384, 32768)
SUBJECTS = ("ours", "eager")
STEPS = 2
REFUSED = ("can't allocate memory", "MemoryError", "bad_alloc", "Cannot allocate memory")


@dataclass(frozen=True)
class Row:
    """One run. `peak_mib` is None where it did not come to its end."""

    subject: str
    batch_size: int
    peak_mib: float | None
    pairs_per_second: float | None
    status: str


@dataclass(frozen=True)
class Setting:
    """What all runs of a table share."""

    limit_gib: float
    threads: int
    image_size: int

    def options(self) -> list[str]:
        named = {"--limit": self.limit_gib, "--threads": self.threads, "--image-size": self.image_size}
        return [word for name, value in named.items() for word in (name, str(value))]


def child(subject: str, batch_size: int, setting: Setting) -> None:
    """The run, in this process. Prints resident bytes and pairs/s of the last step."""
    limit = int(setting.limit_gib * GIB)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    from smartclip_kernels.train.config import Config, DataConfig
    from smartclip_kernels.train.loop import train
    from smartclip_kernels.train.report import read_metrics

    naive: dict[str, Any] = {"chunk_size": batch_size, "loss_backend": "reference"} if subject == "eager" else {}
    with tempfile.TemporaryDirectory() as folder:
        out, data = Path(folder) / "run", DataConfig(image_size=setting.image_size)
        common: dict[str, Any] = {"data": data, "steps": STEPS, "threads": setting.threads, "out": out}
        train(Config(batch_size=batch_size, **common, **naive), quiet=True)
        speed = read_metrics(out / "metrics.jsonl")[-1]["pairs/s"]
    print(resident("VmHWM"), speed)


def measure(subject: str, batch_size: int, setting: Setting) -> Row:
    """`child` in a fresh process."""
    command = [sys.executable, "-m", "bench.trainer_memory", *setting.options(), "--child", subject, str(batch_size)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        peak, speed = result.stdout.split()[-2:]
        return Row(subject, batch_size, int(peak) / 2**20, float(speed), "ok")
    if any(word in result.stderr for word in REFUSED):
        return Row(subject, batch_size, None, None, f"stopped by memory: more than {setting.limit_gib:g} GiB")
    raise RuntimeError(f"{subject} at {batch_size}: exit status {result.returncode}:\n{result.stderr}")


def run(sizes: Sequence[int], setting: Setting, done: Sequence[Row] = ()) -> Iterator[Row]:
    """Ours, the largest size first: it is what the table is for. Then eager's up to the first that is stopped."""
    found = {(row.subject, row.batch_size): row for row in done}
    for size in sorted(sizes, reverse=True):
        yield found.get(("ours", size)) or measure("ours", size, setting)
    for size in sorted(sizes):
        row = found.get(("eager", size)) or measure("eager", size, setting)
        yield row
        if row.peak_mib is None:
            break


def measured_before(path: Path, about: dict[str, Any]) -> list[Row]:
    """The rows of a results file of the same commit, device and setting: an hour's measurement need not be one run."""
    if not path.exists():
        return []
    document = json.loads(path.read_text())
    same = ("commit", "device", *(field.name for field in fields(Setting)))
    if any(document["environment"].get(name) != about[name] for name in same):
        return []
    return [Row(**row) for row in document["rows"]]


def table(rows: Sequence[Row]) -> str:
    """Markdown: batch sizes against subjects."""
    found = {(row.subject, row.batch_size): row for row in rows}

    def cell(subject: str, size: int) -> str:
        row = found.get((subject, size))
        return "" if row is None else row.status if row.peak_mib is None else f"{row.peak_mib:,.0f} MiB"

    sizes = sorted({row.batch_size for row in rows})
    lines = [f"|{size:,}|{'|'.join(cell(subject, size) for subject in SUBJECTS)}|" for size in sizes]
    return "\n".join(["|Batch|ours|eager|", "|--:|--:|--:|", *lines]) + "\n"


def write(directory: Path, rows: Sequence[Row], about: dict[str, Any]) -> None:
    """trainer-memory.csv, .json and .png."""
    directory.mkdir(parents=True, exist_ok=True)
    file = io.StringIO()
    writer = csv.DictWriter(file, list(asdict(rows[0])))
    writer.writeheader()
    writer.writerows(map(asdict, rows))
    report.replace_file(directory / "trainer-memory.csv", file.getvalue())
    document = {"environment": about, "rows": [asdict(row) for row in rows]}
    report.replace_file(directory / "trainer-memory.json", json.dumps(document, indent=1) + "\n")
    plot(directory / "trainer-memory.png", rows, about)


def plot(path: Path, rows: Sequence[Row], about: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for subject in SUBJECTS:
        own = [row for row in rows if row.subject == subject]
        measured = [(row.batch_size, row.peak_mib / 1024) for row in own if row.peak_mib is not None]
        (line,) = axes.plot([n for n, _ in measured], [peak for _, peak in measured], "o-", label=subject)
        stopped = [row.batch_size for row in own if row.peak_mib is None]
        axes.plot(stopped, [about["limit_gib"]] * len(stopped), "x", color=line.get_color(), markersize=12)
    axes.axhline(about["limit_gib"], color="grey", linestyle=":", label=f"limit, {about['limit_gib']:g} GiB; × stopped")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes := sorted({row.batch_size for row in rows}), [f"{size:,}" for size in sizes])
    axes.set(xlabel="contrastive batch (pairs)", ylabel="peak resident memory, GiB", ylim=(0, None))
    axes.set_title(f"smartclip-train, images of {about['image_size']} pixels: the whole process")
    axes.legend(loc="center left")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.trainer_memory", description=__doc__)
    parser.add_argument("--child", nargs=2, metavar=("SUBJECT", "SIZE"), help=argparse.SUPPRESS)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--limit", type=float, default=6.0, metavar="GIB", help="of a process's data (default: 6)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--image-size", type=int, default=32, help="pixels; the trainer's own default is 32")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench", help="write to OUT/<device>/")
    arguments = parser.parse_args()
    setting = Setting(arguments.limit, arguments.threads, arguments.image_size)
    if arguments.child:
        subject, size = arguments.child
        child(subject, int(size), setting)
        return
    about = {**report.environment(), **asdict(setting), "steps": STEPS}
    directory = arguments.out / report.slug(about["device"])
    rows = measured_before(directory / "trainer-memory.json", about)
    for row in run(arguments.sizes, setting, rows):
        rows = sorted({*rows, row}, key=lambda row: (SUBJECTS.index(row.subject), row.batch_size))
        print(row, flush=True)
        write(directory, rows, about)  # what is cut off keeps what it has
    print(table(rows))


if __name__ == "__main__":
    main()
