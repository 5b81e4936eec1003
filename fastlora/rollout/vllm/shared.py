"""An engine that several runs share: it holds the adapters of all of them, and their completions share its batches.

Whoever starts it (fastlora/study/engine.py) puts its folder into the environment of the runs:

    FASTLORA_ENGINE/engine.sock     where it listens; the same after a restart, which its starter sees to
                    NAME/           what a run publishes, on tmpfs like the socket

A request is batched as it comes, with those of other runs, and GEMMs of other shapes round differently: the same seed gives the same
samples only up to that. Log-probabilities are those of the tokens that were sampled, as ever, and checksums and canary are asked as of an
engine of one's own.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from fastlora.config import RunConfig
from fastlora.rollout.vllm.client import BASE, VllmClient
from fastlora.rollout.vllm.policy import Policy
from fastlora.rollout.vllm.process import SOCKET, EngineStartError
from fastlora.rollout.vllm.servers import ForeignServer
from fastlora.vllm_config import VllmConfig

ENGINE_VARIABLE = "FASTLORA_ENGINE"


def can_share(config: RunConfig) -> bool:
    """The run samples from an adapter beside the base, and from no server that its config names: weights of its own would be everyone's."""
    by_adapter = config.method == "lora" and config.vllm.weights == "adapter"
    return config.rollout.sampler == "vllm" and by_adapter and not config.vllm.servers


def shared_folder(config: RunConfig) -> Path | None:
    """Folder of the engine that this run is to share, if there is one and it can."""
    folder = os.environ.get(ENGINE_VARIABLE)
    return Path(folder) if folder and can_share(config) else None


class SharedEngine(ForeignServer):
    """A run's side of it: not ours to stop or restart, but bits can be compared."""

    base, exact = BASE, True

    def __init__(self, folder: Path, settings: VllmConfig, *, needed_length: int) -> None:
        """folder: see the module. needed_length: see ForeignServer."""
        client = VllmClient("the shared engine", socket=folder / SOCKET, request_timeout=settings.request_timeout)
        super().__init__(client, needed_length=needed_length)
        self._folder, self._start_timeout = folder, settings.start_timeout

    def start(self) -> None:
        """Waits for it: its starter starts it again when it has died, and removes its folder when that is of no use any more."""
        deadline = time.monotonic() + self._start_timeout
        while not self.alive():
            if not self._folder.is_dir():
                raise EngineStartError(f"{self.name} has ended for good; the log of whoever started it says why")
            if time.monotonic() > deadline:
                raise EngineStartError(f"{self.name} did not answer within vllm.start_timeout = {self._start_timeout:g} s")
            time.sleep(0.2)
        super().start()

    def load(self, policy: Policy) -> None:
        """Anew: an attempt before may have left it loaded, or half loaded."""
        self.unload(policy)
        policy.payload.load(self.client)

    def verify(self, policy: Policy) -> None:
        policy.payload.verify(self.client, who=self.name, version=policy.version)

    def unload(self, policy: Policy) -> None:
        """Out of its slot too: otherwise old versions of a quick run would push out the one that a slow run still samples from."""
        super().unload(policy)
        if policy.payload.model is not None:
            self.client.worker("fastlora_forget", policy.payload.model)
