"""Who is measured. Each subject is an adapter: for a case, a function from its inputs to the loss.

The eager formulas are what one writes first; they hold N×M matrices. The literal masked formula holds N×M×D.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.cases import Case, Inputs

LossFn = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Subject:
    """A name, what it is in words, and how to make its loss for a case; `build` may raise: then it cannot run here."""

    name: str
    description: str
    build: Callable[[Case], LossFn]


def logits_of(sim: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return scale * sim if bias is None else scale * sim + bias


def softmax_loss(logits: Tensor) -> Tensor:
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def sigmoid_loss(logits: Tensor) -> Tensor:
    sign = 2 * torch.eye(len(logits), device=logits.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(sign * logits).sum() / len(logits)


OBJECTIVES = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}


def masked_cosine(image: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """cos(image_i ⊙ mask_j, text_j) by two matrix products."""
    square = image.square() @ mask.square().T
    return image @ (mask * text).T / (square.sqrt() * text.norm(dim=1))


def literal_masked_cosine(image: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """The same as the paper writes it, with its N×M×D intermediate."""
    return F.cosine_similarity(image[:, None, :] * mask, text[None], dim=-1)


def eager(case: Case) -> LossFn:
    objective = OBJECTIVES[case.objective]

    def loss(inputs: Inputs) -> Tensor:
        if inputs.mask is None:
            sim = inputs.image @ inputs.text.T
        else:
            sim = masked_cosine(inputs.image, inputs.text, inputs.mask)
        return objective(logits_of(sim, inputs.scale, inputs.bias))

    return loss


def literal(case: Case) -> LossFn:
    objective = OBJECTIVES[case.objective]

    def loss(inputs: Inputs) -> Tensor:
        if inputs.mask is None:
            raise ValueError(f"the literal N×M×D formula is that of a masked loss; {case.loss} has no mask")
        sim = literal_masked_cosine(inputs.image, inputs.text, inputs.mask)
        return objective(logits_of(sim, inputs.scale, inputs.bias))

    return loss


def open_clip(case: Case) -> LossFn:
    from open_clip.loss import ClipLoss, SigLipLoss

    if case.similarity != "dot":
        raise ValueError(f"open_clip has no loss with masks, so none for {case.loss}")
    module = ClipLoss() if case.objective == "softmax" else SigLipLoss()

    def loss(inputs: Inputs) -> Tensor:
        value: Tensor = module(inputs.image, inputs.text, inputs.scale, inputs.bias)
        return value

    return loss


def compiled(build: Callable[[Case], LossFn]) -> Callable[[Case], LossFn]:
    """`torch.compile` of another subject, for the one shape, as a training run would have it.

    Several shapes in one process would meet dynamo's limit of recompilations: the caller resets it between cases.
    """

    def build_compiled(case: Case) -> LossFn:
        function: LossFn = torch.compile(build(case), fullgraph=True, dynamic=False)
        return function

    return build_compiled


def ours(case: Case) -> LossFn:
    import smartclip_kernels as sk

    if case.backend not in sk.available_backends():
        raise RuntimeError(f"backend {case.backend!r} is not available here: see python -m smartclip_kernels.info")

    def loss(inputs: Inputs) -> Tensor:
        image, text, scale, bias = inputs.image, inputs.text, inputs.scale, inputs.bias
        if inputs.mask is not None:
            value = sk.smartclip_loss(
                image, text, inputs.mask, scale, bias, objective=case.objective, backend=case.backend
            )
        elif case.objective == "softmax":
            value = sk.clip_loss(image, text, scale, bias, backend=case.backend)
        else:
            value = sk.siglip_loss(image, text, scale, bias, backend=case.backend)
        assert isinstance(value, Tensor)
        return value

    return loss


OURS = "ours"
SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject(OURS, "smartclip_kernels", ours),
        Subject("eager", "the formula in eager torch", eager),
        Subject("eager-compiled", "torch.compile of the formula", compiled(eager)),
        Subject("open_clip", "open_clip's own loss", open_clip),
        Subject("open_clip-compiled", "torch.compile of open_clip's loss", compiled(open_clip)),
        Subject("literal", "the N×M×D formula as the paper writes it", literal),
    )
}
