"""Triton kernels as machine code, on a machine without a GPU: compiled as a launch would compile them, and read.

What: `Target` stands in for the driver of a GPU of some compute capability, so that `Target.compile` makes of a launch
  what the real launch would: same signature, same specialisation of integers and pointers, same options, hence the same
  key in Triton's cache. `read` says what machine code takes of the chip.
Alignment: a tensor of `dry_run` begins at its storage offset, as one of torch's allocator does (512-byte blocks).
Limits: not under TRITON_INTERPRET=1; `read` needs the cuobjdump and nvdisasm that the triton package ships.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from sgpo_kernels.dry_run import Launch

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Code(NamedTuple):
    """What one kernel's machine code takes: registers and stack bytes per thread, instructions that spill, global
    accesses by width in bits, and instructions in all (`special`: those of the units for exponentials and the like)."""

    registers: int
    stack: int
    spills: int
    loads: dict[str, int]
    stores: dict[str, int]
    instructions: int
    special: int


def read(cubin: bytes) -> Code:
    """The figures of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return Code(
        int(found[1]),
        int(found[2]),
        len(re.findall(r"\b(?:STL|LDL)\b", code)),
        _widths(code, "LDG"),
        _widths(code, "STG"),
        len(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?!.*\bNOP\b)", code, re.MULTILINE)),
        len(re.findall(r"\bMUFU\b", code)),
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _widths(code: str, instruction: str) -> dict[str, int]:
    """Accesses by width in bits, from the suffixes of the instruction (none: 32)."""
    counts: dict[str, int] = {}
    for suffixes in re.findall(rf"\b{instruction}((?:\.\w+)*)", code):
        width = next((part for part in suffixes.split(".") if part in ("128", "64", "U16", "U8", "S16")), "32")
        counts[width] = counts.get(width, 0) + 1
    return counts


class _Pointer:
    """What Triton asks of a tensor when it chooses a kernel's specialisation."""

    def __init__(self, tensor: Tensor):
        self.dtype = tensor.dtype
        self._offset = int(tensor.storage_offset()) * tensor.element_size()

    def data_ptr(self) -> int:
        """Where it begins, in a storage at an aligned address."""
        return self._offset

    def ptr_range(self) -> int:
        """Not known."""
        return 0


class Target:
    """The driver of a GPU that is not there, for as long as the context lasts."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)
        self.kernels: list[Any] = []

    def get_current_target(self) -> GPUTarget:
        """As Triton's drivers."""
        return self.target

    def get_current_device(self) -> int:
        """As Triton's drivers."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """As Triton's drivers."""
        return 0

    def __enter__(self) -> Target:
        self.before = driver._active
        driver.set_active(self)  # type: ignore[arg-type]
        return self

    def __exit__(self, *error: object) -> None:
        driver._active = self.before
        for kernel in self.kernels:
            kernel.device_caches.clear()

    def compile(self, launch: Launch) -> Any:
        """The compiled kernel of a launch, from Triton's cache where it is there."""
        self.kernels.append(launch.kernel)
        given = {key: _Pointer(value) if isinstance(value, Tensor) else value for key, value in launch.given.items()}
        return launch.kernel.run(**given, grid=launch.grid, warmup=True, **launch.options)
