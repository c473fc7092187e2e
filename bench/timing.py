"""How long losses take, ours and theirs in turns; what one fails of is its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

import torch

from bench import memory
from bench.cases import Case, Inputs
from bench.devices import Device
from bench.peers import LossFn, Replay

ROUND_SECONDS = 0.02
"""A subject is called for about this long in every round: one call of a small batch is too short to time."""
MIN_ROUNDS, MAX_ROUNDS = 3, 20


class DiffersError(Exception):
    """A subject computes something else than the loss."""


@dataclass
class Samples:
    """Seconds per call, one entry a round."""

    forward: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)


def time_calls(loss: LossFn | Replay, inputs: Inputs, calls: int, device: Device) -> tuple[float, float]:
    """Seconds per call of the forward pass (0: it has none of its own), and of forward + backward."""
    leaves, forward, total = inputs.leaves(), 0.0, 0.0
    for _ in range(calls):
        device.settle()
        start = device.mark()
        if isinstance(loss, Replay):
            loss(inputs)
            middle, end = start, device.mark()
        else:
            value = loss(inputs)
            middle = device.mark()
            gradients = torch.autograd.grad(value, leaves, allow_unused=True)
            end = device.mark()
            del value, gradients  # freed outside the timed span, and before the next subject needs the memory
        total += device.seconds(start, end)
        forward += device.seconds(start, middle)
    return forward / calls, total / calls


def product_rate(case: Case, size: int, device: Device) -> Callable[[], float]:
    """A function that times the platform's own large matrix product: operations per second."""
    a, b = (torch.randn(size, size, device=case.device).to(case.torch_dtype) for _ in range(2))

    def rate(count: int) -> float:
        device.settle()
        start = device.mark()
        for _ in range(count):
            a @ b
        return 2 * size**3 * count / device.seconds(start, device.mark())

    rate(1)
    # So many that they last for a while, as the losses do: a GPU's clock goes down under load.
    return partial(rate, max(1, int(ROUND_SECONDS * rate(1) / (2 * size**3))))


def interleave(
    losses: dict[str, LossFn | Replay],
    inputs: Inputs,
    product: Callable[[], float],
    seconds: float,
    device: Device,
    at: Callable[[str], None],
) -> tuple[dict[str, Samples], list[float], dict[str, str]]:
    """A B C product, A B C product, …: whatever the machine does meanwhile, it does to all.

    Args:
        seconds: it goes on for more than MIN_ROUNDS while these last, up to MAX_ROUNDS.
        at: is told who comes next.

    Returns:
        Samples, the product's rates, and why those left who failed on the way.
    """
    failed: dict[str, str] = {}
    calls = dict.fromkeys(losses, 1)
    samples: dict[str, Samples] = {name: Samples() for name in losses}

    def time(name: str) -> tuple[float, float]:
        at(name)
        before = device.allocations()
        taken = time_calls(losses[name], inputs, calls[name], device)
        # Memory that another subject's cache had taken came back within the timed span: once more, now that it is here.
        return taken if device.allocations() == before else time_calls(losses[name], inputs, calls[name], device)

    def count_calls(name: str) -> None:
        calls[name] = max(1, int(ROUND_SECONDS / time(name)[1]))

    def sample(name: str) -> None:
        forward, total = time(name)
        samples[name].forward.append(forward)
        samples[name].total.append(total)

    def each(what: Callable[[str], None]) -> None:
        for name in losses:
            if name not in failed and (reason := attempt(what, name, device)):
                failed[name] = reason

    if len(inputs.image) <= 4096 or inputs.image.is_cuda:
        each(count_calls)
    rates: list[float] = []
    start = perf_counter()
    while len(rates) < MIN_ROUNDS or (len(rates) < MAX_ROUNDS and perf_counter() - start < seconds):
        each(sample)
        rates.append(product())
    return {name: samples[name] for name in losses if name not in failed}, rates, failed


def attempt(what: Callable[[str], None], name: str, device: Device) -> str:
    """Do it; returns "", or why it failed: whatever a peer fails of is its result.

    Raises:
        RuntimeError: every later call in this process would fail, too.
    """
    try:
        what(name)
    except Exception as error:
        reason = why_not(error)
    else:
        return ""
    # Not in the handler: the exception holds what the call had allocated.
    device.release()
    device.check()
    return reason


def why_not(error: Exception) -> str:
    """In a row's status: why a subject was not timed."""
    message = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, memory.MemoryRefusedError):
        return message
    if isinstance(error, ImportError):
        return f"not installed: {message}"
    if isinstance(error, DiffersError):
        return f"not timed, differs from the truth: {message}"
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: {message}"
    return f"failed: {type(error).__name__}: {message}"
