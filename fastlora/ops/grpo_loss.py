"""grpo_loss: the policy losses of TRL 1.16 over completions, per token and aggregated, and what they report.

With ρ = exp(logp − logp_old) per token, or its geometric mean over the sequence (importance_sampling_level = "sequence", GSPO,
arXiv 2507.18071), advantage A, mask m, entropy H, and n sequences:

    token loss ℓ_nt = surrogate(ρ, A) · [off-policy mask] · [entropy mask] · [importance ratio] + β · KL_nt
    loss            = aggregate(ℓ, m) − entropy_coef · Σ m'H / Σ m' ÷ accumulation,      m' = m · [entropy mask]

| loss_type | surrogate | aggregate | arXiv |
|---|---|---|---|
| grpo    | −min(ρA, clip(ρ, 1 − ε, 1 + ε_high) A), 1st ρ capped at δ | mean over n of Σ mℓ / Σ m, ÷ accumulation | 2402.03300 |
| bnpo    | as grpo | Σ mℓ / Σ m over the micro-batch, ÷ accumulation | |
| dr_grpo | as grpo | Σ mℓ / (n · max_completion_length), ÷ accumulation | 2503.20783 |
| dapo    | as grpo | Σ mℓ / (num_items_in_batch · accumulation / steps_per_generation) | 2503.14476 |
| luspo   | as grpo | mean over n of Σ mℓ, ÷ accumulation | 2602.05261 |
| cispo   | −sg[min(ρ, ε_high)] A logp | as dapo | 2506.13585 |
| sapo    | −4/τ σ(τ (ρ − 1)) A | as grpo | 2511.20347 |
| vespo   | −sg[φ(w)] A logp, φ(w) = e^λ w^k e^{−λw}, w = Π_t ρ_t · importance ratio | as dapo | 2602.10693 |

sg[·] carries no gradient; τ, k and λ have a value for each sign of A.

KL estimators, with d = logp_ref − logp (k1, k2, k3: J. Schulman, joschu.net/blog/kl-approx.html; TRL has k3 only):

    k1 = −d        k2 = d²/2        k3 = e^d − d − 1        density = max(−d e^logp, 0), the reward-density study's

each times ρ when use_bias_correction_kl, which makes it unbiased off policy (arXiv 2512.02556).

Order of operations: that of GRPOTrainer._compute_loss (trl/trainer/grpo_trainer.py), down to the order in which autograd meets
the uses of logp, so that in fp32 on a CPU the loss and its gradients have TRL's bits. The reference is composite for that
reason: its gradient is autograd's of these lines. `triton` (kernels/fastlora_triton/grpo_loss.py) makes value and derivative of the
losses of single tokens in one launch. FLOPs: some 20 a token; the op moves bytes, it does not compute.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.config import LossConfig
from fastlora.ops.registry import NAMESPACE, Cost, Dispatch, OpSpec, triton_refuses

CLIPPED_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
"""The loss types that share PPO's clipped surrogate."""

METRICS = (
    "policy_loss",
    "entropy",
    "ratio_mean",
    "entropy_sum",
    "entropy_tokens",
    "kl",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "vespo/phi_mean",
    "off_policy_kept",
)
"""Entries of the op's second output; an entry that the options switch off is 0 (and not reported by losses.policy).

policy_loss: the loss before ÷ accumulation and entropy bonus. entropy (nats), ratio_mean, kl (nats): means over the trained
tokens. entropy_sum, entropy_tokens: Σ m'H and Σ m', for the controller of entropy_coef. clip_ratio: fraction of trained
tokens whose ratio is clipped at A < 0, at A > 0, at either. vespo/phi_mean: mean weight. off_policy_kept: fraction of trained
tokens kept. Sequence-level quantities are means over the sequences that have a trained token.
"""


NUM_TENSORS = 8
"""Arguments of the op before the options."""


class Options(NamedTuple):
    """The numbers and names behind the tensors in the op's schema, in its order; meanings as in config.LossConfig."""

    loss_type: str
    importance_sampling_level: str
    epsilon: float
    epsilon_high: float
    delta: float | None
    beta: float
    kl_estimator: str
    use_bias_correction_kl: bool
    top_entropy_quantile: float
    off_policy_mask_threshold: float | None
    entropy_coef: float
    """The coefficient that applies now (the controller may have moved or suspended the configured one)."""
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float
    num_items_in_batch: int
    """Trained tokens of the whole generation batch."""
    accumulation_steps: int
    """Micro-batches per optimizer step."""
    steps_per_generation: int
    """Micro-batches per generation batch."""
    max_completion_length: int
    """Tokens."""


_SCHEMA = """grpo_loss(
    Tensor logp_nt, Tensor entropy_nt, Tensor mask_nt, Tensor advantages_nt,
    Tensor? old_logp_nt, Tensor? ref_logp_nt, Tensor? sampler_logp_nt, Tensor? importance_ratio_nt,
    str loss_type, str importance_sampling_level, float epsilon, float epsilon_high, float? delta,
    float beta, str kl_estimator, bool use_bias_correction_kl,
    float top_entropy_quantile, float? off_policy_mask_threshold, float entropy_coef,
    float sapo_temperature_pos, float sapo_temperature_neg,
    float vespo_k_pos, float vespo_lambda_pos, float vespo_k_neg, float vespo_lambda_neg,
    int num_items_in_batch, int accumulation_steps, int steps_per_generation, int max_completion_length
) -> (Tensor loss, Tensor metrics_m)"""


def _reference(
    logp_nt: Tensor,
    entropy_nt: Tensor,
    mask_nt: Tensor,
    advantages_nt: Tensor,
    old_logp_nt: Tensor | None,
    ref_logp_nt: Tensor | None,
    sampler_logp_nt: Tensor | None,
    importance_ratio_nt: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    o = Options(*options)
    if old_logp_nt is None:
        old_logp_nt = logp_nt.detach()
    entropy_mask_nt = kept_nt = kl_nt = phi_nt = None
    if o.top_entropy_quantile < 1.0:
        entropy_mask_nt = _highest_entropy(entropy_nt.detach(), mask_nt, o.top_entropy_quantile)
    if o.off_policy_mask_threshold is not None:
        behaviour_logp_nt = old_logp_nt if sampler_logp_nt is None else sampler_logp_nt
        kept_nt = _near_policy(logp_nt.detach(), behaviour_logp_nt, mask_nt, advantages_nt, o.off_policy_mask_threshold)

    log_ratio_nt = logp_nt - old_logp_nt
    ratio_nt = torch.exp(log_ratio_nt if o.importance_sampling_level == "token" else _sequence_mean(log_ratio_nt, mask_nt))
    if o.beta != 0.0:
        assert ref_logp_nt is not None  # grpo_loss() has checked
        kl_nt = _kl(logp_nt, ref_logp_nt, o.kl_estimator)
        kl_nt = kl_nt * ratio_nt if o.use_bias_correction_kl else kl_nt
    if o.loss_type == "vespo":
        phi_nt = _gamma_weight(log_ratio_nt.detach(), mask_nt, advantages_nt, importance_ratio_nt, o)
        importance_ratio_nt = None  # it is part of the weight

    token_loss_nt = _surrogate(ratio_nt, logp_nt, advantages_nt, phi_nt, o)
    for factor_nt in (kept_nt, entropy_mask_nt, importance_ratio_nt):
        if factor_nt is not None:
            token_loss_nt = token_loss_nt * factor_nt
    if kl_nt is not None:
        token_loss_nt = token_loss_nt + o.beta * kl_nt

    loss, policy_loss = _aggregate(token_loss_nt, mask_nt, o)
    entropy_mask_nt = mask_nt if entropy_mask_nt is None else mask_nt * entropy_mask_nt
    entropy_sum, entropy_tokens = (entropy_nt * entropy_mask_nt).sum(), entropy_mask_nt.sum()
    if o.entropy_coef != 0.0:
        loss = loss - o.entropy_coef * (entropy_sum / entropy_tokens.clamp(min=1.0) / o.accumulation_steps)

    low_nt, high_nt = _clipped(ratio_nt, advantages_nt, o)
    region_nt = None if low_nt is None or high_nt is None else low_nt | high_nt
    per_token = (kl_nt, low_nt, high_nt, region_nt, phi_nt, kept_nt)
    means = [_mean(x_nt, mask_nt, like=logp_nt) for x_nt in (entropy_nt, ratio_nt, *per_token)]
    metrics = [policy_loss, *means[:2], entropy_sum, entropy_tokens, *means[2:]]
    return loss, torch.stack([metric.detach().to(loss.dtype) for metric in metrics])


def _by_sign(positive: Tensor, at_positive: float, at_negative: float, like: Tensor) -> Tensor:
    """One of two constants for each entry of a bool tensor, in the dtype of `like` (torch.where alone would give float32)."""
    return torch.where(positive, like.new_full((), at_positive), like.new_full((), at_negative))


def _sequence_mean(x_nt: Tensor, mask_nt: Tensor) -> Tensor:
    """Mean over the trained tokens of each sequence, [n, 1]; 0 where there are none."""
    return ((x_nt * mask_nt).sum(-1) / mask_nt.sum(-1).clamp(min=1.0)).unsqueeze(-1)


def _highest_entropy(entropy_nt: Tensor, mask_nt: Tensor, share: float) -> Tensor:
    """bool [n, t], the `share` of the micro-batch's trained tokens with the highest entropy (arXiv 2506.01939).

    nanquantile over all positions is quantile over the trained ones, bit for bit, without a shape that depends on data.
    """
    if entropy_nt.numel() == 0:
        return torch.zeros_like(mask_nt, dtype=torch.bool)
    threshold = torch.nanquantile(entropy_nt.masked_fill(~mask_nt.bool(), math.nan), 1 - share)
    return (entropy_nt >= threshold) & mask_nt.bool()


def _near_policy(logp_nt: Tensor, behaviour_logp_nt: Tensor, mask_nt: Tensor, advantages_nt: Tensor, threshold: float) -> Tensor:
    """bool [n, 1] or [n, t], False at negative advantages in sequences that left the policy (DeepSeek-V3.2, 2512.02556)."""
    # A token that the sampler could not score (NaN) is no evidence of having left it.
    kl_nt = torch.nan_to_num(behaviour_logp_nt - logp_nt, nan=0.0)
    return (advantages_nt >= 0) | (_sequence_mean(kl_nt, mask_nt) <= threshold)


def _kl(logp_nt: Tensor, ref_logp_nt: Tensor, estimator: str) -> Tensor:
    if estimator == "k1":
        return logp_nt - ref_logp_nt
    if estimator == "k2":
        return 0.5 * (logp_nt - ref_logp_nt) ** 2
    if estimator == "k3":
        # The difference is written twice because TRL does: autograd then adds two gradients into logp, in TRL's order.
        return torch.exp(ref_logp_nt - logp_nt) - (ref_logp_nt - logp_nt) - 1
    return torch.clamp(torch.exp(logp_nt) * (logp_nt - ref_logp_nt), min=0.0)  # density


def _gamma_weight(log_ratio_nt: Tensor, mask_nt: Tensor, advantages_nt: Tensor, importance_ratio_nt: Tensor | None, o: Options) -> Tensor:
    """vespo's φ(w) [n, 1] (or [n, t] with an advantage per token), in log space; φ(1) = 1. Without gradient."""
    log_floor = math.log(1e-8)
    log_w_n1 = torch.sum(torch.clamp(log_ratio_nt, -20.0, 20.0) * mask_nt, dim=-1, keepdim=True)
    if importance_ratio_nt is not None:
        log_w_n1 = log_w_n1 + torch.sum(torch.clamp(torch.log(importance_ratio_nt), log_floor, 20.0), dim=-1, keepdim=True)
    log_w_n1 = torch.clamp(log_w_n1, log_floor, 20.0)
    k = _by_sign(advantages_nt >= 0, o.vespo_k_pos, o.vespo_k_neg, log_w_n1)
    rate = _by_sign(advantages_nt >= 0, o.vespo_lambda_pos, o.vespo_lambda_neg, log_w_n1).clamp(min=1e-4)
    log_phi = rate + k * log_w_n1 - rate * torch.exp(log_w_n1)
    return torch.exp(log_phi).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _surrogate(ratio_nt: Tensor, logp_nt: Tensor, advantages_nt: Tensor, phi_nt: Tensor | None, o: Options) -> Tensor:
    """The surrogate of the table above, [n, t] or, when everything in it is sequence-level, [n, 1]."""
    if phi_nt is not None:
        return -phi_nt * advantages_nt * logp_nt
    if o.loss_type == "cispo":
        return -torch.clamp(ratio_nt, max=o.epsilon_high).detach() * advantages_nt * logp_nt
    if o.loss_type == "sapo":
        temperature = _by_sign(advantages_nt > 0, o.sapo_temperature_pos, o.sapo_temperature_neg, ratio_nt)
        return -(torch.sigmoid(temperature * (ratio_nt - 1)) * 4 / temperature) * advantages_nt
    clipped_nt = torch.clamp(ratio_nt, 1 - o.epsilon, 1 + o.epsilon_high)
    if o.delta is not None:
        ratio_nt = torch.clamp(ratio_nt, max=o.delta)
    return -torch.min(ratio_nt * advantages_nt, clipped_nt * advantages_nt)


def _aggregate(token_loss_nt: Tensor, mask_nt: Tensor, o: Options) -> tuple[Tensor, Tensor]:
    """(loss, the loss before ÷ accumulation_steps), by the table above."""
    masked_nt = token_loss_nt * mask_nt
    if o.loss_type in ("dapo", "cispo", "vespo"):
        # num_items_in_batch spans the generation batch; this is the share of one optimizer step, in the dtype of the loss.
        items = token_loss_nt.new_full((), o.num_items_in_batch).clamp(min=1.0)
        loss = masked_nt.sum() / (items * o.accumulation_steps / o.steps_per_generation)
        return loss, loss
    if o.loss_type in ("grpo", "sapo"):
        loss = (masked_nt.sum(-1) / mask_nt.sum(-1).clamp(min=1.0)).mean()
    elif o.loss_type == "bnpo":
        loss = masked_nt.sum() / mask_nt.sum().clamp(min=1.0)
    elif o.loss_type == "dr_grpo":
        loss = masked_nt.sum() / (mask_nt.shape[0] * o.max_completion_length)
    else:  # luspo
        loss = masked_nt.sum(-1).mean()
    return loss / o.accumulation_steps, loss


def _clipped(ratio_nt: Tensor, advantages_nt: Tensor, o: Options) -> tuple[Tensor | None, Tensor | None]:
    """bool, where the clip holds the ratio (low at A < 0, high at A > 0); None where the loss type has no such bound."""
    if o.loss_type == "cispo":
        return None, (ratio_nt > o.epsilon_high) & (advantages_nt > 0)
    if o.loss_type in CLIPPED_LOSSES:
        low_nt = (ratio_nt < 1 - o.epsilon) & (advantages_nt < 0)
        return low_nt, (ratio_nt > 1 + o.epsilon_high) & (advantages_nt > 0)
    return None, None


def _mean(x_nt: Tensor | None, mask_nt: Tensor, like: Tensor) -> Tensor:
    """Mean of [n, t] over trained tokens, or of [n, 1] over sequences that have one; 0 for None."""
    if x_nt is None:
        return like.new_zeros(())
    weight_nt = mask_nt.bool() if x_nt.shape == mask_nt.shape else mask_nt.bool().any(-1, keepdim=True)
    return (x_nt.detach().to(like.dtype) * weight_nt).sum() / weight_nt.sum().clamp(min=1.0)


_dispatch = Dispatch("grpo_loss", _reference)


def _triton_refuses(device: torch.device, *args: Any) -> str | None:
    """The kernel has the losses whose derivative at a token depends on that token alone, all in float32."""
    if (reason := triton_refuses(device, *args)) or not args:
        return reason
    o = Options(*args[NUM_TENSORS:])
    tensors = [x for x in (args[0], args[1], *args[3:NUM_TENSORS]) if x is not None]
    if any(x.dtype != torch.float32 for x in tensors):
        return "it takes float32 only"
    if args[2].dtype not in (torch.bool, torch.uint8):
        return f"it takes a mask of bool or uint8, not {args[2].dtype}"
    if o.loss_type == "vespo" or o.importance_sampling_level != "token":
        return f"{o.loss_type} with {o.importance_sampling_level}-level ratios is not a loss of single tokens"
    if o.top_entropy_quantile < 1.0 or o.off_policy_mask_threshold is not None or o.entropy_coef != 0.0:
        return "masks over entropies or sequences and the entropy bonus are not losses of single tokens"
    return None


@_dispatch.add("triton", _triton_refuses)
def _triton(*args: Any) -> tuple[Tensor, Tensor]:
    return _TokenLevel.apply(*args)


class _TokenLevel(torch.autograd.Function):
    """The kernel returns the derivative beside the value; the backward pass scales it."""

    @staticmethod
    def forward(ctx: Any, logp_nt: Tensor, entropy_nt: Tensor, mask_nt: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        from fastlora_triton import grpo_loss as kernels

        o = Options(*rest[NUM_TENSORS - 3 :])
        advantages_nt, old_nt, ref_nt, _, importance_nt = (None if x is None else x.contiguous() for x in rest[: NUM_TENSORS - 3])
        surrogate = kernels.Surrogate(
            kernels.kind_of(o.loss_type),
            o.epsilon,
            o.epsilon_high,
            math.inf if o.delta is None else o.delta,
            o.sapo_temperature_pos,
            o.sapo_temperature_neg,
            kernels.estimator_of(o.kl_estimator) if o.beta else 0,
            o.beta,
            o.use_bias_correction_kl,
        )
        tensors = (logp_nt.contiguous(), entropy_nt.contiguous(), mask_nt.contiguous(), advantages_nt, old_nt, ref_nt, importance_nt)
        dlogp_nt, sums_8 = kernels.token_loss(*tensors, _token_weights(mask_nt, o), surrogate)
        ctx.save_for_backward(dlogp_nt)
        loss, metrics_m = sums_8[0].clone(), _metrics(sums_8, o)
        ctx.mark_non_differentiable(metrics_m)
        return loss, metrics_m

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (dlogp_nt,) = ctx.saved_tensors
        return dlogp_nt * dloss, *(None,) * (NUM_TENSORS - 1 + len(Options._fields))


def _token_weights(mask_nt: Tensor, o: Options) -> Tensor:
    """w_n [n], float32: what a trained token of sequence n weighs in the loss, by the table above."""
    n = mask_nt.shape[0]
    if o.loss_type in ("dapo", "cispo"):
        return torch.full((n,), o.steps_per_generation / (max(o.num_items_in_batch, 1) * o.accumulation_steps), device=mask_nt.device)
    if o.loss_type in ("grpo", "sapo"):
        return 1 / (mask_nt.sum(-1, dtype=torch.float32).clamp(min=1.0) * (n * o.accumulation_steps))
    if o.loss_type == "bnpo":
        return (1 / (mask_nt.sum(dtype=torch.float32).clamp(min=1.0) * o.accumulation_steps)).expand(n).contiguous()
    length = o.max_completion_length if o.loss_type == "dr_grpo" else 1
    return torch.full((n,), 1 / (max(n, 1) * length * o.accumulation_steps), device=mask_nt.device)


def _metrics(sums_8: Tensor, o: Options) -> Tensor:
    """METRICS from the kernel's sums."""
    loss, entropy, ratio, tokens, kl, low, high, region = sums_8.unbind()
    per_token = torch.stack([entropy, ratio, kl, low, high, region]) / tokens.clamp(min=1.0)
    mean_entropy, mean_ratio, *means = per_token.unbind()
    undivided = loss if o.loss_type in ("dapo", "cispo") else loss * o.accumulation_steps
    nothing = torch.zeros_like(loss)
    return torch.stack([undivided, mean_entropy, mean_ratio, entropy, tokens, *means, nothing, nothing])


_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define(_SCHEMA)
_library.impl("grpo_loss", _dispatch, "CompositeImplicitAutograd")
grpo_loss_op = torch.ops.fastlora.grpo_loss.default


def grpo_loss(
    logp_nt: Tensor,
    entropy_nt: Tensor,
    mask_nt: Tensor,
    advantages_nt: Tensor,
    config: LossConfig,
    *,
    old_logp_nt: Tensor | None = None,
    ref_logp_nt: Tensor | None = None,
    sampler_logp_nt: Tensor | None = None,
    importance_ratio_nt: Tensor | None = None,
    entropy_coef: float,
    num_items_in_batch: int,
    accumulation_steps: int,
    steps_per_generation: int,
    max_completion_length: int,
) -> tuple[Tensor, Tensor]:
    """(loss, a scalar to minimise; metrics_m, one entry for each name of METRICS). Differentiable in logp_nt and entropy_nt.

    logp_nt, entropy_nt: float [n, t], in nats, finite at padding too. mask_nt: bool or int [n, t], the tokens that train.
    advantages_nt: [n, 1] or [n, t]. old_logp_nt: behaviour policy, [n, t]; None = logp_nt without gradient (ratio 1).
    ref_logp_nt: reference policy, [n, t]; used when config.beta > 0. sampler_logp_nt: what the sampler said, [n, t], for the
    off-policy mask; None = old_logp_nt. importance_ratio_nt: factor π_old / π_sampler on the token loss, [n, t] or [n, 1], 1
    at padding; None = 1. entropy_coef: weight of the entropy bonus now. num_items_in_batch: trained tokens of the whole
    generation batch. accumulation_steps, steps_per_generation: micro-batches per optimizer step and per generation batch.
    max_completion_length: tokens.

    Raises ValueError when a shape does not fit, or config.beta > 0 without ref_logp_nt.
    """
    _check(logp_nt.shape, "per token", entropy_nt=entropy_nt, mask_nt=mask_nt, old_logp_nt=old_logp_nt)
    _check(logp_nt.shape, "per token", ref_logp_nt=ref_logp_nt, sampler_logp_nt=sampler_logp_nt)
    _check(logp_nt.shape, "per token or sequence", advantages_nt=advantages_nt, importance_ratio_nt=importance_ratio_nt)
    if config.beta > 0 and ref_logp_nt is None:
        raise ValueError(f"grpo_loss: beta = {config.beta} needs ref_logp_nt, the reference policy's log-probabilities")
    options = Options(
        **config.model_dump(include=set(Options._fields) - {"epsilon_high", "entropy_coef"}),
        epsilon_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
        entropy_coef=entropy_coef,
        num_items_in_batch=num_items_in_batch,
        accumulation_steps=accumulation_steps,
        steps_per_generation=steps_per_generation,
        max_completion_length=max_completion_length,
    )
    tensors = (logp_nt, entropy_nt, mask_nt, advantages_nt, old_logp_nt, ref_logp_nt, sampler_logp_nt, importance_ratio_nt)
    loss, metrics_m = grpo_loss_op(*tensors, *options)
    return loss, metrics_m


def _check(shape: torch.Size, per: str, **tensors: Tensor | None) -> None:
    allowed = (shape,) if per == "per token" else (shape, (shape[0], 1))
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape not in allowed:
            raise ValueError(f"grpo_loss: {name} is {tuple(tensor.shape)}, expected one value {per} of logp_nt {tuple(shape)}")


def cost(logp_nt: Tensor, *rest: Any) -> Cost:
    """Some 20 operations a token (exp counted as one); every tensor once."""
    tensors = [x for x in (logp_nt, *rest) if isinstance(x, Tensor)]
    outputs = (1 + len(METRICS)) * logp_nt.element_size()
    return Cost(20 * logp_nt.numel(), sum(x.numel() * x.element_size() for x in tensors) + outputs)


def sample_inputs(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Every loss type, token and sequence level, with masks, KL and ratios in turn; t in 1, 5, 63 and a fully masked row."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    for index, loss_type in enumerate((*CLIPPED_LOSSES, "cispo", "sapo", "vespo")):
        n, t = 4, (1, 5, 63)[index % 3]
        logp_nt = -randn(n, t).abs()
        mask_nt = torch.arange(t) < torch.tensor([[t], [max(t - 2, 1)], [1], [0]])
        near = [logp_nt + 0.3 * randn(n, t) for _ in range(3)]
        tensors = (
            logp_nt.requires_grad_(),
            randn(n, t).abs().requires_grad_(),
            mask_nt.to(device),
            randn(n, t if index % 2 else 1),
            near[0].detach() if index % 4 else None,
            near[1].detach() if index % 2 else None,
            near[2].detach() if index % 3 else None,
            randn(n, 1).exp() if index % 2 else None,
        )
        options = Options(
            loss_type=loss_type,
            importance_sampling_level="sequence" if index % 3 == 1 else "token",
            epsilon=0.2,
            epsilon_high=2.0 if loss_type == "cispo" else 0.28,
            delta=1.5 if index % 3 == 2 else None,
            beta=0.05 if index % 2 else 0.0,
            kl_estimator=("k3", "k1", "k2", "density")[index // 2],
            use_bias_correction_kl=index < 4,
            top_entropy_quantile=0.6 if index % 4 == 1 else 1.0,
            off_policy_mask_threshold=0.1 if index % 4 == 2 else None,
            entropy_coef=0.01 * (index % 3),
            **{name: LossConfig.model_fields[name].default for name in Options._fields if name.startswith(("sapo", "vespo"))},
            num_items_in_batch=3 * t,
            accumulation_steps=2,
            steps_per_generation=4,
            max_completion_length=t + 3,
        )
        yield (*tensors, *options)


SPEC = OpSpec("grpo_loss", grpo_loss_op, sample_inputs, cost)
