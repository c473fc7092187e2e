"""SmartCLIP from an open_clip model: a mask head, a short fine-tune, retrieval by masked similarity.

    pip install 'smartclip-kernels[open_clip]'
    python examples/finetune_smartclip.py

Pictures are made of two patterns side by side, and a caption names one of them: it speaks of a part of its picture. The
model is small and of random weights, so that this runs anywhere in seconds; one of open_clip's is
``open_clip.create_model(name, pretrained=…)``.
"""

import tempfile
from pathlib import Path

import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

import smartclip_kernels as sk
from smartclip_kernels.integrations.smartclip import attach_mask_head, encode_text_with_mask, save_mask_head

KINDS, BATCH, CONTEXT = 12, 64, 4
PATTERNS = torch.randn(2, KINDS, 3, 32, 16, generator=torch.Generator().manual_seed(1))


def made_pairs(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures of two halves, captions of one: what half, which pattern, and an end; images of the same caption."""
    halves = torch.randint(KINDS, (BATCH, 2), generator=generator)
    images = torch.cat([PATTERNS[0, halves[:, 0]], PATTERNS[1, halves[:, 1]]], dim=3)
    images = images + 0.3 * torch.randn(images.shape, generator=generator)
    side = torch.arange(BATCH) % 2
    kind = halves[torch.arange(BATCH), side]
    texts = torch.stack([KINDS + side, kind, torch.full_like(kind, KINDS + 2)], dim=1)
    fits = halves[None, :, :].expand(BATCH, -1, -1).gather(2, side[:, None, None].expand(-1, BATCH, 1)).squeeze(2)
    return images, torch.nn.functional.pad(texts, (0, CONTEXT - 3)), fits == kind[:, None]


def precision(model: CLIP, generator: torch.Generator) -> float:
    """How often the picture that a caption finds has what it names."""
    images, texts, fits = made_pairs(generator)
    with torch.no_grad():
        image = model.encode_image(images, normalize=True)
        text, mask = encode_text_with_mask(model, texts)
    _, best = sk.masked_topk(image, text, mask, k=1)
    return fits.gather(1, best).float().mean().item()


def main(steps: int = 60) -> tuple[float, float]:
    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=2, width=64, head_width=32, patch_size=8, image_size=32)
    text = CLIPTextCfg(context_length=CONTEXT, vocab_size=KINDS + 3, width=64, heads=2, layers=1)
    model = attach_mask_head(CLIP(64, vision, text, output_dict=True))
    loss_fn = sk.SmartClipLoss(sparsity_weight=0.1)
    head = list(model.mask_head.parameters())  # new, where the towers are not: a larger step
    towers = [x for name, x in model.named_parameters() if not name.startswith("mask_head.")]
    optimizer = torch.optim.AdamW([{"params": towers}, {"params": head, "lr": 1e-2}], lr=2e-3)
    generator = torch.Generator().manual_seed(2)
    before = precision(model, generator)
    for step in range(steps):
        images, texts, _ = made_pairs(generator)
        terms = loss_fn(**model(images, texts), output_dict=True)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}:", {name: round(term.item(), 3) for name, term in terms.items()})
    after = precision(model, generator)
    with tempfile.TemporaryDirectory() as directory:
        save_mask_head(model, Path(directory) / "mask_head.safetensors")
    print(f"captions that find what they name: {before:.2f} before, {after:.2f} after")
    return before, after


if __name__ == "__main__":
    main()
