"""A package that is not there, or too old, is named together with the extra that installs it."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

import pytest

from tests.conftest import Run

PACKAGES = {
    "open_clip": "open_clip",
    "transformers": "transformers",
    "sentence_transformers": "sentence-transformers",
}


@pytest.mark.parametrize(("package", "extra"), PACKAGES.items())
@pytest.mark.parametrize("version", [None, "0.9.1"])
def test_missing_or_too_old(package: str, extra: str, version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"smartclip_kernels.integrations.{package}"
    stand_in = None
    if version:
        stand_in = ModuleType(package)
        stand_in.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package, stand_in)
    monkeypatch.delitem(sys.modules, name, raising=False)
    got = "not installed" if version is None else f"got {version}"
    with pytest.raises(ImportError, match=rf"{package}: {got}, needs .*pip install 'smartclip-kernels\[{extra}\]'"):
        import_module(name)


def test_nothing_is_imported_unasked(run_python: Run) -> None:
    code = "import sys, smartclip_kernels.integrations; print(*(x for x in sys.argv[1:] if x in sys.modules))"
    done = run_python(code, *PACKAGES)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
