"""The functions that users call. Everything below them works on per-anchor losses; reductions are made here."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from smartclip_kernels import backends, checks, distributed, ops
from smartclip_kernels.ceilings import with_ceilings
from smartclip_kernels.problem import Correction, LossCall
from smartclip_kernels.reference import OBJECTIVES, asked_for, compute_dtype, normalised, shares_of, tau_vectors

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Reduction = Literal["mean", "sum", "none"]
Strategy = Literal["gather", "ring"]
Direction = Literal["image_to_text", "text_to_image"]
TauPlus = float | tuple[Tensor, Tensor]

BOTH: tuple[Direction, ...] = ("image_to_text", "text_to_image")


def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    ignore_ids: tuple[Tensor, Tensor] | None = None,
    label_smoothing: float = 0.0,
    tau_plus: TauPlus = 0.0,
    margin: float | None = None,
    directions: Sequence[Direction] = BOTH,
    dims: Sequence[int] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
    strategy: Strategy = "gather",
    backend: str | None = None,
) -> Any:
    """Symmetric InfoNCE of CLIP (Radford et al. 2021, arXiv 2103.00020) without the N×M logits in memory.

    With s_ij = logit_scale · ⟨image_i, text_j⟩ + logit_bias:
    ½ · mean_i(log Σ_j e^{s_ij} − mean_{j ∈ P(i)} s_ij) + ½ · mean_j(log Σ_i e^{s_ij} − mean_{i ∈ P(j)} s_ij).

    Args:
        image: (N, D), used as given (without dims): normalise it as open_clip does. float16, bfloat16, float32 or
            float64.
        text: (M, D), image's dtype and device.
        logit_scale: α, already exponentiated: a float, a 0-D or a 1-element tensor. Learnable.
        logit_bias: β, likewise; the softmax does not depend on it and its gradient is exactly 0.
        image_ids, text_ids: (N,) and (M,) int64. A pair is positive iff its ids are equal: several captions an image,
            duplicates, extra negatives. A row or column without a positive stays a candidate for the others and leaves
            the mean. Default: N = M and i matches i.
        ignore_ids: a pair of such vectors, image's and text's. Pairs with equal ignore ids that are not positive count
            neither as positive nor as negative.
        label_smoothing: e in [0, 1): the target is (1 − e) spread over the positives plus e over all candidates.
        tau_plus: τ in [0, 1), of an anchor's negatives the fraction that its own class is taken to make up: debiased
            negatives (Chuang et al. 2020, arXiv 2007.00224, with the positives themselves as its samples v). With P and
            O the sums of e^s over an anchor's positives and its K other candidates, and |P| the number of the former,
            log Σ e^s becomes log(P + g), g = max((O − K·τ·P/|P|) / (1 − τ), K·e^{logit_bias − logit_scale}). The floor,
            the least that features of length 1 give, is a constant: where it holds no gradient goes to the other
            candidates, and none to logit_scale through it. A float, or a pair of floating tensors, the images' τ (N,)
            and the texts' (M,): constants, rounded to the precision of the scores; that theirs are in [0, 1) is not
            looked at. Where τ is 0 nothing is corrected.
        margin: false negatives are masked (Qwen3-Embedding, Zhang et al. 2025, arXiv 2506.05176, where it is 0.1):
            what is not positive and has a similarity above that of the anchor's best positive by more than this does
            not count for that anchor; it still may for the other one of the pair. A float, for a positive logit_scale;
            a pair within rounding of the bound may fall on either side of it. The bound is a constant, no gradient
            goes through it. Costs D for every positive pair; with ids on a GPU two more sweeps over the scores, in
            which the best positives are looked for (2·N·M·D each, where loss and gradients take 6 or 8), and in a
            "ring" the features travel once more. None masks nothing.
        directions: whose losses count: images' among texts, texts' among images, or both, half each. Of one alone the
            loss is that side's mean or sum, without the ½.
        dims: Matryoshka prefixes (Kusupati et al. 2022, arXiv 2205.13147): strictly increasing widths, none above D.
            The loss is the sum over d in dims of that of image[:, :d] / ‖image[:, :d]‖ and text[:, :d] / ‖text[:, :d]‖,
            row by row: with dims, features are normalised here, in the precision of the scores (a norm below 1e-12
            counts as that). Backend "cpu" has all in one sweep: max(dims) / D times the products of one loss over all
            D, and len(dims) passes over a tile's scores. The GPU's backends, a group and a margin have one loss after
            the other: Σ dims / D times the products (and bytes among ranks), len(dims) passes, and normalised copies of
            the prefixes in memory, rounded to the features' dtype.
        reduction: "mean", "sum" (½ of each side's sum) or "none": a pair of losses (N,), (M,) without the ½; of one
            direction its losses alone.
        group: a `torch.distributed` process group whose ranks hold the batch together: image, text and ids are this
            rank's rows, as many or as few (at least one of each) as it likes, and are compared with those of all ranks.
            Every rank calls, and goes backward, in the same order. See below. Default: this process is all there is.
        strategy: how texts reach the other ranks (the lighter side does: images, where there are fewer of them).
            "gather": all at once, O(M·D) memory; "ring": from rank to rank, the next block in flight while this one is
            scored, O(M·D / ranks) memory, and a softmax's features twice. Both are deterministic; last bits differ.
        backend: one of `available_backends()`; default: what `use_backend` or the device says.

    Returns:
        A 0-D tensor, float32 (float64 for float64 inputs); with reduction="none" two 1-D tensors, one for one
        direction. Gradients flow to image, text, logit_scale and logit_bias, in their own dtypes. Second derivatives
        raise `RuntimeError`.

    With `group`, the number of ranks × this rank's share: the terms of its own rows and columns over all ranks' anchors
    ("sum": not divided; "none": its own rows and columns as they are). The mean over ranks is the loss of the whole
    batch, and the mean over ranks of the gradients, which `DistributedDataParallel` takes, its gradient: of encoders,
    logit_scale and logit_bias. What a rank gets for its features is the gradient of the sum of all ranks' results.
    Text gradients are summed in float32, in which they travel for half precision, too (float64 for float64). Each call
    first compares shapes and dtypes among ranks, which on a GPU waits for the device unless the group has gloo for the
    CPU besides ("cpu:gloo,cuda:nccl"). `torch.compile` breaks its graph here.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what it got and what it needs.
        RuntimeError: the named backend cannot run here. With `group`: torch.distributed is not initialised; ranks
            disagree on shapes, dtypes, options or the step; a rank failed, ended (at once) or did not answer within the
            group's timeout. The message names the ranks; every rank raises. (NCCL ends processes by its own watchdog.)
    """
    return contrastive_loss(
        "softmax",
        image,
        text,
        None,
        logit_scale,
        logit_bias,
        image_ids,
        text_ids,
        ignore_ids,
        label_smoothing,
        reduction,
        backend,
        group,
        strategy,
        tau_plus=tau_plus,
        margin=margin,
        directions=directions,
        dims=dims,
    )


def siglip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    ignore_ids: tuple[Tensor, Tensor] | None = None,
    dims: Sequence[int] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
    strategy: Strategy = "gather",
    backend: str | None = None,
) -> Tensor:
    """Pairwise sigmoid loss of SigLIP (Zhai et al. 2023, arXiv 2303.15343) without the N×M logits in memory.

    (1/N) Σ_ij softplus(−z_ij s_ij), with s_ij = logit_scale · ⟨image_i, text_j⟩ + logit_bias and z_ij = +1 for a
    positive pair, −1 otherwise.

    Args:
        image, text, logit_scale, logit_bias, image_ids, text_ids, ignore_ids, dims, group, strategy, backend: as in
            `clip_loss`. With `group`, the mean divides by all ranks' images, and a rank's share are the pairs that it
            scores: its own images with all texts (where images are fewer, or masked: all images with its own texts);
            the backward pass compares the incoming gradients of the ranks, for which a GPU is waited for.
        reduction: "mean" (divides by N), "sum" over all pairs, or "none": losses of the images (N,).

    Returns:
        A 0-D tensor, float32 (float64 for float64 inputs); with reduction="none" (N,).

    Raises:
        TypeError, ValueError, RuntimeError: as `clip_loss`.
    """
    loss: Tensor = contrastive_loss(
        "sigmoid",
        image,
        text,
        None,
        logit_scale,
        logit_bias,
        image_ids,
        text_ids,
        ignore_ids,
        0.0,
        reduction,
        backend,
        group,
        strategy,
        dims=dims,
    )
    return loss


def smartclip_loss(
    image: Tensor,
    text: Tensor,
    mask: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    objective: Literal["softmax", "sigmoid"] = "softmax",
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    ignore_ids: tuple[Tensor, Tensor] | None = None,
    label_smoothing: float = 0.0,
    tau_plus: TauPlus = 0.0,
    margin: float | None = None,
    directions: Sequence[Direction] = BOTH,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
    strategy: Strategy = "gather",
    backend: str | None = None,
) -> Any:
    """SmartCLIP's loss (Xie et al., CVPR 2025, arXiv 2507.22264): every text compares with its part of the image.

    The score of a pair is logit_scale · cos(image_i ⊙ mask_j, text_j) + logit_bias; the naive form is N×M×D. It is 0,
    and passes no gradient, where ‖image_i ⊙ mask_j‖ ≤ 1e-6 or ‖text_j‖ ≤ 1e-12.

    Args:
        mask: (M, D), the text's mask over the image's dimensions: bool, hard (0 or 1) or soft ([0, 1]), in any floating
            dtype. Gradients flow to a floating mask.
        objective: "softmax" (`clip_loss`) or "sigmoid" (`siglip_loss`); the other arguments and the result are theirs.
            The sigmoid takes no label_smoothing, tau_plus or margin, and no single direction. With `group` images go to
            the other ranks, or, with more than twice as many images, texts and their masks.

    Raises:
        TypeError, ValueError, RuntimeError: as `clip_loss`.
    """
    checks.tensor("mask", mask)
    return contrastive_loss(
        objective,
        image,
        text,
        mask,
        logit_scale,
        logit_bias,
        image_ids,
        text_ids,
        ignore_ids,
        label_smoothing,
        reduction,
        backend,
        group,
        strategy,
        tau_plus=tau_plus,
        margin=margin,
        directions=directions,
    )


def masked_similarity(image: Tensor, text: Tensor, mask: Tensor, *, backend: str | None = None) -> Tensor:
    """cos(image_i ⊙ mask_j, text_j) for all pairs: (N, M), differentiable, float32 for half-precision inputs.

    Args:
        image: (N, D). text: (M, D). mask: (M, D), as in `smartclip_loss`.

    Raises:
        TypeError, ValueError, RuntimeError: as `clip_loss`.
    """
    for name, x in (("image", image), ("text", text), ("mask", mask)):
        checks.tensor(name, x)
    sim: Tensor = torch.ops.smartclip.masked_similarity(image, text, mask, _backend(backend))
    return sim


def masked_topk(
    image: Tensor,
    text: Tensor,
    mask: Tensor,
    k: int,
    *,
    per: Literal["text", "image"] = "text",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best images of every text (or texts of every image) by masked similarity, without the N×M scores.

    Args:
        image: (N, D). text: (M, D). mask: (M, D), as in `smartclip_loss`.
        k: at least 1; clamped to the number of candidates.
        per: "text": results are (M, k), indices of images; "image": (N, k), indices of texts.

    Returns:
        values (float32, or float64) and indices (int64): best first, ties to the lower index, NaN before all. No
        gradient.

    Raises:
        TypeError, ValueError, RuntimeError: as `clip_loss`.
    """
    for name, x in (("image", image), ("text", text), ("mask", mask)):
        checks.tensor(name, x)
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"k: got {type(k).__name__}, needs an int")
    values, indices = torch.ops.smartclip.masked_topk(image, text, mask, k, per, _backend(backend))
    return values, indices


def retrieval_ranks(
    image: Tensor,
    text: Tensor,
    mask: Tensor | None = None,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    per: Literal["text", "image"] = "text",
    backend: str | None = None,
) -> Tensor:
    """Rank of the best positive of every anchor among all candidates, without the N×M scores.

    Recall at k is ``(ranks <= k).float().mean()``.

    Args:
        image: (N, D). text: (M, D). mask: (M, D) for masked similarity, None for the dot product.
        image_ids, text_ids: what is positive, as in `clip_loss`.
        per: "text": anchors are texts, candidates images; "image": the other way round.

    Returns:
        (M,) or (N,) int64. 1 is first; ties go to the lower index. An anchor without a positive gets one more than
        there are candidates; one whose positives score NaN is behind all others.

    Raises:
        TypeError, ValueError, RuntimeError: as `clip_loss`.
    """
    for name, x in (("image", image), ("text", text)):
        checks.tensor(name, x)
    if mask is not None:
        checks.tensor("mask", mask)
    checks.id_arguments(image_ids, text_ids, None)
    ranks: Tensor = torch.ops.smartclip.retrieval_ranks(image, text, mask, image_ids, text_ids, per, _backend(backend))
    return ranks


def contrastive_loss(
    objective: str,
    image: Tensor,
    text: Tensor,
    mask: Tensor | None,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    ignore_ids: tuple[Tensor, Tensor] | None,
    label_smoothing: float,
    reduction: str,
    backend: str | None,
    group: ProcessGroup | None,
    strategy: str,
    semantics: distributed.Semantics = distributed.EXACT,
    *,
    tau_plus: TauPlus = 0.0,
    margin: float | None = None,
    directions: Sequence[Direction] = BOTH,
    dims: Sequence[int] | None = None,
) -> Any:
    """Any of the losses; `semantics` of a distributed one are for open_clip's flags (modules.py)."""
    arguments = partial(
        _arguments,
        objective,
        image,
        text,
        mask,
        logit_scale,
        logit_bias,
        image_ids,
        text_ids,
        ignore_ids,
        label_smoothing,
        reduction,
        backend,
        tau_plus,
        margin,
        directions,
        dims,
    )
    checks.choice("strategy", strategy, tuple(distributed.STRATEGIES))
    alone = group is None or distributed.group_of(group).size() == 1
    if alone and (dims is None or (margin is None and _nests(image, backend))):
        return _one_process(arguments(None))
    losses = []
    # What is wrong with dims is found out where the other ranks hear of it.
    for level in range(len(dims)) if isinstance(dims, (tuple, list)) and dims else (None,):
        make = partial(arguments, level)
        losses.append(_one_process(make()) if alone else distributed.loss(make, group, strategy, semantics))
    if isinstance(losses[0], tuple):
        return tuple(_total(side) for side in zip(*losses, strict=True))
    return _total(losses)


def _nests(image: Tensor, backend: str | None) -> bool:
    """Whether all prefixes go in one sweep there."""
    checks.tensor("image", image)
    return _backend_nests(_backend(backend), image.device)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _backend_nests(name: str, device: torch.device) -> bool:
    return backends.resolve(name, device).nests


def _total(losses: Sequence[Tensor]) -> Tensor:
    return losses[0] if len(losses) == 1 else torch.stack(list(losses)).sum(0)


def _arguments(
    objective: str,
    image: Tensor,
    text: Tensor,
    mask: Tensor | None,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    ignore_ids: tuple[Tensor, Tensor] | None,
    label_smoothing: float,
    reduction: str,
    backend: str | None,
    tau_plus: TauPlus,
    margin: float | None,
    directions: Sequence[Direction],
    dims: Sequence[int] | None,
    level: int | None,
) -> LossCall:
    """Of an op, from what a caller gave. `level`: which of `dims` alone; None: all."""
    checks.tensor("image", image)
    checks.tensor("text", text)
    if dims is not None:
        checks.features(*ops.autocast(image, text))
        checks.dims(dims, image)
        if level is not None:
            image, text = (normalised(x, dims[level]).to(x.dtype) for x in (image, text))
    checks.choice("objective", objective, tuple(OBJECTIVES))
    checks.choice("reduction", reduction, checks.REDUCTIONS)
    checks.directions(directions, objective)
    checks.margin(margin, objective)
    ignore = checks.id_arguments(image_ids, text_ids, ignore_ids)
    scale = _scalar("logit_scale", logit_scale, image)
    bias = None if logit_bias is None else _scalar("logit_bias", logit_bias, image)
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, (int, float)):
        raise TypeError(f"label_smoothing: got {type(label_smoothing).__name__}, needs a float")
    constants = objective, float(label_smoothing), _backend(backend), 0
    arguments = image, text, mask, scale, bias, image_ids, text_ids, *ignore, *constants
    correction = Correction(*_tau(tau_plus, image, text))
    above = None if margin is None else float(margin)
    swept = () if dims is None or level is not None else tuple(dims)
    width = None if dims is None or level is None else dims[level]
    return LossCall(arguments, reduction, shares_of(directions), correction, above, swept, width)


def _one_process(call: LossCall) -> Any:
    tail = *with_ceilings(call), call.dims
    if call.reduction != "none":
        return torch.ops.smartclip.reduced_loss(*call.arguments, call.reduction, call.shares, *tail)
    rows, columns, *_ = torch.ops.smartclip.loss(*call.arguments, *tail)
    return asked_for(rows, columns, call.arguments[9], call.shares)


def _tau(tau_plus: TauPlus, image: Tensor, text: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """A number a row, in the precision of the scores; None where there is nothing to correct."""
    if isinstance(tau_plus, (tuple, list)):
        if len(tau_plus) != 2:
            raise ValueError(f"tau_plus: got {len(tau_plus)} tensors, needs a float or a pair (image's, text's)")
        for i, x in enumerate(tau_plus):
            checks.tensor(f"tau_plus[{i}]", x)
        checks.anchors("tau_plus", tau_plus, image, text)
    elif isinstance(tau_plus, bool) or not isinstance(tau_plus, (int, float)):
        raise TypeError(f"tau_plus: got {type(tau_plus).__name__}, needs a float or a pair of tensors")
    elif not 0 <= tau_plus < 1:
        raise ValueError(f"tau_plus: got {tau_plus}, needs a number in [0, 1)")
    like = image.new_empty((), dtype=compute_dtype(image.dtype))
    n, m = (x.shape[0] if x.dim() else 0 for x in (image, text))
    return tau_vectors(tau_plus, n, m, like=like)


def _backend(name: str | None) -> str:
    """What the ops take: "" leaves the choice to the context and the device."""
    if name is None:
        return ""
    backends.check_name(name)
    return name


def _scalar(name: str, value: Tensor | float, image: Tensor) -> Tensor:
    """A 0-D tensor in the precision of the scores, on image's device."""
    if isinstance(value, Tensor):
        checks.one_element(name, value, image)
        return value.reshape(()).to(compute_dtype(image.dtype))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, needs a float or a tensor of one element")
    return torch.full((), value, dtype=compute_dtype(image.dtype), device=image.device)
