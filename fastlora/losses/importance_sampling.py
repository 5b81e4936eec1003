"""Importance sampling for a sampler that is not the trainer, with TRL 1.16's rules.

Completions come from π_sampler (another engine, other kernels, another dtype), the surrogate assumes π_old, the trainer's own policy at the
time of sampling. The token loss is therefore multiplied by

    w_nt = π_old(y_nt) / π_sampler(y_nt) = exp(d_nt),    d_nt = m_nt (logp_old − logp_sampler)      token_*
    w_n1 = exp(Σ_t d_nt)                                                                          sequence_*
    *_truncate    w ← clamp(w, min, max)                (truncated importance sampling, TIS)
    *_mask        w ← w if min ≤ w ≤ max, else 0        (masked importance sampling, MIS)

without gradient. A token that the sampler could not score (NaN) has d = 0. Source: GRPOTrainer._generate_and_score_completions
(trl/trainer/grpo_trainer.py, "Compute the importance sampling ratio when using vLLM") and GRPOConfig.vllm_importance_sampling_mode,
_clip_max and _clip_min; the idea: F. Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training".

TRL runs the model once more for π_old whenever it samples with vLLM. That pass is needed only if an optimizer step comes between taking a
generation batch and its loss. Else π_old is the policy of the training pass (with vllm.staleness = 1 one step younger than the sampler's:
the ratio corrects for that too), whose own log-probabilities, detached, are π_old's, bit for bit where both passes see the same
micro-batches: the correction then costs no forward pass.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastlora.config import LossConfig
from fastlora.types import TrainBatch


def behaviour_logp(logp_nt: Tensor, batch: TrainBatch) -> Tensor:
    """logp_old [n, t], without gradient: the batch's own, or those of the current policy, which then is the one that sampled."""
    return logp_nt.detach() if batch.old_logp_nt is None else batch.old_logp_nt


def sampler_ratio(old_logp_nt: Tensor, batch: TrainBatch, config: LossConfig) -> Tensor | None:
    """w, [n, t] in the token modes and [n, 1] in the sequence modes, 1 at padding; None when config.sampler_correction is "none".

    old_logp_nt: float [n, t], nats. Raises ValueError when the batch does not say what the sampler said.
    """
    if config.sampler_correction == "none":
        return None
    low, high = config.sampler_correction_min, config.sampler_correction_max
    ratio = raw_ratio(old_logp_nt, batch, config)
    if config.sampler_correction.endswith("truncate"):
        return ratio.clamp(low, high)
    return ratio.masked_fill((ratio < low) | (ratio > (math.inf if high is None else high)), 0.0)


def raw_ratio(old_logp_nt: Tensor, batch: TrainBatch, config: LossConfig) -> Tensor:
    """w before it is truncated or masked; shapes and errors of `sampler_ratio`."""
    if batch.sampler_logp_nt is None:
        raise ValueError(f"loss.sampler_correction = '{config.sampler_correction}', but the batch has no log-probabilities of the sampler")
    difference_nt = ((old_logp_nt - batch.sampler_logp_nt) * batch.loss_mask_nt).nan_to_num(nan=0.0)
    if config.sampler_correction.startswith("sequence"):
        return torch.exp(difference_nt.sum(-1, keepdim=True))
    return torch.exp(difference_nt)
