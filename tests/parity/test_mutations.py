"""Planted bugs: each must turn the comparison that should see it red."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from fastlora.config import AdvantageConfig
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
