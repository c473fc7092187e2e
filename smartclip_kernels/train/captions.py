"""What is said of an image, which part of it a step hears, and its tokens.

A short caption speaks of one aspect and is shared by many images; a long one tells all. A draw says two things of every
image, so that all four policies hear as many captions:

    "short"  two short ones        "mixed"  two, each long or short by a coin
    "long"   two long ones         "both"   one long, one short
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

DRAWS = 2
"""Captions of every image in a step."""
PAD = 0


@dataclass(frozen=True)
class Captions:
    """One image's captions."""

    short: tuple[str, ...]
    long: str
    """"{short}" in it stands for all short ones: in their own order, or for training in a random one"""

    def whole(self, rng: random.Random | None = None) -> str:
        order = list(self.short)
        if rng is not None:
            rng.shuffle(order)
        return self.long.replace("{short}", ", ".join(order))

    @classmethod
    def of_text(cls, text: str) -> Captions:
        """A plain caption: its sentences and clauses are the short ones (as SmartCLIP draws them)."""
        parts = tuple(p.strip() for p in re.split(r"[.;,!?\n]+", text) if p.strip())
        return cls(parts or (text,), text)


def kinds(policy: str, rng: random.Random) -> list[str]:
    """What to say of an image in a step: "long" or "short", DRAWS times."""
    if policy == "both":
        return ["long", "short"]
    if policy == "mixed":
        return [rng.choice(("long", "short")) for _ in range(DRAWS)]
    return [policy] * DRAWS


def draw(captions: Captions, kind: str, rng: random.Random) -> str:
    return captions.whole(rng) if kind == "long" else rng.choice(captions.short)


_NO_WORD = Regex(r"[^\p{L}\p{N}]+")
_SPECIAL = ("[pad]", "[unk]", "[start]")


def word_tokenizer(texts: Iterable[str], size: int = 16384) -> Tokenizer:
    """Lower-case words, the `size` most frequent of `texts`, in whatever order those come."""
    split = pre_tokenizers.Split(_NO_WORD, behavior="removed")
    counts = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text.lower()))
    frequent = sorted(counts, key=lambda word: (-counts[word], word))[: size - len(_SPECIAL)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*_SPECIAL, *frequent])}, unk_token="[unk]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.TemplateProcessing("[start] $A", special_tokens=[("[start]", 2)])
    return tokenizer


def byte_tokenizer() -> Tokenizer:
    """The 256 bytes of UTF-8."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*_SPECIAL, *alphabet])}, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            pre_tokenizers.Split("", behavior="isolated"),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing("[start] $A", special_tokens=[("[start]", 2)])
    return tokenizer


class Encoder:
    """Texts -> (M, T) int64, padded with 0 to the longest of them."""

    def __init__(self, tokenizer: Tokenizer, context: int) -> None:
        self.tokenizer = tokenizer
        self.size = tokenizer.get_vocab_size()
        tokenizer.enable_truncation(context)
        tokenizer.enable_padding(pad_id=PAD, pad_token="[pad]")

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([e.ids for e in self.tokenizer.encode_batch(list(texts))], dtype=torch.int64)
