"""The fused losses in open_clip's place: numbers, hooks, the patch, its own training loop, memory."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import open_clip_train.main
import pytest
import torch
from open_clip import factory
from open_clip import loss as theirs
from open_clip_train.params import parse_args
from open_clip_train.train import train_one_epoch
from torch import Tensor, nn
from torch.nn import functional as F

from smartclip_kernels.integrations import distillation
from smartclip_kernels.integrations import open_clip as fast
from tests.conftest import Run
from tests.integrations.tiny import CONTEXT, open_clip_model, pairs
from tests.integrations.watch import Largest

N, D = 37, 24
ORIGINALS = {name: getattr(theirs, name) for name in ("ClipLoss", "CoCaLoss", "DistillClipLoss", "SigLipLoss")}


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    fast.unpatch()
    assert all(getattr(theirs, name) is original for name, original in ORIGINALS.items())


def features(n: int = N, d: int = D, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(n, d, dtype=dtype), dim=1)


def model_out(kind: str, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """What open_clip's models hand to the losses, with leaves where gradients go."""
    scale = torch.tensor(14.3, dtype=dtype)
    out = {"image_features": features(dtype=dtype), "text_features": features(dtype=dtype), "logit_scale": scale}
    if kind == "SigLipLoss":
        out["logit_bias"] = torch.tensor(-3.0, dtype=dtype)
    if kind == "CoCaLoss":
        out["logits"] = torch.randn(N, 5, 11, dtype=dtype)
    for x in out.values():
        x.requires_grad_()
    if kind == "CoCaLoss":
        out["labels"] = torch.randint(11, (N, 5))  # token 0 is padding
    if kind == "DistillClipLoss":
        out |= {
            "dist_image_features": features(d=40, dtype=dtype),
            "dist_text_features": features(d=40, dtype=dtype),
            "dist_logit_scale": torch.tensor(50.0, dtype=dtype),
        }
    return out


def make(name: str, where: Any = fast, **options: Any) -> nn.Module:
    if name == "CoCaLoss":
        options |= {"caption_loss_weight": 2.0, "clip_loss_weight": 0.7}
    loss: nn.Module = getattr(where, name)(**options)
    return loss


def gradients(losses: dict[str, Tensor], out: dict[str, Any]) -> list[Tensor]:
    """Of a weighted sum, so that no term hides another."""
    total = sum(losses[name] * weight for name, weight in zip(sorted(losses), (0.6, 1.7), strict=False))
    assert isinstance(total, Tensor)
    asked = [x for x in out.values() if x.requires_grad]
    return list(torch.autograd.grad(total, asked))


names = pytest.mark.parametrize("name", ORIGINALS)


@names
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("scale_shape", [(), (1,)])
def test_same_numbers(name: str, dtype: torch.dtype, tolerance: float, scale_shape: tuple[int, ...]) -> None:
    out = model_out(name, dtype)
    out["logit_scale"] = out["logit_scale"].detach().reshape(scale_shape).requires_grad_()
    expected = make(name, theirs)(**out, output_dict=True)
    got = make(name)(**out, output_dict=True)
    assert list(got) == list(expected)
    for key, value in expected.items():
        assert got[key].shape == ()
        torch.testing.assert_close(got[key], value, rtol=tolerance, atol=tolerance)
    for mine, other in zip(gradients(got, out), gradients(expected, out), strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))
    plain = make(name)(**out)
    assert isinstance(plain, tuple) == (len(expected) == 2)
    for mine, value in zip(plain if isinstance(plain, tuple) else [plain], got.values(), strict=True):
        assert torch.equal(mine, value)


@names
def test_same_signatures_state_and_types(name: str) -> None:
    ours, original = getattr(fast, name), ORIGINALS[name]
    for method in ("__init__", "forward"):
        expected, got = (inspect.signature(getattr(kind, method)).parameters for kind in (original, ours))
        assert list(got) == list(expected)
        defaults = {p.name: p.default for p in expected.values() if p.default is not inspect.Parameter.empty}
        assert {name: got[name].default for name in defaults} == defaults
    loss = make(name)
    assert isinstance(loss, original)
    assert not loss.state_dict()
    assert vars(make(name, theirs)).keys() <= vars(loss).keys()
    assert type(pickle.loads(pickle.dumps(loss))) is ours


def test_coca_without_a_contrastive_term() -> None:
    options: dict[str, Any] = {"caption_loss_weight": 1.0, "clip_loss_weight": 0, "pad_id": 3}
    out = model_out("CoCaLoss")
    for mine, other in zip(fast.CoCaLoss(**options)(**out), theirs.CoCaLoss(**options)(**out), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(("megabytes", "columns"), [(None, 2048), (0.003, 2048), (0.003, 8), (0.0005, 2048)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distillation_tile_by_tile(
    megabytes: float | None, columns: int, dtype: torch.dtype, set_workspace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64 on the same numbers, tiles that divide nothing evenly, a teacher surer than its student."""
    out = {name: x.detach().to(dtype) for name, x in model_out("DistillClipLoss").items()}
    out["dist_logit_scale"] = torch.tensor(100.0)
    for name in ("image_features", "text_features", "logit_scale"):
        out[name].requires_grad_()
    exact = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in out.items()}
    expected = ORIGINALS["DistillClipLoss"]()(**exact, output_dict=True)
    set_workspace(megabytes)
    monkeypatch.setattr(distillation, "_COLUMNS", columns)
    got = fast.DistillClipLoss()(**out, output_dict=True)
    for key, value in expected.items():
        assert got[key].dtype == torch.float32
        torch.testing.assert_close(got[key].double(), value, rtol=1e-6, atol=1e-6)
    unit = 1e-6 if dtype == torch.float32 else 2**-8
    for mine, other in zip(gradients(got, out), gradients(expected, exact), strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=unit, atol=2e-6 * float(other.abs().max()))


def test_distillation_under_autocast_and_with_a_locked_tower() -> None:
    out = model_out("DistillClipLoss", torch.float32)
    out["image_features"] = out["image_features"].detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = fast.DistillClipLoss()(**out, output_dict=True)
    rounded = {name: x.detach().bfloat16() if x.dim() == 2 else x for name, x in out.items()}
    expected = fast.DistillClipLoss()(**rounded, output_dict=True)
    for key, value in expected.items():
        assert torch.equal(got[key], value)
    text, scale = gradients(got, out)
    assert text.dtype == scale.dtype == torch.float32
    exact = gradients(fast.DistillClipLoss()(**out, output_dict=True), out)
    torch.testing.assert_close([text, scale], exact, rtol=0.05, atol=0.05 * float(exact[0].abs().max()))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dist_text_features": features(N - 1, 40)}, "teacher_text: got 36 rows, needs the student's, 37"),
        ({"dist_image_features": features(d=40).requires_grad_()}, "teacher_image: got a tensor that requires"),
        ({"dist_logit_scale": torch.ones(2)}, "teacher_logit_scale: got shape"),
        ({"text_features": features(d=D + 1)}, "text: got embedding width 25"),
    ],
)
def test_distillation_refuses(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fast.DistillClipLoss()(**(model_out("DistillClipLoss") | change))


def test_distillation_has_no_second_derivative() -> None:
    out = model_out("DistillClipLoss")
    loss, _ = fast.DistillClipLoss()(**out)
    (grad,) = torch.autograd.grad(loss, out["image_features"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.sum().backward()


# --- memory ------------------------------------------------------------------------------------------------------


@names
def test_memory_is_linear(name: str, set_workspace: Any) -> None:
    n, small = 700, 16
    out = model_out(name, torch.float32)
    for key in ("image_features", "text_features", "dist_image_features", "dist_text_features"):
        if key in out:
            out[key] = features(n, small, torch.float32).requires_grad_(not key.startswith("dist"))
    set_workspace(1)
    largest = {}
    for where in (fast, theirs):
        with Largest() as seen:
            loss = make(name, where)
            losses = loss(**out, output_dict=True)
            gradients({key: x for key, x in losses.items() if key != "caption_loss"}, only_contrastive(out))
        largest[where] = seen.elements
    assert largest[theirs] >= n * n  # what the measurement would see
    assert largest[fast] < n * n / 3  # 1 MiB is 262,144 numbers


def test_distillation_widens_a_panel_at_a_time(set_workspace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of half-precision features no whole float32 copy is made; texts' gradients are summed in one."""
    n, width = 600, 64
    out = {name: features(n, width, torch.bfloat16) for name in ("image_features", "text_features")}
    out |= {f"dist_{name}": features(n, width, torch.bfloat16) for name in out}
    scales = {"logit_scale": torch.tensor(14.3), "dist_logit_scale": torch.tensor(50.0)}
    image, text, *_ = out.values()
    set_workspace(0.25)
    monkeypatch.setattr(distillation, "_COLUMNS", 64)  # tiles of 128 x 64
    for leaves, whole in (([image], False), ([image, text], True)):
        leaves[-1].requires_grad_()
        with Largest(torch.float32) as seen:
            loss, distill = fast.DistillClipLoss()(**out, **scales)
        assert seen.elements < n * width / 2
        with Largest(torch.float32) as seen:
            torch.autograd.grad(loss + distill, leaves)
        assert seen.elements == n * width if whole else seen.elements < n * width


def only_contrastive(out: dict[str, Any]) -> dict[str, Any]:
    return {key: x for key, x in out.items() if key != "logits"}


# --- hooks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ClipLoss", "CoCaLoss", "DistillClipLoss"])
def test_overridden_hooks_are_obeyed(name: str) -> None:
    """Logits and labels of a user's own, in a subclass of ours and in a subclass of open_clip's."""
    out = model_out(name)

    def user(base: Any) -> Any:
        class User(base):
            def get_logits(self, *arguments: Any, **more: Any) -> Any:
                return tuple(x * 0.5 for x in super().get_logits(*arguments, **more))

            def get_ground_truth(self, device: Any, num_logits: int) -> Tensor:
                labels: Tensor = super().get_ground_truth(device, num_logits)
                return labels.flip(0)

        options = {"caption_loss_weight": 1.0, "clip_loss_weight": 1.0} if name == "CoCaLoss" else {}
        return User(**options)

    ours, original = user(getattr(fast, name)), user(ORIGINALS[name])
    got, expected = ours(**out, output_dict=True), original(**out, output_dict=True)
    for key, value in expected.items():
        assert torch.equal(got[key], value)
    assert not torch.allclose(expected["contrastive_loss"], make(name)(**out, output_dict=True)["contrastive_loss"])


def test_hooks_of_an_instance_and_of_the_others_are_obeyed() -> None:
    class NegativesOnly(fast.SigLipLoss):
        def get_ground_truth(self, *arguments: Any, **more: Any) -> Tensor:
            return -torch.ones(N, N, dtype=torch.float64)

    out = model_out("SigLipLoss")
    logits = 14.3 * out["image_features"] @ out["text_features"].T - 3
    torch.testing.assert_close(NegativesOnly()(**out), F.softplus(logits).sum() / N)

    loss = fast.ClipLoss()
    loss.get_ground_truth = lambda device, count: torch.arange(count).flip(0)
    out = model_out("ClipLoss")
    flipped = out | {"text_features": out["text_features"].flip(0)}
    torch.testing.assert_close(loss(**out), fast.ClipLoss()(**flipped))

    class Sharper(fast.DistillClipLoss):
        def dist_loss(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
            return 3 * super().dist_loss(teacher_logits, student_logits)

    out = model_out("DistillClipLoss")
    torch.testing.assert_close(Sharper()(**out)[1], 3 * fast.DistillClipLoss()(**out)[1])


def test_called_hooks_answer_as_ever() -> None:
    out = model_out("ClipLoss")
    arguments = (out["image_features"], out["text_features"], out["logit_scale"])
    ours, original = fast.ClipLoss(cache_labels=True), ORIGINALS["ClipLoss"](cache_labels=True)
    for mine, other in zip(ours.get_logits(*arguments), original.get_logits(*arguments), strict=True):
        assert torch.equal(mine, other)
    device = torch.device("cpu")
    assert torch.equal(ours.get_ground_truth(device, 5), torch.arange(5))
    assert ours.get_ground_truth(device, 5) is ours.labels[device]
    assert torch.equal(
        fast.SigLipLoss().get_ground_truth(device, torch.float32, 3),
        ORIGINALS["SigLipLoss"]().get_ground_truth(device, torch.float32, 3),
    )


def test_a_subclass_without_hooks_is_fused() -> None:
    class Weighted(fast.ClipLoss):
        def forward(self, *arguments: Any, **more: Any) -> Any:
            return 2 * super().forward(*arguments, **more)

    with Largest() as seen:
        Weighted()(features(700, 8), features(700, 8), 10.0)
    assert seen.elements < 700 * 700


# --- the patch ---------------------------------------------------------------------------------------------------


def test_patch_and_unpatch() -> None:
    fast.patch()
    assert theirs.ClipLoss is factory.ClipLoss is open_clip.ClipLoss is fast.ClipLoss
    assert theirs.SigLipLoss is factory.SigLipLoss is fast.SigLipLoss
    assert theirs.CoCaLoss is factory.CoCaLoss is open_clip.CoCaLoss is fast.CoCaLoss
    assert theirs.DistillClipLoss is factory.DistillClipLoss is open_clip.DistillClipLoss is fast.DistillClipLoss
    fast.patch()
    fast.unpatch()
    for name, original in ORIGINALS.items():
        assert getattr(theirs, name) is getattr(factory, name) is original
    assert open_clip.ClipLoss is ORIGINALS["ClipLoss"]
    fast.unpatch()


def test_patch_for_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_clip_train.main, "ClipLoss", ORIGINALS["ClipLoss"], raising=False)
    with fast.patch():
        assert open_clip_train.main.ClipLoss is fast.ClipLoss
        with fast.patch():
            pass
        assert theirs.ClipLoss is fast.ClipLoss  # the inner block did not apply it
    assert theirs.ClipLoss is open_clip_train.main.ClipLoss is ORIGINALS["ClipLoss"]


def test_an_exception_ends_the_patch() -> None:
    with pytest.raises(ZeroDivisionError), fast.patch():
        raise ZeroDivisionError
    assert theirs.ClipLoss is ORIGINALS["ClipLoss"]


def arguments_of(kind: str, *more: str) -> SimpleNamespace:
    """open_clip's own arguments, as its `main` completes them."""
    model = {"coca": "coca_tiny"}.get(kind, "tiny")
    args = parse_args(["--model", model, "--device", "cpu", "--precision", "fp32", "--batch-size", "8", *more])
    by_main = {"rank": 0, "world_size": 1, "distributed": False, "wandb": False}
    return SimpleNamespace(**(vars(args) | by_main | {"distill": kind == "distill", "siglip": kind == "siglip"}))


@pytest.mark.parametrize(
    ("kind", "name"),
    [("clip", "ClipLoss"), ("siglip", "SigLipLoss"), ("coca", "CoCaLoss"), ("distill", "DistillClipLoss")],
)
def test_create_loss_builds_ours(kind: str, name: str) -> None:
    args = arguments_of(kind, "--local-loss", "--gather-with-grad", "--coca-caption-loss-weight", "3")
    with fast.patch():
        got = open_clip.create_loss(args)
    expected = open_clip.create_loss(args)
    assert type(got) is getattr(fast, name)
    assert type(expected) is ORIGINALS[name]
    assert {key: vars(got)[key] for key in vars(expected) if key[0] != "_"} == {
        key: value for key, value in vars(expected).items() if key[0] != "_"
    }


# --- open_clip's trainer -----------------------------------------------------------------------------------------


class Loader:
    """Made data, as open_clip's trainer wants it."""

    num_batches, num_samples = 3, 24

    def __init__(self, context: int) -> None:
        self.dataloader = self
        self.context = context

    def set_epoch(self, epoch: int) -> None:
        pass

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (pairs(8, seed, self.context) for seed in range(self.num_batches))


def three_steps(kind: str, *more: str) -> tuple[list[dict[str, float]], nn.Module]:
    args = arguments_of(kind, *more)
    model = open_clip_model("clip" if kind == "distill" else kind)
    teacher = open_clip_model("clip", seed=1, embed_dim=40) if kind == "distill" else None
    loss, losses = open_clip.create_loss(args), []

    def record(_: nn.Module, __: Any, output: dict[str, Tensor]) -> None:
        losses.append({key: x.item() for key, x in output.items()})

    loss.register_forward_hook(record)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    context = CONTEXT - 1 if kind == "coca" else CONTEXT
    train_one_epoch(model, {"train": Loader(context)}, loss, 0, optimizer, None, lambda step: None, teacher, args)
    return losses, model


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("clip", ()),
        ("clip", ("--accum-freq", "3")),
        ("siglip", ()),
        ("siglip", ("--accum-freq", "3")),
        ("coca", ()),
        ("distill", ()),  # which open_clip does not accumulate
    ],
)
def test_three_steps_of_open_clips_own_trainer(kind: str, more: tuple[str, ...]) -> None:
    expected, before = three_steps(kind, *more)
    with fast.patch():
        got, after = three_steps(kind, *more)
    assert len(got) == len(expected) == 3
    for mine, other in zip(got, expected, strict=True):
        assert mine == pytest.approx(other, abs=1e-5, rel=1e-5)
    start = open_clip_model("clip" if kind == "distill" else kind)
    moved = [(x - y).abs().max().item() for x, y in zip(start.parameters(), before.parameters(), strict=True)]
    assert max(moved) > 1e-3
    for x, y in zip(after.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@names
def test_compiles(name: str) -> None:
    out = model_out(name)
    loss = make(name)
    compiled = torch.compile(loss, backend="aot_eager")
    for mine, other in zip(
        compiled(**out, output_dict=True).values(), loss(**out, output_dict=True).values(), strict=True
    ):
        torch.testing.assert_close(mine, other)


TWO_RANKS = """
import sys
import torch
from torch import distributed, multiprocessing
from open_clip import loss as theirs
from smartclip_kernels.integrations import open_clip as fast

def gradients(loss, inputs, *more):
    losses = loss(*inputs, *more, output_dict=True)
    return [*losses.values(), *torch.autograd.grad(sum(losses.values()), inputs)]

def work(rank, store):
    distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
    torch.manual_seed(rank)
    features = [torch.randn(7, d, dtype=torch.float64) for d in (5, 5, 6, 6)]
    inputs = [x.requires_grad_() for x in (*features[:2], torch.tensor(2.0, dtype=torch.float64))]
    ranks = {"rank": rank, "world_size": 2}
    bias = torch.tensor(-1.0, dtype=torch.float64).requires_grad_()
    for flags in ((False, False), (False, True), (True, False), (True, True)):
        distill, clip = ([], [])
        for where in (fast, theirs):
            distill.append(gradients(where.DistillClipLoss(*flags, **ranks), inputs, *features[2:], 1.5))
            clip.append(gradients(where.ClipLoss(*flags, **ranks), inputs))
            distributed.all_reduce(clip[-1][-1])  # the scale's: of one rank it is another share
        torch.testing.assert_close(*distill, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(clip[0][1:], clip[1][1:], rtol=1e-10, atol=1e-12)
    for how in ("bidir", "shift", "reduce", "gather"):
        siglip = [gradients(where.SigLipLoss(dist_impl=how, **ranks), [*inputs, bias]) for where in (fast, theirs)]
        for found in siglip:
            found[0] = found[0].detach().clone()
            for x in (found[0], *found[-2:]):
                distributed.all_reduce(x)
        torch.testing.assert_close(*siglip, rtol=1e-10, atol=1e-12)
    distributed.destroy_process_group()

multiprocessing.start_processes(work, (sys.argv[1],), nprocs=2, start_method="fork")
"""


def test_two_ranks(tmp_path: Path, run_python: Run) -> None:
    """All flags of open_clip: each rank's losses and gradients, sums of what ranks share in another way."""
    done = run_python(TWO_RANKS, str(tmp_path / "store"), timeout=120, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
