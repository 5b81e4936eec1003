"""What a study is: a generator of stages of cells, and a report on their folders."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fastlora.plugins import is_function_spec, load_function
from fastlora.study.cells import Cell
from fastlora.study.config import STUDIES, StudyConfig

if TYPE_CHECKING:
    from fastlora.study.report import StudyReport

Plan = Generator[Sequence[Cell], Mapping[str, Path], None]
"""Yields a stage's cells, is sent {cell name: folder} of that stage: cells of a later stage may be made from files of an earlier one."""


class Study(Protocol):
    """A study, made from its config."""

    def __init__(self, config: StudyConfig) -> None: ...

    def plan(self) -> Plan:
        """The stages. Must yield the same cells again when the command is repeated, which then skips the finished ones."""
        ...

    def report(self, folders: Mapping[str, Path], command: str) -> StudyReport:
        """The report on all cells: {cell name: folder}. command: what was typed, for its setting."""
        ...


def load_study(config: StudyConfig) -> Study:
    """The study that a config names. Raises ConfigError when one's own is not there."""
    if is_function_spec(config.study):
        return load_function(config.study, "study")(config)
    module, _, name = STUDIES[config.study].partition(":")
    return getattr(import_module(module), name)(config)
