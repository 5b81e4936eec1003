"""Many cells, one engine: real cells of SmolLM2 on one real vLLM, which is killed under them; cells that cannot share are refused."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from rich.console import Console

from fastlora.config import ConfigError, RunConfig, read_toml, validated
from fastlora.study.cells import Cell
from fastlora.study.config import ResourcesConfig, derive, load_study_config
from fastlora.study.engine import LOG_FILE, shared_engine
from fastlora.study.schedule import Scheduler
from tests.study.configs import HERE, write_study

BASE = HERE.parents[1] / "configs" / "smollm2_sums_cpu.toml"
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed (make setup-vllm)")


def cell(rank: int, **changes: Any) -> Cell:
    """Three steps of a uniform rank."""
    short = {
        "rollout": {"sampler": "vllm", "num_prompts": 4, "num_generations": 4, "max_completion_length": 4},
        "lora": {"rank_pattern": {}, "r": rank},
        "trainer.steps": 3,
        "eval": {"num_problems": 8, "every": 0},
    }
    return Cell(f"rank-{rank}", derive(validated(RunConfig, read_toml(BASE), str(BASE)), short | changes, "cell"))


def engines() -> list[psutil.Process]:
    """Leaders of vLLM's process groups that this process has started; other workers of pytest have theirs."""
    children = psutil.Process().children()
    return [one for one in children if one.status() != psutil.STATUS_ZOMBIE and "fastlora.rollout.vllm.serve" in one.cmdline()]


@needs_vllm
@pytest.mark.slow
@pytest.mark.xdist_group("vllm")  # after the other engines, not beside them
@pytest.mark.timeout(600)
def test_cells_of_other_ranks_share_one_engine_that_dies_once(ray: ModuleType, tmp_path: Path) -> None:
    before = {process.pid for process in engines()}  # of the tests that ran before in this process
    out, console = tmp_path / "out", Console(file=io.StringIO(), width=200)
    killed = threading.Event()

    def kill_after_the_first_step() -> None:
        while not [*out.glob("cells/*/metrics.jsonl")]:
            time.sleep(0.05)
        (leader,) = (process for process in engines() if process.pid not in before)
        leader.children(recursive=True)[-1].kill()
        killed.set()

    killer = threading.Thread(target=kill_after_the_first_step, daemon=True)
    killer.start()
    folders = Scheduler(ray, out, ResourcesConfig(cpus=1, engine="shared"), 0, console).run([cell(2), cell(9)])
    assert killed.is_set()
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    assert "starting one vLLM for 2 cells, 2 at once" in said and "the cells' engine has died; starting it again (1 of 3)" in said
    commands = [line for line in (out / LOG_FILE).read_text().splitlines() if line.startswith("$ ")]
    assert len(commands) == 2 and all("--max-lora-rank 16 --max-loras 4" in line for line in commands)
    for folder in folders.values():
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3]
        # The first step's version was published for the evaluation before it.
        assert all(row["sampler/canary_max_abs"] <= row["sampler/canary_tolerance"] for row in rows[1:])
        assert json.loads((folder / "finished.json").read_text())["attempts"] == 1
        assert not re.search("starting vLLM's engine", (folder / "log.txt").read_text()), "it has started one of its own"
    assert {process.pid for process in engines()} <= before


def test_cells_of_two_base_models_are_refused(tmp_path: Path) -> None:
    cells = [cell(2), cell(9, model={"name": "smollm2-135m-instruct", "dtype": "float32"})]
    with (
        pytest.raises(ConfigError, match=r"resources.engine = 'shared': cell 'rank-9' has other settings in \[model\] or \[vllm\]"),
        shared_engine(cells, 2, tmp_path, print),
    ):
        pass


def test_no_engine_where_no_cell_can_share(tmp_path: Path) -> None:
    with shared_engine([cell(2, rollout={"sampler": "torch"}), cell(3, vllm={"weights": "merged"})], 2, tmp_path, print) as variables:
        assert variables == {}


def test_a_shared_engine_without_vllm_is_refused(tmp_path: Path) -> None:
    path = write_study(tmp_path, '[resources]\nengine = "shared"\n')
    with pytest.raises(ConfigError, match=r"resources.engine = 'shared' is vLLM's, and rollout.sampler = 'torch'"):
        load_study_config(path)
