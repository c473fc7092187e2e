"""The compiled module under AddressSanitizer and UBSan, on every instruction set of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SANITIZERS = "address,undefined"
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"

# Ragged sizes; a workspace that cuts the scores into many tiles and one that holds them all.
EXERCISE = """
import sys
import torch
import smartclip_kernels as sk
from smartclip_kernels import _C

assert _C.build["sanitize"] == sys.argv[1], _C.build
assert _C.__file__.startswith(sys.argv[2]), _C.__file__
torch.manual_seed(0)
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    for n, m, d in ((1, 1, 8), (7, 5, 9), (127, 129, 16), (40, 300, 24)):
        image, text, mask = (torch.randn(rows, d, dtype=dtype, requires_grad=True) for rows in (n, m, m))
        scale, bias = (torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in (3.0, -1.0))
        ids = dict(image_ids=torch.randint(0, 5, (n,)), text_ids=torch.randint(0, 5, (m,)))
        ids["ignore_ids"] = (torch.randint(0, 3, (n,)), torch.randint(0, 3, (m,)))
        for workspace in (0.05, 64):
            sk.set_workspace(workspace)
            options = dict(backend="cpu", **ids)
            sk.clip_loss(image, text, scale, bias, label_smoothing=0.1, **options).backward()
            sk.siglip_loss(image, text, scale, bias, **options).backward()
            for loss in (sk.clip_loss, sk.siglip_loss):
                loss(image, text, scale, bias, dims=(3, d - 1), **options).backward()
            for objective in ("softmax", "sigmoid"):
                sk.smartclip_loss(image, text, mask, scale, bias, objective=objective, **options).backward()
            sk.masked_similarity(image, text, mask, backend="cpu").sum().backward()
            del ids["ignore_ids"]
            with torch.no_grad():
                for per in ("text", "image"):
                    sk.masked_topk(image, text, mask, 5, per=per, backend="cpu")
                    sk.retrieval_ranks(image, text, mask, per=per, backend="cpu", **ids)
            ids["ignore_ids"] = options["ignore_ids"]
print("clean on", _C.isa())
"""


def library(name: str) -> str | None:
    """Path of a runtime library of the compiler, None where it has none."""
    compiler = shutil.which("c++")
    if compiler is None:
        return None
    found = subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return found if Path(found).is_absolute() else None


# The libraries have to be mapped before Python's own allocations; libstdc++ so that exceptions are seen.
PRELOAD = [library("libasan.so"), library("libstdc++.so")]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with a sanitized module, unpacked."""
    target = tmp_path_factory.mktemp("sanitized")
    source = target / "source"
    for name in ("bindings", "csrc", "smartclip_kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("CMakeLists.txt", "LICENSE", "NOTICE", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, source)
    arguments = f"-DSMARTCLIP_SANITIZE={SANITIZERS} -DSMARTCLIP_DEV=ON -DSMARTCLIP_CUDA=0"
    environment = {**os.environ, "CMAKE_ARGS": arguments}
    command = [sys.executable, "-c", BUILD, str(target)]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = target.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(target / "installed")
    return target / "installed"


def run(code: str, installed: Path, *arguments: str, isa: str = "portable") -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(installed),
        "LD_PRELOAD": " ".join(path for path in PRELOAD if path),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch leave much behind at exit
        "SMARTCLIP_CPU_ISA": isa,
    }
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=installed, env=environment, capture_output=True, text=True, check=False)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(None in PRELOAD, reason="needs GCC with its sanitizers"),
]


def test_every_operation_is_clean(installed: Path) -> None:
    listed = run("from smartclip_kernels import _C; print(*_C.isas())", installed)
    assert listed.returncode == 0, listed.stderr
    isas = listed.stdout.split()
    assert "portable" in isas
    for isa in isas:
        done = run(EXERCISE, installed, SANITIZERS, str(installed), isa=isa)
        assert done.returncode == 0, f"{isa}: {done.stderr[-8000:]}"
        assert f"clean on {isa}" in done.stdout


OVERRUN = """
import torch
from smartclip_kernels import _C

vectors = {name: torch.ones(9) for name in ("statistics", "loss", "weight", "anchor")}
ids = torch.arange(9, dtype=torch.int32)
side = {"size": 9, "id": ids.data_ptr(), **{name: x.data_ptr() for name, x in vectors.items()}}
scale = torch.ones(1)
launch = _C.LaunchFloat32(
    similarity="dot", objective="sigmoid", row=side, column=side, scale=scale.data_ptr(), threads=1
)
scores = torch.ones(8 * 9)  # a row short
launch.statistics((0, 9, 0, 9), [scores.data_ptr()], 9)
"""


def test_an_overrun_is_found(installed: Path) -> None:
    """That the run above is clean says something: one row too many is reported."""
    done = run(OVERRUN, installed)
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr
