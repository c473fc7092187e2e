"""``python -m smartclip_kernels.train``, ``smartclip-train``."""

from __future__ import annotations

import sys

import tyro

from smartclip_kernels.train.checkpoint import BrokenCheckpointError
from smartclip_kernels.train.config import Config
from smartclip_kernels.train.data import UnreadableImageError
from smartclip_kernels.train.loop import train
from smartclip_kernels.train.run import StoppedError


def main() -> None:
    config = tyro.cli(Config, prog="smartclip-train")
    try:
        train(config)
    except (StoppedError, BrokenCheckpointError, UnreadableImageError, ValueError, OSError) as error:
        sys.exit(f"smartclip-train: {error}")
    except KeyboardInterrupt:
        sys.exit("smartclip-train: interrupted; --resume goes on from the newest checkpoint")


if __name__ == "__main__":
    main()
