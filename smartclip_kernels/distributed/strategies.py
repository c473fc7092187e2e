"""How the travelling side's rows reach every rank, and how their gradients come home."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol

from smartclip_kernels.distributed.exchange import Exchange, Pending
from smartclip_kernels.problem import Tensors

Visit = Callable[[slice, Tensors], Tensors]
"""(which of all ranks' rows, those rows) -> their gradients in a wide precision, or nothing."""


class Strategy(Protocol):
    def sweep(self, block: Tensors, visit: Visit) -> Tensors:
        """Every rank's rows pass `visit` once. Returns the sums over ranks of own rows' gradients."""


class Gather:
    """All at once: O(M·D) memory. The rows stay for the next sweep."""

    def __init__(self, exchange: Exchange, rows: Sequence[int]) -> None:
        self.exchange, self.rows = exchange, rows
        self.whole: Tensors = ()

    def sweep(self, block: Tensors, visit: Visit) -> Tensors:
        self.whole = self.whole or self.exchange.gather(block, self.rows)
        return self.exchange.sum_home(visit(slice(0, sum(self.rows)), self.whole), self.rows)


class Ring:
    """Rank by rank, the next rows in flight while these are visited: O(M·D / W) memory.

    A block's gradients follow it, one visit behind. The owner's own wait at home for the sum of the others'.
    """

    def __init__(self, exchange: Exchange, rows: Sequence[int]) -> None:
        self.exchange, self.rows = exchange, rows
        self.starts = [0, *accumulate(rows)]

    def sweep(self, block: Tensors, visit: Visit) -> Tensors:
        exchange, size = self.exchange, self.exchange.size
        at_home: Tensors = ()
        following: Pending | None = None
        for visited in range(size):
            owner = (exchange.who - visited) % size
            next_rows = self.rows[(owner - 1) % size]
            coming = exchange.shift(block, next_rows) if visited < size - 1 else None
            grads = visit(slice(self.starts[owner], self.starts[owner + 1]), block)
            if visited == 0:
                at_home = grads
            elif grads:
                grads = grads if following is None else _sums(grads, following.wait())
                following = exchange.shift(grads, next_rows)
            if coming is not None:
                block = coming.wait()
        return at_home if following is None else _sums(at_home, following.wait())


def _sums(into: Tensors, others: Tensors) -> Tensors:
    return tuple(x.add_(y) for x, y in zip(into, others, strict=True))


STRATEGIES: dict[str, type[Gather] | type[Ring]] = {"gather": Gather, "ring": Ring}
