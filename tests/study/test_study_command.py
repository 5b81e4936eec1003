"""`python -m fastlora.study`: from a file to a report; refusals by name; killed or stopped at any moment, it loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from fastlora.metrics import RunSummary
from fastlora.study.__main__ import main
from fastlora.study.worker import locked
from tests.study.configs import HERE, LITTLE, write_study

REPOSITORY = HERE.parents[1]

pytestmark = pytest.mark.xdist_group("ray")


def command(study: Path, *more: str, name: str = LITTLE) -> list[str]:
    return ["--study", name, "--config", str(study), "--out", str(study.parent / "out"), *more]


def cell_folders(study: Path) -> dict[str, Path]:
    """{name: folder} of the cells so far."""
    out = study.parent / "out"
    return {name: out / "cells" / key for name, key in json.loads((out / "cells.json").read_text()).items()}


@pytest.mark.usefixtures("ray")
def test_from_a_file_to_a_report_and_nothing_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = write_study(tmp_path, "[own]\ntask = 'write'\n")
    assert main(command(study, "--seeds", "0,1")) == 0
    shown = capsys.readouterr()
    assert "report.html" in shown.out and "second: finished" in shown.err
    folders = cell_folders(study)
    assert [*folders] == ["first/seed-0", "first/seed-1", "second"]
    assert all((folder / "finished.json").exists() for folder in folders.values())
    assert folders["second"].name in (tmp_path / "out" / "cells.csv").read_text()
    assert main(command(study, "--seeds", "0,1")) == 0
    assert all(len((folder / "ran.txt").read_text().splitlines()) == 1 for folder in folders.values())


def test_dry_run_lists_the_first_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = write_study(tmp_path, "[own]\ntask = 'write'\n[run]\noptim.lr = 1e-4\n")
    assert main(command(study, "--dry-run")) == 0
    *cells, last = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in cells] == ["first/seed-0", "first/seed-1", "first/seed-2"]
    assert all(len(line.split()[0]) == 16 and "  to run  " in line for line in cells)
    assert cells[1].endswith("quick_tasks.py:write  seed=1 seconds=0.0"), cells[1]
    assert last.startswith("3 cells in stage 1, 1 CPUs and 0 GPUs each")
    assert not (tmp_path / "out").exists()


def test_what_cannot_work_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = write_study(tmp_path, "[own]\ntask = 'nothing'\n")
    refused = {
        ("--config", str(study)): "name one study: rank-allocation, ",
        ("placement", *command(study)): "name one study: rank-allocation, ",
        ("placement", "--config", str(study)): "the command asks for 'placement'",
        (*command(study), "--seeds", "0,x"): "--seeds 0,x: whole numbers",
        (*command(study), "--seeds", "1,1"): "seeds: 1 stands there twice",
        (*command(study), "--dry-run"): "has no nothing",
        ("--study", LITTLE, "--config", str(tmp_path / "none.toml")): "none.toml: no such config file",
    }
    for arguments, message in refused.items():
        assert main([*arguments]) == 2, arguments
        assert message in capsys.readouterr().err, arguments


def test_a_second_command_on_the_same_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = write_study(tmp_path, "[own]\ntask = 'write'\n")
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out" / ".lock", 0.0):
        assert main(command(study)) == 1
    assert "another process writes" in capsys.readouterr().err


def test_a_missing_ray_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(command(write_study(tmp_path, "[own]\ntask = 'write'\n"))) == 1
    assert "pip install 'ray>=2.60'" in capsys.readouterr().err


@pytest.mark.usefixtures("ray")
def test_a_failed_cell_ends_the_command_with_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = write_study(tmp_path, "max_retries = 0\n[own]\ntask = 'explode'\n")
    assert main(command(study, "--seeds", "0")) == 1
    assert "first/seed-0, attempt 1: ZeroDivisionError: no luck" in capsys.readouterr().err


def start(study: Path, *more: str) -> subprocess.Popen[str]:
    """The command as a user starts it, leading a process group as in a terminal."""
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'kernels'}"}
    return subprocess.Popen(
        [sys.executable, "-m", "fastlora.study", *command(study, "--seeds", "0,1", *more)],
        cwd=study.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def counted(study: Path) -> list[int]:
    """Rows of metrics.jsonl, per cell of the first stage."""
    return [len(file.read_text().splitlines()) for file in sorted((study.parent / "out" / "cells").glob("*/metrics.jsonl"))]


def wait_until_both_count(process: subprocess.Popen[str], study: Path) -> None:
    deadline = time.monotonic() + 120
    while not (len(counted(study)) == 2 and min(counted(study)) >= 3):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


COUNTING = "[own]\ntask = 'count'\nseconds = 0.1\n[run]\ntrainer.steps = {}\n"


@pytest.mark.usefixtures("ray")
def test_killed_it_ends_its_workers_and_goes_on_later(tmp_path: Path) -> None:
    """SIGKILL, so that the command can tidy up nothing."""
    study = write_study(tmp_path, COUNTING.format(80))
    process = start(study)
    wait_until_both_count(process, study)
    process.kill()
    process.communicate()
    time.sleep(3.0)
    rows = counted(study)
    time.sleep(1.0)
    assert counted(study) == rows and max(rows) < 80, "workers outlive their command"
    assert main(command(study, "--seeds", "0,1")) == 0
    assert counted(study) == [80, 80]
    for file in (tmp_path / "out" / "cells").glob("*/metrics.jsonl"):
        assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [*range(1, 81)], "a step was done twice"


def test_ctrl_c_stops_the_cells_where_it_is_safe(tmp_path: Path, ray: ModuleType) -> None:
    """To the whole process group, as a terminal sends it. The cells run on a Ray that was there before."""
    study = write_study(tmp_path, COUNTING.format(80))
    process = start(study, "--ray-address", ray.get_runtime_context().gcs_address)
    wait_until_both_count(process, study)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    assert (
        "Stopped: 0 of 2 cells of this stage are finished, the others are saved. " in output
        and "Go on with: python -m fastlora.study --study" in output
    )
    assert "Traceback" not in output
    assert len([*(tmp_path / "out" / "cells").glob("*/saved")]) == 2
    rows = counted(study)
    assert main(command(study, "--seeds", "0,1")) == 0
    assert max(rows) < 80 and counted(study) == [80, 80]


@pytest.mark.slow
@pytest.mark.usefixtures("packaged_model", "ray")
def test_cells_train_the_real_model(tmp_path: Path) -> None:
    base = (REPOSITORY / "configs" / "smollm2_sums_cpu.toml").read_text()
    settings = [
        *("trainer.steps = 1", "rollout.num_prompts = 2", "rollout.num_generations = 4", "rollout.max_completion_length = 4"),
        *("eval.num_problems = 4", "eval.every = 0", "eval.required_gain = 0.9", "lora.rank_pattern = {}", "lora.r = 2"),
    ]
    name = f"{HERE / 'little_study.py'}:Trains"
    study = write_study(tmp_path, "seeds = [0]\n[run]\n" + "\n".join(settings), study=name, base=base)
    assert main(command(study, name=name)) == 0
    folders = cell_folders(study)
    first, second = (RunSummary.read(folders[one]) for one in ("first", "second"))
    assert first.steps == 1 and first.learned is False, "a run that missed its gain has finished like any other"
    assert second.accuracy_before == first.accuracy_after
    assert (folders["second"] / "report.html").exists() and "accuracy after training" in (folders["second"] / "log.txt").read_text()
