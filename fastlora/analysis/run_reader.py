"""A finished run's folder as one frozen record; every missing or damaged file is an error that names it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from fastlora.alarms import Alarm
from fastlora.errors import FastloraError
from fastlora.evaluate import Answer
from fastlora.metrics import (
    ALARMS_FILE,
    COMPLETIONS_FILE,
    ENVIRONMENT_FILE,
    GRADIENT_PROFILE_FILE,
    METRICS_FILE,
    CompletionSample,
    RunSummary,
    read_gradient_profile,
)
from fastlora.run_folder import CONFIG_FILE, RunFolder

T = TypeVar("T")


class RunReadError(FastloraError):
    """A file of the run folder is missing or damaged; the message names it, and the line."""


@dataclass(frozen=True, slots=True)
class Run:
    """One finished run."""

    path: Path
    config: Mapping[str, Any]
    """The resolved config as it was written; a plain mapping, so that runs of older versions can still be read."""
    environment: Mapping[str, Any]
    """Commit, Python, hardware, versions."""
    summary: RunSummary
    metrics: Mapping[str, NDArray[np.float64]]
    """Metric -> one value a row of metrics.jsonl, NaN where the row has none; `step` among them."""
    gradient_profile: pa.Table
    """`fastlora.metrics.GRADIENT_PROFILE_SCHEMA`; empty in full fine-tuning."""
    completions: tuple[CompletionSample, ...]
    """Sampled while training; empty if none were kept."""
    alarms: tuple[Alarm, ...]
    """Those that went off, in order."""
    eval_before: tuple[Answer, ...]
    """The held-out problems, answered by the base model."""
    eval_after: tuple[Answer, ...]
    """The same problems in the same order, answered by the trained one."""


def read_run(run_dir: Path) -> Run:
    """Reads everything. Raises RunReadError, or MetricsError from summary and gradient profile; each names its file."""
    if not (run_dir / CONFIG_FILE).is_file():
        raise RunReadError(f"{run_dir} is no run folder: it has no {CONFIG_FILE}")
    folder = RunFolder(run_dir)
    summary = RunSummary.read(run_dir)
    before = tuple(_read_lines(folder.evaluation("before"), TypeAdapter(Answer)))
    after = tuple(_read_lines(folder.evaluation("after"), TypeAdapter(Answer)))
    if not before or [answer.index for answer in before] != [answer.index for answer in after]:
        raise RunReadError(
            f"{folder.evaluation('before')} and {folder.evaluation('after')} do not answer the same problems in the same order "
            f"({len(before)} and {len(after)} answers): a paired comparison is impossible. Evaluate both again"
        )
    return Run(
        path=run_dir,
        config=_read_object(run_dir / CONFIG_FILE),
        environment=_read_object(run_dir / ENVIRONMENT_FILE),
        summary=summary,
        metrics=_read_metrics(run_dir / METRICS_FILE),
        gradient_profile=read_gradient_profile(run_dir / GRADIENT_PROFILE_FILE),
        completions=tuple(_read_lines(run_dir / COMPLETIONS_FILE, TypeAdapter(CompletionSample))),
        alarms=tuple(_read_lines(run_dir / ALARMS_FILE, TypeAdapter(Alarm))),
        eval_before=before,
        eval_after=after,
    )


def _read_metrics(path: Path) -> dict[str, NDArray[np.float64]]:
    """Rows to columns."""
    rows = list(_read_lines(path, TypeAdapter(dict[str, float | None])))
    if not rows:
        raise RunReadError(f"{path} is empty: no step was finished")
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: np.array([row.get(name) for row in rows], dtype=np.float64) for name in names}
    if "step" not in columns or not np.all(np.diff(columns["step"]) > 0):
        raise RunReadError(f"{path}: the steps of its rows do not increase; the file was damaged or written by two runs")
    return columns


def _read_lines(path: Path, adapter: TypeAdapter[T]) -> Iterator[T]:
    """One validated record a line."""
    *lines, rest = _read_bytes(path).split(b"\n")
    if rest:
        raise RunReadError(f"{path}, line {len(lines) + 1}: cut off in the middle")
    for number, line in enumerate(lines, start=1):
        try:
            yield adapter.validate_json(line)
        except ValidationError as error:
            raise RunReadError(f"{path}, line {number}: {_first(error)}") from None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return TypeAdapter(dict[str, Any]).validate_json(_read_bytes(path))
    except ValidationError as error:
        raise RunReadError(f"{path}: {_first(error)}") from None


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise RunReadError(f"{path} is missing; a finished run has it") from None


def _first(error: ValidationError) -> str:
    """The first problem, with the field it is in."""
    problem = error.errors()[0]
    field = ".".join(map(str, problem["loc"]))
    return f"{field}: {problem['msg']}" if field else problem["msg"]
