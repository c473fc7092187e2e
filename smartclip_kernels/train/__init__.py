"""The thin reference trainer: ``smartclip-train``, or ``python -m smartclip_kernels.train``."""
