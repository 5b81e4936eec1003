"""nvcc's kernels for the compile gate: every csrc/cuda/*.cu, compiled with setup.py's flags for one architecture."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from bench.cubin import Variant, read_all
from setup import NVCC_FLAGS, TORCH, find_nvcc

ROOT = Path(__file__).parents[1]
ARCHITECTURES = {80: "sm_80", 90: "sm_90a", 100: "sm_100"}
KERNELS = ("sparse_db_kernel", "adamw_entries_kernel", "gradient_norms_kernel", "export_adapter_kernel")
"""All of them move memory, and must do so 16 bytes at a time."""
DTYPES = {"f": "fp32", "6__half": "fp16", "13__nv_bfloat16": "bf16", None: "fp32"}
"""The template's argument as it is mangled -> its name; those without one are float32."""
_MANGLED = re.compile(r"_ZN8fastlora\d+([a-z_]+_kernel)(?:I(f|6__half|13__nv_bfloat16)E)?")


class NvccError(RuntimeError):
    """No nvcc, or one that does not compile; the message says what to do."""


def compile_all(capability: int) -> list[Variant]:
    """Every kernel of csrc/cuda. Raises NvccError."""
    nvcc = find_nvcc()
    if nvcc is None or TORCH is None:
        raise NvccError("nvcc was not found: install a CUDA toolkit, or `pip install 'fastlora[cuda-build]'`, and see setup.py")
    warps = int(re.findall(r"kThreads = (\d+);", (ROOT / "csrc/cuda/device.cuh").read_text())[0]) // 32
    variants = []
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
            cubin = Path(folder, f"{source.stem}.cubin")
            command = [nvcc, *NVCC_FLAGS, f"-arch={ARCHITECTURES[capability]}", "-cubin", "-o", cubin, source]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode:
                raise NvccError(f"nvcc does not compile {source.name}: {done.stderr.strip()}")
            for name, machine in read_all(cubin, capability, warps).items():
                match = _MANGLED.match(name)
                if match is None or match[1] not in KERNELS:
                    raise NvccError(f"{source.name} has the kernel {name}, which bench/cuda_gate.py does not list")
                variants.append(Variant(match[1], DTYPES[match[2]], f"csrc/cuda/{source.name}", machine))
    return sorted(variants, key=lambda v: (v.kernel, v.dtype))


def version() -> str:
    """`nvcc 13.0`, or that there is none."""
    nvcc = find_nvcc()
    if nvcc is None:
        return "no nvcc"
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return f"nvcc {re.findall(r'release ([0-9.]+)', said)[0]}"
