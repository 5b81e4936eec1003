"""grpo_loss against the published formulas, token by token in Python floats; its bits against TRL's are in tests/parity."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from fastlora.config import LossConfig
from fastlora.ops.grpo_loss import METRICS, grpo_loss
from tests.tolerances import FP64_EXACT

LOSS_TYPES = get_args(LossConfig.model_fields["loss_type"].annotation)
LEVELS = get_args(LossConfig.model_fields["importance_sampling_level"].annotation)
KL_ESTIMATORS = get_args(LossConfig.model_fields["kl_estimator"].annotation)
N, T, MAX_LENGTH = 5, 9, 12
SCHEDULE = {"num_items_in_batch": 57, "accumulation_steps": 3, "steps_per_generation": 4, "max_completion_length": MAX_LENGTH}


@dataclass(frozen=True)
class Problem:
    """float64 [N, T] each; the third sequence has no trained token, the fourth a hole in its mask."""

    logp: Tensor
    entropy: Tensor
    mask: Tensor
    advantages: Tensor
    old: Tensor | None
    ref: Tensor
    sampler: Tensor | None
    importance_ratio: Tensor | None

    def loss(self, config: LossConfig, logp: Tensor | None = None, entropy: Tensor | None = None) -> tuple[Tensor, dict[str, float]]:
        loss, metrics_m = grpo_loss(
            self.logp if logp is None else logp,
            self.entropy if entropy is None else entropy,
            self.mask,
            self.advantages,
            config,
            old_logp_nt=self.old,
            ref_logp_nt=self.ref,
            sampler_logp_nt=self.sampler,
            importance_ratio_nt=self.importance_ratio,
            entropy_coef=config.entropy_coef,
            **SCHEDULE,
        )
        return loss, dict(zip(METRICS, metrics_m.tolist(), strict=True))


def _problem(seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask = torch.arange(T) < torch.tensor([[T], [4], [0], [7], [1]])
    mask[3, 2] = False
    logp = -randn(N, T).abs()
    old, ref, sampler = (logp + 0.25 * randn(N, 1) + 0.3 * randn(N, T) for _ in range(3))
    return Problem(logp, randn(N, T).abs(), mask, randn(N, 1), old, ref, sampler, None)


def _kl(estimator: str, logp: float, ref: float) -> float:
    d = ref - logp
    return {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1, "density": max(math.exp(logp) * -d, 0.0)}[estimator]


def _gamma(log_w: float, advantage: float, c: LossConfig) -> float:
    k, rate = (c.vespo_k_pos, c.vespo_lambda_pos) if advantage >= 0 else (c.vespo_k_neg, c.vespo_lambda_neg)
    w = math.exp(log_w)
    return math.exp(rate) * w**k * math.exp(-rate * w)


def _surrogate(ratio: float, phi: float, advantage: float, logp: float, c: LossConfig) -> float:
    high = c.epsilon if c.epsilon_high is None else c.epsilon_high
    if c.loss_type == "vespo":
        return -phi * advantage * logp
    if c.loss_type == "cispo":
        return -min(ratio, high) * advantage * logp
    if c.loss_type == "sapo":
        tau = c.sapo_temperature_pos if advantage > 0 else c.sapo_temperature_neg
        return -4 / tau / (1 + math.exp(-tau * (ratio - 1))) * advantage
    clipped = min(max(ratio, 1 - c.epsilon), 1 + high)
    return -min(min(ratio, c.delta or math.inf) * advantage, clipped * advantage)


def _oracle(p: Problem, c: LossConfig) -> tuple[float, dict[str, float]]:
    """(loss, its metrics) by the table in fastlora/ops/grpo_loss.py, one token at a time."""
    threshold = np.quantile(p.entropy[p.mask].numpy(), 1 - c.top_entropy_quantile)
    rows: list[list[float]] = []  # token losses of each sequence
    kls, ratios, low, high, bonus, entropies = [], [], 0, 0, [], []
    for i in range(N):
        tokens = [j for j in range(T) if p.mask[i, j]]
        old = p.logp if p.old is None else p.old
        log_ratios = [float(p.logp[i, j] - old[i, j]) for j in tokens]
        behaviour = old if p.sampler is None else p.sampler
        drift = sum(float(behaviour[i, j] - p.logp[i, j]) for j in tokens) / max(len(tokens), 1)
        # The correction is a factor per token or per sequence; in a product over the whole (padded) row it counts once.
        corrections = [1.0] * T if p.importance_ratio is None else p.importance_ratio[i].expand(T).tolist()
        columns = range(0 if p.importance_ratio is None else p.importance_ratio.shape[1])
        log_w = sum(log_ratios) + sum(math.log(corrections[j]) for j in columns)
        row = []
        for j, log_ratio in zip(tokens, log_ratios, strict=True):
            advantage, logp = float(p.advantages[i, j % p.advantages.shape[1]]), float(p.logp[i, j])
            ratio = math.exp(log_ratio if c.importance_sampling_level == "token" else sum(log_ratios) / len(tokens))
            loss = _surrogate(ratio, _gamma(log_w, advantage, c), advantage, logp, c)
            if c.off_policy_mask_threshold is not None and advantage < 0 and drift > c.off_policy_mask_threshold:
                loss = 0.0
            kept = float(p.entropy[i, j]) >= threshold
            loss *= kept * (1.0 if c.loss_type == "vespo" else corrections[j])
            kl = _kl(c.kl_estimator, logp, float(p.ref[i, j])) * (ratio if c.use_bias_correction_kl else 1.0)
            row.append(loss + c.beta * kl)
            kls.append(kl)
            ratios.append(ratio)
            low += advantage < 0 and ratio < 1 - c.epsilon
            high += advantage > 0 and ratio > 1 + (c.epsilon if c.epsilon_high is None else c.epsilon_high)
            entropies.append(float(p.entropy[i, j]))
            bonus += [float(p.entropy[i, j])] if kept else []
        rows.append(row)
    total, count, accumulation = sum(map(sum, rows)), sum(map(len, rows)), SCHEDULE["accumulation_steps"]
    if c.loss_type in ("grpo", "sapo"):
        policy_loss = sum(sum(row) / max(len(row), 1) for row in rows) / N
    elif c.loss_type == "bnpo":
        policy_loss = total / count
    elif c.loss_type == "dr_grpo":
        policy_loss = total / (N * MAX_LENGTH)
    elif c.loss_type == "luspo":
        policy_loss = total / N
    else:
        policy_loss = total / (SCHEDULE["num_items_in_batch"] * accumulation / SCHEDULE["steps_per_generation"])
    loss = policy_loss if c.loss_type in ("dapo", "cispo", "vespo") else policy_loss / accumulation
    metrics = {
        "policy_loss": policy_loss,
        "entropy": sum(entropies) / count,
        "entropy_sum": sum(bonus),
        "entropy_tokens": len(bonus),
        "ratio_mean": sum(ratios) / count,
        "kl": sum(kls) / count if c.beta else 0.0,
        "clip_ratio/low_mean": low / count,
        "clip_ratio/high_mean": high / count,
        "clip_ratio/region_mean": (low + high) / count,
    }
    return loss - c.entropy_coef * sum(bonus) / len(bonus) / accumulation, metrics


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip": {"epsilon": 0.1, "epsilon_high": 0.3, "delta": 1.35},
    "masks": {"top_entropy_quantile": 0.45, "off_policy_mask_threshold": 0.02},
    "bonus": {"entropy_coef": 0.03, "top_entropy_quantile": 0.7},
    "gates": {"sapo_temperature_pos": 0.6, "vespo_k_pos": 1.3, "vespo_lambda_pos": 0.9, "vespo_k_neg": 2.2},
}


def _close(got: float, expected: float) -> bool:
    return abs(got - expected) <= FP64_EXACT * max(1.0, abs(expected))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_matches_the_formula(loss_type: str, level: str, variant: str) -> None:
    for seed, (per_token, on_policy, ratio_width) in enumerate([(False, False, 0), (True, False, T), (False, True, 1), (True, False, 0)]):
        problem = _problem(seed)
        generator = torch.Generator().manual_seed(seed)
        ratio = (0.3 * torch.randn(N, ratio_width, generator=generator, dtype=torch.float64)).exp() if ratio_width else None
        if ratio_width == T:
            ratio = torch.where(problem.mask, ratio, 1.0)
        problem = replace(
            problem,
            advantages=torch.randn(N, T, generator=generator, dtype=torch.float64) if per_token else problem.advantages,
            old=None if on_policy else problem.old,
            sampler=None if seed == 3 else problem.sampler,
            importance_ratio=ratio,
        )
        for beta, estimator, correction in ((0.0, "k3", True), (0.07, KL_ESTIMATORS[seed], seed % 2 == 0)):
            config = LossConfig(
                loss_type=loss_type,
                importance_sampling_level=level,
                beta=beta,
                kl_estimator=estimator,
                use_bias_correction_kl=correction,
                **VARIANTS[variant],
            )
            (loss, metrics), (expected, expected_metrics) = problem.loss(config), _oracle(problem, config)
            assert _close(loss.item(), expected), (seed, estimator, loss.item(), expected)
            if level == "token":  # sequence-level means are over sequences
                has_clip = loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
                for name, value in expected_metrics.items():
                    assert _close(metrics[name], value) or (name.startswith("clip_ratio") and not has_clip), name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", [name for name in LOSS_TYPES if name not in ("cispo", "vespo")])
def test_gradcheck(loss_type: str, level: str, variant: str) -> None:
    seed = LOSS_TYPES.index(loss_type) + list(VARIANTS).index(variant)
    problem, estimator = _problem(seed), KL_ESTIMATORS[seed % len(KL_ESTIMATORS)]
    config = LossConfig(loss_type=loss_type, importance_sampling_level=level, beta=0.07, kl_estimator=estimator, **VARIANTS[variant])
    leaves = (problem.logp.clone().requires_grad_(), problem.entropy.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda logp, entropy: problem.loss(config, logp, entropy)[0], leaves)


@pytest.mark.parametrize("loss_type", ["cispo", "vespo"])
def test_weights_carry_no_gradient(loss_type: str) -> None:
    """cispo and vespo are policy gradients with a constant weight: d loss / d logp is the loss with logp replaced by 1."""
    problem, config = _problem(), LossConfig(loss_type=loss_type, epsilon_high=1.2)
    assert problem.old is not None
    logp = problem.logp.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(problem.loss(config, logp)[0], logp)
    log_ratio = (problem.logp - problem.old) * problem.mask
    if loss_type == "cispo":
        weight = log_ratio.exp().clamp(max=1.2)
    else:
        weight = torch.tensor(
            [[_gamma(float(row.sum()), float(a), config)] for row, a in zip(log_ratio, problem.advantages, strict=True)],
            dtype=torch.float64,
        )
    normalizer = SCHEDULE["num_items_in_batch"] * SCHEDULE["accumulation_steps"] / SCHEDULE["steps_per_generation"]
    expected = -weight * problem.advantages * problem.mask / normalizer
    assert (gradient - expected).abs().max() < FP64_EXACT


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_masked_tokens_do_not_matter(loss_type: str) -> None:
    """Anything finite may stand at padding: loss and the other gradients keep their bits, and padding gets none."""
    config = LossConfig(
        loss_type=loss_type,
        beta=0.05,
        top_entropy_quantile=0.6,
        off_policy_mask_threshold=0.1,
        entropy_coef=0.01,
        epsilon_high=0.3,
    )
    problem = _problem()
    assert problem.old is not None and problem.sampler is not None
    noise = torch.where(problem.mask, 0.0, 3.0)
    dirty = replace(
        problem,
        logp=problem.logp - noise,
        entropy=problem.entropy + noise,
        old=problem.old - 1.1 * noise,
        ref=problem.ref - 0.9 * noise,
        sampler=problem.sampler + noise,
    )
    results = []
    for p in (problem, dirty):
        leaves = (p.logp.clone().requires_grad_(), p.entropy.clone().requires_grad_())
        loss, _ = p.loss(config, *leaves)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for clean, other in zip(*results, strict=True):
        assert torch.equal(clean, other)
        assert clean.ndim == 0 or not clean[~problem.mask].any()


def test_no_trained_token_is_a_differentiable_zero() -> None:
    for loss_type in LOSS_TYPES:
        problem = replace(_problem(), mask=torch.zeros(N, T, dtype=torch.bool))
        logp = problem.logp.clone().requires_grad_()
        config = LossConfig(loss_type=loss_type, beta=0.05, entropy_coef=0.01, top_entropy_quantile=0.5)
        loss, metrics = problem.loss(config, logp)
        loss.backward()
        assert loss.item() == 0 and not logp.grad.any() and all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entropy": torch.zeros(N, T - 1)}, r"entropy_nt is \(5, 8\), expected one value per token of logp_nt \(5, 9\)"),
        ({"mask": torch.ones(N, 1, dtype=torch.bool)}, "mask_nt"),
        ({"advantages": torch.zeros(N)}, r"advantages_nt is \(5,\), expected one value per token or sequence"),
        ({"old": torch.zeros(N, 1)}, "old_logp_nt"),
        ({"importance_ratio": torch.ones(1, T)}, "importance_ratio_nt"),
        ({"ref": None}, "beta = 0.05 needs ref_logp_nt"),
    ],
    ids=str,
)
def test_refuses_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(_problem(), **changes).loss(LossConfig(beta=0.05))
