"""States in eager torch against those of every backend and against the definition of the losses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from smartclip_kernels import reference, testing
from smartclip_kernels.problem import Problem
from smartclip_kernels.states import STATES

OBJECTIVES = list(STATES)


def scores(x: testing.Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, and which pairs are positive and which count."""
    logits = reference.similarity(x.image, x.text, x.mask) * x.logit_scale
    positive = reference.positive_pairs(x.image, x.text, x.image_ids, x.text_ids)
    return logits, positive, reference.candidate_pairs(positive, *(x.ignore_ids or (None, None)))


def inputs(objective: str, seed: int, **changes: Any) -> testing.Inputs:
    smoothing = 0.1 if objective == "softmax" and seed % 2 else 0.0
    x = testing.make_inputs(41, 57, 24, objective=objective, ignore=True, label_smoothing=smoothing, seed=seed)
    return replace(x.to(torch.float64), **changes)


def test_every_objective_has_one() -> None:
    assert STATES.keys() == reference.OBJECTIVES.keys()
    for name, traits in reference.OBJECTIVES.items():
        assert len(STATES[name].of(*scores(inputs(name, 0)))) == traits.statistics


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_and_merging(objective: str, seed: int) -> None:
    """Of any candidates, in any pieces: pieces without any candidate, and logits far apart, among them."""
    x = inputs(objective, seed, logit_scale=torch.tensor([20.0, 1e-3, 900.0, 1.0][seed], dtype=torch.float64))
    logits, positive, candidate = scores(x)
    state = STATES[objective]
    whole = state.of(logits, positive, candidate)
    cuts = [slice(0, 1), slice(1, 1 + seed), slice(1 + seed, 30), slice(30, 57)]
    parts = [state.of(logits[:, cut], positive[:, cut], candidate[:, cut]) for cut in cuts if cut.stop > cut.start]
    merged = state.merge(torch.stack([*parts, state.of(logits, positive & False, candidate & False)]))
    torch.testing.assert_close(merged, whole, rtol=1e-12, atol=1e-13)
    rows, *_ = reference.anchor_losses(
        x.image,
        x.text,
        None,
        x.logit_scale,
        None,
        objective=objective,
        image_ids=x.image_ids,
        text_ids=x.text_ids,
        ignore_ids=x.ignore_ids,
        label_smoothing=x.label_smoothing,
    )
    for it in (whole, merged):
        torch.testing.assert_close(state.loss(it, x.label_smoothing), rows, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tau", [0.01, 0.1, 0.8])
def test_debiased_losses_and_gradients(tau: float) -> None:
    x = inputs("softmax", 1, tau_plus=tau)
    logits, positive, candidate = scores(x)
    logits.requires_grad_()
    taus, least = torch.full((len(logits),), tau, dtype=torch.float64), torch.full_like(logits, -20.0)
    rows = reference.softmax_losses(logits, positive, candidate, 0.1, taus, least)
    weight = torch.linspace(-1, 2, len(rows), dtype=torch.float64)
    (expected,) = torch.autograd.grad(rows, logits, weight)
    with torch.no_grad():
        state = STATES["softmax"].of(logits, positive, candidate)
        loss = STATES["softmax"].loss(state, 0.1, taus, least[0, 0])
        arguments = state, weight, 0.1, taus, least[0, 0]
        torch.testing.assert_close(loss, rows, rtol=1e-12, atol=1e-12)
        got = STATES["softmax"].gradient(logits, positive, candidate, *arguments)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)


def test_a_nan_stays_visible() -> None:
    for objective, state in STATES.items():
        logits, positive, candidate = scores(inputs(objective, 0))
        logits[3, 4] = torch.nan
        candidate[3, 4] = True
        halves = [
            state.of(logits[:, cut], positive[:, cut], candidate[:, cut]) for cut in (slice(0, 9), slice(9, None))
        ]
        loss = state.loss(state.merge(torch.stack(halves)), 0.0)
        anchor = positive.any(1) | (objective == "sigmoid")
        assert loss[3].isnan() == anchor[3]
        assert loss[torch.arange(len(loss)) != 3].isfinite().all()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("similarity", ["dot", "masked_cosine"])
def test_backends_keep_the_same(backend: str, similarity: Any, objective: str) -> None:
    """What processes exchange is the backends' statistics: all of them have to mean the same."""
    # The sum of all logits is kept where the smoothing takes it.
    smoothing = 0.1 if reference.OBJECTIVES[objective].both_sides else 0.0
    x = testing.make_inputs(
        41, 57, 24, similarity=similarity, objective=objective, ignore=True, bias=0.5, label_smoothing=smoothing
    )
    assert x.ignore_ids is not None
    problem = Problem(
        x.image,
        x.text,
        x.mask,
        torch.as_tensor(x.logit_scale),
        torch.as_tensor(x.logit_bias),
        x.image_ids,
        x.text_ids,
        x.ignore_ids[0],
        x.ignore_ids[1],
        objective,
        smoothing,
    )
    _, _, *got, _ = torch.ops.smartclip.loss(*problem[:11], backend, 0)
    exact = x.to(torch.float64)
    logits, positive, candidate = scores(exact)
    logits = logits + 0.5
    state = STATES[objective]
    turned = [state.of(logits, positive, candidate), state.of(logits.T, positive.T, candidate.T)]
    for mine, true in zip(got, turned[: 1 + problem.traits.both_sides], strict=False):
        # A backend's maximum may be any shift near it, which its masses are relative to.
        if problem.traits.needs_statistics:
            true[2:4] *= (true[1] - mine[1].double()).exp()
            true[1] = mine[1]
        torch.testing.assert_close(mine.double(), true, rtol=2e-5, atol=2e-5)
