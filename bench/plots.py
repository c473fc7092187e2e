"""Time and memory against N, with the peers as lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

from bench.measure import Row
from bench.peers import OURS


def plot(directory: Path, rows: list[Row], about: dict[str, Any]) -> list[Path]:
    """time.png and memory.png: one panel a loss, one line a subject, against N."""
    quantities = {
        "time": ("forward + backward, ms", lambda row: row.total_ms and row.total_ms.median),
        "memory": ("peak beyond inputs and gradients, MiB", lambda row: row.extra_mib),
    }
    subjects = list(dict.fromkeys(row.subject for row in rows))
    paths = []
    for name, (label, value) in quantities.items():
        losses = list(dict.fromkeys(row.loss for row in rows if value(row) and (row.n > 64 or name == "memory")))
        figure, axes = plt.subplots(1, max(1, len(losses)), figsize=(4.2 * max(1, len(losses)), 4), squeeze=False)
        for loss, axis in zip(losses, axes[0], strict=False):
            for index, subject in enumerate(subjects):
                points = sorted((r.n, value(r)) for r in rows if (r.loss, r.subject) == (loss, subject) and value(r))
                if points:
                    width = 2.5 if subject == OURS else 1.2
                    axis.plot(*zip(*points, strict=True), marker="o", color=f"C{index}", linewidth=width, label=subject)
            axis.set(title=loss, xlabel="N = M", yscale="log")
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
