"""Engines that die, hang, refuse or vanish in the middle of a rollout: no sample is lost or doubled, none is of another version."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from fastlora.rollout.sampler import SamplerError
from fastlora.rollout.vllm import serve
from fastlora.rollout.vllm.client import EngineGoneError, VllmClient, _completion
from fastlora.rollout.vllm.policy import Policy
from fastlora.rollout.vllm.process import EngineStartError
from fastlora.rollout.vllm.servers import ForeignServer, OwnEngine
from fastlora.types import Rollout
from tests.rollout.vllm.engines import (
    EXAMPLES,
    LENGTH,
    PARAMS,
    KeptEngine,
    adapted,
    engine_process,
    kill_in_mid_batch,
    sampler_on,
    tiny_model,
)

LONG = dataclasses.replace(PARAMS, max_completion_length=64)


def engine_processes(engine: OwnEngine) -> list[psutil.Process]:
    """Server, engine core and worker."""
    leader = psutil.Process(engine._process.pid)
    return [leader, *leader.children(recursive=True)]


def gone(processes: list[psutil.Process]) -> bool:
    psutil.wait_procs(processes, timeout=10)
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


def same_samples(found: Rollout, truth: Rollout) -> bool:
    return found.texts == truth.texts and torch.equal(found.sampler_logp_nt, truth.sampler_logp_nt)


@pytest.fixture
def fresh_engine(model_folder: Path, tmp_path: Path) -> Iterator[OwnEngine]:
    """One to be killed; hung requests count as such after 15 seconds."""
    engine = OwnEngine(engine_process(model_folder, tmp_path / "engine.log", request_timeout=15.0))
    yield engine
    engine.stop()


class SlowEngine:
    """Stands in for vLLM's: a sample takes .4 s, too short for the real signs of life; the core answers as long as it `lives`."""

    def __init__(self, lives: bool) -> None:
        self.lives, self.asked = lives, 0

    async def is_sleeping(self) -> bool:
        self.asked += 1
        await asyncio.sleep(0 if self.lives else 60)
        return False

    async def pause_generation(self, **_: object) -> None: ...

    async def resume_generation(self) -> None: ...

    async def add_request(self, *_: object, **__: object) -> SlowEngine:
        return self

    async def get(self) -> SimpleNamespace:
        await asyncio.sleep(0.4)
        one = SimpleNamespace(index=0, token_ids=[7], logprobs=[{7: SimpleNamespace(logprob=-0.5)}], finish_reason="stop")
        return SimpleNamespace(outputs=[one])


@pytest.mark.parametrize("lives", [True, False])
def test_a_long_rollout_shows_signs_of_life(lives: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blank lines, then the answer; from an engine whose core hangs nothing comes, and the client does not wait for long."""
    from fastapi import FastAPI  # comes with vLLM

    monkeypatch.setattr(serve, "HEARTBEAT_SECONDS", 0.1)
    app, engine = FastAPI(), SlowEngine(lives)
    models = SimpleNamespace(lora_requests={}, is_base_model=lambda name: name == "base")
    app.state.engine_client, app.state.openai_serving_models = engine, models
    serve._add_route(app)
    sample = next(route.endpoint for route in app.routes if route.path == "/fastlora/sample")

    async def parts() -> list[bytes]:
        response = await sample({"model": "base", "prompts": [[1]], "seeds": [0], "params": {"max_tokens": 1}})
        found: list[bytes] = []
        with suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                found = [part async for part in response.body_iterator]
        return found

    found = asyncio.run(parts())
    assert engine.asked >= 1
    if lives:
        assert len(found) >= 3 and set(found[:-1]) == {b"\n"}
        assert json.loads(b"".join(found)) == {
            "model": "base", "samples": [[{"token_ids": [7], "logprobs": [-0.5], "finish_reason": "stop"}]],
        }  # fmt: skip
    else:
        assert found == []


def test_killed_then_hung_then_gone_for_good(fresh_engine: OwnEngine, engine: KeptEngine) -> None:
    """One engine, three deaths: SIGKILL in mid-batch and SIGSTOP are survived, with the same samples; a file that is gone is not."""
    model = tiny_model()
    adapter = adapted(model)
    with sampler_on(engine, model, adapter) as undisturbed:
        truth = undisturbed.sample(EXAMPLES, LONG, seed=1, adapter_version=1)
    with sampler_on(fresh_engine, model, adapter) as sampler:
        worker = engine_processes(fresh_engine)[-1]
        kill_in_mid_batch(fresh_engine, worker.kill)
        rollout = sampler.sample(EXAMPLES, LONG, seed=1, adapter_version=1)
        assert same_samples(rollout, truth)
        assert rollout.metrics["sampler/restarts"] == 1
        assert any("starting vLLM's engine again" in line for line in sampler.said)

        killed = engine_processes(fresh_engine)
        for process in killed:
            process.suspend()
        rollout = sampler.sample(EXAMPLES, LONG, seed=1, adapter_version=1)
        assert same_samples(rollout, truth)
        assert any("did not answer" in line for line in sampler.said)
        assert gone(killed)

        fresh_engine._process._flags[fresh_engine._process._flags.index("--model") + 1] = "nowhere"
        for process in (last := engine_processes(fresh_engine)):
            process.kill()
        with pytest.raises(SamplerError, match="attempts to go on did not help"):
            sampler.sample(EXAMPLES, LONG, seed=1, adapter_version=1)
        assert gone(last)


def test_leaving_in_mid_rollout_starts_nothing_again(engine: KeptEngine) -> None:
    """A second Ctrl-C: the engine ends, and the rollout in flight must neither be waited for nor be tried again on a new one."""

    class Ended(KeptEngine):
        """Not really: the tests after this one need it."""

        ended = False

        def start(self) -> None:
            assert not self.ended, "started again"
            super().start()

        def stop(self, held=()) -> None:
            self.ended = True

        def alive(self) -> bool:
            return not self.ended and super().alive()

        def sample(self, *arguments) -> None:
            time.sleep(1.0)
            raise EngineGoneError("planted: the engine was ended")

    model = tiny_model()
    adapter = adapted(model)
    with sampler_on(Ended(engine._process), model, adapter) as sampler:
        future = sampler.begin(EXAMPLES, LONG, seed=1, adapter_version=1)
        start = time.monotonic()
    assert time.monotonic() - start < 10
    with pytest.raises(SamplerError, match="closed while it sampled"):
        future.result()


def test_an_aborted_sample_is_no_truncated_one() -> None:
    with pytest.raises(EngineGoneError, match="ended by 'abort' after 2 tokens"):
        _completion([1, 2], [-1.0, -1.0], "abort")


def test_an_engine_that_cannot_start_says_why(model_folder: Path, tmp_path: Path) -> None:
    """Out of memory: a KV cache that no machine has."""
    process = engine_process(model_folder, tmp_path / "engine.log", memory=["--kv-cache-memory-bytes", str(1 << 50)])
    with pytest.raises(EngineStartError, match=r"(?s)ended with status \d+ while starting.*requested memory for kv"):
        process.start()


def test_no_orphans_when_the_trainer_is_killed(model_folder: Path, tmp_path: Path) -> None:
    """SIGKILL runs no handler: the pipe ends, and the engine with it, even while it is starting."""
    program = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from tests.rollout.vllm.engines import engine_process
process = engine_process(Path({str(model_folder)!r}), Path({str(tmp_path / "engine.log")!r}))
process._scratch = Path({str(tmp_path / "scratch")!r})
import threading
threading.Thread(target=process.start, daemon=True).start()
while process._process is None: time.sleep(0.05)
print(process.pid, flush=True)
time.sleep(600)
"""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    trainer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    server = psutil.Process(int(trainer.stdout.readline()))
    deadline = time.monotonic() + 120
    while not (children := server.children(recursive=True)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert children, "the engine core was not started within two minutes"
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.wait()
    assert gone([server, *children])
    assert not scratch.exists(), "what the trainer had on tmpfs goes with it"


class FlakyProxy(ThreadingHTTPServer):
    """Stands between the sampler and the real engine: answers 500 to every `every`-th prompt, or nothing at all when `dead`.

    A stand-in for a network and a server that fail on demand; what it lets through is vLLM's.
    """

    daemon_threads = True

    def __init__(self, engine: OwnEngine, every: int) -> None:
        super().__init__(("127.0.0.1", 0), _Forward)
        self.upstream, self.every, self.dead = engine.client._http, every, False
        self.completions: Counter[str] = Counter()
        self._count, self._lock = 0, threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fails_now(self) -> bool:
        with self._lock:
            self._count += 1
            return self._count % self.every == 0


class _Forward(BaseHTTPRequestHandler):
    server: FlakyProxy

    def do_GET(self) -> None:
        self._forward(b"")

    def do_POST(self) -> None:
        self._forward(self.rfile.read(int(self.headers["Content-Length"])))

    def _forward(self, body: bytes) -> None:
        if self.server.dead:
            self.connection.close()
            return
        if self.path == "/v1/completions" and b'"n":' in body and self.server.fails_now():
            status, content = 500, b'{"error": {"message": "planted"}}'
        else:
            answer = self.server.upstream.request(self.command, self.path, content=body, headers={"Content-Type": "application/json"})
            status, content = answer.status_code, answer.content
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Quiet."""


def foreign(proxy: FlakyProxy) -> ForeignServer:
    return ForeignServer(VllmClient(proxy.url, request_timeout=60.0), needed_length=LENGTH)


MANY = tuple(dataclasses.replace(example, index=i) for i, example in enumerate(EXAMPLES * 4))


def test_http_500_in_mid_batch_loses_nothing(engine: KeptEngine) -> None:
    model = tiny_model()
    adapter = adapted(model)
    with sampler_on(engine, model, adapter) as undisturbed:
        truth = undisturbed.sample(MANY, PARAMS, seed=1, adapter_version=1)
    proxy = FlakyProxy(engine, every=7)
    with sampler_on(foreign(proxy), model, adapter, max_restarts=4) as sampler:
        rollout = sampler.sample(MANY, PARAMS, seed=1, adapter_version=1)
        assert rollout.metrics["sampler/restarts"] >= 1
        assert rollout.texts == truth.texts, "the same seeds give the same samples, whoever was asked, and however often"
        assert sum("500" in line and "planted" in line for line in sampler.said) >= 1
    proxy.shutdown()


def test_half_of_the_servers_gone(engine: KeptEngine) -> None:
    model = tiny_model()
    adapter = adapted(model)
    proxies = [FlakyProxy(engine, every=10**9) for _ in range(2)]
    with sampler_on([foreign(proxy) for proxy in proxies], model, adapter) as sampler:
        first = sampler.sample(MANY, PARAMS, seed=1, adapter_version=1)
        proxies[1].dead = True
        second = sampler.sample(MANY, PARAMS, seed=1, adapter_version=1)
        assert first.texts == second.texts
        assert second.metrics["sampler/restarts"] == 1
        third = sampler.sample(MANY, PARAMS, seed=2, adapter_version=1)
        assert third.metrics["sampler/restarts"] == 0, "a server that is known to be gone costs nothing more"
        proxies[1].dead = False
        fourth = sampler.sample(MANY, PARAMS, seed=1, adapter_version=1)
        assert fourth.texts == first.texts
        for proxy in proxies:
            proxy.dead = True
        with pytest.raises(SamplerError, match="attempts to go on did not help"):
            sampler.sample(MANY, PARAMS, seed=1, adapter_version=1)
    for proxy in proxies:
        proxy.shutdown()


def test_a_refused_load_is_tried_again(engine: KeptEngine) -> None:
    """A server that refuses once: the same adapter, written again, is loaded at the second attempt."""

    class Refusing(KeptEngine):
        refusals = 1

        def load(self, policy: Policy) -> None:
            if self.refusals:
                self.refusals -= 1
                self.client.load_adapter("none", policy.folder / "nowhere")
            super().load(policy)

        def lost(self) -> None:
            """Not worth a restart in a test."""

    model = tiny_model()
    adapter = adapted(model)
    with sampler_on(Refusing(engine._process), model, adapter) as sampler:
        rollout = sampler.sample(EXAMPLES, PARAMS, seed=1, adapter_version=1)
    assert rollout.adapter_version == 1
    assert any("refused" in line for line in sampler.said)


def test_a_closed_client_is_a_gone_engine() -> None:
    client = VllmClient("http://127.0.0.1:9", request_timeout=1.0)
    with pytest.raises(EngineGoneError, match="out of reach"):
        client.models()
    client.close()
    with pytest.raises(EngineGoneError):
        client.models()
