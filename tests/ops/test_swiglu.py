"""swiglu against torch's silu in fp64, differentiated by torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.ops.registry import use_implementation
from fastlora.ops.swiglu import swiglu, swiglu_backward_op, swiglu_op
from tests.ops.implementations import CPP, Variant, assert_no_worse, needs_extension, running, threads
from tests.tolerances import FP64_EXACT, SAME_IN_FLOAT32

SHAPES = [(0, 8), (1, 1), (17,), (63, 17), (2, 3, 32), (1, 1536)]
EDGES = [0.0, -0.0, 1e-30, -1e-30, 20.0, -20.0, 86.9, -86.9, 87.1, -87.1, 88.1, -88.1, 104.0, -104.0, 3e4, -3e4, 1e38, -1e38]
"""Beside random gates: zero, and both sides of where float32's exponential under- and overflows."""


def _problem(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(size * torch.randn(shape, dtype=torch.float64).to(dtype) for size in (5, 1, 1))


def _gradients(function: object, gate: Tensor, up: Tensor, dy: Tensor, dtype: torch.dtype) -> list[Tensor]:
    gate, up = (tensor.detach().to(dtype).requires_grad_() for tensor in (gate, up))
    y = function(gate, up)  # type: ignore[operator]
    return [y.detach(), *torch.autograd.grad(y, (gate, up), dy.to(dtype))]


def _plain(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_torchs_in_fp64(shape: tuple[int, ...]) -> None:
    problem = _problem(shape, torch.float64)
    for got, expected in zip(_gradients(swiglu, *problem, torch.float64), _gradients(_plain, *problem, torch.float64), strict=True):
        torch.testing.assert_close(got, expected, rtol=FP64_EXACT, atol=FP64_EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variant", [Variant("reference"), *CPP], ids=str)
def test_error_is_no_worse_than_torchs(variant: Variant, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    problem = _problem(shape, dtype)
    with running(variant):
        got = _gradients(swiglu, *problem, dtype)
    plain, truth = _gradients(_plain, *problem, dtype), _gradients(_plain, *problem, torch.float64)
    assert_no_worse(got, plain, truth)


@pytest.mark.parametrize("variant", [Variant("reference"), *CPP], ids=str)
@pytest.mark.parametrize("edge", EDGES)
def test_each_gate_alone(edge: float, variant: Variant) -> None:
    """Entry by entry, since one large gate would hide all others; in a full vector and in the tail of one."""
    gate, up, dy = torch.full((17,), edge), torch.full((17,), 0.75), torch.full((17,), 1.25)
    with running(variant):
        got = _gradients(swiglu, gate, up, dy, torch.float32)
    smallest = torch.finfo(torch.float32).smallest_normal * 1e4  # σ(−87) = 1e-38: below it the kernels say 0
    for ours, truth in zip(got, _gradients(_plain, gate, up, dy, torch.float64), strict=True):
        assert (ours == ours[0]).all()
        if float(truth[0].abs()) > smallest:
            assert_no_worse([ours], [truth.float()], [truth])
        else:
            assert float(ours[0].abs()) <= smallest


@pytest.mark.parametrize("variant", CPP, ids=str)
def test_bits_do_not_depend_on_threads(variant: Variant) -> None:
    """Large enough to be split (16k elements a task), in places that are no multiple of a vector."""
    for dtype in (torch.float32, torch.bfloat16):
        problem = _problem((50_001,), dtype)
        with running(variant):
            results = []
            for count in (1, 2):
                with threads(count):
                    results.append(_gradients(swiglu, *problem, dtype))
        assert all(map(torch.equal, *results))


@pytest.mark.parametrize("variant", [Variant("reference"), *CPP], ids=str)
def test_any_memory_layout(variant: Variant) -> None:
    gate_up = torch.randn(9, 80)
    gate, up, dy = gate_up[:, :40], gate_up[:, 40:], torch.ones(()).expand(9, 40)
    with running(variant):
        got = _gradients(swiglu, gate, up, dy, torch.float32)
        expected = _gradients(swiglu, gate.contiguous(), up.contiguous(), dy.contiguous(), torch.float32)
        transposed = swiglu(gate.t(), up.t())
    assert not gate.is_contiguous() and not dy.is_contiguous()
    torch.testing.assert_close([*got, transposed], [*expected, expected[0].t()], rtol=0, atol=SAME_IN_FLOAT32)


@pytest.mark.parametrize("variant", [Variant("reference"), *CPP], ids=str)
def test_nan_spoils_its_entry_only(variant: Variant) -> None:
    for index in range(2):
        for place in (0, 40):
            problem = [torch.ones(41), torch.ones(41)]
            problem[index][place] = torch.nan
            with running(variant):
                y = swiglu(*problem)
            assert y[place].isnan() and y.isnan().sum() == 1


def test_refuses_what_does_not_fit() -> None:
    for up in (torch.ones(3, 6), torch.ones(3, 7, dtype=torch.bfloat16), torch.ones(7)):
        with pytest.raises(ValueError, match=r"swiglu: gate \(3, 7\) torch.float32 and up .* differ"):
            swiglu(torch.ones(3, 7), up)


@needs_extension
def test_the_kernels_check_what_they_read() -> None:
    """Past the public function's checks: an error, never memory that is not theirs."""
    x = torch.ones(3, 7)
    with use_implementation("cpp"):
        for wrong in (x[:2], x.bfloat16()):
            with pytest.raises(RuntimeError, match="swiglu: "):
                swiglu_op(x, wrong)
            for arguments in ((wrong, x, x), (x, x, wrong)):
                with pytest.raises(RuntimeError, match="swiglu: "):
                    swiglu_backward_op(*arguments)
