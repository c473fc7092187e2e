"""``python -m smartclip_kernels.train``, ``smartclip-train``."""

from __future__ import annotations

import sys

import tyro

from smartclip_kernels.train.config import Config
from smartclip_kernels.train.data import UnreadableImageError
from smartclip_kernels.train.loop import NonFiniteError, train


def main() -> None:
    config = tyro.cli(Config, prog="smartclip-train")
    try:
        train(config)
    except (NonFiniteError, UnreadableImageError, ValueError, FileExistsError, FileNotFoundError) as error:
        sys.exit(f"smartclip-train: {error}")


if __name__ == "__main__":
    main()
