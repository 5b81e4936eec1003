"""The adapter as every sampler understands it: s_m folded into B, so that α/r = 1 whatever the sampler makes of patterns.

    A_m [r_m, d_m]        s_m B_m [n_m, r_m]        y = W x + (s_m B_m) (A_m x)

vLLM up to 0.31 reads neither rank_pattern nor alpha_pattern and applies one α/r to all modules: wrong in 192 of 210 modules of a mixed
adapter, by up to 15 ×. Folded in float32 and rounded once, no reader can get the scale wrong.

The files say r = lora_alpha = the largest rank, and for modules of another rank both patterns with the module's rank: whoever reads the
patterns computes r_m / r_m = 1, whoever ignores them r / r = 1. PEFT needs them for the shapes.

`python -m fastlora.serve_adapter` writes them for users; the vLLM sampler of a foreign server writes them after every step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from fastlora.atomic import atomic_write_bytes, atomic_write_text
from fastlora.lora.packed import PackedAdapter
from fastlora.lora.peft_format import CONFIG_FILE, PREFIX, WEIGHTS_FILE, AdapterFileError, anchored, load_adapter, plain_lora_config
from fastlora.ops.export_adapter import export_adapter


@dataclass(frozen=True, slots=True)
class FoldedAdapter:
    """Matrices of the adapted modules; modules of rank 0 are absent."""

    a_rd: Mapping[str, Tensor]
    """Module -> A [r, d]."""
    b_nr: Mapping[str, Tensor]
    """Module -> s B [n, r]."""

    @property
    def ranks(self) -> dict[str, int]:
        """Module -> rank, in the model's order."""
        return {name: a.shape[0] for name, a in self.a_rd.items()}


def fold(adapter: PackedAdapter, dtype: torch.dtype) -> FoldedAdapter:
    """The adapter as it is now, on its device, in `dtype`; a copy, which later steps leave alone."""
    slots = list(adapter.slots.values())  # of rank > 0: the others have no slot
    sizes_a = [slot.rank * slot.in_features for slot in slots]
    sizes_b = [slot.rank * slot.out_features for slot in slots]
    out_a, out_b = export_adapter(
        adapter.flat.data,
        [slot.a_offset for slot in slots],
        [slot.b_offset for slot in slots],
        [slot.rank for slot in slots],
        [slot.in_features for slot in slots],
        [slot.out_features for slot in slots],
        [slot.scale for slot in slots],
        None,
        dtype,
    )
    a_rd = {slot.name: part.view(slot.rank, -1) for slot, part in zip(slots, out_a.split(sizes_a), strict=True)}
    b_nr = {slot.name: part.view(-1, slot.rank) for slot, part in zip(slots, out_b.split(sizes_b), strict=True)}
    return FoldedAdapter(a_rd, b_nr)


def write_folded(adapter: FoldedAdapter, folder: Path, *, base_model: str) -> None:
    """The adapter as PEFT files. Raises AdapterFileError when no module has a rank: neither vLLM nor PEFT loads an empty adapter."""
    if not adapter.a_rd:
        raise AdapterFileError(f"{folder}: no module of the adapter has a rank above 0; there is nothing to export, use the base model")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{PREFIX}{name}.lora_A.weight": a.cpu().contiguous() for name, a in adapter.a_rd.items()}
    tensors |= {f"{PREFIX}{name}.lora_B.weight": b.cpu().contiguous() for name, b in adapter.b_nr.items()}
    ranks = adapter.ranks
    largest = max(ranks.values())
    pattern = {anchored(name): rank for name, rank in ranks.items() if rank != largest}
    config = plain_lora_config(base_model, largest, float(largest), list(ranks)) | {"rank_pattern": pattern, "alpha_pattern": pattern}
    # Weights first: a folder with a config is complete.
    atomic_write_bytes(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
    atomic_write_text(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")


def read_folded(folder: Path) -> tuple[FoldedAdapter, str]:
    """(any plain LoRA adapter folder, its scales folded into B in float32; its base model). Raises AdapterFileError."""
    saved = load_adapter(folder)
    scaled = {spec.name: saved.b_nr[spec.name] * spec.scale for spec in saved.specs if spec.rank}
    return FoldedAdapter({name: saved.a_rd[name] for name in scaled}, scaled), saved.base_model
