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
    "trainer.steps": "5",
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


def wanted_rank(folder: Path, first: int, last: int) -> int:
    """Of layer 0, from the rows of these steps: two layers, Σ r = 8, power 4, norms over s √r with s = 32 / r."""
    shares = []
    for step in range(first, last + 1):
        squares = [0.0, 0.0]
        for row in pq.read_table(folder / "gradient_profile.parquet").to_pylist():
            if row["step"] == step:
                squares[row["layer"]] += (row["norm"] / (32 / row["rank"] * row["rank"] ** 0.5)) ** 2
        shares.append(squares[0] ** 0.5 / (squares[0] ** 0.5 + squares[1] ** 0.5))
    share = sum(shares) / len(shares)
    return min(7, max(1, round(8 * share**4 / (share**4 + (1 - share) ** 4))))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two whole runs in one folder: `moving`, and `fixed`, the same without [reallocation]; and the config of the first."""
    folder = tmp_path_factory.mktemp("reallocation")
    fixed = write_config(folder, **{key: value for key, value in MOVING.items() if not key.startswith("reallocation")})
    assert run(fixed, "--name", "fixed") == 0
    assert run(write_config(folder, **MOVING), "--name", "moving") == 0
    return folder


def test_a_run_shows_its_changed_ranks_everywhere(runs: Path) -> None:
    folder = runs / "runs" / "moving"
    ranks = ranks_by_step(folder)
    assert ranks[1] == ranks[2] == {0: 3, 1: 5} and ranks[3] == ranks[4] != ranks[2] and ranks[5] != ranks[4]
    assert all(sum(layers.values()) == 8 for layers in ranks.values())
    assert ranks[3][0] == wanted_rank(folder, 1, 2) and ranks[5][0] == wanted_rank(folder, 3, 4)
    metrics = rows(folder)
    moved = {row["step"]: row["reallocation/moved_rank"] for row in metrics if "reallocation/moved_rank" in row}
    assert moved == {step: 7 * abs(ranks[step][0] - ranks[step - 1][0]) for step in (3, 5)}
    assert all(0 < row["reallocation/delta_w_error"] < 1 for row in metrics if row["step"] in (3, 5))

    summary, adapter = RunSummary.read(folder), adapter_tensors(folder)
    peft = json.loads((folder / "adapter" / "adapter_config.json").read_text())["rank_pattern"]
    for layer, rank in ranks[5].items():
        name = f"model.layers.{layer}.mlp.up_proj"
        assert summary.rank_pattern[name] == rank == len(adapter[f"base_model.model.{name}.lora_A.weight"])
        assert peft["^" + re.escape(name)] == rank
    report = (folder / "report.html").read_text()
    assert "Ranks over the run" in report
    for step, count in moved.items():
        assert f'<td class="number">{step - 1}</td><td class="number">{count:.0f}</td>' in report


def test_until_the_first_reallocation_nothing_differs(runs: Path) -> None:
    moving, fixed = (runs / "runs" / name for name in ("moving", "fixed"))
    assert rows(moving)[:2] == rows(fixed)[:2] and rows(moving)[2] != rows(fixed)[2]
    first, second = (pq.read_table(folder / "gradient_profile.parquet").to_pylist() for folder in (moving, fixed))
    assert [row for row in first if row["step"] < 3] == [row for row in second if row["step"] < 3]
    assert "Ranks over the run" not in (fixed / "report.html").read_text()


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
    "after": (session, "_build", lambda config, console, checkpoint: checkpoint.step == checkpoint.state["reallocation"]["step"] == 4),
    "next step": (MetricsWriter, "step", lambda writer, step, metrics: step == 5),
}
"""Moment of the second reallocation -> the function at whose call the process dies, and at which call."""


def run_and_die(moment: str, *arguments: str) -> None:
    """In a process of its own: SIGKILL, so that nothing can be tidied up."""
    owner, name, when = MOMENTS[moment]
    original = getattr(owner, name)

    def dying(*of_call: Any) -> Any:
        if when(*of_call):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*of_call)

    setattr(owner, name, dying)
    torch.set_num_threads(1)
    run(Path(arguments[0]), *arguments[1:])


def test_a_run_killed_again_and_again_ends_in_the_bits_of_an_unbroken_one(runs: Path) -> None:
    """SIGKILL before, during and after the second reallocation, five times the same run."""
    processes = multiprocessing.get_context("forkserver")  # imports torch once; each run is a fork of that server
    processes.set_forkserver_preload([__name__])
    killed = runs / "runs" / "killed"
    arguments = (str(runs / "config.toml"), "--name", "killed")
    for moment in MOMENTS:
        process = processes.Process(target=run_and_die, args=(moment, *arguments))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, moment
        arguments = ("--resume", str(killed))
    assert [row["step"] for row in rows(killed)] == [1, 2, 3, 4], "the row of step 5 was about to be written"
    assert run(Path(arguments[0]), *arguments[1:]) == 0
    assert_same_run(runs / "runs" / "moving", killed)


def test_a_failure_and_ctrl_c_while_ranks_move(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure leaves the state before, saved. Ctrl-C stops with the state after it, and does not start the next phase."""
    carry = trainer_module.carry

    def failing(*_: Any, **__: Any) -> Any:
        raise MemoryError

    def interrupted(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return carry(*arguments, **options)

    stopped = runs / "runs" / "stopped"

    def reallocation_state() -> Any:
        return json.loads((stopped / "checkpoints" / "step-000002" / "state.json").read_text())["reallocation"]

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "carry", failing)
        with pytest.raises(MemoryError):
            run(runs / "config.toml", "--name", "stopped")
        assert reallocation_state() is None
        patch.setattr(trainer_module, "carry", interrupted)
        assert run(Path("--resume"), str(stopped)) == 130
        assert reallocation_state()["step"] == 2 and len(rows(stopped)) == 2
    assert run(Path("--resume"), str(stopped)) == 0
    assert_same_run(runs / "runs" / "moving", stopped)


def test_sft_with_modules_of_their_own_rank_and_one_model_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By module, r_min = 0, some of rank 0 at the start; a phase's model is gone when the next one is built."""
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
    assert sum(ranks.values()) == 2 * (3 + 5 * 4) and len(set(ranks.values())) > 2


def test_where_nothing_moves_nothing_is_built_anew(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own strategy that wants what is there: the run is that without reallocation."""
    (tmp_path / "own.py").write_text("def keep(scores_l, budget, **bounds):\n    assert len(scores_l) == 2\n    return [3, budget - 3]\n")
    built = []
    build = session.build
    monkeypatch.setattr(session, "build", lambda *arguments: built.append(0) or build(*arguments))
    assert run(runs / "config.toml", "--name", "kept", "--reallocation.strategy", f"{tmp_path / 'own.py'}:keep") == 0
    assert len(built) == 1
    kept, fixed = (adapter_tensors(runs / "runs" / name) for name in ("kept", "fixed"))
    assert all(torch.equal(kept[name], fixed[name]) for name in fixed)
    moved = {row["step"]: row["reallocation/moved_rank"] for row in rows(runs / "runs" / "kept") if "reallocation/moved_rank" in row}
    assert moved == {3: 0.0, 5: 0.0}
