"""A `vllm serve` that somebody else started: plain vLLM on a TCP port with a key, without any of our code, adapters as PEFT files."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastlora.rollout.sampler import SamplerError
from fastlora.rollout.vllm.client import VllmClient
from fastlora.rollout.vllm.servers import ForeignServer
from tests import tolerances
from tests.rollout.vllm.engines import EXAMPLES, LENGTH, PARAMS, adapted, move, sampler_on, tiny_model
from tests.rollout.vllm.test_sampler import gap

KEY = "secret of the tests"


@pytest.fixture(scope="module")
def url(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a running server; the flags are those of README."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = "--dtype float32 --max-model-len 128 --enable-lora --max-lora-rank 32 --max-loras 2 --logprobs-mode processed_logprobs"
    flags += " --generation-config vllm --enforce-eager --kv-cache-memory-bytes 67108864 --no-enable-chunked-prefill"
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", str(model_folder)]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), *flags.split()]
    environment = os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_API_KEY": KEY}
    log = tmp_path_factory.mktemp("foreign") / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    client = VllmClient(f"http://127.0.0.1:{port}", request_timeout=10.0)
    deadline = time.monotonic() + 200
    while not client.healthy():
        assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.3)
    yield client.where
    server.terminate()
    server.wait(30)


def foreign(url: str, key: str | None = KEY, needed_length: int = LENGTH) -> ForeignServer:
    return ForeignServer(VllmClient(url, api_key=key, request_timeout=60.0), needed_length=needed_length)


def test_rollouts_of_a_plain_server_are_the_trainers(url: str) -> None:
    """Uneven ranks, modules without an adapter, a scale per module: folded, so that no reader of the files can go wrong."""
    model = tiny_model()
    adapter = adapted(model)
    with sampler_on(foreign(url), model, adapter) as sampler:
        for version in (1, 2, 3):
            move(adapter, seed=version)
            rollout = sampler.sample(EXAMPLES, PARAMS, seed=version, adapter_version=version)
            assert gap(model, rollout, PARAMS.temperature) <= tolerances.SAMPLER_LOGP_FP32
            assert rollout.metrics["sampler/canary_undecided"] == 0, "in float32 log-probabilities alone decide"
        ours = [served["id"] for served in sampler._servers[0].client.models() if served["id"].startswith(sampler._source._name)]
        assert ours == [f"{sampler._source._name}-v3"]


def test_what_a_server_cannot_do_is_said_before_training(url: str) -> None:
    model = tiny_model()
    adapter = adapted(model)
    with pytest.raises(SamplerError, match="refused /v1/models with 401"), sampler_on(foreign(url, key=None), model, adapter):
        pass
    too_long = foreign(url, needed_length=LENGTH + 1)
    with pytest.raises(SamplerError, match=r"max_model_len 128; .* need 129"), sampler_on(too_long, model, adapter):
        pass
    nobody = foreign("http://127.0.0.1:9")
    with pytest.raises(SamplerError, match="does not answer /health"), sampler_on(nobody, model, adapter):
        pass


def test_raw_log_probabilities_are_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of --logprobs-mode raw_logprobs, vLLM's default, says the same at every temperature (played by the client here)."""
    answer = VllmClient.next_token_logprobs
    monkeypatch.setattr(VllmClient, "next_token_logprobs", lambda self, model, prompt, temperature=1.0: answer(self, model, prompt))
    model = tiny_model()
    with pytest.raises(SamplerError, match="raw log-probabilities"), sampler_on(foreign(url), model, adapted(model)):
        pass
