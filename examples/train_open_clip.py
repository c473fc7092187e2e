"""open_clip with its own loss, then with the fused one in its place: the same numbers, from one more line.

    pip install 'smartclip-kernels[open_clip]'
    python examples/train_open_clip.py

The model is small and the pairs are made, so that it runs anywhere in seconds. In a training script of yours only
`fast.patch()` is new; open_clip's trainer, too, takes it before its `main`.
"""

from types import SimpleNamespace

import open_clip
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

from smartclip_kernels.integrations import open_clip as fast

KINDS, BATCH, CONTEXT = 64, 32, 8


def made_pairs(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy pictures of KINDS patterns, and captions that name them."""
    patterns = torch.randn(KINDS, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    kind = torch.randperm(KINDS, generator=generator)[:BATCH]
    images = patterns[kind] + 0.5 * torch.randn(BATCH, 3, 32, 32, generator=generator)
    start, end = torch.full_like(kind, KINDS), torch.full_like(kind, KINDS + 1)
    return images, torch.nn.functional.pad(torch.stack([start, kind, end], dim=1), (0, CONTEXT - 3))


def train(steps: int) -> list[float]:
    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=2, width=64, head_width=32, patch_size=8, image_size=32)
    text = CLIPTextCfg(context_length=CONTEXT, vocab_size=KINDS + 2, width=64, heads=2, layers=2)
    model = CLIP(64, vision, text, output_dict=True)
    single = {"rank": 0, "world_size": 1, "local_loss": False, "gather_with_grad": False, "horovod": False}
    loss_fn = open_clip.create_loss(SimpleNamespace(model="tiny", distill=False, siglip=False, **single))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator, losses = torch.Generator().manual_seed(2), []
    for _ in range(steps):
        images, texts = made_pairs(generator)
        loss = loss_fn(**model(images, texts), output_dict=True)["contrastive_loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"{type(loss_fn).__module__}.{type(loss_fn).__name__}: {losses[0]:.5f} -> {losses[-1]:.5f}")
    return losses


def main(steps: int = 20) -> tuple[list[float], list[float]]:
    before = train(steps)
    with fast.patch():
        after = train(steps)
    return before, after


if __name__ == "__main__":
    main()
