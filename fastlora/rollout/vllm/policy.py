"""One version of the trainer's policy on its way to the servers: as an adapter, or as the weights themselves.

    adapter    A and s B, loaded beside the base; requests name it; several versions can be there at once
    weights    the engine's own matrices are replaced (full fine-tuning, merged copy); one version at a time

A policy is published as an adapter with a name, a number and a path that no other version has: vLLM 0.32 serves the prefix cache of an
adapter that was replaced under its old name and path, and keeps the old weights under an old number.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from fastlora.atomic import DiskFullError
from fastlora.lora.folded import FoldedAdapter, fold, write_folded
from fastlora.lora.merged import merged_weights
from fastlora.lora.packed import PackedAdapter
from fastlora.model import BaseModel, frozen_parameters
from fastlora.rollout.sampler import SamplerError
from fastlora.rollout.vllm.adapter_memory import checksum, checksums, one_thread, write_shared
from fastlora.rollout.vllm.canary import CanaryError, compare_checksums
from fastlora.rollout.vllm.client import EngineRefusedError, VllmClient
from fastlora.rollout.vllm.weight_files import WeightFileError, WeightIndex, differing, part_checksums, send_weights, write_weights

PARTS = 16
"""A swap of weights reads back one part in sixteen of every matrix: .2 to .5 s for SmolLM2 instead of 1 to 4. A tensor that is missing,
swapped or old is wrong in every part."""

FINGERPRINT_STRIDE = 101
"""Every how many'th weight tells whether a model has changed; a step of full fine-tuning moves all of them."""


class Payload(Protocol):
    """What a server is given. Errors are the client's, and CanaryError."""

    model: str | None
    """The adapter's name in requests; None = the base model's."""
    exclusive: bool
    """It takes the place of every other version on a server."""

    def load(self, client: VllmClient) -> None:
        """Into an engine of our own."""
        ...

    def load_files(self, client: VllmClient) -> None:
        """Into somebody else's server."""
        ...

    def verify(self, client: VllmClient, *, who: str, version: int) -> None:
        """Compares with what the kernels of an engine of our own read. Raises CanaryError."""
        ...

    def unload(self, client: VllmClient) -> None:
        """Forgets it."""
        ...


@dataclass(frozen=True, slots=True)
class Policy:
    """One version. What is checked on a server was computed here, from what the trainer holds."""

    version: int
    payload: Payload
    folder: Path
    """Where its files are; removed with the version."""
    fingerprint: int
    """Of the trainer's weights as they were."""
    expected_pv: Tensor
    """The trainer's log-probabilities after the canary's prompts, [prompts, v]."""
    before_pv: Tensor
    """Those of the policy before; of the base model at the start."""


class AdapterPayload:
    """An adapter without modules (no rank above 0) is the base model."""

    model: str | None
    exclusive = False

    def __init__(self, name: str, adapter: FoldedAdapter, folder: Path, base_model: str) -> None:
        """name: in requests. base_model: written into PEFT's files."""
        self.model = name if adapter.a_rd else None
        self.adapter, self.checksums = adapter, checksums(adapter)
        self._folder, self._base_model = folder, base_model

    def load(self, client: VllmClient) -> None:
        """Through shared memory."""
        shared = self._folder / "shared"
        if self.model is None:
            return
        if not shared.is_dir():
            with one_thread():
                write_shared(self.adapter, shared)
        client.load_adapter(self.model, shared)

    def load_files(self, client: VllmClient) -> None:
        """As PEFT files. A server that came back may still have it."""
        if self.model is None or self.model in {model["id"] for model in client.models()}:
            return
        folder = self._folder / self.model
        if not folder.is_dir():
            write_folded(self.adapter, folder, base_model=self._base_model)
        client.load_adapter(self.model, folder)

    def verify(self, client: VllmClient, *, who: str, version: int) -> None:
        """Module by module."""
        if self.model is not None:
            found = client.worker("fastlora_checksums", self.model, self.adapter.ranks)
            compare_checksums(self.checksums, found, who=who, version=version)

    def unload(self, client: VllmClient) -> None:
        """The slot is freed when the next one needs it."""
        if self.model is not None:
            client.unload_adapter(self.model)


class WeightPayload:
    """Matrices in a file that the engine maps."""

    model: str | None = None
    exclusive = True

    turns = itertools.count()
    """Of all verifications, whatever the versions are called: every part has its turn."""

    def __init__(self, folder: Path, index: WeightIndex) -> None:
        self._folder, self._index = folder, index

    def load(self, client: VllmClient) -> None:
        """Raises EngineRefusedError when the engine refuses the file; it goes on with what it held."""
        try:
            send_weights(client.call, self._folder, self._index.version)
        except WeightFileError as error:
            raise EngineRefusedError(str(error)) from error

    def load_files(self, client: VllmClient) -> None:
        """Refused by the config: a foreign server has no such loader."""
        raise EngineRefusedError(f"{client.where}: weights can be updated in an engine of our own only; leave vllm.servers empty")

    def verify(self, client: VllmClient, *, who: str, version: int) -> None:
        """One part in PARTS of every matrix, another one every time."""
        part = next(self.turns) % PARTS
        expected = part_checksums(self._folder, part, PARTS)
        held = client.worker("fastlora_weight_checksums", list(expected), part, PARTS)
        if wrong := differing(expected, held):
            raise CanaryError(
                f"{who} holds other weights than version {version} of the trainer in {len(wrong)} of {len(expected)} tensors: "
                f"{', '.join(wrong[:4])}. Nothing was sampled"
            )

    def unload(self, client: VllmClient) -> None:
        """The next version takes its place."""


class Source(Protocol):
    """What the trainer trains, for samplers."""

    exclusive: bool
    """Of its payloads."""

    def base(self) -> AbstractContextManager[None]:
        """Inside, the trainer's model is what the servers were started with."""
        ...

    def fingerprint(self) -> int:
        """Changes when the policy does."""
        ...

    def payload(self, version: int, folder: Path) -> Payload:
        """The policy as it is now: a copy, which later steps leave alone. The folder is its own."""
        ...


class _OfAdapter:
    """What both sources of an adapter share."""

    def __init__(self, adapter: PackedAdapter, model: BaseModel) -> None:
        self._adapter, self._model = adapter, model

    def base(self) -> AbstractContextManager[None]:
        """See Source."""
        return self._adapter.disabled()

    def fingerprint(self) -> int:
        """Of every entry of the adapter."""
        return checksum(self._adapter.flat.data)


class AdapterSource(_OfAdapter):
    """An adapter, as an adapter."""

    exclusive = False

    def __init__(self, adapter: PackedAdapter, model: BaseModel, name: str) -> None:
        """name: of the run, unique among all that use the servers."""
        super().__init__(adapter, model)
        self._name = name

    def payload(self, version: int, folder: Path) -> AdapterPayload:
        """See Source."""
        with one_thread():
            return AdapterPayload(f"{self._name}-v{version}", fold(self._adapter, self._model.module.dtype), folder, self._model.source)


class MergedSource(_OfAdapter):
    """An adapter, merged into copies of the base's matrices."""

    exclusive = True

    def __init__(self, adapter: PackedAdapter, model: BaseModel, memory: Path) -> None:
        """memory: folder for the file, whose memory every version uses again."""
        super().__init__(adapter, model)
        self._memory = memory

    def payload(self, version: int, folder: Path) -> WeightPayload:
        """See Source."""
        return _weights(self._memory, merged_weights(self._adapter), self._model, version, complete=False)


class FullSource:
    """Every weight of the model."""

    exclusive = True

    def __init__(self, flat: Tensor, model: BaseModel, memory: Path) -> None:
        """flat: all of them, in one buffer. memory: see MergedSource."""
        self._flat, self._model, self._memory = flat, model, memory

    def base(self) -> AbstractContextManager[None]:
        """The model itself, before its first step."""
        return nullcontext()

    def fingerprint(self) -> int:
        """Of one weight in FINGERPRINT_STRIDE."""
        return checksum(self._flat[::FINGERPRINT_STRIDE])

    def payload(self, version: int, folder: Path) -> WeightPayload:
        """See Source."""
        return _weights(self._memory, frozen_parameters(self._model.module), self._model, version, complete=True)


def _weights(memory: Path, tensors: Iterable[tuple[str, Tensor]], model: BaseModel, version: int, *, complete: bool) -> WeightPayload:
    try:
        index = write_weights(memory, tensors, model.module.dtype, version=f"step-{version}", complete=complete)
    except DiskFullError as error:  # not the run's disk, which the trainer saves to
        raise SamplerError(f"{memory} has no room for the weights: {error}. Make a container's /dev/shm larger") from error
    return WeightPayload(memory, index)
