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
from smartclip_kernels.grad_cache import GradCache
from smartclip_kernels.modules import ClipLoss, MaskHead, SigLipLoss, SmartClipLoss

__version__ = "0.1.0"

__all__ = [
    "ClipLoss",
    "GradCache",
    "MaskHead",
    "SigLipLoss",
    "SmartClipLoss",
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
