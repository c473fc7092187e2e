"""transformers' dual encoders with fused losses: numbers, outputs, memory, files, its Trainer."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from smartclip_kernels.integrations import transformers as fast
from tests.integrations.tiny import transformers_batch, transformers_config
from tests.integrations.watch import Largest

KINDS = {"clip": "CLIPModel", "siglip": "SiglipModel", "siglip2": "Siglip2Model"}
kinds = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, where: Any = fast, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = getattr(where, KINDS[kind])(transformers_config(kind))
    if kind != "clip":
        with torch.no_grad():
            model.logit_scale.fill_(2.0)
            model.logit_bias.fill_(-3.0)
    return model


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


@kinds
def test_same_numbers(kind: str) -> None:
    theirs, ours = make(kind, transformers), make(kind)
    batch = transformers_batch(kind, 7)
    expected, got = theirs(**batch, return_loss=True), ours(**batch, return_loss=True)
    assert type(got) is type(expected)
    assert got.logits_per_image is got.logits_per_text is None
    assert set(expected) - set(got) == {"logits_per_image", "logits_per_text"}
    assert got.loss.shape == ()
    for name in ("loss", "text_embeds", "image_embeds"):
        torch.testing.assert_close(got[name], expected[name], rtol=1e-6, atol=1e-6)
    for name in ("text_model_output", "vision_model_output"):
        assert torch.equal(got[name].last_hidden_state, expected[name].last_hidden_state)
    found, wanted = gradients(ours, got.loss), gradients(theirs, expected.loss)
    assert found.keys() == wanted.keys()
    assert "logit_scale" in found
    for name, x in wanted.items():
        torch.testing.assert_close(found[name], x, rtol=1e-5, atol=1e-5 * max(1e-2, float(x.abs().max())))


@kinds
def test_logits_only_if_asked_for(kind: str) -> None:
    theirs, ours = make(kind, transformers), make(kind)
    batch = transformers_batch(kind, 5)
    expected = theirs(**batch, return_loss=True)
    for got in (ours(**batch), ours(**batch, return_loss=True, return_logits=True)):
        torch.testing.assert_close(got.logits_per_image, expected.logits_per_image, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got.logits_per_text, expected.logits_per_text, rtol=1e-6, atol=1e-6)
    assert ours(**batch).loss is None
    silent = ours(**batch, return_logits=False)
    assert silent.loss is silent.logits_per_text is None
    # Places in a tuple stay what they were, so logits are made for it.
    got, expected = (model(**batch, return_loss=True, return_dict=False) for model in (ours, theirs))
    assert len(got) == len(expected)
    for mine, other in zip(got[:5], expected[:5], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
    assert len(ours(**batch, return_loss=True, return_dict=False, return_logits=False)) == len(expected) - 2


@kinds
def test_same_signature(kind: str) -> None:
    """Trainer keeps the columns that the signature names."""
    expected = list(inspect.signature(getattr(transformers, KINDS[kind]).forward).parameters.values())
    got = list(inspect.signature(getattr(fast, KINDS[kind]).forward).parameters.values())
    kept = [p for p in got if p.name != "return_logits"]
    assert [(p.name, p.default, p.kind) for p in kept] == [(p.name, p.default, p.kind) for p in expected]


@kinds
def test_memory_is_linear(kind: str, set_workspace: Any) -> None:
    n = 500
    set_workspace(0.25)
    image, text = torch.randn(n, 8, requires_grad=True), torch.randn(n, 8, requires_grad=True)
    largest = []
    for where in (fast, transformers):
        model = make(kind, where)
        for name, x in (("get_image_features", image), ("get_text_features", text)):
            setattr(model, name, lambda x=x, **_: transformers.modeling_outputs.BaseModelOutputWithPooling(None, x))
        if kind != "clip" and where is transformers:  # which does not call those
            model.vision_model, model.text_model = Fixed(image), Fixed(text)
        with Largest() as seen:
            output = model(torch.zeros(1), torch.zeros(1), return_loss=True)
            output.loss.backward()
        largest.append(seen.elements)
    assert largest[1] >= n * n
    assert largest[0] < n * n / 3  # 0.25 MiB is 65,536 numbers


class Fixed(torch.nn.Module):
    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features

    def forward(self, **_: Any) -> Any:
        return transformers.modeling_outputs.BaseModelOutputWithPooling(None, self.features)


# --- models and files --------------------------------------------------------------------------------------------


@kinds
def test_patch_converts_a_model_in_place(kind: str) -> None:
    model = make(kind, transformers)
    before = {name: x.data_ptr() for name, x in model.state_dict().items()}
    batch = transformers_batch(kind, 5)
    expected = model(**batch, return_loss=True).loss
    assert fast.patch(fast.patch(model)) is model
    assert type(model) is getattr(fast, KINDS[kind])
    assert isinstance(model, getattr(transformers, KINDS[kind]))
    output = model(**batch, return_loss=True)
    assert output.logits_per_image is None
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=1e-6)
    assert {name: x.data_ptr() for name, x in model.state_dict().items()} == before
    assert type(fast.unpatch(model)) is getattr(transformers, KINDS[kind])
    assert model(**batch, return_loss=True).logits_per_image is not None


def test_patch_refuses_what_it_would_not_change() -> None:
    class Mine(transformers.CLIPModel):
        pass

    with pytest.raises(TypeError, match=r"model: got .*Mine, needs one of transformers.CLIPModel"):
        fast.patch(Mine(transformers_config("clip")))
    model = make("clip", transformers)
    model.forward = model.forward
    with pytest.raises(ValueError, match="forward was replaced"):
        fast.patch(model)


@kinds
def test_files_are_transformers_own(kind: str, tmp_path: Path) -> None:
    ours, batch = make(kind), transformers_batch(kind, 5)
    expected = ours(**batch, return_loss=True).loss
    ours.save_pretrained(tmp_path)
    back = getattr(transformers, KINDS[kind]).from_pretrained(tmp_path)
    assert back.config.architectures == [KINDS[kind]]
    assert type(transformers.AutoModel.from_pretrained(tmp_path)) is getattr(transformers, KINDS[kind])
    torch.testing.assert_close(back(**batch, return_loss=True).loss, expected, rtol=1e-6, atol=1e-6)
    again = getattr(fast, KINDS[kind]).from_pretrained(tmp_path)
    assert again.state_dict().keys() == make(kind, transformers).state_dict().keys()
    assert torch.equal(again(**batch, return_loss=True).loss, expected)
    copy = pickle.loads(pickle.dumps(again))
    assert torch.equal(copy(**batch, return_loss=True).loss, expected)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")  # the name that all versions have
@kinds
def test_autocast_and_checkpointing(kind: str) -> None:
    ours, batch = make(kind), transformers_batch(kind, 6)
    exact = ours(**batch, return_loss=True).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = ours(**batch, return_loss=True).loss
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0.02, atol=0)
    wanted = gradients(ours, exact)
    ours.gradient_checkpointing_enable()
    ours.train()
    found = gradients(ours, ours(**batch, return_loss=True).loss)
    for name, x in wanted.items():
        torch.testing.assert_close(found[name], x, rtol=1e-5, atol=1e-6)


def test_compiles() -> None:
    ours, batch = make("clip"), transformers_batch("clip", 6)
    compiled = torch.compile(ours, backend="eager")
    got, expected = (model(**batch, return_loss=True).loss for model in (compiled, ours))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


# --- Trainer -----------------------------------------------------------------------------------------------------


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        assert logs is not None
        if "loss" in logs:
            self.losses.append(logs["loss"])


def three_steps(kind: str, where: Any, directory: Path) -> tuple[list[float], Any]:
    model, rows = make(kind, where), transformers_batch(kind, 24)
    dataset = [{name: x[i] for name, x in rows.items()} for i in range(24)]
    options: dict[str, Any] = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    steps = {"max_steps": 3, "per_device_train_batch_size": 8, "logging_steps": 1, "optim": "sgd"}
    args = TrainingArguments(str(directory), learning_rate=0.1, max_grad_norm=0, **steps, **options)

    def collate(examples: list[dict[str, Tensor]]) -> dict[str, Any]:
        return {name: torch.stack([x[name] for x in examples]) for name in examples[0]} | {"return_loss": True}

    seen = Losses()
    trainer = Trainer(model, args, data_collator=collate, train_dataset=dataset, callbacks=[seen])
    trainer.train()
    return seen.losses, model


@kinds
def test_three_steps_of_trainer(kind: str, tmp_path: Path) -> None:
    expected, before = three_steps(kind, transformers, tmp_path)
    got, after = three_steps(kind, fast, tmp_path)
    assert len(got) == 3
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert len(set(got)) == 3
    for x, y in zip(after.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
