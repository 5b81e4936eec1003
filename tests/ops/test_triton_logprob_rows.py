"""logprob_rows' Triton kernels, compiled and run on the CPU (bench/triton_cpu), against the op's reference in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton kernels need triton")

from bench.triton_cpu.launch import Watch, on_cpu
from fastlora.ops.logprob_rows import _reference, _reference_backward
from fastlora_triton import logprob_rows as kernels
from tests.ops.implementations import relative_error
from tests.tolerances import SAME_IN_FLOAT32


def make_rows(t: int, v: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(t)
    z_tv = (4 * torch.randn(t, v, generator=generator)).to(dtype)
    z_tv[:, 1::7] = -float("inf")  # ruled out
    return z_tv, torch.randint(0, v, (t,), generator=generator) // 7 * 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("t", "v"), [(0, 8), (1, 1), (63, 97), (5, 9001), (3, 4096)])
@pytest.mark.parametrize("with_entropy", [True, False])
def test_forward_and_backward(t: int, v: int, with_entropy: bool, dtype: torch.dtype) -> None:
    z_tv, targets_t = make_rows(t, v, dtype)
    truth = _reference(z_tv.double(), targets_t, 0.9, with_entropy)
    dlogp_t, dentropy_t = torch.randn(2, t)
    grad_entropy = dentropy_t if with_entropy else None
    expected = z_tv.double()
    _reference_backward(
        expected, targets_t, dlogp_t.double(), None if grad_entropy is None else grad_entropy.double(), truth[2], truth[1], 0.9
    )
    with on_cpu(Watch(order_seed=t + 1)):
        outputs = kernels.forward(z_tv, targets_t, 0.9, with_entropy)
        kernels.backward_(z_tv, targets_t, dlogp_t, grad_entropy, outputs[2], outputs[1], 0.9)
    for got, wanted in zip(outputs, truth, strict=True):
        assert got.shape == wanted.shape and (not got.numel() or relative_error(got, wanted) <= SAME_IN_FLOAT32)
    assert not t or relative_error(z_tv, expected) <= max(5 * SAME_IN_FLOAT32, torch.finfo(dtype).eps)


def test_a_target_outside_is_nan() -> None:
    z_tv, _ = make_rows(3, 20, torch.float32)
    with on_cpu():
        logp_t, *_ = kernels.forward(z_tv, torch.tensor([0, 20, -1]), 1.0, False)
    assert logp_t.isnan().tolist() == [False, True, True]


def test_offsets_beyond_32_bits() -> None:
    """8,193 rows of 262,144 logits; the last one lies beyond 2^31. Memory that nobody has written costs nothing."""
    t, v = 8193, 262_144
    z_tv = torch.empty(t, v, dtype=torch.bfloat16)
    z_tv[-1] = 0
    z_tv[-1, 5] = 3
    with on_cpu(Watch(conflicts=False)):
        logp_t, *_ = kernels.forward(z_tv, torch.full((t,), 5), 1.0, False)
    assert t * v > 2**31 and logp_t[-1].item() == pytest.approx(3 - math.log(v - 1 + math.exp(3)), abs=1e-4)
