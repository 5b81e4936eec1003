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
EVERY_OP = """
import importlib, pkgutil
import torch
import fastlora.ops
from fastlora import extension
from fastlora.ops.registry import OpSpec, implementation_counts

extension.LIBRARY = extension.LIBRARY.with_name("never_built.so")
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
    extension.missing.cache_clear()
    yield
    extension.missing.cache_clear()


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
