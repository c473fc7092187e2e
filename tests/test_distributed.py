"""The losses over several processes against the definition on the whole batch, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import smartclip_kernels as sk
from smartclip_kernels import reference, testing
from smartclip_kernels.distributed.exchange import HEADER_BYTES
from tests import distributed_runs as runs
from tests.distributed_runs import Options
from tests.ranks import Ranks
from tests.simulated import SIMULATED

TOLERANCES = {torch.float64: 1e-10, torch.float32: 5e-6}
"""By the scores' dtype, relative to the largest element."""
STRATEGIES = ("gather", "ring")
UNEVEN = {1: [9], 2: [3, 8], 3: [5, 1, 7], 4: [2, 6, 1, 5]}
TEXTS = {1: [13], 2: [9, 4], 3: [2, 8, 4], 4: [7, 1, 3, 5]}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    processes = Ranks(4, tmp_path_factory.mktemp("ranks") / "store")
    yield processes
    processes.close()


def expected(whole: testing.Inputs, rows: list[int], columns: list[int], options: Options) -> dict[str, Tensor]:
    """What all ranks together get, by the definition: losses by rank (or by anchor), gradients of all rows.

    A rank's loss is the number of ranks × its share; gradients are those of all ranks' losses times what comes in.
    """
    x, wanted = runs.leaves(whole.to(torch.float64))
    scale, bias = torch.as_tensor(x.logit_scale), x.logit_bias
    ids: dict[str, Any] = {"image_ids": x.image_ids, "text_ids": x.text_ids, "ignore_ids": x.ignore_ids}
    common: dict[str, Any] = {
        "objective": x.objective,
        "label_smoothing": x.label_smoothing,
        "tau_plus": x.tau_plus,
        "margin": x.margin,
    }
    of_image, of_text = reference.shares_of(x.directions)
    of_rows, of_columns, row_positives, column_positives = reference.anchor_losses(
        x.image, x.text, x.mask, scale, bias, **ids, **common
    )
    incoming = torch.tensor(options.incoming or [0.75] * len(rows), dtype=torch.float64)
    row_weight, column_weight = (incoming.repeat_interleave(torch.tensor(sizes)) for sizes in (rows, columns))
    if options.reduction == "none":
        losses, weights = [of_rows, of_columns], [row_weight, column_weight]
        asked = slice(0 if of_image else 1, 1 + (of_text > 0 and x.objective == "softmax"))
        losses, weights = losses[asked], weights[asked]
        total = torch.stack([(weight * loss).sum() for weight, loss in zip(weights, losses, strict=False)]).sum()
    else:
        mean = options.reduction == "mean"
        if x.objective == "softmax":
            anchors = [float((p > 0).sum().clamp(min=1)) if mean else 1.0 for p in (row_positives, column_positives)]
            shares = [of_image * a.sum() / anchors[0] + of_text * b.sum() / anchors[1]
                      for a, b in zip(of_rows.split(rows), of_columns.split(columns), strict=True)]  # fmt: skip
        else:
            logits = reference.similarity(x.image, x.text, x.mask) * scale + (0 if bias is None else bias)
            positive = reference.positive_pairs(x.image, x.text, x.image_ids, x.text_ids)
            candidate = reference.candidate_pairs(positive, *(x.ignore_ids or (None, None)))
            pairs = torch.where(candidate, torch.nn.functional.softplus(torch.where(positive, -logits, logits)), 0)
            torch.testing.assert_close(pairs.sum(1), of_rows)
            images_travel = sum(rows) < sum(columns) * (1 if x.mask is None else 2)
            parts = pairs.split(columns, dim=1) if images_travel else pairs.split(rows)
            shares = [part.sum() / (len(x.image) if mean else 1) for part in parts]
        losses = [len(rows) * torch.stack(shares)]
        total = (incoming * losses[0]).sum()
    values = {f"loss{i}": loss.detach() for i, loss in enumerate(losses)}
    grads = torch.autograd.grad(total, list(wanted.values()))
    return values | {f"grad_{name}": grad for name, grad in zip(wanted, grads, strict=True)}


def together(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Of all ranks: losses and rows of features side by side; what every rank has of the scale added up."""
    return {
        name: torch.stack([x[name].double() for x in found]).sum(0)
        if "logit" in name
        else torch.cat([torch.atleast_1d(x[name]).double() for x in found])
        for name in found[0]
    }


def check(
    ranks: Ranks,
    whole: testing.Inputs,
    rows: list[int],
    columns: list[int],
    options: Options = Options(),  # noqa: B008
    evaluate: Any = runs.evaluate,
) -> None:
    found = [x[0] for x in ranks.run(evaluate, whole, rows, columns, options, among=len(rows))]
    got, true = together(found), expected(whole, rows, columns, options)
    assert got.keys() == true.keys()
    for name, value in true.items():
        mine = got[name].reshape(value.shape)
        if name == "grad_logit_bias" and whole.objective == "softmax":
            assert mine == 0
            continue
        if name.startswith("grad_") and "logit" not in name:
            assert all(x[name].dtype == whole.leaves[name.removeprefix("grad_")].dtype for x in found)
        allowed = TOLERANCES[reference.compute_dtype(whole.dtype)] * value.abs().max()
        if whole.dtype.itemsize == 2 and name in ("grad_image", "grad_text", "grad_mask"):
            # Rounded once, after all ranks' parts are added up.
            allowed = allowed + torch.finfo(whole.dtype).eps / 2 * value.abs()
        error = (mine - value).abs() / allowed
        assert error.max() <= 1, f"{name}: {error.max():.3g} × what is allowed"


def batch(rows: list[int], columns: list[int], **options: Any) -> testing.Inputs:
    defaults: dict[str, Any] = {"dtype": torch.float64, "mask": "soft", "bias": 0.3, "scale": 12.0}
    return testing.make_inputs(sum(rows), sum(columns), 24, **(defaults | options))


every = pytest.mark.parametrize("similarity", ["dot", "masked_cosine"])
objectives = pytest.mark.parametrize("objective", ["softmax", "sigmoid"])
strategies = pytest.mark.parametrize("strategy", STRATEGIES)


@every
@objectives
@strategies
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_paired_rows(
    ranks: Ranks, similarity: Any, objective: str, strategy: str, dtype: torch.dtype, count: int
) -> None:
    rows = UNEVEN[count]
    check(ranks, batch(rows, rows, similarity=similarity, objective=objective, dtype=dtype), rows, rows,
          Options(strategy))  # fmt: skip


@every
@objectives
@strategies
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_ids(ranks: Ranks, similarity: Any, objective: str, strategy: str, reduction: str, count: int) -> None:
    """Across ranks: several positives, none, pairs that count neither way; more texts than images."""
    rows, columns = UNEVEN[count], TEXTS[count]
    smoothing = 0.1 if objective == "softmax" else 0.0
    whole = batch(rows, columns, similarity=similarity, objective=objective, ids=True, ignore=True,
                  label_smoothing=smoothing, seed=count)  # fmt: skip
    check(ranks, whole, rows, columns, Options(strategy, reduction))


@every
@objectives
@strategies
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_other_side_travels(ranks: Ranks, similarity: Any, objective: str, strategy: str, reduction: str) -> None:
    """Texts with their masks, where images are many; images, where texts are."""
    few, many = [3, 1, 2], [12, 5, 9]
    rows, columns = (few, many) if similarity == "dot" else (many, few)
    whole = batch(rows, columns, similarity=similarity, objective=objective, ids=True, ignore=True)
    check(ranks, whole, rows, columns, Options(strategy, reduction))


@every
@strategies
@pytest.mark.parametrize("name", [None, "reference", "triton"])
@pytest.mark.parametrize("direction", [None, *reference.DIRECTIONS])
def test_debiased_and_in_one_direction(
    ranks: Ranks, similarity: Any, strategy: str, name: str | None, direction: str | None
) -> None:
    """Images travel, or texts: either way a rank needs the others' τ."""
    if name == "triton" and (name not in sk.available_backends() or direction):
        pytest.skip("not here, or once is enough")
    few, many = [3, 1, 2], [12, 5, 9]
    rows, columns = (few, many) if similarity == "dot" else (many, few)
    dtype = torch.float64 if name != "triton" else torch.float32
    whole = batch(rows, columns, similarity=similarity, ids=True, ignore=True, dtype=dtype)
    taus = tuple(torch.linspace(0.2, 0, sum(sizes), dtype=torch.float64) for sizes in (rows, columns))
    whole = replace(whole, tau_plus=taus, directions=(direction,) if direction else whole.directions)  # type: ignore[arg-type]
    for reduction in ("mean", "none"):
        check(ranks, whole, rows, columns, Options(strategy, reduction, backend=name))


@every
@strategies
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("name", [None, "reference", "triton"])
def test_masked_by_a_margin(ranks: Ranks, similarity: Any, strategy: str, ids: bool, name: str | None) -> None:
    """With ids an anchor's best positive may be at any rank."""
    if name == "triton" and name not in sk.available_backends():
        pytest.skip("not here")
    few, many = [3, 1, 2], [12, 5, 9]
    rows, columns = (many, many) if not ids else (few, many) if similarity == "dot" else (many, few)
    dtype = torch.float64 if name != "triton" else torch.float32
    whole = testing.clear_margin(batch(rows, columns, similarity=similarity, ids=ids, ignore=True, dtype=dtype), 0.1)
    whole = replace(whole, tau_plus=0.05)
    for reduction in ("mean", "none"):
        check(ranks, whole, rows, columns, Options(strategy, reduction, backend=name))


def test_prefixes(ranks: Ranks) -> None:
    rows, dims = [3, 1, 5], (6, 24)
    whole = batch(rows, rows)
    found = ranks.run(runs.prefixes, whole, rows, dims, among=3)
    x, wanted = runs.leaves(whole)
    loss = sk.clip_loss(x.image, x.text, x.logit_scale, x.logit_bias, dims=dims)
    image, text, *_ = torch.autograd.grad(loss, list(wanted.values()))
    torch.testing.assert_close(torch.stack([x[0] for x in found]).mean(), loss.detach(), rtol=1e-12, atol=0)
    for k, grad in ((1, image), (2, text)):
        torch.testing.assert_close(torch.cat([x[k] for x in found]) / 3, grad, rtol=1e-10, atol=1e-13)
    messages = ranks.outcomes(runs.prefixes_of_one_rank, (9,), (4,), among=3)
    assert all("dims: got (9,), needs" in message for message in messages)
    messages = ranks.outcomes(runs.prefixes_of_one_rank, (8,), None, among=3)
    assert all("dims: all ranks of the group need the same, got rank 1 8" in message for message in messages), messages


@objectives
@strategies
@pytest.mark.parametrize("mask", ["bool", "hard"])
def test_masks(ranks: Ranks, objective: str, strategy: str, mask: Any) -> None:
    for rows, columns in (([4, 2], [4, 2]), ([9, 20], [3, 4])):
        whole = batch(rows, columns, similarity="masked_cosine", objective=objective, mask=mask)
        check(ranks, whole, rows, columns, Options(strategy))


@every
@objectives
@strategies
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(ranks: Ranks, similarity: Any, objective: str, strategy: str, dtype: torch.dtype) -> None:
    rows = UNEVEN[3]
    check(ranks, batch(rows, rows, similarity=similarity, objective=objective, dtype=dtype), rows, rows,
          Options(strategy))  # fmt: skip


@every
@objectives
@strategies
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_reference_backend(ranks: Ranks, similarity: Any, objective: str, strategy: str, reduction: str) -> None:
    rows, columns = UNEVEN[2], TEXTS[2]
    smoothing = 0.1 if objective == "softmax" else 0.0
    whole = batch(rows, columns, similarity=similarity, objective=objective, ignore=True, label_smoothing=smoothing)
    check(ranks, whole, rows, columns, Options(strategy, reduction, backend="reference"))


@every
@objectives
@strategies
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ranks_that_weigh_their_losses(
    ranks: Ranks, similarity: Any, objective: str, strategy: str, reduction: str
) -> None:
    """The gradient is that of the sum of all ranks' losses, each times what comes in there."""
    rows = UNEVEN[3]
    options = Options(strategy, reduction, incoming=(0.5, -2.0, 0.0))
    check(ranks, batch(rows, rows, similarity=similarity, objective=objective), rows, rows, options)


@objectives
@strategies
@pytest.mark.parametrize(
    "wanted", [("image",), ("text",), ("mask",), ("logit_scale",), ("mask", "logit_bias"), ()], ids=str
)
def test_locked_towers(ranks: Ranks, objective: str, strategy: str, wanted: tuple[str, ...]) -> None:
    for similarity, rows, columns in (
        ("dot", [3, 4], [3, 4]),
        ("masked_cosine", [3, 4], [3, 4]),
        ("masked_cosine", [13, 4], [3, 4]),
    ):
        if wanted == ("mask",) and similarity == "dot":
            continue
        whole = batch(rows, columns, similarity=similarity, objective=objective)
        if not wanted:
            found = ranks.run(runs.evaluate, replace(whole, wanted=()), rows, columns, Options(strategy), among=2)
            got = torch.stack([x[0]["loss0"] for x in found])
            torch.testing.assert_close(got, expected(whole, rows, columns, Options(strategy))["loss0"])
        else:
            check(ranks, replace(whole, wanted=wanted), rows, columns, Options(strategy))


@strategies
def test_a_side_without_any_positive(ranks: Ranks, strategy: str) -> None:
    rows = [2, 3]
    whole = batch(rows, rows)
    whole = replace(whole, image_ids=torch.arange(5), text_ids=torch.arange(5) + 100)
    for x in ranks.run(runs.evaluate, whole, rows, rows, Options(strategy), among=2):
        assert x[0]["loss0"] == 0
        assert all(not value.any() for value in x[0].values())


@every
@objectives
@strategies
def test_same_bits(ranks: Ranks, similarity: Any, objective: str, strategy: str) -> None:
    rows = [150, 90, 201]
    whole = batch(rows, rows, similarity=similarity, objective=objective, dtype=torch.float32, ids=True)
    for first, *others in ranks.run(runs.evaluate, whole, rows, rows, Options(strategy), 3, among=3):
        for other in others:
            assert all(torch.equal(other[name], value) for name, value in first.items())


@pytest.mark.parametrize("simulated", [name for name in SIMULATED if name in sk.available_backends()])
@pytest.mark.parametrize(
    ("similarity", "objective", "strategy"), [("dot", "softmax", "ring"), ("masked_cosine", "softmax", "gather")]
)
def test_a_gpus_backends(ranks: Ranks, simulated: str, similarity: Any, objective: str, strategy: str) -> None:
    """Their states merge, their gradients stay unrounded until all are added up; G is rounded to half precision."""
    rows, options = [4, 7], Options(strategy, backend=simulated)
    whole = batch(rows, rows, similarity=similarity, objective=objective, dtype=torch.bfloat16, mask="hard")
    found = [x[0] for x in ranks.run(runs.evaluate, whole, rows, rows, options, among=2)]
    got, true = together(found), expected(whole, rows, rows, options)
    assert got.pop("grad_logit_bias") == true.pop("grad_logit_bias").round() == 0
    for name, value in true.items():
        tolerance = 2.0**-7 if name in ("grad_image", "grad_text", "grad_mask") else 1e-5
        error = (got[name].reshape(value.shape) - value).abs().max()
        assert error <= tolerance * value.abs().max(), name


@every
@objectives
@strategies
def test_nccls_way(ranks: Ranks, similarity: Any, objective: str, strategy: str) -> None:
    """Over gloo: what is only for NCCL is at least the same mathematics."""
    for rows in ([4, 4, 4], UNEVEN[3]):
        whole = batch(rows, rows, similarity=similarity, objective=objective)
        check(ranks, whole, rows, rows, Options(strategy), runs.evaluate_as_with_nccl)


@strategies
def test_scores_are_kept_within_the_workspace_or_made_again(ranks: Ranks, strategy: str) -> None:
    rows = [260, 300]
    whole = batch(rows, rows, dtype=torch.float32)
    for megabytes in (0.01, 1.0, 2.0, 64.0):
        ranks.run(runs.set_workspace, megabytes)
        try:
            check(ranks, whole, rows, rows, Options(strategy))
        finally:
            ranks.run(runs.set_workspace, None)


@strategies
def test_one_rank_is_the_plain_loss(ranks: Ranks, strategy: str) -> None:
    whole = batch([9], [13], dtype=torch.float32)
    (found,) = ranks.run(runs.evaluate, whole, [9], [13], Options(strategy, incoming=(0.7,)), among=1)
    plain = testing.evaluate(whole, testing.fused_loss()).values
    torch.testing.assert_close(found[0]["loss0"], plain["loss"], rtol=0, atol=0)
    for name, value in found[0].items():
        if name.startswith("grad_"):
            assert torch.equal(value, plain[name])


@pytest.mark.parametrize("objective", ["softmax", "sigmoid", "smartclip"])
@strategies
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_model_under_ddp(ranks: Ranks, objective: str, strategy: str, dtype: torch.dtype, count: int) -> None:
    """Weights, logit_scale and logit_bias: what DDP averages is the gradient of one process on the whole batch."""
    rows = {1: [11], 2: [4, 7], 3: [3, 2, 6], 4: [1, 4, 4, 2]}[count]
    alone = runs.train_step(None, objective, strategy, rows, dtype)
    found = ranks.run(runs.train_step, objective, strategy, rows, dtype, among=count)
    for name, true in alone.items():
        for x in found:
            error = (x[name] - true).abs().max() / true.abs().max().clamp(min=torch.finfo(dtype).tiny)
            if name == "loss":
                error = (sum(y[name] for y in found) / count - true).abs() / true
            assert error <= TOLERANCES[dtype], f"{name}: {error:.3g}"


def test_autocast(ranks: Ranks) -> None:
    """As without a group: towers in bfloat16, gradients in the caller's float32."""
    for objective in ("softmax", "sigmoid"):
        for found in ranks.run(runs.under_autocast, objective, among=3):
            for dtype, got, true in found:
                assert dtype == torch.float32
                torch.testing.assert_close(got, true, rtol=1e-2, atol=1e-2 * float(true.abs().max()))


def test_second_derivatives_raise(ranks: Ranks) -> None:
    for outcome in ranks.outcomes(runs.second_derivative, among=2):
        assert isinstance(outcome, str) and "RuntimeError: smartclip_kernels: second derivatives" in outcome


def test_backward_twice(ranks: Ranks) -> None:
    for objective in ("softmax", "sigmoid"):
        for first, second in ranks.run(runs.backward_twice, objective, among=3):
            torch.testing.assert_close(second, first, rtol=1e-12, atol=0)


def test_inside_torch_compile(ranks: Ranks) -> None:
    for got, true in ranks.run(runs.compiled, among=2):
        torch.testing.assert_close(got, true)


def test_a_module_over_a_group(ranks: Ranks) -> None:
    """SmartClipLoss: masks' mean over all ranks' texts, also where those are uneven."""
    rows = [3, 8]
    whole = batch(rows, rows, similarity="masked_cosine")
    found = ranks.run(runs.smartclip_module, whole, rows, among=2)
    x, wanted = runs.leaves(whole)
    assert x.mask is not None
    true = sk.SmartClipLoss(sparsity_weight=0.7)(x.image, x.text, x.mask, x.logit_scale, x.logit_bias)
    assert isinstance(true, Tensor)
    torch.testing.assert_close(sum(loss for loss, _ in found) / 2, true.detach())
    (grad,) = torch.autograd.grad(true, wanted["mask"])
    torch.testing.assert_close(torch.cat([g for _, g in found]) / 2, grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("gather_with_grad", [False, True])
@pytest.mark.parametrize("local_loss", [False, True])
def test_clip_loss_does_what_open_clips_does(ranks: Ranks, local_loss: bool, gather_with_grad: bool) -> None:
    """Values on every rank, and what DDP makes of the gradients, right or not (PEERS.md)."""
    flags = {"local_loss": local_loss, "gather_with_grad": gather_with_grad}
    for found in ranks.run(runs.beside_open_clip, "ClipLoss", flags):
        assert {"loss", "image.weight", "text.weight", "log_scale"} <= {name for name, *_ in found}
        for name, mine, theirs in found:
            # The softmax's bias gradient is 0 in truth and rounding noise in open_clip.
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13 if name == "bias" else 1e-15, msg=name)


@pytest.mark.parametrize("dist_impl", ["bidir", "shift", "reduce", "gather"])
def test_siglip_loss_does_what_open_clips_does(ranks: Ranks, dist_impl: str) -> None:
    for found in ranks.run(runs.beside_open_clip, "SigLipLoss", {"dist_impl": dist_impl}):
        assert {"loss", "image.weight", "text.weight", "log_scale", "bias"} <= {name for name, *_ in found}
        for name, mine, theirs in found:
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13, msg=name)


def test_products_and_bytes(ranks: Ranks) -> None:
    """8NMD / W operations where scores are made twice, open_clip 12; at most 55 % of its bytes at D = 512."""
    n, d = 256, 512
    unit = n * n * d / ranks.size
    ranks.run(runs.set_workspace, 0.01)
    try:
        for gather, ring, open_clip in ranks.run(runs.products, n, d):
            assert gather["operations"] == ring["operations"] == 8 * unit
            assert open_clip["operations"] == 12 * unit
            headers = 2 * HEADER_BYTES * (ranks.size - 1)
            features = n * d * 4 * (ranks.size - 1) / ranks.size
            assert open_clip["bytes"] == 4 * features
            assert gather["bytes"] - headers <= 0.55 * open_clip["bytes"]
            assert ring["bytes"] - headers <= 0.8 * open_clip["bytes"]
    finally:
        ranks.run(runs.set_workspace, None)
