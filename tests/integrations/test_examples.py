"""Every example runs as it stands, is short, and does what it says."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

Check = Callable[[Any], bool]


def same_numbers(losses: Any) -> bool:
    before, after = losses
    return after == pytest.approx(before, rel=1e-4) and after[-1] < 0.9 * after[0]


def same_numbers_twice(losses: Any) -> bool:
    plain, cached = losses
    return cached == pytest.approx(plain, rel=1e-5) and plain[-1] < 0.5 * plain[0]


CHECKS: dict[str, tuple[dict[str, int], Check]] = {
    "finetune_smartclip.py": ({"steps": 25}, lambda found: found[1] > 2 * found[0]),
    "train_lightning.py": ({"steps": 15}, same_numbers_twice),
    "train_open_clip.py": ({"steps": 15}, same_numbers),
    "train_sentence_transformers.py": ({"steps": 12}, lambda losses: losses[-1] < 0.95 * losses[0]),
    "train_transformers.py": ({"steps": 15}, lambda losses: losses[-1] < 0.9 * losses[0]),
}


def test_all_are_here() -> None:
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == sorted(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_example(name: str) -> None:
    assert len((EXAMPLES / name).read_text().splitlines()) < 80
    options, check = CHECKS[name]
    assert check(runpy.run_path(str(EXAMPLES / name))["main"](**options))
