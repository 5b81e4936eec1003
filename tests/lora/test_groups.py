"""Input groups of real architectures, and what the grouped forward pass does when it is not called as expected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fastlora.lora.groups import AttachError, LoraLinear, input_groups, projections, shapes
from tests.lora.adapters import attach_uneven
from tests.tiny import VOCAB_SIZE, make_tiny_config

IDS = torch.arange(3, 24).reshape(3, 7)


def test_groups_of_every_family(tiny_model: PreTrainedModel) -> None:
    """(q, k, v), (o), (gate, up), (down) of each layer, in the order of the calls; the head belongs to none."""
    groups = input_groups(tiny_model, projections(tiny_model))
    expected = []
    for layer in range(tiny_model.config.num_hidden_layers):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        expected.append([f"{attention}.{name}_proj" for name in "qkv"])
        expected.append([f"{attention}.o_proj"])
        expected.append([f"{mlp}.gate_proj", f"{mlp}.up_proj"])
        expected.append([f"{mlp}.down_proj"])
    assert groups == expected


def test_groups_are_found_without_weights() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(make_tiny_config("llama"))
    assert [len(group) for group in input_groups(model, projections(model))] == [3, 1, 2, 1] * 2


def test_watching_leaves_no_hook_behind(tiny_llama: PreTrainedModel) -> None:
    input_groups(tiny_llama, projections(tiny_llama))
    assert not any(module._forward_pre_hooks for module in tiny_llama.modules())


def test_widths_are_those_of_the_layers(tiny_llama: PreTrainedModel) -> None:
    found = {shape.name: (shape.in_features, shape.out_features) for shape in shapes(projections(tiny_llama))}
    assert found["model.layers.1.self_attn.k_proj"] == (64, 32) and found["model.layers.0.mlp.down_proj"] == (96, 64)
    assert "lm_head" not in found and len(found) == 14


def test_gpt2_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=VOCAB_SIZE, n_positions=32))
    with pytest.raises(AttachError, match=r"GPT2LMHeadModel has no nn.Linear projection besides its head"):
        projections(model)


class _Decoder(nn.Module):
    """A model with one projection too few or too many in its forward pass."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.embed, self.used, self.odd = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.calls = calls

    def forward(self, input_ids: Tensor, **options: Any) -> Tensor:
        x = self.used(self.embed(input_ids))
        for _ in range(self.calls):
            x = self.odd(x)
        return x


@pytest.mark.parametrize("calls", [0, 2])
def test_a_layer_that_is_not_called_once_is_named(calls: int) -> None:
    model = _Decoder(calls)
    with pytest.raises(AttachError, match="odd is not called exactly once in a forward pass"):
        input_groups(model, projections(model))


def test_an_interrupted_forward_pass_does_not_spoil_the_next(tiny_llama: PreTrainedModel) -> None:
    """An exception between q_proj and k_proj leaves the group half used."""
    attach_uneven(tiny_llama)
    expected = tiny_llama(IDS).logits
    k_proj = tiny_llama.model.layers[0].self_attn.k_proj
    assert isinstance(k_proj, LoraLinear)
    handle = k_proj.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tiny_llama(IDS)
    handle.remove()
    assert torch.equal(tiny_llama(IDS).logits, expected)


def test_members_called_with_another_input_are_refused(tiny_llama: PreTrainedModel) -> None:
    attach_uneven(tiny_llama)
    attention = tiny_llama.model.layers[0].self_attn
    x = torch.randn(2, 64)
    attention.q_proj(x)
    message = r"self_attn.k_proj was not called right after model.layers.0.self_attn.q_proj with the same input"
    with pytest.raises(AttachError, match=message):
        attention.k_proj(x.clone())  # equal is not the same: it may have changed since
    attention.q_proj(x), attention.v_proj(x)
    with pytest.raises(AttachError, match=r"self_attn\.v_proj was not called right after"):
        attention.v_proj(x)


def test_no_input_is_held_after_the_forward_pass(tiny_llama: PreTrainedModel) -> None:
    """A group that kept x or y would keep the activations of every layer."""
    adapter = attach_uneven(tiny_llama)
    tiny_llama(IDS)
    assert all(group._input is None and not group._outputs for group in adapter.groups)


@pytest.mark.parametrize("family_wide", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(tiny_model: PreTrainedModel, family_wide: bool) -> None:
    """By transformers' own switch, and by torch.utils.checkpoint around the whole model: both stop recomputation early."""
    adapter = attach_uneven(tiny_model)
    tiny_model(IDS, use_cache=False).logits.square().mean().backward()
    expected = adapter.flat.grad.clone()
    assert expected.any()
    adapter.flat.grad.zero_()
    if family_wide:
        embedded = tiny_model.get_input_embeddings()(IDS).detach().requires_grad_()
        logits = checkpoint(lambda x: tiny_model(inputs_embeds=x, use_cache=False).logits, embedded, use_reentrant=False)
    else:
        tiny_model.gradient_checkpointing_enable({"use_reentrant": False})
        tiny_model.train()
        logits = tiny_model(IDS, use_cache=False).logits
    logits.square().mean().backward()
    assert torch.equal(adapter.flat.grad, expected)


def test_a_config_class_is_not_needed() -> None:
    """`projections` takes any module; the head is left out where the model says which one it is."""
    model = LlamaForCausalLM(LlamaConfig(**{**make_tiny_config("llama").to_dict(), "num_hidden_layers": 1}))
    assert set(projections(model.model)) == {name.removeprefix("model.") for name in projections(model)}
