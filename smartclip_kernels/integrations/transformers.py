"""transformers' CLIP, SigLIP and SigLIP 2 with fused losses: import the model from here, or convert one that is there.

::

    from smartclip_kernels.integrations.transformers import CLIPModel  # for transformers'

    model = CLIPModel.from_pretrained("openai/clip-vit-base-patch32")
    loss = model(**inputs, return_loss=True).loss

    patch(model)  # the same for a model that somebody else made (AutoModel, peft's base model)

The classes derive from transformers': the same parameters, `state_dict` and files, so what is saved is read by either.
With `return_loss=True` the N×M logits are not made; ``return_logits=True`` asks for them beside the loss. Without a
loss the output is transformers' own.

As there, the loss is that of one process: the pairs of one device.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

import smartclip_kernels as sk
from smartclip_kernels.integrations import require

require("transformers", "5.20", "transformers")

import transformers  # noqa: E402
from transformers.models.clip.modeling_clip import CLIPOutput  # noqa: E402
from transformers.models.siglip.modeling_siglip import SiglipOutput  # noqa: E402
from transformers.models.siglip2.modeling_siglip2 import Siglip2Output  # noqa: E402


class CLIPModel(transformers.CLIPModel):
    """``transformers.CLIPModel``; `return_loss` makes `sk.clip_loss`."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        return_logits: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """``transformers.CLIPModel``'s, and `return_logits`: whether logits come with the loss."""
        text = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        image = {"pixel_values": pixel_values, "interpolate_pos_encoding": interpolate_pos_encoding}
        return _forward(self, CLIPOutput, image, text, return_loss, return_logits, kwargs)


class SiglipModel(transformers.SiglipModel):
    """``transformers.SiglipModel``; `return_loss` makes `sk.siglip_loss`."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        return_logits: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """``transformers.SiglipModel``'s, and `return_logits`: whether logits come with the loss."""
        text = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        image = {"pixel_values": pixel_values, "interpolate_pos_encoding": interpolate_pos_encoding}
        return _forward(self, SiglipOutput, image, text, return_loss, return_logits, kwargs)


class Siglip2Model(transformers.Siglip2Model):
    """``transformers.Siglip2Model``; `return_loss` makes `sk.siglip_loss`."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        return_logits: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """``transformers.Siglip2Model``'s, and `return_logits`: whether logits come with the loss."""
        text = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        image = {
            "pixel_values": pixel_values,
            "pixel_attention_mask": pixel_attention_mask,
            "spatial_shapes": spatial_shapes,
        }
        return _forward(self, Siglip2Output, image, text, return_loss, return_logits, kwargs)


def _forward(
    model: Any,
    output_class: Any,
    image_inputs: dict[str, Any],
    text_inputs: dict[str, Any],
    return_loss: bool | None,
    return_logits: bool | None,
    kwargs: dict[str, Any],
) -> Any:
    as_dict = kwargs.pop("return_dict", None)
    as_dict = model.config.return_dict if as_dict is None else as_dict
    if return_logits is None:
        # A tuple leaves out what is None, and whoever counts its places would take embeddings for logits.
        return_logits = not return_loss or not as_dict
    vision = model.get_image_features(**image_inputs, **kwargs, return_dict=True)
    language = model.get_text_features(**text_inputs, **kwargs, return_dict=True)
    image, text = (x.pooler_output / x.pooler_output.norm(dim=-1, keepdim=True) for x in (vision, language))
    # Of a model over several devices, the text tower's computes the loss.
    here, scale = image.to(text.device), model.logit_scale.exp().to(text.device)
    bias = model.logit_bias.to(text.device) if hasattr(model, "logit_bias") else None
    loss = logits = None
    if return_loss:
        loss = sk.clip_loss(here, text, scale) if bias is None else sk.siglip_loss(here, text, scale, bias)
    if return_logits:
        logits = here @ text.T * scale
        logits = logits if bias is None else logits + bias
    output = output_class(
        loss=loss,
        logits_per_image=logits,
        logits_per_text=None if logits is None else logits.T,
        text_embeds=text,
        image_embeds=image,
        text_model_output=language,
        vision_model_output=vision,
    )
    return output if as_dict else output.to_tuple()


_PAIRS: dict[type, type] = {
    transformers.CLIPModel: CLIPModel,
    transformers.SiglipModel: SiglipModel,
    transformers.Siglip2Model: Siglip2Model,
}


def patch(model: Any) -> Any:
    """Convert a model in place, by its class; parameters, hooks and everything else stay. A fused one stays as it is.

    Returns:
        The same object.

    Raises:
        TypeError: its class is none of transformers' three: one that derives from them may have a forward of its own.
        ValueError: its forward was replaced (accelerate does for a device map): patch the model before.
    """
    return _convert(model, _PAIRS)


def unpatch(model: Any) -> Any:
    """Give a model its own class of transformers back, in place.

    Raises:
        TypeError, ValueError: as `patch`.
    """
    return _convert(model, {ours: original for original, ours in _PAIRS.items()})


def _convert(model: Any, classes: dict[type, type]) -> Any:
    kind = type(model)
    if kind in classes.values():
        return model
    if kind not in classes:
        needs = ", ".join(f"{x.__module__.partition('.')[0]}.{x.__name__}" for x in classes)
        raise TypeError(f"model: got {kind.__module__}.{kind.__qualname__}, needs one of {needs}")
    if "forward" in vars(model):
        raise ValueError("model: got one whose forward was replaced, needs the class's own: patch it before that")
    model.__class__ = classes[kind]
    return model
