"""What a sweep keeps of an anchor, in eager torch: the twin of `State`, `loss` and `gradient` in csrc/objective.h.

A state is (planes, anchors), one plane a number; `Objective.statistics` counts them, and the compiled code fills the
same ones. States of different candidates of an anchor merge into the state of all of them: that is what processes
exchange (distributed.py). The reference backend makes its states here.
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

    def loss(self, state: Tensor, smoothing: float) -> Tensor:
        """(N,)."""

    def gradient(
        self, logits: Tensor, positive: Tensor, candidate: Tensor, state: Tensor, weight: Tensor, smoothing: float
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

    def loss(self, state: Tensor, smoothing: float) -> Tensor:
        positives, largest, positive_mass, other_mass, total, positive_sum, candidates = state
        anchor = positives > 0
        positive_mean = positive_sum / positives.clamp(min=1)
        # max is subtracted before the logarithm is added: their sum would round at the size of the logits.
        general = (largest - (1 - smoothing) * positive_mean) + (positive_mass + other_mass).log()
        certain = smoothing * positive_sum + torch.log1p(other_mass / positive_mass)
        loss = torch.where((positives == 1) & (other_mass <= positive_mass), certain, general)
        if smoothing:
            loss = loss - smoothing * total / candidates
        return torch.where(anchor, loss, 0)

    def gradient(
        self, logits: Tensor, positive: Tensor, candidate: Tensor, state: Tensor, weight: Tensor, smoothing: float
    ) -> Tensor:
        positives, largest, positive_mass, other_mass, _, _, candidates = (plane[:, None] for plane in state)
        mass = positive_mass + other_mass
        probability = (logits - largest).exp() / mass
        error = torch.where(positives == 1, smoothing - other_mass / mass, probability - (1 - smoothing) / positives)
        error = torch.where(positive, error, probability) - smoothing / candidates
        return torch.where(candidate & (positives > 0), weight[:, None] * error, 0)


class Sigmoid:
    """sum: Σ_j softplus(−z_ij s_ij), z = +1 for a positive pair, −1 otherwise."""

    def of(self, logits: Tensor, positive: Tensor, candidate: Tensor) -> Tensor:
        signed = torch.where(positive, logits, -logits)
        return torch.where(candidate, -F.logsigmoid(signed), 0).sum(1)[None]

    def merge(self, states: Tensor) -> Tensor:
        return states.sum(0)

    def loss(self, state: Tensor, smoothing: float) -> Tensor:
        return state[0].clone()

    def gradient(
        self, logits: Tensor, positive: Tensor, candidate: Tensor, state: Tensor, weight: Tensor, smoothing: float
    ) -> Tensor:
        slope = torch.where(positive, -torch.sigmoid(-logits), torch.sigmoid(logits))
        return torch.where(candidate, weight[:, None] * slope, 0)


STATES: dict[str, State] = {"softmax": Softmax(), "sigmoid": Sigmoid()}
