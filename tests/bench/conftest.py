"""Subjects to measure that need nothing but torch, and compute what a test wants."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from bench import timing
from bench.cases import Case, Inputs
from bench.peers import OURS, SUBJECTS, LossFn, Subject
from smartclip_kernels import reference


def definition(case: Case, inputs: Inputs) -> Tensor:
    loss = reference.loss(inputs.image, inputs.text, inputs.mask, inputs.scale, inputs.bias, objective=case.objective)
    assert isinstance(loss, Tensor)
    return loss


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test looks at how long something took."""
    monkeypatch.setattr(timing, "ROUND_SECONDS", 0.001)


@pytest.fixture
def reference_loss() -> Callable[[Case, Inputs], Tensor]:
    return definition


@pytest.fixture
def subjects(monkeypatch: pytest.MonkeyPatch) -> dict[str, LossFn]:
    """Losses that a test may add under a name; ours is the reference, so that only the benchmark is tested."""
    added: dict[str, LossFn] = {}

    def build(name: str) -> Subject:
        return Subject(name, "for a test", lambda case: added.get(name) or (lambda inputs: definition(case, inputs)))

    for name in (OURS, "eager"):
        monkeypatch.setitem(SUBJECTS, name, build(name))
    return added
