"""False-negative masking: above what logit an anchor ignores what is not positive."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smartclip_kernels import checks
from smartclip_kernels.ops import autocast
from smartclip_kernels.problem import Correction, LossCall
from smartclip_kernels.reference import compute_dtype, paired_similarity

_PANEL_ROWS = 4096  # widened at a time


def with_ceilings(call: LossCall) -> Correction:
    """The call's correction, complete, where its images and texts are all that there are."""
    if call.margin is None:
        return call.correction
    checks.problem(*call.arguments[:11])
    scale, bias, *ids = call.arguments[3:7]
    image, text, mask = autocast(*call.arguments[:3])
    best = best_positives(image, text, mask, ids, call.arguments[11])
    return correction_of(call.correction, best, call.margin, scale, bias)


def correction_of(
    known: Correction, best: Sequence[Tensor], margin: float, scale: Tensor, bias: Tensor | None
) -> Correction:
    """Completed by ceilings: what `best`, of images and of texts, and the margin score."""
    alpha, beta = (0.0 if x is None else x.detach().reshape(()).to(best[0].dtype) for x in (scale, bias))
    image, text = (torch.where(x == -torch.inf, torch.inf, alpha * (x + margin) + beta) for x in best)
    return known._replace(image_ceiling=image, text_ceiling=text)


@torch.no_grad()
def best_positives(
    image: Tensor, text: Tensor, mask: Tensor | None, ids: Sequence[Tensor | None], backend: str
) -> tuple[Tensor, Tensor]:
    """(N,), (M,): the similarity of every image's and text's best positive, −∞ without one; constants.

    Without ids they are the pairs of rows, N·D. With ids on a GPU a sweep over all scores for each side.
    """
    if ids[0] is None:
        best = paired_best(image, text, mask)
        return best, best
    arguments = image, text, mask, *ids
    find = torch.ops.smartclip.best_positive
    return find(*arguments, "image", backend), find(*arguments, "text", backend)


def paired_best(image: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
    """(N,): row i with row i, panel by panel."""
    best = torch.empty(len(image), dtype=compute_dtype(image.dtype), device=image.device)
    for start in range(0, len(image), _PANEL_ROWS):
        panel = slice(start, start + _PANEL_ROWS)
        best[panel] = paired_similarity(image[panel], text[panel], None if mask is None else mask[panel])
    return best
