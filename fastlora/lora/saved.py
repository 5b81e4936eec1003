"""Saved adapters on a model: alone, or beside the one that trains, whose base weights they share.

A second adapter is attached once, to the same frozen layers, and its LoraLinear modules are kept aside. `only` puts them into the model in
place of the first one's and puts those back afterwards: the weights W exist once, and the first adapter's tensors are not touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastlora.lora.groups import AttachError, LoraLinear, projections
from fastlora.lora.packed import PackedAdapter, attach
from fastlora.lora.peft_format import load_adapter

if TYPE_CHECKING:
    from fastlora.model import BaseModel


def attach_saved(model: BaseModel, folder: Path, *, cast_to_input: bool = True) -> PackedAdapter:
    """A saved adapter attached to a model as it is, whatever config it was trained with. Raises AdapterFileError, AttachError.

    cast_to_input: see lora.groups.LoraGroup.
    """
    saved = load_adapter(folder)
    layers = projections(model.module)
    for spec in saved.specs:
        layer = layers.get(spec.name)
        if layer is None or (layer.in_features, layer.out_features) != (saved.a_rd[spec.name].shape[1], saved.b_nr[spec.name].shape[0]):
            found = "no such layer" if layer is None else f"one of {layer.in_features} in, {layer.out_features} out"
            raise AttachError(
                f"{folder} is an adapter for {saved.base_model}, not for {model.source}: it adapts {spec.name} with "
                f"A {list(saved.a_rd[spec.name].shape)} and B {list(saved.b_nr[spec.name].shape)}, and this model has {found}"
            )
    adapter = attach(model.module, saved.specs, seed=0, cast_to_input=cast_to_input)
    adapter.load(saved.a_rd, saved.b_nr)
    return adapter


def beside(model: BaseModel, folder: Path, *, cast_to_input: bool = True) -> dict[str, LoraLinear]:
    """The layers of a saved adapter on a model that may have another one: path -> layer, for `only`. They hold no gradient.

    Their modules and ranks are their own. Raises AdapterFileError, AttachError; the model is then what it was.
    """
    with only(model.module, {}):
        adapter = attach_saved(model, folder, cast_to_input=cast_to_input)
        for group in adapter.groups:
            for parameter in (group.a_rd, group.b_flat):
                parameter.requires_grad_(False)
                parameter.grad = None
        adapter.flat.grad = torch.empty(0)
        return lora_layers(model.module)


@contextmanager
def only(module: nn.Module, layers: Mapping[str, LoraLinear]) -> Iterator[None]:
    """Inside, `layers` are the model's LoRA layers and every other projection is bare; afterwards those that it had are back, also after
    an exception."""
    own = lora_layers(module)
    _put(module, layers)
    try:
        yield
    finally:
        _put(module, own)


def lora_layers(module: nn.Module) -> dict[str, LoraLinear]:
    """Path -> LoRA layer, those that are in the model now."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLinear)}


def _put(module: nn.Module, layers: Mapping[str, LoraLinear]) -> None:
    for name, layer in lora_layers(module).items():
        module.set_submodule(name, layer.base)
    for name, layer in layers.items():
        module.set_submodule(name, layer)
