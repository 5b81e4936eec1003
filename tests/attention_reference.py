"""What the tests of packed attention's GPU implementations share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastlora.ops import packed_attention as op
from fastlora.ops.registry import Implementation, dispatchers, implementation_counts, use_implementation
from tests.tolerances import FP64_EXACT


def let_run_here(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The op's implementation of this name refuses nothing any more, in either pass."""
    for op_name in ("packed_attention", "packed_attention_backward"):
        implementations = dispatchers[op_name].implementations
        monkeypatch.setitem(implementations, name, Implementation(name, implementations[name].run, lambda device, *args: None))


def assert_is_the_reference(name: str, arguments: tuple[Any, ...]) -> None:
    """Outputs and gradients of q, k and v through the op, rotation included; and it was `name` that ran, in both passes."""
    q, k, v, *rest = arguments
    dout = torch.randn_like(q)

    def outputs(implementation: str) -> list[torch.Tensor]:
        with use_implementation(implementation):
            out, _ = op.packed_attention_op(q, k, v, *rest)
            return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]

    before = implementation_counts.copy()
    ours = outputs(name)
    ran = implementation_counts - before
    assert ran["packed_attention", name] == ran["packed_attention_backward", name] == 1
    for got, expected in zip(ours, outputs("reference"), strict=True):
        assert got.shape == expected.shape and float((got - expected).abs().max()) <= 10 * FP64_EXACT
