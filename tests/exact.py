"""fp64 truth: models that compute in fp64 throughout (transformers' norms and rotary angles are float32 whatever the weights are), and
log-probabilities by the plain road."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastlora.attention import ATTENTION
from fastlora.types import TrainBatch
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


def score_one_by_one(model: PreTrainedModel, batch: TrainBatch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(logp_nt, entropy_nt) from the logits of each sequence alone, unpadded, by transformers' SDPA (its eager softmax is float32)."""
    model.set_attn_implementation("sdpa")
    logp_nt = torch.zeros(batch.completion_ids_nt.shape, dtype=torch.float64)
    entropy_nt = logp_nt.clone()
    for n in range(len(batch)):
        prompt, completion = batch.prompt_ids_np[n][batch.prompt_mask_np[n]], batch.completion_ids_nt[n][batch.completion_mask_nt[n]]
        if len(completion):
            logits = model(torch.cat([prompt, completion])[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
            log_p = torch.log_softmax(logits / temperature, -1)
            logp_nt[n, : len(completion)] = log_p.gather(1, completion[:, None]).squeeze(1)
            entropy_nt[n, : len(completion)] = -(log_p.exp() * log_p).sum(-1)
    model.set_attn_implementation(ATTENTION)
    return logp_nt, entropy_nt
