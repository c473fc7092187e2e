from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch

from smartclip_kernels.train.batches import Batch, Order, batches, identity
from smartclip_kernels.train.config import Config
from smartclip_kernels.train.data import UnreadableImageError, open_source

Configure = Callable[..., Config]


def equal(a: Batch, b: Batch) -> bool:
    return (
        (a.step, a.records, a.texts) == (b.step, b.records, b.texts)
        and torch.equal(a.images, b.images)
        and all(torch.equal(x, y) for x, y in zip(a.ids, b.ids, strict=True))
    )


def test_every_epoch_sees_every_record_once_in_another_order() -> None:
    order = [position for batch in Order(10, 4, 5, seed=3) for position in batch]
    assert [p.number for p in order] == list(range(20))
    first, second = [p.index for p in order[:10]], [p.index for p in order[10:]]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert [p.index for b in Order(10, 4, 5, seed=4) for p in b][:10] != first


def test_a_later_start_sees_the_same_batches(config: Configure) -> None:
    settings = config()
    source = open_source(settings.data)
    everything = list(batches(source, settings, 0))
    assert [b.step for b in everything] == list(range(6))
    assert not equal(everything[0], everything[1])
    for first in (1, 4):
        assert all(equal(a, b) for a, b in zip(batches(source, settings, first), everything[first:], strict=True))


def test_readers_in_other_processes_make_no_difference(config: Configure) -> None:
    import dataclasses

    settings = config()
    source = open_source(settings.data)
    workers = config(data=dataclasses.replace(settings.data, workers=2))
    assert all(equal(a, b) for a, b in zip(batches(source, workers, 0), batches(source, settings, 0), strict=True))


def test_reading_leaves_torchs_random_numbers_alone(config: Configure) -> None:
    settings = config()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    next(batches(open_source(settings.data), settings, 0))
    assert torch.equal(torch.get_rng_state(), before)


def test_ids_say_which_captions_fit_which_images(config: Configure) -> None:
    batch = next(
        batches(open_source(config().data), config(batch_size=60), 0)
    )  # more than there are: images come twice
    long, short = batch.ids
    assert batch.long[0].all()
    assert not batch.long[1].any()
    for i in range(60):
        for j in range(60):
            assert (long[i] == long[j]) == (batch.records[i].concept == batch.records[j].concept)
            assert (short[i] == short[j]) == (batch.texts[1][i] == batch.texts[1][j])


def test_ids_are_the_same_in_every_process() -> None:
    """Python's own hashes are not; ranks on other machines have to agree."""
    assert identity("text red") == 5778344633565695890
    assert 0 <= identity("") < 2**63
    assert len({identity(f"text {n}") for n in range(10_000)}) == 10_000


def test_images_that_come_twice_are_known(config: Configure) -> None:
    batch = next(batches(open_source(config().data), config(batch_size=60), 0))
    keys = [record.key for record in batch.records]
    assert len(set(keys)) < 60
    for i in range(60):
        assert (batch.image_ids == batch.image_ids[i]).tolist() == [key == keys[i] for key in keys]


def test_unreadable_images_are_left_out_and_named(config: Configure, shapes: Path) -> None:
    settings = config()
    source = open_source(settings.data)
    whole = next(batches(source, settings, 0))
    broken = whole.records[3].key
    (shapes / broken).write_bytes(b"")
    batch = next(batches(source, settings, 0))
    assert batch.records == whole.records[:3] + whole.records[4:]
    assert len(batch.images) == len(batch.ids[0]) == len(batch.texts[1]) == 23
    assert len(batch.problems) == 1
    assert broken in batch.problems[0]
    for path in shapes.glob("*.png"):
        path.unlink()
    with pytest.raises(UnreadableImageError, match="step 0: none of 24 images can be read"):
        next(batches(source, settings, 0))


def test_captions_change_from_epoch_to_epoch(config: Configure) -> None:
    settings = config(steps=20)
    said: dict[str, set[str]] = {}
    for batch in islice(batches(open_source(settings.data), settings, 0), 20):
        for record, text in zip(batch.records, batch.texts[1], strict=True):
            said.setdefault(record.key, set()).add(text)
    assert sum(len(texts) == 3 for texts in said.values()) > len(said) // 2
