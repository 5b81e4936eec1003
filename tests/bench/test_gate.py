"""The gate passes the same gradient and refuses others, by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.gate import GateError, agreement

Gradients = dict[str, Tensor]


def gradients() -> Gradients:
    generator = torch.Generator().manual_seed(0)
    return {f"layers.{i}.lora_{kind}": torch.randn(7, 5, generator=generator) for i in range(3) for kind in "AB"}


def test_the_same_gradient_passes() -> None:
    noisy = {name: g + 1e-4 * torch.randn_like(g) for name, g in gradients().items()}
    assert agreement("ours", noisy, gradients()) == pytest.approx(1.0, abs=1e-6)


def first_matrix(change: Callable[[Tensor], Tensor]) -> Gradients:
    changed = gradients()
    name = next(iter(changed))
    return {**changed, name: change(changed[name])}


@pytest.mark.parametrize(
    "wrong",
    [
        first_matrix(torch.zeros_like),
        first_matrix(torch.neg),
        first_matrix(lambda g: g * torch.nan),
        {name: 1.02 * g for name, g in gradients().items()},
        {name: g + 0.06 * torch.randn(g.shape, generator=torch.Generator().manual_seed(1)) for name, g in gradients().items()},
    ],
    ids=["one matrix missing", "one matrix negated", "nan", "another normaliser", "6 % of noise"],
)
def test_a_wrong_gradient_is_refused(wrong: Gradients) -> None:
    with pytest.raises(GateError, match="ours and TRL disagree"):
        agreement("ours", wrong, gradients())


def test_matrices_of_one_side_only_are_named() -> None:
    lacking = gradients()
    lacking.pop("layers.1.lora_B")
    with pytest.raises(GateError, match=r"1 matrices .* layers\.1\.lora_B"):
        agreement("ours", lacking, gradients())
