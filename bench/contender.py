"""Who competes: a library, its settings, and the rules that all of them run under in their worker process."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from bench.workload import SAMPLES, DType


@dataclass(frozen=True, slots=True)
class Contender:
    """One configuration of one library."""

    library: Literal["trl", "plain", "fastlora", "gemm"]
    """trl = TRL's GRPOTrainer on PEFT's layers; plain = a hand-written loop on PEFT's layers; fastlora = its own Trainer; gemm = the matrix
    products of an update and nothing else."""
    dtype: DType = "float32"
    """Of the base model and its activations; adapters are float32 in all libraries."""
    micro_batch: int = SAMPLES
    """Samples per backward pass."""
    compiled: bool = False
    """torch.compile of the decoder layers (plain only)."""
    method: Literal["lora", "full"] = "lora"
    """full: every weight trains (fastlora only)."""
    work: Literal["update", "step"] = "update"
    """update = loss, backward, clip, optimizer step on the recorded rollout; step = sampling and reward before it, live."""

    @property
    def name(self) -> str:
        """Names a table row: `trl float32 mb16`."""
        extras = [self.method] * (self.method != "lora") + ["compiled"] * self.compiled + [self.work] * (self.work != "update")
        return " ".join([self.library, self.dtype, f"mb{self.micro_batch}", *extras])

    def settings(self) -> dict[str, Any]:
        """The fields, JSON-able."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Command:
    """What a worker is told to do next."""

    do: Literal["run", "gradient"]
    """run = the contender's work once; gradient = the same, and its gradient before clipping is written to `path`."""
    path: str = ""


Commands = Iterator[Command]
"""Blocks until the next command has come (in read(2): an idle worker burns nothing); ends with the worker's stdin."""
Report = Callable[[float, float], None]
"""report(wall seconds, CPU seconds) ends a command."""
Serve = Callable[[Contender, Path, Commands, Report], None]
"""serve(contender, workload folder, commands, report): loads everything before asking for the first command."""


@dataclass(frozen=True, slots=True)
class Clock:
    """A moment: wall time, and user + system CPU time of this process, all threads."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Clock:
        """This moment."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return cls(time.perf_counter(), usage.ru_utime + usage.ru_stime)

    def report_to(self, report: Report) -> None:
        """Reports what has passed since."""
        end = Clock.now()
        report(end.wall - self.wall, end.cpu - self.cpu)
