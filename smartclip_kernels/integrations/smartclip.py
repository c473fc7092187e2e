"""SmartCLIP from a CLIP that is there (Xie et al., CVPR 2025, arXiv 2507.22264): a mask head on its text tower.

::

    from smartclip_kernels.integrations.smartclip import attach_mask_head, encode_text_with_mask

    model = attach_mask_head(model)  # open_clip's CLIP, CustomTextCLIP or CoCa; transformers' CLIPModel or SiglipModel
    loss = sk.SmartClipLoss(sparsity_weight=0.1)
    loss(**model(images, tokens), output_dict=True)  # open_clip's own training loop does just that

    text, mask = encode_text_with_mask(model, tokens)
    values, indices = sk.masked_topk(image, text, mask, k=10)

The model's output gains ``text_mask`` (M, D) where it has texts, so a training loop and `DistributedDataParallel` see
the head as a part of the model. At the start its hard masks pass everything, and the masked cosine is CLIP's cosine.

transformers' models call the rest `image_embeds` and `text_embeds`; ``return_logits=False`` with a model of
`integrations.transformers` makes no N×M logits there. Give them an `attention_mask`: without one padding is read, too.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smartclip_kernels.modules import MaskHead

Model = TypeVar("Model", bound=nn.Module)

_OPTIONS = "mask_head"  # the key of a file's metadata


def attach_mask_head(model: Model, head: MaskHead | None = None, **options: Any) -> Model:
    """Give a CLIP a ``mask_head``, over the token states of its text tower. Before it is wrapped or compiled.

    Args:
        model: open_clip's CLIP, CustomTextCLIP or CoCa (towers of its own or of Hugging Face), or a dual encoder of
            transformers with a `text_model`. Its parameters stay as they are.
        head: default: a new one, ``MaskHead(width, embed_dim, initial_std=0.01, **options)``, whose hard masks are all
            ones at the start.
        options: of `MaskHead`: hard, initial_keep, initial_std, depth, heads, explore.

    Returns:
        The same model. Its forward pass adds ``text_mask`` to a mapping, or a last element to a tuple.

    Raises:
        TypeError: no such model.
        ValueError: it has a mask head; the head does not fit its text tower.
    """
    if hasattr(model, "mask_head"):
        raise ValueError("model: got one with a mask_head, needs one without: one head a model")
    watch = _Watch(model)
    features, states = watch.probe(model)
    width, embed_dim = states.shape[-1], features.shape[-1]
    if head is None:
        head = MaskHead(width, embed_dim, **{"initial_std": 0.01, **options})
    elif options:
        raise ValueError(f"options: got {', '.join(options)} with a head, needs one of both")
    last = head.to_logits[-1]
    assert isinstance(last, nn.Linear)
    if (head.width, last.out_features) != (width, embed_dim):
        raise ValueError(
            f"head: got width {head.width} and embed_dim {last.out_features}, needs {width} and {embed_dim}"
        )
    head.watch = watch  # type: ignore[assignment]  # what encode_text_with_mask listens with
    model.mask_head = head.to(states)
    model.register_forward_pre_hook(watch.begin)
    watch.source(model).register_forward_hook(watch.record)
    model.register_forward_hook(watch.add_mask, with_kwargs=True)
    return model


def encode_text_with_mask(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Unit embeddings of texts and their masks, both (M, D), for `sk.masked_topk` and `sk.smartclip_loss`.

    Args:
        model: with a mask head.
        args, kwargs: of open_clip's `encode_text` (tokens) or transformers' `get_text_features` (input_ids,
            attention_mask).

    Raises:
        TypeError: the model has no mask head.
    """
    head = _head(model)
    watch: _Watch = head.watch
    watch.begin()
    try:
        features = watch.text_features(model, *args, **kwargs)
    finally:
        states = watch.end()
    padding = watch.padding(model, watch.bind(watch.encode(model), args, kwargs))
    return F.normalize(features, dim=-1), head(states, padding)


def save_mask_head(model: nn.Module, file: str | Path) -> None:
    """Write the head alone, with what is needed to build it again (safetensors).

    Raises:
        TypeError: the model has no mask head.
    """
    from safetensors.torch import save_file

    head = _head(model)
    blocks = list(getattr(head.read, "blocks", []))
    heads = blocks[0].attention.num_heads if blocks else None
    options = {"hard": head.hard, "explore": head.explore, "depth": len(blocks), "heads": heads}
    tensors = {name: x.contiguous() for name, x in head.state_dict().items()}
    save_file(tensors, file, metadata={_OPTIONS: json.dumps(options)})


def load_mask_head(model: Model, file: str | Path) -> Model:
    """Read a head from `save_mask_head` into the model's, or attach it where there is none.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: as `attach_mask_head`.
        RuntimeError: the file's parameters are not those of the model's head.
    """
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
        if _OPTIONS not in metadata:
            raise ValueError(f"file: got {file}, needs one that save_mask_head wrote")
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # not a dictionary
    if not hasattr(model, "mask_head"):
        attach_mask_head(model, **json.loads(metadata[_OPTIONS]))
    _head(model).load_state_dict(tensors)
    return model


def _head(model: nn.Module) -> Any:
    if not hasattr(model, "mask_head"):
        raise TypeError("model: got one without a mask_head, needs attach_mask_head before")
    return model.mask_head


class _Watch:
    """Where a model's text tower keeps its token states, and the hooks that take them to the head.

    They listen only during a pass through the model, so that no states of another call are left for an image alone.
    """

    def __init__(self, model: Any) -> None:
        tower = getattr(model, "text", model)
        self.of_transformers = hasattr(model, "get_text_features") and hasattr(model, "text_model")
        open_clip = hasattr(model, "visual") and hasattr(model, "encode_text")
        self.hugging_face_tower = open_clip and hasattr(tower, "pooler") and hasattr(tower, "config")
        # CoCa's tower appends a class token and normalises that alone, so states come from before `ln_final`: they are
        # one more than tokens, and of any size, which a head's own normalisation takes care of.
        self.class_token = open_clip and getattr(tower, "cls_emb", None) is not None
        if not (self.of_transformers or (open_clip and (self.hugging_face_tower or hasattr(tower, "ln_final")))):
            raise TypeError(
                f"model: got {type(model).__module__}.{type(model).__qualname__}, needs open_clip's CLIP, "
                "CustomTextCLIP or CoCa, or a dual encoder of transformers (CLIPModel, SiglipModel, Siglip2Model)"
            )
        self.listening = False
        self.states: Tensor | None = None

    def source(self, model: Any) -> nn.Module:
        """The module that returns the token states."""
        if self.of_transformers:
            return model.text_model
        tower = getattr(model, "text", model)
        return tower.transformer if self.hugging_face_tower or self.class_token else tower.ln_final

    def encode(self, model: Any) -> Any:
        return model.get_text_features if self.of_transformers else model.encode_text

    def text_features(self, model: Any, *args: Any, **kwargs: Any) -> Tensor:
        output = self.encode(model)(*args, **kwargs)
        return output if isinstance(output, Tensor) else output.pooler_output

    def padding(self, model: Any, arguments: Mapping[str, Any]) -> Tensor | None:
        """(M, states of a text) bool, True behind its end, where the model has a way of saying so."""
        if self.of_transformers:
            attended = arguments.get("attention_mask")
            return None if attended is None else attended == 0
        tokens, tower = arguments["text"], getattr(model, "text", model)
        pool = getattr(tower, "text_pool_type", None) or getattr(tower, "pool_type", "")
        if self.class_token:
            return F.pad(tokens == tower.pad_id, (0, 1), value=False)
        if pool == "argmax":  # the end of a text is the largest token; 0 may be one of its words
            return torch.arange(tokens.shape[1], device=tokens.device) > tokens.argmax(1, keepdim=True)
        return tokens == (tower.config.pad_token_id if self.hugging_face_tower else getattr(tower, "pad_id", 0))

    @staticmethod
    def bind(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        return inspect.signature(function).bind(*args, **kwargs).arguments

    @torch.no_grad()
    def probe(self, model: Any) -> tuple[Tensor, Tensor]:
        """Text features (1, D) and token states (1, T, W) of an empty text."""
        length = model.config.text_config.max_position_embeddings if self.of_transformers else model.context_length
        tokens = torch.zeros(1, length, dtype=torch.int64, device=next(model.parameters()).device)
        handle = self.source(model).register_forward_hook(self.record)
        self.begin()
        try:
            features = self.text_features(model, tokens)
        finally:
            handle.remove()
            states = self.end()
        assert states is not None
        return features, states

    # --- hooks ---

    def begin(self, *_: Any) -> None:
        self.listening, self.states = True, None

    def record(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.listening:
            self.states = output if isinstance(output, Tensor) else output.last_hidden_state

    def end(self) -> Tensor | None:
        states, self.listening, self.states = self.states, False, None
        return states

    def add_mask(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        states = self.end()
        if states is None:  # images alone
            return None
        mask = model.mask_head(states, self.padding(model, self.bind(model.forward, args, kwargs)))
        if isinstance(output, tuple):
            return *output, mask
        output["text_mask"] = mask
        return output
