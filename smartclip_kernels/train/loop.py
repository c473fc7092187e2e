"""Training, from a configuration to a folder of results."""

from __future__ import annotations

import contextlib
import json
import math
import time
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import smartclip_kernels as sk
from smartclip_kernels.grad_cache import GradCache
from smartclip_kernels.train import checkpoint, report
from smartclip_kernels.train.batches import Batch, batches
from smartclip_kernels.train.captions import DRAWS
from smartclip_kernels.train.config import Config
from smartclip_kernels.train.data import Source, UnreadableImageError, open_source
from smartclip_kernels.train.evaluation import Embedder, evaluate
from smartclip_kernels.train.model import ImageTower, Model, build, tokenizer_for


class NonFiniteError(RuntimeError):
    """The loss or its gradient is no number; the message says where, and what is left."""


def train(config: Config, *, quiet: bool = False) -> dict[str, float]:
    """Trains, evaluates and draws; returns the metrics, which are also in the run's folder."""
    out = prepare_folder(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    run = Run(config, out)
    with report.Progress(config, out, run.step, quiet=quiet) as progress:
        for batch in batches(run.source, config, run.step):
            started = time.perf_counter()
            progress.step(run.train_step(batch), len(batch.records), time.perf_counter() - started, batch.problems)
            if run.step % config.checkpoint_every == 0 or run.step == config.steps:
                run.save()
    embedder = Embedder(run.model, run.tokenize, run.source, config.device)
    metrics = evaluate(embedder) if run.source.records["eval"] else {}
    report.finish(config, out, embedder, metrics, quiet=quiet)
    return metrics


def prepare_folder(config: Config) -> Path:
    """The run's folder, with its configuration; refuses to mix two runs."""
    out = config.out or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{config.objective}-{config.captions}"
    out.mkdir(parents=True, exist_ok=True)
    theirs, wanted = out / "config.json", config.as_dict()
    if checkpoint.steps(out / "checkpoints"):
        if not config.resume:
            raise FileExistsError(f"out: {out} holds a run; go on with it by --resume, or name another folder")
        before = json.loads(theirs.read_text())
        free = {"resume", "out", "device", "threads"}
        differ = [f"{k}={before.get(k)}" for k in wanted if k not in free and before.get(k) != wanted[k]]
        if differ:
            raise ValueError(f"resume: {out} was started with other settings: {', '.join(differ)}")
    theirs.write_text(json.dumps(wanted, indent=1))
    return out


class Run:
    """All that training changes: model, optimiser and step. All else is a function of configuration and step."""

    def __init__(self, config: Config, out: Path) -> None:
        self.config, self.out, self.step = config, out, 0
        self.checkpoints = out / "checkpoints"
        self.source = open_source(config.data)
        if not self.source.records["train"]:
            raise ValueError(f"data.source: {config.data.source} has no image to train on")
        self.seed_step(-1)
        captions = [r.captions for r in self.source.records["train"]]
        tokenizer = tokenizer_for(config.model, [c.whole() for c in captions] + [s for c in captions for s in c.short])
        masks = config.mask if config.objective == "smartclip" else None
        self.model, self.tokenize = build(config.model, masks, config.data.image_size, DRAWS, tokenizer)
        tokenizer.save(str(out / "tokenizer.json"))
        self.model.to(config.device, torch.float64 if config.precision == "float64" else torch.float32)
        self.optimizer = optimizer_for(self.model, config)
        self.scaler = torch.amp.GradScaler(config.device, enabled=config.precision == "float16")
        self.cache = GradCache(
            [self.model.image] + [self.model.text] * DRAWS, config.chunk_size, self.loss, scaler=self.scaler
        )
        if found := checkpoint.newest(self.checkpoints):
            self.load(found)
        elif isinstance(tower := self.model.image.tower, ImageTower):
            tower.patches.look_at(sample(self.source, 512))

    def loss(self, image: Tensor, *texts_and_masks: Tensor | None, ids: list[Tensor]) -> Tensor:
        """The sum over an image's captions of the objective's loss, in (text, mask) pairs."""
        config = self.config
        total = torch.zeros((), dtype=torch.promote_types(image.dtype, torch.float32), device=image.device)
        for k in range(DRAWS):
            text, mask = texts_and_masks[2 * k : 2 * k + 2]
            assert text is not None  # only masks may be missing
            scale, bias = self.model.log_scale[k].exp(), self.model.bias[k]
            pairs: dict[str, Any] = {"image_ids": ids[k], "text_ids": ids[k], "backend": config.loss_backend}
            if config.objective == "clip":
                total = total + sk.clip_loss(image, text, scale, **pairs)
            elif config.objective == "siglip":
                total = total + sk.siglip_loss(image, text, scale, bias, **pairs)
            else:
                assert mask is not None  # a smartclip model has a head
                total = total + sk.smartclip_loss(image, text, mask, scale, **pairs)
                total = total + config.mask.sparsity * mask.mean(dtype=total.dtype)
        return total

    def train_step(self, batch: Batch) -> dict[str, float]:
        """One update; the numbers to log. Raises `NonFiniteError` before a bad gradient reaches the weights."""
        config = self.config
        rate = learning_rate(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        self.seed_step(self.step)
        texts = [
            {"tokens": self.tokenize(words).to(config.device), "long": long.to(config.device)}
            for words, long in zip(batch.texts, batch.long, strict=True)
        ]
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            loss = self.cache.cache_step(
                batch.images.to(config.device), *texts, ids=[ids.to(config.device) for ids in batch.ids]
            )
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        # The scaler of float16 skips steps of overflown gradients by itself.
        if not loss.isfinite() or not (norm.isfinite() or self.scaler.is_enabled()):
            self.stop(batch, loss.item(), norm.item())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.model.clamp_scale()
        self.step += 1
        scales = {f"scale {k}": x for k, x in enumerate(self.model.log_scale.detach().exp().tolist())}
        return {"step": self.step, "loss": loss.item(), "lr": rate, "gradient norm": norm.item(), **scales}

    def seed_step(self, step: int) -> None:
        """Random numbers (of dropout, of a mask head that explores) are a function of seed and step."""
        torch.manual_seed(self.config.seed * 1_000_003 + step + 1)

    def autocast(self) -> AbstractContextManager[Any]:
        if self.config.precision in ("bfloat16", "float16"):
            return torch.autocast(self.config.device, dtype=getattr(torch, self.config.precision))
        return nullcontext()

    def stop(self, batch: Batch, loss: float, norm: float) -> None:
        """Writes the batch down and gives up."""
        path = self.out / f"non-finite-step-{self.step}.json"
        rows = [[r.key, *texts] for r, *texts in zip(batch.records, *batch.texts, strict=True)]
        path.write_text(json.dumps({"step": self.step, "loss": loss, "gradient norm": norm, "batch": rows}, indent=1))
        last = checkpoint.steps(self.checkpoints)
        good = self.checkpoints / f"step-{last[-1]:08d}" if last else "none yet"
        raise NonFiniteError(
            f"step {self.step}: loss {loss}, gradient norm {norm}. The batch is in {path}; last good checkpoint: {good}"
        )

    def save(self) -> Path:
        state = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        return checkpoint.save(self.checkpoints, self.step, self.model, state)

    def load(self, found: checkpoint.Checkpoint) -> None:
        self.model.load_state_dict(found.weights)
        self.optimizer.load_state_dict(found.state["optimizer"])
        self.scaler.load_state_dict(found.state["scaler"])
        self.step = found.step


def sample(source: Source, n: int) -> Tensor:
    """Some training images, evenly spread."""
    records, images = source.records["train"], []
    for record in records[:: max(1, len(records) // n)]:
        with contextlib.suppress(UnreadableImageError):  # training will name it
            images.append(source.read(record))
    if not images:
        raise UnreadableImageError(f"none of {len(records)} training images that were tried can be read")
    return torch.stack(images)


def optimizer_for(model: Model, config: Config) -> torch.optim.Optimizer:
    """AdamW; gains, biases and the scale do not decay."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98))


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up, then half a cosine down to 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / max(1, config.steps - config.warmup)))
