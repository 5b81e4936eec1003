"""Advantages against the definitions, worked out group by group with NumPy in float64; TRL's bits are in tests/parity."""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastlora.advantages import deposit_advantages, trajectory_advantages
from fastlora.config import AdvantageConfig
from fastlora.types import Deposits
from tests.tolerances import FP32_ADVANTAGE

SCALES = get_args(AdvantageConfig.model_fields["scale_rewards"].annotation)
NAN = math.nan


def _std(values: np.ndarray) -> float:
    """Bessel-corrected; 0 for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _close(got: Tensor, expected: np.ndarray) -> bool:
    return bool(np.allclose(got.double().numpy(), expected, rtol=FP32_ADVANTAGE, atol=FP32_ADVANTAGE))


# --- one number per completion ---


def _trajectory_oracle(rewards: np.ndarray, weights: np.ndarray, g: int, scale: str, eps: float) -> np.ndarray:
    """sum_then_normalize; unscorable completions are left out of every mean and get 0."""
    total = np.where(np.isnan(rewards).all(1), NAN, np.nansum(rewards * weights, axis=1))
    result = np.zeros(len(total))
    for start in range(0, len(total), g):
        rows = range(start, start + g)
        scored = np.array([total[i] for i in rows if not math.isnan(total[i])])
        std = {"group": _std(scored), "batch": _std(total[~np.isnan(total)]), "none": None}[scale]
        for i in rows:
            if not math.isnan(total[i]) and (scale != "group" or len(scored) > 1 or g == 1):
                result[i] = (total[i] - scored.mean()) / (1 if std is None else std + eps)
    return result


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("with_nan", [False, True])
@pytest.mark.parametrize(("prompts", "g", "k"), [(1, 2, 1), (3, 4, 2), (5, 7, 3)])
def test_trajectory(prompts: int, g: int, k: int, with_nan: bool, scale: str) -> None:
    rewards_nk, weights_k = torch.randn(prompts * g, k), torch.linspace(0.5, 2, k)
    if with_nan:
        rewards_nk[torch.rand(prompts * g, k) < 0.3] = NAN
        rewards_nk[0] = NAN
    config = AdvantageConfig(scale_rewards=scale, eps=1e-3)
    got = trajectory_advantages(rewards_nk, weights_k, g, config)
    assert got.dtype == torch.float32 and got.shape == (prompts * g,)
    assert _close(got, _trajectory_oracle(rewards_nk.double().numpy(), weights_k.double().numpy(), g, scale, 1e-3))


@pytest.mark.parametrize("g", [2, 5])
def test_normalize_then_sum(g: int) -> None:
    rewards_nk, weights_k = torch.randn(3 * g, 2), torch.tensor([1.0, 0.25])
    x = rewards_nk.double().numpy().reshape(3, g, 2)
    normalized = (x - x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + 1e-3)
    total = normalized.reshape(3 * g, 2) @ weights_k.double().numpy()
    expected = (total - total.mean()) / (total.std(ddof=1) + 1e-3)
    config = AdvantageConfig(multi_objective_aggregation="normalize_then_sum", eps=1e-3)
    assert _close(trajectory_advantages(rewards_nk, weights_k, g, config), expected)


def test_trajectory_worked_by_hand() -> None:
    """Group (1, 0, 0, 1): mean 1/2, std √(1/3). Group (2, 2, 2, 2): nothing to learn. Last group: one scorable completion."""
    rewards_nk = torch.tensor([[1.0], [0.0], [0.0], [1.0], [2.0], [2.0], [2.0], [2.0], [NAN], [5.0], [NAN], [NAN]])
    got = trajectory_advantages(rewards_nk, torch.ones(1), 4, AdvantageConfig(eps=0.0))
    a = 0.5 * math.sqrt(3)
    assert _close(got, np.array([a, -a, -a, a] + [0.0] * 8))


@pytest.mark.parametrize(
    ("weights_k", "g", "message"),
    [(torch.ones(2), 4, r"6 completions are no whole number of groups of 4"), (torch.ones(3), 3, r"weights_k is \(3,\) for 2")],
)
def test_trajectory_refuses_by_name(weights_k: Tensor, g: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trajectory_advantages(torch.zeros(6, 2), weights_k, g, AdvantageConfig())


# --- one number per token ---


def _deposits(token_rewards_nt: Tensor, at_nt: Tensor, dense: bool) -> Deposits:
    return Deposits(token_rewards_nt * at_nt, token_rewards_nt.sum(1), at_nt, dense)


def _deposit_oracle(deposits: Deposits, mask: np.ndarray, g: int, scale: str, eps: float) -> np.ndarray:
    values, at = deposits.token_rewards_nt.double().numpy(), deposits.step_reward_mask_nt.numpy()
    result = np.zeros(values.shape)
    for start in range(0, len(values), g):
        rows = slice(start, start + g)
        own = values[rows][at[rows]]
        for i in range(start, start + g):
            running = 0.0
            for j in reversed(range(values.shape[1])):
                std = {"group": _std(own), "batch": _std(values[at]), "none": None}[scale]
                normalized = 0.0
                if at[i, j]:
                    centred = values[i, j] - own.mean()
                    normalized = 0.0 if centred == 0 else centred / (1 if std is None else std + eps)
                running += normalized
                result[i, j] = (normalized if deposits.dense else running) if mask[i, j] else 0.0
    return result


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dense", [False, True])
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 7), st.integers(0, 2**31))
def test_deposits(scale: str, dense: bool, prompts: int, g: int, t: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = prompts * g
    lengths = torch.randint(0, t + 1, (n, 1), generator=generator)
    mask_nt = torch.arange(t) < lengths
    at_nt = mask_nt if dense else mask_nt & (torch.rand(n, t, generator=generator) < 0.5)
    deposits = _deposits(torch.randn(n, t, generator=generator), at_nt, dense)
    got = deposit_advantages(deposits, mask_nt, g, AdvantageConfig(scale_rewards=scale, eps=1e-3))
    assert got.dtype == torch.float32 and got.shape == (n, t)
    assert _close(got, _deposit_oracle(deposits, mask_nt.numpy(), g, scale, 1e-3))


def _returns_oracle(deposits: Deposits, g: int, scale: str, eps: float) -> np.ndarray:
    """normalize = "returns": sums of what is still to come, normalised with the moments of those at the deposits."""
    values, at = deposits.token_rewards_nt.double().tolist(), deposits.step_reward_mask_nt.tolist()
    returns = [
        [sum(v for v, here in zip(row[j:], holds[j:], strict=True) if here) for j in range(len(row))]
        for row, holds in zip(values, at, strict=True)
    ]
    everything = np.array([r for row, holds in zip(returns, at, strict=True) for r, here in zip(row, holds, strict=True) if here])
    result = np.zeros((len(values), len(values[0])))
    for i, row in enumerate(returns):
        start = i // g * g
        own = np.array([returns[k][j] for k in range(start, start + g) for j in range(len(row)) if at[k][j]])
        for j, value in enumerate(row):
            if any(at[i][j:]) and value != own.mean():
                std = {"group": _std(own), "batch": _std(everything), "none": None}[scale]
                result[i, j] = (value - own.mean()) / (1 if std is None else std + eps)
    return result


@pytest.mark.parametrize("scale", SCALES)
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 7), st.integers(0, 2**31))
def test_normalised_returns(scale: str, prompts: int, g: int, t: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = prompts * g
    mask_nt = torch.arange(t) < torch.randint(0, t + 1, (n, 1), generator=generator)
    at_nt = mask_nt & (torch.rand(n, t, generator=generator) < 0.5)
    deposits = _deposits(torch.randint(-8, 9, (n, t), generator=generator) / 4, at_nt, dense=False)  # sums without rounding: 0 is 0
    got = deposit_advantages(deposits, mask_nt, g, AdvantageConfig(scale_rewards=scale, eps=1e-3, normalize="returns"))
    assert got.dtype == torch.float32 and _close(got, _returns_oracle(deposits, g, scale, 1e-3))


def test_normalised_returns_by_hand() -> None:
    """Steps of two completions (1, 1 | 0) and (1, 0): returns at the steps 2, 1, 0 and 1, 0: mean .8, std √.7. The last token is behind."""
    at_nt = torch.tensor([[0, 1, 1, 1, 0], [1, 0, 0, 1, 0]], dtype=torch.bool)
    values_nt = torch.tensor([[9.0, 1.0, 1.0, 0.0, 9.0], [1.0, 9.0, 9.0, 0.0, 9.0]])
    config = AdvantageConfig(eps=0.0, normalize="returns")
    got = deposit_advantages(_deposits(values_nt, at_nt, dense=False), torch.ones(2, 5, dtype=torch.bool), 2, config)
    returns = np.array([[2, 2, 1, 0, 0.8], [1, 0, 0, 0, 0.8]])
    assert _close(got, (returns - 0.8) / math.sqrt(0.7))


@pytest.mark.parametrize("normalize", ["deposits", "returns"])
def test_the_spread_of_summed_steps(normalize: str) -> None:
    """64 steps of noise: as published the advantages spread like √64 / √2 ≈ 5.7, normalised returns like 1."""
    at_nt = torch.ones(8, 64, dtype=torch.bool)
    deposits = _deposits(torch.randn(8, 64), at_nt, dense=False)
    std = float(deposit_advantages(deposits, at_nt, 8, AdvantageConfig(normalize=normalize)).std())
    assert abs(std - 1) < 1e-3 if normalize == "returns" else 3 < std < 9


@pytest.mark.parametrize("normalize", ["deposits", "returns"])
def test_dense_deposits_know_no_returns(normalize: str) -> None:
    at_nt = torch.ones(4, 3, dtype=torch.bool)
    deposits = _deposits(torch.randn(4, 3), at_nt, dense=True)
    got = deposit_advantages(deposits, at_nt, 2, AdvantageConfig(normalize=normalize))
    assert torch.equal(got, deposit_advantages(deposits, at_nt, 2, AdvantageConfig()))


@pytest.mark.parametrize("normalize", ["deposits", "returns"])
def test_outcome_deposits_are_grpo(normalize: str) -> None:
    """One deposit at each last token: the return-to-go is the trajectory's advantage at every token, the eos included."""
    lengths_n1 = torch.tensor([[3], [5], [1], [4]])
    mask_nt, last_nt = torch.arange(5) < lengths_n1, torch.arange(5) == lengths_n1 - 1
    rewards_n = torch.tensor([1.0, 0.0, 0.25, 1.0])
    config = AdvantageConfig(eps=1e-8, normalize=normalize)
    got = deposit_advantages(_deposits(rewards_n[:, None].expand(4, 5), last_nt, dense=False), mask_nt, 2, config)
    expected_n = trajectory_advantages(rewards_n[:, None], torch.ones(1), 2, config)
    assert _close(got, (expected_n[:, None] * mask_nt).double().numpy())


@pytest.mark.parametrize("normalize", ["deposits", "returns"])
def test_no_tokens_at_all(normalize: str) -> None:
    nothing = torch.zeros(4, 0)
    deposits = Deposits(nothing, torch.full((4,), NAN), nothing.bool(), dense=False)
    assert deposit_advantages(deposits, nothing.bool(), 2, AdvantageConfig(normalize=normalize)).shape == (4, 0)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-3, 7.0])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_no_spread_is_exactly_zero(scale: str, dense: bool, value: float, eps: float) -> None:
    """Equal deposits, a single deposit, and none: in float32 0.1 is not the mean of seven 0.1, and 1e-8 would not save us."""
    mask_nt = torch.ones(6, 7, dtype=torch.bool)
    at_nt = torch.zeros(6, 7, dtype=torch.bool)
    at_nt[:2], at_nt[3, 2] = True, True  # three groups of two: equal deposits, one deposit, none
    values = torch.full((6, 7), value)
    values[3, 2] = -4.0
    got = deposit_advantages(_deposits(values, at_nt, dense), mask_nt, 2, AdvantageConfig(scale_rewards=scale, eps=eps))
    assert torch.equal(got, torch.zeros(6, 7))


def test_deposits_are_not_written_into() -> None:
    deposits = _deposits(torch.randn(4, 3), torch.ones(4, 3, dtype=torch.bool), dense=False)
    before = deposits.token_rewards_nt.clone()
    deposit_advantages(deposits, torch.ones(4, 3, dtype=torch.bool), 2, AdvantageConfig())
    assert torch.equal(deposits.token_rewards_nt, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"at": (1, 2)}, "the deposit of sample 1 at token 2 lies at padding"),
        ({"nan": (2, 0)}, "the deposit of sample 2 at token 0 is not finite"),
        ({"g": 3}, "4 completions are no whole number of groups of 3"),
    ],
    ids=str,
)
def test_deposits_refused_by_name(changes: dict[str, Any], message: str) -> None:
    mask_nt = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], dtype=torch.bool)
    at_nt, values = torch.zeros(4, 3, dtype=torch.bool), torch.ones(4, 3)
    at_nt[:, 0] = True
    if "at" in changes:
        at_nt[changes["at"]] = True
    if "nan" in changes:
        values[changes["nan"]] = NAN
    with pytest.raises(ValueError, match=message):
        deposit_advantages(Deposits(values, values.sum(1), at_nt, dense=False), mask_nt, changes.get("g", 2), AdvantageConfig())
