"""Small models and made data, so that nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, CONTEXT, IMAGE = 64, 9, 16


def open_clip_model(kind: str = "clip", seed: int = 0, **options: Any) -> Any:
    """open_clip's CLIP ("clip"), the same with a logit bias ("siglip"), with a text tower of its own ("custom_text") or
    of Hugging Face ("hugging_face"), or CoCa ("coca")."""
    from open_clip.coca_model import CoCa, MultimodalCfg
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

    torch.manual_seed(seed)
    vision: Any = CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=8, image_size=IMAGE)
    text: Any = CLIPTextCfg(context_length=CONTEXT, vocab_size=VOCABULARY, width=32, heads=2, layers=1)
    options = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text, **options}
    if kind == "coca":
        vision.attentional_pool, text.embed_cls, text.output_tokens = True, True, True
        vision.attn_pooler_queries, vision.attn_pooler_heads, vision.output_tokens = 4, 2, True
        text.context_length = CONTEXT - 1
        decoder = MultimodalCfg(context_length=CONTEXT - 1, vocab_size=VOCABULARY, width=32, heads=2, layers=1)
        coca = CoCa(multimodal_cfg=decoder, **(options | {"embed_dim": 32}))
        for name, x in coca.named_parameters():  # open_clip leaves some as it finds the memory
            if x.dim() and ".ln_" not in name:
                nn.init.normal_(x, std=0.2)
        return coca
    if kind in ("custom_text", "hugging_face"):
        model = CustomTextCLIP(output_dict=True, **options)
        if kind == "hugging_face":
            from open_clip.hf_model import HFTextEncoder
            from transformers import RobertaConfig

            sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
            config = RobertaConfig(vocab_size=VOCABULARY, pad_token_id=0, **sizes)
            model.text = HFTextEncoder("", 24, config, pooler_type="mean_pooler", proj_type="linear")
        return model
    return CLIP(output_dict=True, init_logit_bias=-10 if kind == "siglip" else None, **options)


def pairs(count: int, seed: int = 0, context: int = CONTEXT) -> tuple[Tensor, Tensor]:
    """Images and token ids; every text ends with the largest token, which is where CLIP reads it, and padding."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, IMAGE, IMAGE, generator=generator)
    tokens = torch.randint(1, VOCABULARY - 1, (count, context), generator=generator)
    end = torch.randint(2, context, (count, 1), generator=generator)
    at = torch.arange(context)
    return images, torch.where(at < end, tokens, torch.where(at == end, VOCABULARY - 1, 0))


def transformers_config(kind: str) -> Any:
    """Of a CLIP ("clip"), a SigLIP ("siglip") or a SigLIP 2 ("siglip2")."""
    import transformers

    layer = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = {**layer, "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "projection_size": 24}
    tokens = {"bos_token_id": 1, "eos_token_id": VOCABULARY - 1, "pad_token_id": 0}
    vision = {**layer, "image_size": IMAGE, "patch_size": 8, "projection_dim": 24}
    if kind == "clip":
        return transformers.CLIPConfig(
            text_config={**text, **tokens, "projection_dim": 24}, vision_config=vision, projection_dim=24
        )
    text["projection_size"] = 32
    if kind == "siglip":
        return transformers.SiglipConfig(text_config={**text, **tokens}, vision_config=vision)
    vision = {**vision, "num_patches": 4}
    return transformers.Siglip2Config(text_config={**text, **tokens}, vision_config=vision)


def transformers_batch(kind: str, count: int, seed: int = 0) -> dict[str, Tensor]:
    """What the models of `transformers_config` take."""
    images, tokens = pairs(count, seed)
    batch = {"input_ids": tokens, "attention_mask": (tokens > 0).long(), "pixel_values": images}
    if kind == "siglip2":  # patches, of images of any shape
        patches = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(count, 4, 192)
        batch |= {
            "pixel_values": patches,
            "pixel_attention_mask": torch.ones(count, 4, dtype=torch.long),
            "spatial_shapes": torch.full((count, 2), 2),
        }
    return batch
