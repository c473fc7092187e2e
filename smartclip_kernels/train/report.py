"""What a person sees of a run: progress, metrics.jsonl, TensorBoard; at the end a table, curves and a contact sheet."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from torch import Tensor

import smartclip_kernels as sk
from smartclip_kernels.train import checkpoint
from smartclip_kernels.train.config import Config

if TYPE_CHECKING:
    from smartclip_kernels.train.evaluation import Embedder, Texts

COLUMNS = 8
"""Images that the contact sheet shows for a query."""


class Progress:
    """A bar with loss, pairs/s and memory; every logged step also goes to metrics.jsonl and TensorBoard."""

    def __init__(self, config: Config, out: Path, first_step: int, *, quiet: bool) -> None:
        self.config, self.problems = config, set[str]()
        self.console = Console(file=sys.stdout, quiet=quiet)
        self.file = open_metrics(out / "metrics.jsonl", first_step)
        self.board = tensorboard(out)
        self.bar = Bar(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"),
            TimeElapsedColumn(), TimeRemainingColumn(), console=self.console, disable=quiet,
        )  # fmt: skip
        self.task = self.bar.add_task("starting", total=config.steps, completed=first_step)

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
        self.file.close()
        if self.board is not None:
            self.board.close()
        if self.problems:
            self.console.print(f"{len(self.problems)} unreadable images were skipped")

    def step(self, numbers: Mapping[str, float], n_images: int, seconds: float, problems: list[str]) -> None:
        """`problems`: the images that this step had to do without."""
        for problem in problems:
            if problem not in self.problems:
                self.problems.add(problem)
                self.console.print(f"unreadable image skipped: {problem}")
        step = int(numbers["step"])
        pairs = n_images / seconds
        memory = peak_memory(self.config.device)
        self.bar.update(
            self.task,
            completed=step,
            description=f"loss {numbers['loss']:.4f}  {pairs:,.0f} pairs/s  {memory:,.0f} MiB",
        )
        if step % self.config.log_every and step != self.config.steps:
            return
        line = {**numbers, "images": n_images, "pairs/s": pairs, "memory MiB": memory, "unreadable": len(self.problems)}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in line.items():
                self.board.add_scalar(name.replace(" ", "_"), value, step)


def open_metrics(path: Path, first_step: int) -> Any:
    """The file, without the steps that a resumed run takes again (and without a last line cut short by a kill)."""
    kept = [line for line in read_metrics(path) if line["step"] <= first_step]
    checkpoint.replace(path, "".join(json.dumps(line) + "\n" for line in kept))
    return path.open("a")


def read_metrics(path: Path) -> list[dict[str, float]]:
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:  # noqa: PERF203
            break  # the process was killed while it wrote this one
    return lines


def tensorboard(out: Path) -> Any:
    """A TensorBoard writer where that is installed, else None."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out / "tensorboard"))


def peak_memory(device: str) -> float:
    """MiB: of the GPU's allocator, or the most that this process has had resident."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def finish(config: Config, out: Path, embedder: Embedder, metrics: Mapping[str, float], *, quiet: bool) -> None:
    """evaluation.json, curves.png, retrievals.png and the table."""
    checkpoint.replace(out / "evaluation.json", json.dumps(dict(metrics), indent=1, ensure_ascii=False) + "\n")
    curves(read_metrics(out / "metrics.jsonl"), out / "curves.png")
    if metrics:
        contact_sheet(embedder, out / "retrievals.png")
    table = Table("metric", "%", title=f"{config.objective}, captions {config.captions}: images never seen in training")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.2f}")
    console = Console(quiet=quiet)
    console.print(table)
    console.print(f"weights, curves.png, retrievals.png and evaluation.json are in {out}")


def curves(lines: list[dict[str, float]], path: Path) -> None:
    """Loss, scales, learning rate and speed against steps."""
    from matplotlib.figure import Figure

    panels = {
        "loss": ["loss"],
        "logit scale": sorted(k for k in lines[-1] if k.startswith("scale")) if lines else [],
        "gradient norm": ["gradient norm"],
        "pairs/s": ["pairs/s"],
    }
    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for name in names:
            axes.plot([line["step"] for line in lines], [line[name] for line in lines], label=name)
        axes.set(title=title, xlabel="step")
        if len(names) > 1:
            axes.legend()
    figure.savefig(path, dpi=120)


def contact_sheet(embedder: Embedder, path: Path, n_queries: int = 10) -> None:
    """For some short and some long captions the best images, best first; a green frame is a right one."""
    from matplotlib.figure import Figure

    from smartclip_kernels.train.evaluation import keywords

    held_out = embedder.source.records["eval"]
    image, records = embedder.images([r for r in held_out if r.gallery == held_out[0].gallery])
    words = keywords(embedder.source.records["train"], records)
    short = words[:: max(1, len(words) // (n_queries // 2))][: n_queries // 2]
    long = [r.captions.whole() for r in records[:: max(1, len(records) // (n_queries // 2))]][: n_queries // 2]
    queries = short + long
    best = torch.cat([nearest(image, embedder.texts(short)), nearest(image, embedder.texts(long, long=True))])
    figure = Figure(figsize=(2 + 1.1 * COLUMNS, 1.25 * len(queries)), layout="constrained")
    grid = figure.subplots(len(queries), COLUMNS + 1, squeeze=False, width_ratios=[2.2] + [1] * COLUMNS)
    for row, query, indices in zip(grid, queries, best.tolist(), strict=True):
        row[0].text(0, 0.5, query, va="center", fontsize=7, wrap=True)
        for axes in row:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        for axes, k in zip(row[1:], indices, strict=False):
            captions = records[k].captions
            axes.imshow(embedder.source.read(records[k]).permute(1, 2, 0).numpy())
            if query in captions.short or query == captions.whole():
                axes.spines[:].set(visible=True, color="green", linewidth=2.5)
    figure.savefig(path, dpi=120)


def nearest(image: Tensor, texts: Texts) -> Tensor:
    """(M, COLUMNS) indices of images, best first."""
    if texts.mask is None:
        return (texts.text @ image.T).topk(min(COLUMNS, len(image)), dim=1).indices
    return sk.masked_topk(image, texts.text, texts.mask, COLUMNS)[1]
