"""What the bit-for-bit cases of trl_cases.py rest on: a fixture that reaches every branch, options that act, trainers that are TRL's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastlora.batches import policy_batch
from fastlora.config import AdvantageConfig
from fastlora.losses.importance_sampling import raw_ratio
from tests.parity import trl_cases
from tests.parity.delta import compare
from tests.parity.trl_cases import LEVELS, LOSS_TYPES, OPTIONS, as_rollout, loss_config, shared_rig


def _trl_losses(**settings: object) -> Tensor:
    """TRL's loss for every loss type, one micro-batch."""
    rig, losses = shared_rig(), []
    for loss_type in LOSS_TYPES:
        trl_cases.configure(rig.trainer, loss_config(loss_type, **settings), AdvantageConfig(), 1)
        losses += trl_cases.trl_losses(rig, trl_cases.trl_inputs(rig), 1)
    rig.twins.zero_gradients()
    return torch.stack(losses).detach()


@pytest.mark.parametrize("policy", ["old_per_token_logps", "ref_per_token_logps"])
def test_fixture_reaches_every_branch(policy: str) -> None:
    """At least 5 % of tokens beyond each bound, among them tokens that the clip holds; and sequences, for the sequence ratio."""
    rig = shared_rig()
    trl_cases.configure(rig.trainer, loss_config("dapo"), AdvantageConfig(), 1)
    inputs = trl_cases.trl_inputs(rig)
    mask_nt, advantages_n1 = inputs["completion_mask"].bool(), inputs["advantages"][:, None]
    logp_nt = trl_cases.recorded_logp(rig.trainer, inputs, std=0.0, seed=0)
    log_ratio_nt = (logp_nt - inputs[policy]) * mask_nt
    token_nt, sequence_n1 = log_ratio_nt.exp(), (log_ratio_nt.sum(1, keepdim=True) / mask_nt.sum(1, keepdim=True)).exp()
    for low, high in ((0.8, 1.2), (0.8, 1.28)):
        for beyond_nt in (token_nt < low, token_nt > high):
            assert beyond_nt[mask_nt].float().mean() >= 0.05
        assert ((token_nt < low) & (advantages_n1 < 0) & mask_nt).any() and ((token_nt > high) & (advantages_n1 > 0) & mask_nt).any()
        assert (sequence_n1 < low).any() and (sequence_n1 > high).any()
    assert bool(mask_nt.all(1).any()) and not bool(mask_nt.all(1).all())
    assert len(set(inputs["prompt_mask"].sum(1).tolist())) > 1, "prompts of one length: nothing is left-padded"


def test_the_other_sampler_is_beyond_every_bound() -> None:
    """At least 5 % of tokens and one sequence beyond each; one token in eight without a number."""
    rig = trl_cases.correction_rig()
    batch = policy_batch(as_rollout(rig.recording), torch.zeros(trl_cases.SAMPLES), mask_truncated=False, sampler_is_trainer=False)
    old_nt, mask_nt = trl_cases._scores(rig, batch, 1), batch.loss_mask_nt
    for level, (low, high) in trl_cases.BOUNDS.items():
        ratio = raw_ratio(old_nt, batch, trl_cases.correction_config(f"{level}_mask", "dapo"))
        ratio = ratio[mask_nt] if level == "token" else ratio.squeeze(1)
        assert (ratio < low).float().mean() >= 0.05 and (ratio > high).float().mean() >= 0.05
        assert ((ratio >= low) & (ratio <= high)).float().mean() >= 0.2
    assert 0.05 < batch.sampler_logp_nt[mask_nt].isnan().float().mean() < 0.2


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_changes_a_loss(option: str) -> None:
    beta = OPTIONS[option].get("beta", 0.0)
    assert (_trl_losses(**OPTIONS[option]) != _trl_losses(beta=beta)).any()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_fresh_trainer_gives_the_shared_ones_bits(loss_type: str) -> None:
    """What `configure` sets on the shared trainer is what TRL's constructor sets."""
    index = LOSS_TYPES.index(loss_type)
    config = loss_config(loss_type, beta=(0.0, 0.05)[index % 2], importance_sampling_level=LEVELS[index % 3 % 2], **_extra(index))
    advantage, split = AdvantageConfig(scale_rewards=trl_cases.SCALES[index % 3]), 1 + index % 2
    results = []
    arguments = {
        **trl_cases.trl_arguments(config, advantage),
        "per_device_train_batch_size": trl_cases.SAMPLES // split,
        "gradient_accumulation_steps": split,
    }
    for rig in (shared_rig(), trl_cases.make_rig(**arguments)):
        if rig is shared_rig():
            trl_cases.configure(rig.trainer, config, advantage, split)
        else:
            rig.trainer.current_gradient_accumulation_steps = split  # the training loop's, not the constructor's
        rig.twins.zero_gradients()
        losses = trl_cases.trl_losses(rig, trl_cases.trl_inputs(rig), split)
        results.append([*losses, *rig.twins.gradients()[1]])
    delta = compare(*results)
    assert delta.max_ulp == 0, delta


def _extra(index: int) -> dict[str, object]:
    """Half of the loss types are tried with all other options on."""
    settings = dict(OPTIONS["everything at once"]) if index % 4 > 1 else {}
    settings.pop("beta", None)
    return settings
