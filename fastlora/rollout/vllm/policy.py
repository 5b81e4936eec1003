"""One version of the trainer's policy, as it travels to the servers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fastlora.lora.folded import FoldedAdapter
from fastlora.rollout.vllm.adapter_memory import checksum, checksums


@dataclass(frozen=True, slots=True)
class Policy:
    """One version. What is checked on a server was computed here, from what the trainer holds."""

    version: int
    model: str | None
    """The adapter's name in requests; None = the base model (no module has a rank)."""
    adapter: FoldedAdapter
    folder: Path
    """Where its files are; removed with the version."""
    checksums: Mapping[str, tuple[int, int]]
    flat_checksum: int
    """Of the trainer's whole buffer."""
    expected_pv: Tensor
    """The trainer's log-probabilities after the canary's prompts, [prompts, v]."""
    before_pv: Tensor
    """Those of the policy before; of the base model at the start."""


def policy_of(
    version: int, name: str, adapter: FoldedAdapter, flat: Tensor, folder: Path, expected_pv: Tensor, before_pv: Tensor
) -> Policy:
    """The record of the adapter as it was folded. `name`: of the run, unique among all that use the servers."""
    model = f"{name}-v{version}" if adapter.a_rd else None
    return Policy(version, model, adapter, folder / f"v{version}", checksums(adapter), checksum(flat), expected_pv, before_pv)
