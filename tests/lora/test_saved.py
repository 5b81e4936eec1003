"""A second adapter on the weights of the first: W exists once, and the first is what it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fastlora.lora.groups import AttachError, LoraLinear
from fastlora.lora.packed import PackedAdapter
from fastlora.lora.peft_format import AdapterFileError, save_adapter
from fastlora.lora.saved import beside, lora_layers, only
from fastlora.model import BaseModel, wrap_model
from tests.exact import make_exact_model
from tests.lora.adapters import attach_uneven
from tests.tolerances import FP64_EXACT

OTHER_RANKS = {"r": 5, "rank_pattern": {"q_proj": 0, "v_proj": 2, "gate_proj": 0, "up_proj": 0, "down_proj": 7}, "lora_alpha": 9.0}
"""Other modules than UNEVEN's, and other ranks: k and down have an adapter here alone, q and gate there alone."""
IDS = torch.tensor([[5, 9, 20, 33, 7, 64]])


@pytest.fixture
def student(tiny_tokenizer: PreTrainedTokenizerFast) -> tuple[BaseModel, PackedAdapter]:
    model = wrap_model(make_exact_model("llama"), tiny_tokenizer, "tiny")
    return model, attach_uneven(model.module)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The second adapter, saved."""
    adapter = attach_uneven(make_exact_model("llama"), noise=0.3, lora=OTHER_RANKS)
    save_adapter(adapter, tmp_path / "second", base_model="tiny", scaling="alpha/r")
    return tmp_path / "second"


def logits(model: BaseModel | PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return (model.module if isinstance(model, BaseModel) else model)(IDS, use_cache=False).logits


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def merged_logits(folder: Path) -> Tensor:
    """The truth: W + s B A written into a plain model by hand."""
    from safetensors.torch import load_file

    model = make_exact_model("llama")
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, b_nr in tensors.items():
        if name.endswith("lora_B.weight"):
            a_rd = tensors[name.replace("lora_B", "lora_A")].double()
            layer = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_B.weight"))
            layer.weight.data += OTHER_RANKS["lora_alpha"] / len(a_rd) * b_nr.double() @ a_rd  # type: ignore[operator]
    return logits(model)


def test_second_adapter_runs_and_the_first_keeps_its_bits(student: tuple[BaseModel, PackedAdapter], folder: Path) -> None:
    model, adapter = student
    before, flat, layers = logits(model), adapter.flat.data.clone(), dict(model.module.named_modules())
    weights = {name: parameter.data_ptr() for name, parameter in model.module.named_parameters()}
    second = beside(model, folder)
    assert torch.equal(logits(model), before), "attaching has changed the first"
    assert set(second) != set(lora_layers(model.module))
    with only(model.module, second):
        inside = logits(model)
    truth = merged_logits(folder)
    assert float((inside - truth).abs().max()) < FP64_EXACT * float(truth.abs().max())
    assert float((inside - before).abs().max()) > 0.1
    assert torch.equal(logits(model), before) and torch.equal(adapter.flat.data, flat)
    after = dict(model.module.named_modules())
    assert after.keys() == layers.keys() and all(after[name] is layers[name] for name in after)
    assert {name: parameter.data_ptr() for name, parameter in model.module.named_parameters()} == weights


def test_the_weights_exist_once(student: tuple[BaseModel, PackedAdapter], folder: Path) -> None:
    """Everything that the second adapter holds and the first model does not: its own A and B, in float32, without gradients."""
    model, adapter = student
    second = beside(model, folder)
    own = {p.untyped_storage().data_ptr() for p in model.module.parameters()}
    assert all(layer.base.weight.untyped_storage().data_ptr() in own for layer in second.values())
    groups = {id(layer.group): layer.group for layer in second.values()}.values()
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for g in groups for p in (g.a_rd, g.b_flat)}
    entries = sum(g.a_rd.numel() + g.b_flat.numel() for g in groups)
    assert 4 * entries <= sum(held.values()) <= 4 * entries + 4 * 64 * len(groups) * 2  # gaps that align each group's A and B
    assert all(p.grad is None and not p.requires_grad for g in groups for p in (g.a_rd, g.b_flat))
    assert all(p.requires_grad and p.grad is not None for g in adapter.groups for p in (g.a_rd, g.b_flat))


def test_first_is_back_after_an_exception(student: tuple[BaseModel, PackedAdapter], folder: Path) -> None:
    model, _ = student
    before, second = logits(model), beside(model, folder)
    handle = model.module.model.norm.register_forward_pre_hook(interrupted)
    with pytest.raises(KeyboardInterrupt), only(model.module, second):
        logits(model)
    handle.remove()
    assert torch.equal(logits(model), before)


def test_first_still_trains(student: tuple[BaseModel, PackedAdapter], folder: Path) -> None:
    """The gradient of the first adapter before and after the second was used."""
    model, adapter = student

    def gradient() -> Tensor:
        adapter.flat.grad.zero_()
        model.module(IDS, use_cache=False).logits.square().sum().backward()
        return adapter.flat.grad.clone()

    before = gradient()
    second = beside(model, folder)
    with only(model.module, second):
        logits(model)
    assert before.any() and torch.equal(gradient(), before)


def test_a_model_without_adapter_is_bare_again(tiny_tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model = wrap_model(make_exact_model("llama"), tiny_tokenizer, "tiny")
    before, second = logits(model), beside(model, folder)
    with only(model.module, second):
        assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before) and not lora_layers(model.module)


def test_an_adapter_that_does_not_fit_leaves_the_first_in_place(
    student: tuple[BaseModel, PackedAdapter], tmp_path: Path, folder: Path
) -> None:
    model, _ = student
    before = logits(model)
    wide = attach_uneven(make_exact_model("llama", intermediate_size=128))
    save_adapter(wide, tmp_path / "wide", base_model="wide", scaling="alpha/r")
    with pytest.raises(AttachError, match="wide is an adapter for wide, not for tiny"):
        beside(model, tmp_path / "wide")
    with pytest.raises(AdapterFileError, match=r"no adapter_config\.json"):
        beside(model, tmp_path)
    assert torch.equal(logits(model), before)
    assert all(isinstance(layer, LoraLinear) and isinstance(layer.base, nn.Linear) for layer in lora_layers(model.module).values())
