"""The CPU launcher of compiled Triton kernels: right numbers in every dtype, and every mistake that it promises to see, planted and
seen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton kernels need triton")

from triton.tools.tensor_descriptor import TensorDescriptor

from bench.triton_cpu.emit import translate
from bench.triton_cpu.launch import LaunchError, Watch, on_cpu
from fastlora_triton.launch import launch
from tests.ops.implementations import relative_error
from tests.tolerances import FP32_ONE_ROUNDING, SAME_IN_FLOAT32
from tests.triton_cpu import kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def nans(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 63, 64, 1000])
@pytest.mark.parametrize("seed", [0, 1])
def test_masked_copy_is_exact_in_any_order(n: int, dtype: torch.dtype, seed: int) -> None:
    x, y = torch.randn(n).to(dtype), nans(n, dtype=dtype)
    with on_cpu(Watch(order_seed=seed)):
        launch(kernels.double_kernel, (-(-n // 64),), x, y, n, BLOCK=64)
    assert torch.equal(y, 2 * x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), [(64, 64, 32), (63, 40, 72), (1, 128, 200)])
def test_product_by_descriptors(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    """Blocks that stick out read zeros and write nothing; sums are float32, rounded once."""
    x, w, y = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), nans(m, n, dtype=dtype)
    truth = x.double() @ w.double().T
    descriptors = [TensorDescriptor.from_tensor(t, block) for t, block in ((x, [64, 32]), (w, [64, 32]), (y, [64, 64]))]
    with on_cpu():
        launch(kernels.product_kernel, (1, -(-n // 64)), *descriptors, k, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, PRECISION="ieee")
    assert relative_error(y, truth) < max(torch.finfo(dtype).eps, SAME_IN_FLOAT32)


def test_tf32_rounds_operands_to_10_bits() -> None:
    x, w, y = torch.randn(64, 64), torch.randn(64, 64), nans(64, 64)
    descriptors = [TensorDescriptor.from_tensor(t, [64, 64]) for t in (x, w, y)]
    with on_cpu():
        launch(kernels.product_kernel, (1, 1), *descriptors, 64, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, PRECISION="tf32")

    def rounded(t: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(t.double())
        return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)

    assert relative_error(y, rounded(x) @ rounded(w).T) < 1e-6
    assert relative_error(y, x.double() @ w.double().T) > 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_reductions(dtype: torch.dtype) -> None:
    x, y = torch.randn(3, 100).to(dtype), nans(3, 100, dtype=dtype)
    with on_cpu():
        launch(kernels.softmax_kernel, (3,), x, y, 100, BLOCK=128)
    assert relative_error(y, x.double().softmax(-1)) < torch.finfo(dtype).eps


@pytest.mark.parametrize("which", [0, 1, 2])
def test_tuples_of_tensors(which: int) -> None:
    inputs, y = tuple(torch.randn(20) for _ in range(3)), nans(20)
    with on_cpu():
        launch(kernels.chosen_kernel, (1,), inputs, y, which, 20, BLOCK=32)
    assert torch.equal(y, inputs[which])


def test_atomics_of_several_programs_add_up() -> None:
    x, y = torch.ones(1000), torch.zeros(1)
    with on_cpu():
        launch(kernels.atomic_sum_kernel, (16,), x, y, 1000, BLOCK=64)
    assert abs(float(y) - 1000) < 1000 * FP32_ONE_ROUNDING


def test_an_empty_grid_is_no_launch() -> None:
    with on_cpu():
        launch(kernels.double_kernel, (0,), torch.zeros(0), torch.zeros(0), 0, BLOCK=64)


def test_load_out_of_bounds_is_reported_with_program_and_tensor() -> None:
    with (
        on_cpu(),
        pytest.raises(LaunchError, match=r"unmasked_kernel: load out of bounds in program 1: \+0 bytes from the end of x_ptr \(100,\)"),
    ):
        launch(kernels.unmasked_kernel, (2,), torch.zeros(100), torch.zeros(128), 100, BLOCK=64)


def test_store_out_of_bounds_is_reported() -> None:
    with on_cpu(), pytest.raises(LaunchError, match=r"store out of bounds in program 1: .* of y_ptr \(100,\)"):
        launch(kernels.unmasked_kernel, (2,), torch.zeros(128), torch.zeros(100), 100, BLOCK=64)


def test_lost_update_is_reported() -> None:
    with on_cpu(Watch(threads=1)), pytest.raises(LaunchError, match=r"program 1 loads from y_ptr \(1,\) what program 0 stores"):
        launch(kernels.lost_update_kernel, (4,), torch.ones(256), torch.zeros(1), 256, BLOCK=64)


def test_masked_load_without_a_value_is_not_zero() -> None:
    """What a GPU leaves there is undefined; here it is a number that no test would expect."""
    x, y = torch.ones(10), nans(64)
    with on_cpu():
        launch(kernels.double_kernel, (1,), x, y, 10, BLOCK=64)
    assert torch.equal(y[:10], 2 * x) and y[10:].isnan().all()


def test_operations_that_are_not_known_are_named() -> None:
    ttir = "module {\n tt.func public @k(%x: i32) {\n %0 = tt.histogram %x : i32 -> i32\n tt.return\n }\n}"
    with pytest.raises(NotImplementedError, match=r"tt.histogram %x"):
        translate(ttir)
