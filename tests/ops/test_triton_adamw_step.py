"""adamw_step's Triton kernels, compiled and run on the CPU (bench/triton_cpu), against the op's reference in fp64 and its own buffers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton kernels need triton")

from bench.triton_cpu.launch import Watch, on_cpu
from fastlora.ops import adamw_step as op
from fastlora.ops.registry import use_implementation
from fastlora_triton import adamw_step as kernels
from tests.ops.implementations import relative_error
from tests.tolerances import FP32_ADAMW

CPU = torch.device("cpu")
STEPS = [
    pytest.param(arguments, id=name)
    for name, arguments in zip(("none", "all", "index"), op.sample_step_inputs(torch.float32, CPU), strict=True)
]


def double(arguments: tuple[Any, ...]) -> list[Any]:
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]


@pytest.mark.parametrize("arguments", STEPS)
def test_step_is_the_reference_and_gaps_stay(arguments: tuple[Any, ...]) -> None:
    arguments = tuple(a.clone() if isinstance(a, Tensor) else a for a in arguments)
    expected, before = double(arguments), arguments[0].clone()
    with use_implementation("reference"):
        op.adamw_step_op(*expected)
    with on_cpu(Watch(order_seed=3)):
        kernels.adamw_step(*arguments)
    for got, wanted in zip((arguments[0], *arguments[2:4]), (expected[0], *expected[2:4]), strict=True):
        assert got.numel() == 0 or float((got - wanted).abs().max()) <= FP32_ADAMW
    still = expected[0] == before.double()
    assert torch.equal(arguments[0][still], before[still])


@pytest.mark.parametrize("arguments", list(op.sample_norm_inputs(torch.float32, CPU)), ids=("none", "all", "index"))
def test_norms(arguments: tuple[Any, ...]) -> None:
    with use_implementation("reference"):
        expected = op.gradient_norms_op(*double(arguments))
    with on_cpu(Watch(order_seed=3)):
        norms = kernels.gradient_norms(*arguments)
    assert norms.shape == expected.shape and (not len(norms) or relative_error(norms, expected) < 2e-7)
