"""Sizes of Triton's blocks, chosen on this GPU: ``python -m bench tune``.

For a kind of operands and a kernel: candidates are compiled in other processes; those that spill or do not fit are out;
the rest is timed; the fastest that compiles in all of the kernel's variants goes into the backend's table.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path
from statistics import median
from time import monotonic

import torch
from rich.console import Console

from bench import ahead
from bench.cases import Case, make_inputs
from bench.devices import Cuda, Device
from bench.peers import OURS, SUBJECTS
from bench.report import replace_file
from bench.timing import time_calls
from smartclip_kernels.backends.triton import config
from smartclip_kernels.backends.triton.config import Config

N = {2: 16384, 4: 8192}
"""Of what is timed, by bytes of a number; D is 768."""
WARM_N = 256
"""Of what other processes run, so that the compiled kernel is in Triton's cache. All sizes divide by 16, as N does."""
CALLS = 5
FINALISTS, ROUNDS = 4, 5
MARGIN = 0.01
"""A new size has to be faster by this fraction than the present one, or noise would choose."""


@dataclass(frozen=True)
class Family:
    """What one entry of the table is for."""

    similarity: str
    dtype: torch.dtype
    kernel: str

    @property
    def kind(self) -> str:
        return config.operand_kind(self.similarity, self.dtype)

    @property
    def variant(self) -> ahead.Variant:
        """The one that is timed."""
        extra = (("WHAT", "ahead"),) if self.kernel == "scores" else ()
        return ahead.Variant(self.kernel, self.similarity, "softmax", self.dtype, extra)

    def variants(self) -> list[ahead.Variant]:
        """All that take these sizes."""
        dtypes = (torch.bfloat16, torch.float16) if self.dtype.itemsize == 2 else (self.dtype,)
        mine = (v for v in ahead.variants(dtypes) if ahead.SIZES_OF.get(v.kernel) == self.kernel)
        return [v for v in mine if v.similarity == self.similarity]

    def __str__(self) -> str:
        return f"{self.kind} {self.kernel}"


FAMILIES = [
    Family(similarity, dtype, kernel)
    for dtype, kernels in (
        (torch.bfloat16, ("statistics", "gradient")),
        (torch.float32, ("statistics", "gradient")),
        (torch.bfloat16, ("scores",)),
        (torch.float32, ("scores",)),
    )
    for similarity, kernel in itertools.product(("dot", "masked_cosine"), kernels)
]
"""The most important first."""


def candidates(family: Family) -> list[Config]:
    half, scores = family.dtype.itemsize == 2, family.kernel == "scores"
    shapes = [(128, 128), (128, 256), (256, 128), (64, 256), (128, 64), (64, 128), (64, 64)]
    loops = [(64, 2), (64, 3), (64, 4), (32, 4)] if half else [(32, 2), (16, 2), (16, 3)]  # depth, stages
    found = []
    for (n, m), (d, stages) in itertools.product(shapes, loops):
        parts = [1] if scores else [count for count in (1, 2, 4) if m // count in (32, 64)]
        warps = [8] if n * m >= 128 * 128 else [4] if n * m < 64 * 128 else [4, 8]
        found += [Config(n, m, d, part, 8, warp, stages) for part, warp in itertools.product(parts, warps)]
    return found


@dataclass(frozen=True)
class Trial:
    """One candidate: how long it takes, or why it is out."""

    sizes: Config
    reason: str = ""
    usage: str = ""
    seconds: float | None = None


def try_out(family: Family, sizes: Config, architecture: str, every_variant: bool, run: bool) -> Trial:
    """In another process: compile it; on a GPU run it once, which leaves the compiled kernel for the one that times."""
    usages = []
    for variant in family.variants() if every_variant else [family.variant]:
        try:
            usages.append(ahead.compile_variant(variant, architecture, sizes))
        except Exception as error:  # whatever the compiler fails of
            return Trial(sizes, f"does not compile: {type(error).__name__}")
        worst = usages[-1]
        usage = f"{worst.registers} registers, {worst.shared / 1024:.0f} KiB"
        if worst.spilled or not worst.fits:
            reason = f"spills {worst.spilled} bytes" if worst.spilled else "too much shared memory"
            return Trial(sizes, f"{reason} ({variant})", usage)
    if run:
        try:
            Timer(Cuda(), WARM_N)(family, sizes)
        except Exception as error:
            return Trial(sizes, f"does not run: {type(error).__name__}", usage)
    return Trial(sizes, usage=usage)


class Timer:
    """Seconds that a kernel of given sizes takes on this GPU, with what goes before and after it."""

    def __init__(self, device: Device, n: int | None = None) -> None:
        self._device, self._n = device, n
        self._architecture = config.architecture(torch.cuda.current_device())

    def __call__(self, family: Family, sizes: Config) -> float:
        config.tables()[self._architecture][family.kind][family.kernel] = list(sizes)
        config.config.cache_clear()
        self._once(family)  # compiles
        return median(self._once(family) for _ in range(CALLS))

    def _once(self, family: Family) -> float:
        import smartclip_kernels as sk

        dtype = str(family.dtype).removeprefix("torch.")
        n = self._n or N[family.dtype.itemsize]
        case = Case("dot", "softmax", n, d=768, dtype=dtype, backend="triton", device=self._device.type)
        inputs = make_inputs(case if family.similarity == "dot" else replace(case, similarity="masked_cosine"))
        if family.kernel != "scores":
            loss = SUBJECTS[OURS].build(case)
            forward, total = time_calls(loss, inputs, 1, self._device)
            return forward if family.kernel == "statistics" else total - forward
        self._device.settle()
        start = self._device.mark()
        sk.retrieval_ranks(inputs.image, inputs.text, inputs.mask, backend="triton")
        return self._device.seconds(start, self._device.mark())


def choose(
    trials: list[Trial], present: Config, time: Callable[[Config], float], holds: Callable[[Config], bool]
) -> tuple[Config, list[Trial]]:
    """The fastest of those that can run, or `present` where none is faster by MARGIN.

    Args:
        trials: one a candidate, `present` among them; those without a reason against them are timed.
        time: seconds of one measurement; may raise, then that candidate is out.
        holds: whether it can be used in every variant of its kernel; asked of the fastest only.
    """
    timed = [trial if trial.reason else timed_once(trial, time) for trial in trials]
    running = sorted((t for t in timed if t.seconds is not None), key=lambda t: t.seconds or 0.0)
    finalists = [t.sizes for t in running[:FINALISTS]]
    if present not in finalists and any(t.sizes == present for t in running):
        finalists.append(present)
    rounds: dict[Config, list[float]] = {sizes: [] for sizes in finalists}
    for _ in range(ROUNDS):  # in turns, as everywhere
        for sizes in finalists:
            rounds[sizes].append(time(sizes))
    seconds = {sizes: median(values) for sizes, values in rounds.items()}
    timed = [replace(t, seconds=seconds.get(t.sizes, t.seconds)) for t in timed]
    ranked = sorted(finalists, key=lambda sizes: seconds[sizes])
    for sizes in ranked:
        better = present not in seconds or seconds[sizes] < (1 - MARGIN) * seconds[present]
        if sizes == present or (better and holds(sizes)):
            return sizes, timed
    return present, timed


def timed_once(trial: Trial, time: Callable[[Config], float]) -> Trial:
    try:
        return replace(trial, seconds=time(trial.sizes))
    except Exception as error:
        return replace(trial, reason=f"does not run: {type(error).__name__}")


def text_of(tables: dict[str, dict[str, dict[str, list[int]]]]) -> str:
    """As the file is kept: a line for each kind of operands."""
    blocks = []
    for architecture, kinds in tables.items():
        lines = [f"  {json.dumps(kind)}: {json.dumps(kernels)}" for kind, kernels in kinds.items()]
        blocks.append(f" {json.dumps(architecture)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def table(family: Family, trials: list[Trial], winner: Config, present: Config) -> Iterator[str]:
    yield f"{family}: n·m·d / parts, group, warps, stages"
    for trial in sorted(trials, key=lambda t: (t.seconds is None, t.seconds or 0.0)):
        s = trial.sizes
        sizes = f"{s.block_n}·{s.block_m}·{s.block_d} / {s.parts}, {s.group}, {s.warps}, {s.stages}"
        figure = trial.reason if trial.seconds is None else f"{1e3 * trial.seconds:9.3f} ms"
        word = "  chosen" if s == winner else "  was chosen" if s == present else ""
        yield f"  {sizes:<28} {figure}  {trial.usage}{word}"


def tune(
    architecture: str, out: Path, deadline: float, pool: Executor, time: Callable[[Family, Config], float], run: bool
) -> Iterator[str]:
    """Rewrites `out` after every family; yields what is to be printed."""
    tables = json.loads(config.TABLES.read_text())
    for family in FAMILIES:
        if monotonic() > deadline:
            yield f"{family}: no time left"
            continue
        present = Config(*tables[architecture][family.kind][family.kernel])
        tried = [present, *(sizes for sizes in candidates(family) if sizes != present)]
        jobs = [pool.submit(try_out, family, sizes, architecture, False, run) for sizes in tried]
        trials = [job.result() for job in jobs]

        def holds(sizes: Config, family: Family = family) -> bool:
            return not pool.submit(try_out, family, sizes, architecture, True, False).result().reason

        winner, trials = choose(trials, present, lambda sizes, family=family: time(family, sizes), holds)  # type: ignore[misc]
        tables[architecture][family.kind][family.kernel] = list(winner)
        replace_file(out, text_of(tables))
        yield from table(family, trials, winner, present)


def main(architecture: str | None, seconds: float, out: Path | None) -> int:
    console = Console(width=160)
    if not torch.cuda.is_available():
        console.print("python -m bench tune: torch sees no GPU here", style="red")
        return 2
    deadline = monotonic() + seconds
    timer = Timer(Cuda())
    workers = max(1, (cpu_count() or 2) - 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        chosen = architecture or config.architecture(torch.cuda.current_device())
        for line in tune(chosen, out or config.TABLES, deadline, pool, timer, run=True):
            console.print(line, highlight=False, markup=False)
    return 0
