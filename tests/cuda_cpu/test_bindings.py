"""The bindings (csrc/cuda/*.cu) and the Python in front of them, on the CPU: `cuda` against `reference` on every sample of the ops.

They are compiled by g++ for torch's CPU key with the emulation behind them; four edits stand for what a CPU does not have.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cuda_cpu.build import DEVICE_CODE, HERE, compile_text, needs_gxx

pytestmark = needs_gxx
TORCH = Path(torch.__file__).parent
ROOT = HERE.parents[1]
EDITS = {
    " && x.is_cuda()": "",
    "explicit OnDevice(const Tensor& x) : guard_(x.get_device_index()) {": "explicit OnDevice(const Tensor&) {",
    "    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));\n": "",
    "  torch::stable::accelerator::DeviceGuard guard_;\n": "",
    "  const cudaError_t error = cudaGetLastError();\n": "",
    "STD_TORCH_CHECK(error == cudaSuccess, op": "STD_TORCH_CHECK(emulation::error.empty(), op",
    "cudaGetErrorString(error)": "emulation::error",
}
"""Of binding.h: no GPU, no stream, and launches whose errors are the emulation's."""

PROGRAM = """
import sys
from pathlib import Path
import torch
from fastlora import extension
from fastlora.ops import adamw_step, export_adapter, sparse_db
from fastlora.ops.registry import dispatchers
from tests.tolerances import SAME_IN_FLOAT32

extension.CUDA_LIBRARY = Path(sys.argv[1])
assert extension.missing_cuda() is None, extension.missing_cuda()
torch.cuda.get_device_capability = lambda device: (9, 0)
refuses = {name: d.implementations["cuda"].refuses for name, d in dispatchers.items() if "cuda" in d.implementations}
for spec in (sparse_db.SPEC, export_adapter.SPEC, *adamw_step.SPECS):
    for dtype in (torch.float32, torch.bfloat16, torch.float16) if spec.name == "sparse_db" else (torch.float32,):
        for arguments in spec.sample_inputs(dtype, torch.device("cpu")):
            if "k entries of an index" in (refuses[spec.name](torch.device("cuda"), *arguments) or ""):
                continue
            results = []
            for name in ("cuda", "reference"):
                copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
                returned = dispatchers[spec.name].implementations[name].run(*copies)
                outputs = returned if isinstance(returned, tuple) else () if returned is None else (returned,)
                results.append([*outputs, *(x for x in copies if isinstance(x, torch.Tensor))])
            for ours, theirs in zip(*results, strict=True):
                assert ours.dtype == theirs.dtype
                assert ours.shape == theirs.shape and not ours.isnan().any()
                assert float((ours.double() - theirs).norm()) <= SAME_IN_FLOAT32 * max(1.0, float(theirs.double().norm())), spec.name
            print(spec.name)
"""


@pytest.fixture(scope="module")
def library() -> Path:
    """The bindings of all ops in one library."""
    binding = (DEVICE_CODE / "binding.h").read_text()
    for text, replacement in EDITS.items():
        assert binding.count(text) == 1, text
        binding = binding.replace(text, replacement)
    sources = {path.name: path.read_text() for path in sorted(DEVICE_CODE.glob("*.cuh"))} | {"binding.h": binding}
    for path in sorted(DEVICE_CODE.glob("*.cu")):
        text = path.read_text()
        assert text.count("CUDA, m)") == 1
        sources[f"{path.stem}.cpp"] = text.replace("CUDA, m)", "CPU, m)")
    flags = ("-O1", "-w", "-fPIC", "-shared", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{TORCH / 'include'}", f"-L{TORCH / 'lib'}")
    return compile_text("bindings", sources, flags, ("-ltorch", "-ltorch_cpu", "-lc10"))


def test_cuda_is_the_reference_through_the_bindings(library: Path) -> None:
    """In a process of its own: the real library may be loaded in this one."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, library], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    ran = done.stdout.split()
    assert (ran.count("sparse_db"), ran.count("export_adapter"), ran.count("adamw_step"), ran.count("gradient_norms")) == (15, 5, 1, 1)
