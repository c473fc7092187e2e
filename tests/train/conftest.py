"""A few real files: coloured shapes with captions, small enough to train on within a test."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from smartclip_kernels.train.config import Config, DataConfig, ModelConfig

COLOURS = ("red", "green", "blue", "black")
SHAPES = ("square", "disc", "bar")


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """A folder of 48 PNGs: a shape of a colour at one of four places, with a long and three short captions each."""
    folder = tmp_path / "shapes"
    folder.mkdir()
    rows = []
    for colour in COLOURS:
        for shape in SHAPES:
            for place, (x, y) in {
                "top left": (2, 2),
                "top right": (14, 2),
                "low left": (2, 14),
                "low right": (14, 14),
            }.items():
                image = Image.new("RGB", (24, 24), "white")
                box = (x, y, x + 8, y + (8 if shape != "bar" else 3))
                (ImageDraw.Draw(image).ellipse if shape == "disc" else ImageDraw.Draw(image).rectangle)(
                    box, fill=colour
                )
                name = f"{colour}-{shape}-{place.replace(' ', '-')}.png"
                image.save(folder / name)
                caption = f"a {colour} {shape} at the {place}"
                rows.append({"image": name, "caption": caption, "short": [colour, shape, place]})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def config(shapes: Path, tmp_path: Path) -> Callable[..., Config]:
    """A configuration of seconds, with what a test changes."""
    base = Config(
        data=DataConfig(source=str(shapes), image_size=16, held_out=0.25),
        model=ModelConfig(embed_dim=16, image_width=32, image_layers=1, text_width=32, text_layers=1, context=12),
        batch_size=24,
        chunk_size=10,  # leaves a smaller last chunk
        steps=6,
        warmup=2,
        checkpoint_every=2,
        threads=1,
        out=tmp_path / "run",
    )

    def changed(**changes: Any) -> Config:
        return dataclasses.replace(base, **changes)

    return changed
