"""Training, from a configuration to a folder of results."""

from __future__ import annotations

import dataclasses
import json
import time
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path

import torch

from smartclip_kernels.train import checkpoint, report
from smartclip_kernels.train.batches import batches
from smartclip_kernels.train.config import Config
from smartclip_kernels.train.evaluation import Embedder, evaluate
from smartclip_kernels.train.ranks import device_of_rank, start
from smartclip_kernels.train.run import Run


def train(config: Config, *, quiet: bool = False) -> dict[str, float]:
    """Trains, evaluates and draws; returns the metrics, which are also in the run's folder.

    Under torchrun, or in an initialised process group, all ranks train; rank 0 does the rest, the others return {}.
    """
    config = dataclasses.replace(config, device=device_of_rank(config.device))
    if config.threads:
        torch.set_num_threads(config.threads)
    with start(config.device) as ranks:
        out = ranks.from_first(lambda: prepare_folder(config))
        run = Run(config, out, ranks)
        shown = report.Progress(config, out, run.step, quiet=quiet) if ranks.first else None
        with shown or nullcontext(), run.what_is_left():
            for batch in batches(run.source, config, run.step, ranks):
                started = time.perf_counter()
                numbers = run.train_step(batch)
                if shown:
                    shown.step(numbers, batch.n_images, time.perf_counter() - started, batch.problems)
                    if run.step % config.checkpoint_every == 0 or run.step == config.steps:
                        run.save()
    if not ranks.first:
        return {}
    embedder = Embedder(run.model, run.tokenize, run.source, config.device)
    metrics = evaluate(embedder) if run.source.records["eval"] else {}
    report.finish(config, out, embedder, metrics, quiet=quiet)
    return metrics


def prepare_folder(config: Config) -> Path:
    """The run's folder, with its configuration; refuses to mix two runs."""
    out = config.out or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{config.objective}-{config.captions}"
    out.mkdir(parents=True, exist_ok=True)
    if checkpoint.steps(out / "checkpoints"):
        if not config.resume:
            raise FileExistsError(f"out: {out} holds a run; go on with it by --resume, or name another folder")
    else:
        checkpoint.replace(out / "config.json", json.dumps(config.as_dict(), indent=1))
    return out
