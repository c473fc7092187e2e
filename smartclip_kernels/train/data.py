"""Image–text pairs: the emoji in the package, a folder of images with a captions file, or webdataset tars.

A source is a list of records and a way to read one's image. All sources are read at random places, so that a run's
place in its data is one number, the step.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from smartclip_kernels.train.captions import Captions
from smartclip_kernels.train.config import DataConfig

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


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
    """Records in three splits, and their images as uint8 (3, size, size)."""

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


class Folder(Source):
    """Images with captions.jsonl or captions.csv beside them: `image` (a path from the folder), `caption`, and, if
    there are some, `short`: a list of short captions (JSONL), or several divided by "|" (CSV)."""

    def __init__(self, folder: Path, image_size: int, held_out: float) -> None:
        self.folder = folder
        super().__init__(hold_out([self._record(row) for row in self._rows()], held_out), image_size)

    def _rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        jsonl, table = self.folder / "captions.jsonl", self.folder / "captions.csv"
        if jsonl.exists():
            for n, line in enumerate(jsonl.read_text(encoding="utf-8").splitlines(), 1):
                if line.strip():
                    try:
                        yield f"{jsonl}:{n}", json.loads(line)
                    except json.JSONDecodeError as error:
                        raise ValueError(f"{jsonl}:{n}: {error}") from error
        elif table.exists():
            with table.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                for row in reader:
                    yield f"{table}:{reader.line_num}", row
        else:
            raise FileNotFoundError(
                f"data.source: {self.folder} holds no captions.jsonl and no captions.csv, needs one"
            )

    def _record(self, row: tuple[str, dict[str, Any]]) -> Record:
        where, values = row
        for column in ("image", "caption"):
            if not isinstance(values.get(column), str) or not values[column]:
                raise ValueError(f"{where}: got {values.get(column)!r} for {column!r}, needs a text")
        short = values.get("short") or ()
        short = tuple(short.split("|") if isinstance(short, str) else short)
        captions = Captions(short, values["caption"]) if short else Captions.of_text(values["caption"])
        return Record(values["image"], values["image"], captions, self.folder / values["image"])

    def open(self, record: Record) -> BinaryIO:
        file: BinaryIO = record.place.open("rb")
        return file


class Tars(Source):
    """Local webdataset tars: members of one key are a sample, `KEY.jpg` (or .png …) with `KEY.txt`, or with `KEY.json`
    that holds `caption` and perhaps `short`. The tars are indexed once; images are read where they lie."""

    def __init__(self, pattern: str, image_size: int, held_out: float) -> None:
        records = [r for path in expand_braces(pattern) for r in self._index(Path(path))]
        super().__init__(hold_out(records, held_out), image_size)

    @staticmethod
    def _index(path: Path) -> Iterator[Record]:
        samples: dict[str, dict[str, tarfile.TarInfo]] = {}
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, dot, suffix = name.partition(".")  # webdataset's key ends at the first dot of the file's name
                if member.isfile() and stem and dot:
                    samples.setdefault(f"{folder}/{stem}" if folder else stem, {})[suffix.lower()] = member
            for key, members in samples.items():
                image = next((m for suffix, m in members.items() if f".{suffix}" in IMAGE_SUFFIXES), None)
                text = members.get("json") or members.get("txt")
                if image is None or text is None:
                    raise ValueError(
                        f"{path}: sample {key!r} has {sorted(members)}, needs an image and a .txt or .json"
                    )
                file = tar.extractfile(text)
                assert file is not None  # it is a regular file
                content = file.read().decode("utf-8")
                values = json.loads(content) if text is members.get("json") else {"caption": content.strip()}
                short = tuple(values.get("short") or ())
                captions = Captions(short, values["caption"]) if short else Captions.of_text(values["caption"])
                name = f"{path}:{key}"
                yield Record(name, name, captions, (path, image.offset_data, image.size))

    def open(self, record: Record) -> BinaryIO:
        path, offset, size = record.place
        with path.open("rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))


def expand_braces(pattern: str) -> list[str]:
    """webdataset's notation: "a-{00..02}.tar" is a-00.tar, a-01.tar, a-02.tar."""
    from braceexpand import braceexpand

    return list(braceexpand(pattern))


def hold_out(records: Sequence[Record], share: float) -> dict[str, list[Record]]:
    """A split by each concept's hash: it stays where it is when others come or go."""
    split: dict[str, list[Record]] = {"train": [], "eval": []}
    for record in records:
        position = int.from_bytes(hashlib.sha256(record.concept.encode()).digest()[:8], "big") / 2**64
        split["eval" if position < share else "train"].append(record)
    return split


def open_source(config: DataConfig) -> Source:
    if config.source == "emoji":
        return Emoji(config.image_size, config.evaluate_on)
    if config.source.endswith(".tar"):
        return Tars(config.source, config.image_size, config.held_out)
    if Path(config.source).is_dir():
        return Folder(Path(config.source), config.image_size, config.held_out)
    raise ValueError(f'data.source: got "{config.source}", needs "emoji", a folder, or tars ("pairs-{{000..007}}.tar")')
