"""What a sweep keeps of an anchor, in eager torch: the twin of `State`, `loss` and `gradient` in csrc/objective.h.

A state is (planes, anchors), one plane a number; `Objective.statistics` counts them, and the compiled code fills the
same ones. States of different candidates of an anchor merge into the state of all of them: that is what processes
exchange (distributed/). The reference backend makes its states here.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class State(Protocol):
    """Of one objective. Anchors are the rows; for those of the columns everything comes transposed."""

    def of(self, logits: Tensor, positive: Tensor, candidate: Tensor) -> Tensor:
        """(planes, N), from logits (N, M) and which pairs are positive and which count."""

    def merge(self, states: Tensor) -> Tensor:
        """(planes, N), from (parts, planes, N). The order of parts decides the last bits."""

    def loss(self, state: Tensor, smoothing: float, tau: Tensor | None = None, least: Tensor | float = 0.0) -> Tensor:
        """(N,). `tau` (N,) and `least` (0-D, β − α) are for debiased negatives."""

    def gradient(
        self,
        logits: Tensor,
        positive: Tensor,
        candidate: Tensor,
        state: Tensor,
        weight: Tensor,
        smoothing: float,
        tau: Tensor | None = None,
        least: Tensor | float = 0.0,
    ) -> Tensor:
        """(N, M): what these anchors add to G, each loss weighted by `weight` (N,)."""


class Softmax:
    """positives, max, positive_mass, other_mass, total, positive_sum, candidates: see csrc/objective.h.

    Masses are sums of e^{s − max}. Where a lone positive is nearly certain, its probability minus 1 would cancel; minus
    the others' probability does not, so they are kept apart.
    """

    def of(self, logits: Tensor, positive: Tensor, candidate: Tensor) -> Tensor:
        largest = logits.masked_fill(~candidate, torch.finfo(logits.dtype).min).amax(1)
        mass = torch.where(candidate, (logits - largest[:, None]).exp(), 0)
        planes = (
            positive.sum(1),
            largest,
            torch.where(positive, mass, 0).sum(1),
            torch.where(positive, 0, mass).sum(1),
            torch.where(candidate, logits, 0).sum(1),
            torch.where(positive, logits, 0).sum(1),
            candidate.sum(1),
        )
        return torch.stack([plane.to(logits.dtype) for plane in planes])

    def merge(self, states: Tensor) -> Tensor:
        merged = states.sum(0)
        merged[1] = states[:, 1].amax(0)
        merged[2:4] = (states[:, 2:4] * (states[:, 1] - merged[1]).exp()[:, None]).sum(0)
        return merged

    def raised(self, state: Tensor, tau: Tensor | None, least: Tensor | float) -> Tensor:
        """With a τ, relative to the floor's logit where that is larger, so that g stays finite."""
        if tau is None:
            return state
        enough = (tau == 0) | (least <= state[1])
        rescale = torch.where(enough, 1, (state[1] - least).exp())
        planes = state[0], torch.where(enough, state[1], least), *(state[2:4] * rescale), *state[4:]
        return torch.stack(planes)

    def negatives(self, state: Tensor, tau: Tensor | None, least: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """g, relative to max, and its derivatives by the others' mass and by the positives'."""
        positives, largest, positive_mass, other_mass, *_, candidates = state
        if tau is None:
            return other_mass, torch.ones_like(other_mass), torch.zeros_like(other_mass)
        count = candidates - positives
        among = count * tau / positives
        debiased = (other_mass - among * positive_mass) / (1 - tau)
        floor = torch.where(count == 0, 0, count * (least - largest).exp())
        biased, floored = tau == 0, debiased < floor
        return (
            torch.where(biased, other_mass, torch.where(floored, floor, debiased)),
            torch.where(biased, 1, torch.where(floored, 0, 1 / (1 - tau))),
            torch.where(biased | floored, 0, -among / (1 - tau)),
        )

    def loss(self, state: Tensor, smoothing: float, tau: Tensor | None = None, least: Tensor | float = 0.0) -> Tensor:
        state = self.raised(state, tau, least)
        positives, largest, positive_mass, _, total, positive_sum, candidates = state
        negatives, *_ = self.negatives(state, tau, least)
        anchor = positives > 0
        positive_mean = positive_sum / positives.clamp(min=1)
        # max is subtracted before the logarithm is added: their sum would round at the size of the logits.
        general = (largest - (1 - smoothing) * positive_mean) + (positive_mass + negatives).log()
        certain = smoothing * positive_sum + torch.log1p(negatives / positive_mass)
        loss = torch.where((positives == 1) & (negatives <= positive_mass), certain, general)
        if smoothing:
            loss = loss - smoothing * total / candidates
        return torch.where(anchor, loss, 0)

    def gradient(
        self,
        logits: Tensor,
        positive: Tensor,
        candidate: Tensor,
        state: Tensor,
        weight: Tensor,
        smoothing: float,
        tau: Tensor | None = None,
        least: Tensor | float = 0.0,
    ) -> Tensor:
        state = self.raised(state, tau, least)
        planes = *state, *self.negatives(state, tau, least)
        positives, largest, positive_mass, other_mass, _, _, candidates, *negatives = (x[:, None] for x in planes)
        negative_mass, by_others, by_positives = negatives
        mass = positive_mass + negative_mass
        probability = (logits - largest).exp() / mass
        # Of a lone positive P (1 + ∂g/∂P) / (P + g) − 1 without cancelling.
        pushed = torch.where(by_others == 0, negative_mass, other_mass * by_others)
        several = probability * (1 + by_positives) - (1 - smoothing) / positives
        error = torch.where(positives == 1, smoothing - pushed / mass, several)
        error = torch.where(positive, error, probability * by_others) - smoothing / candidates
        return torch.where(candidate & (positives > 0), weight[:, None] * error, 0)


class Sigmoid:
    """sum: Σ_j softplus(−z_ij s_ij), z = +1 for a positive pair, −1 otherwise."""

    def of(self, logits: Tensor, positive: Tensor, candidate: Tensor) -> Tensor:
        signed = torch.where(positive, logits, -logits)
        return torch.where(candidate, -F.logsigmoid(signed), 0).sum(1)[None]

    def merge(self, states: Tensor) -> Tensor:
        return states.sum(0)

    def loss(self, state: Tensor, smoothing: float, tau: Tensor | None = None, least: Tensor | float = 0.0) -> Tensor:
        return state[0].clone()

    def gradient(
        self,
        logits: Tensor,
        positive: Tensor,
        candidate: Tensor,
        state: Tensor,
        weight: Tensor,
        smoothing: float,
        tau: Tensor | None = None,
        least: Tensor | float = 0.0,
    ) -> Tensor:
        slope = torch.where(positive, -torch.sigmoid(-logits), torch.sigmoid(logits))
        return torch.where(candidate, weight[:, None] * slope, 0)


STATES: dict[str, State] = {"softmax": Softmax(), "sigmoid": Sigmoid()}
