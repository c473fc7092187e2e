"""Who is measured. Each subject is an adapter: for a case, a function from its inputs to the loss.

The eager formulas are what one writes first; they hold N×M matrices. The literal masked formula holds N×M×D.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

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
    build: Callable[[Case], LossFn | Replay]
    lacks: tuple[str, ...] = ()  # arguments that it gives no gradient for
    linear: bool = False  # it holds no N×M


class Replay:
    """Forward + backward of a loss, captured as a CUDA graph at the first call and replayed from then on."""

    def __init__(self, loss: LossFn) -> None:
        self._loss = loss
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
        """Loss and gradients, in the graph's own memory: the next call overwrites them."""
        if self._graph is None:
            self._capture(inputs)
        assert self._graph is not None
        self._graph.replay()
        return self._value, self._gradients

    def _capture(self, inputs: Inputs) -> None:
        def step() -> tuple[Tensor, list[Tensor]]:
            value = self._loss(inputs)
            return value.detach(), list(torch.autograd.grad(value, inputs.leaves()))

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # what is made once at a first call cannot be captured
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._value, self._gradients = step()
        self._graph = graph


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

    device, dtype = case.device, case.torch_dtype

    def loss_under_autocast(inputs: Inputs) -> Tensor:
        with torch.autocast(device, dtype):
            return loss(inputs)

    return loss_under_autocast if dtype.itemsize == 2 else loss


def needs(case: Case, similarity: str, objective: str, peer: str) -> None:
    """Raises:
    ValueError: the case is of another loss than the peer's one.
    """
    if (case.similarity, case.objective) != (similarity, objective):
        raise ValueError(f"{peer} computes one loss, which is not {case.loss}")


def memeff(case: Case) -> LossFn:
    """Its scale is a number, without a gradient. `stable`, its default, would multiply the gradients by another one."""
    needs(case, "dot", "softmax", "memeff")
    build = import_module("memeff").MemoryEfficientCLIPLoss
    module = build(temperature=1 / case.scale, normalized_inputs=True, stable=False)

    def loss(inputs: Inputs) -> Tensor:
        value: Tensor = module(inputs.image, inputs.text)
        return value

    return loss


def siglip_kernel(case: Case) -> LossFn:
    needs(case, "dot", "sigmoid", "siglip-kernel")
    fused_siglip_loss = import_module("siglip_kernel").fused_siglip_loss

    def loss(inputs: Inputs) -> Tensor:
        value: Tensor = fused_siglip_loss(inputs.image, inputs.text, inputs.scale.log(), inputs.bias)
        return value

    return loss


HEAD_DIM = 256


def inf_cl(case: Case) -> LossFn:
    """One direction a call. It works in float32, whose products it makes in TF32; the scale is multiplied in before."""
    needs(case, "dot", "softmax", "inf-cl")
    if case.d % HEAD_DIM:
        raise ValueError(f"inf-cl needs D divisible by {HEAD_DIM}, got {case.d}")
    cal_flash_loss = import_module("inf_cl").cal_flash_loss

    def loss(inputs: Inputs) -> Tensor:
        image, text = inputs.image.float(), inputs.text.float()
        rows: Tensor = cal_flash_loss(image, text, scale=inputs.scale, head_dim=HEAD_DIM)
        columns: Tensor = cal_flash_loss(text, image, scale=inputs.scale, head_dim=HEAD_DIM)
        return (rows.mean() + columns.mean()) / 2

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


def replayed(case: Case) -> Replay:
    if case.device != "cuda":
        raise RuntimeError(f"a CUDA graph needs a GPU; this case is on {case.device!r}")
    return Replay(ours(case))


OURS = "ours"
REPLAYED = "ours-graph"
SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject(OURS, "smartclip_kernels", ours, linear=True),
        Subject("eager", "the formula in eager torch", eager),
        Subject("eager-compiled", "torch.compile of the formula", compiled(eager)),
        Subject(REPLAYED, "forward + backward of ours, replayed as a CUDA graph", replayed, linear=True),
        Subject("open_clip", "open_clip's own loss, in half precision under autocast as it trains", open_clip),
        Subject("open_clip-compiled", "torch.compile of open_clip's loss", compiled(open_clip)),
        Subject("memeff", "memeff's CLIP loss, its scale a number", memeff, ("scale",), linear=True),
        Subject("siglip-kernel", "siglip_kernel's fused loss, as it chooses for the dtype", siglip_kernel, linear=True),
        Subject("inf-cl", "Inf-CL's loss on one GPU, both directions", inf_cl, linear=True),
        Subject("literal", "the N×M×D formula as the paper writes it", literal),
    )
}
