"""grpo_loss's Triton kernel, compiled and run on the CPU (bench/triton_cpu), against the op's reference and its autograd in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton kernels need triton")

from bench.triton_cpu.launch import Watch, on_cpu
from fastlora.ops import grpo_loss as op
from tests.ops.implementations import relative_error
from tests.tolerances import SAME_IN_FLOAT32

BASE = op.Options(
    loss_type="dapo",
    importance_sampling_level="token",
    epsilon=0.2,
    epsilon_high=0.28,
    delta=None,
    beta=0.0,
    kl_estimator="k3",
    use_bias_correction_kl=True,
    top_entropy_quantile=1.0,
    off_policy_mask_threshold=None,
    entropy_coef=0.0,
    sapo_temperature_pos=1.0,
    sapo_temperature_neg=1.05,
    vespo_k_pos=2.0,
    vespo_lambda_pos=3.0,
    vespo_k_neg=3.0,
    vespo_lambda_neg=2.0,
    num_items_in_batch=77,
    accumulation_steps=3,
    steps_per_generation=2,
    max_completion_length=90,
)


def tensors(n: int, t: int, per_token: bool, importance: int) -> list[Tensor | None]:
    """logp, entropy, mask, advantages, old, ref, sampler, importance ratio. Ratios on both sides of every bound; what is masked is huge."""
    generator = torch.Generator().manual_seed(n + t)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mask = torch.rand(n, t, generator=generator) < 0.7
    if n > 1:
        mask[1] = False
    logp = normal(n, t) - 2
    old, ref = logp + 0.5 * normal(n, t), logp + 0.3 * normal(n, t)
    if t > 2:
        old[:, 2] = logp[:, 2]  # a ratio of exactly 1
    logp[~mask] = 1e4
    shape = (n, t) if importance == 2 else (n, 1)
    return [logp, normal(n, t).abs(), mask, normal(n, t if per_token else 1), old, ref, None, normal(*shape).exp() if importance else None]


def evaluate(function: Any, inputs: list[Tensor | None], options: op.Options) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, metrics, 3 · dloss/dlogp)."""
    leaf = inputs[0].clone().requires_grad_()  # type: ignore[union-attr]
    loss, metrics = function(leaf, *inputs[1:], *options)
    (gradient,) = torch.autograd.grad(3 * loss, leaf)
    return loss.detach(), metrics, gradient


def check(inputs: list[Tensor | None], options: op.Options) -> None:
    in_double = [x.double() if x is not None and x.is_floating_point() else x for x in inputs]
    in_double[0] = in_double[0].masked_fill(~inputs[2], -2.0)  # type: ignore[union-attr, operator] # 0 · e^10000 is NaN in the reference
    expected = evaluate(op._reference, in_double, options)
    with on_cpu(Watch(order_seed=1)):
        got = evaluate(op._TokenLevel.apply, inputs, options)
    for name, one, other in zip(("loss", "metrics", "gradient"), got, expected, strict=True):
        assert relative_error(one, other) <= 5 * SAME_IN_FLOAT32, name


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo"])
@pytest.mark.parametrize("estimator", [None, "k1", "k2", "k3", "density"])
def test_every_token_level_loss(loss_type: str, estimator: str | None) -> None:
    kl = {} if estimator is None else {"beta": 0.3, "kl_estimator": estimator, "use_bias_correction_kl": estimator in ("k1", "k3")}
    check(tensors(5, 63, per_token=False, importance=0), BASE._replace(loss_type=loss_type, **kl))


@pytest.mark.parametrize(("n", "t"), [(1, 1), (3, 1500)])
@pytest.mark.parametrize(("per_token", "importance", "delta"), [(True, 2, 1.5), (False, 1, 1.1)])
def test_shapes_importance_and_the_cap(n: int, t: int, per_token: bool, importance: int, delta: float) -> None:
    check(tensors(n, t, per_token, importance), BASE._replace(delta=delta, beta=0.1))


def test_without_old_logprobs_the_ratio_is_one_and_has_a_gradient() -> None:
    inputs = tensors(4, 20, per_token=False, importance=0)
    inputs[4] = None
    check(inputs, BASE._replace(loss_type="grpo", beta=0.2))


def test_nothing_to_train() -> None:
    inputs = tensors(2, 8, per_token=False, importance=0)
    inputs[2] = torch.zeros(2, 8, dtype=torch.bool)
    check(inputs, BASE._replace(loss_type="bnpo"))


def test_other_losses_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "triton_refuses", lambda device, *args: None)
    inputs = tensors(2, 8, per_token=False, importance=0)

    def reason(**changes: Any) -> str | None:
        return op._triton_refuses(torch.device("cpu"), *inputs, *BASE._replace(**changes))

    assert reason() is None
    assert "vespo" in (reason(loss_type="vespo") or "") and "sequence-level" in (reason(importance_sampling_level="sequence") or "")
    assert "entropy bonus" in (reason(entropy_coef=0.1) or "")
