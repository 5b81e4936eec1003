"""A race on a GPU: one computation, its entrants, the truth that each of them must reach before it is timed.

`Entrant.prepare` builds an entrant on torch's default device and returns (run, canonical): `run()` is what is timed, `canonical(run())` the
tensors that all entrants of the race deliver in one order and layout.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from bench.gemm_peak import Shape
from bench.op_cases import Case
from bench.test_ops import MAX_ERROR, GateError
from fastlora.ops.registry import dispatchers, use_implementation

Run = Callable[[], Any]
Canonical = Callable[[Any], list[Tensor]]
Refuses = Callable[[torch.device], str | None]


def anywhere(device: torch.device) -> str | None:
    """Refuses nothing."""
    return None


def needs(distribution: str, module: str, *, gpu: bool = True) -> Refuses:
    """Refuses, by name, where a library is not installed, and off a GPU where its kernels need one."""

    def refuses(device: torch.device) -> str | None:
        if find_spec(module) is None:
            return f"not installed: {distribution}"
        return f"{distribution} runs on a GPU, the tensors are on {device.type}" if gpu and device.type != "cuda" else None

    return refuses


def on_a_gpu(device: torch.device) -> str | None:
    """torch.compile makes a kernel for either; on a CPU it takes minutes of g++ for numbers that nobody asked for."""
    return None if device.type == "cuda" else f"torch.compile is raced on a GPU, the tensors are on {device.type}"


@dataclass(frozen=True, slots=True)
class Entrant:
    """One way to compute what the race is about."""

    name: str
    """`fastlora triton`, `torch eager`, `TRL chunked`."""
    prepare: Callable[[], tuple[Run, Canonical]]
    refuses: Refuses = anywhere
    """Why it cannot take part on a device, or None."""


def ours(op: str, prepare: Callable[[], tuple[Run, Canonical]], who: str = "fastlora") -> list[Entrant]:
    """An entrant for each implementation of the op, which is forced while it runs."""
    entrants = []
    for name, implementation in dispatchers[op].implementations.items():

        def forced(name: str = name) -> tuple[Run, Canonical]:
            run, canonical = prepare()

            def inside() -> Any:
                with use_implementation(name):
                    return run()

            return inside, canonical

        entrants.append(Entrant(f"{who} {name}", forced, implementation.refuses))
    return entrants


@dataclass(frozen=True, slots=True)
class Race:
    """One computation at one shape."""

    op: str
    shape: str
    """In words, for the row."""
    dtype: torch.dtype
    flops: float
    nbytes: float
    """Useful work and compulsory traffic, the op's own `cost()`."""
    gemms: Counter[Shape]
    """(m, k, n) -> how many products; empty: the op moves memory."""
    truth: Callable[[], list[Tensor]]
    """One precision up, in the canonical order."""
    entrants: Sequence[Entrant]
    baseline: str
    """The entrant that × counts from."""
    max_error: float | None = None
    """Relative L2 error of a canonical tensor; None: bench.test_ops.MAX_ERROR of the dtype."""

    @property
    def name(self) -> str:
        """Unique: `lora_linear gate_up: ...`."""
        return f"{self.op} {self.shape}"


def check(race: Race, entrant: str, got: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
    """The gate. Raises GateError, naming what is off and how far; also for NaN."""
    limit = MAX_ERROR[race.dtype] if race.max_error is None else race.max_error
    for index, (ours, exact) in enumerate(zip(got, truth, strict=True)):
        if ours.shape != exact.shape:
            raise GateError(f"{race.name}, {entrant}: output {index} is {list(ours.shape)}, it must be {list(exact.shape)}; not timed")
        norm = float(exact.double().norm())
        error = float((ours.double() - exact.double()).norm()) / max(norm, 1e-30)
        if not (error <= limit and math.isfinite(norm)):
            raise GateError(f"{race.name}, {entrant}: output {index} is off by {error:.1e} of its norm (at most {limit:.0e}); not timed")


def on_meta(case: Case, dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments of a case without numbers or memory: what costs are counted from."""
    with torch.device("meta"), torch.no_grad(), use_implementation("reference"):
        return case.arguments(dtype)
