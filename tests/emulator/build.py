"""Compiles kernels for the emulator, into build/emulator/: a library, an executable, or a module for Python.

    library = ctypes.CDLL(str(build.build([build.EMULATOR / "micro.cu"], "micro")))
    kernels = [(build.CSRC / "cuda/sm80/kernels.cu", {"SK_ELEMENT": element}) for element in ("float", "__half")]
    module = build.build([*kernels, build.ROOT / "bindings/module.cpp"], "_emulated", kind="module")

Files are named by what went into them, so that nothing is compiled twice. The variant "tsan" has ThreadSanitizer in the
kernels; what loads it runs by `sanitized`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[2]
EMULATOR = Path(__file__).parent
CACHE = ROOT / "build" / "emulator"
SOURCES = sorted(EMULATOR.glob("*.cpp"))
CSRC = ROOT / "csrc"
HEADERS = ("*.h", "*.cuh", "*.hpp")

Definitions = Mapping[str, str]
Source = Path | tuple[Path, Definitions]
Kind = Literal["library", "executable", "module"]
Variant = Literal["plain", "tsan"]

COMMON = ["-std=c++17", "-fPIC", "-g1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi"]
# No sum may be contracted, and no floating-point fact assumed: as on the device, but for fused products.
ARITHMETIC = ["-ffp-contract=off", "-fno-math-errno"]
# Device code reads bytes as it likes. A compiler that copies the code around a collective, or makes one of two, would
# divide a warp that is not divided, or hide that it is.
KERNEL = ["-O2", "-fno-strict-aliasing", "-fno-thread-jumps", "-fno-optimize-sibling-calls", "-fno-crossjumping",
          "-fno-tree-tail-merge"]  # fmt: skip
SCHEDULER = ["-O3", "-fno-trapping-math"]


def compiler() -> str | None:
    """g++, or what CXX says; None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


@functools.cache
def _version(command: str) -> str:
    return _run([command, "--version"])


def _mirrored(csrc: Path) -> Path:
    """csrc without cuda/ptx, as links. "ptx/…" in a file beside that folder would be found there before any -I."""
    mirror = CACHE / "csrc" if csrc == CSRC else csrc.with_name(f"{csrc.name}-mirrored")
    wanted = {file.relative_to(csrc) for file in csrc.rglob("*") if file.is_file()}
    wanted = {file for file in wanted if file.parts[:2] != ("cuda", "ptx")}
    for file in wanted:
        link = mirror / file
        link.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            link.symlink_to(csrc / file)
    for link in mirror.rglob("*"):
        if link.is_symlink() and link.relative_to(mirror) not in wanted:
            link.unlink(missing_ok=True)
    return mirror


def _digest(files: Iterable[Path], words: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0".encode() + file.read_bytes())
    digest.update("\0".join(words).encode())
    return digest.hexdigest()[:16]


def _headers(folders: Iterable[Path]) -> list[Path]:
    return sorted({file for folder in folders for pattern in HEADERS for file in folder.rglob(pattern)})


def _write(target: Path, command: Sequence[str]) -> Path:
    """Runs `command`, which writes to the path appended to it. Two that do so at once do no harm."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f"{target.name}.{os.getpid()}")
        _run([*command, "-o", str(unfinished)])
        unfinished.replace(target)
    return target


def _defined(definitions: Definitions) -> list[str]:
    return [f"-D{name}={value}" for name, value in definitions.items()]


def build(
    sources: Sequence[Source],
    name: str,
    *,
    kind: Kind = "library",
    variant: Variant = "plain",
    includes: Sequence[Path] = (),
    definitions: Definitions | None = None,
    flags: Sequence[str] = (),
    csrc: Path = CSRC,
) -> Path:
    """The path of what the emulator and `sources` were linked to. `definitions` and `flags` are for both.

    A source may come with definitions of its own, and be listed several times. `csrc`: another copy of the kernels."""
    command = compiler()
    if command is None:
        raise RuntimeError("no g++ was found; CXX may name one")
    mirror = _mirrored(csrc)
    folders = [EMULATOR, mirror / "cuda", mirror, *includes]
    common = [*COMMON, *ARITHMETIC, *_defined(definitions or {}), *flags]
    thread = ["-fsanitize=thread"] if variant == "tsan" else []
    kernel = [*common, *KERNEL, *thread, *(f"-I{folder}" for folder in folders)]
    own = [*common, *SCHEDULER, f"-I{EMULATOR}", "-fvisibility=hidden"]
    if kind == "module":
        import pybind11

        kernel += [
            f"-isystem{pybind11.get_include()}",
            f"-isystem{sysconfig.get_path('include')}",
            "-fvisibility=hidden",
        ]
    kernel_headers, own_headers = _headers(folders), sorted(EMULATOR.glob("*.h"))

    def compiled(source: Path, arguments: Sequence[str], headers: Sequence[Path]) -> Path:
        key = _digest([source, *headers], [_version(command), *arguments])
        return _write(CACHE / f"{source.stem}-{key}.o", [command, *arguments, "-x", "c++", "-c", str(source)])

    jobs: list[tuple[Path, Sequence[str], Sequence[Path]]] = [(source, own, own_headers) for source in SOURCES]
    for source in sources:
        file, extra = source if isinstance(source, tuple) else (source, {})
        file = mirror / file.relative_to(csrc) if file.is_relative_to(csrc) else file
        jobs.append((file, [*kernel, *_defined(extra)], kernel_headers))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: compiled(*job), jobs))
    suffix = {"library": ".so", "executable": "", "module": sysconfig.get_config_var("EXT_SUFFIX")}[kind]
    link = [*thread, *([] if kind == "executable" else ["-shared"]), "-pthread"]
    # A module is found by its name, so what tells two of them apart is their folder.
    folder = CACHE / _digest([], [_version(command), *link, *(file.name for file in objects)])
    return _write(folder / f"{name}{suffix}", [command, *map(str, objects), *link])


@functools.cache
def _sanitizer() -> list[str]:
    """The start of a command line under ThreadSanitizer, or a RuntimeError that says why there is none."""
    command = compiler()
    if command is None:
        raise RuntimeError("no g++ was found; CXX may name one")
    found = Path(_run([command, "-print-file-name=libtsan.so"]).strip())
    if not found.is_absolute():
        raise RuntimeError("the compiler has no ThreadSanitizer")
    # It wants some addresses for itself, and stops where the operating system has put a library there by chance.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    for prefix in (fixed, []):
        start = [*prefix, "env", f"LD_PRELOAD={found}"]
        done = subprocess.run([*start, sys.executable, "-c", ""], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return start
    raise RuntimeError(f"ThreadSanitizer does not start here: {done.stderr[-300:]}")


def why_not_sanitized() -> str | None:
    """Why `sanitized` cannot run here; None where it can."""
    try:
        _sanitizer()
    except RuntimeError as error:
        return str(error)
    return None


def sanitized(
    arguments: Sequence[str], *, timeout: float = 300, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs Python with `arguments` under ThreadSanitizer. Races are told on stderr, and the exit code is then 66.

    Python and its libraries are not instrumented: their threads, if they had any, would look like races.
    """
    # Every launch has the same addresses in shared memory: a race there is told each time, not only the first.
    options = "exitcode=66 ignore_noninstrumented_modules=1 report_thread_leaks=0 suppress_equal_addresses=0"
    extra = {"TSAN_OPTIONS": options, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **(environment or {})}
    return subprocess.run(
        [*_sanitizer(), sys.executable, *arguments],
        env={**os.environ, **extra},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
