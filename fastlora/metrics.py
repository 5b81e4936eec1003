"""What a run leaves behind besides its weights, one writer a file.

    metrics.jsonl             one JSON object a step                     MetricsWriter.step
    completions.jsonl         sampled completions, to be read            MetricsWriter.completions
    alarms.jsonl              metrics that went where they must not      MetricsWriter.alarm
    gradient_profile.parquet  gradient norms by matrix at every step     MetricsWriter.gradient_norms
                              (a folder of parts, as pandas, pyarrow and DuckDB read it: each write adds one)
    summary.json              what the run achieved                      RunSummary.write
    environment.json          versions, commit, hardware                 write_environment

`step` counts finished generation batches from 1. All JSON is strict: a number that is not finite is written as null.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from fastlora.alarms import Alarm
from fastlora.atomic import atomic_write_bytes, atomic_write_text, naming_disk_full
from fastlora.errors import FastloraError
from fastlora.ops.adamw_step import Segment

METRICS_FILE = "metrics.jsonl"
COMPLETIONS_FILE = "completions.jsonl"
ALARMS_FILE = "alarms.jsonl"
GRADIENT_PROFILE_FILE = "gradient_profile.parquet"
SUMMARY_FILE = "summary.json"
ENVIRONMENT_FILE = "environment.json"

GRADIENT_PROFILE_SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("module", pa.string()),  # "model.layers.3.self_attn.q_proj"
        ("layer", pa.int32()),  # 3; -1 for a module outside the layers
        ("projection", pa.string()),  # "q_proj"
        ("matrix", pa.string()),  # "A" or "B"
        ("rank", pa.int32()),
        ("norm", pa.float32()),  # L2, of the accumulated gradient before clipping
        (
            "delta_w_norm",
            pa.float32(),
        ),  # of B: estimated ‖∂L/∂ΔW‖ of the module (fastlora/gradient_profile.py); of A, or under a mask: null
        (
            "component_norms",
            pa.list_(pa.field("element", pa.float32())),
        ),  # [rank], of each row of dA or dBᵀ; null unless log.rank_components
    ]
)


class MetricsError(FastloraError):
    """A file of the run folder is missing, damaged or already there; the message names it."""


@dataclass(frozen=True, slots=True)
class CompletionSample:
    """One line of completions.jsonl."""

    step: int
    prompt: str
    completion: str
    gold: str
    rewards: Mapping[str, float | None]
    """Reward function -> reward; None (or NaN) = it could not score this completion."""
    advantage: float | None
    """Of the first completion token; None (or NaN) = it had none."""
    num_tokens: int
    finished: bool
    """Ended by itself; False = cut off at the length limit."""
    adapter_version: int
    """Number of optimizer steps behind the policy that sampled it."""


class MetricsWriter:
    """Writes metrics.jsonl, completions.jsonl, alarms.jsonl and gradient_profile.parquet of one run; a context manager.

    A new run (`resume_step` None) refuses a folder that already holds these files. A resumed one passes the first step that it
    will do again: rows of that step and later are removed first, so the files end equal to those of a run that was never
    stopped. For that `flush` must be called *before* each checkpoint is written; JSON rows reach the operating system at once,
    the disk at `flush`.

    Raises MetricsError for a missing or damaged file on resume, DiskFullError (naming the file) when the disk is full.
    """

    def __init__(self, run_dir: Path, tensorboard: bool = False, resume_step: int | None = None) -> None:
        self._metrics = _JsonLines(run_dir / METRICS_FILE, resume_step)
        self._completions = _JsonLines(run_dir / COMPLETIONS_FILE, resume_step)
        self._alarms = _JsonLines(run_dir / ALARMS_FILE, resume_step)
        self._profile = _GradientProfile(run_dir / GRADIENT_PROFILE_FILE, resume_step)
        self._tensorboard = _tensorboard_writer(run_dir / "tensorboard", resume_step) if tensorboard else None

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one row. Raises ValueError for an accuracy without its number of problems: it could get no interval."""
        if "eval/accuracy" in metrics and "eval/num_problems" not in metrics:
            raise ValueError("a row with eval/accuracy needs eval/num_problems beside it, the n of its confidence interval")
        self._metrics.append({"step": step, **metrics})
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)

    def completions(self, samples: Iterable[CompletionSample]) -> None:
        """Appends samples."""
        for sample in samples:
            self._completions.append(asdict(sample))

    def alarm(self, alarm: Alarm) -> None:
        """Appends one alarm."""
        self._alarms.append(asdict(alarm))

    def gradient_norms(
        self,
        step: int,
        segments: Sequence[Segment],
        norms_m: Tensor,
        delta_w_m: Tensor | None = None,
        component_norms_r: Tensor | None = None,
    ) -> None:
        """Adds the gradient norms of every adapter matrix; `segments` of the packed adapter.

        norms_m: float [segments]. delta_w_m, component_norms_r: of `gradient_profile.delta_w_norms` and `rank_component_norms`; None =
        null in all rows.
        """
        self._profile.add(step, segments, norms_m, delta_w_m, component_norms_r)

    def flush(self) -> None:
        """Brings everything onto the disk."""
        self._metrics.sync()
        self._completions.sync()
        self._alarms.sync()
        self._profile.write()
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        """Flushes and closes; nothing may be written afterwards."""
        self.flush()
        self._metrics.close()
        self._completions.close()
        self._alarms.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _JsonLines:
    """An append-only file of one JSON object a line, each with a "step"."""

    def __init__(self, path: Path, resume_step: int | None) -> None:
        self._path = path
        if resume_step is None:
            _refuse_existing(path)
        else:
            atomic_write_bytes(path, b"".join(self._rows_before(resume_step)))
        self._file = path.open("ab")

    def append(self, record: Mapping[str, Any]) -> None:
        with naming_disk_full(self._path):
            self._file.write((json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n").encode())
            self._file.flush()

    def sync(self) -> None:
        with naming_disk_full(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _rows_before(self, resume_step: int) -> Iterator[bytes]:
        """The lines of earlier steps, as they are. A line without its newline was being written when the run died: dropped."""
        try:
            lines = self._path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            raise MetricsError(f"{self._path} is missing: the run cannot be resumed without it. Restore it, or start anew") from None
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                step = int(json.loads(line)["step"])
            except (ValueError, TypeError, KeyError) as error:
                raise MetricsError(
                    f"{self._path}, line {number}: not a JSON object with a step ({error!r}). Remove the line, or start anew"
                ) from None
            if step < resume_step:
                yield line


class _GradientProfile:
    """The table of gradient norms, in parts `step-000001.parquet` named by their first step: a write costs what its own rows cost.

    (One file, rewritten whole at each checkpoint, was 365 ms with 1,000 steps behind it: 2.4 % of a laptop's steps.)
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        self._path = path
        self._rows: list[pa.Table] = []
        if resume_step is None:
            _refuse_existing(path)
            path.mkdir()
        else:
            self._cut(resume_step)

    def add(
        self, step: int, segments: Sequence[Segment], norms_m: Tensor, delta_w_m: Tensor | None, component_norms_r: Tensor | None
    ) -> None:
        keys = [_adapter_matrix(segment.name) for segment in segments]
        ranks = [segment.shape[0] for segment in segments]  # both A [r, d] and B, stored [r, n], have the rank first
        columns = [
            [step] * len(keys),
            [module for module, _ in keys],
            [layer_of(module) for module, _ in keys],
            [module.rpartition(".")[2] for module, _ in keys],
            [matrix for _, matrix in keys],
            ranks,
            _float32(norms_m),
            _estimates(delta_w_m, keys),
            _lists(component_norms_r, ranks),
        ]
        self._rows.append(pa.table(columns, schema=GRADIENT_PROFILE_SCHEMA))

    def write(self) -> None:
        if self._rows:
            rows = pa.concat_tables(self._rows)
            _write_part(self._path / f"step-{rows['step'][0].as_py():06d}.parquet", rows)
            self._rows = []

    def _cut(self, resume_step: int) -> None:
        """Removes the rows of `resume_step` and later; the last part first, so that a run killed here leaves no gap."""
        for part, rows in reversed(_profile_parts(self._path)):
            kept = rows.filter(pc.field("step") < resume_step)
            if not kept.num_rows:
                part.unlink()
            elif kept.num_rows < rows.num_rows:
                _write_part(part, kept)


def _float32(values: Tensor) -> NDArray[np.float32]:
    return values.detach().to("cpu", torch.float32).numpy()


def _estimates(delta_w_m: Tensor | None, keys: Sequence[tuple[str, str]]) -> pa.Array:
    """The column of ‖∂L/∂ΔW‖: null at every A, and everywhere if there is none."""
    if delta_w_m is None:
        return pa.nulls(len(keys), pa.float32())
    return pa.array(_float32(delta_w_m), mask=np.array([matrix == "A" for _, matrix in keys], dtype=bool))


def _lists(component_norms_r: Tensor | None, ranks: Sequence[int]) -> pa.Array:
    """The column of component norms: one list of `rank` numbers a matrix, or null."""
    column = GRADIENT_PROFILE_SCHEMA.field("component_norms").type
    if component_norms_r is None:
        return pa.nulls(len(ranks), column)
    offsets = np.concatenate([[0], np.cumsum(ranks)]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, _float32(component_norms_r), type=column)


def read_gradient_profile(path: Path) -> pa.Table:
    """The table of `gradient_profile.parquet`. Raises MetricsError when it is missing, or a part is damaged or has other columns."""
    return pa.concat_tables([GRADIENT_PROFILE_SCHEMA.empty_table(), *(rows for _, rows in _profile_parts(path))])


def _profile_parts(path: Path) -> list[tuple[Path, pa.Table]]:
    """The files of the profile and their rows, in the order of their steps."""
    if not path.is_dir():
        raise MetricsError(f"{path} {'is no folder' if path.exists() else 'is missing'}; every run writes one when it starts")
    return [(part, _read_part(part)) for part in sorted(path.glob("step-*.parquet"))]


def _write_part(part: Path, rows: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink)
    atomic_write_bytes(part, sink.getvalue().to_pybytes())


def _read_part(part: Path) -> pa.Table:
    try:
        rows = pq.ParquetFile(part).read()
    except (pa.ArrowException, OSError) as error:
        raise MetricsError(f"{part} is not a readable Parquet file: {error}") from None
    if not rows.schema.equals(GRADIENT_PROFILE_SCHEMA):
        raise MetricsError(f"{part} has columns {rows.schema.names}, expected {GRADIENT_PROFILE_SCHEMA.names} in their types")
    return rows


def layer_of(module: str) -> int:
    """Layer number of a module: the first whole number in its dotted name; -1 when there is none (`lm_head`)."""
    return next((int(part) for part in module.split(".") if part.isdecimal()), -1)


def _adapter_matrix(segment_name: str) -> tuple[str, str]:
    """Module and matrix: ("model.layers.3.self_attn.q_proj", "A") for the module's name with `.lora_A` behind it."""
    module, found, matrix = segment_name.rpartition(".lora_")
    if not found or matrix not in ("A", "B"):
        raise ValueError(f"{segment_name} is no adapter matrix: the gradient profile wants names ending in .lora_A or .lora_B")
    return module, matrix


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise MetricsError(f"{path} already exists: a run is never overwritten. Choose another name, or resume that run")


def _finite(value: Any) -> Any:
    """`value` with every float that JSON cannot hold (NaN, ±inf) replaced by None, at any depth."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _ScalarWriter(Protocol):
    """The part of TensorBoard's SummaryWriter that is used."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


def _tensorboard_writer(folder: Path, resume_step: int | None) -> _ScalarWriter:
    from torch.utils.tensorboard import SummaryWriter  # here because it takes a second and only this option needs it

    writer: _ScalarWriter = SummaryWriter(str(folder), purge_step=resume_step)
    return writer


@dataclass(frozen=True, slots=True)
class RunSummary:
    """summary.json: what a run achieved and what it cost. Accuracies are fractions, intervals 95 %."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    seed: int
    steps: int
    """Generation batches trained on."""
    accuracy_before: float
    """Greedy accuracy of the base model on the fixed held-out problems."""
    accuracy_before_interval: tuple[float, float]
    """Wilson."""
    accuracy_after: float
    """Greedy accuracy of the trained model on the same problems."""
    accuracy_after_interval: tuple[float, float]
    """Wilson."""
    accuracy_gain: float
    """accuracy_after − accuracy_before."""
    accuracy_gain_interval: tuple[float, float]
    """Newcombe, paired."""
    mcnemar_p: float
    """Exact McNemar, two-sided."""
    learned: bool | None
    """The gain reached the config's eval.required_gain; None = nothing was required."""
    train_seconds: float
    """Wall clock of the training steps, over all resumptions; evaluation before and after not counted."""
    tokens: int
    """Sampled completion tokens."""
    peak_memory_bytes: int
    """Largest resident set of the process (CPU), or largest allocation of the device (GPU)."""
    trainable_parameters: int
    rank_pattern: Mapping[str, int]
    """Module -> rank; empty in full fine-tuning."""
    pass_at_k_before: Mapping[int, tuple[float, float, float]]
    """k -> estimate and its interval, base model; empty when eval.pass_at_k is."""
    pass_at_k_after: Mapping[int, tuple[float, float, float]]
    """The same of the trained model."""

    def write(self, run_dir: Path) -> None:
        """Writes summary.json atomically. Raises ValueError for a number that is not finite."""
        atomic_write_text(run_dir / SUMMARY_FILE, json.dumps(asdict(self), indent=2, allow_nan=False) + "\n")

    @classmethod
    def read(cls, run_dir: Path) -> RunSummary:
        """Raises MetricsError when summary.json is missing, damaged, or its fields are not these."""
        path = run_dir / SUMMARY_FILE
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes())
        except FileNotFoundError:
            raise MetricsError(f"{path} is missing: the run has not finished. Resume it, then try again") from None
        except ValidationError as error:
            raise MetricsError(f"{path} is damaged: {error}") from None


def write_environment(run_dir: Path) -> None:
    """Writes environment.json."""
    atomic_write_text(run_dir / ENVIRONMENT_FILE, json.dumps(environment(), indent=2) + "\n")


def environment() -> dict[str, Any]:
    """Commit, Python, hardware, and the version of every installed package."""
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "packages": dict(sorted((package.name, package.version) for package in metadata.distributions())),
    }


def processor_name() -> str:
    """The CPU's model name as lscpu prints it; the architecture where Linux does not say."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1].strip() if found else platform.machine()


def _commit() -> str | None:
    """Commit of the checkout that this package runs from, "-dirty" appended when files differ; None outside a git checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:  # no git on this machine
        return None
    return described.stdout.strip() if described.returncode == 0 else None
