"""A small forward + backward of every loss, for tools that make kernels slow: ``python -m bench.slice BACKEND…``."""

from __future__ import annotations

import itertools
import sys

import torch

from smartclip_kernels import reference, testing

SHAPES = [(256, 256, 128), (300, 200, 72)]
"""Whole blocks, and ragged ones in every dimension."""


def run(backend: str, device: str) -> int:
    """How many losses it computed and differentiated; none of the results may be NaN."""
    count = 0
    for (n, m, d), objective in itertools.product(SHAPES, reference.OBJECTIVES):
        for similarity in ("dot", "masked_cosine"):
            inputs = testing.make_inputs(
                n, m, d, similarity=similarity, objective=objective, bias=-1.0, dtype=torch.bfloat16, device=device
            )
            outputs = testing.evaluate(inputs, testing.fused_loss(backend)).values
            bad = [name for name, value in outputs.items() if not value.cpu().isfinite().all()]
            if bad:
                raise AssertionError(f"{backend}, {similarity}, {objective}, {n}×{m}×{d}: {', '.join(bad)} not finite")
            count += 1
    return count


if __name__ == "__main__":
    for backend in sys.argv[1:]:
        print(f"{backend}: {run(backend, 'cuda')} losses")
