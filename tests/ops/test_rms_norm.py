"""rms_norm against torch.nn.functional.rms_norm in fp64, differentiated by torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.ops.registry import use_implementation
from fastlora.ops.rms_norm import rms_norm, rms_norm_backward_op, rms_norm_op
from tests.ops.implementations import CPP, Variant, assert_no_worse, needs_extension, running, threads
from tests.tolerances import FP64_EXACT, SAME_IN_FLOAT32

EPS = 1e-5
SHAPES = [(0, 16), (1, 3), (3, 7), (2, 5, 64), (63, 40), (7, 576), (1000, 33)]


def _problem(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(s, dtype=torch.float64).to(dtype) for s in (shape, shape[-1:], shape))


def _ours(x: Tensor, weight_d: Tensor, dy: Tensor, train_gain: bool = True) -> list[Tensor]:
    x, weight_d = x.detach().requires_grad_(), weight_d.detach().requires_grad_(train_gain)
    y = rms_norm(x, weight_d, EPS)
    return [y.detach(), *torch.autograd.grad(y, (x, weight_d) if train_gain else (x,), dy)]


def _torchs(x: Tensor, weight_d: Tensor, dy: Tensor, dtype: torch.dtype) -> list[Tensor]:
    x, weight_d = (tensor.detach().to(dtype).requires_grad_() for tensor in (x, weight_d))
    y = F.rms_norm(x, x.shape[-1:], weight_d, EPS)
    return [y.detach(), *torch.autograd.grad(y, (x, weight_d), dy.to(dtype))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_torchs_in_fp64(shape: tuple[int, ...]) -> None:
    problem = _problem(shape, torch.float64)
    for got, expected in zip(_ours(*problem), _torchs(*problem, torch.float64), strict=True):
        torch.testing.assert_close(got, expected, rtol=FP64_EXACT, atol=FP64_EXACT * 30)  # dw sums 1,000 rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variant", [Variant("reference"), *CPP], ids=str)
def test_error_is_no_worse_than_torchs(variant: Variant, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    problem = _problem(shape, dtype)
    with running(variant):
        got, frozen = _ours(*problem), _ours(*problem, train_gain=False)
    plain, truth = _torchs(*problem, dtype), _torchs(*problem, torch.float64)
    assert_no_worse(got, plain, truth)
    assert_no_worse(frozen, plain[:2], truth[:2])


@pytest.mark.parametrize("variant", CPP, ids=str)
def test_bits_do_not_depend_on_threads(variant: Variant) -> None:
    """Large enough to be split (some 16k elements a task), with an odd number of rows."""
    for dtype in (torch.float32, torch.bfloat16):
        problem = _problem((1001, 65), dtype)
        with running(variant):
            results = []
            for count in (1, 2):
                with threads(count):
                    results.append(_ours(*problem))
        assert all(map(torch.equal, *results))


@pytest.mark.parametrize("variant", [Variant("reference"), *CPP], ids=str)
def test_any_memory_layout(variant: Variant) -> None:
    x, weight_d, dy = torch.randn(40, 9).t(), torch.randn(80)[::2], torch.ones(()).expand(9, 40)
    with running(variant):
        got, expected = _ours(x, weight_d, dy), _ours(x.contiguous(), weight_d.contiguous(), dy.contiguous())
    assert not (x.is_contiguous() or weight_d.is_contiguous() or dy.is_contiguous())
    torch.testing.assert_close(got, expected, rtol=0, atol=SAME_IN_FLOAT32)


@pytest.mark.parametrize("variant", [Variant("reference"), *CPP], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_spoil_their_row_only(value: float, variant: Variant) -> None:
    for place in (0, 20, 32):  # first vector, a later one, the tail
        x, weight_d, dy = _problem((5, 33), torch.float32)
        x[2, place] = value
        with running(variant):
            y, dx, dw = _ours(x, weight_d, dy)
        for rows in (y, dx):
            assert rows[2, place].isnan() and rows[[0, 1, 3, 4]].isfinite().all()
        assert y[2].isnan().all() == (value != value) and dw[place].isnan()


def test_refuses_what_does_not_fit() -> None:
    for weight_d in (torch.ones(6), torch.ones(7, dtype=torch.bfloat16), torch.ones(1, 7)):
        with pytest.raises(ValueError, match=r"rms_norm: weight .* does not fit x \(3, 7\) torch.float32"):
            rms_norm(torch.ones(3, 7), weight_d, EPS)


@needs_extension
def test_the_kernels_check_what_they_read() -> None:
    """Past the public function's checks: an error, never memory that is not theirs."""
    x, weight_d, rstd_t = torch.ones(3, 7), torch.ones(7), torch.ones(3)
    with use_implementation("cpp"):
        for wrong in (torch.ones(6), torch.ones(7, dtype=torch.bfloat16)):
            with pytest.raises(RuntimeError, match="rms_norm: "):
                rms_norm_op(x, wrong, EPS)
        for arguments in ((x[:2], x, weight_d, rstd_t), (x, x, weight_d[:6], rstd_t), (x, x, weight_d, rstd_t[:2])):
            with pytest.raises(RuntimeError, match="rms_norm: "):
                rms_norm_backward_op(*arguments, True)
