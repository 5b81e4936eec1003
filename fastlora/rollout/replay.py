"""Recorded rollouts: one safetensors file a step, with the texts and examples in its metadata. Written by one sampler, fed by another."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastlora.atomic import atomic_write_bytes
from fastlora.rollout.sampler import Sampler, SamplerError, SamplingParams
from fastlora.types import Example, Rollout

TENSORS = ("prompt_ids_np", "prompt_mask_np", "completion_ids_nt", "completion_mask_nt", "sampler_logp_nt", "finished_n")


def rollout_file(folder: Path, adapter_version: int) -> Path:
    """The file of the rollout that was sampled after `adapter_version` optimizer steps."""
    return folder / f"rollout-{adapter_version:06d}.safetensors"


def write_rollout(rollout: Rollout, path: Path) -> None:
    """Writes a rollout, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors, record = take_apart(rollout)
    record["examples"] = [asdict(example) for example in rollout.examples]
    atomic_write_bytes(path, save(tensors, metadata={"rollout": json.dumps(record)}))


def read_rollout(path: Path, device: torch.device | str = "cpu") -> Rollout:
    """Reads a rollout; its tensors on `device`. Raises SamplerError when the file is missing or damaged."""
    if not path.is_file():
        raise SamplerError(f"{path}: no recorded rollout; the recording has fewer steps, or another schedule, than this run")
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads(file.metadata()["rollout"])
            examples = [Example(**example) for example in record["examples"]]
            return put_together({name: file.get_tensor(name) for name in TENSORS}, record, examples, device)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:  # TypeError: no metadata, or of another version
        raise SamplerError(f"{path} is damaged, or no recorded rollout: {error}") from None


def take_apart(rollout: Rollout) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(its tensors on the CPU, the rest as JSON), without its examples and what the sampler measured on the way."""
    tensors = {name: getattr(rollout, name).cpu().contiguous() for name in TENSORS}
    record = {
        "num_generations": rollout.num_generations,
        "texts": list(rollout.texts),
        "adapter_version": rollout.adapter_version,
    }
    return tensors, record


def put_together(
    tensors: Mapping[str, Tensor], record: Mapping[str, Any], examples: Sequence[Example], device: torch.device | str
) -> Rollout:
    """The inverse of `take_apart`. Raises KeyError or TypeError for parts of something else."""
    parts: dict[str, Any] = {name: tensors[name].to(device) for name in TENSORS}
    return Rollout(
        examples=tuple(examples),
        num_generations=record["num_generations"],
        texts=tuple(record["texts"]),
        adapter_version=record["adapter_version"],
        **parts,
    )


class RecordingSampler:
    """Passes on what another sampler delivers and keeps a copy on disk."""

    def __init__(self, sampler: Sampler, folder: Path) -> None:
        self._sampler, self._folder = sampler, folder

    def sample(self, examples: Sequence[Example], params: SamplingParams, *, seed: int, adapter_version: int) -> Rollout:
        """See rollout.sampler.Sampler."""
        rollout = self._sampler.sample(examples, params, seed=seed, adapter_version=adapter_version)
        write_rollout(rollout, rollout_file(self._folder, adapter_version))
        return rollout


class ReplaySampler:
    """Delivers recorded rollouts, whatever the policy is now: for parity tests and benchmarks."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        """device: where the trainer wants the tensors. Raises SamplerError when the folder holds no recording."""
        if not any(folder.glob("rollout-*.safetensors")):
            raise SamplerError(f"rollout.replay_path = {str(folder)!r} holds no rollout-*.safetensors; record one with rollout.record_path")
        self._folder, self._device = folder, device

    def sample(self, examples: Sequence[Example], params: SamplingParams, *, seed: int, adapter_version: int) -> Rollout:
        """The recorded rollout of this adapter version. Raises SamplerError when it is of other problems or another group size."""
        path = rollout_file(self._folder, adapter_version)
        rollout = read_rollout(path, self._device)
        recorded = ([example.prompt for example in rollout.examples], rollout.num_generations)
        if recorded != ([example.prompt for example in examples], params.num_generations):
            raise SamplerError(
                f"{path} was recorded for other prompts or another rollout.num_generations; replay with the recording's data and seed"
            )
        return rollout
