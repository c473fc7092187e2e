"""What the CUDA kernels take, read from the compiled module, without a GPU: ``python -m bench report --cuda``.

Every instance for every architecture that was built: registers, local memory, shared memory, how many blocks a
multiprocessor holds, how many matrix instructions the machine code has, and of those of warpgroups how many are under
way at once. Where the compiler cannot leave them to themselves (ptxas: C7510 and others, "wgmma … are serialized"),
it has each waited for; where it ignores the change of registers (C7508), there is none in the code.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from smartclip_kernels.backends import cpu, cuda

SHARED_KIB = {80: 164, 86: 100, 89: 100, 90: 228}
"""Of a multiprocessor. A block takes 1 KiB more than it asks for (CUDA C++ Programming Guide, compute capabilities)."""
THREADS = {80: 2048, 86: 1536, 89: 1536, 90: 2048}
REGISTERS = 65536
FAMILIES = {"sm80": "sm_80", "sm90": "sm_90a"}
"""Namespace of the kernels -> their architecture, as `Launch` names it."""
ELEMENTS = {"bfloat16": "__nv_bfloat16", "float16": "__half", "tf32": "Tf32", "float32": "ConfigIf"}
"""Element -> how its mangled name shows in a kernel's."""
KERNELS = ("statistics", "gradient", "derivative", "search", "gather", "anchors", "unit", "parameter_gradient")


@dataclass(frozen=True)
class Code:
    """What a kernel's machine code has."""

    matrix: int  # instructions of the matrix unit
    groups: int  # of a warpgroup's, those that end a group: what is waited for
    register_changes: int
    wide_stores: int  # of 16 bytes, to global memory

    @classmethod
    def of(cls, body: str) -> Code:
        def count(pattern: str) -> int:
            return len(re.findall(pattern, body))

        return cls(
            count(r"\b(?:HMMA|HGMMA)\."),
            count(r"\bHGMMA\..*\bgsb\d"),
            count(r"\bUSETMAXREG\."),
            count(r"\bSTG\.E\.128\b"),
        )


@dataclass(frozen=True)
class Instance:
    """One compiled kernel."""

    kernel: str
    family: str  # "sm80", "sm90"; "" where it has none
    architecture: int
    element: str  # "" where it has none, and so with the next two
    similarity: str
    objective: str
    registers: int
    local: int  # bytes of a thread: spilled registers, arrays
    threads: int  # of a block; 0: a kernel of vectors, for which the rest is not asked
    shared: int  # bytes of a block
    columns: int  # of a tile
    code: Code

    @property
    def blocks(self) -> int:
        """That a multiprocessor holds at once."""
        registers = -(-self.registers // 8) * 8 * self.threads
        shared = SHARED_KIB[self.architecture] * 1024 // (self.shared + 1024)
        return min(REGISTERS // registers, shared, THREADS[self.architecture] // self.threads)

    @property
    def sound(self) -> bool:
        """Nothing in local memory, room on a multiprocessor, and the matrix unit at work unless numbers are exact.

        A warpgroup's products go four at a time, it changes its registers, and gradients go out by 16 bytes.
        """
        if not self.threads:
            return self.local == 0
        code = self.code
        if self.family == "sm90" and not (code.matrix == 4 * code.groups > 0 and code.register_changes == 2):
            return False
        stores = self.kernel not in ("gradient", "derivative") or self.element in ("float32", "tf32")
        if not (stores or code.wide_stores):
            return False
        return self.local == 0 and self.blocks > 0 and (code.matrix > 0) == (self.element != "float32")

    def __str__(self) -> str:
        return " ".join(word for word in (self.kernel, self.similarity, self.objective, self.element) if word)


def find_cuobjdump() -> str | None:
    """The toolkit's, or the one that comes with triton."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.exists() else None


def module() -> ModuleType:
    """The module that holds the kernels.

    Raises:
        RuntimeError: there is none, with the remedy.
    """
    try:
        found = cpu.compiled()
    except ImportError as error:
        raise RuntimeError(f"smartclip_kernels._C does not load: {error}") from error
    if not hasattr(found, "cuda"):
        raise RuntimeError(f"smartclip_kernels._C has no CUDA kernels; {cuda.REBUILD}")
    return found


def _disassembled(option: str, path: Path) -> str:
    tool = find_cuobjdump()
    if tool is None:
        raise RuntimeError("cuobjdump was found neither on PATH nor beside triton; install the CUDA toolkit or triton")
    return subprocess.run([tool, option, str(path)], capture_output=True, text=True, check=True).stdout


def report() -> list[Instance]:
    """Every kernel in the installed module."""
    path = Path(str(module().__file__))
    # Text after "arch = sm_NN" is of that architecture, until the next one.
    codes: dict[tuple[int, str], Code] = {}
    for architecture, text in _by_architecture(_disassembled("-sass", path)):
        parts = re.split(r"\n\s+Function : (\S+)\n", text)
        for name, body in zip(parts[1::2], parts[2::2], strict=True):
            codes[architecture, name] = Code.of(body)
    instances = []
    for architecture, text in _by_architecture(_disassembled("-res-usage", path)):
        for name, usage in re.findall(r"Function (\S+):\n\s+(REG:.*)", text):
            of = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
            local = of["STACK"] + of["LOCAL"]
            instances.append(_instance(name, architecture, of["REG"], local, codes[architecture, name]))
    return instances


def _by_architecture(text: str) -> list[tuple[int, str]]:
    parts = re.split(r"Fatbin elf code:\n=+\narch = sm_(\d+)a?", text)
    return [(int(architecture), body) for architecture, body in zip(parts[1::2], parts[2::2], strict=True)]


def _instance(name: str, architecture: int, registers: int, local: int, code: Code) -> Instance:
    kernel = next(k for k in KERNELS if re.search(rf"\d{k}I", name))
    similarity = next((s for key, s in (("MaskedCosine", "masked_cosine"), ("Dot", "dot")) if key in name), "")
    objective = next((o for o in ("softmax", "sigmoid") if o.capitalize() in name), "")
    element = next((e for e, mangled in ELEMENTS.items() if mangled in name), "")
    family = next((f for f in FAMILIES if f"4{f}" in name), "")
    threads, shared, columns = 0, 0, 0
    if similarity:
        resources = module().cuda.resources(FAMILIES[family], element, similarity, objective or "softmax")
        # Config<Element, accumulators, columns>
        found = re.search(r"Li\d+ELi(\d+)EEE", name)
        columns, threads, shared = next(
            of[1:] for of in resources if of[0] == kernel and (found is None or of[1] == int(found[1]))
        )
    names = (kernel, family, architecture, element, similarity, objective)
    return Instance(*names, registers, local, threads, shared, columns, code)


def table(instances: list[Instance]) -> str:
    """Markdown."""
    heads = (
        "| kernel | sm | tile's columns | registers | local bytes | threads | shared KiB | blocks an SM | "
        "matrix instructions | at once |"
    )
    lines = [heads, "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for x in sorted(set(instances), key=lambda x: (x.architecture, x.family, str(x), x.columns)):
        at_once = x.code.matrix // x.code.groups if x.code.groups else ""
        block = f"{x.threads} | {x.shared / 1024:.1f} | {x.blocks} | {x.code.matrix} | {at_once}" if x.threads else ""
        sm = f"{x.architecture}{'a' if x.family == 'sm90' else ''}"
        lines.append(f"| {x} | {sm} | {x.columns or ''} | {x.registers} | {x.local} | {block or ' |  |  |  | '} |")
    return "\n".join(lines) + "\n"


def main(path: Path | None) -> int:
    """Writes the table to `path` or the terminal, and returns 1 where an instance is not sound."""
    instances = report()
    text = f"nvcc {module().cuda.nvcc}; registers and local memory are a thread's.\n\n{table(instances)}"
    if path is None:
        print(text)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    bad = [instance for instance in instances if not instance.sound]
    for instance in bad:
        print(f"not sound: {instance!r}")
    return 1 if bad else 0
