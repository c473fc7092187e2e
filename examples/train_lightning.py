"""Lightning: a module with a fused loss over all processes, plain and with gradient caching: the same numbers.

    pip install 'smartclip-kernels[lightning]'
    python examples/train_lightning.py      # with a 2 behind it: two processes, the same numbers once more

The model is small, the pairs are made. With `group` the loss is that of the batch of all processes, and its gradients
are exact once averaged over them, as Lightning's ddp strategy does.
"""

import sys

import lightning
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import smartclip_kernels as sk

KINDS, BATCH, WIDTH = 64, 32, 64


class Clip(lightning.LightningModule):
    def __init__(self, chunk: int | None = None) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.text = nn.EmbeddingBag(KINDS + 1, WIDTH)
        self.log_scale = nn.Parameter(torch.tensor(2.66))
        self.chunk, self.automatic_optimization = chunk, chunk is None  # so many rows' activations are in memory
        self.losses: list[float] = []

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        group = distributed.group.WORLD if distributed.is_initialized() else None
        return sk.clip_loss(F.normalize(image), F.normalize(text), self.log_scale.exp(), group=group)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        if self.chunk is None:
            loss = self.loss(self.image(batch[0]), self.text(batch[1]))
        else:
            self.optimizers().zero_grad()
            loss = sk.GradCache([self.image, self.text], self.chunk, self.loss)(*batch)
            for x in self.parameters():  # which automatic optimization does by itself
                x.grad = self.trainer.strategy.reduce(x.grad, reduce_op="mean")
            self.optimizers().step()
        self.log("loss", loss, sync_dist=True)
        return loss

    def on_train_batch_end(self, *_: object) -> None:
        self.losses.append(self.trainer.callback_metrics["loss"].item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Noisy pictures of KINDS patterns, and captions that name them; each process takes its part of a batch."""
        generator = torch.Generator().manual_seed(0)
        kinds = torch.arange(1024) % KINDS
        images = torch.randn(KINDS, 3, 8, 8, generator=generator)[kinds]
        images += 0.5 * torch.randn(images.shape, generator=generator)
        pairs = TensorDataset(images, torch.stack([torch.full_like(kinds, KINDS), kinds], dim=1))
        sampler = DistributedSampler(pairs, self.trainer.world_size, self.trainer.global_rank)
        return DataLoader(pairs, BATCH // self.trainer.world_size, sampler=sampler)


def main(steps: int = 20, devices: int = 1) -> list[list[float]]:
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    modules = []
    for chunk in (None, 8):
        torch.manual_seed(0)
        modules.append(Clip(chunk))
        trainer = lightning.Trainer("cpu", "ddp" if devices > 1 else "auto", devices, max_steps=steps, **quiet)
        trainer.fit(modules[-1])
        if trainer.is_global_zero:
            print(f"chunks of {chunk}: {modules[-1].losses[0]:.5f} -> {modules[-1].losses[-1]:.5f}")
    return [module.losses for module in modules]


if __name__ == "__main__":
    main(devices=int((*sys.argv, "1")[1]))
