"""What policy_loss reports, SFT's token mean over accumulation, and the entropy controller's rules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastlora.config import LossConfig
from fastlora.losses.entropy_control import EntropyControl, applied_entropy_coef, next_entropy_control
from fastlora.losses.policy import policy_loss
from fastlora.losses.sft import sft_loss
from fastlora.types import TrainBatch
from tests.tolerances import FP64_EXACT

ALWAYS = {"policy_loss", "entropy", "ratio_mean", "entropy_sum", "entropy_tokens"}
CLIP = {"clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"}


def _batch(n: int, t: int) -> TrainBatch:
    mask_nt = torch.ones(n, t, dtype=torch.bool)
    ids_nt = torch.zeros(n, t, dtype=torch.int64)
    logp_nt = -torch.rand(n, t)
    return TrainBatch(ids_nt, mask_nt, ids_nt, mask_nt, mask_nt, torch.randn(n, 1), None, logp_nt, None, n * t)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, CLIP),
        ({"beta": 0.1}, CLIP | {"kl"}),
        ({"loss_type": "cispo"}, {"clip_ratio/high_mean"}),
        ({"loss_type": "sapo"}, set()),
        ({"loss_type": "vespo"}, {"vespo/phi_mean"}),
        ({"off_policy_mask_threshold": 0.1}, CLIP | {"off_policy_kept"}),
    ],
    ids=lambda value: str(sorted(value)),
)
def test_policy_loss_reports_what_applies(settings: dict[str, Any], expected: set[str]) -> None:
    logp_nt, config = -torch.rand(4, 6), LossConfig(**settings)
    _, metrics = policy_loss(
        logp_nt,
        logp_nt.neg(),
        _batch(4, 6),
        config,
        accumulation_steps=1,
        steps_per_generation=1,
        max_completion_length=6,
        entropy_coef=0.0,
    )
    assert set(metrics) == ALWAYS | expected
    assert metrics["ratio_mean"] == 1 and metrics["entropy_tokens"] == 24 and all(x.ndim == 0 for x in metrics.values())


@pytest.mark.parametrize("splits", [1, 2, 3, 6])
def test_sft_accumulates_to_the_token_mean(splits: int) -> None:
    """Ragged targets: a mean of micro-batch means would weigh tokens of short micro-batches more."""
    logits_ntv = torch.randn(6, 5, 11, dtype=torch.float64, requires_grad=True)
    targets_nt = torch.randint(11, (6, 5))
    mask_nt = torch.arange(5) < torch.tensor([[5], [1], [0], [3], [2], [4]])
    logp_nt = logits_ntv.log_softmax(-1).gather(-1, targets_nt[..., None]).squeeze(-1)
    loss = torch.zeros((), dtype=torch.float64)
    for logp, mask in zip(logp_nt.chunk(splits), mask_nt.chunk(splits), strict=True):
        part, metrics = sft_loss(logp, mask, 15, accumulation_steps=splits, steps_per_generation=splits)
        assert abs(metrics["nll"] * mask.sum() / 15 - part) < FP64_EXACT
        loss = loss + part
    expected = F.cross_entropy(logits_ntv.flatten(0, 1), targets_nt.masked_fill(~mask_nt, -100).flatten())
    assert abs(loss - expected) < FP64_EXACT
    (got,), (want,) = (torch.autograd.grad(x, logits_ntv, retain_graph=True) for x in (loss, expected))
    assert (got - want).abs().max() < FP64_EXACT


def test_sft_step_sees_its_share_of_the_generation_batch() -> None:
    """Four micro-batches, two per optimizer step: each step's loss is a mean over half of the tokens."""
    logp_nt, mask_nt = -torch.rand(4, 3, dtype=torch.float64), torch.ones(4, 3, dtype=torch.bool)
    parts = [sft_loss(logp_nt[[i]], mask_nt[[i]], 12, accumulation_steps=2, steps_per_generation=4)[0] for i in range(4)]
    assert abs(parts[0] + parts[1] + logp_nt[:2].mean()) < FP64_EXACT


def test_sft_refuses_a_batch_without_targets() -> None:
    with pytest.raises(ValueError, match="num_items_in_batch = 0"):
        sft_loss(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool), 0, accumulation_steps=1, steps_per_generation=1)


def test_entropy_control_rules() -> None:
    config = LossConfig(use_adaptive_entropy=True, entropy_coef=0.01, entropy_target=0.5, entropy_coef_delta=0.004, entropy_coef_max=0.012)
    first = EntropyControl(config.entropy_coef)
    assert applied_entropy_coef(first, config) == 0.0, "no bonus before anything was measured"
    low = next_entropy_control(first, 4.0, 8.0, config)  # mean 0.5 = target counts as low
    assert low == EntropyControl(0.012, 0.5) and applied_entropy_coef(low, config) == 0.012
    high = next_entropy_control(low, 6.0, 8.0, config)
    assert high == EntropyControl(0.012 - 0.004, 0.75) and applied_entropy_coef(high, config) == 0.0
    for _ in range(5):
        high = next_entropy_control(high, 6.0, 8.0, config)
    assert high.coef == config.entropy_coef_min
    assert next_entropy_control(high, 0.0, 0.0, config).last_entropy == 0.0, "an all-masked step divides by nothing"


def test_fixed_entropy_coef_never_moves() -> None:
    config = LossConfig(entropy_coef=-0.02)
    state = EntropyControl(config.entropy_coef)
    assert applied_entropy_coef(state, config) == -0.02 and next_entropy_control(state, 1.0, 2.0, config) == state
    assert math.isinf(state.last_entropy)
