"""Runs whose ranks move: what they leave behind, and the same bits whenever they are killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import weakref
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from fastlora import checkpoint as checkpoint_module
from fastlora import session
from fastlora import trainer as trainer_module
from fastlora.metrics import MetricsWriter, RunSummary
from tests.trainer.runs import adapter_tensors, run, write_config
from tests.trainer.test_run import assert_same_run, rows

MOVING = {
    "trainer.steps": "6",
    "trainer.checkpoint_every": "1",
    "lora.rank_pattern": '{ "layers\\\\.0\\\\..*" = 3, "layers\\\\.1\\\\..*" = 5 }',
    "reallocation.every": "2",
    "reallocation.power": "4.0",
    "reallocation.r_max": "7",
}
"""Two layers, Σ r = 8 by layer; a high power, so that ranks move at both times, after steps 2 and 4."""


def ranks_by_step(folder: Path) -> dict[int, dict[int, int]]:
    """Step -> layer -> rank, from the gradient profile; every module of a layer must have the same."""
    found: dict[int, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for row in pq.read_table(folder / "gradient_profile.parquet").to_pylist():
        found[row["step"]][row["layer"]].add(row["rank"])
    return {step: {layer: ranks.pop() for layer, ranks in layers.items() if len(ranks) == 1} for step, layers in found.items()}


def test_a_run_shows_its_changed_ranks_everywhere(tmp_path: Path) -> None:
    config = write_config(tmp_path, **MOVING)
    assert run(config, "--name", "a") == 0
    folder = tmp_path / "runs" / "a"
    ranks = ranks_by_step(folder)
    assert ranks[1] == ranks[2] == {0: 3, 1: 5} and ranks[3] == ranks[4] != ranks[2] and ranks[5] == ranks[6] != ranks[4]
    assert all(sum(layers.values()) == 8 for layers in ranks.values())
    metrics = rows(folder)
    moved = {row["step"]: row["reallocation/moved_rank"] for row in metrics if "reallocation/moved_rank" in row}
    assert moved == {step: 7 * abs(ranks[step][0] - ranks[step - 1][0]) for step in (3, 5)}
    assert all(0 < row["reallocation/delta_w_error"] < 1 for row in metrics if row["step"] in (3, 5))

    summary, adapter = RunSummary.read(folder), adapter_tensors(folder)
    peft = json.loads((folder / "adapter" / "adapter_config.json").read_text())["rank_pattern"]
    for layer, rank in ranks[6].items():
        name = f"model.layers.{layer}.mlp.up_proj"
        assert summary.rank_pattern[name] == rank == len(adapter[f"base_model.model.{name}.lora_A.weight"])
        assert peft["^" + re.escape(name)] == rank
    report = (folder / "report.html").read_text()
    assert "Ranks over the run" in report
    for step, count in moved.items():
        assert f'<td class="number">{step - 1}</td><td class="number">{count:.0f}</td>' in report


def test_until_the_first_reallocation_nothing_differs(tmp_path: Path) -> None:
    config = write_config(tmp_path, **MOVING)
    assert run(config, "--name", "moving") == 0
    fixed = write_config(tmp_path, **{key: value for key, value in MOVING.items() if not key.startswith("reallocation")})
    assert run(fixed, "--name", "fixed") == 0
    moving, still = (tmp_path / "runs" / name for name in ("moving", "fixed"))
    assert rows(moving)[:2] == rows(still)[:2] and rows(moving)[2] != rows(still)[2]
    first, second = (pq.read_table(folder / "gradient_profile.parquet").to_pylist() for folder in (moving, still))
    assert [row for row in first if row["step"] < 3] == [row for row in second if row["step"] < 3]
    assert "Ranks over the run" not in (still / "report.html").read_text()


def is_the_new_one(temporary: Path, final: Path) -> bool:
    """The checkpoint of step 4 takes the place of one from before the reallocation."""
    return final.name == "step-000004" and final.exists()


def is_between_the_renames(old: Path, new: Path) -> bool:
    """The one from before has stepped aside."""
    return new.name == "step-000004" and new.with_name(".replaced-step-000004").exists()


MOMENTS: dict[str, tuple[Any, str, Callable[..., bool]]] = {
    "before": (trainer_module.Trainer, "_reallocate", lambda trainer, writer: trainer.done.step == 4),
    "written": (checkpoint_module, "_publish", is_the_new_one),
    "half published": (os, "rename", is_between_the_renames),
    "after": (session, "_build", lambda config, console, checkpoint: checkpoint is not None and checkpoint.step == 4),
    "next step": (MetricsWriter, "step", lambda writer, step, metrics: step == 5),
}
"""Moment of the second reallocation -> the function at whose call the process dies, and at which call."""


def run_and_die(config: Path, moment: str) -> None:
    """In a process of its own: SIGKILL, so that nothing can be tidied up."""
    owner, name, when = MOMENTS[moment]
    original = getattr(owner, name)

    def dying(*arguments: Any) -> Any:
        if when(*arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    setattr(owner, name, dying)
    torch.set_num_threads(1)
    run(config, "--name", moment)


def test_a_killed_run_ends_in_the_bits_of_an_unbroken_one(tmp_path: Path) -> None:
    """SIGKILL before, during and after the second reallocation."""
    config = write_config(tmp_path, **MOVING)
    assert run(config, "--name", "whole") == 0
    processes = multiprocessing.get_context("forkserver")  # imports torch once; each run is a fork of that server
    processes.set_forkserver_preload([__name__])
    killed = {moment: processes.Process(target=run_and_die, args=(config, moment)) for moment in MOMENTS}
    for moment, process in killed.items():
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, moment
        assert run(Path("--resume"), str(tmp_path / "runs" / moment)) == 0
        assert_same_run(tmp_path / "runs" / "whole", tmp_path / "runs" / moment)


def test_ctrl_c_while_ranks_move_stops_there_and_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes while the new state is computed: the run stops with it saved, and does not start the next phase."""
    config = write_config(tmp_path, **MOVING)
    assert run(config, "--name", "whole") == 0
    carry = trainer_module.carry

    def interrupted(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return carry(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "carry", interrupted)
        assert run(config, "--name", "stopped") == 130
    stopped = tmp_path / "runs" / "stopped"
    assert [row["step"] for row in rows(stopped)] == [1, 2]
    state = json.loads((stopped / "checkpoints" / "step-000002" / "state.json").read_text())
    assert state["reallocation"]["step"] == 2
    assert run(Path("--resume"), str(stopped)) == 0
    assert_same_run(tmp_path / "runs" / "whole", stopped)


def test_a_failure_while_ranks_move_leaves_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(tmp_path, **{**MOVING, "trainer.checkpoint_every": "0"})
    assert run(config, "--name", "whole") == 0

    def failing(*_: Any, **__: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "carry", failing)
        with pytest.raises(MemoryError):
            run(config, "--name", "failed")
    failed = tmp_path / "runs" / "failed"
    assert json.loads((failed / "checkpoints" / "step-000002" / "state.json").read_text())["reallocation"] is None
    assert run(Path("--resume"), str(failed)) == 0
    assert_same_run(tmp_path / "runs" / "whole", failed)


def test_sft_with_modules_of_their_own_rank_and_one_model_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By module, r_min = 0, rank 0 at the start; a phase's model is gone when the next one is built."""
    models: list[weakref.ref[torch.nn.Module]] = []
    build = session.build

    def watched(*arguments: Any) -> Any:
        assert all(model() is None for model in models), "two models at once"
        parts = build(*arguments)
        models.append(weakref.ref(parts.model.module))
        return parts

    monkeypatch.setattr(session, "build", watched)
    changes = {
        "objective": '"sft"',
        "rollout.num_generations": "1",
        "advantage.scale_rewards": '"none"',
        "reallocation.unit": '"module"',
        "reallocation.r_min": "0",
        "reallocation.r_max": "20",
        "lora.rank_pattern": "{ k_proj = 0, q_proj = 3 }",
    }
    config = write_config(tmp_path, **{**MOVING, **changes})
    assert run(config, "--name", "a") == 0
    assert len(models) == 3
    folder = tmp_path / "runs" / "a"
    ranks = RunSummary.read(folder).rank_pattern
    assert sum(ranks.values()) == 2 * (3 + 5 * 4) and len(set(ranks.values())) > 2 and not any("k_proj" in name for name in ranks)


def test_equal_layers_keep_their_ranks_and_their_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """power = 0 from uniform ranks: nothing moves, nothing is built anew, and the run is that without reallocation."""
    built = []
    build = session.build
    monkeypatch.setattr(session, "build", lambda *arguments: built.append(0) or build(*arguments))
    changes = {**MOVING, "lora.rank_pattern": "{}", "reallocation.power": "0.0"}
    assert run(write_config(tmp_path, **changes), "--name", "a") == 0
    assert len(built) == 1
    fixed = {key: value for key, value in changes.items() if not key.startswith("reallocation")}
    assert run(write_config(tmp_path, **fixed), "--name", "fixed") == 0
    first, second = (adapter_tensors(tmp_path / "runs" / name) for name in ("a", "fixed"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    moved = {row["step"]: row["reallocation/moved_rank"] for row in rows(tmp_path / "runs" / "a") if "reallocation/moved_rank" in row}
    assert moved == {3: 0.0, 5: 0.0}
