"""Builds smartclip_kernels._C by CMake; sources and flags are in CMakeLists.txt, metadata in pyproject.toml.

Environment: SMARTCLIP_BUILD=0 leaves the compiled module out, SMARTCLIP_BUILD=1 makes a missing compiler an error,
CXX names the compiler, CMAKE_ARGS adds arguments for CMake. SMARTCLIP_CUDA=0 leaves the CUDA kernels out, 1 makes a
missing nvcc an error; CUDA_ARCHS names their architectures ("80-real;90;90a-real" by default), CUDACXX the nvcc.
"""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
NO_MODULE = """
************************************************************************************************************
WARNING: smartclip_kernels is being installed without its compiled CPU kernels: {reason}.
Only the backends written in Python will be there. To get the fast ones, {remedy} and install again.
`python -m smartclip_kernels.info` says what is there and what is missing.
************************************************************************************************************
"""


def find_compiler() -> str | None:
    """The C++ compiler CMake shall use, or None where there is none; a compiler named by CXX has to exist."""
    named = os.environ.get("CXX")
    if named:
        if shutil.which(shlex.split(named)[0]) is None:
            raise SystemExit(f"CXX is {named!r}, which is not an executable on PATH; unset it or name a C++ compiler")
        return named
    return next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)


def wants_module() -> bool:
    """Whether to build _C. Only SMARTCLIP_BUILD=0 or a machine without any compiler says no."""
    setting = os.environ.get("SMARTCLIP_BUILD", "")
    if setting not in ("", "0", "1"):
        raise SystemExit(f"SMARTCLIP_BUILD is {setting!r}; it must be 0 (leave _C out), 1 (build it) or unset")
    if setting == "0":
        reason, remedy = "SMARTCLIP_BUILD=0", "unset SMARTCLIP_BUILD"
    elif find_compiler() is not None:
        return True
    elif setting == "1":
        raise SystemExit("SMARTCLIP_BUILD=1, but no C++ compiler (c++, g++ or clang++) is on PATH")
    else:
        reason, remedy = "no C++ compiler (c++, g++ or clang++) is on PATH", "install g++ or clang++"
    print(NO_MODULE.format(reason=reason, remedy=remedy), file=sys.stderr, flush=True)
    return False


def find_tool(name: str, directory_attribute: str) -> str:
    """The program `name` of the pip package `name`, whose scripts may not be on PATH; else the one that is on PATH."""
    try:
        directory = getattr(importlib.import_module(name), directory_attribute)
    except ImportError:
        directory = None
    found = (directory and shutil.which(name, path=directory)) or shutil.which(name)
    if not found:
        raise SystemExit(f"building smartclip_kernels needs {name}, which was not found: pip install {name}")
    return found


class CMakeBuild(build_ext):
    """Configures and builds the CMake project; only changed sources are compiled again."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # Not self.build_temp: that is a new folder for every editable install, and everything would be compiled again.
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-{self.plat_name}"
        # pip's isolated builds leave paths here that no longer exist: configure anew, keep the objects.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        cmake = find_tool("cmake", "CMAKE_BIN_DIR")
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja', 'BIN_DIR')}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        configure += [f"-D{name}={os.environ[name]}" for name in ("SMARTCLIP_CUDA", "CUDA_ARCHS") if name in os.environ]
        if "CXX" not in os.environ:
            configure.append(f"-DCMAKE_CXX_COMPILER={find_compiler()}")
        subprocess.run([*configure, *shlex.split(os.environ.get("CMAKE_ARGS", ""))], check=True)
        subprocess.run([cmake, "--build", str(build)], check=True)


setup(
    ext_modules=[Extension("smartclip_kernels._C", sources=[])] if wants_module() else [],
    cmdclass={"build_ext": CMakeBuild},
)
