"""bench/gpu.sh: what it does when a step fails, hangs or lacks something. Programs are stand-ins that note calls."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "gpu.sh"
STEPS = ["versions", "peers", "build", "tests", "memcheck", "racecheck", "bench"]
pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("bash", "timeout"))), reason="needs bash and timeout, as the script does"
)

# Behaves as $BEHAVIOUR says for a command line that contains its first word: "WORDS=code" or "WORDS=hang".
STAND_IN = r"""#!/bin/bash
line="${0##*/} $*"
printf '%s\n' "$line" | head -1 >>"$CALLS"
[[ $line == *get_device_capability* ]] && echo '90-real;90a-real'
[[ $line == *gpu_backends* ]] && echo cuda triton
[[ $line == *"bench gpu"* ]] && echo "archs: $PLAN ${CUDA_ARCHS-none}"
while IFS='=' read -r words what; do
  [[ -n $words && $line == *"$words"* ]] || continue
  [[ $what != hang ]] || exec sleep 60
  echo "stand-in fails: $words"
  exit "$what"
done <<<"$BEHAVIOUR"
exit 0
"""
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def machine(tmp_path: Path) -> Run:
    """The script on a machine of stand-ins: a copy of the tree's bare bones, OUT in tmp_path/out."""
    tree, programs = tmp_path / "tree", tmp_path / "programs"
    for folder in (tree / "bench", tree / "tests", programs):
        folder.mkdir(parents=True)
    shutil.copy(SCRIPT, tree / "bench" / "gpu.sh")
    (tree / "tests" / "test_device.py").write_text("pytestmark = [pytest.mark.gpu]\n")
    for name in ("python3", "nvidia-smi", "nvcc", "compute-sanitizer", "cmake"):
        program = programs / name
        program.write_text(STAND_IN)
        program.chmod(0o755)

    def run(*options: str, behaviour: str = "", without: str = "") -> subprocess.CompletedProcess[str]:
        for name in without.split():
            (programs / name).unlink()
        environment = {
            "PATH": f"{programs}:/usr/bin:/bin",
            "CALLS": str(tmp_path / "calls"),
            "BEHAVIOUR": behaviour,
            "HOME": str(tmp_path),
        }
        command = ["bash", str(tree / "bench" / "gpu.sh"), str(tmp_path / "out"), *options]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    return run


def table(tmp_path: Path) -> dict[str, str]:
    """Step → status, of OUT/table.txt."""
    lines = (tmp_path / "out" / "table.txt").read_text().splitlines()
    assert lines[0].split() == ["step", "status", "seconds"]
    return {line.split()[0]: " ".join(line.split()[1:-1]) for line in lines[1:]}


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "calls").read_text().splitlines()


def test_the_script_parses() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    assert os.access(SCRIPT, os.X_OK)


def test_a_machine_without_a_gpu_is_told_what_is_missing(tmp_path: Path, machine: Run) -> None:
    result = machine(without="nvidia-smi", behaviour="device='cuda'=1")
    assert result.returncode == 2
    missing = [line for line in result.stdout.splitlines() if line.startswith("gpu.sh: missing: ")]
    assert [line.removeprefix("gpu.sh: missing: ") for line in missing] == [
        "nvidia-smi, which comes with the driver of an NVIDIA GPU",
        "a GPU that torch sees",
    ]
    assert "missing: a GPU" in (tmp_path / "out" / "log.txt").read_text()
    assert not any("bench" in call for call in calls(tmp_path))


def test_every_step_runs_and_a_table_comes_last(tmp_path: Path, machine: Run) -> None:
    result = machine()
    assert result.returncode == 0, result.stdout
    assert table(tmp_path) == dict.fromkeys(STEPS, "ok")
    assert result.stdout.endswith((tmp_path / "out" / "table.txt").read_text())
    made = calls(tmp_path)
    assert any("setup.py build_ext --inplace" in call for call in made)
    assert any("pytest -q -m gpu" in call and "tests/test_device.py" in call for call in made)
    assert [call for call in made if call.startswith("compute-sanitizer")] == [
        f"compute-sanitizer --tool {tool} --error-exitcode 9 --print-limit 20 python3 -m bench.slice cuda"
        for tool in ("memcheck", "racecheck")
    ]
    assert not any("bench tune" in call for call in made)
    (bench,) = (call for call in made if "-m bench gpu" in call)
    seconds = int(bench.split("--seconds ")[1].split()[0])
    assert 380 < seconds <= 525 - 60  # the steps before took a moment
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["log.txt", "table.txt"]
    assert all(f"=== {step}, at most" in (tmp_path / "out" / "log.txt").read_text() for step in STEPS)


@pytest.mark.parametrize(
    ("words", "step"), [("-m pytest", "tests"), ("--tool racecheck", "racecheck"), ("-m bench gpu", "bench")]
)
def test_a_step_that_fails_stops_no_other(tmp_path: Path, machine: Run, words: str, step: str) -> None:
    result = machine(behaviour=f"{words}=3")
    assert result.returncode == 1
    assert table(tmp_path) == {**dict.fromkeys(STEPS, "ok"), step: "exit status 3"}
    assert "stand-in fails" in result.stdout  # the end of a failing step's log
    assert "stand-in fails" in (tmp_path / "out" / "log.txt").read_text()


def test_the_module_is_built_without_setuptools_too(tmp_path: Path, machine: Run) -> None:
    assert machine("--only", "build", behaviour="setup.py=1").returncode == 0
    assert any(call.startswith("cmake --build") for call in calls(tmp_path))
    assert table(tmp_path) == {"build": "ok"}
    both = machine("--only", "build", behaviour="setup.py=1\ncmake --build=4")
    assert both.returncode == 1 and table(tmp_path) == {"build": "exit status 4"}


def test_a_step_that_hangs_is_ended_and_its_log_kept(tmp_path: Path, machine: Run) -> None:
    # A step needs five seconds to be begun: seven for a slow machine to get there.
    result = machine("--only", "bench", "--seconds", "12", behaviour="-m bench gpu=hang")
    assert result.returncode == 1
    assert table(tmp_path) == {"bench": "timed out"}
    assert "archs:" in (tmp_path / "out" / "log.txt").read_text()


def test_without_time_left_a_step_is_not_begun(tmp_path: Path, machine: Run) -> None:
    result = machine("--only", "versions,build", "--seconds", "3")
    assert result.returncode == 1
    assert table(tmp_path) == {"versions": "no time left", "build": "no time left"}
    assert not any("setup.py" in call for call in calls(tmp_path))


def test_options_reach_the_steps(tmp_path: Path, machine: Run) -> None:
    options = ["--only", "bench", "--env", "PLAN=b", "--env", "CUDA_ARCHS=80", "--bench", "--bars sm_80 --max-n 4096"]
    result = machine(*options)
    assert result.returncode == 0
    (bench,) = (call for call in calls(tmp_path) if "-m bench gpu" in call)
    assert bench.endswith("--bars sm_80 --max-n 4096")
    assert "archs: b 80" in result.stdout


def test_tuning_is_asked_for_and_comes_before_the_benchmark(tmp_path: Path, machine: Run) -> None:
    result = machine("--tune", "--skip", "tests,memcheck,racecheck")
    made = calls(tmp_path)
    order = [i for i, call in enumerate(made) if "bench tune" in call or "bench gpu" in call]
    assert len(order) == 2 and "bench tune" in made[order[0]]
    # The stand-in wrote no table of sizes to bring home.
    assert result.returncode == 1
    assert table(tmp_path) == {"versions": "ok", "peers": "ok", "build": "ok", "tune": "exit status 1", "bench": "ok"}


def test_configurations_are_built_and_measured_before_the_benchmark(tmp_path: Path, machine: Run) -> None:
    machine("--configs", "--skip", "versions,peers,build,tests,memcheck,racecheck")
    made = calls(tmp_path)
    flags = [call for call in made if call.startswith("cmake -S") and "CMAKE_CUDA_FLAGS=" in call]
    assert len(flags) == 8 and sum("-DSK_SM90_LAG=3" in call for call in flags) == 1
    # The stand-in built no module to measure.
    assert table(tmp_path) == {"configs": "exit status 1", "bench": "ok"}


def test_wheels_beside_it_are_installed_without_network(tmp_path: Path, machine: Run) -> None:
    (tmp_path / "tree" / ".whl").mkdir()
    (tmp_path / "tree" / ".whl" / "memeff-0.3.1-py3-none-any.whl").touch()
    assert machine("--only", "peers").returncode == 0
    (install,) = (call for call in calls(tmp_path) if "pip install" in call)
    assert "--no-index --no-deps" in install and install.endswith(".whl/memeff-0.3.1-py3-none-any.whl")


@pytest.mark.parametrize("options", [["--nonsense"], ["--seconds"]])
def test_a_wrong_option_is_named(machine: Run, options: list[str]) -> None:
    result = machine(*options)
    assert result.returncode == 2 and options[0] in result.stdout


def test_without_arguments_it_says_how_it_is_used() -> None:
    result = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "bench/gpu.sh OUT [options]" in result.stdout and "--tune" in result.stdout
