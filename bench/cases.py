"""What is measured: similarity × objective × N × D × dtype × backend, as data, and the bars to hold the results to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

# Floating-point operations of forward + backward in units of N·M·D; one matrix product is 2. A softmax computes its
# scores twice, for the statistics and for the gradients; the masked cosine needs two products where the dot needs one.
FLOOR_NMD = {
    ("dot", "softmax"): 8,
    ("dot", "sigmoid"): 6,
    ("masked_cosine", "softmax"): 16,
    ("masked_cosine", "sigmoid"): 12,
}
FORWARD_NMD = {"dot": 2, "masked_cosine": 4}
LOSS_NAMES = {
    ("dot", "softmax"): "clip",
    ("dot", "sigmoid"): "siglip",
    ("masked_cosine", "softmax"): "smartclip",
    ("masked_cosine", "sigmoid"): "smartclip-sigmoid",
}
POSITIVE_COSINE = 0.2
"""Between an image and its own text, as a trained CLIP has it; unrelated pairs are around 0 ± 1/√D."""


@dataclass(frozen=True)
class Case:
    """One batch of N images and N texts: which loss, how large, who computes it, against whom."""

    similarity: Literal["dot", "masked_cosine"]
    objective: Literal["softmax", "sigmoid"]
    n: int
    peers: tuple[str, ...] = ()
    d: int = 512
    dtype: str = "float32"
    backend: str = "cpu"
    device: str = "cpu"
    overhead: bool = False  # the time of the caller is measured, not the device's: what launching alone takes
    timed: bool = True
    memory: bool = False  # peak memory is measured: ours, and that of
    memory_of: tuple[str, ...] = ()  # these peers
    left_out: tuple[tuple[str, str], ...] = ()  # peer, why it does not run at this size

    @property
    def loss(self) -> str:
        return LOSS_NAMES[self.similarity, self.objective]

    @property
    def floor_name(self) -> str:
        return f"{FLOOR_NMD[self.similarity, self.objective]}NMD"

    @property
    def floor_operations(self) -> float:
        """Of forward + backward, with the scores computed twice where the objective needs statistics."""
        return float(FLOOR_NMD[self.similarity, self.objective]) * self.n * self.n * self.d

    @property
    def forward_operations(self) -> float:
        return float(FORWARD_NMD[self.similarity]) * self.n * self.n * self.d

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def scale(self) -> float:
        """CLIP's initial temperature for small batches, its clamp for large ones: verification sees both."""
        return 100.0 if self.n >= 1024 else 1 / 0.07

    @property
    def bias(self) -> float | None:
        """A sigmoid's, such that most pairs are told apart and many are not."""
        return -0.13 * self.scale if self.objective == "sigmoid" else None

    def __str__(self) -> str:
        return f"{self.loss}-{self.n}x{self.d}-{self.dtype}"


@dataclass(frozen=True)
class Inputs:
    """The arguments of a loss, all of them leaves that require a gradient. `mask` and `bias` may be absent."""

    image: Tensor
    text: Tensor
    mask: Tensor | None
    scale: Tensor
    bias: Tensor | None

    def named(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def leaves(self) -> list[Tensor]:
        return list(self.named().values())


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Unit rows, texts correlated with their images, hard masks of about half the dimensions."""
    device = torch.device(case.device)
    generator = torch.Generator(device).manual_seed(seed)
    image = F.normalize(torch.randn(case.n, case.d, generator=generator, device=device), dim=1)
    noise = F.normalize(torch.randn(case.n, case.d, generator=generator, device=device), dim=1)
    text = F.normalize(POSITIVE_COSINE * image + (1 - POSITIVE_COSINE**2) ** 0.5 * noise, dim=1)
    mask = None
    if case.similarity == "masked_cosine":
        chance = torch.rand(case.n, case.d, generator=generator, device=device)
        mask = (chance < 0.5).to(case.torch_dtype).requires_grad_()
    return Inputs(
        image=image.to(case.torch_dtype).requires_grad_(),
        text=text.to(case.torch_dtype).requires_grad_(),
        mask=mask,
        scale=torch.tensor(case.scale, device=device, requires_grad=True),
        bias=None if case.bias is None else torch.tensor(case.bias, device=device, requires_grad=True),
    )


@dataclass(frozen=True)
class Bar:
    """A figure to reach: `what` is a peer (how many times as fast), "floor" or "forward floor" (a fraction), "memory"
    (MiB at most), or "runs" (1: it does)."""

    loss: str
    n: int
    what: str
    value: float
    d: int = 512
    dtype: str = "float32"
    backend: str = "cpu"


_EAGER = ("eager", "open_clip")
_ALL = (*_EAGER, "eager-compiled", "open_clip-compiled")
_TOO_LONG = "left out to save time: at this size open_clip's loss, and it compiled, stand for the formula"
_HUGE = 32768


def cpu_cases() -> list[Case]:
    """All that `python -m bench cpu` runs; about 20 minutes on two cores."""
    clip = Case("dot", "softmax", 0)
    siglip = Case("dot", "sigmoid", 0)
    smartclip = Case("masked_cosine", "softmax", 0)
    masked = ("eager", "eager-compiled")
    return [
        replace(clip, n=8, peers=_EAGER),  # nothing but the overhead of a call
        replace(clip, n=128, peers=_EAGER),
        replace(clip, n=256, peers=_EAGER),
        replace(clip, n=512, peers=_ALL),
        replace(clip, n=1024, peers=_EAGER),
        replace(clip, n=2048, peers=_ALL, memory=True, memory_of=_ALL),
        replace(clip, n=4096, peers=_EAGER),
        replace(clip, n=8192, peers=_ALL, memory=True, memory_of=_ALL),
        replace(
            clip,
            n=16384,
            peers=("open_clip", "open_clip-compiled"),
            left_out=(("eager", _TOO_LONG), ("eager-compiled", _TOO_LONG)),
        ),
        replace(clip, n=_HUGE, timed=False, memory=True, memory_of=("open_clip",)),
        replace(siglip, n=8, peers=_EAGER),
        replace(siglip, n=512, peers=_EAGER),
        replace(siglip, n=2048, peers=_ALL, memory=True, memory_of=_EAGER),
        replace(siglip, n=8192, peers=_ALL, memory=True, memory_of=_ALL),
        replace(siglip, n=_HUGE, timed=False, memory=True),
        replace(smartclip, n=8, peers=("eager",)),
        replace(smartclip, n=512, peers=(*masked, "literal"), memory=True, memory_of=("eager", "literal")),
        replace(smartclip, n=2048, peers=masked, memory=True, memory_of=masked),
        replace(smartclip, n=8192, peers=masked, memory=True, memory_of=masked),
        replace(smartclip, n=_HUGE, timed=False, memory=True),
        replace(smartclip, objective="sigmoid", n=2048, peers=("eager",)),
    ]


def quick_cases() -> list[Case]:
    """A smoke test: every loss, small, within seconds."""
    return [
        Case("dot", "softmax", 96, _EAGER, d=64, memory=True, memory_of=("eager",)),
        Case("dot", "sigmoid", 96, _EAGER, d=64),
        Case("masked_cosine", "softmax", 96, ("eager", "literal"), d=64),
        Case("masked_cosine", "sigmoid", 64, ("eager",), d=64),
    ]


def memory_bar(n: int) -> float:
    """MiB beyond inputs and gradients: the workspace, 64 bytes per row and column, and the allocator's slack."""
    return 64 + 64 * (n + n) / 2**20 + 32


CPU_BARS = [
    *(Bar("clip", n, "floor", 0.80) for n in (8192, 16384)),
    *(Bar("clip", n, "open_clip", 2.2) for n in (8192, 16384)),
    *(Bar("clip", n, "open_clip-compiled", 1.35) for n in (8192, 16384)),
    *(Bar("clip", n, peer, 1.0) for n in (128, 256, 512, 1024, 2048, 4096) for peer in _EAGER),
    Bar("siglip", 8192, "floor", 0.75),
    Bar("siglip", 8192, "open_clip", 1.8),
    Bar("smartclip", 8192, "floor", 0.70),
    Bar("smartclip", 512, "literal", 20.0),
    *(Bar(loss, _HUGE, "memory", memory_bar(_HUGE)) for loss in ("clip", "siglip", "smartclip")),
]
