"""What is measured on a GPU, the most important first, for a run may be cut off; and the bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bench.cases import Bar, Case
from bench.peers import REPLAYED

HUGE = 65536
HUGEST = 262144
SMALL, LARGE = (128, 256, 512, 1024, 2048), (4096, 16384, HUGE)
_OPEN_CLIP = ("open_clip", "open_clip-compiled")
_CLIP = Case("dot", "softmax", 0, dtype="bfloat16", device="cuda")
_SIGLIP = replace(_CLIP, objective="sigmoid")
_SMARTCLIP = replace(_CLIP, similarity="masked_cosine")
_SMARTCLIP_SIGMOID = replace(_SMARTCLIP, objective="sigmoid")


def cases_in_order() -> list[Case]:
    small = ("eager", *_OPEN_CLIP, "memeff", REPLAYED)
    masked = ("eager", "eager-compiled")
    return [
        replace(_CLIP, n=HUGE, peers=("memeff", "inf-cl", "eager", *_OPEN_CLIP)),
        replace(_SIGLIP, n=HUGE, d=768, peers=("siglip-kernel", "eager", *_OPEN_CLIP)),
        replace(_SMARTCLIP, n=HUGE, d=768, peers=masked),
        replace(_CLIP, n=HUGE, d=768, peers=("memeff", "inf-cl", "open_clip")),
        replace(_CLIP, n=1024, peers=small),
        replace(_CLIP, n=HUGE, d=1024, peers=("memeff", "inf-cl")),
        replace(_CLIP, n=4096, peers=("inf-cl", *small)),
        replace(_CLIP, n=256, peers=small),
        replace(_CLIP, n=16384, peers=("memeff", "inf-cl", "eager", *_OPEN_CLIP)),
        replace(_CLIP, n=128, peers=small),
        replace(_CLIP, n=2048, peers=small),
        replace(_CLIP, n=512, peers=small),
        replace(_CLIP, n=8, peers=("eager", "open_clip"), overhead=True),
        replace(_CLIP, n=HUGEST),
        replace(_SMARTCLIP, n=4096, d=768, peers=(*masked, REPLAYED)),
        replace(_SIGLIP, n=4096, d=768, peers=("siglip-kernel", "eager", *_OPEN_CLIP, REPLAYED)),
        replace(_SIGLIP, n=8, peers=("eager", "open_clip"), overhead=True),
        replace(_SMARTCLIP, n=8, peers=("eager",), overhead=True),
        replace(_SMARTCLIP, n=1024, d=768, peers=(*masked, REPLAYED)),
        replace(_SIGLIP, n=1024, d=768, peers=("siglip-kernel", "eager", *_OPEN_CLIP, REPLAYED)),
        replace(_SMARTCLIP, n=16384, d=768, peers=masked),
        replace(_SIGLIP, n=16384, d=768, peers=("siglip-kernel", "eager", *_OPEN_CLIP)),
        replace(_SMARTCLIP_SIGMOID, n=16384, d=768, peers=("eager",)),
        replace(_CLIP, n=131072, peers=("memeff",)),
        replace(_SMARTCLIP, n=512, peers=("eager", "literal")),
        replace(_CLIP, n=4096, dtype="float16", peers=("eager", "open_clip", "memeff")),
        replace(_CLIP, n=8192, dtype="float32", peers=("eager", "open_clip", "memeff")),
        replace(_SIGLIP, n=8192, dtype="float32", peers=("siglip-kernel", "eager")),
        replace(_SMARTCLIP, n=4096, dtype="float32", peers=("eager",)),
        replace(_SMARTCLIP_SIGMOID, n=HUGE, d=768),
    ]


def gpu_cases(backends: Sequence[str]) -> list[Case]:
    """Every case on every backend: the first against all peers, the others against those that their bars name."""
    cases = []
    for case in cases_in_order():
        for backend in backends:
            named = {bar.what for bar in GPU_BARS.get(backend, []) if (bar.loss, bar.n, bar.d) == key(case)}
            peers = tuple(peer for peer in case.peers if backend == backends[0] or peer in {*named, REPLAYED})
            cases.append(replace(case, backend=backend, peers=peers))
    return cases


def key(case: Case) -> tuple[str, int, int]:
    return case.loss, case.n, case.d


def gpu_quick_cases(backends: Sequence[str], device: str) -> list[Case]:
    """A smoke test: every loss, small, with peers that may be missing."""
    clip = Case("dot", "softmax", 64, d=32, dtype="bfloat16", device=device)
    cases = [
        replace(clip, peers=("eager", "open_clip", "memeff", "inf-cl", *([REPLAYED] if device == "cuda" else []))),
        replace(clip, objective="sigmoid", peers=("eager", "siglip-kernel")),
        replace(clip, similarity="masked_cosine", peers=("eager",)),
        replace(clip, similarity="masked_cosine", objective="sigmoid", dtype="float32", peers=("eager",)),
        replace(clip, n=8, peers=("eager",), overhead=True),
    ]
    return [replace(case, backend=backend) for case in cases for backend in backends]


def memory_bar(case: Case) -> float:
    """MiB beyond inputs and gradients (DESIGN, section 4): the workspace, 64 bytes per row and column, a float32 sum of
    every column-side gradient, of the image's too in a single sweep, a prepared copy of masked operands, and slack."""
    masked, single = case.similarity != "dot", case.objective == "sigmoid"
    size = case.n * case.d / 2**20
    sums = 4 * size * ((2 if masked else 1) + (1 if single else 0))
    copies = 2 * size * (3 if masked else 0)
    return 256 + 64 * 2 * case.n / 2**20 + sums + copies + 32


def _bars(backend: str, *bars: tuple[str, int, int, str, float]) -> list[Bar]:
    return [Bar(loss, n, what, value, d=d, dtype="bfloat16", backend=backend) for loss, n, d, what, value in bars]


def _memory(backend: str) -> list[Bar]:
    cases = [replace(_CLIP, n=HUGE), *(replace(case, n=HUGE, d=768) for case in (_CLIP, _SIGLIP, _SMARTCLIP))]
    return _bars(backend, *((case.loss, case.n, case.d, "memory", memory_bar(case)) for case in cases))


GPU_BARS = {
    "cuda": [
        *_bars("cuda", *(("clip", HUGE, d, "forward floor", 0.80) for d in (512, 768, 1024))),
        *_bars("cuda", *(("clip", HUGE, d, "floor", 0.70) for d in (512, 768, 1024))),
        *_bars("cuda", *(("clip", n, 512, "memeff", 3.0) for n in LARGE)),
        *_bars("cuda", *(("clip", n, 512, "inf-cl", 10.0) for n in LARGE)),
        *_bars("cuda", *(("clip", n, 512, peer, 1.5) for n in LARGE for peer in _OPEN_CLIP)),
        *_bars("cuda", *(("clip", n, 512, peer, 1.0) for n in SMALL for peer in _OPEN_CLIP)),
        *_bars("cuda", ("siglip", HUGE, 768, "floor", 0.70), ("siglip", HUGE, 768, "siglip-kernel", 1.4)),
        *_bars("cuda", ("smartclip", HUGE, 768, "floor", 0.65), ("clip", HUGEST, 512, "runs", 1.0)),
        *_memory("cuda"),
    ],
    "triton": [
        *_bars("triton", ("clip", HUGE, 768, "floor", 0.55), ("clip", HUGE, 512, "memeff", 2.0)),
        *_bars("triton", ("clip", HUGE, 768, "inf-cl", 6.0), ("siglip", HUGE, 768, "floor", 0.60)),
        *_bars("triton", ("siglip", HUGE, 768, "siglip-kernel", 1.0), ("smartclip", HUGE, 768, "floor", 0.50)),
        *_bars("triton", ("clip", 1024, 512, "eager", 1.0)),
        *_memory("triton"),
    ],
    # The code for sm_80 of backend cuda, on a newer chip.
    "sm_80": [
        *_bars("cuda", ("clip", HUGE, 512, "floor", 0.45)),
        *_bars("cuda", *(("clip", n, 512, "open_clip", 1.0) for n in (*SMALL[1:], *LARGE))),
        *_bars("cuda", *(("clip", HUGE, 512, peer, 1.0) for peer in ("memeff", "inf-cl"))),
    ],
}
