"""The adapters of the peers that need a GPU, on stand-ins that do as the packages do, or refuse to."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import measure
from bench.cases import Case, make_inputs
from bench.devices import Host
from bench.measure import Effort, Session
from bench.peers import REPLAYED, SUBJECTS
from bench.rows import Row

CLIP = Case("dot", "softmax", 48, d=256)
SIGLIP = Case("dot", "sigmoid", 48, d=32)
SESSION = Session(Host(), Effort(product=64, seconds=0), lambda text: None)
Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    def put(name: str, **members: Any) -> None:
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)

    return put


def row_of(case: Case, peer: str) -> Row:
    _, row = measure.run_case(replace(case, peers=(peer,)), SESSION)
    return row


pytestmark = pytest.mark.usefixtures("subjects")


class FakeMemeff(nn.Module):
    """Normalises by default; by default, too, its gradients are not those of its loss."""

    def __init__(self, temperature: float = 0.07, normalized_inputs: bool = False, stable: bool = True) -> None:
        super().__init__()
        assert isinstance(temperature, float)
        self.options = SimpleNamespace(temperature=temperature, normalized=normalized_inputs, stable=stable)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        options = self.options
        if not options.normalized:
            image, text = F.normalize(image), F.normalize(text)
        logits = image @ text.T / options.temperature
        labels = torch.arange(len(logits))
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        return 3 * loss - 2 * loss.detach() if options.stable else loss


def test_memeff_is_asked_for_plain_gradients(install: Install) -> None:
    install("memeff", MemoryEfficientCLIPLoss=FakeMemeff)
    row = row_of(CLIP, "memeff")
    assert (row.status, row.note) == ("ok", "no gradient of scale")


def fused_siglip_loss(image: Tensor, text: Tensor, log_temperature: Tensor, bias: Tensor) -> Tensor:
    logits = image @ text.T * log_temperature.exp() + bias
    return -F.logsigmoid((2 * torch.eye(len(logits)) - 1) * logits).sum() / len(logits)


def test_siglip_kernel_gets_the_logarithm_of_the_scale(install: Install) -> None:
    install("siglip_kernel", fused_siglip_loss=fused_siglip_loss)
    row = row_of(SIGLIP, "siglip-kernel")
    assert (row.status, row.note) == ("ok", "")


def cal_flash_loss(q: Tensor, k: Tensor, labels: Any = None, scale: Any = None, head_dim: int = 256) -> Tensor:
    """One direction, a loss a row."""
    assert q.dtype == k.dtype == torch.float32 and q.shape[1] % head_dim == 0
    return F.cross_entropy(scale * q @ k.T, torch.arange(len(q)), reduction="none")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inf_cl_is_called_for_both_directions(dtype: str, install: Install) -> None:
    install("inf_cl", cal_flash_loss=cal_flash_loss)
    row = row_of(replace(CLIP, dtype=dtype), "inf-cl")
    assert (row.status, row.note) == ("ok", "")


def test_inf_cl_takes_widths_of_256_alone(install: Install) -> None:
    install("inf_cl", cal_flash_loss=cal_flash_loss)
    assert row_of(replace(CLIP, d=640), "inf-cl").status == (
        "failed: ValueError: inf-cl needs D divisible by 256, got 640"
    )


@pytest.mark.parametrize(("case", "peer"), [(CLIP, "memeff"), (SIGLIP, "siglip-kernel"), (CLIP, "inf-cl")])
def test_a_missing_package_is_a_row_that_says_so(case: Case, peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, peer.replace("-", "_"), None)
    row = row_of(case, peer)
    assert row.status.startswith("not installed: ") and peer.replace("-", "_") in row.status
    assert row.total_ms is None


@pytest.mark.parametrize(("case", "peer"), [(SIGLIP, "memeff"), (CLIP, "siglip-kernel"), (SIGLIP, "inf-cl")])
def test_a_peer_computes_its_own_loss_only(case: Case, peer: str) -> None:
    assert row_of(case, peer).status == f"failed: ValueError: {peer} computes one loss, which is not {case.loss}"


def test_a_refusal_by_assertion_is_not_a_wrong_answer(install: Install) -> None:
    """Packages assert that tensors are on a GPU: that is a failure, and no word on what they compute."""

    def refuses(*arguments: Any, **options: Any) -> Tensor:
        raise AssertionError

    install("inf_cl", cal_flash_loss=refuses)
    assert row_of(CLIP, "inf-cl").status == "failed: AssertionError: "


def test_open_clip_trains_under_autocast_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    class Spy(nn.Module):
        def forward(self, *arguments: Any) -> Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return torch.zeros(())

    monkeypatch.setattr("open_clip.loss.ClipLoss", Spy)
    for dtype in ("float32", "bfloat16"):
        case = replace(CLIP, dtype=dtype)
        loss = SUBJECTS["open_clip"].build(case)
        loss(make_inputs(case))
    assert seen == [False, True]


def test_a_graph_needs_a_gpu() -> None:
    with pytest.raises(RuntimeError, match="a CUDA graph needs a GPU; this case is on 'cpu'"):
        SUBJECTS[REPLAYED].build(CLIP)
