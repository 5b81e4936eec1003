"""The reinforcement-learning objective: a micro-batch's log-probabilities to a loss and named metrics."""

from __future__ import annotations

from torch import Tensor

from fastlora.config import LossConfig
from fastlora.losses.importance_sampling import behaviour_logp, sampler_ratio
from fastlora.ops.grpo_loss import CLIPPED_LOSSES, METRICS, grpo_loss
from fastlora.types import TrainBatch


def policy_loss(
    logp_nt: Tensor,
    entropy_nt: Tensor,
    batch: TrainBatch,
    config: LossConfig,
    *,
    accumulation_steps: int,
    steps_per_generation: int,
    max_completion_length: int,
    entropy_coef: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss to call backward on, metrics as 0-dim tensors) of one micro-batch; formulas in fastlora/ops/grpo_loss.py.

    logp_nt, entropy_nt: float [n, t], nats, of the batch's completions, finite at padding. entropy_coef: what applies to this
    optimizer step (`losses.entropy_control`; config.entropy_coef when the control is off). The losses of an optimizer step's
    `accumulation_steps` micro-batches add up: they are already divided. Metrics that the config switches off are absent; names
    as in `ops.grpo_loss.METRICS`.

    Raises ValueError when shapes do not fit, config.beta > 0 and the batch has no reference log-probabilities, or
    config.sampler_correction is on and it has no sampler's.
    """
    loss, metrics_m = grpo_loss(
        logp_nt,
        entropy_nt,
        batch.loss_mask_nt,
        batch.advantages_nt,
        config,
        old_logp_nt=batch.old_logp_nt,
        ref_logp_nt=batch.ref_logp_nt,
        sampler_logp_nt=batch.sampler_logp_nt,
        importance_ratio_nt=sampler_ratio(behaviour_logp(logp_nt, batch), batch, config),
        entropy_coef=entropy_coef,
        num_items_in_batch=batch.num_items_in_batch,
        accumulation_steps=accumulation_steps,
        steps_per_generation=steps_per_generation,
        max_completion_length=max_completion_length,
    )
    off = _switched_off(config)
    return loss, {name: value for name, value in zip(METRICS, metrics_m.unbind(), strict=True) if name not in off}


def is_token_level(config: LossConfig, entropy_coef: float) -> bool:
    """The derivative of the loss with respect to one token's log-probability depends on no other token's.

    Not so for sequence ratios (to the old policy or to the sampler), vespo's sequence weight, masks that look at a sequence's KL or at the
    batch's entropies, the entropy bonus (whose derivative goes through the entropy instead), and a user's function, for all we know.
    `entropy_coef`: what applies to this step.
    """
    return (
        config.function is None
        and config.importance_sampling_level == "token"
        and not config.sampler_correction.startswith("sequence")
        and config.loss_type != "vespo"
        and config.top_entropy_quantile == 1.0
        and config.off_policy_mask_threshold is None
        and entropy_coef == 0.0
    )


def _switched_off(config: LossConfig) -> set[str]:
    """Names of the metrics that mean nothing under this config."""
    applies = {
        "kl": config.beta > 0,
        "clip_ratio/low_mean": config.loss_type in CLIPPED_LOSSES,
        "clip_ratio/high_mean": config.loss_type in (*CLIPPED_LOSSES, "cispo"),
        "clip_ratio/region_mean": config.loss_type in CLIPPED_LOSSES,
        "vespo/phi_mean": config.loss_type == "vespo",
        "off_policy_kept": config.off_policy_mask_threshold is not None,
    }
    return {name for name, on in applies.items() if not on}
