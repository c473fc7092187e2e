"""The truth of large batches: known in a sample of rows, and no less sharp there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench import truth, verify
from bench.cases import FLOOR_NMD, Case, Inputs, make_inputs
from bench.peers import SUBJECTS

EVERY_LOSS = [
    Case(similarity, objective, 40, d=24, dtype="bfloat16")  # type: ignore[arg-type]
    for similarity, objective in FLOOR_NMD
]


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(truth.WHOLE_N, "cpu", 10)
    monkeypatch.setitem(truth.BLOCK_ELEMENTS, "cpu", 7 * 40)  # several blocks of rows, and of sampled rows
    monkeypatch.setattr(truth, "SAMPLE", 10)


@pytest.mark.usefixtures("sampled")
@pytest.mark.parametrize("case", EVERY_LOSS, ids=str)
def test_a_sample_is_rows_of_the_whole(case: Case) -> None:
    inputs = make_inputs(case)
    whole = truth.blockwise(inputs, case.objective, torch.float64)
    true = truth.truth(case, inputs)
    assert len(true.exact.gradients) == len(whole.gradients)
    for name, got, want in zip(inputs.named(), true.exact.gradients, whole.gradients, strict=True):
        expected = want[true.sample[name]] if want.ndim else want
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(true.exact.loss, whole.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(true.exact.scale_terms, whole.scale_terms, rtol=1e-12, atol=0)


@pytest.mark.usefixtures("sampled")
def test_a_sample_has_a_row_of_every_range() -> None:
    sample = truth.sample_of(make_inputs(EVERY_LOSS[0]))
    assert set(sample) == {"image", "text"}
    for rows in sample.values():
        assert torch.equal(rows // 4, torch.arange(10))
    assert not torch.equal(sample["image"], sample["text"])


@pytest.mark.usefixtures("sampled")
@pytest.mark.parametrize("what", ["image", "text", "mask", "scale", "loss"])
def test_a_wrong_tile_is_caught_in_the_sample(what: str, reference_loss: Callable[[Case, Inputs], Tensor]) -> None:
    case = Case("masked_cosine", "softmax", 40, d=24, dtype="bfloat16")
    inputs = make_inputs(case)
    true = truth.truth(case, inputs)
    value, gradients = verify.run(lambda x: reference_loss(case, x), inputs)
    verify.check(value, gradients, true, inputs)
    if what == "loss":
        value = value * (1 + 1e-4)
    else:
        gradient = gradients[list(inputs.named()).index(what)]
        assert gradient is not None
        tile = gradient[8:12] if gradient.ndim else gradient
        tile += 0.05 * gradient.abs().max()
    with pytest.raises(AssertionError, match=what):
        verify.check(value, gradients, true, inputs)


@pytest.mark.usefixtures("sampled")
def test_float32_is_known_whole() -> None:
    """Its bounds are made of eager's own error, which a sample does not have."""
    case = replace(EVERY_LOSS[0], dtype="float32")
    true = truth.truth(case, make_inputs(case))
    assert not true.sample and true.note == ""


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("case", EVERY_LOSS, ids=str)
def test_everything_is_made_on_the_inputs_device(case: Case, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, which has shapes but no numbers, whatever was made on the CPU is an error."""
    case = replace(case, device="meta")
    monkeypatch.setitem(truth.WHOLE_N, "meta", 1000 if whole else 10)
    monkeypatch.setitem(truth.BLOCK_ELEMENTS, "meta", 7 * case.n)
    judged: list[torch.device] = []

    def judge(actual: Tensor, eager_error: Tensor, true: Tensor, allowance: Tensor, *, name: str) -> None:
        judged.append(((actual.double() - true) / (eager_error + allowance)).device)

    monkeypatch.setattr(verify, "assert_accurate", judge)
    on_cpu = make_inputs(replace(case, device="cpu"))
    inputs = replace(on_cpu, **{name: x.detach().to("meta").requires_grad_() for name, x in on_cpu.named().items()})
    outcome = verify.run(SUBJECTS["eager"].build(case), inputs)
    true = truth.truth(case, inputs)
    assert bool(true.sample) != whole
    verify.check(*outcome, true, inputs)
    assert judged == [torch.device("meta")] * (1 + len(inputs.named()))
