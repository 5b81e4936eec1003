"""One adapter, twice: packed in fastlora's layers and as PEFT layers, on two copies of one model, with the same numbers in it."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastlora.config import LoraConfig
from fastlora.lora.groups import projections, shapes
from fastlora.lora.packed import PackedAdapter, attach
from fastlora.lora.patterns import ModuleSpec, resolve
from fastlora.model import wrap_model
from tests.tiny import make_tiny_tokenizer

UNEVEN: dict[str, int] = {
    "q_proj": 3,
    "layers.0.self_attn.q_proj": 17,
    "layers.0.self_attn.k_proj": 0,
    "layers.1.self_attn.v_proj": 1,
    "layers.0.self_attn.o_proj": 64,
    "down_proj": 1,
}
"""Ranks 0, 1, 3, 17, and a square A (64 of width 64, whose transpose has its shape); `q_proj` is narrowed by `rank_pattern`."""


@dataclass(frozen=True, slots=True)
class Twins:
    """The same policy in both libraries."""

    ours: PreTrainedModel
    adapter: PackedAdapter
    theirs: peft.PeftModel

    def gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """(ours, PEFT's): dA [r, d] and dB [n, r] of every module, in the model's order."""
        return packed_tensors(self.adapter, self.adapter.flat.grad), peft_tensors(self.theirs, self.adapter, gradient=True)

    def parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        """(ours, PEFT's): A [r, d] and B [n, r] of every module, in the model's order."""
        return packed_tensors(self.adapter, self.adapter.flat.data), peft_tensors(self.theirs, self.adapter)

    def zero_gradients(self) -> None:
        """Both of them."""
        self.adapter.flat.grad.zero_()
        self.theirs.zero_grad()


def rank_pattern(overrides: Mapping[str, int], model: nn.Module) -> dict[str, int]:
    """Full module name -> rank: later keys win over earlier ones, which neither resolver allows; the names are then unambiguous."""
    names = list(projections(model))
    return {name: rank for key, rank in overrides.items() for name in names if name.endswith(key)}


def specs_for(model: nn.Module, config: LoraConfig) -> tuple[ModuleSpec, ...]:
    """The modules of an untouched model that `config` adapts."""
    return resolve(shapes(projections(model)), config)


def make_twins(
    model: PreTrainedModel,
    config: LoraConfig,
    *,
    masks: Mapping[str, Tensor] | None = None,
    std: float = 0.05,
    for_peft: PreTrainedModel | None = None,
) -> Twins:
    """Attaches `config` to a copy of the model by fastlora (reference layout) and by PEFT; A and B are both random, of `std`.

    for_peft: the same model made of other layers, where PEFT needs its own.
    """
    theirs, ours = copy.deepcopy(for_peft or model), copy.deepcopy(model)
    specs = specs_for(ours, config)
    adapter = attach(ours, specs, seed=0, b_mask_nr=masks, cast_to_input=False)
    wrap_model(ours, make_tiny_tokenizer(), "tiny")  # fastlora's attention, as in a run
    randomize(adapter, std)
    peft_model = peft.get_peft_model(theirs, peft_config(specs, config))
    copy_to_peft(adapter, peft_model)
    return Twins(ours, adapter, peft_model)


def randomize(adapter: PackedAdapter, std: float, seed: int = 1) -> None:
    """A and B ~ N(0, std²), B not zero: with B = 0 dA would be 0 and the scale would not matter."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in packed_tensors(adapter, adapter.flat.data):
        tensor.normal_(std=std, generator=generator)


def peft_config(specs: tuple[ModuleSpec, ...], config: LoraConfig) -> peft.LoraConfig:
    """The same ranks and scales for PEFT: full names, anchored and escaped. PEFT has no `constant`: there alpha = s·r."""
    adapted = [spec for spec in specs if spec.rank]
    alphas = {spec.name: spec.alpha * (spec.rank if config.scaling == "constant" else 1) for spec in adapted}
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r or 1,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        use_rslora=config.scaling == "alpha/sqrt(r)",
        target_modules=[spec.name for spec in adapted],
        rank_pattern={"^" + re.escape(spec.name): spec.rank for spec in adapted},
        alpha_pattern={"^" + re.escape(name): alpha for name, alpha in alphas.items()},
    )


def peft_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Base-model name -> PEFT's layer."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {name.removeprefix("base_model.model."): module for name, module in found.items()}


@torch.no_grad()
def copy_to_peft(adapter: PackedAdapter, model: nn.Module) -> None:
    """Our A and B into PEFT's layers; both must adapt the same modules."""
    layers = peft_layers(model)
    assert set(layers) == set(adapter.slots)
    for name, layer in layers.items():
        layer.lora_A["default"].weight.copy_(adapter.a_rd(name))
        layer.lora_B["default"].weight.copy_(adapter.b_rn(name).t())


def packed_tensors(adapter: PackedAdapter, buffer: Tensor) -> list[Tensor]:
    """Views of a flat buffer: A [r, d], B [n, r] of every module, in the model's order."""
    tensors = []
    for slot in adapter.slots.values():
        tensors.append(buffer[slot.a_offset :][: slot.rank * slot.in_features].view(slot.rank, slot.in_features))
        tensors.append(buffer[slot.b_offset :][: slot.rank * slot.out_features].view(slot.rank, slot.out_features).t())
    return tensors


def peft_tensors(model: nn.Module, adapter: PackedAdapter, *, gradient: bool = False) -> list[Tensor]:
    """PEFT's A [r, d], B [n, r] (or their gradients) of every module, in the order of `packed_tensors`."""
    layers = peft_layers(model)
    weights = [half["default"].weight for name in adapter.slots for half in (layers[name].lora_A, layers[name].lora_B)]
    return [weight.grad for weight in weights] if gradient else [weight.detach() for weight in weights]


@contextmanager
def perturbed(model: nn.Module, std: float, seed: int) -> Iterator[None]:
    """Inside, the trainable parameters carry noise: another policy, for recorded log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    with torch.no_grad():
        for p in trained:
            p.add_(std * torch.randn(p.shape, generator=generator))
    yield
    with torch.no_grad():
        for p, old in zip(trained, before, strict=True):
            p.copy_(old)
