"""A mask head on an existing CLIP: at the start it is CLIP, it trains, it retrieves, it is saved alone."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from open_clip_train.train import train_one_epoch
from torch import Tensor
from torch.nn import functional as F

import smartclip_kernels as sk
from smartclip_kernels.integrations import transformers as fast
from smartclip_kernels.integrations.smartclip import (
    attach_mask_head,
    encode_text_with_mask,
    load_mask_head,
    save_mask_head,
)
from tests.integrations.tiny import CONTEXT, VOCABULARY, open_clip_model, pairs, transformers_batch, transformers_config

KINDS = (
    "open_clip clip",
    "open_clip custom_text",
    "open_clip hugging_face",
    "open_clip siglip",
    "open_clip coca",
    "transformers clip",
    "transformers siglip",
)
kinds = pytest.mark.parametrize("kind", KINDS)
N = 24


def make(kind: str) -> Any:
    torch.manual_seed(0)
    library, name = kind.split()
    if library == "open_clip":
        return open_clip_model(name).eval()  # without a Hugging Face tower's dropout
    return {"clip": fast.CLIPModel, "siglip": fast.SiglipModel}[name](transformers_config(name))


def batch(kind: str, count: int = N, seed: int = 0) -> dict[str, Any]:
    if kind.startswith("open_clip"):
        image, text = pairs(count, seed, CONTEXT - 1 if kind.endswith("coca") else CONTEXT)
        return {"image": image, "text": text}
    return {**transformers_batch(kind.split()[1], count, seed), "return_logits": False}


def texts(kind: str, inputs: dict[str, Any]) -> dict[str, Any]:
    if kind.startswith("open_clip"):
        return {"text": inputs["text"]}
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def embeddings(output: Any) -> tuple[Tensor, Tensor, Tensor]:
    if "image_features" in output:
        return output["image_features"], output["text_features"], output["text_mask"]
    return output["image_embeds"], output["text_embeds"], output["text_mask"]


@kinds
def test_at_the_start_it_is_clip(kind: str) -> None:
    model, inputs = make(kind), batch(kind)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    plain = model(**inputs)
    assert attach_mask_head(model) is model
    output = model(**inputs)
    image, text, mask = embeddings(output)
    assert mask.shape == text.shape
    assert torch.equal(mask, torch.ones_like(mask))
    for name, x in plain.items():
        if isinstance(x, Tensor):
            assert torch.equal(output[name], x)
    torch.testing.assert_close(sk.masked_similarity(image, text, mask), image @ text.T, rtol=1e-6, atol=1e-6)
    scale = model.logit_scale.exp()
    torch.testing.assert_close(sk.smartclip_loss(image, text, mask, scale), sk.clip_loss(image, text, scale))
    after = model.state_dict()
    assert all(torch.equal(after[name], x) for name, x in before.items())
    assert {name.split(".")[0] for name in after.keys() - before.keys()} == {"mask_head"}
    again, mask_again = encode_text_with_mask(model, **texts(kind, inputs))
    torch.testing.assert_close(again, text)
    assert torch.equal(mask_again, mask)


# SigLIP's text tower itself looks at padding, and CoCa's at the place of its class token.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("open_clip coca", "transformers siglip")])
def test_padding_is_not_read(kind: str) -> None:
    """Texts of three tokens, and what stands behind their end."""
    model = attach_mask_head(make(kind), hard=False, initial_std=1.0)
    tokens = pairs(6)[1][:, :3]
    tokens[:, 2] = VOCABULARY - 1
    found = []
    for length, filler in ((CONTEXT - 1, 0), (CONTEXT, 0)) if "hugging" in kind else ((CONTEXT, 0), (CONTEXT, 7)):
        inputs = {"text": F.pad(tokens, (0, length - 3), value=filler)}
        if kind.startswith("transformers"):
            attended = F.pad(torch.ones_like(tokens), (0, length - 3))
            inputs = {"input_ids": inputs["text"], "attention_mask": attended}
        found.append(encode_text_with_mask(model, **inputs))
    torch.testing.assert_close(*found)


def test_cocas_class_token_is_read_and_its_padding_is_not() -> None:
    """Changes where a text's states are made show in its mask, or do not."""
    model, text = attach_mask_head(make("open_clip coca"), hard=False, initial_std=1.0), pairs(6, 0, CONTEXT - 1)[1]
    _, plain = encode_text_with_mask(model, text)
    places = {"padding": text == 0, "words": text != 0, "the class token": torch.zeros_like(text, dtype=torch.bool)}
    for name, place in places.items():
        at = F.pad(place, (0, 1), value=name == "the class token")

        def change(module: Any, args: Any, states: Tensor, at: Tensor = at) -> Tensor:
            assert states.shape[:2] == at.shape
            return states + at[:, :, None] * torch.randn_like(states)

        handle = model.text.transformer.register_forward_hook(change, prepend=True)
        _, mask = encode_text_with_mask(model, text)
        handle.remove()
        same = [bool(torch.equal(x, y)) for x, y in zip(mask, plain, strict=True)]
        assert same == [name == "padding"] * len(text), name


@kinds
def test_a_short_fine_tune_lowers_the_loss(kind: str) -> None:
    """The head alone first, then everything, from a copy; masks become hard ones of their own."""
    model, inputs = attach_mask_head(make(kind)), batch(kind)
    loss_fn = sk.SmartClipLoss(sparsity_weight=0.3)

    def steps(parameters: Any, lr: float, model: Any) -> list[float]:
        optimizer, seen = torch.optim.AdamW(parameters, lr), []
        for _ in range(15):
            image, text, mask = embeddings(model(**inputs))
            loss = loss_fn(image, text, mask, model.logit_scale.exp())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        return seen

    towers = [x.clone() for name, x in model.named_parameters() if not name.startswith("mask_head")]
    alone = steps(model.mask_head.parameters(), 2e-2, model)
    assert all(map(torch.equal, towers, model.parameters()))
    assert alone[-1] < alone[0] - 0.02
    _, _, mask = embeddings(model(**inputs))
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    together = steps(model.parameters(), 3e-3, model)
    assert together[-1] < alone[-1] - 0.2


def test_open_clips_trainer_trains_smartclip() -> None:
    """Its loop passes the model's output on as keyword arguments, and sums the terms."""
    model, terms = attach_mask_head(open_clip_model()), []
    loss = sk.SmartClipLoss(sparsity_weight=0.5)
    loss.register_forward_hook(lambda *x: terms.append(list(x[2])))
    data = SimpleNamespace(num_batches=2, num_samples=16, set_epoch=lambda epoch: None)
    options = {"device": "cpu", "precision": "fp32", "accum_freq": 1, "distill": False, "skip_scheduler": True}
    rest = {"grad_clip_norm": None, "log_every_n_steps": 1, "batch_size": 8, "world_size": 1, "wandb": False}
    args = SimpleNamespace(**options, **rest, rank=0, distributed=False, horovod=False)
    before = [x.clone() for x in model.mask_head.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    class Loader:
        num_batches, num_samples = 2, 16

        def __iter__(self) -> Any:
            return (pairs(8, seed) for seed in range(2))

    data.dataloader = Loader()
    train_one_epoch(model, {"train": data}, loss, 0, optimizer, None, None, None, args)
    assert terms == [["contrastive_loss", "sparsity_loss"]] * 2
    assert any(not torch.equal(x, y) for x, y in zip(model.mask_head.parameters(), before, strict=True))


@kinds
def test_retrieval(kind: str) -> None:
    model, inputs = attach_mask_head(make(kind), initial_std=2.0), batch(kind)
    with torch.no_grad():
        image, _, _ = embeddings(model(**inputs))
        text, mask = encode_text_with_mask(model, **texts(kind, inputs))
    assert 0 < mask.mean() < 1
    values, indices = sk.masked_topk(image, text, mask, k=3)
    cosines = F.cosine_similarity(image[None] * mask[:, None], text[:, None], dim=-1)
    expected = cosines.topk(3, dim=1)
    torch.testing.assert_close(values, expected.values)
    assert torch.equal(indices, expected.indices)


@kinds
def test_the_head_is_saved_alone(kind: str, tmp_path: Path) -> None:
    model, inputs = attach_mask_head(make(kind), hard=False, depth=2, heads=4, initial_std=1.0), batch(kind, 5)
    expected = encode_text_with_mask(model, **texts(kind, inputs))
    save_mask_head(model, tmp_path / "head.safetensors")
    for other in (make(kind), attach_mask_head(make(kind), hard=False, depth=2, heads=4)):
        assert load_mask_head(other, tmp_path / "head.safetensors") is other
        got = encode_text_with_mask(other, **texts(kind, inputs))
        assert torch.equal(got[1], expected[1])
    with pytest.raises(RuntimeError, match="Missing key"):
        load_mask_head(attach_mask_head(make(kind), depth=3), tmp_path / "head.safetensors")


def test_images_alone_get_no_mask_of_an_earlier_call() -> None:
    coca = attach_mask_head(open_clip_model("coca"))
    encode_text_with_mask(coca, pairs(3, 0, CONTEXT - 1)[1])
    assert "text_mask" not in coca(image=pairs(3)[0])
    model = attach_mask_head(open_clip_model())
    image, text = pairs(3)
    model.encode_text(text)
    assert model.mask_head.watch.states is None  # nor is one kept alive
    encode_text_with_mask(model, text)
    assert "text_mask" not in model(image=image)
    assert model(text=text)["text_mask"].shape == (3, 24)
    with pytest.raises(RuntimeError):
        model(image, text[:, :2])
    assert "text_mask" not in model(image=image)
    model.output_dict = False
    assert len(model(image, text)) == 4


@pytest.mark.parametrize(
    ("make_it", "error", "says"),
    [
        (lambda: attach_mask_head(torch.nn.Linear(2, 2)), TypeError, "model: got torch.nn.modules.linear.Linear"),
        (lambda: attach_mask_head(attach_mask_head(open_clip_model())), ValueError, "one head a model"),
        (lambda: attach_mask_head(open_clip_model(), sk.MaskHead(32, 25)), ValueError, "needs 32 and 24"),
        (lambda: attach_mask_head(open_clip_model(), sk.MaskHead(32, 24), hard=False), ValueError, "options: got hard"),
        (lambda: encode_text_with_mask(open_clip_model()), TypeError, "without a mask_head"),
    ],
)
def test_errors(make_it: Any, error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        make_it()


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="needs one that save_mask_head wrote"):
        load_mask_head(open_clip_model(), tmp_path / "x.safetensors")
