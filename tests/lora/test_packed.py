"""The packed adapter: layout, views, gradients, masks, attaching and detaching; the base model stays as it was."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastlora.config import OptimConfig
from fastlora.lora.groups import AttachError, projections
from fastlora.lora.packed import PackedAdapter, attach
from fastlora.lora.patterns import ModuleSpec
from fastlora.model import weights_hash
from fastlora.ops.adamw_step import ALIGNMENT
from fastlora.optim import AdamW
from tests.lora.adapters import UNEVEN, attach_uneven
from tests.tiny import make_tiny_model
from tests.tolerances import RMSNORM_IN_FP32

IDS = torch.arange(3, 24).reshape(3, 7)
ODD_WIDTHS: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8}
"""Widths that are no multiple of ALIGNMENT."""
WIDTHS = [{}, ODD_WIDTHS]


def _step(model: PreTrainedModel, adapter: PackedAdapter, **optim: Any) -> None:
    model(IDS).logits.square().mean().backward()
    AdamW(adapter.flat, OptimConfig(weight_decay=0.1, **optim)).step(0.01)
    adapter.flat.grad.zero_()


@pytest.mark.parametrize("widths", WIDTHS, ids=["aligned", "odd"])
def test_layout(widths: dict[str, Any]) -> None:
    """Every entry has one place, groups start aligned, modules of a group touch, gaps hold zeros also after training."""
    model = make_tiny_model("llama", **widths)
    adapter = attach_uneven(model)
    for _ in range(2):
        _step(model, adapter)
    owners = torch.zeros(len(adapter.flat.data), dtype=torch.int)
    for slot in adapter.slots.values():
        owners[slot.a_offset :][: slot.rank * slot.in_features] += 1
        owners[slot.b_offset :][: slot.rank * slot.out_features] += 1
    assert int(owners.max()) == 1 and int(owners.sum()) == adapter.num_parameters == adapter.flat.num_trainable
    assert not adapter.flat.data[owners == 0].any() and not adapter.flat.grad[owners == 0].any()
    members = [[adapter.slots[name] for name in group.names if name in adapter.slots] for group in adapter.groups]
    for slots in members:
        assert slots[0].a_offset % ALIGNMENT == slots[0].b_offset % ALIGNMENT == 0
        for left, right in itertools.pairwise(slots):
            assert right.a_offset == left.a_offset + left.rank * left.in_features
            assert right.b_offset == left.b_offset + left.rank * left.out_features
    assert max(slot.a_offset for slot in adapter.slots.values()) < min(slot.b_offset for slot in adapter.slots.values())
    unaligned = any(s.offset % ALIGNMENT for s in adapter.flat.segments)
    assert unaligned == bool(widths)  # the odd widths do reach the unaligned case


def test_segments_are_pefts_parameters_in_pefts_order(tiny_llama: PreTrainedModel) -> None:
    in_order = list(projections(tiny_llama))
    adapter = attach_uneven(tiny_llama)
    names = [name for name in in_order if name in adapter.slots]
    assert [s.name for s in adapter.flat.segments] == [f"{name}.lora_{part}" for name in names for part in "AB"]
    for segment in adapter.flat.segments:
        name, part = segment.name.rsplit(".lora_", 1)
        view = adapter.a_rd(name) if part == "A" else adapter.b_rn(name)
        assert segment.shape == tuple(view.shape) and segment.transposed == (part == "B")
        assert view.data_ptr() == adapter.flat.data[segment.offset :].data_ptr()


def test_rank_zero_modules_and_groups_are_left_alone(tiny_llama: PreTrainedModel) -> None:
    """down_proj's group has no rank: its layer is not replaced. k_proj has rank 0 inside a group: no entries, no segment."""
    adapter = attach_uneven(tiny_llama)
    assert type(tiny_llama.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert not any("k_proj" in name or "down_proj" in name for name in adapter.slots)
    assert set(adapter.rank_pattern.values()) == {3, 1, 17, 5, 2, 8}
    assert adapter.rank_pattern["model.layers.1.self_attn.o_proj"] == UNEVEN["layers.1.self_attn.o_proj"]


def test_initialisation_is_pefts_and_seeded() -> None:
    """A ~ U(−1/√d, 1/√d), another one for every module and seed; B = 0, so that the fresh adapter changes no bit."""
    adapters = [attach_uneven(make_tiny_model("llama"), noise=0.0, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(adapters[0].flat.data, adapters[1].flat.data) and not torch.equal(adapters[0].flat.data, adapters[2].flat.data)
    a_rd = adapters[0].a_rd("model.layers.0.mlp.gate_proj")
    assert float(a_rd.abs().max()) <= 1 / 8 < 1.05 * float(a_rd.abs().max()) and abs(float(a_rd.mean())) < 1 / 8 / 10
    assert not torch.equal(a_rd, adapters[0].a_rd("model.layers.1.mlp.gate_proj"))
    model = make_tiny_model("llama")
    base = model(IDS).logits
    attach_uneven(model, noise=0.0)
    assert torch.equal(model(IDS).logits, base)


@pytest.mark.parametrize("widths", WIDTHS, ids=["aligned", "odd"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_logits_and_gradients_are_those_of_merged_weights(family: str, widths: dict[str, Any]) -> None:
    """fp64: the adapter against W + s·B·A written into the layers of a second model, whose weight gradient G gives
    dA = s Bᵀ G and dB = s G Aᵀ."""
    model, merged = (make_tiny_model(family, dtype=torch.float64, **widths) for _ in range(2))
    adapter = attach_uneven(model)
    with torch.no_grad():
        for name, slot in adapter.slots.items():
            b_nr, a_rd = adapter.b_rn(name).t().double(), adapter.a_rd(name).double()
            merged.get_submodule(name).weight.add_(slot.scale * b_nr @ a_rd)
    logits, expected = model(IDS).logits, merged(IDS).logits
    assert float((logits - expected).detach().abs().max() / expected.detach().abs().max()) < RMSNORM_IN_FP32
    dy = torch.randn_like(expected)
    logits.backward(dy)
    expected.backward(dy)
    for name, slot in adapter.slots.items():
        g_nd = merged.get_submodule(name).weight.grad
        da_rd, db_nr = slot.scale * adapter.b_rn(name).double() @ g_nd, slot.scale * g_nd @ adapter.a_rd(name).double().t()
        got = {s.name: adapter.flat.grad[s.offset :][: s.numel].view(s.shape).double() for s in adapter.flat.segments}
        for part, truth in (("A", da_rd), ("B", db_nr.t())):
            assert float((got[f"{name}.lora_{part}"] - truth).norm() / truth.norm()) < RMSNORM_IN_FP32


def test_gradients_accumulate_into_the_flat_buffer(tiny_llama: PreTrainedModel) -> None:
    adapter = attach_uneven(tiny_llama)
    place = adapter.flat.grad.data_ptr()
    tiny_llama(IDS).logits.square().mean().backward()
    once = adapter.flat.grad.clone()
    tiny_llama(IDS).logits.square().mean().backward()
    assert adapter.flat.grad.data_ptr() == place and once.any()
    assert torch.equal(adapter.flat.grad, 2 * once)
    assert all(
        group.a_rd.grad.data_ptr() == adapter.flat.grad[slot_of(adapter, group.names).a_offset :].data_ptr() for group in adapter.groups
    )


def slot_of(adapter: PackedAdapter, names: tuple[str, ...]) -> Any:
    """First adapted member of a group."""
    return next(adapter.slots[name] for name in names if name in adapter.slots)


def test_a_step_moves_what_the_model_computes(tiny_llama: PreTrainedModel) -> None:
    adapter = attach_uneven(tiny_llama)
    before = tiny_llama(IDS).logits
    _step(tiny_llama, adapter)
    assert float((tiny_llama(IDS).logits - before).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("cast_to_input", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_disabled_is_the_base_model_to_the_bit(dtype: torch.dtype, cast_to_input: bool) -> None:
    model = make_tiny_model("qwen2", dtype=dtype)
    base = model(IDS).logits
    adapter = attach_uneven(model, cast_to_input=cast_to_input)
    adapted = model(IDS).logits
    assert adapted.dtype == dtype and not torch.equal(adapted, base)
    with adapter.disabled():
        assert torch.equal(model(IDS).logits, base)
    with pytest.raises(KeyError), adapter.disabled():
        raise KeyError
    assert torch.equal(model(IDS).logits, adapted)  # enabled again, also after an error


def test_base_weights_are_frozen_and_their_hash_sees_it(tiny_model: PreTrainedModel) -> None:
    """The same hash before attaching, after attaching, after training; another one when a single bit changes."""
    before = weights_hash(tiny_model)
    adapter = attach_uneven(tiny_model)
    assert weights_hash(tiny_model) == before
    parameters = dict(tiny_model.named_parameters())
    assert not any(parameter.requires_grad for parameter in parameters.values())
    _step(tiny_model, adapter)
    assert weights_hash(tiny_model) == before and all(p.grad is None for p in parameters.values())
    weight = tiny_model.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        weight.view(torch.int32)[3, 5] ^= 1
    assert weights_hash(tiny_model) != before


def _masks(adapter_model: PreTrainedModel) -> dict[str, Tensor]:
    """Every third entry of the q_projs' B [n, r]; nothing of any other B."""
    return {name: torch.arange(64 * 3).view(64, 3) % 3 == 0 for name in projections(adapter_model) if name.endswith("q_proj")}


@pytest.mark.parametrize("freeze_a", [False, True])
def test_only_what_the_mask_names_moves(tiny_llama: PreTrainedModel, freeze_a: bool) -> None:
    masks = _masks(tiny_llama)
    adapter = attach_uneven(tiny_llama, b_mask_nr=masks, freeze_a=freeze_a)
    before = {name: (adapter.a_rd(name).clone(), adapter.b_rn(name).t().clone()) for name in adapter.slots}
    _step(tiny_llama, adapter)
    for name, (a_rd, b_nr) in before.items():
        moves = masks.get(name, torch.zeros(b_nr.shape, dtype=torch.bool))
        assert torch.equal(adapter.b_rn(name).t() != b_nr, moves)
        assert bool((adapter.a_rd(name) != a_rd).all()) != freeze_a
    entries_of_a = 0 if freeze_a else sum(s.rank * s.in_features for s in adapter.slots.values())
    assert adapter.flat.num_trainable == entries_of_a + sum(int(mask.sum()) for mask in masks.values())


def test_a_frozen_a_has_no_segment_and_no_gradient(tiny_llama: PreTrainedModel) -> None:
    adapter = attach_uneven(tiny_llama, freeze_a=True)
    a_before = {name: adapter.a_rd(name).clone() for name in adapter.slots}
    assert all(s.name.endswith("lora_B") for s in adapter.flat.segments)
    tiny_llama(IDS).logits.square().mean().backward()
    first_b = min(slot.b_offset for slot in adapter.slots.values())
    assert not adapter.flat.grad[:first_b].any() and adapter.flat.grad[first_b:].any()
    _step(tiny_llama, adapter)
    assert all(torch.equal(adapter.a_rd(name), a) for name, a in a_before.items())


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("q_proj", (3, 64), r"mask on B of model.layers.0.self_attn.q_proj has shape \[3, 64\]; this run needs \[64, 3\]"),
        ("q_proj", (64,), r"has shape \[64\]"),
        ("k_proj", (32, 3), r"k_proj has shape \[32, 3\]; this run needs no mask: it has no adapter"),
        ("w_proj", (1, 1), "w_proj .* it has no adapter"),
    ],
)
def test_masks_that_do_not_fit_are_refused(tiny_llama: PreTrainedModel, name: str, shape: tuple[int, ...], message: str) -> None:
    masks = {f"model.layers.0.self_attn.{name}": torch.ones(shape, dtype=torch.bool)}
    with pytest.raises(AttachError, match=message):
        attach_uneven(tiny_llama, b_mask_nr=masks)


def _saved(adapter: PackedAdapter) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    a_rd = {name: torch.randn(slot.rank, slot.in_features) for name, slot in adapter.slots.items()}
    return a_rd, {name: torch.randn(slot.out_features, slot.rank) for name, slot in adapter.slots.items()}


def test_load_copies_every_matrix(tiny_llama: PreTrainedModel) -> None:
    adapter = attach_uneven(tiny_llama)
    a_rd, b_nr = _saved(adapter)
    adapter.load(a_rd, b_nr)
    for name in adapter.slots:
        assert torch.equal(adapter.a_rd(name), a_rd[name]) and torch.equal(adapter.b_rn(name), b_nr[name].t())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda a, b: a.pop("model.layers.0.self_attn.q_proj"), "q_proj: lora_A exists only in this run"),
        (lambda a, b: b.update(other=b["model.layers.0.self_attn.q_proj"]), "other: lora_B exists only in the adapter file"),
        (
            lambda a, b: b.update({"model.layers.0.self_attn.q_proj": torch.zeros(64, 2)}),
            r"q_proj: lora_B has shape \(64, 2\), this run needs \(64, 3\)",
        ),
        (
            lambda a, b: a.update({"model.layers.0.self_attn.v_proj": torch.zeros(64)}),
            r"v_proj: lora_A has shape \(64,\), this run needs \(1, 64\)",
        ),
    ],
)
def test_matrices_of_another_adapter_are_refused_and_nothing_is_copied(tiny_llama: PreTrainedModel, damage: Any, message: str) -> None:
    adapter = attach_uneven(tiny_llama)
    before = adapter.flat.data.clone()
    a_rd, b_nr = _saved(adapter)
    damage(a_rd, b_nr)
    with pytest.raises(AttachError, match=message):
        adapter.load(a_rd, b_nr)
    assert torch.equal(adapter.flat.data, before)


def test_a_second_adapter_is_refused(tiny_llama: PreTrainedModel) -> None:
    """The layers of the first are inside: it would adapt itself."""
    attach_uneven(tiny_llama)
    with pytest.raises(AttachError, match="already has an adapter"):
        attach_uneven(tiny_llama)


def test_specs_for_another_model_are_refused(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(AttachError, match=r"model.layers.9.self_attn.q_proj"):
        attach(tiny_llama, [ModuleSpec("model.layers.9.self_attn.q_proj", 4, 4.0, 1.0)], seed=0, cast_to_input=True)
