"""One vLLM server over HTTP: token ids in, token ids and processed log-probabilities out; adapters loaded and unloaded; errors by name.

Own engines listen on a Unix socket, foreign ones on a URL; what is said is the same. `EngineGoneError`: no answer that
counts. `EngineRefusedError`: a clear no, from a server that lives. The sampler tries both again, within its bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx2

from fastlora.rollout.sampler import SamplerError, SamplingParams

BASE = "base"
"""Name under which an own engine serves the model without an adapter."""

TOP_LOGPROBS = 20
"""Log-probabilities of the most likely tokens that a server gives without being told otherwise (vLLM's max_logprobs)."""

CONNECT_SECONDS = 10.0

CONTROL_SECONDS = 300.0
"""For load, unload, checksums, canary, weights, and between two signs of life of an engine of our own that samples."""


class EngineGoneError(SamplerError):
    """The engine is dead, hung, out of reach, or failed in the middle of a request."""

    transient = True


class EngineRefusedError(SamplerError):
    """The engine is alive and will not do it."""

    status: int | None = None
    """HTTP's, where that was its answer."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sample."""

    token_ids: list[int]
    """The eos or the tokens of the stop string that ended it included."""
    logprobs: list[float]
    """Processed: temperature and nucleus applied."""
    finished: bool
    """Ended by eos or a stop string, not cut off."""


class VllmClient:
    """`where` names the server in every message."""

    def __init__(self, where: str, *, socket: Path | None = None, api_key: str | None = None, request_timeout: float) -> None:
        """where: base URL of the server, or with `socket` any name. request_timeout: seconds for a prompt's samples of a foreign server."""
        self.where, self._sampling_seconds = where, request_timeout
        transport = None if socket is None else httpx2.HTTPTransport(uds=str(socket))
        self._http = httpx2.Client(
            transport=transport,
            base_url="http://engine" if socket else where,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx2.Timeout(min(request_timeout, CONTROL_SECONDS), connect=CONNECT_SECONDS),
            # vLLM hangs up after every 500: the next request on a kept connection would be reset.
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
            trust_env=False,  # a proxy for the outside world is none for a server on this machine or the next
        )

    def close(self) -> None:
        """Drops the connections; requests in other threads end with EngineGoneError."""
        self._http.close()

    def healthy(self) -> bool:
        """True when the server answers that its engine is alive."""
        try:
            return self._http.get("/health", timeout=CONNECT_SECONDS).status_code == 200
        except (httpx2.HTTPError, OSError, RuntimeError):  # RuntimeError: closed meanwhile
            return False

    def models(self) -> list[dict[str, Any]]:
        """What the server serves: the base model first, then adapters."""
        return self.call("GET", "/v1/models").json()["data"]

    def complete(
        self, model: str, prompt_ids: Sequence[int], params: SamplingParams, seed: int, stop_token_ids: Sequence[int]
    ) -> list[Completion]:
        """`params.num_generations` samples for one prompt. Raises EngineRefusedError when another model than `model` answered."""
        answer = self._complete(
            model,
            prompt_ids,
            self._sampling_seconds,
            seed=seed,
            logprobs=0,
            return_token_ids=True,
            **_sampling(params, stop_token_ids),
        )
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if len(choices) != params.num_generations:
            raise EngineGoneError(f"{self.where} gave {len(choices)} of {params.num_generations} samples")
        return [_completion(c["token_ids"], c["logprobs"]["token_logprobs"], c["finish_reason"]) for c in choices]

    def sample_together(
        self, model: str, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int], stop_token_ids: Sequence[int]
    ) -> list[list[Completion]]:
        """Samples of several prompts, to the same bits every time; however long it takes, the engine gives signs of life (own engines only:
        serve.py).
        """
        body = {"model": model, "prompts": prompts, "seeds": seeds, "params": _sampling(params, stop_token_ids)}
        answer = self.call("POST", "/fastlora/sample", body).json()
        return [
            [_completion(s["token_ids"], s["logprobs"], s["finish_reason"]) for s in samples]
            for samples in _checked(answer, model, self.where)["samples"]
        ]

    def next_token_logprobs(self, model: str, prompt_ids: Sequence[int], temperature: float = 1.0) -> dict[int, float]:
        """Log-probability of each of the TOP_LOGPROBS most likely next tokens, by the path that sampling takes."""
        answer = self._complete(
            model,
            prompt_ids,
            CONTROL_SECONDS,
            max_tokens=1,
            temperature=temperature,
            top_p=1.0,
            seed=0,
            logprobs=TOP_LOGPROBS,
            return_tokens_as_token_ids=True,
        )
        top = answer["choices"][0]["logprobs"]["top_logprobs"][0]
        return {int(token.removeprefix("token_id:")): logp for token, logp in top.items()}

    def _complete(self, model: str, prompt_ids: Sequence[int], seconds: float, **settings: Any) -> dict[str, Any]:
        answer = self.call("POST", "/v1/completions", {"model": model, "prompt": list(prompt_ids), **settings}, seconds).json()
        return _checked(answer, model, self.where)

    def load_adapter(self, name: str, path: Path) -> None:
        """Loads an adapter from a folder that the server sees; after this every request may name it.

        Raises EngineRefusedError for an adapter that it cannot load (vLLM says 500 to a damaged file, and lives on).
        """
        try:
            self.call("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})
        except EngineGoneError as error:
            if not self.healthy():
                raise
            raise EngineRefusedError(f"{error} (adapter {name})") from None

    def unload_adapter(self, name: str) -> None:
        """Forgets an adapter, or finds that it is not there (its load may have failed); the slot is freed when the next one needs it."""
        try:
            self.call("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        except EngineRefusedError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise

    def sleep(self) -> None:
        """Level 1: weights and adapter slots go to the computer's memory, the cache is dropped (own engines; a CPU only pauses)."""
        self.call("POST", "/sleep?level=1")

    def wake_up(self) -> None:
        """Undoes `sleep`. Raises EngineGoneError when not everything came back."""
        if (status := self.call("POST", "/wake_up").json()["status"]) != "awake":
            raise EngineGoneError(f"{self.where} did not wake up: {status}")

    def worker(self, method: str, *args: Any) -> Any:
        """Calls a method of FastloraWorker (own engines only)."""
        return self.call("POST", "/collective_rpc", {"method": method, "args": list(args)}).json()["results"][0]

    def call(self, verb: str, path: str, body: dict[str, Any] | None = None, seconds: float | None = None) -> httpx2.Response:
        """seconds: between two parts of the answer; None = CONTROL_SECONDS, or request_timeout if that is less.

        Raises EngineGoneError: no answer, or a status from 500 on; EngineRefusedError: a status from 400 on.
        """
        try:
            timeout = httpx2.USE_CLIENT_DEFAULT if seconds is None else httpx2.Timeout(seconds, connect=CONNECT_SECONDS)
            response = self._http.request(verb, path, json=body, timeout=timeout)
        except httpx2.TimeoutException as error:
            raise EngineGoneError(f"{self.where} did not answer {path} in time ({type(error).__name__})") from error
        except (httpx2.HTTPError, OSError, RuntimeError) as error:  # RuntimeError: the client was closed meanwhile
            raise EngineGoneError(f"{self.where} is out of reach: {path}: {error}") from error
        if response.status_code >= 500:
            raise EngineGoneError(f"{self.where} failed with {response.status_code} on {path}: {_message(response)}")
        if response.status_code >= 400:
            refusal = EngineRefusedError(f"{self.where} refused {path} with {response.status_code}: {_message(response)}")
            refusal.status = response.status_code
            raise refusal
        return response


def _sampling(params: SamplingParams, stop_token_ids: Sequence[int]) -> dict[str, Any]:
    """In vLLM's names."""
    return {
        "n": params.num_generations,
        "max_tokens": params.max_completion_length,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "stop": list(params.stop),
        "stop_token_ids": list(stop_token_ids),
        "include_stop_str_in_output": True,
    }


def _completion(token_ids: list[int], logprobs: list[float], finish_reason: str) -> Completion:
    """Raises EngineGoneError for a sample that somebody else ended (aborted by a pause or a sleep, failed): it is no truncated one."""
    if finish_reason not in ("stop", "length"):
        raise EngineGoneError(f"a sample ended by {finish_reason!r} after {len(token_ids)} tokens")
    return Completion(token_ids, logprobs, finish_reason == "stop")


def _checked(answer: dict[str, Any], model: str, where: str) -> dict[str, Any]:
    """The answer, if it is of the model that was asked for."""
    if answer["model"] != model:
        raise EngineRefusedError(f"{where} answered for model {answer['model']} when asked for {model}; its samples are dropped")
    return answer


def _message(response: httpx2.Response) -> str:
    """The server's own words, in one line."""
    try:
        body = response.json()
    except ValueError:
        body = response.text
    error = body.get("error", body.get("detail", body)) if isinstance(body, dict) else body
    text = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(text).split())[:500]
