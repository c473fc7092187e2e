"""Image–text pairs: the emoji in the package, a folder of images with a captions file, or webdataset tars.

A source is sequences of records and a way to read one's image. All sources are read at random places, so that a run's
place in its data is one number, the step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from smartclip_kernels.train.captions import Captions
from smartclip_kernels.train.config import DataConfig


class UnreadableImageError(Exception):
    """An image that cannot be read or decoded; the message names it and says why."""


@dataclass(frozen=True)
class Record:
    """One image and what is known of it."""

    key: str  # names it in messages
    concept: str  # images with one concept share their captions and are positives of each other's
    captions: Captions
    place: Any  # where its source finds the image
    labels: Mapping[str, str] = field(default_factory=dict)  # classes for zero-shot evaluation, aspects of people
    gallery: str = "all"  # retrieval is evaluated within a gallery


class Source:
    """Records of the splits "train" and "eval", and their images as uint8 (3, size, size)."""

    def __init__(self, records: Mapping[str, Sequence[Record]], image_size: int) -> None:
        self.records = records
        self.image_size = image_size

    def read(self, record: Record) -> Tensor:
        """The whole image, or of an oblong one the middle."""
        picture = transforms.resize(self.picture(record), [self.image_size], antialias=True)
        return transforms.pil_to_tensor(transforms.center_crop(picture, [self.image_size, self.image_size]))

    def picture(self, record: Record) -> Image.Image:
        """The image as it is, in RGB."""
        try:
            with Image.open(self.open(record)) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise UnreadableImageError(f"{record.key}: {error}") from error

    def open(self, record: Record) -> BinaryIO:
        raise NotImplementedError


class Emoji(Source):
    """3,507 emoji, each drawn by two artists: see data/emoji/README.md. Atlases are decoded once."""

    CELL, COLUMNS = 64, 64

    def __init__(self, image_size: int, evaluate_on: str) -> None:
        folder = resources.files("smartclip_kernels") / "data" / "emoji"
        records: dict[str, list[Record]] = {"train": [], "val": [], "test": []}
        for line in (folder / "emoji.jsonl").read_text(encoding="utf-8").splitlines():
            emoji = json.loads(line)
            for style, cell in emoji["cells"].items():
                records[emoji["split"]].append(self._record(emoji, style, cell))
        super().__init__({"train": records["train"], "eval": records[evaluate_on]}, image_size)
        self.atlases = {}
        for style in ("noto", "twemoji"):
            with (folder / f"{style}.webp").open("rb") as file, Image.open(file) as atlas:
                self.atlases[style] = atlas.convert("RGB")

    @staticmethod
    def _record(emoji: dict[str, Any], style: str, cell: int) -> Record:
        subgroup = emoji["subgroup"].replace("-", " ")
        labels = {"group": emoji["group"], "subgroup": subgroup}
        if emoji["tone"]:
            labels["tone"] = f"{emoji['tone']} skin tone"
        if emoji["gender"]:
            labels["gender"] = emoji["gender"]
        if emoji["tone"] and emoji["gender"]:
            labels["role"] = role(emoji["name"])
        captions = Captions(tuple(emoji["keywords"]), f"{emoji['name']}: {{short}}. {subgroup}, {emoji['group']}")
        return Record(f"{emoji['name']} ({style})", emoji["id"], captions, (style, cell), labels, style)

    def picture(self, record: Record) -> Image.Image:
        style, cell = record.place
        left, top = self.CELL * (cell % self.COLUMNS), self.CELL * (cell // self.COLUMNS)
        return self.atlases[style].crop((left, top, left + self.CELL, top + self.CELL))


def role(name: str) -> str:
    """What a person does or looks like: "woman cook: dark skin tone" -> cook, "man: dark skin tone, bald" -> bald."""
    title, _, rest = name.partition(": ")
    words = [w for w in title.split() if w not in ("man", "woman", "person")]
    words += [part for part in rest.split(", ") if part and not part.endswith("skin tone")]
    return " ".join(words)


def open_source(config: DataConfig) -> Source:
    from smartclip_kernels.train.files import Folder, Tars

    if config.source == "emoji":
        return Emoji(config.image_size, config.evaluate_on)
    if config.source.endswith(".tar"):
        return Tars(config.source, config.image_size, config.held_out)
    if Path(config.source).is_dir():
        return Folder(Path(config.source), config.image_size, config.held_out)
    raise ValueError(f'data.source: got "{config.source}", needs "emoji", a folder, or tars ("pairs-{{000..007}}.tar")')
