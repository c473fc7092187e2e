"""What training changes, step by step: model, optimiser and checkpoint; and how a run ends early."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import smartclip_kernels as sk
from smartclip_kernels.grad_cache import GradCache
from smartclip_kernels.train import checkpoint
from smartclip_kernels.train.batches import Batch
from smartclip_kernels.train.captions import DRAWS
from smartclip_kernels.train.config import Config
from smartclip_kernels.train.data import Source, UnreadableImageError, open_source
from smartclip_kernels.train.model import ImageTower, Model, build, tokenizer_for
from smartclip_kernels.train.ranks import Ranks


class StoppedError(RuntimeError):
    """A run that cannot go on; the message says at which step, why, and what is left."""


class NonFiniteError(StoppedError):
    """The loss or its gradient is no number; the batch is written down."""


class Run:
    """All that training changes: model, optimiser and step. All else is a function of configuration and step."""

    def __init__(self, config: Config, out: Path, ranks: Ranks | None = None) -> None:
        self.config, self.out, self.step = config, out, 0
        self.ranks = ranks or Ranks()
        self.checkpoints = out / "checkpoints"
        found = self.ranks.from_first(self.find)
        self.source = open_source(config.data)
        train = self.source.records["train"]
        if not train:
            raise ValueError(f"data.source: {config.data.source} has no image to train on")
        self.seed_step(-1)
        tokenizer = tokenizer_for(
            config.model, (text for r in train for text in (r.captions.whole(), *r.captions.short))
        )
        words = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
        self.data = {"training images": len(train), "words": words}
        masks = config.mask if config.objective == "smartclip" else None
        self.model, self.tokenize = build(config.model, masks, config.data.image_size, DRAWS, tokenizer)
        if self.ranks.first:
            tokenizer.save(str(out / "tokenizer.json"))
        self.model.to(config.device, torch.float64 if config.precision == "float64" else torch.float32)
        self.optimizer = optimizer_for(self.model, config)
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=config.precision == "float16")
        self.cache = GradCache(
            [self.model.image] + [self.model.text] * DRAWS, config.chunk_size, self.loss, scaler=self.scaler
        )
        if found:
            self.load(found)
        elif isinstance(tower := self.model.image.tower, ImageTower):
            tower.patches.look_at(sample(self.source, 512))
        self.ranks.share_state(self.model)

    def find(self) -> checkpoint.Checkpoint | None:
        """The checkpoint to go on from, which has to be this configuration's."""
        found = checkpoint.newest(self.checkpoints)
        if found and (differ := self.config.differences(found.state["config"])):
            raise ValueError(f"resume: {found.path} was made with other settings: {', '.join(differ)}")
        return found

    def loss(
        self, image: Tensor, *texts_and_masks: Tensor | None, ids: list[Tensor], image_ids: Tensor, share: float
    ) -> Tensor:
        """The sum over an image's captions of the objective's loss, in (text, mask) pairs.

        ids: of each caption, equal for what is alike. An image that the batch holds twice, `image_ids` tell, is neither
        positive nor negative for the other one's caption. share: this rank's images over the ranks' mean.
        """
        config = self.config
        total = torch.zeros((), dtype=torch.promote_types(image.dtype, torch.float32), device=image.device)
        common: dict[str, Any] = {"ignore_ids": (image_ids, image_ids), "backend": config.loss_backend}
        if self.ranks.group is not None:
            common |= {"group": self.ranks.group, "strategy": config.strategy}
        for k in range(DRAWS):
            text, mask = texts_and_masks[2 * k : 2 * k + 2]
            assert text is not None  # only masks may be missing
            scale, bias = self.model.log_scale[k].exp(), self.model.bias[k]
            pairs = {"image_ids": ids[k], "text_ids": ids[k], **common}
            if config.objective == "clip":
                total = total + sk.clip_loss(image, text, scale, **pairs)
            elif config.objective == "siglip":
                total = total + sk.siglip_loss(image, text, scale, bias, **pairs)
            else:
                assert mask is not None  # a smartclip model has a head
                total = total + sk.smartclip_loss(image, text, mask, scale, **pairs)
                total = total + share * config.mask.sparsity * mask.mean(dtype=total.dtype)
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
                batch.images.to(config.device),
                *texts,
                ids=[ids.to(config.device) for ids in batch.ids],
                image_ids=batch.image_ids.to(config.device),
                share=len(batch.records) * self.ranks.world / batch.n_images,
            )
        loss = self.ranks.average_gradients(list(self.model.parameters()), loss)
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
        """Random numbers (of dropout, of a mask head that explores) are a function of seed, step and, where ranks have
        started from the same weights, rank."""
        rank = self.ranks.rank if step >= 0 else 0
        torch.manual_seed(self.config.seed * 1_000_003 + step + 1 + rank * 1_000_000_007)

    def autocast(self) -> AbstractContextManager[Any]:
        if self.config.precision in ("bfloat16", "float16"):
            return torch.autocast(self.device_type, dtype=getattr(torch, self.config.precision))
        return nullcontext()

    @property
    def device_type(self) -> str:
        return torch.device(self.config.device).type

    def stop(self, batch: Batch, loss: float, norm: float) -> None:
        """Writes the batch down, of all ranks, and gives up."""
        path = self.out / f"non-finite-step-{self.step}.json"
        own = [[r.key, *texts] for r, *texts in zip(batch.records, *batch.texts, strict=True)]
        rows = [row for rows in self.ranks.gather(own) for row in rows]
        if self.ranks.first:
            said = {"step": self.step, "loss": loss, "gradient norm": norm, "batch": rows}
            path.write_text(json.dumps(said, indent=1))
        raise NonFiniteError(
            f"step {self.step}: loss {loss}, gradient norm {norm}. The batch is in {path}; {self.last_good()}"
        )

    @contextmanager
    def what_is_left(self) -> Iterator[None]:
        """A full disk or a dead reader ends the run with the step and the last good checkpoint named."""
        try:
            yield
        except OSError as error:
            raise StoppedError(f"step {self.step}: {error}, in {self.out}; {self.last_good()}") from error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise StoppedError(f"step {self.step}: {error} Or fewer --data.workers; {self.last_good()}") from error

    def last_good(self) -> str:
        last = checkpoint.steps(self.checkpoints)
        return f"last good checkpoint: {self.checkpoints / f'step-{last[-1]:08d}' if last else 'none yet'}"

    def save(self) -> Path:
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "config": self.config.as_dict(),
            "data": self.data,
        }
        return checkpoint.save(self.checkpoints, self.step, self.model, state)

    def load(self, found: checkpoint.Checkpoint) -> None:
        differ = [
            f"{name}: got {value}, was {found.state['data'][name]}"
            for name, value in self.data.items()
            if value != found.state["data"][name]
        ]
        if differ:
            raise ValueError(f"resume: {self.config.data.source} has changed since {found.path}: {'; '.join(differ)}")
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
