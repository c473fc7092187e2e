from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from smartclip_kernels.train.captions import PAD, word_tokenizer
from smartclip_kernels.train.config import MaskConfig, ModelConfig
from smartclip_kernels.train.model import ImageTower, Model, Patches, build

SMALL = ModelConfig(embed_dim=16, image_width=32, image_layers=2, text_width=32, text_layers=2, context=8)
TEXTS = ["a red disc", "a blue square in the corner"]


def small(masks: MaskConfig | None = None, **changes: Any) -> Model:
    torch.manual_seed(0)
    return build(dataclasses.replace(SMALL, **changes), masks, 16, 2, word_tokenizer(TEXTS))[0]


@pytest.mark.parametrize("patch", [2, 4, 8, 16])
def test_image_embeddings_are_unit_vectors(patch: int) -> None:
    model = small(patch=patch)
    embedding = model.image(torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8))
    assert embedding.shape == (3, 16)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(3))


def test_padding_changes_nothing() -> None:
    text = small(MaskConfig(hard=False)).text
    tokens = torch.tensor([[2, 4, 5, 6], [2, 3, PAD, PAD]])
    short = torch.tensor([False, False])
    for a, b in zip(text(tokens, short), text(nn.functional.pad(tokens, (0, 3), value=PAD), short), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(text(tokens, short), text(torch.tensor([[2, 3]]), short[:1]), strict=True):
        torch.testing.assert_close(a[1:], b, rtol=1e-5, atol=1e-5)


def test_only_smartclip_has_masks() -> None:
    tokens, long = torch.tensor([[2, 4, 5, 6], [2, 4, 0, 0]]), torch.tensor([True, False])
    assert small().text(tokens, long)[1] is None
    for mask_long in (False, True):
        mask = small(MaskConfig(long=mask_long)).text(tokens, long)[1]
        assert mask.shape == (2, 16)
        assert set(mask.flatten().tolist()) == {0.0, 1.0}
        assert (mask[0] == 1).all() == (not mask_long)
        assert not (mask[1] == 1).all()


@pytest.mark.parametrize("keep", [0.1, 0.3])
def test_texts_begin_with_masks_of_their_own(keep: float) -> None:
    torch.manual_seed(0)
    words = [f"word{n}" for n in range(200)]
    masks = MaskConfig(initial_keep=keep, initial_std=0.7, hard=False)
    model, tokenize = build(dataclasses.replace(SMALL, embed_dim=256), masks, 16, 2, word_tokenizer(words))
    mask = model.text(tokenize(words), torch.zeros(200, dtype=torch.bool))[1]
    logits = mask.logit()
    assert logits.mean().sigmoid().item() == pytest.approx(keep, abs=0.1)
    assert logits.std(0).mean() > 0.3


def test_masks_draw_no_random_numbers_before_the_towers() -> None:
    """Arms of a comparison start from the same towers."""
    plain, masked = small().state_dict(), small(MaskConfig()).state_dict()
    assert all(torch.equal(plain[name], masked[name]) for name in plain)


def test_patches_fit_themselves_to_a_sample() -> None:
    """Channels are standardised; textures answer to whitened pieces of the sample, a few at a time."""
    torch.manual_seed(0)
    patches = Patches(4, 32)
    images = (nn.functional.avg_pool2d(torch.rand(256, 3, 18, 18), 3, 1) * 255).byte()
    patches.look_at(images)
    channels = patches.channels(patches.describe(images)).transpose(0, 1).flatten(1)
    torch.testing.assert_close(channels.mean(1), torch.zeros(240), atol=1e-3, rtol=0)
    deviation = channels.std(1)  # 0 where a colour is in no picture
    torch.testing.assert_close(deviation, deviation.round(), atol=1e-2, rtol=0)
    assert deviation.mean() > 0.95
    fires = (patches.texture(patches.pixels(images / 255)) > 0).float().mean()
    assert 0.05 < fires < 0.4
    assert not patches.texture.weight.requires_grad
    constant = torch.full((4, 3, 16, 16), 255, dtype=torch.uint8)
    patches.look_at(constant)  # nothing to whiten, nothing to divide by
    assert patches(constant).isfinite().all()


def test_pictures_differ_from_the_start() -> None:
    tower = small(image_width=96).image.tower
    assert isinstance(tower, ImageTower)
    images = (nn.functional.avg_pool2d(torch.rand(64, 3, 18, 18), 3, 1) * 255).byte()
    tower.patches.look_at(images)
    embedding = nn.functional.normalize(tower(images), dim=1)
    assert (embedding @ embedding.T).mean() < 0.6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "huge"}, r'model\.name: got "huge"'),
        ({"patch": 1}, r"model\.patch: got 1"),
        ({"patch": 3}, r"model\.patch: got 3"),
        ({"patch": 32}, r"model\.patch: got 32"),
        ({"text_width": 40}, r"model\.text_width: got 40"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_an_open_clip_model_by_name() -> None:
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    config = ModelConfig(name="open_clip:ViT-S-32-alt")
    model, tokenize = build(config, MaskConfig(), 224, 2, word_tokenizer([]))
    tokens = tokenize(["a red disc", "b"])
    short = torch.tensor([False, False])
    text, mask = model.text(tokens, short)
    image = model.image(torch.zeros(1, 3, 224, 224, dtype=torch.uint8))
    assert text.shape == mask.shape == (2, 256)
    assert image.shape == (1, 256)
    torch.manual_seed(0)
    theirs = open_clip.create_model("ViT-S-32-alt", force_custom_text=True)
    theirs.eval()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model.text(tokens, short)[0], theirs.encode_text(tokens, normalize=True))
    with pytest.raises(ValueError, match=r"data\.image_size: got 32"):
        build(config, None, 32, 2, word_tokenizer([]))
