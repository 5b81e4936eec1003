"""Every op × GPU implementation × precision on the card: errors against fp64 beside torch's own, bits, torch's opcheck, what ran.

An implementation that takes none of the inputs in some precision, or whose library is not installed, is skipped by name with its reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from bench.test_ops import delivered, fresh
from fastlora.ops.registry import OpSpec, dispatchers, implementation_counts, use_implementation
from tests.gpu.cases import PRECISIONS, Arguments, Precision, gpu_implementations, inputs, precisions
from tests.ops.implementations import PooledErrors
from tests.tolerances import GPU_ERROR_FACTOR, KERNEL_ERROR_FLOOR, LIBRARY_ERROR_FACTOR

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
CASES = [
    pytest.param(spec, name, precision, id=f"{spec.name}-{name}-{precision}")
    for spec, name in gpu_implementations()
    for precision in precisions(spec)
]
FP32 = PRECISIONS[-1]
LIBRARIES = ("liger", "flex", "flash")


@pytest.fixture(autouse=True)
def _poisoned_memory() -> None:
    """torch fills new memory with NaN while deterministic algorithms are demanded (conftest.py resets the switch)."""
    torch.use_deterministic_algorithms(True, warn_only=True)


@contextmanager
def running(implementation: str, precision: Precision) -> Iterator[None]:
    """Inside, ops run this implementation, and float32 products of torch TF32 where the precision says so."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision.tf32
    try:
        with use_implementation(implementation):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def taken(spec: OpSpec, implementation: str, precision: Precision) -> list[tuple[int, Arguments]]:
    """(position, arguments) of the inputs that the implementation takes; the test is skipped where it takes none."""
    refuses = dispatchers[spec.name].implementations[implementation].refuses
    if reason := refuses(GPU):
        pytest.skip(f"{implementation}: {reason}")
    with use_implementation("auto"), torch.no_grad():  # the best that there is: a forced one would refuse its forward pass loudly
        samples = list(enumerate(inputs(spec, precision.dtype, GPU)))
    reasons = {position: refuses(GPU, *arguments) for position, arguments in samples}
    if all(reasons.values()):
        pytest.skip(f"{implementation}: {reasons[0]}")
    return [(position, arguments) for position, arguments in samples if not reasons[position]]


@pytest.mark.parametrize(("spec", "implementation", "precision"), CASES)
@torch.no_grad()
def test_error_against_fp64_is_that_of_torch(spec: OpSpec, implementation: str, precision: Precision) -> None:
    """Pooled over the inputs, per output; the truth is the reference in fp64 at the same rounded numbers."""
    chosen = taken(spec, implementation, precision)
    with running(implementation, precision):
        got = [delivered(spec, fresh(arguments)) for _, arguments in chosen]
    with running("reference", precision):
        plain = [delivered(spec, fresh(arguments)) for arguments in inputs(spec, precision.dtype, GPU)]
        truth = [delivered(spec, fresh(arguments)) for arguments in inputs(spec, precision.dtype, GPU, exact=True)]
    errors = PooledErrors()
    for (position, _), ours in zip(chosen, got, strict=True):
        assert all(bool(x.isfinite().all()) for x in ours), f"input {position}"
        errors.add(ours, plain[position], truth[position])
    errors.assert_within(LIBRARY_ERROR_FACTOR if implementation in LIBRARIES else GPU_ERROR_FACTOR[precision.name], KERNEL_ERROR_FLOOR)


@pytest.mark.parametrize(("spec", "implementation", "precision"), CASES)
@torch.no_grad()
def test_the_same_bits_twice_by_this_implementation(spec: OpSpec, implementation: str, precision: Precision) -> None:
    """And the counter proves that it ran, once for every call."""
    chosen = taken(spec, implementation, precision)
    before = implementation_counts.copy()
    with running(implementation, precision):
        for _, arguments in chosen:
            first, second = (delivered(spec, fresh(arguments)) for _ in range(2))
            assert all(map(torch.equal, first, second))
    ran = {name: count for (op, name), count in (implementation_counts - before).items() if op == spec.name}
    assert ran == {implementation: 2 * len(chosen)}


@pytest.mark.parametrize(
    ("spec", "implementation"), [pytest.param(*case, id=f"{case[0].name}-{case[1]}") for case in gpu_implementations()]
)
def test_opcheck(spec: OpSpec, implementation: str) -> None:
    """torch's own: schema, autograd registration, fake and compiled shapes."""
    for _, arguments in taken(spec, implementation, FP32):
        with running(implementation, FP32):
            torch.library.opcheck(spec.op, arguments)
