"""Rollouts from vLLM: publish the policy, ask the canary, sample; retry what an engine lost.

    begin(version)   new version?   fold the adapter ─► every server loads it ─► checksums, canary ─► old versions unloaded
                     then           one request per prompt, spread over the servers, in the background ─► Rollout

A request names the version, and the answer must name it too. A request in flight finishes on the version that it named: versions stay
loaded until nobody uses them. When an engine dies, hangs or answers 5xx, the prompts that it owed are asked again, of it restarted or of
another server, under the same version and the same seeds: no sample is lost, none is counted twice. After `max_restarts` of them in one
rollout the error goes up, and the trainer saves what it has.

An engine on the trainer's own card rests when nothing is in flight, and wakes before anything else is asked of it (memory.py).
"""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from fastlora.model import BaseModel
from fastlora.policy import next_token_logp
from fastlora.prompt import encode
from fastlora.rollout.assemble import assemble
from fastlora.rollout.sampler import SamplerError, SamplingParams, derived_seed
from fastlora.rollout.vllm.canary import Canary
from fastlora.rollout.vllm.client import Completion, EngineGoneError, EngineRefusedError
from fastlora.rollout.vllm.policy import Policy, Source
from fastlora.rollout.vllm.process import EngineStartError
from fastlora.rollout.vllm.servers import Server
from fastlora.types import Example, Rollout

RETRIED = (EngineGoneError, EngineRefusedError, EngineStartError)
"""What a restarted engine, or another server, may do better."""

PAUSE_SECONDS = 1.0
"""Before servers that all failed are asked again."""

Metrics = defaultdict[str, float]


@dataclass(slots=True)
class Restarts:
    """How often one rollout may still be saved."""

    left: int
    used: int = 0

    def spend(self, error: SamplerError) -> None:
        """Raises SamplerError when none is left."""
        if not self.left:
            raise SamplerError(f"{error}\nvllm.max_restarts = {self.used} attempts to go on did not help") from error
        self.left, self.used = self.left - 1, self.used + 1


@dataclass(frozen=True, slots=True)
class Trial:
    """A source to be tried against the first one before the run."""

    other: Source
    examples: tuple[Example, ...]
    params: SamplingParams
    tokens_per_step: int
    """That a step of the run samples at most."""


class VllmSampler:
    """Implements rollout.sampler.Sampler; a context manager: inside, the servers run."""

    def __init__(
        self,
        model: BaseModel,
        source: Source,
        servers: Sequence[Server],
        canary: Canary,
        *,
        folder: Path,
        max_restarts: int,
        say: Callable[[str], None],
        trial: Trial | None = None,
    ) -> None:
        """source: of the policy. folder: new, for policies on their way, seen by every server; removed at the end. say: told what a person
        may want to know. trial: of another source, which takes the place of the first where it is faster.
        """
        self._model, self._source, self._servers, self._canary = model, source, list(servers), canary
        self._folder, self._max_restarts, self._say = folder, max_restarts, say
        self._trial = trial
        self._policies: dict[int, Policy] = {}
        self._users: Counter[int] = Counter()
        self._in_flight: list[Future[Rollout]] = []
        self._held: dict[str, set[int]] = {server.name: set() for server in servers}  # checked, and to be sampled from
        self._there: dict[str, set[int]] = {server.name: set() for server in servers}  # loaded, and to be unloaded one day
        self._starts: Counter[str] = Counter()
        self._lost: set[str] = set()
        self._closed = False
        # Of all of the above, and of what is done to servers: a rollout may restart one while another begins.
        self._lock = threading.RLock()
        self._rollouts = ThreadPoolExecutor(1, thread_name_prefix="vllm-rollout")  # one at a time: a shared batch rounds differently

    def __enter__(self) -> VllmSampler:
        """Starts the servers and takes the base model's own gap as the canary's measure."""
        try:
            with self._source.base():
                self._base_pv = self._score()
            for server in self._servers:
                self._start(server)
            if self._trial is not None:
                self._choose(self._trial)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def _start(self, server: Server) -> None:
        """Starts it and takes the base model's own gap there as the canary's measure."""
        self._say(f"starting {server.name}" + (" again" if self._starts[server.name] else ""))
        server.start()
        self._starts[server.name] += 1
        self._lost.discard(server.name)
        gap = self._canary.calibrate(self._base_pv, server.ask(server.base, self._canary.prompts), who=server.name)
        self._say(f"{server.name}: the base model's log-probabilities differ from the trainer's by up to {gap:.2g} nats")

    def _stop(self) -> None:
        """Ends engines first: what is in flight then fails at once, instead of being waited for, and is not tried again."""
        self._closed = True
        for server in self._servers:
            server.stop([policy for version, policy in self._policies.items() if version in self._there[server.name]])
        self._rollouts.shutdown(cancel_futures=True)
        for server in self._servers:  # one that a rollout was just starting again
            server.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _choose(self, trial: Trial) -> None:
        """Measures both sources on the same prompts, one after the other, and keeps the one with the shorter step."""
        first, seconds = self._source, {}
        for version, (name, source) in enumerate((("adapter", first), ("merged copy", trial.other)), start=-2):
            self._source = source
            rollout = self.sample(trial.examples, trial.params, seed=0, adapter_version=version)
            a_token = rollout.metrics["sampler/sampling_seconds"] / rollout.num_tokens
            seconds[name] = rollout.metrics["sampler/swap_seconds"] + a_token * trial.tokens_per_step
        for server in self._servers:
            server.wake()
            with trial.other.base():  # the engine's own matrices as they were, bit for bit
                original = trial.other.payload(0, self._folder)
            original.load(server.client)
            original.verify(server.client, who=server.name, version=0)
            self._held[server.name].clear()
        self._policies.clear()
        chosen = min(seconds, key=seconds.__getitem__)
        self._source = {"adapter": first, "merged copy": trial.other}[chosen]
        measured = ", ".join(f"{name} {value:.3g} s" for name, value in seconds.items())
        self._say(f"vllm.weights = 'auto': swap and sampling of a step, measured: {measured}; {chosen} it is")

    def sample(self, examples: Sequence[Example], params: SamplingParams, *, seed: int, adapter_version: int) -> Rollout:
        """See rollout.sampler.Sampler. Raises CanaryError, or SamplerError when restarts did not help."""
        return self.begin(examples, params, seed=seed, adapter_version=adapter_version).result()

    def begin(self, examples: Sequence[Example], params: SamplingParams, *, seed: int, adapter_version: int) -> Future[Rollout]:
        """The same in the background: when this returns, the servers hold this version, and the adapter may change."""
        restarts = Restarts(self._max_restarts)
        if adapter_version not in self._policies:
            # New weights would take the place of theirs; loading an adapter and its canary would join their batches and round them anew.
            wait(self._in_flight)
        with self._lock:
            policy, metrics = self._publish(adapter_version, restarts)
            self._users[adapter_version] += 1
            self._in_flight = [future for future in self._in_flight if not future.done()]
            self._in_flight.append(self._rollouts.submit(self._collect, policy, list(examples), params, seed, restarts, metrics))
            return self._in_flight[-1]

    def _score(self) -> Tensor:
        """The trainer's own log-probabilities after the canary's prompts."""
        return next_token_logp(self._model.module, self._canary.prompts).cpu()

    def _publish(self, version: int, restarts: Restarts) -> tuple[Policy, dict[str, float]]:
        """The policy of `version`, on every server that lives, and what that took."""
        metrics: Metrics = defaultdict(float)
        self._wake(version, metrics)
        if version in self._policies:
            if self._source.fingerprint() != self._policies[version].fingerprint:
                raise SamplerError(
                    f"the policy has changed and is still called version {version}: the engine would sample from the old one"
                )
            return self._policies[version], dict(metrics)
        self._retire()
        with timed(metrics, "sampler/swap_seconds"):
            folder = self._folder / f"v{version}"
            payload = self._source.payload(version, folder)
        with timed(metrics, "sampler/canary_seconds"):
            before_pv = self._policies[max(self._policies)].expected_pv if self._policies else self._base_pv
            policy = Policy(version, payload, folder, self._source.fingerprint(), self._score(), before_pv)
        self._policies[version] = policy
        self._ready(policy, restarts, metrics)
        return policy, dict(metrics)

    def _wake(self, version: int, metrics: Metrics) -> None:
        """Wakes what rests; where it holds `version` already, the canary asks again."""
        for server in self._servers:
            try:
                start = time.perf_counter()
                if not server.wake():
                    continue
                metrics["sampler/wake_seconds"] += time.perf_counter() - start
                if version in self._held[server.name]:
                    self._check(server, self._policies[version], metrics)
            except RETRIED as error:
                self._lose(server, error)

    def _rest(self) -> None:
        """Lets the servers rest when nothing is in flight: the trainer updates next."""
        if self._users.total():
            return
        for server in self._servers:
            try:
                server.rest()
            except RETRIED as error:
                self._lose(server, error)

    def _retire(self) -> None:
        """Unloads the versions that nobody uses; the newest one's log-probabilities stay, for the next canary."""
        for version in [version for version in self._policies if not self._users[version]]:
            policy = self._policies[version]
            for server in self._servers:
                self._held[server.name].discard(version)
                if version in self._there[server.name]:
                    try:
                        server.unload(policy)
                        self._there[server.name].discard(version)
                    except RETRIED as error:
                        self._lose(server, error)
            shutil.rmtree(policy.folder, ignore_errors=True)
            if version != max(self._policies) and not any(version in there for there in self._there.values()):
                del self._policies[version]

    def _ready(self, policy: Policy, restarts: Restarts, metrics: Metrics) -> list[Server]:
        """The servers that hold the policy, at least one. Raises CanaryError, or SamplerError when restarts did not help."""
        while True:
            ready, failure = [], None
            for server in self._servers:
                try:
                    if policy.version not in self._held[server.name]:
                        self._load(server, policy, metrics)
                    ready.append(server)
                except RETRIED as error:
                    failure = error
                    self._lose(server, error)
            if ready:
                return ready
            assert failure is not None
            restarts.spend(failure)
            time.sleep(PAUSE_SECONDS)

    def _load(self, server: Server, policy: Policy, metrics: Metrics) -> None:
        """Swaps the policy in and asks the canary."""
        if self._closed:
            raise SamplerError("the sampler was closed while it sampled")
        if server.name in self._lost or not server.alive():
            self._start(server)
        with timed(metrics, "sampler/swap_seconds"):
            self._there[server.name].add(policy.version)
            server.load(policy)
        self._check(server, policy, metrics)
        if policy.payload.exclusive:
            self._held[server.name].clear()
        self._held[server.name].add(policy.version)

    def _check(self, server: Server, policy: Policy, metrics: Metrics) -> None:
        """Asks the canary."""
        with timed(metrics, "sampler/canary_seconds"):
            server.verify(policy)
            said = server.ask(server.model(policy), self._canary.prompts)
            finding = self._canary.check(
                policy.expected_pv, policy.before_pv, said, who=server.name, version=policy.version, exact=server.exact
            )
        if not finding.decided:
            self._say(f"{server.name}, version {policy.version}: {finding.undecided()}")
        metrics["sampler/canary_max_abs"] = max(metrics["sampler/canary_max_abs"], finding.max_abs)
        metrics["sampler/canary_tolerance"], metrics["sampler/canary_effect"] = finding.tolerance, finding.effect
        metrics["sampler/canary_undecided"] += not finding.decided

    def _lose(self, server: Server, error: SamplerError) -> None:
        """Nothing that the server held counts any more."""
        self._say(str(error))
        self._held[server.name].clear()
        self._lost.add(server.name)
        server.lost()
        if not server.alive():  # what was there is gone with it; a server that lives keeps it, to be unloaded
            self._there[server.name].clear()

    def _collect(
        self, policy: Policy, examples: list[Example], params: SamplingParams, seed: int, restarts: Restarts, metrics: dict[str, float]
    ) -> Rollout:
        """All samples of all prompts; in a thread of its own."""
        start = time.perf_counter()
        prompts = encode(self._model.tokenizer, [example.prompt for example in examples])
        done: dict[int, list[Completion]] = {}
        try:
            while len(done) < len(prompts):
                with self._lock:
                    servers = self._ready(policy, restarts, defaultdict(float))
                    starts = dict(self._starts)
                owed = {index: ids for index, ids in enumerate(prompts) if index not in done}
                if failures := self._ask(servers, policy, owed, params, seed, done):
                    restarts.spend(next(iter(failures.values())))
                    with self._lock:
                        for server, error in failures.items():
                            if self._starts[server.name] == starts[server.name]:  # nobody has started it again meanwhile
                                self._lose(server, error)
        finally:
            with self._lock:
                self._users[policy.version] -= 1
                self._rest()
        samples = [
            (torch.tensor(one.token_ids), torch.tensor(one.logprobs), one.finished) for index in range(len(prompts)) for one in done[index]
        ]
        metrics = metrics | {"sampler/restarts": float(restarts.used), "sampler/sampling_seconds": time.perf_counter() - start}
        return assemble(self._model, examples, [torch.tensor(ids) for ids in prompts], samples, policy.version, metrics)

    def _ask(
        self,
        servers: Sequence[Server],
        policy: Policy,
        owed: Mapping[int, list[int]],
        params: SamplingParams,
        seed: int,
        done: dict[int, list[Completion]],
    ) -> dict[Server, SamplerError]:
        """Asks for the prompts `owed`, spread over the servers, and puts what comes into `done`; the servers that failed, and how."""
        seeds = {index: derived_seed(seed, index) for index in owed}  # whoever samples a prompt, and however often
        failures: dict[Server, SamplerError] = {}

        def ask(place: int) -> None:
            server = servers[place]
            share = {index: ids for turn, (index, ids) in enumerate(owed.items()) if turn % len(servers) == place}
            try:
                if share:
                    server.sample(policy, share, params, seeds, self._model.eos_ids, done)
            except RETRIED as error:
                failures[server] = error

        with ThreadPoolExecutor(len(servers), thread_name_prefix="vllm-server") as pool:
            list(pool.map(ask, range(len(servers))))
        return failures


@contextmanager
def timed(metrics: Metrics, name: str) -> Iterator[None]:
    """Adds the seconds inside to `metrics[name]`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        metrics[name] += time.perf_counter() - start
