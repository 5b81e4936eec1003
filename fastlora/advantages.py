"""Rewards to advantages: how much better a completion, or a token, was than the others of its prompt.

Completions of one prompt are adjacent, `num_generations` = g of them. Two estimators (config.AdvantageConfig.estimator):

    trajectory   A_n  = (R_n − mean_group R) / (std R + eps)                              one number per completion
    deposits     d'_t = (d_t − mean_group d) / (std d + eps) at the deposits, else 0      one number per token
                 A_t  = d'_t if dense, else Σ_{t' ≥ t} d'_t'                              normalize = "deposits", as published
                 A_t  = (R_t − mean_group R) / (std R + eps), R_t = Σ_{t' ≥ t} d_t'       normalize = "returns", sparse only

Returns are averaged over the deposits, so that a step counts once however long it is; A_t is 0 behind a completion's last deposit. With one
deposit at the last token both are GRPO's advantage. With S deposits a completion the first has a spread of √S and the second of 1; but
its baseline does not know how many deposits are still to come, and pays for having many of them if they are positive.

std is Bessel-corrected, over the group, the batch, or absent (scale_rewards). `trajectory` is GRPO (arXiv 2402.03300) as TRL
1.16 computes it, bit for bit in float32 (trl/trainer/grpo_trainer.py, _generate_and_score_completions); `deposits` is that of
the reward-density study (github gernim/lora-reward-density).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.config import AdvantageConfig
from fastlora.types import Deposits


def trajectory_advantages(rewards_nk: Tensor, weights_k: Tensor, num_generations: int, config: AdvantageConfig) -> Tensor:
    """Advantages [n], float32, of completions scored by k reward functions.

    rewards_nk: float32 [n, k]; NaN = this function could not score this completion. A completion that no function could score
    has advantage 0 and does not enter any mean. weights_k: float32 [k].

    sum_then_normalize: weight and sum, then normalise by group. normalize_then_sum (GDPO, arXiv 2601.05242): normalise each
    function within its group, weight and sum, then normalise over the batch; as in TRL, scale_rewards has no say in it.

    Raises ValueError when n is no multiple of num_generations or the weights do not fit.
    """
    n, k = rewards_nk.shape
    _check_groups(n, num_generations)
    if weights_k.shape != (k,):
        raise ValueError(f"trajectory_advantages: weights_k is {tuple(weights_k.shape)} for {k} reward functions")
    unscorable_n = torch.isnan(rewards_nk).all(dim=1)
    if config.multi_objective_aggregation == "sum_then_normalize":
        rewards_n = _weighted_sum(rewards_nk, weights_k, unscorable_n)
        advantages_n = _normalize_by_group(rewards_n, num_generations, config)
    else:
        grouped_pgk = rewards_nk.reshape(-1, num_generations, k)
        centred_pgk = grouped_pgk - torch.nanmean(grouped_pgk, dim=1, keepdim=True)
        scored_nk = (centred_pgk / (_nan_std(grouped_pgk, dim=1) + config.eps)).view(n, k)
        rewards_n = _weighted_sum(scored_nk, weights_k, unscorable_n)
        advantages_n = (rewards_n - torch.nanmean(rewards_n)) / (_nan_std(rewards_n, dim=0) + config.eps)
    return torch.nan_to_num(advantages_n, nan=0.0)


def _weighted_sum(rewards_nk: Tensor, weights_k: Tensor, unscorable_n: Tensor) -> Tensor:
    return (rewards_nk * weights_k.unsqueeze(0)).nansum(dim=1).masked_fill(unscorable_n, torch.nan)


def _normalize_by_group(rewards_n: Tensor, num_generations: int, config: AdvantageConfig) -> Tensor:
    grouped_pg = rewards_n.view(-1, num_generations)
    advantages_n = rewards_n - torch.nanmean(grouped_pg, dim=1).repeat_interleave(num_generations)
    if config.scale_rewards == "group":
        return advantages_n / (_nan_std(grouped_pg, dim=1).squeeze(1).repeat_interleave(num_generations) + config.eps)
    if config.scale_rewards == "batch":
        return advantages_n / (_nan_std(rewards_n, dim=0) + config.eps)
    return advantages_n


def _nan_std(x: Tensor, dim: int) -> Tensor:
    """Bessel-corrected standard deviation along `dim` (kept), of the entries that are not NaN.

    A dimension of size one has standard deviation 0; fewer than two entries left by the NaNs give NaN.
    """
    if x.shape[dim] == 1:
        return torch.zeros_like(x)
    variance = torch.nanmean((x - torch.nanmean(x, dim=dim, keepdim=True)) ** 2, dim=dim, keepdim=True)
    entries = torch.sum(~torch.isnan(x), dim=dim, keepdim=True).to(x.dtype)
    bessel = torch.where(entries > 1, entries / (entries - 1), torch.nan)
    return torch.sqrt(variance * bessel)


def deposit_advantages(deposits: Deposits, completion_mask_nt: Tensor, num_generations: int, config: AdvantageConfig) -> Tensor:
    """Advantages [n, t], float32, of rewards deposited at tokens; 0 at padding.

    The mean and standard deviation are over all deposits (or over the returns at them, config.normalize) of a prompt's completions
    (scale_rewards = "batch": the standard deviation over all of the batch). A group where all of these are equal has advantage 0.
    completion_mask_nt: bool [n, t], the tokens that exist, right-padded.

    Raises ValueError when n is no multiple of num_generations, or a deposit lies at padding or is not finite (a completion that
    could not be scored must hold none).
    """
    n, t = completion_mask_nt.shape
    _check_groups(n, num_generations)
    _check_deposits(deposits, completion_mask_nt)
    at_nt = deposits.step_reward_mask_nt
    values_nt = deposits.token_rewards_nt.double().masked_fill(~at_nt, 0.0)
    returns_first = config.normalize == "returns" and not deposits.dense
    if returns_first:
        values_nt = _from_here_on(values_nt)
    wanted_nt = _from_here_on(at_nt) > 0 if returns_first else at_nt  # a return is wanted at every token up to the last deposit
    rows = (n // num_generations, num_generations * t)
    normalized_nt = _normalize(values_nt.view(rows), at_nt.view(rows), wanted_nt.view(rows), config).view(n, t)
    if not deposits.dense and not returns_first:
        normalized_nt = _from_here_on(normalized_nt)  # 0 at padding, which lies right of every deposit
    return normalized_nt.float()


def _from_here_on(x_nt: Tensor) -> Tensor:
    """Σ_{t' ≥ t} x_t'."""
    return x_nt.flip(1).cumsum(dim=1).flip(1)


def _normalize(values_pm: Tensor, at_pm: Tensor, wanted_pm: Tensor, config: AdvantageConfig) -> Tensor:
    """Float64 values [p, m] of the tokens of each prompt's group in one row, normalised with the moments of those at `at_pm`; 0 where they
    are not `wanted_pm`.

    In float64 equal 24-bit numbers sum, and divide, without rounding: they differ from their mean by 0, and not by a rounding
    error that a standard deviation of the same size would blow up to 1.
    """
    entries_p1 = at_pm.sum(dim=1, keepdim=True)
    mean_p1 = values_pm.masked_fill(~at_pm, 0.0).sum(dim=1, keepdim=True) / entries_p1.clamp(min=1)
    centred_pm = (values_pm - mean_p1).masked_fill(~wanted_pm, 0.0)
    if config.scale_rewards == "none":
        return centred_pm
    if config.scale_rewards == "group":
        squares_pm = centred_pm.masked_fill(~at_pm, 0.0).square()
        std = (squares_pm.sum(dim=1, keepdim=True) / (entries_p1 - 1).clamp(min=1)).sqrt()
    else:
        everything = values_pm[at_pm]
        std = everything.std() if len(everything) > 1 else everything.new_zeros(())
    return (centred_pm / (std + config.eps)).masked_fill(centred_pm == 0, 0.0)  # the mask matters when std + eps = 0


def _check_groups(n: int, num_generations: int) -> None:
    if n % num_generations:
        raise ValueError(f"advantages: {n} completions are no whole number of groups of {num_generations}")


def _check_deposits(deposits: Deposits, completion_mask_nt: Tensor) -> None:
    at_nt = deposits.step_reward_mask_nt
    for problem, bad_nt in (
        ("lies at padding", at_nt & ~completion_mask_nt),
        ("is not finite", at_nt & ~deposits.token_rewards_nt.isfinite()),
    ):
        if bool(bad_nt.any()):
            sample, token = bad_nt.nonzero()[0].tolist()
            raise ValueError(f"deposit_advantages: the deposit of sample {sample} at token {token} {problem}")
