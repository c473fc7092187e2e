"""From records to batches: order, crops, captions drawn, unreadable images left out.

Everything random about an example is a function of (seed, position), the position being its number in the whole run. So
a batch is the same whoever reads it, in whatever process, and a resumed run sees what it would have seen. Ranks divide
a batch's positions among them, a rank's workers divide its batches.
"""

from __future__ import annotations

import hashlib
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
from smartclip_kernels.train.ranks import Ranks


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
    meanings: tuple[int, ...]  # captions of equal meaning are positives of each other's images
    problem: str = ""


@dataclass(frozen=True)
class Batch:
    """N readable examples: a rank's share."""

    step: int
    records: list[Record]
    images: Tensor  # (N, 3, size, size) uint8
    texts: list[list[str]]  # DRAWS lists of N
    long: list[Tensor]  # DRAWS bool tensors of N: which texts are long ones
    ids: list[Tensor]  # DRAWS tensors of N: equal where image and caption are a positive pair
    image_ids: Tensor  # N: equal where an image is there twice
    n_images: int  # of all ranks
    problems: list[str]  # of all ranks


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
            identity(f"image {record.concept}" if whole else f"text {text}")
            for whole, text in zip(long, texts, strict=True)
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


def identity(text: str) -> int:
    """63 bits that are the same in every process: of 32,768 texts two share theirs once in 10¹⁰ batches."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class Order(Sampler[list[Position]]):
    """Batches of positions from a step on, a rank's share of each. Epochs are shuffled anew and follow each other
    without a seam."""

    def __init__(
        self, n_records: int, batch_size: int, steps: int, seed: int, first_step: int = 0, ranks: Ranks | None = None
    ) -> None:
        self.n_records, self.batch_size, self.steps = n_records, batch_size, steps
        self.seed, self.first_step = seed, first_step
        self.ranks = ranks or Ranks()
        if self.batch_size < self.ranks.world:
            raise ValueError(f"batch_size: got {batch_size}, needs an image for each of {self.ranks.world} ranks")

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self) -> Iterator[list[Position]]:
        epoch, order = -1, torch.empty(0, dtype=torch.int64)
        for step in range(self.first_step, self.steps):
            batch = []
            for number in self.ranks.share(range(step * self.batch_size, (step + 1) * self.batch_size)):
                if number // self.n_records != epoch:
                    epoch = number // self.n_records
                    generator = torch.Generator().manual_seed(Random(f"{self.seed}/order/{epoch}").getrandbits(63))
                    order = torch.randperm(self.n_records, generator=generator)
                batch.append(Position(number, int(order[number % self.n_records])))
            yield batch


def collate(examples: list[Example]) -> tuple[list[Example], list[str]]:
    """The readable ones, and what is wrong with the others."""
    return [e for e in examples if e.image is not None], [e.problem for e in examples if e.image is None]


def batches(source: Source, config: Config, first_step: int, ranks: Ranks | None = None) -> Iterator[Batch]:
    """This rank's share of the batches of steps `first_step` to the last."""
    ranks = ranks or Ranks()
    examples = Examples(source, config)
    order = Order(len(examples.records), config.batch_size, config.steps, config.seed, first_step, ranks)
    loader = DataLoader(
        examples, batch_sampler=order, collate_fn=collate, num_workers=config.data.workers, generator=torch.Generator()
    )
    for step, (readable, own_problems) in enumerate(loader, first_step):
        counts, problems = zip(*ranks.gather((len(readable), own_problems)), strict=True)
        for rank, n in enumerate(counts):
            if not n:
                where = f" of rank {rank}" if ranks.world > 1 else ""
                raise UnreadableImageError(
                    f"step {step}: none of {len(problems[rank])} images{where} can be read; "
                    f"the first: {problems[rank][0]}"
                )
        yield Batch(
            step,
            [e.record for e in readable],
            torch.stack([e.image for e in readable if e.image is not None]),
            [[e.texts[k] for e in readable] for k in range(DRAWS)],
            [torch.tensor([e.long[k] for e in readable]) for k in range(DRAWS)],
            [torch.tensor([e.meanings[k] for e in readable]) for k in range(DRAWS)],
            torch.tensor([identity(e.record.key) for e in readable]),
            sum(counts),
            [problem for one in problems for problem in one],
        )
