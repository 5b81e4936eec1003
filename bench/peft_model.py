"""PEFT's layers on SmolLM2 with the workload's adapter: what TRL and the plain loop train."""

from __future__ import annotations

from pathlib import Path

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bench.workload import DType
from fastlora.packaged_model import packaged_model_folder

PREFIX = "base_model.model."
"""PEFT's wrapper in front of every module's name."""


def load_peft_model(adapter: Path, dtype: DType) -> peft.PeftModel:
    """The base model in `dtype` (SDPA attention, the default) with the saved adapter, trainable, in float32."""
    base = AutoModelForCausalLM.from_pretrained(packaged_model_folder(), dtype=getattr(torch, dtype))
    return peft.PeftModel.from_pretrained(base, adapter, is_trainable=True)


def peft_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """`model.layers.0.self_attn.q_proj.lora_A` -> A [r, d]; `... .lora_B` -> B [n, r]: fastlora's names, the model's order."""
    named = {name.removeprefix(PREFIX).removesuffix(".default.weight"): p for name, p in model.named_parameters()}
    return {name: p for name, p in named.items() if p.requires_grad}


def peft_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of `peft_parameters`, copied."""
    gradients = {name: parameter.grad for name, parameter in peft_parameters(model).items()}
    return {name: gradient.clone() for name, gradient in gradients.items() if gradient is not None}
