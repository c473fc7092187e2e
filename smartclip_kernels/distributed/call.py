"""One distributed loss on this rank: who travels, what an op gets of a block, which gradients stay, which go home."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from smartclip_kernels.distributed.exchange import Exchange
from smartclip_kernels.distributed.strategies import Strategy
from smartclip_kernels.problem import Correction, Tensors
from smartclip_kernels.reference import OBJECTIVES, Objective

T = TypeVar("T")
Inputs = tuple[Tensor | None, ...]
"""Own image, text, mask, scale and bias, as `Needs` has them."""


@dataclass(frozen=True)
class Semantics:
    """What else than the exact gradients is wanted, for open_clip's flags."""

    sides_apart: bool = False
    """image and text receive the gradients of their own anchors' losses alone"""
    features_divided: bool = False
    """gradients of the features are divided by the number of ranks, that of the scale is not"""
    same_value: bool = False
    """all ranks return the same number, the mean over them"""


EXACT = Semantics()


@dataclass(frozen=True)
class Call:
    """What the sweeps of both passes have in common. Features are not here: autograd frees those that it has saved."""

    exchange: Exchange
    strategy: Strategy
    needs: list[bool]
    semantics: Semantics
    rows: tuple[list[int], list[int]]  # of image and text, by rank
    image_travels: bool
    ids: tuple[Tensor | None, ...]  # image's, text's, and ignore ids: the travelling side's those of all ranks
    by_ids: bool  # a caller's ids, not what is made where there are none
    margin: float | None  # whose ceilings the first sweep has to find; None: they are known, or not wanted
    own: Correction  # of own images and own texts
    correction: Correction  # the same, the travelling side's of all ranks
    shares: tuple[float, float]  # of rows' and columns' losses, where both have them
    objective: str
    label_smoothing: float
    backend: str
    workspace: int  # bytes

    @property
    def traits(self) -> Objective:
        return OBJECTIVES[self.objective]

    @property
    def travelling_rows(self) -> list[int]:
        return self.rows[0 if self.image_travels else 1]

    def travelling(self, inputs: Inputs) -> Tensors:
        places = (0,) if self.image_travels else (1, 2)
        return tuple(x for place in places if (x := inputs[place]) is not None)

    def arguments(self, inputs: Inputs, window: slice, block: Tensors) -> tuple[Any, ...]:
        """Of an op, for own rows × those rows of the travelling side."""
        features = (*block, *inputs[1:3]) if self.image_travels else (inputs[0], *block, None)[:3]
        moving = (0, 2) if self.image_travels else (1, 3)
        ids = (x[window] if k in moving and x is not None else x for k, x in enumerate(self.ids))
        return *features, *inputs[3:5], *ids, self.objective, self.label_smoothing, self.backend, self.workspace

    def correction_of(self, window: slice) -> Correction:
        """Of an op, for the same rows."""
        moving = (0, 2) if self.image_travels else (1, 3)
        return Correction(*(x[window] if k in moving and x is not None else x for k, x in enumerate(self.correction)))

    def sides(self, own: T, travelling: T) -> tuple[T, T]:
        """In the order of rows and columns, or back."""
        return (travelling, own) if self.image_travels else (own, travelling)

    def home_gradients(self) -> list[int]:
        """Places of what has travelled."""
        return [place for place in ((0,) if self.image_travels else (1, 2)) if self.needs[place]]

    def own_gradients(self) -> list[int]:
        """Places of what stays here; of scale and bias this rank's share."""
        return [place for place in range(5) if self.needs[place] and place not in self.home_gradients()]

    def finish(self, inputs: Inputs, own: dict[int, Tensor], home: Tensors) -> list[Tensor | None]:
        """Gradients in the inputs' dtypes."""
        found = own | dict(zip(self.home_gradients(), home, strict=True))
        if self.semantics.features_divided:
            found = {k: x / self.exchange.size if k < 3 else x for k, x in found.items()}
        return [None if x is None or k not in found else found[k].to(x.dtype) for k, x in enumerate(inputs)]
