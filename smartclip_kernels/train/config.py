"""Everything that a run depends on. tyro makes the command line of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

FREE = {"resume", "out", "device", "threads", "data.workers", "checkpoint_every", "log_every"}
"""Settings that do not change what a run computes: it may go on with others."""


@dataclass(frozen=True)
class DataConfig:
    """Which pairs."""

    source: str = "emoji"
    """emoji (in the package), a folder of images that holds captions.jsonl or captions.csv, or webdataset tars
    ("pairs-{000..007}.tar")"""
    image_size: int = 32
    """side of what the image tower sees, in pixels"""
    crop_scale: float = 0.7
    """training images are random crops of at least this share of the area; 1 turns them off"""
    held_out: float = 0.1
    """share of a folder's or a tar's images that is kept for evaluation (the emoji have their own split)"""
    evaluate_on: Literal["test", "val"] = "test"
    """emoji only; val is for choosing methods and trains on no more than test does"""
    workers: int = 0
    """processes (of each rank) that read and decode; 0 reads in the trainer's own"""


@dataclass(frozen=True)
class ModelConfig:
    """Which towers."""

    name: str = "small"
    """small (from scratch), or one of open_clip's: open_clip:ViT-B-32, open_clip:ViT-B-32/laion2b_s34b_b79k"""
    embed_dim: int = 512
    """D; open_clip models bring their own"""
    image_width: int = 192
    image_layers: int = 1
    patch: int = 8
    """pixels, an even number"""
    text_width: int = 64
    text_layers: int = 2
    tokens: Literal["word", "byte"] = "word"
    context: int = 32
    """tokens of a caption at most; what is beyond is cut"""
    initial_scale: float = 14.0
    initial_bias: float = -10.0
    """siglip, and smartclip with the sigmoid"""


@dataclass(frozen=True)
class MaskConfig:
    """The method's own part: only smartclip has it."""

    hard: bool = True
    """masks of 0 and 1 with a straight-through gradient, or soft ones"""
    initial_keep: float = 0.27
    """share of the dimensions that a mask passes at the start"""
    initial_std: float = 0.7
    """of the head's last weights at the start: large enough that texts begin with masks of their own"""
    long: bool = False
    """mask long captions too, or compare these, which tell all, with the whole embedding"""
    sparsity: float = 0.0
    """what a mask of ones adds to the loss"""


@dataclass(frozen=True)
class Config:
    """Train an image and a text tower on image–text pairs, through this library's losses and gradient caching."""

    objective: Literal["clip", "siglip", "smartclip"] = "smartclip"
    captions: Literal["short", "long", "mixed", "both"] = "both"
    """what is drawn for an image: see captions.py. "both": a long and a short one, each with a loss of its own"""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)

    batch_size: int = 2048
    """images the contrastive loss compares at once, of all ranks together"""
    chunk_size: int = 128
    """images the encoders see at once, of each rank"""
    steps: int = 110
    seed: int = 0

    lr: float = 4e-3
    warmup: int = 10
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    precision: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """bfloat16 and float16 by autocast; float16 needs a GPU"""
    device: str = "cpu"
    """cuda under torchrun: a GPU for each rank"""
    threads: int = 0
    """CPU threads; 0 leaves the choice to torch"""
    loss_backend: str | None = None
    """of the losses: "reference" is the naive implementation; default: the best there is"""

    strategy: Literal["gather", "ring"] = "gather"
    """how the ranks' embeddings meet: all at once, or block after block in less memory"""

    out: Path | None = None
    """folder of the run; default: runs/<time>-<objective>-<captions>"""
    resume: bool = False
    """go on from the newest checkpoint of `out`, if there is one"""
    checkpoint_every: int = 50
    """steps"""
    log_every: int = 1
    """steps"""

    def as_dict(self) -> dict[str, object]:
        """Plain values, as JSON holds them."""
        plain = dataclasses.asdict(self)
        plain["out"] = None if self.out is None else str(self.out)
        return plain

    def differences(self, before: Mapping[str, object]) -> list[str]:
        """What of another configuration, as `as_dict` gives it, makes a run another run."""

        def flat(settings: Mapping[str, object], prefix: str = "") -> dict[str, object]:
            parts = {f"{prefix}{k}": v for k, v in settings.items() if not isinstance(v, dict)}
            for name, inner in settings.items():
                if isinstance(inner, dict):
                    parts |= flat(inner, f"{prefix}{name}.")
            return parts

        theirs, ours = flat(before), flat(self.as_dict())
        return [f"{k}={theirs.get(k)}" for k in ours if k not in FREE and theirs.get(k) != ours[k]]
