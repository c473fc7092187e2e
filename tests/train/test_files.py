"""Pairs on disk: each comes once an epoch, whatever the ranks, workers and resumptions, and none stays in memory."""

from __future__ import annotations

import csv
import dataclasses
import gc
import io
import json
import pickle
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import pytest
import torch
from PIL import Image

from smartclip_kernels.train.batches import Batch, batches
from smartclip_kernels.train.config import Config, DataConfig
from smartclip_kernels.train.data import Record, Source, open_source
from smartclip_kernels.train.files import Rows, Tars
from smartclip_kernels.train.ranks import Ranks

Configure = Callable[..., Config]
N = 37
STEPS = 9
BATCH = 11  # 99 positions: two epochs and two thirds, no epoch ends with a batch


def picture(n: int) -> bytes:
    """Its colour is its number."""
    file = io.BytesIO()
    Image.new("RGB", (9, 9), (n, 0, 255 - n)).save(file, "PNG")
    return file.getvalue()


def caption(n: int) -> str:
    return f"number {n}, one of many"


@pytest.fixture(params=["tars", "jsonl", "csv"])
def numbers(request: pytest.FixtureRequest, tmp_path: Path) -> DataConfig:
    """37 pairs, in three tars of different lengths or in a folder."""
    source = tmp_path / "numbers"
    source.mkdir()
    name = str(source)
    if request.param == "tars":
        webdataset = pytest.importorskip("webdataset")
        name = str(source / "part-{0..2}.tar")
        for tar, (first, last) in enumerate(((0, 20), (20, 21), (21, N))):
            with webdataset.TarWriter(str(source / f"part-{tar}.tar")) as writer:
                for n in range(first, last):
                    writer.write({"__key__": f"{n:03d}", "png": picture(n), "txt": caption(n)})
    else:
        for n in range(N):
            (source / f"{n:03d}.png").write_bytes(picture(n))
        rows = [{"image": f"{n:03d}.png", "caption": caption(n)} for n in range(N)]
        if request.param == "jsonl":
            (source / "captions.jsonl").write_text("\r\n\n".join(json.dumps(row) for row in rows))
        else:
            with (source / "captions.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, ["image", "caption"])
                writer.writeheader()
                writer.writerows(rows)
    return DataConfig(source=name, image_size=9, held_out=0.0, crop_scale=1.0)


def ids(batch: Batch) -> list[int]:
    """Which numbers its images are. Captions, records and images belong together."""
    found: list[int] = batch.images[:, 0, 4, 4].tolist()
    for n, record, text in zip(found, batch.records, batch.texts[0], strict=True):
        assert record.captions.long == text == caption(n)
        assert f"{n:03d}" in record.key
    return found


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 0), (3, 2), (5, 0), (11, 0)])
def test_ranks_and_workers_read_every_pair_once_an_epoch(
    config: Configure, numbers: DataConfig, world: int, workers: int
) -> None:
    settings = config(data=numbers, batch_size=BATCH, steps=STEPS)
    source = open_source(numbers)
    alone = [ids(batch) for batch in batches(source, settings, 0)]
    everything = list(chain.from_iterable(alone))
    assert len(everything) == STEPS * BATCH
    for epoch in (everything[:N], everything[N : 2 * N]):
        assert Counter(epoch) == Counter(range(N))
    assert len(set(everything[2 * N :])) == STEPS * BATCH - 2 * N

    settings = dataclasses.replace(settings, data=dataclasses.replace(numbers, workers=workers))
    for first in (0, 4):  # 4 is in the second epoch
        shares = [[ids(b) for b in batches(source, settings, first, Ranks(rank, world))] for rank in range(world)]
        assert {len(share) for share in chain.from_iterable(shares)} <= {BATCH // world, -(-BATCH // world)}
        together = [list(chain.from_iterable(step)) for step in zip(*shares, strict=True)]
        assert together == alone[first:]


def test_a_rank_without_an_image_is_refused(config: Configure, numbers: DataConfig) -> None:
    settings = config(data=numbers, batch_size=3)
    with pytest.raises(ValueError, match="batch_size: got 3, needs an image for each of 4 ranks"):
        next(batches(open_source(numbers), settings, 0, Ranks(0, 4)))


def test_records_stay_on_the_disk(numbers: DataConfig) -> None:
    def in_memory() -> int:
        gc.collect()
        return sum(type(x) is Record for x in gc.get_objects())

    before = in_memory()
    source = open_source(numbers)
    assert in_memory() == before
    rows = source.records["train"]
    assert isinstance(rows, Rows)
    held = rows.places.nbytes + (len(source.keys) if isinstance(source, Tars) else 0)
    assert held <= (100 if isinstance(source, Tars) else 8) * N
    assert [record.captions.long for record in rows[5:9:2]] == [caption(5), caption(7)]
    assert rows[-1] == rows[N - 1]
    with pytest.raises(IndexError):
        rows[N]
    copy = pickle.loads(pickle.dumps(source))  # as it reaches readers where processes are not forked
    assert list(copy.records["train"]) == list(rows)


def test_held_out_pairs_are_others_and_stay_so(numbers: DataConfig) -> None:
    def keys(share: float) -> tuple[set[str], set[str]]:
        records = open_source(dataclasses.replace(numbers, held_out=share)).records
        return {r.key for r in records["train"]}, {r.key for r in records["eval"]}

    train, held_out = keys(0.3)
    assert not train & held_out
    assert len(train | held_out) == N
    assert 3 <= len(held_out) <= 20
    assert keys(0.2)[1] < held_out or keys(0.2)[1] == held_out


def test_a_csv_row_of_several_lines(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text(
        'caption,image\n"one,\ntwo",a.png\n\n"drei: äöü\n",b.png\nfour,c.png\n', encoding="utf-8"
    )
    records = open_source(DataConfig(source=str(tmp_path), held_out=0.0)).records["train"]
    assert [(r.key, r.captions.long) for r in records] == [
        ("a.png", "one,\ntwo"),
        ("b.png", "drei: äöü\n"),
        ("c.png", "four"),
    ]
    assert [records[n].key for n in (2, 0, 1)] == ["c.png", "a.png", "b.png"]


def test_a_captions_file_that_changes_under_a_run(tmp_path: Path) -> None:
    rows = [json.dumps({"image": f"{n}.png", "caption": "x"}) + "\n" for n in range(3)]
    (tmp_path / "captions.jsonl").write_text("".join(rows))
    records = open_source(DataConfig(source=str(tmp_path), held_out=0.0)).records["train"]
    (tmp_path / "captions.jsonl").write_text("".join(rows[:1]) + "#" + "".join(rows[1:]))
    assert records[0].key == "0.png"
    with pytest.raises(ValueError, match=r"captions\.jsonl: was whole and has changed: no row at byte"):
        records[1]


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def bad_tars() -> Iterator[tuple[dict[str, bytes], str]]:
    image = picture(1)
    yield {"a.png": image}, r"sample 'a' has \['png'\], needs an image"
    yield {"a.png": image, "b.png": image, "a.txt": b"x"}, r"sample 'a' has \['png'\], needs an image"
    yield {"a.png": image, "a.json": b"{"}, "bad.tar:a: Expecting"
    yield {"a.png": image, "a.json": b"[]"}, r"bad.tar:a: got '\[\]', needs a caption"
    yield {"a.png": image, "a.json": b'{"caption": 3}'}, "needs a caption"
    yield {"a.png": image, "a.txt": b" "}, "needs a caption"
    yield {"a.png": image, "a.txt": b"\xff"}, "bad.tar:a: 'utf-8' codec"


@pytest.mark.parametrize(("members", "message"), list(bad_tars()))
def test_bad_samples_are_named(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(DataConfig(source=str(tar_of(tmp_path / "bad.tar", members))))


def test_a_tar_that_was_cut(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "cut.tar", {"a.txt": b"x" * 3000, "a.png": picture(1)})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cut\.tar: unexpected end of data"):
        open_source(DataConfig(source=str(path)))


def test_long_names_in_a_tar(tmp_path: Path) -> None:
    """They lie in members of their own."""
    name = "/".join(["folder"] * 40) + "/x"
    path = tar_of(tmp_path / "long.tar", {f"{name}.png": picture(7), f"{name}.en.txt": b"?", f"{name}.txt": b"seven"})
    source: Source = open_source(DataConfig(source=str(path), image_size=9, held_out=0.0))
    (record,) = source.records["train"]
    assert record.key == f"{path}:{name}"
    assert record.captions.long == "seven"
    assert torch.equal(source.read(record)[:, 4, 4], torch.tensor([7, 0, 248], dtype=torch.uint8))
