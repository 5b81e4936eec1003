"""How far the sampler is from the trainer, on the tokens of one generation batch.

With d = logp_sampler − logp_trainer of a token, nats, the trainer being the policy that its optimizer step began with. That is the one
that sampled, so that d is numerical error alone; with vllm.staleness = 1 it is one step younger, and d has that step's movement in it.

    mismatch/mean                 mean of d: below 0 where the sampler thinks its tokens less likely than the trainer does
    mismatch/abs_mean, abs_max    mean and largest |d|
    mismatch/abs_p50, abs_p99     quantiles of |d|, nearest rank
    mismatch/first_third, middle_third, last_third
                                  mean |d| by place in the completion: errors of a KV cache grow with it, those of a head do not
    mismatch_kl                   mean of e^−d + d − 1, the k3 estimator of KL(π_sampler ‖ π_trainer) (joschu.net/blog/kl-approx.html); the
                                  name and formula of prime-rl and torchtitan
    mismatch/unscored             share of tokens that the sampler gave no number for (NaN), left out above

and, where loss.sampler_correction is on, of the ratio w that multiplies the loss (losses.importance_sampling):

    mismatch/ratio_min, ratio_mean, ratio_max      over tokens, or over sequences in the sequence modes
    mismatch/corrected                             share of tokens whose w was truncated or masked

Tokens that train only. All are plain numbers, computed once a step on [n, t]: no forward pass, no logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora.config import LossConfig
from fastlora.losses.importance_sampling import raw_ratio, sampler_ratio
from fastlora.types import TrainBatch

THIRDS = ("first_third", "middle_third", "last_third")


def mismatch_metrics(batches: Sequence[TrainBatch], config: LossConfig) -> dict[str, float]:
    """The metrics above over the micro-batches of a generation batch, which hold π_old in `old_logp_nt` and what the sampler said.

    What has no token (a third, if all completions are of one token; everything, if none trains) is NaN.
    """
    differences, thirds, trained = [], [], 0
    for batch in batches:
        assert batch.old_logp_nt is not None and batch.sampler_logp_nt is not None
        d_nt = batch.sampler_logp_nt - batch.old_logp_nt
        known_nt = batch.loss_mask_nt & ~d_nt.isnan()
        differences.append(d_nt[known_nt].double())
        thirds.append(_third_of_completion(batch.completion_mask_nt)[known_nt])
        trained += int(batch.loss_mask_nt.sum())
    d_t, third_t = torch.cat(differences), torch.cat(thirds)
    metrics = {
        "mismatch/mean": d_t.mean(),
        **{f"mismatch/{name}": value for name, value in _sizes(d_t.abs()).items()},
        **{f"mismatch/{name}": d_t[third_t == i].abs().mean() for i, name in enumerate(THIRDS)},
        "mismatch_kl": ((-d_t).exp() + d_t - 1).mean(),
        "mismatch/unscored": 1 - len(d_t) / max(trained, 1),
    }
    if config.sampler_correction != "none":
        metrics |= _ratio_metrics(batches, config)
    return {name: float(value) for name, value in metrics.items()}


def _third_of_completion(mask_nt: Tensor) -> Tensor:
    """int64 [n, t], 0, 1 or 2 at the tokens of the first, middle and last third of each completion."""
    return (mask_nt.cumsum(-1) - 1) * 3 // mask_nt.sum(-1, keepdim=True).clamp(min=1)


def _sizes(size_t: Tensor) -> dict[str, Tensor | float]:
    if not len(size_t):
        return dict.fromkeys(("abs_mean", "abs_max", "abs_p50", "abs_p99"), math.nan)
    quantiles = {name: size_t.kthvalue(math.ceil(q * len(size_t))).values for name, q in (("abs_p50", 0.5), ("abs_p99", 0.99))}
    return {"abs_mean": size_t.mean(), "abs_max": size_t.max(), **quantiles}


def _ratio_metrics(batches: Sequence[TrainBatch], config: LossConfig) -> dict[str, Tensor | float]:
    """Of the ratio as it multiplies the loss; a token that the correction leaves alone has the raw ratio, bit for bit."""
    applied, changed = [], []
    for batch in batches:
        assert batch.old_logp_nt is not None
        ratio = sampler_ratio(batch.old_logp_nt, batch, config)
        assert ratio is not None
        changed.append((ratio != raw_ratio(batch.old_logp_nt, batch, config)).expand_as(batch.loss_mask_nt)[batch.loss_mask_nt])
        per_token = ratio.shape == batch.loss_mask_nt.shape
        applied.append(ratio[batch.loss_mask_nt if per_token else batch.loss_mask_nt.any(-1, keepdim=True)])
    ratios, changed_t = torch.cat(applied).double(), torch.cat(changed).double()
    if not len(ratios):
        return dict.fromkeys(("mismatch/ratio_min", "mismatch/ratio_mean", "mismatch/ratio_max", "mismatch/corrected"), math.nan)
    return {
        "mismatch/ratio_min": ratios.min(),
        "mismatch/ratio_mean": ratios.mean(),
        "mismatch/ratio_max": ratios.max(),
        "mismatch/corrected": changed_t.mean(),
    }
