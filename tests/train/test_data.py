from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from smartclip_kernels.train.config import DataConfig
from smartclip_kernels.train.data import Emoji, Source, UnreadableImageError, open_source, role
from smartclip_kernels.train.files import expand_braces


@pytest.fixture(scope="module")
def emoji() -> Source:
    return Emoji(32, "test")


def test_emoji_are_all_there_and_families_stay_together(emoji: Source) -> None:
    train, held_out = emoji.records["train"], emoji.records["eval"]
    assert (len(train), len(held_out)) == (2 * 2606, 2 * 674)
    assert {r.gallery for r in held_out} == {"noto", "twemoji"}
    assert not {r.concept for r in train} & {r.concept for r in held_out}
    assert len(Emoji(32, "val").records["eval"]) == 2 * 227


def test_an_emoji_is_where_its_record_says(emoji: Source) -> None:
    record = next(r for r in emoji.records["train"] if r.key == "green apple (noto)")
    image = emoji.read(record)
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.uint8
    red, green, blue = image[:, 14:24, 10:22].float().mean((1, 2))
    assert green > red + 20
    assert green > blue + 20
    assert image[:, 0, 0].tolist() == [255, 255, 255]
    assert "apple" in record.captions.short
    assert record.captions.whole().startswith("green apple: ")
    assert record.captions.whole().endswith("food fruit, Food & Drink")


def test_roles() -> None:
    assert role("woman singer: dark skin tone") == "singer"
    assert role("man: dark skin tone, curly hair") == "curly hair"
    assert role("person: light skin tone") == ""


def test_a_folder_with_jsonl_or_csv(shapes: Path) -> None:
    from_jsonl = open_source(DataConfig(source=str(shapes), image_size=16, held_out=0.25))
    expected = {name: list(records) for name, records in from_jsonl.records.items()}
    rows = [json.loads(line) for line in (shapes / "captions.jsonl").read_text().splitlines()]
    (shapes / "captions.jsonl").unlink()
    with (shapes / "captions.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "caption", "short"])
        writer.writeheader()
        writer.writerows({**row, "short": "|".join(row["short"])} for row in rows)
    from_csv = open_source(DataConfig(source=str(shapes), image_size=16, held_out=0.25))
    assert {name: list(records) for name, records in from_csv.records.items()} == expected
    assert len(from_csv.records["train"]) + len(from_csv.records["eval"]) == 48
    assert 4 <= len(from_csv.records["eval"]) <= 20
    record = next(r for r in from_csv.records["train"] if "red" in r.captions.short)
    pixels = from_csv.read(record)
    assert pixels.shape == (3, 16, 16)
    assert pixels[0].float().mean() > pixels[1].float().mean() + 3


def tar_of(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 30), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_tars_as_webdataset_writes_them(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    for n, colour in enumerate(("red", "blue")):
        with webdataset.TarWriter(str(tmp_path / f"pairs-{n:02d}.tar")) as writer:
            writer.write({"__key__": "a/000", "png": png(colour), "txt": f"all {colour}, nothing else"})
            writer.write(
                {"__key__": "a/001", "png": png(colour), "json": {"caption": colour, "short": ["plain", colour]}}
            )
    source = open_source(DataConfig(source=str(tmp_path / "pairs-{00..01}.tar"), image_size=8, held_out=0.0))
    records = source.records["train"]
    assert [r.captions.short for r in records] == [
        ("all red", "nothing else"),
        ("plain", "red"),
        ("all blue", "nothing else"),
        ("plain", "blue"),
    ]
    assert [source.read(r)[:, 4, 4].tolist() for r in records] == [[255, 0, 0]] * 2 + [[0, 0, 255]] * 2
    assert len({r.concept for r in records}) == 4


def test_what_cannot_be_read_is_named(shapes: Path, tmp_path: Path) -> None:
    (shapes / "red-disc-top-left.png").write_bytes(b"no image")
    (shapes / "blue-bar-top-left.png").unlink()
    source = open_source(DataConfig(source=str(shapes), image_size=16, held_out=0.0))
    for name in ("red-disc-top-left.png", "blue-bar-top-left.png"):
        record = next(r for r in source.records["train"] if r.key == name)
        with pytest.raises(UnreadableImageError, match=name):
            source.read(record)
    tar_of(tmp_path / "bad.tar", {"x.png": png("red")})
    with pytest.raises(ValueError, match=r"bad\.tar: sample 'x' has \['png'\], needs"):
        open_source(DataConfig(source=str(tmp_path / "bad.tar")))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"image": "a.png"}', "got None for 'caption'"),
        ('{"image": 3, "caption": "x"}', "got 3 for 'image'"),
        ("{", r"captions.jsonl:1"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: str, message: str) -> None:
    (tmp_path / "captions.jsonl").write_text(row + "\n")
    with pytest.raises(ValueError, match=message):
        open_source(DataConfig(source=str(tmp_path)))


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.source: got \"nowhere\""):
        open_source(DataConfig(source="nowhere"))
    with pytest.raises(FileNotFoundError, match="holds no captions"):
        open_source(DataConfig(source=str(tmp_path)))


def test_braces() -> None:
    assert expand_braces("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
