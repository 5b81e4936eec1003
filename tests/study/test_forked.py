"""A cell's process without Ray: it is asked to stop, and what is imported for it exists."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
import time
from pathlib import Path

from fastlora.study.forked import PRELOAD

COMMAND = """
import sys
from pathlib import Path
from fastlora.study.forked import run_forked
from tests.study.configs import quick_cell
cell = quick_cell("one", "count", {"trainer.steps": 1000}, seconds=0.1)
print(run_forked(cell, Path(sys.argv[1]), 1, Path.cwd(), preload=False).state)
"""


def test_what_is_imported_beforehand_exists() -> None:
    """The server would not say so."""
    assert all(importlib.util.find_spec(name) for name in PRELOAD)


def test_ctrl_c_reaches_the_cell_where_a_shell_s_background_ignores_it(tmp_path: Path) -> None:
    command = subprocess.Popen(
        [sys.executable, "-c", COMMAND, tmp_path],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "metrics.jsonl").exists():
            assert time.monotonic() < deadline and command.poll() is None, "the cell did not start"
            time.sleep(0.1)
        command.send_signal(signal.SIGINT)
        printed, _ = command.communicate(timeout=60)
    finally:
        command.kill()
    assert printed == "stopped\n" and (tmp_path / "saved").exists()
