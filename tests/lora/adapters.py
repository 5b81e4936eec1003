"""Adapters for tests: uneven ranks on a tiny model, B filled with noise (with B = 0 every bug gives the base model's logits)."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from fastlora.config import LoraConfig
from fastlora.lora.groups import projections, shapes
from fastlora.lora.packed import PackedAdapter, attach
from fastlora.lora.patterns import resolve

UNEVEN: dict[str, int] = {
    "q_proj": 3,
    "k_proj": 0,
    "v_proj": 1,
    "gate_proj": 17,
    "up_proj": 5,
    "down_proj": 0,
    "layers.1.self_attn.o_proj": 2,
}
"""Group (q, k, v) with a hole in the middle, (gate, up) uneven, down untouched, o_proj of all other layers at r = 8."""


def attach_uneven(model: PreTrainedModel, *, noise: float = 0.1, lora: dict[str, Any] | None = None, **options: Any) -> PackedAdapter:
    """Attaches `UNEVEN` (or the ranks in `lora`) with B = noise · N(0, 1); options as for lora.packed.attach."""
    config = LoraConfig(**{"r": 8, "lora_alpha": 12.0, "rank_pattern": UNEVEN, **(lora or {})})
    specs = resolve(shapes(projections(model)), config)
    adapter = attach(model, specs, **{"seed": 0, "cast_to_input": True, **options})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in adapter.slots:
            b_rn = adapter.b_rn(name)
            b_rn.copy_(noise * torch.randn(b_rn.shape, generator=generator))
    return adapter
