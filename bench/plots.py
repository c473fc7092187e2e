"""Time and memory against N, with the peers as lines."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

from bench.peers import OURS
from bench.rows import Row


def line(row: Row, backends: set[str]) -> str:
    return f"{row.subject} ({row.backend})" if row.subject.startswith(OURS) and len(backends) > 1 else row.subject


def of_one_kind(rows: list[Row]) -> list[Row]:
    """Those of the width and dtype that most rows of their loss have: a line goes along N alone."""
    losses = {row.loss for row in rows}
    most = {
        loss: Counter((r.d, r.dtype) for r in rows if r.loss == loss and r.status == "ok").most_common(1)
        for loss in losses
    }
    return [row for row in rows if (row.d, row.dtype) in [kind for kind, _ in most[row.loss]]]


def plot(directory: Path, rows: list[Row], about: dict[str, Any]) -> list[Path]:
    """time.png and memory.png: one panel a loss, one line a subject, against N."""
    quantities = {
        "time": ("forward + backward, ms", lambda row: row.total_ms and row.total_ms.median),
        "memory": ("peak beyond inputs and gradients, MiB", lambda row: row.extra_mib),
    }
    rows = of_one_kind(rows)
    backends = {row.backend for row in rows if row.subject == OURS}
    subjects = list(dict.fromkeys(line(row, backends) for row in rows))
    paths = []
    for name, (label, value) in quantities.items():
        losses = list(dict.fromkeys(row.loss for row in rows if value(row) and (row.n > 64 or name == "memory")))
        figure, axes = plt.subplots(1, max(1, len(losses)), figsize=(4.2 * max(1, len(losses)), 4), squeeze=False)
        for loss, axis in zip(losses, axes[0], strict=False):
            kind = next(f"{row.loss}, D = {row.d}, {row.dtype}" for row in rows if row.loss == loss)
            for index, subject in enumerate(subjects):
                mine = [row for row in rows if (row.loss, line(row, backends)) == (loss, subject) and value(row)]
                points = sorted({row.n: value(row) for row in mine}.items())
                if points:
                    width = 2.5 if subject.startswith(OURS) else 1.2
                    axis.plot(*zip(*points, strict=True), marker="o", color=f"C{index}", linewidth=width, label=subject)
            axis.set(title=kind, xlabel="N = M", yscale="log")
            axis.set_xscale("log", base=2)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
        axes[0][0].set_ylabel(label)
        machine = f"{about['device']}, {about['threads']} threads, torch {about['versions']['torch']}"
        figure.suptitle(machine, fontsize=9)
        figure.tight_layout()
        paths.append(directory / f"{name}.png")
        figure.savefig(paths[-1], dpi=120)
        plt.close(figure)
    return paths
