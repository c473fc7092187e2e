"""Taking turns, cold caches, running out of memory, and what a row says of its subject."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import devices, measure, memory, timing, truth
from bench.cases import Case, Inputs, make_inputs
from bench.devices import Host
from bench.measure import Effort, Session
from bench.peers import OURS, SUBJECTS, LossFn, Replay, Subject
from bench.timing import MIN_ROUNDS

TINY = Case("dot", "softmax", 24, ("eager",), d=16)
HALF = replace(TINY, dtype="bfloat16")
Definition = Callable[[Case, Inputs], Tensor]


class Recorder(Host):
    """Time as on the CPU; all that is asked of the device is written down."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.driver = 0  # how often it gave memory

    def settle(self) -> None:
        self.log.append("settle")

    def mark(self) -> float:
        self.log.append("mark")
        return super().mark()

    def seconds(self, start: float, end: float) -> float:
        self.log.append("seconds")
        return super().seconds(start, end)

    def allocations(self) -> int:
        return self.driver


def session(device: Host, at: Callable[[str], None] = lambda subject: None) -> Session:
    return Session(device, Effort(product=64, seconds=0), lambda text: None, at)


def test_nothing_but_the_call_is_timed(reference_loss: Definition) -> None:
    """Caches are made cold before a call, never within it."""
    device, inputs = Recorder(), make_inputs(TINY)

    def loss(x: Inputs) -> Tensor:
        device.log.append("forward")
        value = reference_loss(TINY, x)
        value.register_hook(lambda gradient: device.log.append("backward"))
        return value

    timing.time_calls(loss, inputs, 2, device)
    call = ["settle", "mark", "forward", "mark", "backward", "mark", "seconds", "seconds"]
    assert device.log == call * 2


def test_a_product_is_timed_alone() -> None:
    device = Recorder()
    rate = timing.product_rate(TINY, 32, device)
    device.log.clear()
    assert rate() > 0
    assert device.log == ["settle", "mark", "mark", "seconds"]


def test_subjects_take_turns(subjects: dict[str, LossFn]) -> None:
    order: list[str] = []
    losses: dict[str, LossFn | Replay] = {name: SUBJECTS[name].build(TINY) for name in (OURS, "eager")}

    def product() -> float:
        order.append("product")
        return 1.0

    samples, rates, failed = timing.interleave(losses, make_inputs(TINY), product, 0.0, Host(), order.append)
    assert order == [OURS, "eager"] + [OURS, "eager", "product"] * MIN_ROUNDS
    assert [len(sample.total) for sample in samples.values()] == [MIN_ROUNDS] * 2
    assert len(rates) == MIN_ROUNDS and not failed


def test_out_of_memory_is_a_row_and_is_cleared_first(subjects: dict[str, LossFn]) -> None:
    """What the failed call held is free before the device is asked to let go of its cache."""
    held: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    def hungry(inputs: Inputs) -> Tensor:
        big = torch.ones(1000)
        held.append(weakref.ref(big))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16 GiB.\nGPU 0 has ...")

    class Device(Recorder):
        def release(self) -> None:
            alive.append(held[-1]() is not None)

    subjects["eager"] = hungry
    own, peer = measure.run_case(TINY, session(Device()))
    assert own.status == "ok" and own.total_ms is not None
    assert peer.status == "out of memory: CUDA out of memory. Tried to allocate 16 GiB."
    assert peer.total_ms is None
    assert alive == [False]


def test_who_fails_on_the_way_leaves_the_others(subjects: dict[str, LossFn], reference_loss: Definition) -> None:
    calls: list[None] = []

    def fails_later(inputs: Inputs) -> Tensor:
        calls.append(None)
        if len(calls) > 3:
            raise torch.OutOfMemoryError("no more")
        return reference_loss(TINY, inputs)

    subjects["eager"] = fails_later
    own, peer = measure.run_case(TINY, session(Recorder()))
    assert own.rounds == MIN_ROUNDS and own.status == "ok"
    assert peer.status == "out of memory: no more" and peer.total_ms is None and peer.times_ours is None


def test_a_broken_device_ends_the_process(subjects: dict[str, LossFn]) -> None:
    class Device(Recorder):
        def check(self) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def fails(inputs: Inputs) -> Tensor:
        raise ValueError("something")

    subjects["eager"] = fails
    with pytest.raises(RuntimeError, match="illegal memory access"):
        measure.run_case(TINY, session(Device()))


def test_a_call_that_got_memory_from_the_driver_is_timed_again(subjects: dict[str, LossFn]) -> None:
    device, taken = Recorder(), iter([9.0, 1.0, *[1.0] * 20])

    def timed(loss: Any, inputs: Inputs, calls: int, device: Recorder) -> tuple[float, float]:
        seconds = next(taken)
        device.driver += seconds == 9.0
        return 0.0, seconds

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "time_calls", timed)
        losses: dict[str, LossFn | Replay] = {OURS: lambda inputs: inputs.scale}
        inputs = replace(make_inputs(TINY), image=torch.empty(5000, 1))
        samples, *_ = timing.interleave(losses, inputs, lambda: 1.0, 0.0, device, lambda subject: None)
    assert samples[OURS].total == [1.0] * MIN_ROUNDS


def test_less_accurate_than_due_is_timed_and_says_so(subjects: dict[str, LossFn], reference_loss: Definition) -> None:
    exact = truth.truth(TINY, make_inputs(TINY)).exact
    allowed = 1e-6 * float(exact.loss + exact.row_logit.mean())
    subjects[OURS] = lambda inputs: reference_loss(TINY, inputs) + 4 * allowed
    own, _ = measure.run_case(TINY, session(Host()))
    assert own.status.startswith("inaccurate: loss") and own.total_ms is not None


def test_peers_of_half_precision_may_round_their_scores(subjects: dict[str, LossFn]) -> None:
    def rounds(inputs: Inputs) -> Tensor:
        logits = (inputs.scale * (inputs.image @ inputs.text.T)).bfloat16().float()
        labels = torch.arange(len(logits))
        cross_entropy = torch.nn.functional.cross_entropy
        return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2

    subjects["eager"] = rounds
    _, peer = measure.run_case(HALF, session(Host()))
    assert (peer.status, peer.note) == ("ok", "as accurate as with scores rounded to bfloat16")
    subjects["eager"] = lambda inputs: 1.2 * rounds(inputs)
    _, peer = measure.run_case(HALF, session(Host()))
    assert peer.status.startswith("not timed, differs from the truth: loss")


@pytest.mark.parametrize("declared", [True, False])
def test_a_missing_gradient_has_to_be_declared(
    declared: bool, reference_loss: Definition, monkeypatch: pytest.MonkeyPatch, subjects: dict[str, LossFn]
) -> None:
    def loss(inputs: Inputs) -> Tensor:
        return reference_loss(TINY, replace(inputs, scale=inputs.scale.detach()))

    lacks = ("scale",) if declared else ()
    monkeypatch.setitem(SUBJECTS, "eager", Subject("eager", "for a test", lambda case: loss, lacks))
    _, peer = measure.run_case(TINY, session(Host()))
    if declared:
        assert (peer.status, peer.note) == ("ok", "no gradient of scale") and peer.total_ms is not None
    else:
        assert peer.status == "not timed, differs from the truth: grad_scale: there is none"


def test_a_replay_has_no_forward_pass_of_its_own(subjects: dict[str, LossFn], reference_loss: Definition) -> None:
    class Stub(Replay):
        def __call__(self, inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
            value = reference_loss(TINY, inputs)
            return value.detach(), list(torch.autograd.grad(value, inputs.leaves()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SUBJECTS, "eager", Subject("eager", "for a test", lambda case: Stub(lambda inputs: inputs.scale)))
        _, replayed = measure.run_case(TINY, session(Recorder()))
    assert replayed.status == "ok" and replayed.forward_ms is None and replayed.total_ms is not None


@pytest.mark.parametrize("linear", [False, True])
def test_memory_measured_in_the_process_predicts_larger_sizes(
    linear: bool, subjects: dict[str, LossFn], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Device(Recorder):
        def extra_bytes(self, step: Any) -> int:
            step()
            return 2**20

        def free_bytes(self) -> int:
            return 3 * 2**20

    monkeypatch.setitem(SUBJECTS, "eager", replace(SUBJECTS["eager"], linear=linear))
    one = session(Device())
    own, peer = measure.run_case(TINY, one)
    assert own.extra_mib == peer.extra_mib == 1.0
    own, peer = measure.run_case(replace(TINY, n=2 * TINY.n), one)  # N×M is four times as large
    assert own.status == "ok" and own.extra_mib == 1.0
    if linear:
        assert (peer.status, peer.extra_mib) == ("ok", 1.0)
    else:
        assert peer.status.startswith("not run: by its smaller sizes it takes 0.0 GiB")
        assert (peer.extra_mib, peer.predicted_mib) == (None, 4.0)


def test_memory_that_could_not_be_measured_stays_said(
    subjects: dict[str, LossFn], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(case: Case, subject: str) -> int:
        raise memory.MemoryRefusedError("memory: killed: out of memory (exit status -9)")

    monkeypatch.setattr(memory, "measure", fails)
    own, _ = measure.run_case(replace(TINY, memory=True), session(Host()))
    assert own.status.startswith("memory: killed") and own.total_ms is not None


@pytest.mark.parametrize("linear", [False, True])
def test_a_large_size_without_a_smaller_one_is_probed(
    linear: bool, subjects: dict[str, LossFn], monkeypatch: pytest.MonkeyPatch, reference_loss: Definition
) -> None:
    class Device(Recorder):
        type = "another"

        def extra_bytes(self, step: Any) -> int:
            value, _ = step()
            return int(float(value) > 0) * 2**20

        def free_bytes(self) -> int:
            return 3 * 2**20

    sizes: list[int] = []

    def loss(inputs: Inputs) -> Tensor:
        sizes.append(len(inputs.image))
        return reference_loss(TINY, inputs)

    subject = Subject("eager", "for a test", lambda case: loss, linear=linear)
    monkeypatch.setitem(SUBJECTS, "eager", subject)
    monkeypatch.setattr(measure, "PROBE_N", 12)
    _, peer = measure.run_case(TINY, session(Device()))
    if linear:  # N² would predict too much
        assert peer.status == "ok" and 12 not in sizes
    else:
        assert peer.predicted_mib == 4.0 and peer.status.startswith("not run") and set(sizes) == {12}


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """`devices.Cuda` on a torch.cuda that is not there: what it does is written down."""
    log: list[str] = []

    class Event:
        count = 0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")
            Event.count += 1
            self.at = Event.count

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: Event) -> float:
            assert log[-1] == "wait"
            return 250.0 * (end.at - self.at)

    fakes = {
        "current_device": lambda: 0,
        "get_device_properties": lambda index: SimpleNamespace(L2_cache_size=50 * 2**20),
        "synchronize": lambda: log.append("synchronize"),
        "Event": Event,
        "reset_peak_memory_stats": lambda: log.append("reset"),
        "memory_allocated": lambda: 1000,
        "max_memory_allocated": lambda: 2**20,
        "memory_reserved": lambda: 3000,
        "mem_get_info": lambda: (2**40, 2**41),
        "memory_stats": lambda: {"num_device_alloc": 7},
        "empty_cache": lambda: log.append("empty"),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(devices.Cuda, "type", "cpu")
    return SimpleNamespace(device=devices.Cuda(), log=log)


def test_the_cache_is_overwritten_and_the_device_idle_before_a_call(cuda: SimpleNamespace) -> None:
    buffer = cuda.device._cold
    assert buffer.nbytes >= 2 * 50 * 2**20
    buffer.zero_()
    cuda.device.settle()
    assert buffer.min() == 1  # all of it was written
    assert cuda.log == ["synchronize"]


def test_time_is_of_events(cuda: SimpleNamespace, reference_loss: Definition) -> None:
    forward, total = timing.time_calls(lambda x: reference_loss(TINY, x), make_inputs(TINY), 2, cuda.device)
    assert (forward, total) == (0.25, 0.5)
    assert cuda.log[:4] == ["synchronize", "record", "record", "record"]


def test_extra_memory_is_beyond_loss_and_gradients(cuda: SimpleNamespace) -> None:
    def step() -> tuple[Tensor, list[Tensor | None]]:
        assert cuda.log[-1] == "reset"
        return torch.ones(()), [torch.ones(100), None]

    assert cuda.device.extra_bytes(step) == 2**20 - 1000 - 4 - 400
    assert cuda.device.free_bytes() == 2**40 + 3000 - 1000


def test_a_case_on_such_a_device(cuda: SimpleNamespace, subjects: dict[str, LossFn]) -> None:
    def fails(inputs: Inputs) -> Tensor:
        raise torch.OutOfMemoryError("no")

    own, peer = measure.run_case(TINY, session(cuda.device))
    assert own.status == peer.status == "ok" and own.times_ours and peer.times_ours
    assert own.total_ms and own.total_ms.median == 500.0  # two spans between events
    assert own.extra_mib == pytest.approx((2**20 - 1000 - 4 * (2 * 24 * 16 + 2)) / 2**20)
    subjects["eager"] = fails
    cuda.log.clear()
    own, peer = measure.run_case(TINY, session(cuda.device))
    assert own.status == "ok" and peer.status == "out of memory: no"
    assert cuda.log[cuda.log.index("empty") + 1] == "synchronize"  # is the device alive?
