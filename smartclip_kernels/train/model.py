"""Two small towers from scratch, or those of an open_clip model, and what turns them into losses' inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from smartclip_kernels.modules import MaskHead
from smartclip_kernels.train.captions import PAD, Encoder, byte_tokenizer, word_tokenizer
from smartclip_kernels.train.config import MaskConfig, ModelConfig

HEAD_WIDTH = 32
MAX_LOG_SCALE = math.log(100)

Tokenize = Callable[[Sequence[str]], Tensor]


class Block(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """x (B, T, W); keep (B, T) bool, False at padding."""
        query, key, value = (
            self.qkv(self.attention_norm(x)).unflatten(2, (3, self.heads, HEAD_WIDTH)).permute(2, 0, 3, 1, 4).unbind()
        )
        allowed = None if keep is None else keep[:, None, None, :]
        read = F.scaled_dot_product_attention(query, key, value, allowed)
        x = x + self.out(read.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class ImageTower(nn.Module):
    """Images (N, 3, S, S) uint8 -> features (N, W): convolutions make the patches, a transformer reads them.

    The first convolution starts as the sample's principal components, whitened, with both signs (see `look_at`): on few
    steps that is worth half as many again. The others start as He et al. 2015 (arXiv 1502.01852) and without biases:
    with torch's own start all pictures look alike, and the first epochs are lost.
    """

    COMPONENTS, KERNEL = 24, 4
    mean: Tensor
    std: Tensor

    def __init__(self, size: int, patch: int, width: int, layers: int) -> None:
        super().__init__()
        halvings = patch.bit_length() - 1
        if patch < 2 or 2**halvings != patch or size % patch:
            raise ValueError(f"model.patch: got {patch}, needs a power of two from 2 up that divides {size} pixels")
        channels = 2 * self.COMPONENTS
        stem: list[nn.Module] = [nn.Conv2d(3, channels, self.KERNEL, 2, 1), nn.GELU("tanh")]
        for _ in range(halvings - 2):
            stem += [nn.Conv2d(channels, channels, 3, 2, 1), nn.GELU("tanh")]
        stem.append(nn.Conv2d(channels, width, 3, 2, 1) if halvings > 1 else nn.Conv2d(channels, width, 1))
        self.stem = nn.Sequential(*stem)
        for layer in self.stem:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.position = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.register_buffer("std", torch.ones(3, 1, 1))

    @torch.no_grad()
    def look_at(self, images: Tensor) -> None:
        """Fits channels' mean and deviation, and the first convolution, to a sample of images, uint8 (N, 3, S, S)."""
        pixels = images.to(self.mean.dtype) / 255
        self.mean.copy_(pixels.mean((0, 2, 3)).view(3, 1, 1))
        self.std.copy_(pixels.std((0, 2, 3)).clamp(min=1e-3).view(3, 1, 1))
        patches = F.unfold((pixels - self.mean) / self.std, self.KERNEL, stride=2).transpose(1, 2).flatten(0, 1)
        values, vectors = torch.linalg.eigh(torch.cov(patches.T))
        whitened = (vectors / (values + 0.05).sqrt()).T.flip(0)[: self.COMPONENTS]
        first = next(self.stem.children())
        assert isinstance(first, nn.Conv2d)
        first.weight.copy_(torch.cat([whitened, -whitened]).view_as(first.weight))

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.to(self.position.dtype) / 255
        x = self.stem((pixels - self.mean) / self.std).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        return self.norm(x.mean(1))


class TextTower(nn.Module):
    """Tokens (M, T) -> features (M, W), token states (M, T, W) and which tokens are padding (M, T)."""

    def __init__(self, vocabulary: int, context: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.position = nn.Parameter(0.01 * torch.randn(context, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keep = tokens != PAD
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, keep)
        x = self.norm(x)
        share = keep.to(x.dtype) / keep.sum(1, keepdim=True)
        return torch.einsum("mtw,mt->mw", x, share), x, ~keep


class OpenClipImage(nn.Module):
    """An open_clip image tower behind uint8 images: (N, 3, S, S) -> (N, D)."""

    mean: Tensor
    std: Tensor

    def __init__(self, visual: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.visual = visual
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.visual((images.to(self.mean.dtype) / 255 - self.mean) / self.std)
        return features


class OpenClipText(nn.Module):
    """An open_clip text tower: tokens (M, T) -> features (M, D), token states (M, T, W), padding (M, T)."""

    def __init__(self, text: Any) -> None:
        super().__init__()
        text.output_tokens = True
        self.text = text

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features, states = self.text(tokens)
        return features, states, tokens[:, : states.shape[1]] == getattr(self.text, "pad_id", 0)


class ImageEncoder(nn.Module):
    """Images -> unit embeddings (N, D)."""

    def __init__(self, tower: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.tower, self.projection = tower, projection

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.projection(self.tower(images)), dim=1)


class TextEncoder(nn.Module):
    """Tokens -> unit embeddings (M, D) and, with a head, masks (M, D); else None."""

    def __init__(self, tower: nn.Module, projection: nn.Module, mask_head: MaskHead | None) -> None:
        super().__init__()
        self.tower, self.projection, self.mask_head = tower, projection, mask_head

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        features, states, padding = self.tower(tokens)
        mask = None if self.mask_head is None else self.mask_head(states, padding)
        return F.normalize(self.projection(features), dim=1), mask


class Model(nn.Module):
    """Both encoders, and a scale and a bias for each of an image's captions in a step."""

    def __init__(self, image: ImageEncoder, text: TextEncoder, config: ModelConfig, draws: int) -> None:
        super().__init__()
        self.image, self.text = image, text
        self.log_scale = nn.Parameter(torch.full((draws,), math.log(config.initial_scale)))
        self.bias = nn.Parameter(torch.full((draws,), config.initial_bias))

    @torch.no_grad()
    def clamp_scale(self) -> None:
        self.log_scale.clamp_(max=MAX_LOG_SCALE)


def build(
    config: ModelConfig, masks: MaskConfig | None, image_size: int, draws: int, tokenizer: Tokenizer
) -> tuple[Model, Tokenize]:
    """The model, its parameters drawn from torch's generator, and what makes its tokens.

    `masks` is None for objectives without; `tokenizer` is what small towers read (open_clip brings its own).
    """
    if config.name.startswith("open_clip:"):
        return _open_clip(config, masks, image_size, draws)
    if config.name != "small":
        raise ValueError(f'model.name: got "{config.name}", needs "small" or "open_clip:ARCHITECTURE[/WEIGHTS]"')
    for field in ("image_width", "text_width"):
        if getattr(config, field) % HEAD_WIDTH:
            raise ValueError(f"model.{field}: got {getattr(config, field)}, needs a multiple of {HEAD_WIDTH}")
    encode = Encoder(tokenizer, config.context)
    image = ImageTower(image_size, config.patch, config.image_width, config.image_layers)
    text = TextTower(encode.size, config.context, config.text_width, config.text_layers)
    width, dim = config.text_width, config.embed_dim
    return Model(
        ImageEncoder(image, nn.Linear(config.image_width, dim, bias=False)),
        TextEncoder(text, nn.Linear(width, dim, bias=False), mask_head(masks, width, dim)),
        config,
        draws,
    ), encode


def mask_head(masks: MaskConfig | None, width: int, dim: int) -> MaskHead | None:
    if masks is None:
        return None
    return MaskHead(width, dim, hard=masks.hard, initial_keep=masks.initial_keep)


def _open_clip(config: ModelConfig, masks: MaskConfig | None, image_size: int, draws: int) -> tuple[Model, Tokenize]:
    try:
        import open_clip
    except ImportError as error:
        raise RuntimeError(f"model.name: {config.name} needs open_clip; pip install open_clip_torch") from error
    name, _, weights = config.name.removeprefix("open_clip:").partition("/")
    clip: Any = open_clip.create_model(name, pretrained=weights or None, force_custom_text=True)
    sizes = clip.visual.image_size
    if image_size not in (sizes if isinstance(sizes, tuple) else (sizes,)):
        raise ValueError(f"data.image_size: got {image_size}, {name} needs {sizes}")
    preprocess = clip.visual.preprocess_cfg
    image, text = OpenClipImage(clip.visual, preprocess["mean"], preprocess["std"]), OpenClipText(clip.text)
    features, states, _ = text(torch.zeros(1, clip.context_length, dtype=torch.int64))
    head = mask_head(masks, states.shape[2], features.shape[1])
    tokenize = open_clip.get_tokenizer(name, context_length=clip.context_length)
    return Model(ImageEncoder(image, nn.Identity()), TextEncoder(text, nn.Identity(), head), config, draws), tokenize


def tokenizer_for(config: ModelConfig, texts: Sequence[str]) -> Tokenizer:
    return word_tokenizer(texts) if config.tokens == "word" else byte_tokenizer()
