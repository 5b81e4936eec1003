"""Who competes: a library, its settings, and the rules that all of them run under in their worker process."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from bench.workload import SAMPLES, DType


@dataclass(frozen=True, slots=True)
class Contender:
    """One configuration of one library."""

    library: Literal["trl", "plain", "fastlora", "fastlora-vllm", "gemm"]
    """trl = TRL's GRPOTrainer on PEFT's layers; plain = a hand-written loop on PEFT's layers; fastlora = its own Trainer; fastlora-vllm =
    the same with rollouts from vLLM; gemm = the matrix products of an update and nothing else."""
    dtype: DType = "float32"
    """Of the base model and its activations; adapters are float32 in all libraries."""
    micro_batch: int = SAMPLES
    """Samples per backward pass."""
    compiled: bool = False
    """torch.compile: of the decoder layers (plain), of vLLM's model (fastlora-vllm)."""
    weights: Literal["adapter", "merged"] = "adapter"
    """What vLLM samples from (fastlora-vllm only)."""
    method: Literal["lora", "full"] = "lora"
    """full: every weight trains (fastlora only)."""
    work: Literal["update", "step", "rollout", "swap", "logprob"] = "update"
    """update = loss, backward, clip, optimizer step on the recorded rollout; step = sampling and reward before it, live; rollout = sampling
    alone. fastlora-vllm only: swap = the next version of the adapter, and one token from it; logprob = both sides' log-probabilities."""

    @property
    def name(self) -> str:
        """Names a table row: `trl float32 mb16`."""
        extras = [self.method] * (self.method != "lora") + [self.weights] * (self.weights != "adapter") + ["compiled"] * self.compiled
        return " ".join([self.library, self.dtype, f"mb{self.micro_batch}", *extras, *[self.work] * (self.work != "update")])

    def settings(self) -> dict[str, Any]:
        """The fields, JSON-able."""
        return asdict(self)


class Report(Protocol):
    """Ends a command."""

    def __call__(self, seconds: float, cpu_seconds: float, metrics: Mapping[str, float] = ..., /) -> None:
        """Wall seconds, CPU seconds, and whatever else was measured on the way."""


@dataclass(frozen=True, slots=True)
class Command:
    """What a worker is told to do next."""

    do: Literal["run", "gradient"]
    """run = the contender's work once; gradient = the same, and its gradient before clipping is written to `path`."""
    path: str = ""


Commands = Iterator[Command]
"""Blocks until the next command has come (in read(2): an idle worker burns nothing); ends with the worker's stdin."""
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

    def report_to(self, report: Report, metrics: Mapping[str, float] | None = None) -> None:
        """Reports what has passed since."""
        end = Clock.now()
        report(end.wall - self.wall, end.cpu - self.cpu, metrics or {})


def peak_bytes(pid: int | None = None) -> int:
    """VmHWM, the largest resident set of a process (None: this one).

    Not ru_maxrss: that starts with the parent's, inherited over fork and exec.
    """
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid or 'self'}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
