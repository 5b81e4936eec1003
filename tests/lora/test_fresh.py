"""dB of an untouched adapter without the rest of it, against the whole adapter in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from fastlora.lora.fresh import with_gradient_of_b
from fastlora.lora.groups import AttachError
from fastlora.ops.lora_linear import lora_linear
from tests.lora.adapters import attach_uneven
from tests.tolerances import FP64_EXACT


@pytest.mark.parametrize("t", [0, 1, 63])
@pytest.mark.parametrize("ranks", [[3], [0, 1, 17], [64, 0, 3]], ids=str)
def test_group(t: int, ranks: list[int]) -> None:
    """y, dX and dB of lora_linear at B = 0."""
    generator = torch.Generator().manual_seed(t)
    d, outs = 24, [7 + 5 * m for m in range(len(ranks))]
    x, *weights = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((2, t, d), *((n, d) for n in outs)))
    a_rd = torch.randn(sum(ranks), d, generator=generator, dtype=torch.float64)
    dys = [torch.randn(2, t, n, generator=generator, dtype=torch.float64) for n in outs]
    scales = [0.5 + m for m in range(len(ranks))]

    def run(fresh: bool) -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        b_flat = torch.zeros(sum(n * r for n, r in zip(outs, ranks, strict=True)), dtype=torch.float64, requires_grad=True)
        if fresh:
            ys = with_gradient_of_b(leaf, [leaf @ w.t() for w in weights], a_rd, b_flat, ranks, scales)
        else:
            ys = lora_linear(leaf, weights, [None] * len(outs), a_rd, b_flat, ranks, scales, None, [])
        return [*ys, *torch.autograd.grad(ys, (leaf, b_flat), dys)]

    for ours, theirs in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=FP64_EXACT, atol=FP64_EXACT)


def test_model(tiny_llama: PreTrainedModel) -> None:
    """The gradient of a whole model's B; the adapter is as before afterwards."""
    model = tiny_llama.double()
    adapter = attach_uneven(model, noise=0.0, freeze_a=True)
    ids = torch.arange(3, 24).reshape(3, 7)

    def gradient() -> torch.Tensor:
        adapter.flat.grad.zero_()
        model(input_ids=ids, labels=ids).loss.backward()
        return adapter.flat.grad.double().clone()

    whole = gradient()
    with adapter.fresh():
        alone = gradient()
    assert bool(whole.any())
    assert float((alone - whole).abs().max() / whole.abs().max()) < 1e-6  # the flat gradient is float32
    assert torch.equal(gradient(), whole)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"freeze_a": True}, r"B of model\.layers\.0\.self_attn\.q_proj is not zero"),
        ({"noise": 0.0}, "A trains"),
        ({"noise": 0.0, "freeze_a": True, "b_mask_nr": {}}, "a mask selects entries of B"),
    ],
)
def test_an_adapter_that_is_not_fresh_is_refused(tiny_llama: PreTrainedModel, options: dict[str, Any], why: str) -> None:
    adapter = attach_uneven(tiny_llama, **options)
    with pytest.raises(AttachError, match=f"not fresh: {why}"), adapter.fresh():
        pytest.fail("entered")
