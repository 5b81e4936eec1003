"""Planted bugs: each must turn the comparison that should see it red."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastlora.config import AdvantageConfig, LossConfig
from fastlora.losses import importance_sampling
from fastlora.losses import policy as losses
from fastlora.types import TrainBatch
from tests.parity import peft_cases, trl_cases
from tests.parity.delta import Delta
from tests.parity.twins import Twins, make_twins
from tests.tiny import make_tiny_model

SQUARE = "model.layers.0.self_attn.o_proj"


def scale_off_by_one_percent(twins: Twins) -> None:
    group = next(group for group in twins.adapter.groups if "model.layers.1.self_attn.v_proj" in group.names)
    group.scales[group.names.index("model.layers.1.self_attn.v_proj")] *= 1.01


@torch.no_grad()
def transposed_a(twins: Twins) -> None:
    a_rd = twins.adapter.a_rd(SQUARE)
    a_rd.copy_(a_rd.t().clone())


MUTATIONS: dict[str, Callable[[Twins], None]] = {"s × 1.01": scale_off_by_one_percent, "A transposed": transposed_a}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_layers_see_it(mutation: str) -> None:
    twins = make_twins(make_tiny_model(), peft_cases.lora_config("llama", "uneven ranks", "alpha/r"))
    assert peft_cases.layers_delta(twins).max_ulp == 0
    twins.zero_gradients()
    MUTATIONS[mutation](twins)
    assert peft_cases.layers_delta(twins).max_ulp > 0


def test_the_layers_see_a_dropped_mask() -> None:
    twins, masks = peft_cases.masked_twins()
    twins.adapter.groups[2].b_mask = None
    delta = peft_cases.masked_delta(twins, masks)
    assert delta.max_ulp > 0


@contextmanager
def undone(twins: Twins) -> Iterator[None]:
    """The shared adapter is itself again afterwards."""
    data, scales = twins.adapter.flat.data.clone(), [list(group.scales) for group in twins.adapter.groups]
    yield
    twins.adapter.flat.data.copy_(data)
    for group, old in zip(twins.adapter.groups, scales, strict=True):
        group.scales[:] = old


def _loss_delta(loss_type: str, level: str) -> Delta:
    config = trl_cases.loss_config(loss_type, beta=0.05, importance_sampling_level=level)
    return trl_cases.loss_delta(trl_cases.shared_rig(), config, AdvantageConfig(), 2)


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("level", trl_cases.LEVELS)
@pytest.mark.parametrize("loss_type", trl_cases.LOSS_TYPES)
def test_every_loss_sees_it(loss_type: str, level: str, mutation: str) -> None:
    twins = trl_cases.shared_rig().twins
    with undone(twins):
        MUTATIONS[mutation](twins)
        assert _loss_delta(loss_type, level).max_ulp > 0


@pytest.mark.parametrize("recorded", ["old_logp_nt", "ref_logp_nt"])
@pytest.mark.parametrize("level", trl_cases.LEVELS)
@pytest.mark.parametrize("loss_type", trl_cases.LOSS_TYPES)
def test_every_loss_sees_shuffled_policies(monkeypatch: pytest.MonkeyPatch, loss_type: str, level: str, recorded: str) -> None:
    """Log-probabilities of the behaviour or the reference policy that belong to another sample."""
    right = trl_cases.our_batch

    def wrong(*args: object) -> object:
        batch = right(*args)
        return replace(batch, **{recorded: getattr(batch, recorded).roll(1, dims=0)})

    monkeypatch.setattr(trl_cases, "our_batch", wrong)
    assert _loss_delta(loss_type, level).max_ulp > 0


def upside_down(old_nt: Tensor, batch: TrainBatch, config: LossConfig) -> Tensor:
    """π_sampler / π_old."""
    assert batch.sampler_logp_nt is not None
    return importance_sampling.sampler_ratio(batch.sampler_logp_nt, replace(batch, sampler_logp_nt=old_nt), config)


def of_another_sample(old_nt: Tensor, batch: TrainBatch, config: LossConfig) -> Tensor:
    assert batch.sampler_logp_nt is not None
    return importance_sampling.sampler_ratio(old_nt, replace(batch, sampler_logp_nt=batch.sampler_logp_nt.roll(1, dims=0)), config)


def without_the_lower_bound(old_nt: Tensor, batch: TrainBatch, config: LossConfig) -> Tensor:
    return importance_sampling.sampler_ratio(old_nt, batch, config.model_copy(update={"sampler_correction_min": 0.0}))


def without_the_upper_bound(old_nt: Tensor, batch: TrainBatch, config: LossConfig) -> Tensor:
    unbounded = {"sampler_correction_max": None}
    return importance_sampling.sampler_ratio(old_nt, batch, config.model_copy(update=unbounded))


def masked_for_truncated(old_nt: Tensor, batch: TrainBatch, config: LossConfig) -> Tensor:
    """And the other way round."""
    level, way = config.sampler_correction.split("_")
    other = {"truncate": "mask", "mask": "truncate"}[way]
    return importance_sampling.sampler_ratio(old_nt, batch, config.model_copy(update={"sampler_correction": f"{level}_{other}"}))


WRONG_RATIOS = (upside_down, of_another_sample, without_the_lower_bound, without_the_upper_bound, masked_for_truncated)


@pytest.mark.parametrize("wrong", WRONG_RATIOS, ids=lambda wrong: wrong.__name__)
@pytest.mark.parametrize("mode", trl_cases.CORRECTIONS)
def test_the_correction_sees_it(monkeypatch: pytest.MonkeyPatch, mode: str, wrong: Callable[..., Tensor]) -> None:
    config = trl_cases.correction_config(mode, "dapo")
    rig = trl_cases.correction_rig()
    assert trl_cases.correction_delta(rig, config, 2, stale=False).max_ulp == 0
    monkeypatch.setattr(losses, "sampler_ratio", wrong)
    assert trl_cases.correction_delta(rig, config, 2, stale=False).max_ulp > 0


def test_the_correction_sees_a_behaviour_policy_that_moved() -> None:
    """Where a step comes between sampling and loss the training pass is not the behaviour policy."""
    config, rig = trl_cases.correction_config("token_truncate", "dapo"), trl_cases.correction_rig()
    right = trl_cases.with_policies
    assert trl_cases.correction_delta(rig, config, 1, stale=True).max_ulp == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trl_cases, "with_policies", lambda batch, old, ref: right(batch, None, ref))
        assert trl_cases.correction_delta(rig, config, 1, stale=True).max_ulp > 0
