"""A study of one's own, in two stages: numbers first, then one cell made from their files. `--study tests/study/little_study.py:Little`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fastlora.study.cells import Cell
from fastlora.study.config import StudyConfig
from fastlora.study.studies import Plan

if TYPE_CHECKING:
    from fastlora.study.report import StudyReport

TASKS = Path(__file__).with_name("quick_tasks.py")


class Little:
    """Stage 1: a cell a seed, of the task that [own] names. Stage 2: one that depends on what the first left behind."""

    def __init__(self, config: StudyConfig) -> None:
        self.config = config

    def plan(self) -> Plan:
        own = self.config.own
        options = {"seconds": own.get("seconds", 0.0)}
        folders = yield [
            Cell(f"first/seed-{seed}", self.config.run_config({"seed": seed}), f"{TASKS}:{own['task']}", options)
            for seed in self.config.seeds
        ]
        files = sum(len(list(folder.iterdir())) > 0 for folder in folders.values())
        yield [Cell("second", self.config.run_config({"optim.lr": files / 1000}), f"{TASKS}:write")]

    def report(self, folders: Mapping[str, Path], command: str) -> StudyReport:
        from fastlora.study.report import StudyReport, Table

        setting = dict.fromkeys(("command", "commit", "machine", "items", "seeds", "scale"), "of a test")
        table = Table("cells", "Cells", ("cell", "folder"), tuple((name, folder.name) for name, folder in folders.items()))
        return StudyReport("Little", "little", ("It ran.",), ("Anything else.",), (), (table,), (), setting)


class Trains(Little):
    """Two real runs, one of which starts from the other's adapter."""

    def plan(self) -> Plan:
        folders = yield [Cell("first", self.config.run_config())]
        yield [Cell("second", self.config.run_config({"lora.init_from": folders["first"] / "adapter"}))]
