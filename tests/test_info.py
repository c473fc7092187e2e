"""python -m smartclip_kernels.info: what it says must be what runs."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

import smartclip_kernels as sk
from smartclip_kernels import backends, info


def value(lines: info.Lines, name: str) -> str:
    return dict(lines)[name]


def mebibytes(text: str) -> float:
    found = re.match(r"([\d,.]+) MiB", text)
    assert found
    return float(found[1].replace(",", ""))


def without_module(monkeypatch: pytest.MonkeyPatch, package: Path, error: ImportError) -> None:
    """As if `_C` did not import and the package lay in `package`."""

    def refuse(name: str) -> object:
        assert name == "smartclip_kernels._C"
        raise error

    monkeypatch.setattr(importlib, "import_module", refuse)
    monkeypatch.setattr(info, "PACKAGE", package)


NOT_FOUND = ModuleNotFoundError("No module named 'smartclip_kernels._C'", name="smartclip_kernels._C")


def test_command_line_prints_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    info.main(["--sizes", "1024", "2048", "64", "--dtype", "bfloat16"])
    printed = capsys.readouterr().out
    for title in ("versions", "devices", "compiled module", "backends", "workspace", "memory on"):
        assert re.search(rf"^{title}", printed, re.MULTILINE), title
    assert torch.__version__ in printed
    assert sk.__version__ in printed
    assert sys.executable in printed


def test_module_that_is_there() -> None:
    compiled, missing = info.compiled_module()
    if compiled is None:
        pytest.skip(missing)
    lines = info.module()
    assert value(lines, "built for").split(", ") == list(compiled.build["isas"])
    assert value(lines, "chosen").split()[0] == compiled.isa()
    assert Path(value(lines, "OpenMP").partition(",")[0]).exists()
    assert f"{torch.get_num_threads()} threads" in value(lines, "OpenMP")


def test_missing_module_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_module(monkeypatch, tmp_path, NOT_FOUND)
    monkeypatch.setenv("PATH", str(tmp_path))
    ((name, text),) = info.module()
    assert name == "_C"
    assert text.startswith("missing: ")
    assert "install a C++ compiler" in text
    assert "pip install" in text


def test_missing_module_beside_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_module(monkeypatch, tmp_path, NOT_FOUND)
    compiler = tmp_path / "g++"
    compiler.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert f"{compiler} could compile it" in info.compiled_module()[1]


def test_module_of_another_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    without_module(monkeypatch, tmp_path, NOT_FOUND)
    assert "built for another Python (_C.cpython-39" in info.compiled_module()[1]


def test_module_that_does_not_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_module(monkeypatch, tmp_path, ImportError("undefined symbol: sk"))
    assert "undefined symbol: sk" in info.compiled_module()[1]


def test_another_missing_module_is_not_ours_to_explain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_module(monkeypatch, tmp_path, ModuleNotFoundError("No module named 'other'", name="other"))
    with pytest.raises(ModuleNotFoundError, match="other"):
        info.compiled_module()


def test_choice_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SMARTCLIP_BACKEND", raising=False)
    assert value(info.choice(), "cpu tensors").split()[0] == backends.default("cpu")


def test_choice_gives_reason_and_remedy_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "status", lambda: {"cpu": "was not built; install g++", "reference": ""})
    assert value(info.choice(), "cpu") == "not available: was not built; install g++"


def test_memory_is_a_sum_of_its_parts() -> None:
    n, m, d = 32768, 16384, 512
    cpu = torch.device("cpu")
    workspace = backends.workspace_bytes(cpu) / 2**20
    statistics = 64 * (n + m) / 2**20
    accumulator = 4 * m * d / 2**20
    for dtype, count in ((torch.float32, 0), (torch.bfloat16, 1), (torch.float16, 1), (torch.float64, 0)):
        lines = info.memory(n, m, d, dtype, cpu)
        plain = mebibytes(value(lines, "clip_loss, siglip_loss"))
        masked = mebibytes(value(lines, "smartclip_loss"))
        assert plain == pytest.approx(statistics + workspace + count * accumulator, abs=0.05)
        assert masked == pytest.approx(statistics + workspace + 2 * count * accumulator, abs=0.05)


def test_memory_follows_the_workspace() -> None:
    try:
        sk.set_workspace(7)
        assert mebibytes(value(info.memory(8, 8, 8, torch.float32, torch.device("cpu")), "workspace")) == 7.0
    finally:
        sk.set_workspace(None)


@pytest.mark.parametrize("arguments", [["--sizes", "0", "1", "1"], ["--sizes", "1", "1"], ["--dtype", "int8"]])
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        info.main(arguments)
    assert arguments[0] in capsys.readouterr().err
