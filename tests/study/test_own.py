"""The examples of docs/own through the settings that name them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastlora.allocation import allocate
from fastlora.config import ConfigError, LossConfig, RunConfig
from fastlora.losses.own import OwnLossError, own_loss
from fastlora.losses.policy import is_token_level, policy_loss
from fastlora.placement import scores
from fastlora.plugins import load_function
from fastlora.rewards.registry import load_rewards
from fastlora.selection import select_layers
from fastlora.types import Example, TrainBatch

OWN = Path(__file__).parents[2] / "docs" / "own"


def test_allocator() -> None:
    ranks = allocate(f"{OWN / 'allocator.py'}:two_levels", [0.1, 0.5, 0.3, 0.1], 40, r_min=4, r_max=20)
    assert ranks == (4, 20, 12, 4)


def test_selection() -> None:
    assert select_layers(f"{OWN / 'selection.py'}:every_other", [0.0] * 9, 3) == (0, 4, 8)


def test_score() -> None:
    sums = torch.tensor([[1.0, 4.0], [2.0, 16.0], [3.0, 5.0], [9.0, 9.0]]).reshape(4, 1, 2)
    assert scores({"m": sums}, 16, f"{OWN / 'score.py'}:steady_and_large")["m"].tolist() == [[0.375, 5.0]]


def test_reward() -> None:
    config = RunConfig().reward.model_copy(update={"functions": (f"{OWN / 'reward.py'}:short",)})
    with load_rewards(config) as rewards:
        rewards.check([Example(0, "p", "a")])


def batch(advantages_nt: torch.Tensor, mask_nt: torch.Tensor) -> TrainBatch:
    n, t = mask_nt.shape
    ids = torch.zeros(n, t, dtype=torch.long)
    return TrainBatch(ids, mask_nt, ids, mask_nt, mask_nt, advantages_nt, None, None, None, int(mask_nt.sum()) + 3)


def test_reinforce_has_the_gradient_of_the_surrogate_on_policy() -> None:
    """Against policy_loss with dapo, whose ratio is 1 on an on-policy batch; in float64, some tokens masked."""
    generator = torch.Generator().manual_seed(0)
    mask_nt = torch.rand(4, 7, generator=generator) < 0.7
    one = batch(torch.randn(4, 7, generator=generator, dtype=torch.float64), mask_nt)
    start = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    entropy = torch.rand(4, 7, generator=generator, dtype=torch.float64)
    split = {"accumulation_steps": 3, "steps_per_generation": 2}
    gradients = []
    for kind in ("own", "dapo"):
        logp_nt = start.clone().requires_grad_()
        if kind == "own":
            loss, metrics = own_loss(load_function(f"{OWN / 'loss.py'}:reinforce", "loss.function"), logp_nt, entropy, one, **split)
        else:
            loss, expected = policy_loss(logp_nt, entropy, one, LossConfig(), **split, max_completion_length=7, entropy_coef=0.0)
        (gradient,) = torch.autograd.grad(loss, logp_nt)
        gradients.append(gradient)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-15)
    for name in ("entropy", "entropy_sum", "entropy_tokens"):
        torch.testing.assert_close(metrics[name], expected[name], check_dtype=False)


def test_a_loss_of_another_shape_is_refused() -> None:
    one = batch(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(OwnLossError, match=r"returned \[2\]; one number per token, \[2, 3\]"):
        own_loss(
            lambda logp_nt, batch: logp_nt.sum(1), torch.zeros(2, 3), torch.zeros(2, 3), one, accumulation_steps=1, steps_per_generation=1
        )


def test_it_is_the_whole_loss() -> None:
    spec = f"{OWN / 'loss.py'}:reinforce"
    assert RunConfig.model_validate({"loss": {"function": spec, "beta": 0.1}}).loss.function == spec
    assert not is_token_level(LossConfig(function=spec), 0.0)
    with pytest.raises(ValueError, match=r"loss.function = .* is the whole loss"):
        RunConfig.model_validate({"loss": {"function": spec, "epsilon": 0.1}})
    with pytest.raises(ConfigError, match="no such file"):
        load_function("none.py:f", "loss.function")
