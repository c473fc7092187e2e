"""What the matrix products multiply, panel by panel, and what becomes of their gradients.

A similarity has `accumulators` pairs of operands: accumulator k of a tile is rows[k] @ columns[k]ᵀ, where they are
`nested` plus the one before it. From the gradients d[k] of a tile's products the engine sums d[k] @ columns[k] into a
panel's rows and d[k]ᵀ @ rows[k] into the columns; `store_rows` and `store_columns` make the inputs' gradients of these
sums, times `gain`. A score gradient is what a row or column has in sum of dL/dsim · sim. Panels are prepared one at a
time: widened to the precision of the scores, or, `native`, in the inputs' own precision, for kernels that multiply
half-precision numbers exactly.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from smartclip_kernels.problem import Needs, Problem, Tensors

PANEL_ROWS = 2048


class Dot:
    """sim = ⟨image, text⟩: inputs as they are, half precision widened unless `native`."""

    name = "dot"
    accumulators = 1
    nested = False

    def __init__(self, problem: Problem, native: bool = False) -> None:
        self.sum_dtype = problem.dtype
        self.dtype = problem.image.dtype if native else problem.dtype
        arrange = _aligned if native else _rows_contiguous
        self.image = arrange(problem.image)
        self.text = arrange(problem.text)
        self.row_factor: Tensor | None = None
        self.column_factor: Tensor | None = None

    def panel_bytes(self, problem: Problem) -> int:
        """What one row of a panel takes, for the workspace: its copy, and sums that have no home in the gradients."""
        return 0 if problem.image.dtype == problem.dtype else 3 * problem.d * problem.dtype.itemsize

    def rows(self, panel: slice) -> Tensors:
        return (self.image[panel].to(self.dtype),)

    def columns(self, panel: slice) -> Tensors:
        return (self.text[panel].to(self.dtype),)

    def row_sums(self, grads: list[Tensor], panel: slice, needs: Needs) -> list[Tensor]:
        """Where the panel's sums are made: one for each accumulator, or none."""
        return [_home(grads[0][panel], self.sum_dtype)] if needs.image else []

    def column_sums(self, grads: list[Tensor], needs: Needs) -> list[Tensor]:
        return [_home(grads[1], self.sum_dtype)] if needs.text else []

    def store_rows(
        self,
        grads: list[Tensor],
        panel: slice,
        rows: Tensors,
        sums: list[Tensor],
        score_gradient: Tensor | None,
        gain: Tensor | None,
    ) -> None:
        if sums:
            settle(grads[0][panel], sums[0], gain)

    def store_columns(
        self, grads: list[Tensor], sums: list[Tensor], needs: Needs, score_gradient: Tensor | None, gain: Tensor | None
    ) -> None:
        if sums:
            settle(grads[1], sums[0], gain)


class MaskedCosine:
    """sim = cos(image ⊙ mask, text): P = image · (mask ⊙ text)ᵀ and Q = image² · (mask²)ᵀ.

    A row of image is divided by a power of two (its `row_factor`), which is exact and cancels in P/√Q, so that its
    squares neither overflow nor vanish. `column_factor` is 1/‖text‖, 0 where the norm is too small.

    `native` half precision: a number of twice the digits, as a square is, becomes the sum of two halves, so the
    operands are image, image² high and low · mask ⊙ text and mask² high, both low, and whether any of those is not 0:
    with masks of 0 and 1 none is. Texts are divided by powers of two as well: dP has to fit half precision.
    """

    name = "masked_cosine"
    accumulators = 2
    nested = False

    def __init__(self, problem: Problem, native: bool = False) -> None:
        assert problem.mask is not None
        self.sum_dtype = problem.dtype
        self.dtype = problem.image.dtype if native else problem.dtype
        self.split = self.dtype != problem.dtype
        self.arrange = _all_aligned if native else tuple
        self.image = _rows_contiguous(problem.image)
        self.text = _rows_contiguous(problem.text)
        self.mask = _rows_contiguous(problem.mask)
        self.row_factor = _powers_of_two(self.image, problem.dtype)
        self.column_factor = _inverse_norms(self.text, problem.dtype)
        self.text_power: Tensor | None = None
        if self.split:
            self.text_power = _powers_of_two(self.text, problem.dtype)
            self.column_factor *= self.text_power

    def panel_bytes(self, problem: Problem) -> int:
        return (4 if self.split else 5) * problem.d * problem.dtype.itemsize

    def rows(self, panel: slice) -> Tensors:
        image = self.image[panel] * (1 / self.row_factor[panel, None])
        if not self.split:
            return self.arrange((image, image.square()))
        return self.arrange((image.to(self.dtype), *_high_and_low(image.square(), self.dtype)))

    def columns(self, panel: slice) -> Tensors:
        mask = self.mask[panel].to(self.sum_dtype)
        masked_text, square = self._text(panel) * mask, mask.square()
        if not self.split:
            return self.arrange((masked_text, square))
        (text_high, text_low), (square_high, square_low) = (_high_and_low(x, self.dtype) for x in (masked_text, square))
        inexact = torch.maximum(text_low.abs().amax(), square_low.abs().amax()).ne(0).to(torch.int32)
        return *self.arrange((text_high, square_high, text_low, square_low)), inexact

    def row_sums(self, grads: list[Tensor], panel: slice, needs: Needs) -> list[Tensor]:
        if not needs.image:
            return []
        first = _home(grads[0][panel], self.sum_dtype)
        return [first, torch.empty_like(first)]

    def column_sums(self, grads: list[Tensor], needs: Needs) -> list[Tensor]:
        """Sums live in the gradients of text and mask themselves; a locked text under a learned mask needs its own."""
        if not (needs.text or needs.mask):
            return []
        first = (
            _home(grads[1], self.sum_dtype)
            if needs.text
            else self.text.new_empty(self.text.shape, dtype=self.sum_dtype)
        )
        return [first, _home(grads[2], self.sum_dtype)] if needs.mask else [first]

    def store_rows(
        self,
        grads: list[Tensor],
        panel: slice,
        rows: Tensors,
        sums: list[Tensor],
        score_gradient: Tensor | None,
        gain: Tensor | None,
    ) -> None:
        """grad_image = dP·(mask ⊙ text) + 2 image ⊙ (dQ·mask²), and the power of two undone."""
        if sums:
            total, square = sums
            total.addcmul_(rows[0], square, value=2).mul_(1 / self.row_factor[panel, None])
            settle(grads[0][panel], total, gain)

    def store_columns(
        self, grads: list[Tensor], sums: list[Tensor], needs: Needs, score_gradient: Tensor | None, gain: Tensor | None
    ) -> None:
        """With A = dPᵀ·image, B = dQᵀ·image²: grad_text = A ⊙ mask − text/‖text‖² Σ_i dL/dsim_ij sim_ij,
        grad_mask = A ⊙ text + 2 mask ⊙ B."""
        if not sums:
            return
        for start in range(0, len(self.text), PANEL_ROWS):
            panel = slice(start, start + PANEL_ROWS)
            text, mask = self._text(panel), self.mask[panel].to(self.sum_dtype)
            product = _times(sums[0][panel], gain)
            if needs.mask:
                square = _times(sums[1][panel], gain)
                square.mul_(mask).mul_(2).addcmul_(product, text)
                settle(grads[2][panel], square)
            if needs.text:
                assert score_gradient is not None  # the engine makes it where the text needs a gradient
                norm = _times(score_gradient[panel] * self.column_factor[panel].square(), gain)
                product.mul_(mask).addcmul_(text, norm[:, None], value=-1)
                if self.text_power is not None:
                    product.mul_(1 / self.text_power[panel, None])
                settle(grads[1][panel], product)

    def _text(self, panel: slice) -> Tensor:
        text = self.text[panel].to(self.sum_dtype)
        return text if self.text_power is None else text * (1 / self.text_power[panel, None])


Operands = Dot | MaskedCosine


def _rows_contiguous(x: Tensor) -> Tensor:
    """Matrix products take any row stride, but numbers of a row must be neighbours."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _aligned(x: Tensor) -> Tensor:
    """The same with rows that start at multiples of 16 bytes: a padded copy where they do not."""
    x = _rows_contiguous(x)
    numbers = 16 // x.element_size()
    if x.data_ptr() % 16 == 0 and x.stride(0) % numbers == 0:
        return x
    padded = x.new_empty(len(x), -(-x.shape[1] // numbers) * numbers)[:, : x.shape[1]]
    return padded.copy_(x)


def _all_aligned(operands: Iterable[Tensor]) -> Tensors:
    return tuple(map(_aligned, operands))


def _high_and_low(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x as the sum of two numbers of half precision: exact where x has no more digits than they have together."""
    high = x.to(dtype)
    return high, (x - high).to(dtype)


def _home(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient itself where sums of that precision fit in, else a tensor of its own, rounded once at the end."""
    return grad if grad.dtype == dtype else torch.empty(grad.shape, dtype=dtype, device=grad.device)


def _times(total: Tensor, gain: Tensor | None) -> Tensor:
    return total if gain is None else total.mul_(gain)


def settle(grad: Tensor, total: Tensor, gain: Tensor | None = None) -> None:
    """The sums times the gain, where they belong; in half precision rounded there, in one pass."""
    if grad.data_ptr() == total.data_ptr():
        _times(total, gain)
    elif gain is None:
        grad.copy_(total)
    else:
        torch.mul(total, gain, out=grad)


def _powers_of_two(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(rows,): 2^e with max|x_i| in [2^e, 2^(e+1)), within the normal numbers; 1 for a row of zeros."""
    largest = torch.linalg.vector_norm(x, ord=torch.inf, dim=1).to(dtype)
    _, exponent = torch.frexp(largest)
    limit = 126 if dtype == torch.float32 else 1022
    power = torch.ldexp(torch.ones_like(largest), (exponent - 1).clamp(-limit, limit))
    return torch.where((largest > 0) & largest.isfinite(), power, 1)


def _inverse_norms(text: Tensor, dtype: torch.dtype) -> Tensor:
    """(M,): 1/‖text_j‖, 0 where the norm is at most 1e-12. Squares are summed in float64: float32's overflow."""
    norms = torch.empty(len(text), dtype=torch.float64, device=text.device)
    for start in range(0, len(text), PANEL_ROWS):
        panel = slice(start, start + PANEL_ROWS)
        torch.linalg.vector_norm(text[panel].double(), dim=1, out=norms[panel])
    # 1/inf is 0, which would hide the infinity as a text too small to compare.
    return torch.where(norms <= 1e-12, 0, torch.where(norms.isinf(), torch.nan, 1 / norms)).to(dtype)
