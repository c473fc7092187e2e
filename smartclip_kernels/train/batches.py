"""From records to batches: order, crops, captions drawn, unreadable images left out.

Everything random about an example is a function of (seed, position), the position being its number in the whole run. So
a batch is the same whoever reads it, in whatever process, and a resumed run sees what it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

from smartclip_kernels.train.captions import DRAWS, draw, kinds
from smartclip_kernels.train.config import Config
from smartclip_kernels.train.data import Record, Source, UnreadableImageError


@dataclass(frozen=True)
class Position:
    """The `number`th example of a run, which is training record `index`."""

    number: int
    index: int


@dataclass(frozen=True)
class Example:
    """One image and its captions of a step; or why there is no image."""

    record: Record
    image: Tensor | None  # uint8 (3, size, size)
    texts: tuple[str, ...]
    long: tuple[bool, ...]
    meanings: tuple[str, ...]  # captions of equal meaning are positives of each other's images
    problem: str = ""


@dataclass(frozen=True)
class Batch:
    """N readable examples."""

    step: int
    records: list[Record]
    images: Tensor  # (N, 3, size, size) uint8
    texts: list[list[str]]  # DRAWS lists of N
    long: list[Tensor]  # DRAWS bool tensors of N: which texts are long ones
    ids: list[Tensor]  # DRAWS tensors of N: equal where image and caption are a positive pair
    problems: list[str]


class Examples(Dataset[Example]):
    """What `DataLoader` reads: a position -> its example."""

    def __init__(self, source: Source, config: Config) -> None:
        self.source = source
        self.records = source.records["train"]
        self.seed = config.seed
        self.policy = config.captions
        size, smallest = config.data.image_size, config.data.crop_scale
        self.augment = v2.RandomResizedCrop(size, scale=(smallest, 1.0), ratio=(0.9, 1.1), antialias=True)
        self.crops = smallest < 1

    def __getitem__(self, position: Position) -> Example:
        record = self.records[position.index]
        rng = Random(f"{self.seed}/{position.number}")  # of a string: the same in every process
        drawn = kinds(self.policy, rng)
        texts = tuple(draw(record.captions, kind, rng) for kind in drawn)
        long = tuple(kind == "long" for kind in drawn)
        meanings = tuple(
            f"image {record.concept}" if whole else f"text {text}" for whole, text in zip(long, texts, strict=True)
        )
        try:
            image = self.crop(record, rng) if self.crops else self.source.read(record)
        except UnreadableImageError as problem:
            return Example(record, None, texts, long, meanings, str(problem))
        return Example(record, image, texts, long, meanings)

    def crop(self, record: Record, rng: Random) -> Tensor:
        picture = self.source.picture(record)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(
                rng.getrandbits(63)
            )  # torch.manual_seed costs 3 ms: it asks all devices
            return pil_to_tensor(self.augment(picture))


class Order(Sampler[list[Position]]):
    """Batches of positions from a step on. Epochs are shuffled anew and follow each other without a seam."""

    def __init__(self, n_records: int, batch_size: int, steps: int, seed: int, first_step: int = 0) -> None:
        self.n_records, self.batch_size, self.steps = n_records, batch_size, steps
        self.seed, self.first_step = seed, first_step

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self) -> Iterator[list[Position]]:
        epoch, order = -1, torch.empty(0, dtype=torch.int64)
        for step in range(self.first_step, self.steps):
            batch = []
            for number in range(step * self.batch_size, (step + 1) * self.batch_size):
                if number // self.n_records != epoch:
                    epoch = number // self.n_records
                    generator = torch.Generator().manual_seed(Random(f"{self.seed}/order/{epoch}").getrandbits(63))
                    order = torch.randperm(self.n_records, generator=generator)
                batch.append(Position(number, int(order[number % self.n_records])))
            yield batch


def collate(examples: list[Example]) -> tuple[list[Example], list[str]]:
    """The readable ones, and what is wrong with the others."""
    return [e for e in examples if e.image is not None], [e.problem for e in examples if e.image is None]


def batches(source: Source, config: Config, first_step: int) -> Iterator[Batch]:
    """The batches of steps `first_step` to the last."""
    examples = Examples(source, config)
    order = Order(len(examples.records), config.batch_size, config.steps, config.seed, first_step)
    loader = DataLoader(
        examples, batch_sampler=order, collate_fn=collate, num_workers=config.data.workers, generator=torch.Generator()
    )
    for step, (readable, problems) in enumerate(loader, first_step):
        if not readable:
            raise UnreadableImageError(
                f"step {step}: none of {len(problems)} images can be read; the first: {problems[0]}"
            )
        numbers: dict[str, int] = {}
        yield Batch(
            step,
            [e.record for e in readable],
            torch.stack([e.image for e in readable if e.image is not None]),
            [[e.texts[k] for e in readable] for k in range(DRAWS)],
            [torch.tensor([e.long[k] for e in readable]) for k in range(DRAWS)],
            [torch.tensor([numbers.setdefault(e.meanings[k], len(numbers)) for e in readable]) for k in range(DRAWS)],
            problems,
        )
