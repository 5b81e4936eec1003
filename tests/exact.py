"""Models that compute in fp64 throughout: transformers' norms and rotary angles are float32 whatever the weights are."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.tiny import make_tiny_model


def make_exact_model(family: str, **overrides: Any) -> PreTrainedModel:
    """A tiny model in which two orders of the same sums differ by fp64 rounding alone (FP64_EXACT)."""
    model = make_tiny_model(family, dtype=torch.float64, **overrides)
    for module in model.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            module.forward = MethodType(_norm, module)
        elif kind.endswith("RotaryEmbedding"):
            module.forward = MethodType(_rotary, module)
    return model


def _norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)


def _rotary(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    angles = position_ids[..., None].double() * self.inv_freq.double()
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
