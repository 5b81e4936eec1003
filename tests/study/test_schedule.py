"""Cells on a real Ray: side by side, once each, retried when they die, named when they fail; what the view shows of them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

import fastlora
from fastlora.config import ConfigError
from fastlora.study import progress
from fastlora.study.config import ResourcesConfig
from fastlora.study.progress import Job, StageProgress
from fastlora.study.schedule import Scheduler, StudyError
from fastlora.study.worker import ATTEMPT_FILE
from tests.study.configs import quick_cell as cell

pytestmark = pytest.mark.xdist_group("ray")


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=120)


@pytest.fixture
def scheduler(ray: ModuleType, tmp_path: Path, console: Console) -> Callable[..., Scheduler]:
    """A new scheduler of the same output folder, as a repeated command makes one."""

    def make(max_retries: int = 0, **resources: Any) -> Scheduler:
        return Scheduler(ray, tmp_path / "out", ResourcesConfig(**resources), max_retries, console)

    return make


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def finished(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "finished.json").read_text())
    return result


def test_cells_run_side_by_side_once_each(scheduler: Callable[..., Scheduler], tmp_path: Path, console: Console) -> None:
    cells = [cell(f"seed-{seed}", "write", {"seed": seed}, seconds=1.0, together=2) for seed in (0, 1)]
    twin = cell("the same as seed-1", "write", {"seed": 1}, seconds=1.0, together=2)
    folders = scheduler().run([*cells, twin])
    assert json.loads((tmp_path / "out" / "cells.json").read_text()) == {name: folder.name for name, folder in folders.items()}
    assert folders["seed-1"] == folders[twin.name] != folders["seed-0"]
    rows = [[float(x) for x in (folders[one.name] / "ran.txt").read_text().split()] for one in cells]
    assert [row[0] for row in rows] == [0, 1]  # one line each: four numbers, or float() had failed
    assert max(row[1] for row in rows) < min(row[2] for row in rows), "two cells of one CPU each did not run at the same time"
    assert rows[0][3] != rows[1][3]
    done = finished(folders["seed-1"])
    assert done["name"] == "seed-1" and done["key"] == cells[1].key and done["attempts"] == 1
    assert 1.0 <= rows[1][2] - rows[1][1] <= done["seconds"] < rows[1][2] - rows[1][1] + 5
    assert "seed 1" in (folders["seed-1"] / "log.txt").read_text()
    assert "seed-1: running" in written(console) and "seed-1: finished" in written(console)

    assert scheduler().run(cells) == {one.name: folders[one.name] for one in cells}
    assert all(len((folders[one.name] / "ran.txt").read_text().splitlines()) == 1 for one in cells)
    assert "2 of 2 cells were finished before" in written(console)


def test_a_cell_sees_its_own_machine(scheduler: Callable[..., Scheduler]) -> None:
    one = cell("one", "machine")
    folder = scheduler(cpus=2).run([one])["one"]
    seen = json.loads((folder / "machine.json").read_text())
    assert seen["threads"] == 2 and seen["omp"] == "2" and seen["cwd"] == str(Path.cwd())
    assert Path(seen["fastlora"]) == Path(fastlora.__file__)
    assert Path(seen["output_dir"]) / seen["name"] == folder.absolute()


def test_a_cell_s_peak_memory_is_its_own(scheduler: Callable[..., Scheduler]) -> None:
    folders = scheduler(cpus=2).run([cell("hungry", "peak", mib=1024), cell("modest", "peak", mib=0)])  # one after the other
    hungry, modest = (int((folders[name] / "peak").read_text()) for name in ("hungry", "modest"))
    assert hungry > modest + (900 << 20)


def test_a_worker_that_dies_is_started_again(scheduler: Callable[..., Scheduler], console: Console) -> None:
    cells = [cell(how, "die", times=1, how=how) for how in ("kill", "exit")]
    for name, folder in scheduler(max_retries=1).run(cells).items():
        assert finished(folder)["attempts"] == 2 and (folder / "deaths").read_text() == "xx"
        assert f"{name}: its process died" in written(console)
    assert written(console).count("trying again (1 of 1 retries)") == 2


def test_failures_are_named_after_all_others_finished(scheduler: Callable[..., Scheduler], tmp_path: Path) -> None:
    cells = [
        cell("always dies", "die", times=9, how="kill"),
        cell("explodes", "explode"),
        cell("refuses", "refuse"),
        cell("good", "write"),
    ]
    with pytest.raises(StudyError) as caught:
        scheduler(max_retries=1).run(cells)
    message = str(caught.value)
    assert message.startswith("3 of 4 cells failed; the others are finished and kept.")
    assert "always dies, attempt 2: its process died" in message and "the last words" in message
    assert "explodes, attempt 2: ZeroDivisionError: no luck" in message and 'raise ZeroDivisionError("no luck")' in message
    assert "refuses, attempt 1: ConfigError: lora.r: too large for this model" in message
    folders = {one.name: tmp_path / "out" / "cells" / one.key for one in cells}
    assert (folders["explodes"] / "attempts").read_text() == "xx"
    assert (folders["refuses"] / "attempts").read_text() == "x", "an error that says what to mend is not tried again"
    assert {name for name, folder in folders.items() if (folder / "finished.json").exists()} == {"good"}


def test_impossible_stages_are_refused_before_anything_runs(scheduler: Callable[..., Scheduler], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two cells are named 'a'"):
        scheduler().run([cell("a", "write"), cell("a", "write", {"seed": 1})])
    with pytest.raises(ConfigError, match=r"resources.cpus = 4096, and the largest machine has \d+: no cell could ever start"):
        scheduler(cpus=4096)
    with pytest.raises(ConfigError, match=r"resources\.gpus = 64"):
        scheduler(gpus=64)
    assert not (tmp_path / "out").exists()
    assert scheduler().run([]) == {}


def jobs(folder: Path) -> list[Job]:
    """One of each state: waiting, running at step 2 of 4, finished, failed."""
    made = [Job(cell(name, "count", {"trainer.steps": 4}), folder / name) for name in ("waits", "runs", "done", "broken")]
    for job in made:
        job.folder.mkdir()
    made[1].attempt = 2
    (made[1].folder / ATTEMPT_FILE).touch()
    rows = [{"step": step, "reward/mean": 0.5, "seconds/sampling": 20.0, "seconds/update": 10.0, "loss": None} for step in (1, 2)]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "rew'  # a row that is being written
    (made[1].folder / "metrics.jsonl").write_text(text)
    made[2].state = "finished"
    (made[2].folder / "finished.json").write_text('{"seconds": 61.2}')
    made[3].state = "failed"
    return made


def test_a_terminal_shows_every_cell(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, height=40)
    with StageProgress(jobs(tmp_path), console) as view:
        view.note("hello [bold]")
    shown = written(console)
    for text in ("1 of 4 cells finished", "1 running", "runs", "running (attempt 2)", "step 2/4", "reward 0.5", "0:01:00 left", "0:01:01",
                 "failed", "waiting", "hello [bold]"):  # fmt: skip
        assert text in shown, text
    assert shown.endswith("\x1b[?25h"), "the cursor must come back"


def test_more_cells_than_lines(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, height=7)
    with StageProgress(jobs(tmp_path), console):
        pass
    shown = written(console)
    assert "… and 1 more" in shown and "broken" in shown and "runs" in shown and "waits" not in shown


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    cells = jobs(tmp_path)
    with StageProgress(cells, console) as view:
        cells[0].state, cells[0].message = "failed", "no luck"
        view.update()
    lines = written(console).splitlines()
    assert lines[0] == "1 of 4 cells were finished before"
    assert "waits: failed   no luck" in lines
    assert any(line.startswith("runs: running (attempt 2)   step 2/4   reward 0.5") and line.endswith("0:01:00 left") for line in lines)
    assert any(line.startswith("1 of 4 cells finished   1 running") for line in lines)
    assert not any(ord(character) < 32 for line in lines for character in line), "control characters in a log file"
