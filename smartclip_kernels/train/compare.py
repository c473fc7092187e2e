"""``python -m smartclip_kernels.train.compare``: what masks change, everything else being equal.

Six arms, the same towers, images, number of captions, steps and seeds:

    clip on short captions · clip on long ones · clip on a mixture ·
    clip on both at once (a long and a short one of every image, two losses) ·
    smartclip on both, with hard masks (the default) and with soft ones

Every run is a process of its own with one thread and leaves a folder. Runs that are done are not done again.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console

SOFT = "--mask.no-hard --mask.initial-keep 0.05 --mask.initial-std 1.0"
ARMS: dict[str, tuple[str, str, str]] = {
    "clip, short": ("clip", "short", ""),
    "clip, long": ("clip", "long", ""),
    "clip, mixed": ("clip", "mixed", ""),
    "clip, both": ("clip", "both", ""),
    "smartclip, both": ("smartclip", "both", ""),
    "smartclip, both, soft masks": ("smartclip", "both", SOFT),
}
"""Objective, captions and the options that are the arm's own."""
METRICS = (
    "text→image R@1", "text→image R@5", "text→image R@10", "image→text R@1", "image→text R@5", "image→text R@10",
    "keyword mAP", "zero-shot group", "zero-shot subgroup", "role mAP", "gender mAP", "tone mAP",
)  # fmt: skip
BEGIN, END = "<!-- compare:begin -->", "<!-- compare:end -->"


@dataclass(frozen=True)
class CompareConfig:
    """Train all arms with all seeds and write the table."""

    out: Path = Path("bench/results/compare")
    """results.json; the runs' folders are in `runs`"""
    runs: Path = Path("runs/compare")
    readme: Path | None = Path("README.md")
    """its part between the markers is replaced"""
    seeds: int = 3
    jobs: int = 2
    """runs at a time, a thread each"""
    train: str = "--batch-size 256 --chunk-size 256 --steps 400 --lr 2e-3 --warmup 30"
    """smartclip-train's options, the same for every run; they begin with dashes, so write --train='--steps 50'"""


def main() -> None:
    config = tyro.cli(CompareConfig, prog="smartclip-compare")
    console = Console()
    cells = [(arm, seed) for seed in range(config.seeds) for arm in ARMS]
    with ThreadPoolExecutor(config.jobs) as pool:
        for (arm, seed), metrics in zip(cells, pool.map(lambda cell: run(config, *cell), cells), strict=True):
            console.print(
                f"{arm}, seed {seed}: R@1 {metrics['text→image R@1']:.2f}, keyword mAP {metrics['keyword mAP']:.2f}"
            )
    results = {arm: [run(config, arm, seed) for seed in range(config.seeds)] for arm in ARMS}
    config.out.mkdir(parents=True, exist_ok=True)
    described = {"options": config.train, "seeds": config.seeds, "versions": versions(), "results": results}
    (config.out / "results.json").write_text(json.dumps(described, indent=1, ensure_ascii=False) + "\n")
    text = table(results) + f"\nMean ± standard deviation over {config.seeds} seeds, in %; {versions()}.\n"
    console.print(text)
    if config.readme is not None:
        write_between(config.readme, text)


def run(config: CompareConfig, arm: str, seed: int) -> dict[str, float]:
    """The metrics of one run, which is made unless it is there."""
    objective, captions, own = ARMS[arm]
    folder = config.runs / f"{objective}-{captions}{'-soft' if own == SOFT else ''}-{seed}"
    done, options = folder / "evaluation.json", folder / "options.txt"
    needed = f"{config.train} {own}".strip()
    if options.exists() and options.read_text() != needed:
        raise ValueError(f"runs: {folder} was made with {options.read_text()!r}, needs to be empty or of {needed!r}")
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        options.write_text(needed)
        command = [
            sys.executable, "-m", "smartclip_kernels.train", "--objective", objective, "--captions", captions,
            "--seed", str(seed), "--threads", "1", "--out", str(folder), "--resume", *needed.split(),
        ]  # fmt: skip
        with (folder / "log.txt").open("a") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            finished = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False)
        if finished.returncode:
            raise RuntimeError(f"{arm}, seed {seed}: exit status {finished.returncode}; see {folder / 'log.txt'}")
    metrics: dict[str, float] = json.loads(done.read_text())
    return metrics


def table(results: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Markdown, an arm a column; the best mean of a row is bold."""
    lines = ["| | " + " | ".join(results) + " |", "|---|" + "---:|" * len(results)]
    for metric in METRICS:
        values = [[run[metric] for run in runs] for runs in results.values()]
        means = [statistics.fmean(v) for v in values]
        cells = [
            f"{mean:.1f} ± {statistics.stdev(v) if len(v) > 1 else 0:.1f}"
            for mean, v in zip(means, values, strict=True)
        ]
        best = means.index(max(means))
        cells[best] = f"**{cells[best]}**"
        lines.append(f"| {metric} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def versions() -> str:
    return f"{platform.machine()} CPU, one thread a run, Python {platform.python_version()}, torch {torch.__version__}"


def write_between(path: Path, text: str) -> None:
    """Replaces what is between the markers."""
    page = path.read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"readme: {path} lacks {BEGIN} … {END}, needs both; the table is in results.json")
    path.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
