"""The backends of GPUs, which a CPU only simulates: slow, and without float64."""

from __future__ import annotations

import os

SIMULATED = ("cuda", "triton")
NOT_SIMULATED: dict[str, str | None] = {"TRITON_INTERPRET": None, "SMARTCLIP_CUDA_EMULATOR": None}
"""Of the environment, for a process in which they are not to be there."""


def simulate() -> None:
    """Makes them available; before the library is imported, for that is when it reads the environment."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from tests.emulator import build
    from tests.emulator.kernels import kernels_module

    if build.compiler() and "SMARTCLIP_CUDA_EMULATOR" not in os.environ:
        os.environ["SMARTCLIP_CUDA_EMULATOR"] = str(kernels_module())
