"""The C++ extension: what its absence means, and that its sources are the ops'."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastlora import extension
from fastlora.ops.registry import dispatchers

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path.stem for path in (ROOT / "csrc/cpu").glob("*.cpp"))
CUDA_SOURCES = sorted(path.stem for path in (ROOT / "csrc/cuda").glob("*.cu"))
EVERY_OP = """
import importlib, pkgutil
import torch
import fastlora.ops
from fastlora import extension
from fastlora.ops.registry import OpSpec, implementation_counts

extension.LIBRARY = extension.CUDA_LIBRARY = extension.LIBRARY.with_name("never_built.so")
for info in pkgutil.iter_modules(fastlora.ops.__path__):
    for value in list(vars(importlib.import_module(f"fastlora.ops.{info.name}")).values()):
        for spec in value if isinstance(value, tuple) else (value,):
            if isinstance(spec, OpSpec):
                for arguments in spec.sample_inputs(torch.float32, torch.device("cpu")):
                    spec.op(*arguments)
                    print(spec.name)
assert {name for _, name in implementation_counts} == {"reference", "torch"}, implementation_counts
print(extension.missing())
"""


@pytest.fixture
def _forgetful() -> Iterator[None]:
    """`missing` remembers its answer for the life of the process; before and after these tests it forgets."""
    for missing in (extension.missing, extension.missing_cuda):
        missing.cache_clear()
    yield
    for missing in (extension.missing, extension.missing_cuda):
        missing.cache_clear()


@pytest.mark.usefixtures("_forgetful")
def test_a_missing_extension_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(extension, "LIBRARY", tmp_path / "_C.so")
    reason = extension.missing()
    assert reason is not None and "was not built" in reason and "pip install -e ." in reason and "compiler" in reason


@pytest.mark.usefixtures("_forgetful")
def test_a_broken_extension_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "_C.so"
    library.write_text("not a library")
    monkeypatch.setattr(extension, "LIBRARY", library)
    reason = extension.missing()
    assert reason is not None and "_C.so does not load under torch" in reason and torch.__version__ in reason and "build it again" in reason


@pytest.mark.usefixtures("_forgetful")
def test_a_missing_or_broken_cuda_extension_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(extension, "CUDA_LIBRARY", tmp_path / "_C_cuda.so")
    reason = extension.missing_cuda()
    assert reason is not None and "was not built" in reason and "nvcc" in reason and "pip install -e ." in reason
    (tmp_path / "_C_cuda.so").write_text("not a library")
    extension.missing_cuda.cache_clear()
    reason = extension.missing_cuda()
    assert reason is not None and "_C_cuda.so does not load under torch" in reason and "build it again" in reason


@pytest.mark.skipif(not extension.CUDA_LIBRARY.exists(), reason=str(extension.missing_cuda()))
def test_the_cuda_extension_loads_without_a_gpu_and_has_every_op() -> None:
    """Under a torch without CUDA too: the one symbol of libtorch_cuda is weak."""
    assert extension.missing_cuda() is None
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastlora_cuda::")}
    assert registered == {*CUDA_SOURCES, "gradient_norms"}


def test_every_cuda_source_is_an_op_and_its_device_code_needs_no_torch() -> None:
    assert CUDA_SOURCES
    for stem in CUDA_SOURCES:
        importlib.import_module(f"fastlora.ops.{stem}")
        assert "cuda" in dispatchers[stem].implementations, f"csrc/cuda/{stem}.cu is used by no op"
        assert (ROOT / "csrc/cuda" / f"{stem}.cuh").exists()
    for path in (ROOT / "csrc/cuda").glob("*.cuh"):
        text = path.read_text()
        assert "#include <torch" not in text and "binding.h" not in text
        assert path.stem == "device" or "ot run on a GPU" in text


def test_without_the_extension_every_op_runs() -> None:
    """In a process of its own, where it was never loaded."""
    result = subprocess.run(
        [sys.executable, "-c", EVERY_OP], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    *ran, reason = result.stdout.splitlines()
    assert {*SOURCES, "lora_linear"} - {"module"} <= set(ran) and "was not built" in reason


@pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))
def test_the_extension_knows_the_processor() -> None:
    assert extension.instruction_set() in ("generic", "avx2", "avx512", "avx512bf16")


def test_every_source_is_an_op() -> None:
    """One stem through the tree: csrc/cpu/x.cpp is an implementation of fastlora/ops/x.py."""
    stems = set(SOURCES) - {"module"}
    assert stems and stems <= {path.stem for path in (ROOT / "fastlora/ops").glob("*.py")}
    for stem in stems:
        importlib.import_module(f"fastlora.ops.{stem}")
        assert "cpp" in dispatchers[stem].implementations, f"csrc/cpu/{stem}.cpp is used by no op"
