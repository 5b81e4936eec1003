"""pytest-benchmark over every op × implementation × dtype of bench/op_cases.py. Run by `python -m bench.ops`, not by the test suite.

First the gate: outputs (and what the op writes in place) against the reference, one precision up, at the same arguments. Where one case
fails, no op gets a row. The gate's own run is the warm-up.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from bench.op_cases import Case, cases, smollm2_update
from fastlora.ops.registry import OpSpec, dispatchers, implementation_counts, use_implementation

MAX_ERROR = {torch.bfloat16: 0.02, torch.float32: 1e-4}
"""Relative L2 error of an output: five roundings of bfloat16 (2^-8), sums of 50,000 terms in float32. A wrong term costs more, and
tests/ops holds the implementations to far less."""
WIDER = {torch.bfloat16: torch.float32, torch.float32: torch.float64}
MAX_FP64_FLOPS = 5e10
"""Costlier ops (the head) are held to the reference in float32: its 116 to 232 GFLOP in float64 would take longer than all timing."""


class GateError(AssertionError):
    """An implementation that computes something else than the reference; the message says what and how far off."""


def runnable() -> list[Any]:
    """(case, implementation, dtype) for all that can run here; the others are `python -m fastlora.doctor`'s subject."""
    found = []
    for case in cases(smollm2_update()):
        for name, implementation in dispatchers[case.spec.name].implementations.items():
            if implementation.refuses(torch.device("cpu")) is None:
                found += [pytest.param(case, name, dtype, id=f"{case.name}-{name}-{dtype}") for dtype in case.dtypes]
    return found


def delivered(spec: OpSpec, arguments: tuple[Any, ...]) -> list[Tensor]:
    """Outputs of a call, then the arguments that its schema says it writes to."""
    outputs = dispatchers[spec.name](*arguments)
    schema = getattr(spec.op, "_opoverload", spec.op)._schema
    written = [x for x, a in zip(arguments, schema.arguments, strict=False) if a.alias_info is not None and a.alias_info.is_write]
    return [x for x in tree_leaves([outputs, written]) if isinstance(x, Tensor)]


def fresh(arguments: tuple[Any, ...], wider: torch.dtype | None = None) -> tuple[Any, ...]:
    """The same numbers in new tensors; floating-point ones in `wider`, where that is given and wider."""

    def copied(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        widen = wider is not None and x.is_floating_point() and x.itemsize < wider.itemsize
        return x.to(wider) if widen else x.clone()

    return tree_map(copied, arguments)


def check(case: Case, implementation: str, dtype: torch.dtype, arguments: tuple[Any, ...]) -> None:
    """Raises GateError. `arguments` are left as they are."""
    wider = WIDER[dtype] if case.spec.cost(*arguments).flops <= MAX_FP64_FLOPS else torch.float32
    with use_implementation(implementation):
        got = delivered(case.spec, fresh(arguments))
    with use_implementation("reference"):
        truth = delivered(case.spec, fresh(arguments, wider))
    for index, (ours, exact) in enumerate(zip(got, truth, strict=True)):
        if ours.shape != exact.shape:  # packed_attention's lse, which the reference does not keep
            continue
        error = float((ours.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30))
        if not error <= MAX_ERROR[dtype]:  # also refuses NaN
            raise GateError(f"{case.name}, {implementation}, {dtype}: output {index} is off by {error:.1e} of its norm; not timed")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """At collection: importing this file builds nothing."""
    metafunc.parametrize(("case", "implementation", "dtype"), runnable())


@torch.no_grad()
def test_op(benchmark: BenchmarkFixture, case: Case, implementation: str, dtype: torch.dtype) -> None:
    """Gate, then time; what bench/ops.py makes a row of goes into extra_info."""
    with use_implementation(implementation):
        arguments = case.arguments(dtype)
    check(case, implementation, dtype, arguments)
    cost, op = case.spec.cost(*arguments), dispatchers[case.spec.name]
    before = implementation_counts[case.spec.name, implementation]
    with use_implementation(implementation):
        benchmark(op, *arguments)
    assert implementation_counts[case.spec.name, implementation] > before, "another implementation ran"
    benchmark.extra_info.update(
        op=case.spec.name,
        implementation=implementation,
        dtype=str(dtype).removeprefix("torch."),
        shape=case.shape,
        flops=cost.flops,
        bytes=cost.bytes,
        gemms=[[*shape, count] for shape, count in case.gemms.items()],
    )
