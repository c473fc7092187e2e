"""The modules against open_clip's own losses, and the mask head."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from open_clip import loss as open_clip_loss
from torch import Tensor
from torch.nn import functional as F

from smartclip_kernels import reference
from smartclip_kernels.modules import ClipLoss, MaskHead, SigLipLoss, SmartClipLoss

N, D = 37, 24


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def leaves(dtype: torch.dtype, n_texts: int = N) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalised features, a scale and a bias, all leaves."""
    image = F.normalize(torch.randn(N, D, dtype=dtype), dim=1)
    text = F.normalize(torch.randn(n_texts, D, dtype=dtype), dim=1)
    inputs = (image, text, torch.tensor(14.3, dtype=dtype), torch.tensor(-3.0, dtype=dtype))
    for x in inputs:
        x.requires_grad_()
    return inputs


def gradients(loss: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(ClipLoss, open_clip_loss.ClipLoss), (SigLipLoss, open_clip_loss.SigLipLoss)],
    ids=["clip", "siglip"],
)
def test_equals_open_clip(ours: Any, theirs: Any, with_bias: bool, dtype: torch.dtype, tolerance: float) -> None:
    inputs = leaves(dtype)
    arguments = inputs if with_bias else (*inputs[:3], None)
    asked = inputs if with_bias else inputs[:3]
    expected = theirs()(*arguments, output_dict=True)
    got = ours()(*arguments, output_dict=True)
    assert got.keys() == expected.keys() == {"contrastive_loss"}
    got, expected = got["contrastive_loss"], expected["contrastive_loss"]
    assert (got.shape, got.dtype) == ((), dtype)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    for mine, other in zip(gradients(got, asked), gradients(expected, asked), strict=True):
        # The softmax's bias gradient is 0 in truth and rounding noise in open_clip.
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance * max(1e-2, float(other.abs().max())))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(ClipLoss, open_clip_loss.ClipLoss), (SigLipLoss, open_clip_loss.SigLipLoss)],
    ids=["clip", "siglip"],
)
def test_takes_what_open_clip_takes(ours: Any, theirs: Any) -> None:
    for method in ("__init__", "forward"):
        expected = inspect.signature(getattr(theirs, method)).parameters
        got = list(inspect.signature(getattr(ours, method)).parameters.values())
        assert [p.name for p in got[: len(expected)]] == list(expected)
        for mine, other in zip(got, expected.values(), strict=False):
            assert other.default is inspect.Parameter.empty or mine.default == other.default
    # open_clip main's constructor calls, and its loop's: loss(**model_out, output_dict=True)
    image, text, scale, bias = leaves(torch.float32)
    out = {"image_features": image, "text_features": text, "logit_scale": scale.reshape(1), "logit_bias": bias}
    loss = ours(cache_labels=True, rank=0, world_size=1)
    assert loss(**out, output_dict=True)["contrastive_loss"].shape == ()
    assert not loss.state_dict()


def test_ids_and_label_smoothing_reach_the_loss() -> None:
    image, text, scale, bias = leaves(torch.float64, n_texts=50)
    ids = {"image_ids": torch.randint(20, (N,)), "text_ids": torch.randint(20, (50,))}
    ids_and_ignore: dict[str, Any] = {**ids, "ignore_ids": (torch.randint(9, (N,)), torch.randint(9, (50,)))}
    got = ClipLoss(label_smoothing=0.2)(image, text, scale, bias, **ids_and_ignore)
    expected = reference.loss(image, text, None, scale, bias, label_smoothing=0.2, **ids_and_ignore)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    got = SigLipLoss()(image, text, scale, bias, **ids_and_ignore)
    expected = reference.loss(image, text, None, scale, bias, objective="sigmoid", **ids_and_ignore)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_what_is_for_the_softmax_reaches_the_loss() -> None:
    image, text, scale, bias = leaves(torch.float64)
    mask = torch.rand(N, D, dtype=torch.float64)
    options: dict[str, Any] = {"tau_plus": 0.01, "margin": 0.1, "directions": ("text_to_image",)}
    for got, of_mask in (
        (ClipLoss(**options)(image, text, scale, bias), None),
        (SmartClipLoss(**options)(image, text, mask, scale, bias), mask),
    ):
        expected = reference.loss(image, text, of_mask, scale, bias, **options)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_dims_reach_the_loss() -> None:
    image, text, scale, bias = leaves(torch.float64)
    for loss, objective in ((ClipLoss(dims=(3, D)), "softmax"), (SigLipLoss(dims=(3, D)), "sigmoid")):
        expected = reference.loss(image, text, None, scale, bias, objective=objective, dims=(3, D))
        torch.testing.assert_close(loss(image, text, scale, bias), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("objective", ["softmax", "sigmoid"])
def test_smartclip_loss(objective: Any) -> None:
    inputs = leaves(torch.float64, n_texts=50)
    mask = torch.rand(50, D, dtype=torch.float64).requires_grad_()
    ids: dict[str, Any] = {"image_ids": torch.randint(20, (N,)), "text_ids": torch.randint(20, (50,))}
    smoothing = 0.1 if objective == "softmax" else 0.0
    module = SmartClipLoss(objective, sparsity_weight=0.7, label_smoothing=smoothing)
    image, text, scale, bias = inputs
    terms = module(image, text, mask, scale, bias, output_dict=True, **ids)
    contrastive = reference.loss(image, text, mask, scale, bias, objective=objective, label_smoothing=smoothing, **ids)
    assert isinstance(contrastive, Tensor)
    assert list(terms) == ["contrastive_loss", "sparsity_loss"]
    torch.testing.assert_close(terms["contrastive_loss"], contrastive, rtol=1e-12, atol=0)
    torch.testing.assert_close(terms["sparsity_loss"], 0.7 * mask.mean(), rtol=1e-12, atol=0)
    total = module(image, text, mask, scale, bias, **ids)
    asked = (*inputs, mask)
    expected = gradients(contrastive + 0.7 * mask.mean(), asked)
    for mine, other in zip(gradients(total, asked), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("learned", ["image", "text", "mask", "scale"])
@pytest.mark.parametrize("objective", ["softmax", "sigmoid"])
def test_smartclip_loss_with_one_learned_input(objective: Any, learned: str) -> None:
    """Locked towers: a mask head over a frozen text tower, for one."""
    image, text, scale, _ = leaves(torch.float64)
    named = {"image": image, "text": text, "mask": torch.rand(N, D, dtype=torch.float64), "scale": scale}
    inputs = {key: x.detach().requires_grad_(key == learned) for key, x in named.items()}
    got = SmartClipLoss(objective)(*inputs.values())
    expected = reference.loss(*inputs.values(), objective=objective)
    assert isinstance(expected, Tensor)
    for mine, other in zip(gradients(got, (inputs[learned],)), gradients(expected, (inputs[learned],)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-13)


def test_smartclip_loss_takes_a_bool_mask() -> None:
    image, text, scale, _ = leaves(torch.float32)
    mask = torch.rand(N, D) < 0.7
    module = SmartClipLoss(sparsity_weight=0.5)
    terms = module(image, text, mask, scale, output_dict=True)
    assert terms["sparsity_loss"].item() == pytest.approx(0.5 * mask.float().mean().item(), rel=1e-6)
    torch.testing.assert_close(module(image, text, mask, scale), module(image, text, mask.float(), scale))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ClipLoss(rank=2, world_size=2), "rank, world_size: got 2, 2, needs 0 <= rank < world_size"),
        (lambda: SigLipLoss(rank=1), "rank, world_size: got 1, 1, needs 0 <= rank"),
        (lambda: SmartClipLoss(rank=-1, world_size=2), "rank, world_size: got -1, 2"),
        (lambda: ClipLoss(strategy="tree"), "strategy: got 'tree', needs one of 'gather', 'ring'"),  # type: ignore[arg-type]
        (lambda: SigLipLoss(dist_impl="tree"), "dist_impl: got 'tree', needs one of"),
        (lambda: SmartClipLoss("triplet"), "objective: got 'triplet', needs one of"),  # type: ignore[arg-type]
        (lambda: SmartClipLoss(sparsity_weight=-1.0), "sparsity_weight: got -1.0"),
        (lambda: SmartClipLoss(sparsity_weight=float("nan")), "sparsity_weight: got nan"),
        (lambda: MaskHead(0, 4), "width: got 0"),
        (lambda: MaskHead(8, 0), "embed_dim: got 0"),
        (lambda: MaskHead(8, 4, depth=-1), "depth: got -1"),
        (lambda: MaskHead(8, 4, initial_std=-0.1), "initial_std: got -0.1"),
        (lambda: MaskHead(8, 4, heads=3), "heads: got 3, needs a divisor of width, 8"),
        (lambda: MaskHead(8, 4, initial_keep=1.0), "initial_keep: got 1.0"),
        (lambda: MaskHead(8, 4)(torch.randn(3, 8)), r"states: got shape \(3, 8\), needs \(texts, tokens, 8\)"),
        (lambda: MaskHead(8, 4)(torch.randn(3, 2, 7)), r"states: got shape \(3, 2, 7\)"),
        (lambda: MaskHead(8, 4)(torch.randn(3, 2, 8), torch.zeros(3, 3, dtype=torch.bool)), "padding_mask: got shape"),
    ],
)
def test_value_errors(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MaskHead(8, 4)([1, 2]), "states: got list"),
        (lambda: MaskHead(8, 4)(torch.randn(3, 2, 8), torch.zeros(3, 2)), "padding_mask: got dtype torch.float32"),
    ],
)
def test_type_errors(make: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        make()


depths = pytest.mark.parametrize("depth", [0, 1, 2])


@depths
def test_hard_masks_are_the_thresholded_soft_ones_with_their_gradient(depth: int) -> None:
    states, weight = torch.randn(11, 5, 16), torch.randn(11, 48)
    head = MaskHead(16, 48, initial_keep=0.5, depth=depth)
    hard = head(states)
    (hard * weight).sum().backward()
    hard_gradients = [p.grad.clone() for p in head.parameters() if p.grad is not None]
    head.zero_grad()
    head.hard = False
    soft = head(states)
    (soft * weight).sum().backward()
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(hard, (soft > 0.5).float())
    assert len(hard_gradients) == len(list(head.parameters()))
    for got, p in zip(hard_gradients, head.parameters(), strict=True):
        assert p.grad is not None
        assert torch.equal(got, p.grad)
        assert p.grad.abs().max() > 0


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
def test_starts_near_the_initial_keep_probability(keep: float) -> None:
    soft = MaskHead(64, 512, hard=False, initial_keep=keep)(torch.randn(200, 6, 64))
    assert soft.mean().item() == pytest.approx(keep, abs=0.02)
    assert soft.logit().std().item() == pytest.approx(0.02 * 64**0.5, rel=0.15)


def test_masks_may_differ_from_the_start() -> None:
    """A large deviation starts each text with a mask of its own, a small one with nearly the same for all."""
    states = torch.randn(200, 6, 64)
    spread = [
        MaskHead(64, 256, hard=False, depth=0, initial_std=std)(states).logit().std(0).mean() for std in (0.02, 0.7)
    ]
    torch.testing.assert_close(spread[1] / spread[0], torch.tensor(35.0), rtol=0.3, atol=0)


@depths
def test_padding_is_not_read(depth: int) -> None:
    head = MaskHead(16, 48, hard=False, depth=depth, heads=4, initial_std=0.5).double()
    states = torch.randn(5, 7, 16, dtype=torch.float64)
    lengths = torch.tensor([7, 3, 1, 0, 5])
    padding = torch.arange(7) >= lengths[:, None]
    got = head(states, padding)
    other = head(torch.where(padding[..., None], 100.0, states), padding)
    assert got.isfinite().all()
    torch.testing.assert_close(got, other, rtol=0, atol=1e-12)
    for i in (0, 1, 2, 4):
        alone = head(states[i : i + 1, : lengths[i]])
        torch.testing.assert_close(got[i : i + 1], alone, rtol=0, atol=1e-12)
    assert not torch.allclose(got[1], head(states)[1])


def test_exploration_draws_with_the_masks_probability_in_training_only() -> None:
    head = MaskHead(16, 20, initial_keep=0.3, explore=True)
    states = torch.randn(1, 3, 16)
    draws = head(states.expand(20_000, -1, -1))
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    head.eval()
    assert torch.equal(head(states), head(states))
    head.hard = False
    # Five standard deviations of a frequency over 20,000 draws.
    torch.testing.assert_close(draws.mean(0), head(states)[0], rtol=0, atol=5 * 0.5 / 20_000**0.5)


@depths
def test_half_precision_and_a_nan_that_stays_visible(depth: int) -> None:
    head = MaskHead(16, 20, depth=depth)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mask = head(torch.randn(4, 3, 16))
    assert mask.dtype == torch.bfloat16
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    states = torch.randn(4, 3, 16)
    states[2] = torch.nan
    mask = head(states)
    assert mask[2].isnan().all()
    assert mask[[0, 1, 3]].isfinite().all()


def test_a_mask_head_learns_which_dimensions_a_text_speaks_of() -> None:
    """Texts of two kinds describe one half of the image's embedding each; the other half is noise for them."""
    head = MaskHead(16, 32, initial_keep=0.6)
    loss_fn = SmartClipLoss(sparsity_weight=1.0)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    kinds = torch.randn(2, 1, 16)
    for _ in range(60):
        kind = torch.arange(64) % 2
        truth = torch.zeros(64, 32)
        truth[kind == 0, :16] = 1
        truth[kind == 1, 16:] = 1
        image = torch.randn(64, 32)
        loss = loss_fn(image, image * truth, head(kinds[kind]), 10.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    agreement = (head(kinds[kind]) == truth).float().mean()
    assert agreement > 0.95
