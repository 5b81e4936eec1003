"""One engine, several runs: each samples from its own policy, at the same time, and none pushes another's out; a death is survived."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastlora.config import RunConfig
from fastlora.rollout.sampler import SamplerError
from fastlora.rollout.vllm.process import SOCKET
from fastlora.rollout.vllm.servers import OwnEngine
from fastlora.rollout.vllm.shared import ENGINE_VARIABLE, SharedEngine, shared_folder
from fastlora.vllm_config import VllmConfig
from tests import tolerances
from tests.rollout.vllm.engines import (
    EXAMPLES,
    LENGTH,
    PARAMS,
    KeptEngine,
    adapted,
    engine_process,
    kill_in_mid_batch,
    move,
    sampler_on,
    tiny_model,
)
from tests.rollout.vllm.test_failures import LONG, engine_processes
from tests.rollout.vllm.test_sampler import gap


def shared(folder: Path, **settings: float) -> SharedEngine:
    return SharedEngine(folder, VllmConfig(**settings), needed_length=LENGTH)


@pytest.fixture
def folder(engine: KeptEngine) -> Path:
    assert engine._process._folder is not None
    return engine._process._folder


def test_two_runs_sample_at_once_each_from_its_own_policy(folder: Path) -> None:
    models = [tiny_model(), tiny_model()]
    adapters = [adapted(model, seed=seed) for seed, model in enumerate(models)]
    with (
        sampler_on(shared(folder), models[0], adapters[0]) as first,
        sampler_on(shared(folder), models[1], adapters[1]) as second,
        ThreadPoolExecutor(2) as pool,
    ):
        for version in (1, 2):
            asked = [pool.submit(one.sample, EXAMPLES, LONG, seed=3, adapter_version=version) for one in (first, second)]
            rollouts = [one.result() for one in asked]
            for model, rollout in zip(models, rollouts, strict=True):
                assert rollout.adapter_version == version
                assert gap(model, rollout, LONG.temperature) <= tolerances.SAMPLER_LOGP_FP32
            assert gap(models[0], rollouts[1], LONG.temperature) > 100 * tolerances.SAMPLER_LOGP_FP32, "the other's policy would pass too"
            for seed, adapter in enumerate(adapters):
                move(adapter, 10 * version + seed)


def test_a_quick_run_does_not_push_out_a_slow_ones_adapter(engine: KeptEngine, folder: Path) -> None:
    """Two slots, two runs; the quick one publishes five versions. Nothing is left of either when both have ended (of tests before it
    there may be: an engine of one's own keeps what it does not need the room of).
    """
    before = engine.client.models()
    models = [tiny_model(), tiny_model()]
    slow, quick = (adapted(model, seed=seed) for seed, model in enumerate(models))
    with sampler_on(shared(folder), models[0], slow) as first:
        first.sample(EXAMPLES, PARAMS, seed=3, adapter_version=1)
        number = max(one for one in engine.client.worker("fastlora_adapters")["slots"] if one is not None)  # they count up
        with sampler_on(shared(folder), models[1], quick) as second:
            for version in range(5):
                second.sample(EXAMPLES, PARAMS, seed=3, adapter_version=version)
                move(quick, version)
                assert number in engine.client.worker("fastlora_adapters")["slots"]
        rollout = first.sample(EXAMPLES, PARAMS, seed=3, adapter_version=1)
        assert gap(models[0], rollout, PARAMS.temperature) <= tolerances.SAMPLER_LOGP_FP32
    assert all(one is None or one < number for one in engine.client.worker("fastlora_adapters")["slots"])
    assert [model["id"] for model in engine.client.models()] == [model["id"] for model in before]


def test_a_death_is_survived_when_its_starter_starts_it_again(model_folder: Path, tmp_path: Path) -> None:
    engine = OwnEngine(engine_process(model_folder, tmp_path / "engine.log", socket=tmp_path / SOCKET))
    model = tiny_model()
    adapter = adapted(model)
    try:
        engine.start()
        server = shared(tmp_path)
        with sampler_on(server, model, adapter, max_restarts=10) as sampler:
            (worker,) = engine_processes(engine)[-1:]

            def kill_and_start_again() -> None:
                worker.kill()
                while engine.alive():
                    time.sleep(0.1)
                engine.start()

            kill_in_mid_batch(server, kill_and_start_again)
            rollout = sampler.sample(EXAMPLES, LONG, seed=1, adapter_version=1)
            assert rollout.metrics["sampler/restarts"] >= 1
            assert gap(model, rollout, LONG.temperature) <= tolerances.SAMPLER_LOGP_FP32
    finally:
        engine.stop()


def test_an_engine_that_has_ended_is_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(SamplerError, match="the shared engine has ended for good"):
        shared(tmp_path / "removed").start()
    with pytest.raises(SamplerError, match=r"the shared engine did not answer within vllm.start_timeout = 0.5 s"):
        shared(tmp_path, start_timeout=0.5).start()


@pytest.mark.parametrize(
    ("changes", "shares"),
    [
        ({"rollout": {"sampler": "vllm"}}, True),
        ({"rollout": {"sampler": "torch"}}, False),
        ({"rollout": {"sampler": "vllm"}, "vllm": {"weights": "merged"}}, False),
        ({"rollout": {"sampler": "vllm"}, "vllm": {"servers": ["http://localhost:8000"]}}, False),
        ({"rollout": {"sampler": "vllm"}, "method": "full"}, False),
    ],
)
def test_only_adapters_share(changes: dict[str, object], shares: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig.model_validate(changes)
    monkeypatch.delenv(ENGINE_VARIABLE, raising=False)
    assert shared_folder(config) is None
    monkeypatch.setenv(ENGINE_VARIABLE, str(tmp_path))
    assert shared_folder(config) == (tmp_path if shares else None)
