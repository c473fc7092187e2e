"""Pairs on disk: a folder of images with a captions file, and webdataset tars.

They are streamed: one pass at the start checks every caption and notes where it lies, 8 bytes a row of a captions file
and under 100 a sample of a tar; captions and images are read when a batch asks for them. Any record can be read at any
time, so that epochs are true permutations and a run goes on exactly where it was. That is why the tars are not read
through the webdataset package, which writes the ones we test with: its stream runs forward only, shuffles within a
buffer and deals out whole tars to ranks and workers, so that its place is no number, and shares come out uneven.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tarfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np

from smartclip_kernels.train.captions import Captions
from smartclip_kernels.train.data import Record, Source

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


class Rows(Sequence[Record]):
    """Records that stay on the disk: in memory are their `places`, (n, columns) int64; `read(*place)` makes one."""

    def __init__(self, places: np.ndarray[Any, Any], read: Callable[..., Record]) -> None:
        self.places, self.read = places, read

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> Record | Rows:
        if isinstance(index, slice):
            return Rows(self.places[index], self.read)
        return self.read(*self.places[index].tolist())


def split(
    records: Iterable[tuple[tuple[int, ...], Record]], share: float, read: Callable[..., Record]
) -> dict[str, Rows]:
    """Places with their records -> the splits, by each concept's hash: it stays where it is when others come or go."""
    places = {"train": array("q"), "eval": array("q")}
    columns = 1
    for place, record in records:
        position = int.from_bytes(hashlib.sha256(record.concept.encode()).digest()[:8], "big") / 2**64
        places["eval" if position < share else "train"].extend(place)
        columns = len(place)
    return {name: Rows(np.array(numbers, np.int64).reshape(-1, columns), read) for name, numbers in places.items()}


class Folder(Source):
    """Images with captions.jsonl or captions.csv beside them: `image` (a path from the folder), `caption`, and, if
    there are some, `short`: a list of short captions (JSONL), or several divided by "|" (CSV)."""

    def __init__(self, folder: Path, image_size: int, held_out: float) -> None:
        self.folder = folder
        files = [file for file in (folder / "captions.jsonl", folder / "captions.csv") if file.exists()]
        if not files:
            raise FileNotFoundError(f"data.source: {folder} holds no captions.jsonl and no captions.csv, needs one")
        self.file = files[0]
        self.columns: list[str] | None = None  # of a CSV
        super().__init__(split(self._all(), held_out, self._at), image_size)

    def _all(self) -> Iterator[tuple[tuple[int], Record]]:
        """Each row's record, and the byte where it begins."""
        with self.file.open("rb") as file:
            lines = Lines(file)
            if self.file.suffix == ".csv":
                self.columns = next(csv.reader(lines), [])
            place = file.tell()
            for values in self._values(lines):
                yield (place,), self._record(lines, values)
                place = file.tell()

    def _at(self, place: int) -> Record:
        with self.file.open("rb") as file:
            file.seek(place)
            lines = Lines(file)
            try:
                return self._record(lines, next(self._values(lines)))
            except (StopIteration, ValueError) as error:
                raise ValueError(f"{self.file}: was whole and has changed: no row at byte {place}") from error

    def _values(self, lines: Lines) -> Iterator[Any]:
        if self.columns is not None:
            yield from csv.DictReader(lines, self.columns)
            return
        for line in lines:
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{self.file}:{lines.number}: {error}") from error

    def _record(self, lines: Lines, values: Any) -> Record:
        where = f"{self.file}:{lines.number}"
        if not isinstance(values, dict):
            raise ValueError(f"{where}: got {values!r}, needs an object")
        for column in ("image", "caption"):
            if not isinstance(values.get(column), str) or not values[column]:
                raise ValueError(f"{where}: got {values.get(column)!r} for {column!r}, needs a text")
        short = values.get("short") or ()
        captions = captions_of(values["caption"], short.split("|") if isinstance(short, str) else short)
        return Record(values["image"], values["image"], captions, self.folder / values["image"])

    def open(self, record: Record) -> BinaryIO:
        file: BinaryIO = record.place.open("rb")
        return file


class Lines(Iterator[str]):
    """A binary file's lines, without reading ahead: `tell()` is where the next one begins."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.number = file, 0

    def __next__(self) -> str:
        line = self.file.readline()
        if not line:
            raise StopIteration
        self.number += 1
        return line.decode("utf-8")


class Tars(Source):
    """Local webdataset tars: neighbours of one key are a sample, `KEY.jpg` (or .png …) with `KEY.txt`, or with
    `KEY.json` that holds `caption` and perhaps `short`."""

    def __init__(self, pattern: str, image_size: int, held_out: float) -> None:
        self.paths = [Path(path) for path in expand_braces(pattern)]
        self.keys = bytearray()
        super().__init__(split(self._all(), held_out, self._at), image_size)

    def _all(self) -> Iterator[tuple[tuple[int, ...], Record]]:
        """Each sample's record, and what `_at` needs to find it."""
        for n, path in enumerate(self.paths):
            for key, group in groupby(members(path), key=lambda found: found[0]):
                sample = {suffix: member for _, suffix, member in group}
                image = next((m for suffix, m in sample.items() if f".{suffix}" in IMAGE_SUFFIXES), None)
                text = sample.get("json") or sample.get("txt")
                if image is None or text is None:
                    raise ValueError(
                        f"{path}: sample {key!r} has {sorted(sample)}, needs an image and a .txt or .json beside it"
                    )
                begin = len(self.keys)
                self.keys += key.encode()
                place = (
                    n, begin, len(self.keys), image.offset_data, image.size,
                    text.offset_data, text.size, text is sample.get("json"),
                )  # fmt: skip
                yield place, self._at(*place)

    def _at(self, *place: int) -> Record:
        n, begin, end, image, image_size, text, text_size, is_json = place
        path = self.paths[n]
        name = f"{path}:{self.keys[begin:end].decode()}"
        captions = self._captions(name, read_at(path, text, text_size), bool(is_json))
        return Record(name, name, captions, (path, image, image_size))

    @staticmethod
    def _captions(name: str, content: bytes, is_json: bool) -> Captions:
        try:
            text = content.decode("utf-8")
            values = json.loads(text) if is_json else {"caption": text.strip()}
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if not isinstance(values, dict) or not isinstance(values.get("caption"), str) or not values["caption"]:
            raise ValueError(f"{name}: got {text[:80]!r}, needs a caption")
        return captions_of(values["caption"], values.get("short") or ())

    def open(self, record: Record) -> BinaryIO:
        return io.BytesIO(read_at(*record.place))


def members(path: Path) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """A tar's files: webdataset's key (which ends at the first dot of the file's name), its suffix and where it is."""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # it remembers all, a kilobyte each
                folder, _, name = member.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                if member.isfile() and stem and dot:
                    yield f"{folder}/{stem}" if folder else stem, suffix.lower(), member
    except tarfile.TarError as error:
        raise ValueError(f"{path}: {error}") from error


def read_at(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def captions_of(caption: str, short: Sequence[str]) -> Captions:
    return Captions(tuple(short), caption) if short else Captions.of_text(caption)


def expand_braces(pattern: str) -> list[str]:
    """webdataset's notation: "a-{00..02}.tar" is a-00.tar, a-01.tar, a-02.tar."""
    from braceexpand import braceexpand

    return list(braceexpand(pattern))
