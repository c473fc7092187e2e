"""Which backends there are, which one runs, and how much workspace it may take."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from smartclip_kernels.problem import Backend

NAMES = ("cpu", "cuda", "triton", "reference")

DEFAULT_WORKSPACE_MB = {"cpu": 64, "cuda": 256}

_SLOW = (
    "smartclip_kernels: no fused backend runs on device type {device!r} here, so the reference does, with N×M matrices "
    "in memory. `python -m smartclip_kernels.info` says what is missing; backend='reference' asks for it in silence"
)

_from_environment = os.environ.get("SMARTCLIP_BACKEND", "")
_chosen: ContextVar[str] = ContextVar("smartclip_backend", default=_from_environment)
_workspace_mb: dict[str, float] = {}


@cache
def load(name: str) -> Backend:
    """The backend of that name, whether or not it is available."""
    backend: Backend = import_module(f"smartclip_kernels.backends.{name}").BACKEND
    return backend


def status() -> dict[str, str]:
    """Backend name → why it cannot run here and what would help, or "" where it can."""
    return {name: load(name).unavailable() for name in NAMES}


def available_backends() -> list[str]:
    """Names of the backends that can run here, the preferred one first."""
    return [name for name, reason in status().items() if not reason]


def default(device_type: str) -> str:
    """The backend that runs for tensors on such a device when nobody named one."""
    for name in NAMES:
        backend = load(name)
        if backend.runs_on(device_type) and not backend.unavailable():
            return name
    raise RuntimeError(f"backend: none runs on device type {device_type!r} here")


def resolve(name: str, device: torch.device) -> Backend:
    """The backend to run: `name`, else what `use_backend` or SMARTCLIP_BACKEND says, else the device's default.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: it cannot run here, or not on this device.
    """
    name = name or _chosen.get()
    if not name:
        backend = load(default(device.type))
        if backend.name == "reference":
            warnings.warn(_SLOW.format(device=device.type), RuntimeWarning, stacklevel=2)
        return backend
    check_name(name)
    backend = load(name)
    if reason := backend.unavailable():
        raise RuntimeError(f"backend: {name!r} is not available: {reason}")
    if not backend.runs_on(device.type):
        raise RuntimeError(f"backend: {name!r} does not run on {device}; move the tensors or name another backend")
    return backend


def check_name(name: object, argument: str = "backend") -> None:
    if name not in NAMES:
        raise ValueError(f"{argument}: got {name!r}, needs one of {', '.join(map(repr, NAMES))}")


if _from_environment:
    check_name(_from_environment, "SMARTCLIP_BACKEND")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, operations that name no backend run on this one. Seen by this thread and context only.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: it cannot run here.
    """
    check_name(name)
    if reason := load(name).unavailable():
        raise RuntimeError(f"backend: {name!r} is not available: {reason}")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def set_workspace(megabytes: float | None) -> None:
    """How much memory (MiB) one call may use beyond its inputs, outputs and O(N + M) statistics; None: the default.

    More may buy speed (scores are kept for the backward pass where they fit), never correctness. The default is 64 MiB
    on a CPU and 256 MiB on a GPU, or SMARTCLIP_WORKSPACE_MB. Whole process; read once a call, in the forward pass.

    Raises:
        ValueError: not a positive number.
    """
    if megabytes is None:
        _workspace_mb.clear()
        return
    if not isinstance(megabytes, (int, float)) or isinstance(megabytes, bool) or not megabytes > 0:
        raise ValueError(f"megabytes: got {megabytes!r}, needs a positive number of MiB")
    _workspace_mb.update(dict.fromkeys(DEFAULT_WORKSPACE_MB, float(megabytes)))


def workspace_bytes(device: torch.device) -> int:
    """What one call may use now on this device, in bytes."""
    megabytes = _workspace_mb.get(device.type, DEFAULT_WORKSPACE_MB.get(device.type, DEFAULT_WORKSPACE_MB["cpu"]))
    return int(megabytes * 2**20)


def _read_environment() -> None:
    value = os.environ.get("SMARTCLIP_WORKSPACE_MB")
    if not value:
        return
    try:
        set_workspace(float(value))
    except ValueError:
        raise ValueError(f"SMARTCLIP_WORKSPACE_MB: got {value!r}, needs a positive number of MiB") from None


_read_environment()
