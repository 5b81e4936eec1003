"""ops.gemm against fp64: strided, transposed and empty operands, inner dimension 0, results that are rounded once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastlora.ops.gemm import WIDE_ENOUGH, add_product, linear, product, scaled_product
from tests.ops.implementations import assert_no_worse
from tests.tolerances import FP64_EXACT

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SHAPES = [(7, 5, 3), (1, 1, 1), (33, 200, 17), (16, WIDE_ENOUGH, 64), (4, 0, 3), (0, 5, 3), (4, 5, 0), (0, 0, 0)]
"""m, k, n: rows, inner dimension (rank 0 among them), columns."""
LAYOUTS = ["plain", "transposed", "slice of columns", "every other row"]


def _matrix(rows: int, columns: int, dtype: torch.dtype, layout: str = "plain") -> Tensor:
    """N(0, 1), a view of something larger unless plain."""
    if layout == "transposed":
        return torch.randn(columns, rows, dtype=torch.float64).to(dtype).t()
    if layout == "slice of columns":
        return torch.randn(rows, columns + 5, dtype=torch.float64).to(dtype)[:, 2 : 2 + columns]
    if layout == "every other row":
        return torch.randn(2 * rows, columns, dtype=torch.float64).to(dtype)[::2]
    return torch.randn(rows, columns, dtype=torch.float64).to(dtype)


def _check(got: Tensor, plain: Tensor, truth: Tensor) -> None:
    """plain: in float32, rounded once to the dtype of the result."""
    assert got.shape == truth.shape
    if got.dtype == torch.float64:
        assert got.numel() == 0 or float((got - truth).abs().max()) <= FP64_EXACT * max(1.0, float(truth.abs().max()))
    else:
        assert_no_worse([got], [plain.to(got.dtype)], [truth])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp64"])
class TestProducts:
    def test_linear(self, dtype: torch.dtype, shape: tuple[int, int, int], layout: str) -> None:
        m, k, n = shape
        x, weight = _matrix(m, k, dtype, layout), _matrix(n, k, dtype, layout)
        for bias in (None, torch.randn(n, dtype=torch.float64).to(dtype)):
            added = torch.zeros(n) if bias is None else bias
            truth = x.double() @ weight.double().t() + added.double()
            _check(linear(x, weight, bias), x.float() @ weight.float().t() + added.float(), truth)

    def test_product(self, dtype: torch.dtype, shape: tuple[int, int, int], layout: str) -> None:
        m, k, n = shape
        left, right = _matrix(m, k, dtype, layout), _matrix(k, n, dtype, layout)
        _check(product(left, right), left.float() @ right.float(), left.double() @ right.double())

    def test_add_product(self, dtype: torch.dtype, shape: tuple[int, int, int], layout: str) -> None:
        """Into a block of a larger matrix too; the rest of it stays."""
        m, k, n = shape
        left, right = _matrix(m, k, dtype, layout), _matrix(k, n, dtype, layout)
        for alpha in (1.0, -0.37):
            whole = _matrix(m, n + 4, dtype)
            before, target = whole.clone(), whole[:, 1 : n + 1]
            old = target.clone()
            add_product(target, left, right, alpha)
            plain, truth = (old.to(wide) + alpha * (left.to(wide) @ right.to(wide)) for wide in (torch.float32, torch.float64))
            _check(target, plain, truth)
            assert torch.equal(whole[:, 0], before[:, 0]) and torch.equal(whole[:, n + 1 :], before[:, n + 1 :])

    def test_scaled_product(self, dtype: torch.dtype, shape: tuple[int, int, int], layout: str) -> None:
        """What `out` held before does not matter, NaN included."""
        m, k, n = shape
        left, right, out = _matrix(m, k, dtype, layout), _matrix(k, n, dtype, layout), torch.full((m, n), torch.nan, dtype=dtype)
        scaled_product(left, right, 0.37, out)
        plain, truth = (0.37 * (left.to(wide) @ right.to(wide)) for wide in (torch.float32, torch.float64))
        _check(out, plain, truth)


@pytest.mark.parametrize("k", [3, 200])
def test_a_wider_product_is_rounded_with_the_sum(k: int) -> None:
    """float32 operands, a bfloat16 target: its error is one rounding of the sum."""
    target, left, right = _matrix(9, 6, torch.bfloat16), _matrix(9, k, torch.float32), _matrix(k, 6, torch.float32)
    old = target.double()
    add_product(target, left, right, 0.5)
    truth = old + 0.5 * (left.double() @ right.double())
    _check(target, truth.float(), truth)
