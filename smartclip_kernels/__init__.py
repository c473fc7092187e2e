"""Fused kernels for contrastive image–text training at very large batch: CLIP, SigLIP and SmartCLIP."""

from smartclip_kernels.backends import available_backends, set_workspace, use_backend
from smartclip_kernels.functional import (
    clip_loss,
    masked_similarity,
    masked_topk,
    retrieval_ranks,
    siglip_loss,
    smartclip_loss,
)

__version__ = "0.1.0"

__all__ = [
    "available_backends",
    "clip_loss",
    "masked_similarity",
    "masked_topk",
    "retrieval_ranks",
    "set_workspace",
    "siglip_loss",
    "smartclip_loss",
    "use_backend",
]
