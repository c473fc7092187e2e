"""What gradient caching costs and saves: one step of a small CLIP, by how much of the first pass is kept.

Encoders are open_clip's; the loss is ours. ``python -m bench.caching SUBJECT BATCH THREADS`` prints the bytes that a
step takes at its peak beyond model, inputs and gradients, in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import open_clip
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import smartclip_kernels as sk
from bench import memory, report
from bench.rows import Figure

BATCH, CHUNKS, ROUNDS = 128, 8, 5
VISION = {"layers": 4, "width": 192, "head_width": 64, "image_size": 64, "patch_size": 8}
TEXT = {"context_length": 65, "vocab_size": 1000, "width": 192, "heads": 3, "layers": 4}  # as long as an image
PLAIN = "no caching"
SUBJECTS = (PLAIN, "keep 0", "keep half", "keep all", "keep auto")
"""The whole batch under one graph; nothing kept; a size that fits half of the chunks; all chunks by number; "auto"."""


@dataclass
class CachingRow:
    subject: str
    batch: int
    chunk: int
    keep_graph: int | str | None
    passes: float  # forward passes of encoder work: rows encoded over rows there are
    step_ms: Figure
    cpu_ms: Figure  # of all threads: what a busy machine changes little
    times_plain: Figure  # its CPU time over the whole batch's, within each round
    extra_mib: float  # peak beyond model, inputs and gradients
    rounds: int


class Step:
    """Two encoders, a batch, and what they are trained by."""

    def __init__(self, batch: int) -> None:
        torch.manual_seed(0)
        self.batch, self.chunk = batch, batch // CHUNKS
        self.model: Any = open_clip.CLIP(256, VISION, TEXT)
        self.images = torch.randn(batch, 3, VISION["image_size"], VISION["image_size"])
        self.tokens = torch.randint(1, TEXT["vocab_size"], (batch, TEXT["context_length"]))
        self.encoded = 0

    def encode(self, rows: Tensor, encoder: nn.Module) -> Tensor:
        self.encoded += len(rows)
        return encoder(rows, normalize=True)

    def encoders(self) -> list[Callable[[Tensor], Tensor]]:
        return [lambda x: self.encode(x, self.model.encode_image), lambda x: self.encode(x, self.model.encode_text)]

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        return sk.clip_loss(image, text, self.model.logit_scale.exp())

    def half_of_the_graphs(self) -> int:
        """Bytes that the images' chunks' graphs save: each storage once, without parameters and input."""
        chunk, storages = self.images[: self.chunk].clone(), {}

        def pack(x: Tensor) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with saved_tensors_hooks(pack, lambda x: x):
            output = self.model.encode_image(chunk, normalize=True)
        outside = {x.untyped_storage().data_ptr() for x in (chunk, *self.model.parameters(), *self.model.buffers())}
        del output  # not earlier: its graph's addresses would be used twice
        return CHUNKS * sum(size for address, size in storages.items() if address not in outside)

    def keep_graph(self, subject: str) -> int | str | None:
        if subject == "keep half":
            return f"{self.half_of_the_graphs()}B"
        return {PLAIN: None, "keep 0": 0, "keep all": 2 * CHUNKS, "keep auto": "auto"}[subject]

    def runner(self, subject: str) -> Callable[[], Tensor]:
        keep_graph = self.keep_graph(subject)
        if keep_graph is None:
            return self.whole
        cache = sk.GradCache(self.encoders(), self.chunk, self.loss, keep_graph=keep_graph)
        return lambda: cache(self.images, self.tokens)

    def whole(self) -> Tensor:
        image, text = (encode(x) for encode, x in zip(self.encoders(), (self.images, self.tokens), strict=True))
        loss = self.loss(image, text)
        loss.backward()
        return loss.detach()

    def take_gradients(self) -> list[Tensor]:
        found = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.model.zero_grad()
        return found


def verify(step: Step, runners: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """The forward passes of each; all cached gradients are the same bits, and the whole batch's up to rounding.

    Raises:
        RuntimeError: they are not.
    """
    passes, gradients = {}, {}
    for name, run in runners.items():
        step.encoded = 0
        run()
        passes[name] = step.encoded / (2 * step.batch)
        gradients[name] = step.take_gradients()
    for name, found in gradients.items():
        for mine, cached, whole in zip(found, gradients["keep 0"], gradients[PLAIN], strict=True):
            if name != PLAIN and not torch.equal(mine, cached):
                raise RuntimeError(f"{name}: other bits than keep 0")
            if not torch.allclose(mine, whole, rtol=0, atol=1e-4 * float(whole.abs().max())):
                raise RuntimeError(f"{name}: not the whole batch's gradients")
    return passes


def extra_bytes(subject: str, batch: int) -> int:
    """In this process: a first step loads code and leaves gradients, which later steps add to."""
    step = Step(CHUNKS)
    step.runner(subject)()
    large = Step(batch)
    large.model = step.model
    run = large.runner(subject)
    memory.CLEAR_REFS.write_text("5")
    baseline = memory.resident("VmRSS")
    run()
    return memory.resident("VmHWM") - baseline


def measured_elsewhere(subject: str, batch: int) -> float:
    command = [sys.executable, "-m", "bench.caching", subject, str(batch), str(torch.get_num_threads())]
    result = subprocess.run(command, cwd=memory.ROOT, capture_output=True, text=True, check=True)
    return int(result.stdout.split()[-1]) / 2**20


def measure(batch: int, rounds: int) -> list[CachingRow]:
    """A B C, A B C, …: whatever the machine does meanwhile, it does to all."""
    step = Step(batch)
    runners = {name: step.runner(name) for name in SUBJECTS}
    passes = verify(step, runners)
    wall: dict[str, list[float]] = {name: [] for name in SUBJECTS}
    cpu: dict[str, list[float]] = {name: [] for name in SUBJECTS}
    for _ in range(rounds):
        for name, run in runners.items():
            start, start_cpu = perf_counter(), process_time()
            run()
            wall[name].append(1e3 * (perf_counter() - start))
            cpu[name].append(1e3 * (process_time() - start_cpu))
            step.model.zero_grad()
    return [
        CachingRow(
            name,
            batch,
            step.chunk,
            step.keep_graph(name),
            passes[name],
            Figure.of(wall[name]),
            Figure.of(cpu[name]),
            Figure.of([ms / whole for ms, whole in zip(cpu[name], cpu[PLAIN], strict=True)]),
            measured_elsewhere(name, batch),
            rounds,
        )
        for name in SUBJECTS
    ]


def main(directory: Path, console: Console, *, quick: bool) -> int:
    about = report.environment()
    rows = measure(4 * CHUNKS, 1) if quick else measure(BATCH, ROUNDS)
    of = f"{rows[0].batch} pairs in chunks of {rows[0].chunk}"
    title = f"{about['device']}, {about['threads']} threads: a step of {of}"
    table = Table("who", "keep_graph", "forward passes", "ms", "CPU ms", f"CPU × {PLAIN}", "MiB", title=title)
    for row in rows:
        figures = report.milliseconds(row.step_ms), report.milliseconds(row.cpu_ms), report.cell(row.times_plain)
        table.add_row(row.subject, str(row.keep_graph), f"{row.passes:.2f}", *figures, f"{row.extra_mib:,.0f}")
    console.print(table)
    directory.mkdir(parents=True, exist_ok=True)
    results = {"environment": about, "rows": [asdict(row) for row in rows]}
    (directory / "caching.json").write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"written: caching.json in {directory}")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(extra_bytes(sys.argv[1], int(sys.argv[2])))
