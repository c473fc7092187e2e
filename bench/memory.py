"""Peak memory of one forward + backward beyond inputs and gradients, in a process of its own.

``python -m bench.memory '<case as JSON>' SUBJECT`` prints the bytes. The baseline is the resident memory with inputs
and gradients allocated and touched; the peak is the kernel's own high-water mark (VmHWM), reset at the baseline.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import torch

from bench.cases import Case, make_inputs
from bench.peers import SUBJECTS
from bench.verify import run

ROOT = Path(__file__).resolve().parent.parent
WARM_N = 64
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class MemoryRefusedError(RuntimeError):
    """The subject was not run, or did not survive; the message is the reason."""


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (at its highest), in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def extra_bytes(case: Case, subject: str) -> int:
    """In this process: what one call takes at its peak beyond inputs and gradients."""
    loss = SUBJECTS[subject].build(case)
    inputs = make_inputs(case)
    # A first call loads code and starts threads. A compiled subject knows one shape only: there it compiles, too.
    run(loss, inputs if subject.endswith("-compiled") else make_inputs(replace(case, n=WARM_N)))
    gradients = [torch.ones_like(leaf) for leaf in inputs.leaves()]
    CLEAR_REFS.write_text("5")
    baseline = resident("VmRSS")
    # The call allocates its own gradients: these make room for them, and return to the system at once.
    del gradients
    run(loss, inputs)
    return resident("VmHWM") - baseline


def available_bytes() -> int:
    return int(psutil.virtual_memory().available)


def predicted_bytes(case: Case, measured: dict[int, int]) -> int | None:
    """What a peer would take by the N×M it holds, from the largest smaller size (N → bytes) that was measured."""
    smaller = [n for n in measured if n <= case.n]
    return measured[max(smaller)] * case.n**2 // max(smaller) ** 2 if smaller else None


def refuse_if_too_large(case: Case, measured: dict[int, int], available: int | None = None) -> None:
    """Raises:
    MemoryRefusedError: the prediction is more than nine tenths of what the machine has free (or is `available`).
    """
    predicted, available = predicted_bytes(case, measured), available_bytes() if available is None else available
    if predicted is not None and predicted > 0.9 * available:
        raise MemoryRefusedError(
            f"not run: by its smaller sizes it takes {predicted / 2**30:.1f} GiB, free are {available / 2**30:.1f} GiB"
        )


def measure(case: Case, subject: str) -> int:
    """`extra_bytes` in a fresh process.

    Raises:
        MemoryRefusedError: the process failed; killed by signal 9 is what running out of memory looks like.
    """
    command = [sys.executable, "-m", "bench.memory", json.dumps(asdict(case)), subject, str(torch.get_num_threads())]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = result.stderr.strip().splitlines()
        reason = "killed: out of memory" if result.returncode == -9 else lines[-1] if lines else "no message"
        raise MemoryRefusedError(f"memory: {reason} (exit status {result.returncode})")
    return int(result.stdout.split()[-1])


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(extra_bytes(Case(**json.loads(sys.argv[1])), sys.argv[2]))
