"""Gradient caching: contrastive batches larger than the encoders' activations allow."""

from smartclip_kernels.grad_cache.cache import GradCache

__all__ = ["GradCache"]
