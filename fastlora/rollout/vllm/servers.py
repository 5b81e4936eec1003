"""Kinds of server behind one face: an engine of our own, and a vLLM that somebody else runs (one that runs share: shared.py)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress

import torch

from fastlora.rollout.sampler import SamplerError, SamplingParams
from fastlora.rollout.vllm.client import BASE, Completion, EngineGoneError, EngineRefusedError, VllmClient
from fastlora.rollout.vllm.policy import Policy
from fastlora.rollout.vllm.process import EngineProcess

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM 0.32 lets max_lora_rank be."""


def max_lora_rank(largest: int) -> int:
    """The smallest that holds the adapter: slots are padded to it. Raises SamplerError above 512."""
    for allowed in MAX_LORA_RANKS:
        if largest <= allowed:
            return allowed
    raise SamplerError(
        f"the adapter's largest rank is {largest}; vLLM serves LoRA up to rank {MAX_LORA_RANKS[-1]}. Lower it in lora.rank_pattern, or "
        "sample from a merged copy (vllm.weights = 'merged')"
    )


CONCURRENT_REQUESTS = 256
"""Of one server; vLLM batches what it has."""


class Server(ABC):
    """One vLLM."""

    name: str
    """For messages."""
    base: str
    """The base model's name there."""
    exact: bool
    """It can show what its kernels read."""

    @property
    @abstractmethod
    def client(self) -> VllmClient: ...

    @abstractmethod
    def start(self) -> None:
        """Makes it ready, without any adapter. Raises SamplerError."""

    @abstractmethod
    def alive(self) -> bool: ...

    @abstractmethod
    def stop(self, held: Sequence[Policy] = ()) -> None:
        """For good; `held`: what it still holds of ours."""

    @abstractmethod
    def lost(self) -> None:
        """It failed: an engine of our own is ended, so that `alive` says no; others may recover."""

    @abstractmethod
    def rest(self) -> None:
        """Nothing is asked of it until `wake`: an engine on the trainer's card makes room. Raises EngineGoneError."""

    @abstractmethod
    def wake(self) -> bool:
        """True when it had made room, and what it holds must be looked at again. Raises EngineGoneError."""

    @abstractmethod
    def load(self, policy: Policy) -> None:
        """Gives it the policy. Raises EngineGoneError, EngineRefusedError."""

    @abstractmethod
    def verify(self, policy: Policy) -> None:
        """Compares bits, where that is possible (`exact`). Raises CanaryError."""

    def model(self, policy: Policy) -> str:
        """What requests under this policy ask for."""
        return policy.payload.model or self.base

    def unload(self, policy: Policy) -> None:
        """Forgets the policy."""
        policy.payload.unload(self.client)

    def sample(
        self,
        policy: Policy,
        prompts: Mapping[int, list[int]],
        params: SamplingParams,
        seeds: Mapping[int, int],
        stop_token_ids: Sequence[int],
        done: dict[int, list[Completion]],
    ) -> None:
        """Puts the completions of the prompts (by their place in the rollout) into `done` as they come. Raises what the client raises."""
        with ThreadPoolExecutor(min(len(prompts), CONCURRENT_REQUESTS), thread_name_prefix=self.name) as requests:
            asked = {
                requests.submit(self.client.complete, self.model(policy), ids, params, seeds[index], stop_token_ids): index
                for index, ids in prompts.items()
            }
            failures = []
            for request in as_completed(asked):
                try:
                    done[asked[request]] = request.result()
                except SamplerError as error:
                    failures.append(error)
            if failures:
                raise failures[0]

    def ask(self, model: str, prompts: list[list[int]]) -> list[dict[int, float]]:
        """The log-probabilities of the most likely next tokens, per prompt; all at once, so that they share a batch."""
        with ThreadPoolExecutor(len(prompts), thread_name_prefix=self.name) as requests:
            return list(requests.map(lambda prompt: self.client.next_token_logprobs(model, prompt), prompts))


class OwnEngine(Server):
    """Started, watched and stopped by us; policies come from shared memory."""

    name, base, exact = "vLLM's engine", BASE, True

    def __init__(self, process: EngineProcess, *, sleeps: bool = False) -> None:
        """sleeps: it rests (memory.sleeps); it was started with --enable-sleep-mode then."""
        self._process, self._sleeps, self._asleep = process, sleeps, False

    @property
    def client(self) -> VllmClient:
        if self._process.client is None:
            raise EngineGoneError(f"{self.name} is not running")
        return self._process.client

    def start(self) -> None:
        self._asleep = False
        torch.cuda.empty_cache()  # torch keeps what the trainer has freed; the engine needs it (no effect on a CPU)
        self._process.start().worker("fastlora_prepare")

    def alive(self) -> bool:
        return self._process.client is not None and self._process.client.healthy()

    def sample(
        self,
        policy: Policy,
        prompts: Mapping[int, list[int]],
        params: SamplingParams,
        seeds: Mapping[int, int],
        stop_token_ids: Sequence[int],
        done: dict[int, list[Completion]],
    ) -> None:
        """All in one request, to the same bits every time."""
        places = list(prompts)
        samples = self.client.sample_together(
            self.model(policy), [prompts[i] for i in places], params, [seeds[i] for i in places], stop_token_ids
        )
        done.update(zip(places, samples, strict=True))

    def stop(self, held: Sequence[Policy] = ()) -> None:
        self._process.stop()

    def lost(self) -> None:
        self._asleep = False
        self._process.stop()

    def rest(self) -> None:
        if self._sleeps and not self._asleep and self._process.client is not None:
            self.client.sleep()
            self._asleep = True

    def wake(self) -> bool:
        if not self._asleep:
            return False
        torch.cuda.empty_cache()  # as in `start`
        self.client.wake_up()
        self._asleep = False
        return True

    def load(self, policy: Policy) -> None:
        policy.payload.load(self.client)

    def verify(self, policy: Policy) -> None:
        policy.payload.verify(self.client, who=self.name, version=policy.version)


class ForeignServer(Server):
    """Somebody else's `vllm serve`; adapters come from PEFT files in a folder that it sees."""

    exact = False

    def __init__(self, client: VllmClient, *, needed_length: int) -> None:
        """needed_length: tokens of the longest prompt and completion."""
        self.name, self._client, self._needed_length = client.where, client, needed_length

    @property
    def client(self) -> VllmClient:
        return self._client

    def start(self) -> None:
        if not self._client.healthy():
            raise EngineGoneError(f"{self.name} does not answer /health; is `vllm serve` running there?")
        served = next(model for model in self._client.models() if model.get("parent") is None)
        self.base = served["id"]
        if served["max_model_len"] < self._needed_length:
            raise EngineRefusedError(
                f"{self.name} serves {self.base} with max_model_len {served['max_model_len']}; data.max_prompt_length + "
                f"rollout.max_completion_length need {self._needed_length}"
            )
        self._refuse_raw_logprobs()

    def _refuse_raw_logprobs(self) -> None:
        """Raw log-probabilities ignore temperature and nucleus: those at temperature 2 are then the same as at 1."""
        at_1, at_2 = (self._client.next_token_logprobs(self.base, [1, 2, 3, 4], temperature=temperature) for temperature in (1.0, 2.0))
        common = at_1.keys() & at_2.keys()
        if all(abs(at_1[token] - at_2[token]) < 1e-6 for token in common):
            raise EngineRefusedError(
                f"{self.name} reports raw log-probabilities, at temperature 2 the same as at 1; start it with "
                "--logprobs-mode processed_logprobs"
            )

    def alive(self) -> bool:
        return self._client.healthy()

    def stop(self, held: Sequence[Policy] = ()) -> None:
        """It goes on without us, and without our adapters."""
        for policy in held:
            with suppress(SamplerError):  # it may be gone
                self.unload(policy)
        self._client.close()

    def lost(self) -> None:
        """It is not ours to restart."""

    def rest(self) -> None:
        """It is not ours to send to sleep."""

    def wake(self) -> bool:
        return False

    def verify(self, policy: Policy) -> None:
        """It cannot show its weights."""

    def load(self, policy: Policy) -> None:
        policy.payload.load_files(self._client)
