"""Gradients on the card through autograd, public functions and joined weights: error against fp64 beside that of plain torch formulas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import starmap

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.ops.linear_logprob import linear_logprob
from fastlora.ops.lora_linear import joined, lora_linear
from fastlora.ops.registry import dispatchers, implementation_counts
from tests.gpu.cases import PRECISIONS, Arguments, Numbers, Precision, linear_logprob_inputs, lora_linear_inputs
from tests.gpu.test_numerics import GPU, running
from tests.ops.implementations import PooledErrors
from tests.tolerances import GPU_ERROR_FACTOR, KERNEL_ERROR_FLOOR

pytestmark = pytest.mark.gpu

IMPLEMENTATION = "triton"

Function = Callable[..., list[Tensor]]
"""Of the op's arguments, in its order."""


def group(x: Tensor, weights_nd: list[Tensor], biases_n: list[Tensor | None], a_rd: Tensor, b_flat: Tensor, *rest: object) -> list[Tensor]:
    """lora_linear, its arguments in the order of the op."""
    b_mask, ranks, scales, _ = rest
    assert joined(weights_nd) is not None
    return lora_linear(x, weights_nd, biases_n, a_rd, b_flat, ranks, scales, b_mask)


def group_by_formula(
    x: Tensor, weights_nd: list[Tensor], biases_n: list[Tensor | None], a_rd: Tensor, b_flat: Tensor, *rest: object
) -> list[Tensor]:
    """y_m = x W_mᵀ + b_m + s_m (x A_mᵀ) B_mᵀ, frozen entries of B held constant."""
    b_mask, ranks, scales, _ = rest
    b_flat = b_flat if b_mask is None else torch.where(b_mask, b_flat, b_flat.detach())
    parts = b_flat.split([len(w) * r for w, r in zip(weights_nd, ranks, strict=True)])
    factors = zip(weights_nd, biases_n, a_rd.split(ranks), parts, ranks, scales, strict=True)
    return [F.linear(x, w, bias) + s * (F.linear(x, a) @ b.view(r, len(w))) for w, bias, a, b, r, s in factors]


def head(hidden_td: Tensor, weight_vd: Tensor, bias_v: None, targets_t: Tensor, temperature: float, *rest: object) -> list[Tensor]:
    """linear_logprob, its arguments in the order of the op."""
    return list(linear_logprob(hidden_td, weight_vd, targets_t, temperature=temperature))


def head_by_formula(
    hidden_td: Tensor, weight_vd: Tensor, bias_v: None, targets_t: Tensor, temperature: float, *rest: object
) -> list[Tensor]:
    """From all logits at once."""
    z_tv = F.linear(hidden_td, weight_vd)
    log_p_tv = (z_tv.to(torch.promote_types(z_tv.dtype, torch.float32)) / temperature).log_softmax(-1)
    return [log_p_tv.gather(1, targets_t[:, None]).squeeze(1), -(log_p_tv.exp() * log_p_tv).sum(-1)]


def outputs_and_gradients(run: Function, arguments: Arguments, seed: int) -> list[Tensor]:
    """What the function returns, and the gradient of every leaf for the same random gradients of the outputs."""
    leaves = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    outputs = run(*arguments)
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(y.shape, generator=generator).to(torch.bfloat16).to(y) for y in outputs]  # exact in every dtype here but fp16's
    gradients = torch.autograd.grad(outputs, leaves, grads, allow_unused=True, materialize_grads=True)
    return [*(y.detach() for y in outputs), *gradients]


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize(
    ("op", "build", "run", "formula"),
    [("lora_linear", lora_linear_inputs, group, group_by_formula), ("linear_logprob", linear_logprob_inputs, head, head_by_formula)],
    ids=["lora_linear", "linear_logprob"],
)
def test_outputs_and_gradients(
    op: str, build: Callable[..., Iterator[Arguments]], run: Function, formula: Function, precision: Precision
) -> None:
    errors, before = PooledErrors(), implementation_counts.copy()
    plain_and_exact = (list(build(Numbers(precision.dtype, GPU, exact=exact))) for exact in (False, True))
    with running(IMPLEMENTATION, precision):
        for seed, (plain, exact) in enumerate(zip(*plain_and_exact, strict=True)):
            errors.add(*starmap(outputs_and_gradients, [(run, plain, seed), (formula, plain, seed), (formula, exact, seed)]))
    errors.assert_within(GPU_ERROR_FACTOR[precision.name], KERNEL_ERROR_FLOOR)
    ran = {name for name_of_op, name in implementation_counts - before if name_of_op in (op, f"{op}_backward")}
    assert ran == {IMPLEMENTATION} or IMPLEMENTATION not in dispatchers[op].implementations
