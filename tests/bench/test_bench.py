"""The benchmark's own parts: it counts, verifies, measures and reports what it says it does."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import __main__ as command
from bench import measure, memory, readme, report, timing, truth, verify
from bench.cases import CPU_BARS, FLOOR_NMD, Bar, Case, Inputs, cpu_cases, make_inputs, memory_bar
from bench.devices import Device
from bench.measure import Effort
from bench.peers import OURS, SUBJECTS, LossFn, Subject
from bench.rows import Figure, Row

TINY = Case("dot", "softmax", 24, ("eager",), d=16)
EVERY_LOSS = [Case(similarity, objective, 40, d=24) for similarity, objective in FLOOR_NMD]  # type: ignore[arg-type]
SECONDS = Effort(product=64, seconds=0)
Definition = Callable[[Case, Inputs], Tensor]


@pytest.mark.parametrize("case", EVERY_LOSS, ids=str)
def test_blockwise_is_the_definition(case: Case, reference_loss: Definition, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(truth.BLOCK_ELEMENTS, "cpu", 7 * case.n)  # 5 whole blocks and a ragged one
    inputs = make_inputs(case)
    answer = truth.blockwise(inputs, case.objective, torch.float64)
    exact = replace(inputs, **{k: v.detach().double().requires_grad_() for k, v in inputs.named().items()})
    loss = reference_loss(case, exact)
    torch.testing.assert_close(answer.loss, loss.detach(), rtol=1e-12, atol=0)
    for got, want in zip(answer.gradients, torch.autograd.grad(loss, exact.leaves()), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("name", ["eager", "literal", "open_clip"])
@pytest.mark.parametrize("case", EVERY_LOSS, ids=str)
def test_peers_compute_the_loss(case: Case, name: str) -> None:
    inputs = make_inputs(case)
    if (name == "literal") != (case.similarity == "masked_cosine") and name != "eager":
        with pytest.raises(ValueError, match="mask"):
            SUBJECTS[name].build(case)(inputs)
        return
    measure.prepare(case, name, inputs, truth.truth(case, inputs))


@pytest.mark.parametrize("what", ["loss", "image", "text", "scale"])
def test_wrong_answers_are_caught(what: str, reference_loss: Definition) -> None:
    inputs = make_inputs(TINY)
    true = truth.truth(TINY, inputs)
    value, gradients = verify.run(lambda x: reference_loss(TINY, x), inputs)
    verify.check(value, gradients, true, inputs)
    if what == "loss":
        value = value * (1 + 1e-4)
    else:
        gradient = gradients[list(inputs.named()).index(what)]
        assert gradient is not None
        gradient.view(-1)[-1] += 0.01 * gradient.abs().max()  # one element of one row
    with pytest.raises(AssertionError, match=what):
        verify.check(value, gradients, true, inputs)


def test_a_failing_peer_is_a_row_that_says_so(subjects: dict[str, LossFn]) -> None:
    def fails(inputs: Inputs) -> Tensor:
        raise MemoryError("no room\nat all")

    subjects["eager"] = fails
    own, peer = measure.run_cases([TINY], print, SECONDS)
    assert own.status == "ok"
    assert own.total_ms is not None
    assert peer.status == "failed: MemoryError: no room"
    assert peer.total_ms is None


def test_a_wrong_peer_is_not_timed(subjects: dict[str, LossFn], reference_loss: Definition) -> None:
    subjects["eager"] = lambda inputs: 1.01 * reference_loss(TINY, inputs)
    _, peer = measure.run_cases([TINY], print, SECONDS)
    assert peer.status.startswith("not timed, differs from the truth: loss")
    assert peer.total_ms is None


def test_ratios_are_of_the_same_round(subjects: dict[str, LossFn], monkeypatch: pytest.MonkeyPatch) -> None:
    # The machine slows down by the round; the peer takes three times as long throughout.
    times = {
        OURS: iter([0.1] + [float(t) for t in range(1, 99)]),
        "eager": iter([0.1] + [3.0 * t for t in range(1, 99)]),
    }
    order: list[str] = []

    def timed(loss: LossFn, inputs: Inputs, calls: int, device: Device) -> tuple[float, float]:
        name = (OURS, "eager")[len(order) % 2]
        order.append(name)
        return 0.0, next(times[name])

    monkeypatch.setattr(timing, "time_calls", timed)
    own, peer = measure.run_cases([TINY], print, SECONDS)
    assert own.rounds == timing.MIN_ROUNDS
    assert own.total_ms == Figure(2000.0, 1500.0, 2500.0)
    assert peer.times_ours == Figure(3.0, 3.0, 3.0)


def test_floors_count_products() -> None:
    # A product is 2NMD. Forward: one (two with masks); backward: each product's scores again, and two gradients.
    assert FLOOR_NMD["dot", "softmax"] == 2 * (1 + 3)
    assert FLOOR_NMD["masked_cosine", "softmax"] == 2 * (2 + 6)
    assert FLOOR_NMD["dot", "sigmoid"] == FLOOR_NMD["dot", "softmax"] - 2  # one sweep
    assert FLOOR_NMD["masked_cosine", "sigmoid"] == FLOOR_NMD["masked_cosine", "softmax"] - 4
    assert Case("dot", "softmax", 100, d=10).floor_operations == 8 * 100 * 100 * 10


def test_every_bar_has_a_case() -> None:
    cases = {(case.loss, case.n): case for case in cpu_cases()}
    for bar in CPU_BARS:
        case = cases[bar.loss, bar.n]
        if bar.what == "memory":
            assert case.memory
        else:
            assert case.timed
            assert bar.what in ("floor", *case.peers)
    assert memory_bar(32768) == 64 + 4 + 32


class Wasteful(torch.autograd.Function):
    """Holds 96 MiB beside its gradients."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(image, text)
        return (image[0] * text[0]).sum() * scale

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gradients = [torch.ones_like(saved) for saved in ctx.saved_tensors]
        held = torch.ones(96 * 2**18)
        return gradients[0], gradients[1], held[0] * grad_outputs[0]


@pytest.mark.skipif(not memory.CLEAR_REFS.exists(), reason="the high-water mark can be reset on Linux only")
def test_memory_is_what_comes_on_top_of_inputs_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def wasteful(inputs: Inputs) -> Tensor:
        return Wasteful.apply(inputs.image, inputs.text, inputs.scale)

    monkeypatch.setitem(SUBJECTS, "eager", Subject("eager", "for a test", lambda case: wasteful))
    case = Case("dot", "softmax", 2**15, d=512)  # inputs and gradients: 4 × 64 MiB
    assert 95 < memory.extra_bytes(case, "eager") / 2**20 < 105


def test_memory_in_a_fresh_process_and_its_failures() -> None:
    case = Case("dot", "softmax", 1024, d=16)
    matrix = 4 * case.n**2
    assert 3 * matrix < memory.measure(case, "eager") < 12 * matrix
    with pytest.raises(memory.MemoryRefusedError, match="ValueError: open_clip has no loss with masks"):
        memory.measure(Case("masked_cosine", "softmax", 8, d=8), "open_clip")


def test_too_large_a_peer_is_refused_by_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 2**30)
    case = Case("dot", "softmax", 8192)
    memory.refuse_if_too_large(case, {})
    memory.refuse_if_too_large(case, {2048: 2**30 // 20})
    with pytest.raises(memory.MemoryRefusedError, match=r"takes 1\.0 GiB.*free are 1\.0 GiB"):
        memory.refuse_if_too_large(case, {1024: 1, 2048: 2**30 // 16})


def test_verdicts() -> None:
    own, peer = Row.of(Case("dot", "softmax", 8), OURS), Row.of(Case("dot", "softmax", 8), "eager")
    own.floor_percent, own.extra_mib, peer.times_ours = Figure(81, 80, 82), 97.0, Figure(1.9, 1, 2)
    bars = [Bar("clip", 8, "floor", 0.8), Bar("clip", 8, "eager", 2.0), Bar("clip", 8, "memory", 100.0)]
    bars += [Bar("clip", 8, "open_clip", 1.0), Bar("siglip", 8, "floor", 1.0)]
    verdicts = report.judge(bars, [own, peer])
    assert [verdict.met for verdict in verdicts] == [True, False, True, None]
    assert str(verdicts[1]) == "clip N=8: 1.90 × as fast as eager, bar: at least 2.00: MISSED"


def test_quick_run_end_to_end(tmp_path: Path, subjects: dict[str, LossFn], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--quick", "--only", "siglip", "--out", str(tmp_path)]) == 0
    assert "siglip" in capsys.readouterr().out
    (directory,) = tmp_path.iterdir()
    assert {path.name for path in directory.iterdir()} == {"results.csv", "results.json", "time.png", "memory.png"}
    document = json.loads((directory / "results.json").read_text())
    assert document["environment"]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert [row["status"] for row in document["rows"]] == ["ok"] * len(document["rows"])
    with (directory / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["subject"] for line in lines] == [row["subject"] for row in document["rows"]]
    assert float(lines[1]["total_ms_median"]) == document["rows"][1]["total_ms"]["median"] > 0

    page = tmp_path / "README.md"
    page.write_text("before <!-- bench:begin -->old<!-- bench:end --> after")
    for _ in range(2):  # the markers survive
        assert command.main(["readme", str(directory / "results.json"), "--readme", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before <!-- bench:begin -->\nMeasured on ")
    assert text.endswith("\n<!-- bench:end --> after")
    assert "old" not in text
    assert "|siglip|96|eager|" in text


def test_our_failure_fails_the_run(tmp_path: Path, subjects: dict[str, LossFn], reference_loss: Definition) -> None:
    subjects[OURS] = lambda inputs: 1.01 * reference_loss(TINY, inputs)
    assert command.main(["--quick", "--only", "siglip", "--out", str(tmp_path)]) == 1


def test_a_readme_without_markers_is_refused(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    report.write_json(results, [], [], report.environment())
    (tmp_path / "README.md").write_text("<!-- bench:end --><!-- bench:begin -->")
    with pytest.raises(ValueError, match="needs the markers"):
        readme.update(tmp_path / "README.md", results)
