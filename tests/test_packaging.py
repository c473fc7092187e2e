"""What setup.py and CMakeLists.txt make: what the module links, the sdist, installs with and without a compiler."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import smartclip_kernels as sk
from smartclip_kernels.info import compiled_module

ROOT = Path(__file__).parents[1]
TREES = ("bindings", "csrc", "requirements", "smartclip_kernels")
FILES = ("CMakeLists.txt", "LICENSE", "MANIFEST.in", "NOTICE", "README.md", "pyproject.toml", "setup.py")
HOOK = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("smartclip_kernels._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "torch" not in sys.modules
print(module.build["version"], *module.build["isas"], repr(module.parallel_runtime()))
"""

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs a checkout")


def version() -> str:
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found
    return found[1]


def module_path() -> str:
    compiled, missing = compiled_module()
    if compiled is None:
        pytest.skip(missing)
    return str(compiled.__file__)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources that nothing was built in."""
    target = tmp_path_factory.mktemp("checkout")
    for name in TREES:
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, target)
    return target


def python(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python process that sees none of our settings but `environment`."""
    ours = ("SMARTCLIP_BUILD", "SMARTCLIP_CUDA", "CUDA_ARCHS", "CXX", "CMAKE_ARGS", "PYTHONPATH")
    inherited = {k: v for k, v in os.environ.items() if k not in ours}
    command = (sys.executable, *command)
    return subprocess.run(command, cwd=cwd, env=inherited | environment, capture_output=True, text=True, check=False)


def build(hook: str, checkout: Path, target: Path, **environment: str) -> Path:
    """What pip calls to build: `hook` is build_sdist or build_wheel."""
    done = python("-c", HOOK, hook, str(target), cwd=checkout, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return target / done.stdout.splitlines()[-1]


def test_one_version() -> None:
    assert sk.__version__ == version()
    assert importlib.metadata.version("smartclip-kernels") == version()
    compiled, _ = compiled_module()
    assert compiled is None or compiled.build["version"] == version()


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_module_is_bound_to_no_torch_and_no_openmp() -> None:
    dynamic = subprocess.run(["readelf", "-d", module_path()], capture_output=True, text=True, check=True).stdout
    needed = {name.partition(".so")[0] for name in re.findall(r"NEEDED.*\[(.+)\]", dynamic)}
    assert "libc" in needed
    assert needed <= {
        "libc",
        "libm",
        "libdl",
        "libpthread",
        "libgcc_s",
        "libstdc++",
        "libc++",
        "libc++abi",
        "ld-linux-x86-64",
    }
    assert "PATH" not in re.sub(r"NEEDED.*", "", dynamic)  # neither RPATH nor RUNPATH


def test_module_loads_without_torch() -> None:
    done = python("-c", LOAD, module_path(), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    # Without torch nobody has mapped an OpenMP runtime, and the module must not bring one.
    assert re.fullmatch(rf"{re.escape(version())} .*portable.* ''", done.stdout.strip())


def test_sdist_holds_all_that_a_build_needs(checkout: Path, tmp_path: Path) -> None:
    with tarfile.open(build("build_sdist", checkout, tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    built = ("build", "smartclip_kernels.egg-info")
    sources = {path.relative_to(checkout) for path in checkout.rglob("*") if path.is_file()}
    sources = {path for path in sources if path.parts[0] not in built and "__pycache__" not in path.parts}
    assert Path("csrc/cpu/kernels.cpp") in sources
    assert {str(path) for path in sources} <= names


@pytest.mark.parametrize(("setting", "compilers"), [("0", True), ("", False)], ids=["SMARTCLIP_BUILD=0", "no compiler"])
def test_pure_python_wheel(checkout: Path, tmp_path: Path, setting: str, compilers: bool) -> None:
    environment = {"SMARTCLIP_BUILD": setting} if compilers else {"PATH": str(tmp_path)}
    wheel = build("build_wheel", checkout, tmp_path, **environment)
    assert wheel.name == f"smartclip_kernels-{version()}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.endswith(".so")]
    data = {f"smartclip_kernels/data/emoji/{path.name}" for path in (ROOT / "smartclip_kernels/data/emoji").iterdir()}
    assert data
    assert {*data, "smartclip_kernels/py.typed", "smartclip_kernels/reference.py"} <= set(names)


def test_pure_python_install_warns(checkout: Path, tmp_path: Path) -> None:
    for environment, reason in (
        ({"SMARTCLIP_BUILD": "0"}, "SMARTCLIP_BUILD=0"),
        ({"PATH": str(tmp_path)}, "no C++ compiler"),
    ):
        done = python("setup.py", "--version", cwd=checkout, **environment)
        assert done.returncode == 0, done.stderr
        assert "WARNING" in done.stderr
        assert reason in done.stderr
        assert "python -m smartclip_kernels.info" in done.stderr


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SMARTCLIP_BUILD": "yes"}, "SMARTCLIP_BUILD is 'yes'"),
        ({"SMARTCLIP_BUILD": "1", "PATH": ""}, "no C++ compiler"),
        ({"CXX": "no-such-compiler"}, "CXX is 'no-such-compiler'"),
    ],
    ids=["unknown setting", "asked for without a compiler", "named compiler missing"],
)
def test_bad_settings_stop_the_build(checkout: Path, environment: dict[str, str], message: str) -> None:
    done = python("setup.py", "--version", cwd=checkout, **environment)
    assert done.returncode != 0
    assert message in done.stderr


def test_a_compiler_that_fails_fails_the_install(checkout: Path, tmp_path: Path) -> None:
    done = python("-c", HOOK, "build_wheel", str(tmp_path), cwd=checkout, CXX=shutil.which("false") or "")
    assert done.returncode != 0
    assert re.search("CXX compiler: .*false - broken", done.stdout)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_wheel_from_sdist(checkout: Path, tmp_path: Path) -> None:
    """The sdist alone makes a working wheel, without a warning; nothing compiled for one instruction set can leak."""
    sdist = build("build_sdist", checkout, tmp_path)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    source = tmp_path / sdist.name.removesuffix(".tar.gz")
    wheel = build("build_wheel", source, tmp_path, CMAKE_ARGS="-DSMARTCLIP_DEV=ON", CUDA_ARCHS="80-real")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    (module,) = (tmp_path / "installed/smartclip_kernels").glob("_C*.so")
    done = python("-c", LOAD, str(module), cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    objects = {path.parents[2].name: path for path in source.glob("build/*/CMakeFiles/kernels_*.dir/csrc/cpu/*.o")}
    assert "kernels_portable.dir" in objects
    for name, path in objects.items():
        # The linker keeps one copy of a weak symbol for all: it must name the instruction set that it was compiled for.
        isa = name.removeprefix("kernels_").removesuffix(".dir")
        symbols = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
        weak = re.findall(r" [WVu] (\S+)", symbols)
        assert weak
        assert [
            symbol for symbol in weak if f"{len(isa)}{isa}" not in symbol and not symbol.startswith("DW.ref.")
        ] == []
