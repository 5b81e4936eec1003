"""When the engine sleeps and wakes, with stand-ins that record what they are asked: no engine, no GPU.

What a GPU makes of it has not been run. tests/rollout/vllm/test_rest.py asks the same of a real engine on a CPU, which only pauses.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from fastlora.policy import next_token_logp
from fastlora.rollout.vllm.canary import Canary, CanaryError
from fastlora.rollout.vllm.client import Completion, EngineGoneError
from fastlora.rollout.vllm.policy import AdapterSource, Policy
from fastlora.rollout.vllm.sampler import VllmSampler
from fastlora.rollout.vllm.servers import OwnEngine, Server
from tests.rollout.vllm.engines import EXAMPLES, PARAMS, adapted, move, tiny_model


class StandInClient:
    """Records; fails when told to."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def sleep(self) -> None:
        self.calls.append("sleep")

    def wake_up(self) -> None:
        self.calls.append("wake_up")

    def worker(self, method: str) -> None:
        self.calls.append(method)


class StandInProcess:
    """Runs from `start` to `stop`."""

    def __init__(self) -> None:
        self.client: StandInClient | None = StandInClient()

    def start(self) -> StandInClient:
        self.client = StandInClient()
        return self.client

    def stop(self) -> None:
        self.client = None


def test_own_engine_sleeps_once_and_wakes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    process, emptied = StandInProcess(), []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(list(process.client.calls) if process.client else None))
    engine = OwnEngine(process, sleeps=True)  # type: ignore[arg-type]
    assert not engine.wake()
    engine.rest()
    engine.rest()
    assert engine.wake() and not engine.wake()
    assert process.client is not None and process.client.calls == ["sleep", "wake_up"]
    assert emptied == [["sleep"]]  # the trainer's freed memory goes back before the engine wants it
    engine.rest()
    engine.start()  # a new process is awake
    assert not engine.wake() and process.client.calls == ["fastlora_prepare"] and len(emptied) == 2
    engine.rest()
    engine.lost()
    engine.rest()  # nobody there
    assert not engine.wake()


def test_an_engine_without_sleep_mode_is_never_asked() -> None:
    process = StandInProcess()
    engine = OwnEngine(process)  # type: ignore[arg-type]
    engine.rest()
    assert not engine.wake() and process.client is not None and process.client.calls == []


class StandIn(Server):
    """A server that answers with the trainer's own numbers and keeps a diary."""

    name, base, exact = "stand-in", "base", True

    def __init__(self, model, adapter) -> None:
        self.model_there, self.adapter = model, adapter
        self.diary: list[str] = []
        self.asleep, self.running, self.damaged = False, False, False
        self.go = threading.Event()
        self.go.set()

    @property
    def client(self):
        raise AssertionError("the stand-in has none")

    def note(self, what: str) -> None:
        assert not self.asleep or what in ("wake", "stop"), f"{what} while it sleeps"
        self.diary.append(what)

    def start(self) -> None:
        self.running, self.asleep = True, False
        self.note("start")

    def alive(self) -> bool:
        return self.running

    def stop(self, held=()) -> None:
        self.note("stop")

    def lost(self) -> None:
        self.running = self.asleep = False

    def rest(self) -> None:
        self.note("rest")
        self.asleep = True

    def wake(self) -> bool:
        if not self.asleep:
            return False
        self.note("wake")
        self.asleep = False
        return True

    def load(self, policy: Policy) -> None:
        self.note(f"load {policy.version}")

    def unload(self, policy: Policy) -> None:
        self.note(f"unload {policy.version}")

    def verify(self, policy: Policy) -> None:
        self.note(f"verify {policy.version}")
        if self.damaged:
            raise CanaryError("the slots were lost in its sleep")

    def ask(self, model: str, prompts: list[list[int]]) -> list[dict[int, float]]:
        scores = [next_token_logp(self.model_there.module, [prompt])[0] for prompt in prompts]
        return [dict(enumerate(row.tolist())) for row in scores]

    def sample(
        self,
        policy: Policy,
        prompts: Mapping[int, list[int]],
        params,
        seeds: Mapping[int, int],
        stop_token_ids: Sequence[int],
        done: dict[int, list[Completion]],
    ) -> None:
        self.note(f"sample {policy.version}")
        assert self.go.wait(10)
        done.update({index: [Completion([5, 2], [-1.0, -1.0], True)] * params.num_generations for index in prompts})


@pytest.fixture
def stand_in(tmp_path: Path):
    """(server, sampler, adapter); the diary is empty."""
    model = tiny_model()
    adapter = adapted(model, strength=0.0)
    server = StandIn(model, adapter)
    canary = Canary([[3, 4, 5, 6], [7, 8, 9]], torch.float32)
    source = AdapterSource(adapter, model, "t")
    with VllmSampler(model, source, [server], canary, folder=tmp_path / "a", max_restarts=1, say=lambda _: None) as sampler:
        server.diary.clear()
        yield server, sampler, adapter


def test_it_wakes_before_anything_is_asked_and_rests_after_the_rollout(stand_in) -> None:
    server, sampler, adapter = stand_in
    sampler.sample(EXAMPLES, PARAMS, seed=0, adapter_version=1)
    assert server.diary == ["load 1", "verify 1", "sample 1", "rest"]
    server.diary.clear()
    rollout = sampler.sample(EXAMPLES, PARAMS, seed=1, adapter_version=1)  # the same policy: is it still the same?
    assert server.diary == ["wake", "verify 1", "sample 1", "rest"]
    assert rollout.metrics["sampler/wake_seconds"] > 0 and "sampler/canary_max_abs" in rollout.metrics
    server.diary.clear()
    move(adapter, 1)
    sampler.sample(EXAMPLES, PARAMS, seed=2, adapter_version=2)
    assert server.diary == ["wake", "unload 1", "load 2", "verify 2", "sample 2", "rest"]


def test_slots_that_a_sleep_lost_stop_the_run(stand_in) -> None:
    server, sampler, _ = stand_in
    sampler.sample(EXAMPLES, PARAMS, seed=0, adapter_version=1)
    server.damaged = True
    with pytest.raises(CanaryError, match="lost in its sleep"):
        sampler.sample(EXAMPLES, PARAMS, seed=1, adapter_version=1)


def test_it_does_not_rest_while_another_rollout_waits(stand_in) -> None:
    server, sampler, _ = stand_in
    server.go.clear()
    first = sampler.begin(EXAMPLES, PARAMS, seed=0, adapter_version=1)
    second = sampler.begin(EXAMPLES, PARAMS, seed=1, adapter_version=1)
    server.go.set()
    first.result(), second.result()
    assert server.diary.count("rest") == 1 and server.diary[-1] == "rest" and "wake" not in server.diary


@pytest.mark.parametrize("failing", ["rest", "wake"])
def test_an_engine_that_fails_to_sleep_or_wake_is_started_again(stand_in, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server, sampler, _ = stand_in

    def fail() -> bool:
        raise EngineGoneError("gone")

    if failing == "wake":
        sampler.sample(EXAMPLES, PARAMS, seed=0, adapter_version=1)
    with monkeypatch.context() as broken:
        broken.setattr(server, failing, fail)
        sampler.sample(EXAMPLES, PARAMS, seed=1, adapter_version=1)
    rollout = sampler.sample(EXAMPLES, PARAMS, seed=2, adapter_version=1)
    assert server.diary.count("start") == 1 and server.diary.count("load 1") == 2 and rollout.adapter_version == 1
