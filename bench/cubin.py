"""What a compiled kernel needs of an SM and which instructions it has, read from its machine code: no GPU, no driver.

The disassemblers are those that triton brings along. cuobjdump reports spills as stack. Shared memory that is asked for at launch stands in
triton's metadata only; nvcc's kernels here have none of that kind.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_FUNCTION = re.compile(r"Function (\S+):\s+(REG:.*)")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)")


@dataclass(frozen=True, slots=True)
class Chip:
    """Limits of a streaming multiprocessor (CUDA programming guide, compute capabilities)."""

    registers: int
    shared_bytes: int
    shared_of_a_cta: int
    """Largest that a launch can ask for."""
    warps: int
    ctas: int


CHIPS = {80: Chip(65536, 167936, 166912, 64, 32), 90: Chip(65536, 233472, 232448, 64, 32), 100: Chip(65536, 233472, 232448, 64, 32)}
RESERVED_SHARED, REGISTER_UNIT = 1024, 256
"""Bytes of shared memory that every CTA has besides its own; registers are given to a warp in units of so many."""


@dataclass(frozen=True, slots=True)
class Machine:
    """One kernel, compiled."""

    registers: int
    """Of a thread."""
    stack_bytes: int
    """Of a thread: spills."""
    shared_bytes: int
    """Of a CTA."""
    warps: int
    instructions: Counter[str]
    """Full names: `LDG.E.128`, `HGMMA.64x128x16.F32.BF16`."""

    def count(self, start: str) -> int:
        """Instructions whose name starts so."""
        return sum(n for name, n in self.instructions.items() if name.split(".")[0].startswith(start))

    @property
    def tensor_core(self) -> int:
        """wgmma instructions (Hopper's warp-group products)."""
        return self.count("HGMMA")

    @property
    def tensor_core_of_ampere(self) -> int:
        """mma.sync: on Hopper half the speed."""
        return self.count("HMMA")

    @property
    def wide_loads(self) -> int:
        """Loads by TMA, asynchronous 16-byte copies and plain 16-byte loads."""
        wide = sum(n for name, n in self.instructions.items() if name.startswith(("LDG", "LDGSTS")) and ".128" in name)
        return wide + self.count("UTMALDG")

    def ctas_on_an_sm(self, capability: int) -> int:
        """By registers, shared memory, warps and slots."""
        chip = CHIPS[capability]
        of_a_warp = -(-self.registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
        by_registers = chip.registers // 4 // of_a_warp * 4 // self.warps  # each quarter of an SM has its own
        by_shared = chip.shared_bytes // (-(-(self.shared_bytes + RESERVED_SHARED) // 128) * 128)
        return 0 if self.shared_bytes > chip.shared_of_a_cta else min(by_registers, by_shared, chip.warps // self.warps, chip.ctas)


@dataclass(frozen=True, slots=True)
class Variant:
    """One machine code, and the first launch that asked for it, or the file that it comes from."""

    kernel: str
    dtype: str
    case: str
    machine: Machine


def read(kernel: Any) -> Machine:
    """Of a kernel that triton compiled. Raises RuntimeError with what a disassembler says when it fails."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        ((found, instructions),) = _functions(Path(file.name)).values()
    return Machine(found["REG"], found["STACK"] + found["LOCAL"], kernel.metadata.shared, kernel.metadata.num_warps, instructions)


def read_all(cubin: Path, capability: int, warps: int) -> dict[str, Machine]:
    """Mangled name -> every kernel of a file by nvcc, whose CTAs have so many warps. Raises RuntimeError as `read`."""
    reserved = RESERVED_SHARED if capability >= 90 else 0  # counted in from there on
    return {
        name: Machine(found["REG"], found["STACK"] + found["LOCAL"], max(found["SHARED"] - reserved, 0), warps, instructions)
        for name, (found, instructions) in _functions(cubin).items()
    }


def _functions(cubin: Path) -> dict[str, tuple[dict[str, int], Counter[str]]]:
    """Kernel -> (its resources by cuobjdump's names, its instructions)."""
    listing = re.split(r"^\.text\.(\S+):$", _run("nvdisasm", "-c", str(cubin)), flags=re.MULTILINE)
    bodies = dict(zip(listing[1::2], listing[2::2], strict=True))
    usage = _FUNCTION.findall(_run("cuobjdump", "--dump-resource-usage", str(cubin)))
    resources = {name: {key: int(number) for key, number in re.findall(r"(\w+):(\d+)", text)} for name, text in usage}
    return {
        name: (found, Counter(match[1] for line in bodies[name].splitlines() if (match := _INSTRUCTION.search(line))))
        for name, found in resources.items()
    }


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{tool} {' '.join(arguments)} failed: {done.stderr.strip()}")
    return done.stdout
