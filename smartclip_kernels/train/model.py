"""Two small towers from scratch, or those of an open_clip model, and what turns them into losses' inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
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


class Patches(nn.Module):
    """Images (N, 3, S, S) uint8 -> tokens (N, T, W), a patch each: its textures and its colours.

    A few thousand images do not teach a stem of random weights much, so this one starts from a sample (see `look_at`):
    textures are whitened pieces of its pictures, which stay as they are (Coates & Ng 2012, "Learning Feature
    Representations with K-means"), and every channel is standardised.
    """

    TEXTURES, COLOURS, PIECE = 192, 48, 5

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.texture = nn.Conv2d(3, self.TEXTURES, self.PIECE, 2, self.PIECE // 2).requires_grad_(False)
        self.colour = nn.Conv2d(3, self.COLOURS, 1)
        nn.init.normal_(self.colour.weight, std=2.0)
        nn.init.uniform_(self.colour.bias, -2.0, 2.0)  # type: ignore[arg-type]
        self.pixels, self.channels = Standardise(3), Standardise(self.TEXTURES + self.COLOURS)
        self.project = nn.Linear(self.TEXTURES + self.COLOURS, width)

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.project(self.channels(self.describe(images)).flatten(2).transpose(1, 2))
        return tokens

    def describe(self, images: Tensor) -> Tensor:
        """(N, C, S/patch, S/patch): how much of each texture and colour there is in each patch."""
        x = self.pixels(images.to(self.project.weight.dtype) / 255)
        textures = F.avg_pool2d(F.relu(self.texture(x)), self.patch // 2)
        colours = F.avg_pool2d(F.relu(self.colour(F.avg_pool2d(x, 2))), self.patch // 2)
        return torch.cat([textures, colours], dim=1)

    @torch.no_grad()
    def look_at(self, images: Tensor) -> None:
        """Fits textures, means and deviations to a sample of images, uint8 (N, 3, S, S)."""
        pixels = images.to(self.project.weight.dtype) / 255
        self.pixels.fit(pixels)
        pieces = F.unfold(self.pixels(pixels), self.PIECE, stride=3).transpose(1, 2).flatten(0, 1)
        mean = pieces.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov(pieces.T))
        whiten = vectors / (values.clamp(min=0) + 0.05).sqrt() @ vectors.T
        lengths = ((pieces - mean) @ whiten).norm(dim=1)
        lively = torch.where(lengths >= lengths.median())[0]  # the other half is mostly background
        chosen = lively[torch.randperm(len(lively))[: self.TEXTURES]]
        chosen = chosen.repeat(-(-self.TEXTURES // len(chosen)))[: self.TEXTURES]
        filters = F.normalize((pieces[chosen] - mean) @ whiten, dim=1) @ whiten
        self.texture.weight.copy_(filters.view_as(self.texture.weight))
        self.texture.bias.copy_(-filters @ mean - 0.7)  # type: ignore[union-attr]  # a threshold: few fire at a time
        self.channels.fit(self.describe(images))


class Standardise(nn.Module):
    """(N, C, …) -> the same with mean 0 and deviation 1 in each channel of the sample that it was fitted to."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    def fit(self, x: Tensor) -> None:
        self.mean.copy_(x.mean((0, 2, 3)).view_as(self.mean))
        self.std.copy_(x.std((0, 2, 3)).clamp(min=1e-3).view_as(self.std))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class ImageTower(nn.Module):
    """Images (N, 3, S, S) uint8 -> features (N, W): a vision transformer over patches."""

    def __init__(self, size: int, patch: int, width: int, layers: int) -> None:
        super().__init__()
        if patch < 2 or patch % 2 or size % patch:
            raise ValueError(f"model.patch: got {patch}, needs an even number of pixels that divides {size}")
        self.patches = Patches(patch, width)
        self.position = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images) + self.position
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
    """Tokens (M, T), and which texts are long (M,) -> unit embeddings (M, D) and, with a head, masks (M, D); else None.

    Where `mask_long` is False a long text's mask is all ones: it tells all, and meets the whole embedding.
    """

    def __init__(self, tower: nn.Module, projection: nn.Module, mask_head: MaskHead | None, mask_long: bool) -> None:
        super().__init__()
        self.tower, self.projection, self.mask_head, self.mask_long = tower, projection, mask_head, mask_long

    def forward(self, tokens: Tensor, long: Tensor) -> tuple[Tensor, Tensor | None]:
        features, states, padding = self.tower(tokens)
        text = F.normalize(self.projection(features), dim=1)
        if self.mask_head is None:
            return text, None
        mask = self.mask_head(states, padding)
        return text, mask if self.mask_long else torch.where(long[:, None], 1, mask)


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
        TextEncoder(text, nn.Linear(width, dim, bias=False), mask_head(masks, width, dim), masks is None or masks.long),
        config,
        draws,
    ), encode


def mask_head(masks: MaskConfig | None, width: int, dim: int) -> MaskHead | None:
    if masks is None:
        return None
    return MaskHead(
        width, dim, hard=masks.hard, initial_keep=masks.initial_keep, initial_std=masks.initial_std, depth=0
    )


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
    return Model(
        ImageEncoder(image, nn.Identity()),
        TextEncoder(text, nn.Identity(), head, masks is None or masks.long),
        config,
        draws,
    ), tokenize


def tokenizer_for(config: ModelConfig, texts: Iterable[str]) -> Tokenizer:
    return word_tokenizer(texts) if config.tokens == "word" else byte_tokenizer()
