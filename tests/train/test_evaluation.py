from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from smartclip_kernels.train.captions import Captions
from smartclip_kernels.train.data import Record
from smartclip_kernels.train.evaluation import (
    Embedder,
    Texts,
    average_precision,
    evaluate,
    keywords,
    retrieval,
    zero_shot,
)


def test_average_precision_of_known_orders() -> None:
    sim = torch.tensor([[4.0, 1.0], [3.0, 2.0], [2.0, 3.0], [1.0, 4.0]])
    relevant = torch.tensor([[True, True], [False, False], [True, False], [False, False]])
    # First text: ranks 1 and 3, (1/1 + 2/3) / 2. Second text: rank 4, 1/4.
    assert average_precision(sim, relevant) == pytest.approx(100 * ((1 + 2 / 3) / 2 + 1 / 4) / 2)
    assert average_precision(sim, sim > 2.5) == 100


def test_retrieval_both_ways() -> None:
    image = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), dim=1)
    text = image[[0, 1, 1]]  # the third caption says the same as the second: image 2 comes second for it
    metrics = retrieval(image, Texts(text, None))
    assert metrics["text→image R@1"] == pytest.approx(100 * 2 / 3)
    assert metrics["text→image R@5"] == 100
    masked = retrieval(image, Texts(text, torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0]])))
    assert masked["kept by long captions"] == pytest.approx(100 * 5 / 6)


def test_masked_models_are_judged_by_their_masks() -> None:
    image = torch.tensor([[0.8, 0.6], [0.1, 0.995]])
    text = torch.tensor([[1.0, 0.0]])
    assert Texts(text, None).similarity(image).argmax(0).item() == 0
    masked = Texts(text, torch.tensor([[1.0, 0.0]])).similarity(image)
    torch.testing.assert_close(masked, torch.ones(2, 1))


def record(n: int, gallery: str, short: tuple[str, ...], **labels: str) -> Record:
    return Record(f"{n} {gallery}", str(n), Captions(short, f"number {n}"), None, labels, gallery)


def test_fair_keywords() -> None:
    """By concept, not by image: both drawings of one emoji count once."""
    train = [record(n, g, ("often", "rare") if n < 2 else ("often",)) for n in range(3) for g in "ab"]
    held_out = [record(n, g, ("often", "rare", "new") if n < 11 else ("often",)) for n in (10, 11) for g in "ab"]
    assert keywords(train, held_out) == ["often"]
    assert keywords(train, held_out[:2]) == []


class Oracle(Embedder):
    """Embeddings given by hand: an image is its record's number on the unit circle, a text the angle in its table."""

    def __init__(self, records: dict[str, list[Record]], angles: dict[str, float]) -> None:
        self.source: Any = type("S", (), {"records": records})()
        self.angles = angles

    def images(self, records: Sequence[Record]) -> tuple[Tensor, list[Record]]:
        return self._circle([float(r.concept) for r in records]), list(records)

    def texts(self, texts: Sequence[str], *, long: bool = False) -> Texts:
        return Texts(self._circle([self.angles[t] for t in texts]), None)

    @staticmethod
    def _circle(degrees: Sequence[float]) -> Tensor:
        angle = torch.tensor(degrees).deg2rad()
        return torch.stack([angle.cos(), angle.sin()], dim=1)


def test_zero_shot_counts_every_class_the_same() -> None:
    records = [record(n, "a", (), group="low" if n < 40 else "high") for n in (0, 10, 20, 35, 70)]
    oracle = Oracle({}, {"low": 0.0, "high": 60.0})
    image, _ = oracle.images(records)
    # "low" gets 0, 10 and 20 right and 35 wrong, "high" its only one.
    assert zero_shot(oracle, image, records, "group", ["high", "low"]) == pytest.approx(100 * (3 / 4 + 1) / 2)


def test_aspects_are_asked_of_people_of_one_tone_and_gender() -> None:
    person = {"gender": "man", "tone": "dark skin tone"}
    held_out = [
        record(0, "a", (), role="cook", **person),
        record(10, "a", (), role="pilot", gender="woman", tone="dark skin tone"),
        record(1, "a", (), tone="dark skin tone"),  # a hand: right under the query, and no person
    ]
    angles = {"number 0": 0.0, "number 1": 1.0, "number 10": 10.0, "cook": 0.0, "pilot": 10.0}
    angles |= {"man": 10.0, "woman": 10.0, "dark skin tone": 0.0}
    metrics = evaluate(Oracle({"train": [], "eval": held_out}, angles))
    assert metrics["role mAP"] == 100
    assert metrics["gender mAP"] == pytest.approx(100 * (1 / 2 + 1) / 2)
    assert metrics["tone mAP"] == 100
    assert metrics["text→image R@1"] == 100
    assert "keyword mAP" not in metrics


def test_galleries_do_not_compete() -> None:
    held_out = [record(n, g, ()) for n in (0, 90) for g in "ab"]
    metrics = evaluate(Oracle({"train": [], "eval": held_out}, {"number 0": 0.0, "number 90": 90.0}))
    assert metrics["text→image R@1"] == metrics["image→text R@1"] == 100
