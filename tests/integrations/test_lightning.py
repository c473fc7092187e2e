"""The Lightning module of the examples in two processes: losses and steps are those of one with the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]

# A file, since Lightning's ddp runs the script itself once more for the second process.
SCRIPT = """
import runpy
import sys
from datetime import timedelta

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy

Clip = runpy.run_path(sys.argv[1])["Clip"]

class Plain(Clip):
    def configure_optimizers(self):  # a step that is the gradient: Adam's has no size
        return torch.optim.SGD(self.parameters(), lr=0.1)

quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
found = []
for chunk in (None, 5):
    torch.manual_seed(0)
    module, devices = Plain(chunk), int(sys.argv[2])
    ddp = DDPStrategy(timeout=timedelta(seconds=60))  # "ddp", but a process whose peer is gone ends
    trainer = lightning.Trainer("cpu", ddp if devices > 1 else "auto", devices, max_steps=3, **quiet)
    trainer.fit(module)
    found.append((module.losses, module.state_dict()))
if trainer.is_global_zero:
    torch.save(found, sys.argv[3])
"""


def test_two_processes_are_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    found = [trained(script, devices, tmp_path / f"{devices}.pt") for devices in (1, 2)]
    (plain, cached), (plain_of_two, cached_of_two) = found
    for other in (cached, plain_of_two, cached_of_two):
        torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-6)
    assert len(plain[0]) == 3
    assert plain[0][2] < plain[0][0] - 1e-3


def trained(script: Path, devices: int, to: Path) -> list[tuple[list[float], dict[str, torch.Tensor]]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(ROOT / "examples" / "train_lightning.py"), str(devices), str(to)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[tuple[list[float], dict[str, torch.Tensor]]] = torch.load(to)
    return found
