"""compute-sanitizer over every GPU kernel: addresses outside of allocations (memcheck), races in shared memory (racecheck)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FOUND = 9
"""Exit status that we ask for when the tool has found something."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer, of the CUDA toolkit, is not installed"),
]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_kernels_are_clean(tool: str) -> None:
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, "-m", "tests.gpu.sanitized"]
    # torch's caching allocator would hide a read behind the end of a tensor in its own larger block.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": os.pathsep.join([".", "kernels"])}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, f"{tool}:\n{done.stdout[-4000:]}{done.stderr[-2000:]}"
