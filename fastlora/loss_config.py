"""[loss] of a run's config."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fastlora.section import Section


class LossConfig(Section):
    """The policy loss; names, meanings and defaults of TRL 1.16's GRPOConfig."""

    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"] = "dapo"
    """Surrogate and normalisation (table in fastlora/ops/grpo_loss.py)."""
    function: str | None = None
    """One's own loss in its place, `path/to/file.py:function` (fastlora/losses/own.py); None = loss_type."""
    epsilon: Annotated[float, Field(ge=0.0)] = 0.2
    """Lower clip bound, 1 − epsilon."""
    epsilon_high: Annotated[float, Field(ge=0.0)] | None = None
    """Upper clip bound, 1 + epsilon_high (cispo: the cap itself); None = epsilon."""
    delta: Annotated[float, Field(gt=0.0)] | None = None
    """Cap of the unclipped ratio (two-sided clipping); None = no cap."""
    beta: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the KL penalty to the base model; 0 = the reference policy is never computed."""
    kl_estimator: Literal["k1", "k2", "k3", "density"] = "k3"
    """k3 is TRL's; density = clamp(pi (log pi − log pi_ref), 0), the reward-density study's."""
    use_bias_correction_kl: bool = True
    """Multiply the KL by the importance ratio (TRL's default)."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Ratio per token (GRPO) or the geometric mean over the sequence (GSPO)."""
    mask_truncated_completions: bool = False
    """Give completions that hit the length limit no gradient."""
    top_entropy_quantile: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Train only on this share of tokens, those with the highest entropy; 1 = all."""
    off_policy_mask_threshold: Annotated[float, Field(gt=0.0)] | None = None
    """Drop negative-advantage sequences whose mean KL to the sampler exceeds this; None = keep all."""
    sampler_correction: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "none"
    """Importance sampling for a sampler that is not the trainer (fastlora/losses/importance_sampling.py): π_old / π_sampler per token or
    per sequence, clipped to its bounds or set to 0 outside them (TRL's vllm_importance_sampling_mode). Token modes cost nothing, sequence
    modes a second pass over the head."""
    sampler_correction_max: Annotated[float, Field(gt=0.0)] | None = 3.0
    """Upper bound of that ratio; None = none (TRL's vllm_importance_sampling_clip_max)."""
    sampler_correction_min: Annotated[float, Field(ge=0.0)] = 0.0
    """Lower bound of that ratio; 0 = none (TRL's vllm_importance_sampling_clip_min)."""
    renormalize_top_p: bool = False
    """rollout.top_p < 1: log-probabilities and entropies of the distribution renormalised over the nucleus, which is what is sampled from,
    instead of the full softmax (fastlora/ops/nucleus_rows.py). Behaviour and reference policy alike."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus; 0 = none."""
    use_adaptive_entropy: bool = False
    """Move entropy_coef so that the entropy stays near entropy_target."""
    entropy_target: Annotated[float, Field(ge=0.0)] = 0.2
    """Entropy to hold (nats per token)."""
    entropy_coef_delta: Annotated[float, Field(gt=0.0)] = 0.005
    """Change of entropy_coef per optimizer step."""
    entropy_coef_min: Annotated[float, Field(ge=0.0)] = 0.0
    """Smallest entropy_coef."""
    entropy_coef_max: Annotated[float, Field(ge=0.0)] = 1.0
    """Largest entropy_coef."""
    sapo_temperature_pos: Annotated[float, Field(gt=0.0)] = 1.0
    """Gate temperature at positive advantages (sapo)."""
    sapo_temperature_neg: Annotated[float, Field(gt=0.0)] = 1.05
    """Gate temperature at negative advantages (sapo)."""
    vespo_k_pos: float = 2.0
    """Gamma weight exponent, positive advantages (vespo)."""
    vespo_lambda_pos: float = 3.0
    """Gamma weight rate, positive advantages (vespo)."""
    vespo_k_neg: float = 3.0
    """Gamma weight exponent, negative advantages (vespo)."""
    vespo_lambda_neg: float = 2.0
    """Gamma weight rate, negative advantages (vespo)."""
