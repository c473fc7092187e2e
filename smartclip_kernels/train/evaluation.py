"""What a model has learned, on images it has never seen.

Every model is judged by its own similarity: the dot product of unit vectors, or the masked cosine with the query text's
mask. Images of different galleries (the emoji's two artists) are never candidates for one query; metrics are means over
galleries, in percent.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import smartclip_kernels as sk
from smartclip_kernels.train.data import Record, Source, UnreadableImageError
from smartclip_kernels.train.model import Model, Tokenize

MIN_TRAIN, MIN_TEST = 3, 2
"""A keyword is a fair query if so many training and test concepts have it."""
CHUNK = 256


@dataclass(frozen=True)
class Texts:
    """Embedded texts: (M, D) and (M, D) or None."""

    text: Tensor
    mask: Tensor | None

    def similarity(self, image: Tensor) -> Tensor:
        """(N, M), by this model's own measure."""
        return image @ self.text.T if self.mask is None else sk.masked_similarity(image, self.text, self.mask)


class Embedder:
    """A model with what it needs to read images and texts, in evaluation mode."""

    def __init__(self, model: Model, tokenize: Tokenize, source: Source, device: str) -> None:
        self.model, self.tokenize, self.source, self.device = model, tokenize, source, device

    @torch.no_grad()
    def images(self, records: Sequence[Record]) -> tuple[Tensor, list[Record]]:
        """(N, D) and the N records whose images can be read."""
        self.model.eval()
        parts, kept = [], []
        for i in range(0, len(records), CHUNK):
            pixels = []
            for record in records[i : i + CHUNK]:
                try:
                    pixels.append(self.source.read(record))
                    kept.append(record)
                except UnreadableImageError as problem:  # noqa: PERF203
                    warnings.warn(f"unreadable image skipped: {problem}", stacklevel=2)
            if pixels:
                parts.append(self.model.image(torch.stack(pixels).to(self.device)))
        return torch.cat(parts), kept

    @torch.no_grad()
    def texts(self, texts: Sequence[str], *, long: bool = False) -> Texts:
        """`long`: these are long captions, which tell all of an image."""
        self.model.eval()
        parts = [self._text(texts[i : i + CHUNK], long) for i in range(0, len(texts), CHUNK)]
        masks = [mask for _, mask in parts if mask is not None]
        return Texts(torch.cat([text for text, _ in parts]), torch.cat(masks) if masks else None)

    def _text(self, texts: Sequence[str], long: bool) -> tuple[Tensor, Tensor | None]:
        tokens = self.tokenize(texts).to(self.device)
        embedded: tuple[Tensor, Tensor | None] = self.model.text(
            tokens, torch.full((len(texts),), long, device=self.device)
        )
        return embedded


def evaluate(embedder: Embedder) -> dict[str, float]:
    """All metrics that the records' captions and labels allow."""
    train, held_out = embedder.source.records["train"], embedder.source.records["eval"]
    galleries = sorted({r.gallery for r in held_out})
    per_gallery = [_gallery(embedder, train, [r for r in held_out if r.gallery == g]) for g in galleries]
    return {name: sum(m[name] for m in per_gallery) / len(per_gallery) for name in per_gallery[0]}


def _gallery(embedder: Embedder, train: Sequence[Record], records: Sequence[Record]) -> dict[str, float]:
    image, records = embedder.images(records)
    metrics = retrieval(image, embedder.texts([r.captions.whole() for r in records], long=True))
    words = keywords(train, records)
    if words:
        relevant = torch.tensor([[w in r.captions.short for w in words] for r in records], device=image.device)
        texts = embedder.texts(words)
        metrics["keyword mAP"] = average_precision(texts.similarity(image), relevant)
        if texts.mask is not None:
            metrics["kept by keywords"] = 100 * texts.mask.float().mean().item()
    for label in ("group", "subgroup"):
        classes = sorted({r.labels[label] for r in records if label in r.labels})
        if classes:
            metrics[f"zero-shot {label}"] = zero_shot(embedder, image, records, label, classes)
    for aspect in ("role", "gender", "tone"):
        # People of one tone and one gender: the query names one of the three, whatever the other two.
        rows = [i for i, r in enumerate(records) if {"role", "gender", "tone"} <= r.labels.keys() and r.labels[aspect]]
        classes = sorted({records[i].labels[aspect] for i in rows})
        if classes:
            relevant = torch.tensor(
                [[records[i].labels[aspect] == c for c in classes] for i in rows], device=image.device
            )
            metrics[f"{aspect} mAP"] = average_precision(embedder.texts(classes).similarity(image[rows]), relevant)
    return metrics


def retrieval(image: Tensor, long: Texts) -> dict[str, float]:
    """R@k of each image's own long caption, both ways."""
    metrics = {}
    for name, per in (("text→image", "text"), ("image→text", "image")):
        ranks = sk.retrieval_ranks(image, long.text, long.mask, per=per)  # type: ignore[arg-type]
        for k in (1, 5, 10):
            metrics[f"{name} R@{k}"] = 100 * (ranks <= k).double().mean().item()
    if long.mask is not None:
        metrics["kept by long captions"] = 100 * long.mask.float().mean().item()
    return metrics


def keywords(train: Sequence[Record], records: Sequence[Record]) -> list[str]:
    """Short captions that at least 3 training and 2 test concepts share."""
    unseen = {w: n for w, n in _concepts(records).items() if n >= MIN_TEST}
    seen = _concepts(train, unseen)
    return sorted(w for w in unseen if seen[w] >= MIN_TRAIN)


def _concepts(records: Sequence[Record], words: Container[str] | None = None) -> Counter[str]:
    """Short caption -> how many concepts have it; of `words` only, if there are millions of records."""
    pairs = {(r.concept, w) for r in records for w in r.captions.short if words is None or w in words}
    return Counter(word for _, word in pairs)


def average_precision(sim: Tensor, relevant: Tensor) -> float:
    """Mean over texts of the average precision of the images' order, in %.

    sim, relevant: (N, M); every text has a relevant image.
    """
    order = sim.sort(dim=0, descending=True, stable=True).indices
    hits = relevant.gather(0, order).double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1, device=sim.device)[:, None]
    return 100 * ((precision * hits).sum(0) / hits.sum(0)).mean().item()


def zero_shot(embedder: Embedder, image: Tensor, records: Sequence[Record], label: str, classes: list[str]) -> float:
    """Share of images nearest to their class's name, each class counting the same, in %."""
    best = embedder.texts(classes).similarity(image).argmax(1).tolist()
    right: dict[str, list[bool]] = {c: [] for c in classes}
    for record, k in zip(records, best, strict=True):
        if label in record.labels:
            right[record.labels[label]].append(classes[k] == record.labels[label])
    return 100 * sum(sum(r) / len(r) for r in right.values()) / len(right)
