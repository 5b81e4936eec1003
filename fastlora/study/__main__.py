"""Run a study and report on it: every cell once, in parallel, resumable at any moment.

    python -m fastlora.study rank-allocation --config configs/studies/rank_allocation_cpu.toml
    python -m fastlora.study placement --config F --dry-run                  the first stage's cells, nothing is run
    python -m fastlora.study --study my_study.py:MyStudy --config F          one's own study

Given again after a stop or a failure, the command keeps what is finished and goes on with the rest.
Exit status: 0 done, 1 cells failed, 2 the request cannot work, 130 stopped.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from fastlora.config import ConfigError
from fastlora.errors import FastloraError
from fastlora.study.cells import Cell, add_names
from fastlora.study.config import STUDIES, StudyConfig, differences, load_study_config
from fastlora.study.schedule import CELLS_FOLDER, Scheduler, StudyStoppedError, ray_running
from fastlora.study.studies import Plan, Study, load_study
from fastlora.study.tasks import load_task
from fastlora.study.worker import FINISHED_FILE, LOCK_FILE, locked


@dataclass(frozen=True)
class Arguments:
    """What the command takes."""

    config: Path
    """The study's file (TOML)."""
    name: Annotated[str | None, tyro.conf.Positional] = None
    """rank-allocation, layer-selection, placement or reward-density."""
    study: str | None = None
    """In place of the name: one's own study, `path/to/file.py:Class`."""
    seeds: str | None = None
    """Seeds instead of the file's: 0,1,2."""
    ray_address: str | None = None
    """A Ray cluster's address (host:port, or auto); default: this machine, where Ray is started and ended."""
    out: Path | None = None
    """Folder for cells and report; default: the config's output_dir and the file's name."""
    dry_run: bool = False
    """List the first stage's cells with their keys and settings, and run nothing."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    console = Console(stderr=True, highlight=False)
    arguments = tyro.cli(Arguments, args=argv, prog="python -m fastlora.study", description=__doc__)
    try:
        config = _config(arguments)
        study = load_study(config)
        out = arguments.out or config.output_dir / arguments.config.stem
        if arguments.dry_run:
            _list_cells(next(study.plan(), ()), config, out)
            return 0
        out.mkdir(parents=True, exist_ok=True)
        with locked(out / LOCK_FILE, 0.0), ray_running(arguments.ray_address) as ray:
            scheduler = Scheduler(ray, out, config.resources, config.max_retries, console)
            folders = run_stages(study.plan(), scheduler)
        _report(study, folders, shlex.join(["python", "-m", "fastlora.study", *argv]), out)
    except (StudyStoppedError, KeyboardInterrupt) as error:
        again = shlex.join(["python", "-m", "fastlora.study", *argv])
        console.print(f"Stopped{f': {error}' if str(error) else ''}. Go on with: {again}", markup=False, soft_wrap=True)
        return 130
    except FastloraError as error:
        console.print(f"{type(error).__name__}: {error}", markup=False, soft_wrap=True)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def run_stages(plan: Plan, scheduler: Scheduler) -> dict[str, Path]:
    """Runs a plan to its end; {cell name: folder} of all stages."""
    folders: dict[str, Path] = {}
    done: Mapping[str, Path] | None = None
    while True:
        try:
            cells = next(plan) if done is None else plan.send(done)
        except StopIteration:
            return folders
        _check_tasks(cells)
        done = scheduler.run(cells)
        folders |= done


def _check_tasks(cells: Sequence[Cell]) -> None:
    for task in {cell.task for cell in cells}:
        load_task(task)


def _config(arguments: Arguments) -> StudyConfig:
    """The study's config; the command must name the study that the file is for."""
    asked = arguments.study or arguments.name
    if asked is None or (arguments.study and arguments.name):
        raise ConfigError(f"name one study: {', '.join(STUDIES)}, or --study path/to/file.py:Class")
    seeds = None
    if arguments.seeds is not None:
        try:
            seeds = [int(seed) for seed in arguments.seeds.split(",")]
        except ValueError:
            raise ConfigError(f"--seeds {arguments.seeds}: whole numbers with commas between them, like 0,1,2") from None
    config = load_study_config(arguments.config, seeds=seeds)
    if asked != config.study:
        raise ConfigError(f"{arguments.config} is for study = {config.study!r}, and the command asks for {asked!r}")
    return config


def _list_cells(cells: Sequence[Cell], config: StudyConfig, out: Path) -> None:
    keys, base = add_names(cells, {}), config.base_run()
    _check_tasks(cells)
    console = Console(highlight=False)
    for cell in cells:
        key = keys[cell.name]
        state = "finished" if (out / CELLS_FOLDER / key / FINISHED_FILE).exists() else "to run"
        parameters = {**differences(cell.config, base), **cell.options}
        settings = " ".join(f"{name}={json.dumps(value, default=str)}" for name, value in parameters.items())
        console.print(f"{key}  {state}  {cell.name}  {cell.task}  {settings}", markup=False, soft_wrap=True)
    resources = config.resources
    console.print(f"{len(cells)} cells in stage 1, {resources.cpus} CPUs and {resources.gpus:g} GPUs each; later stages follow from these")


def _report(study: Study, folders: Mapping[str, Path], command: str, out: Path) -> None:
    """report.html, report.md and the tables' CSVs, in `out`."""
    from fastlora.study.report import write_study_report  # matplotlib and the runs' readers, only now

    html, markdown, tables = write_study_report(study.report(folders, command), out)
    console = Console(highlight=False)
    console.print(f"report: {html}\n        {markdown}\n        {len(tables)} tables beside it (CSV)", markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
