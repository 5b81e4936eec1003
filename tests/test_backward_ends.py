"""The backward pass ends at the lowest adapted layer, and what has no adapter costs none: counted, op by op, in a real update."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from bench.gemm_peak import Group, Model, lora_work
from fastlora.attention import ATTENTION
from fastlora.config import LoraConfig
from fastlora.fused_layers import fuse_layers
from fastlora.lora.groups import projections, shapes
from fastlora.lora.packed import PackedAdapter, attach
from fastlora.lora.patterns import resolve
from fastlora.losses.sft import sft_loss
from fastlora.ops.registry import dispatchers, implementation_counts, use_implementation
from fastlora.policy import loss_on
from fastlora.types import TrainBatch
from tests.batches import make_group_batch
from tests.tiny import make_tiny_model

LAYERS, RANK = 4, 3
GROUPS = ((5, (7, 2)), (3, (4,)))
"""(prompt, completions) of the batch."""
WORK = [Group(prompt, completions) for prompt, completions in GROUPS]
SETS = {"all": range(LAYERS), "last half": (2, 3), "holes": (1, 3), "first": (0,), "last": (3,)}


def layers_of(layers: Iterable[int]) -> dict[str, int]:
    """rank_pattern: rank 0 everywhere else."""
    others = "|".join(str(layer) for layer in range(LAYERS) if layer not in layers)
    return {rf"layers\.({others})\..*": 0} if others else {}


def adapted(rank_pattern: dict[str, int], **options: Any) -> tuple[PreTrainedModel, PackedAdapter]:
    """The fast path on a tiny Llama in float32."""
    model = make_tiny_model("llama", num_hidden_layers=LAYERS)
    model.set_attn_implementation(ATTENTION)
    fuse_layers(model)
    specs = resolve(shapes(projections(model)), LoraConfig(r=RANK, rank_pattern=rank_pattern))
    return model, attach(model, specs, **{"seed": 0, "cast_to_input": True, **options})


def loss_of(model: PreTrainedModel, batch: TrainBatch, kind: str) -> Tensor:
    """Cross-entropy (sft), or on-policy GRPO."""

    def loss(logp_nt: Tensor, entropy_nt: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if kind == "sft":
            return sft_loss(logp_nt, batch.loss_mask_nt, batch.num_items_in_batch, accumulation_steps=1, steps_per_generation=1)
        return -(batch.advantages_nt * (logp_nt - logp_nt.detach()).exp() * batch.loss_mask_nt).sum() / batch.num_items_in_batch, {}

    return loss_on(model, batch, 1.0, "torch", loss, token_level=True)[0]


class Products(TorchDispatchMode):
    """FLOPs of the matrix products that run, those inside our ops too but attention's. And what the backward ops of the adapters are
    asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.asked: list[tuple[bool, bool]] = []
        """(dX, dA) of every lora_linear_backward."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastlora" and not func._opname.startswith("packed_attention"):
            if func._opname == "lora_linear_backward":
                self.asked.append(tuple(args[-3:-1]))
            with self:
                return dispatchers[func._opname](*args, **kwargs)
        if func._opname in ("linear", "matmul"):
            with self:
                return func.decompose(*args, **kwargs)
        if func._opname in ("mm", "addmm", "mm_", "addmm_"):
            left, right = args[-2:]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **kwargs)


def products(work: Callable[[], Any]) -> Products:
    with Products() as counted:
        work()
    return counted


@pytest.mark.parametrize("kind", ["sft", "grpo"])
@pytest.mark.parametrize("layers", SETS)
def test_no_product_more_than_are_needed(layers: str, kind: str) -> None:
    """All products of forward and backward pass, against the list of those that mathematics asks for."""
    model, _ = adapted(layers_of(SETS[layers]))
    batch = make_group_batch(GROUPS)
    with use_implementation("torch"):
        flops = products(lambda: loss_of(model, batch, kind).backward()).flops
    dimensions = Model(**{name: getattr(model.config, name) for name in Model.__slots__})
    assert flops == lora_work(dimensions, WORK, RANK, SETS[layers]).gemm_flops


@pytest.mark.parametrize("layers", SETS)
def test_calls_of_the_backward_pass(layers: str) -> None:
    """Norms above the lowest layer's first, attention and MLPs from it on, an adapter's backward for each of its groups alone."""
    model, _ = adapted(layers_of(SETS[layers]))
    before, batch = Counter(implementation_counts), make_group_batch(GROUPS)
    with use_implementation("torch"):
        loss_of(model, batch, "sft").backward()
    calls = Counter[str]()
    for (op, _), count in (implementation_counts - before).items():
        calls[op] += count
    graph = LAYERS - min(SETS[layers])
    assert calls["lora_linear"] == calls["lora_linear_backward"] == 4 * len(SETS[layers])
    assert calls["packed_attention"] == calls["swiglu"] == LAYERS and calls["rms_norm"] == 2 * LAYERS + 1
    assert calls["packed_attention_backward"] == calls["swiglu_backward"] == graph
    assert calls["rms_norm_backward"] == 2 * graph  # the lowest layer's first has nothing below it, the final norm is one more


def test_nothing_below_is_kept() -> None:
    """Tensors that autograd saves, by the layer in whose forward pass it does."""
    model, _ = adapted(layers_of((2, 3)))
    saved, current = Counter[int](), -1

    def enter(layer: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            nonlocal current
            current = layer

        return hook

    def keep(x: Tensor) -> Tensor:
        saved[current] += 1
        return x

    for layer, module in enumerate(model.model.layers):
        module.register_forward_pre_hook(enter(layer))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss_of(model, make_group_batch(GROUPS), "sft")
    assert set(saved) == {2, 3} and min(saved.values()) > 10


def test_frozen_a_keeps_no_inputs() -> None:
    """d of q, k, v and of gate and up, m of down, each a token and layer; o reads what attention keeps in any case."""
    held, batch = [], make_group_batch(GROUPS)
    for freeze_a in (False, True):
        model, _ = adapted({}, freeze_a=freeze_a)
        storages: dict[int, Tensor] = {}

        def keep(x: Tensor, storages: dict[int, Tensor] = storages) -> Tensor:
            return storages.setdefault(x.untyped_storage().data_ptr(), x)

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss_of(model, batch, "sft")
        held.append(sum(x.untyped_storage().nbytes() for x in storages.values()))
    tokens, config = sum(group.inputs for group in WORK), model.config
    saved = 4 * tokens * LAYERS * (2 * config.hidden_size + config.intermediate_size)
    stand_ins = 4 * 4 * LAYERS  # a number of 4 bytes for each of 4 groups
    assert held[0] - held[1] == saved - stand_ins


@pytest.mark.parametrize("freeze_a", [False, True])
def test_what_the_adapters_are_asked_for(freeze_a: bool) -> None:
    """dX of all groups but the lowest one; dA of none where A is frozen."""
    model, adapter = adapted(layers_of((2, 3)), freeze_a=freeze_a)
    asked = products(lambda: loss_of(model, make_group_batch(GROUPS), "sft").backward()).asked
    assert [need_dx for need_dx, _ in asked] == [True] * 7 + [False]
    assert [need_da for _, need_da in asked] == [not freeze_a] * 8
    assert all(group.a_rd.requires_grad != freeze_a for group in adapter.groups)


@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_frozen_a_costs_no_product_of_its_gradient(implementation: str) -> None:
    """dA of every group is saved, and in the lowest one dH, which only dA and dX would want."""
    batch, flops = make_group_batch(GROUPS), []
    for freeze_a in (False, True):
        model, _ = adapted(layers_of((2, 3)), freeze_a=freeze_a)
        with use_implementation(implementation):
            flops.append(products(lambda model=model: loss_of(model, batch, "sft").backward()).flops)
    widths = {name: (layer.base.in_features, layer.base.out_features) for name, layer in _lora_layers(model)}
    tokens = sum(group.inputs for group in WORK)
    da = sum(2 * tokens * RANK * d for d, _ in widths.values())
    dh = sum(2 * tokens * RANK * n for name, (_, n) in widths.items() if "layers.2.self_attn" in name and "o_proj" not in name)
    assert flops[0] - flops[1] == da + dh


def _lora_layers(model: PreTrainedModel) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if type(module).__name__ == "LoraLinear"]


def test_rank_0_inside_a_group_adds_nothing() -> None:
    """k of rank 0 between q and v: no columns of H, no products with B; its dY still reaches dX."""
    batch = make_group_batch(GROUPS)
    pattern = {r".*\.(k_proj|o_proj|gate_proj|up_proj|down_proj)": 0}
    model, adapter = adapted(pattern)
    with use_implementation("torch"):
        flops = products(lambda: loss_of(model, batch, "sft").backward()).flops
    config, tokens = model.config, sum(group.inputs for group in WORK)
    dims = Model(**{name: getattr(config, name) for name in Model.__slots__})
    everything, rank_free = (lora_work(dims, WORK, rank).gemm_flops for rank in (RANK, 0))
    assert rank_free < flops < everything
    d, (_, q), (_, v) = dims.hidden_size, dims.projections["q_proj"], dims.projections["v_proj"]
    branch = math.fsum(2 * tokens * RANK * (2 * d + 3 * n) for n in (q, v)) * LAYERS  # H, dA; H B, dH, dB
    dx = 2 * tokens * RANK * 2 * d * (LAYERS - 1)
    assert flops == rank_free + branch + dx
    assert {slot.name.rpartition(".")[2] for slot in adapter.slots.values()} == {"q_proj", "v_proj"}
