"""grpo_loss has the bits of TRL 1.16's GRPOTrainer._compute_loss: loss, d loss / d logp, d loss / d entropy, and the metrics.

TRL's own method runs on a stand-in for the trainer, which hands it recorded log-probabilities and entropies for a model's.
tests/parity/test_grpo_loss_trl.py runs the whole trainer; here each combination costs a millisecond, so that all can be tried.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from functools import partial
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from trl import GRPOTrainer

from fastlora.config import LossConfig
from fastlora.losses.entropy_control import EntropyControl, applied_entropy_coef, next_entropy_control
from fastlora.losses.importance_sampling import behaviour_logp, sampler_ratio
from fastlora.losses.policy import policy_loss
from fastlora.types import TrainBatch

N, T, MAX_LENGTH = 8, 23, 29
LOSS_TYPES = get_args(LossConfig.model_fields["loss_type"].annotation)
CORRECTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "token": {"sampler_correction": "token_mask", "sampler_correction_max": 1.5, "sampler_correction_min": 0.6},
    "sequence": {"sampler_correction": "sequence_mask", "sampler_correction_max": 5.0, "sampler_correction_min": 0.2},
}
"""Ratios between the trainer and a sampler: some 1 in 5 is masked."""
TRL_NAMES = {"vespo/phi_mean": "vespo/phi_seq_mean"}


class StubTrainer(SimpleNamespace):
    """What GRPOTrainer._compute_loss reads of the trainer, on one process; `config` is ours."""

    def __init__(self, config: LossConfig, accumulation: int, steps_per_generation: int, use_importance_ratio: bool) -> None:
        super().__init__(
            args=SimpleNamespace(**config.model_dump(), steps_per_generation=steps_per_generation),
            model=SimpleNamespace(training=True),
            accelerator=SimpleNamespace(
                num_processes=1,
                sync_gradients=True,
                gather=lambda x: x,
                reduce=lambda x, reduction: x,
                pad_across_processes=lambda x, dim, pad_index: x,
            ),
            epsilon_low=config.epsilon,
            epsilon_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
            current_gradient_accumulation_steps=accumulation,
            max_completion_length=MAX_LENGTH,
            use_vllm=use_importance_ratio,
            vllm_importance_sampling_correction=use_importance_ratio,
            aux_loss_enabled=False,
            _entropy_bonus_enabled=config.entropy_coef != 0.0 or config.use_adaptive_entropy,
            _last_world_entropy=float("inf"),
            _entropy_window_stats=None,
            _metrics={"train": defaultdict(list)},
            **config.model_dump(
                include={
                    "loss_type",
                    "beta",
                    "importance_sampling_level",
                    "top_entropy_quantile",
                    "off_policy_mask_threshold",
                    "entropy_coef",
                    "use_adaptive_entropy",
                }
            ),
        )
        self.get_high_entropy_mask = partial(GRPOTrainer.get_high_entropy_mask, self)
        self.get_off_policy_mask = GRPOTrainer.get_off_policy_mask
        self.get_gamma_weights = GRPOTrainer.get_gamma_weights

    def loss(self, logp_nt: Tensor, entropy_nt: Tensor, batch: TrainBatch, importance_ratio_nt: Tensor | None) -> Tensor:
        """TRL's loss of our batch."""
        self._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logp_nt, entropy_nt, None)
        per_sample = batch.advantages_nt.shape[1] == 1
        inputs = {
            "prompt_ids": batch.prompt_ids_np,
            "prompt_mask": batch.prompt_mask_np.long(),
            "completion_ids": batch.completion_ids_nt,
            "completion_mask": batch.loss_mask_nt.long(),
            "advantages": batch.advantages_nt.squeeze(1) if per_sample else batch.advantages_nt,
            "num_items_in_batch": torch.tensor(batch.num_items_in_batch),
            "old_per_token_logps": batch.old_logp_nt,
            "ref_per_token_logps": batch.ref_logp_nt,
            "sampling_per_token_logps": batch.sampler_logp_nt,
            "importance_sampling_ratio": importance_ratio_nt,
        }
        return GRPOTrainer._compute_loss(self, None, {name: value for name, value in inputs.items() if value is not None})


def _fixture(seed: int, *, on_policy: bool = False, per_token: bool = False, masked_row: bool = True) -> tuple[Tensor, Tensor, TrainBatch]:
    """(logp, entropy, batch); the batch's old, reference and sampler policies all differ from the current one."""
    generator = torch.Generator().manual_seed(seed)
    randn = partial(torch.randn, generator=generator)
    lengths = torch.randint(1, T + 1, (N,), generator=generator)
    lengths[0], lengths[1] = T, 0 if masked_row else 1
    mask_nt = torch.arange(T) < lengths[:, None]
    logp_nt = -randn(N, T).abs() * mask_nt
    drift_n1 = 0.3 * randn(N, 1)  # moves whole sequences, so that their mean ratio is clipped too
    others = [(logp_nt + drift_n1 + 0.4 * randn(N, T)) * mask_nt for _ in range(3)]
    batch = TrainBatch(
        prompt_ids_np=torch.zeros(N, 3, dtype=torch.int64),
        prompt_mask_np=torch.ones(N, 3, dtype=torch.bool),
        completion_ids_nt=torch.zeros(N, T, dtype=torch.int64),
        completion_mask_nt=mask_nt,
        loss_mask_nt=mask_nt,
        advantages_nt=randn(N, T if per_token else 1),
        old_logp_nt=None if on_policy else others[0],
        ref_logp_nt=others[1],
        sampler_logp_nt=others[2],
        num_items_in_batch=3 * int(mask_nt.sum()) + 5,
    )
    return logp_nt, randn(N, T).abs() * mask_nt, batch


def _gradients(loss: Tensor, leaves: tuple[Tensor, Tensor]) -> list[Tensor]:
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]


def _compare(config: LossConfig, accumulation: int, per_generation: int, ratio: str, seed: int = 0, **fixture: bool) -> None:
    logp_nt, entropy_nt, batch = _fixture(seed, **fixture)
    config = config.model_copy(update=CORRECTIONS[ratio])
    # That the ratio itself is TRL's is shown by tests/parity/trl_cases.py; here it is an input, on policy and off.
    importance_ratio_nt = sampler_ratio(behaviour_logp(logp_nt, batch), batch, config)
    trl = StubTrainer(config, accumulation, per_generation, use_importance_ratio=importance_ratio_nt is not None)
    leaves = (logp_nt.clone().requires_grad_(), entropy_nt.clone().requires_grad_())
    expected_loss = trl.loss(*leaves, batch, importance_ratio_nt)
    expected = [expected_loss.detach(), *_gradients(expected_loss, leaves)]
    loss, metrics = policy_loss(
        *leaves,
        batch,
        config,
        accumulation_steps=accumulation,
        steps_per_generation=per_generation,
        max_completion_length=MAX_LENGTH,
        entropy_coef=config.entropy_coef,
    )
    got = [loss.detach(), *_gradients(loss, leaves)]
    for name, ours, theirs in zip(("loss", "dlogp", "dentropy"), got, expected, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), f"{name}: max |Δ| {(ours - theirs).abs().max():.3e}"
    if fixture.get("masked_row", True):
        return  # TRL counts fully masked sequences among the sequence-level means; we do not
    for name, value in metrics.items():
        if (theirs := trl._metrics["train"].get(TRL_NAMES.get(name, name))) is not None:
            assert value.item() == theirs[0], name


LEVELS = get_args(LossConfig.model_fields["importance_sampling_level"].annotation)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "kl": {"beta": 0.05},
    "kl without bias correction": {"beta": 0.05, "use_bias_correction_kl": False},
    "uneven clip": {"epsilon": 0.15, "epsilon_high": 0.4},
    "delta": {"epsilon_high": 0.25, "delta": 1.4},
    "entropy mask": {"top_entropy_quantile": 0.37, "beta": 0.05},
    "off-policy mask": {"off_policy_mask_threshold": 0.05},
    "entropy bonus": {"entropy_coef": 0.02},
    "all": {
        "epsilon_high": 0.3,
        "delta": 1.6,
        "beta": 0.1,
        "top_entropy_quantile": 0.6,
        "off_policy_mask_threshold": 0.1,
        "entropy_coef": -0.01,
        "sapo_temperature_pos": 0.8,
        "sapo_temperature_neg": 1.7,
        "vespo_k_pos": 1.5,
        "vespo_lambda_neg": 1.2,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_bits_equal_trl(loss_type: str, level: str, variant: str) -> None:
    config = LossConfig.model_validate({"loss_type": loss_type, "importance_sampling_level": level, **VARIANTS[variant]})
    splits = ((1, 1), (3, 3), (2, 4), (4, 2), (3, 7))
    for seed, (accumulation, per_generation) in enumerate(splits):
        _compare(config, accumulation, per_generation, "none", seed)
    for seed, (ratio, on_policy, per_token) in enumerate(itertools.product(("none", "token", "sequence"), (False, True), (False, True))):
        _compare(config, 3, 4, ratio, seed, on_policy=on_policy, per_token=per_token, masked_row=False)


def test_fixture_reaches_every_branch() -> None:
    """At least 5 % of tokens, and one sequence, beyond each clip bound; or the tests above would hold for a wrong clip."""
    beyond = {level: torch.zeros(2) for level in LEVELS}
    count = 0
    for seed in range(5):
        logp_nt, _, batch = _fixture(seed)
        assert batch.old_logp_nt is not None
        mask_nt, log_ratio_nt = batch.loss_mask_nt, logp_nt - batch.old_logp_nt
        sequence_n = ((log_ratio_nt * mask_nt).sum(1) / mask_nt.sum(1).clamp(min=1)).exp()
        for level, ratio in (("token", log_ratio_nt[mask_nt].exp()), ("sequence", sequence_n)):
            beyond[level] += torch.stack([(ratio < 0.8).sum(), (ratio > 1.28).sum()])
        count += int(mask_nt.sum())
    assert (beyond["token"] >= 0.05 * count).all() and (beyond["sequence"] >= 1).all(), (beyond, count)


def test_adaptive_entropy_follows_trl() -> None:
    """Twelve optimizer steps of two micro-batches, entropies on both sides of the target: the same coefficients and losses."""
    config = LossConfig(use_adaptive_entropy=True, entropy_coef=0.01, entropy_target=0.75, entropy_coef_max=0.02, beta=0.05)
    trl, state = StubTrainer(config, 2, 2, use_importance_ratio=False), EntropyControl(config.entropy_coef)
    seen = set()
    for step in range(12):
        coef = applied_entropy_coef(state, config)
        seen.add(coef)
        entropy_sum = tokens = 0.0
        for micro in range(2):
            logp_nt, entropy_nt, batch = _fixture(2 * step + micro)
            entropy_nt = entropy_nt * (0.8 if step % 5 < 3 else 1.2)
            trl.accelerator.sync_gradients = micro == 1
            expected = trl.loss(logp_nt, entropy_nt, batch, None)
            loss, metrics = policy_loss(
                logp_nt,
                entropy_nt,
                batch,
                config,
                accumulation_steps=2,
                steps_per_generation=2,
                max_completion_length=MAX_LENGTH,
                entropy_coef=coef,
            )
            assert torch.equal(loss, expected)
            entropy_sum += metrics["entropy_sum"].item()
            tokens += metrics["entropy_tokens"].item()
        state = next_entropy_control(state, entropy_sum, tokens, config)
        assert state.coef == trl.entropy_coef
    assert {0.0, config.entropy_coef_max} < seen, seen  # suspended, at its bound, and in between
