"""Resting and waking a real engine. On a CPU vLLM pauses and drops its prefix cache, and keeps weights and slots: what a GPU makes of a
sleep is not run here; order, requests and answers are."""

from __future__ import annotations

import torch

from tests import tolerances
from tests.rollout.vllm.engines import EXAMPLES, PARAMS, KeptEngine, adapted, move, sampler_on, tiny_model
from tests.rollout.vllm.test_sampler import gap


def asleep(engine: KeptEngine) -> bool:
    return engine.client.call("GET", "/is_sleeping").json()["is_sleeping"]


def test_the_same_samples_with_and_without_sleep(engine: KeptEngine) -> None:
    model = tiny_model()
    adapter = adapted(model)
    resting = KeptEngine(engine._process, sleeps=True)
    with sampler_on(engine, model, adapter) as sampler:
        awake = sampler.sample(EXAMPLES, PARAMS, seed=3, adapter_version=1)
    with sampler_on(resting, model, adapter) as sampler:
        first = sampler.sample(EXAMPLES, PARAMS, seed=3, adapter_version=1)
        assert asleep(engine) and resting.alive()
        again = sampler.sample(EXAMPLES, PARAMS, seed=3, adapter_version=1)  # the same policy: verified, not loaded
        for rollout in (first, again):
            assert torch.equal(rollout.completion_ids_nt, awake.completion_ids_nt)
            assert torch.equal(rollout.sampler_logp_nt, awake.sampler_logp_nt)
        assert again.metrics["sampler/wake_seconds"] > 0 and "sampler/swap_seconds" not in again.metrics
        move(adapter, 5)
        moved = sampler.sample(EXAMPLES, PARAMS, seed=3, adapter_version=2)  # the old one is unloaded, a new one loaded, after waking
        assert gap(model, moved, PARAMS.temperature) <= tolerances.SAMPLER_LOGP_FP32
        assert resting.wake() and not asleep(engine)
    assert not any("again" in line for line in sampler.said)
