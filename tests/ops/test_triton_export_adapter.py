"""export_adapter's Triton kernel, compiled and run on the CPU (bench/triton_cpu): the reference's bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton kernels need triton")

from bench.triton_cpu.launch import Watch, on_cpu
from fastlora.ops import export_adapter as op
from fastlora_triton import export_adapter as kernels

SAMPLES = list(op.sample_inputs(torch.float32, torch.device("cpu")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arguments", SAMPLES, ids=range(len(SAMPLES)))
def test_every_bit_is_the_references(arguments: tuple[Any, ...], dtype: torch.dtype) -> None:
    flat, *rest, _ = arguments
    outputs = op._empty_outputs(flat, *rest, dtype)
    for out in outputs:
        out.fill_(float("nan"))
    with on_cpu(Watch(order_seed=3)):
        kernels.export_adapter(flat, op._tiles(flat, *rest, dtype), *outputs)
    assert all(map(torch.equal, outputs, op._reference(flat, *rest, dtype)))
