"""Compiles kernels for real GPUs on a machine without one, and reads the machine code.

The JIT's own specialiser sees real CPU tensors (their alignment, the divisibility of integers), so
the code is what a user's launch would get from this version of Triton.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"


class FakeDriver:
    """What the JIT needs of a driver in order to compile."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.target.arch, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


@dataclass(frozen=True)
class Code:
    """registers of a thread; spills: bytes of stack and local memory, and their instructions.

    wide_loads, wide_stores: 128-bit accesses to global memory. narrow: those below 32 bits.
    doubles: float64 instructions.
    """

    registers: int
    spills: int
    shared: int
    instructions: int
    exponentials: int
    wide_loads: int
    wide_stores: int
    narrow: int
    doubles: int


def compiled(kernel: Any, arch: int, arguments: dict[str, Any], warps: int) -> Code:
    before = driver._active
    driver.set_active(FakeDriver(arch))
    try:
        kernel.device_caches.clear()
        made = kernel.warmup(**arguments, grid=(1,), num_warps=warps, enable_fp_fusion=True)
    finally:
        driver._active = before
    return read(made.asm["cubin"], made.metadata.shared)


def read(cubin: bytes, shared: int) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(BIN / "cuobjdump", "--dump-resource-usage", file.name)
        sass = _output(BIN / "nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, static, local = map(int, found.groups())
    accesses = Counter(
        (name, width)
        for name, rest in re.findall(r"\b(LDG|STG|LDL|STL)((?:\.\w+)*)", sass)
        for width in re.findall(r"\.(128|U16|U8|S16|S8)\b", rest)[:1] or ["32"]
    )
    # Neither alone tells: a stack may be a frame, and local is 0 even where registers spill.
    spill_code = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return Code(
        registers=registers,
        spills=stack + local + spill_code,
        shared=max(shared, static),
        instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.M)),
        exponentials=sass.count("MUFU.EX2"),
        wide_loads=accesses["LDG", "128"],
        wide_stores=accesses["STG", "128"],
        narrow=sum(n for (_, width), n in accesses.items() if width in ("U16", "U8", "S16", "S8")),
        doubles=len(re.findall(r"\b(?:DADD|DMUL|DFMA|DSETP|DMNMX)\b|\.F64\b|64H\b", sass)),
    )


def _output(*command: object) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True).stdout
