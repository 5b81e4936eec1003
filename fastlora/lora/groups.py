"""Projections that read the same input: found by watching one forward pass, run as one op.

A decoder calls q_proj(x), k_proj(x), v_proj(x) one after another. The first call computes the whole group; the others
collect their outputs. In the backward pass the group is a single node that receives every dY and returns one dX.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastlora.errors import FastloraError
from fastlora.lora.fresh import with_gradient_of_b
from fastlora.lora.patterns import ProjectionShape
from fastlora.nf4_linear import Nf4Linear, linear_layers
from fastlora.ops.lora_linear import lora_linear


class AttachError(FastloraError):
    """The adapter does not fit the model; the message names the module."""


RANK_MULTIPLE = 32
"""Rows that A is padded to with zeros for sampling: oneDNN's fast bfloat16 products want widths of a multiple. SmolLM2 with ranks from 4 to
32, 16 completions of 128 tokens: 5.9 s instead of 17.
"""


class _FrozenGroup:
    """A group's weights for sampling on a CPU: W of all members and A as one matrix in oneDNN's own layout, s B as one block-diagonal one.

    Two GEMMs a call instead of 1 + 2 per member, and no repacking of the weights at each: 16 rows through gate and up of SmolLM2 take
    164 µs instead of 278 in bfloat16.
    """

    def __init__(self, group: LoraGroup, dtype: torch.dtype) -> None:
        self._widths = [layer.weight.shape[0] for layer in group.layers]
        b_parts = group.b_flat.detach().split([n * r for n, r in zip(self._widths, group.ranks, strict=True)])
        blocks = [(scale * b.view(r, n)).t() for b, r, n, scale in zip(b_parts, group.ranks, self._widths, group.scales, strict=True)]
        padding = -sum(group.ranks) % RANK_MULTIPLE
        self._b_nr = nn.functional.pad(torch.block_diag(*blocks).to(dtype), (0, padding))
        a_rd = nn.functional.pad(group.a_rd.detach().to(dtype), (0, 0, 0, padding))
        weight = torch.cat([*(layer.weight for layer in group.layers), a_rd])
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        self._bias = None
        if any(layer.bias is not None for layer in group.layers):
            biases = [
                weight.new_zeros(n) if layer.bias is None else layer.bias for layer, n in zip(group.layers, self._widths, strict=True)
            ]
            self._bias = torch.cat([*biases, weight.new_zeros(len(a_rd))])

    def __call__(self, x: Tensor) -> list[Tensor]:
        yh = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        y, h = yh.flatten(0, -2).split([len(self._b_nr), self._b_nr.shape[1]], dim=1)
        y.addmm_(h, self._b_nr.t())
        return [part.view(*x.shape[:-1], -1) for part in y.split(self._widths, dim=1)]


class LoraGroup:
    """The packed A and B of one group, and the frozen layers they adapt. `enabled` and `fresh` are shared state of the adapter."""

    def __init__(
        self,
        names: Sequence[str],
        layers: Sequence[nn.Linear],
        ranks: Sequence[int],
        scales: Sequence[float],
        a_rd: nn.Parameter,
        b_flat: nn.Parameter,
        b_mask: Tensor | None,
        cast_to_input: bool,
    ) -> None:
        """a_rd, b_flat, b_mask: see ops.lora_linear. cast_to_input: run the adapter in the dtype of x (fast path) instead of its own."""
        self.names, self.layers = tuple(names), tuple(layers)
        self.ranks, self.scales = list(ranks), list(scales)
        self.a_rd, self.b_flat, self.b_mask = a_rd, b_flat, b_mask
        self.cast_to_input = cast_to_input
        self.enabled = True
        self.fresh = False
        self.frozen: _FrozenGroup | None = None
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    def forward(self, member: int, x: Tensor) -> Tensor:
        """y of `member` [*, n]. Raises AttachError when members are called with different inputs or out of order."""
        if not self.enabled:
            return self.layers[member](x)
        if member == 0:
            # A stale entry is left behind when a forward pass was interrupted (checkpoint recomputation stops early).
            self._input, self._outputs = x, dict(enumerate(self._compute(x)))
        if x is not self._input or member not in self._outputs:
            raise AttachError(
                f"{self.names[member]} was not called right after {self.names[0]} with the same input, as it was when the "
                "adapter was attached; this model's forward pass changed"
            )
        y = self._outputs.pop(member)
        if not self._outputs:
            self._input = None
        return y

    def _compute(self, x: Tensor) -> list[Tensor]:
        if self.frozen is not None and x.numel():
            return self.frozen(x)
        a_rd, b_flat = (p.to(x.dtype) if self.cast_to_input else p for p in (self.a_rd, self.b_flat))
        if self.fresh:
            return with_gradient_of_b(x, [layer(x) for layer in self.layers], a_rd, b_flat, self.ranks, self.scales)
        weights, biases = [layer.weight for layer in self.layers], [layer.bias for layer in self.layers]
        absmaxes = [layer.absmax for layer in self.layers if isinstance(layer, Nf4Linear)]
        return lora_linear(x, weights, biases, a_rd, b_flat, self.ranks, self.scales, self.b_mask, absmaxes)


class LoraLinear(nn.Module):
    """Stands in the model where a member of a group stood."""

    def __init__(self, base: nn.Linear, group: LoraGroup, member: int) -> None:
        super().__init__()
        self.base = base
        self.group, self.member = group, member

    @property
    def weight(self) -> Tensor:
        """The frozen weight [n, d] (model code asks some layers for its dtype)."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """x [*, d] -> y [*, n]."""
        return self.group.forward(self.member, x)


@contextmanager
def frozen_adapters(model: nn.Module) -> Iterator[None]:
    """For many small forward passes without gradient: inside, neither adapter nor base weights may change. Costs a copy of the weights.

    Only where the adapter runs in the dtype of the activations, on a CPU with oneDNN; elsewhere, and with 4-bit weights (whose point is not
    to have that copy), nothing happens.
    """
    groups = {id(layer.group): layer.group for layer in model.modules() if isinstance(layer, LoraLinear)}
    weights = {group: group.layers[0].weight for group in groups.values()}
    frozen = {
        group: w
        for group, w in weights.items()
        if group.cast_to_input
        and w.device.type == "cpu"
        and w.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
    }
    for group, weight in frozen.items():
        group.frozen = _FrozenGroup(group, weight.dtype)
    try:
        yield
    finally:
        for group in frozen:
            group.frozen = None


def projections(model: nn.Module) -> dict[str, nn.Linear]:
    """Path -> linear layer of the decoder, the output head left out.

    Raises AttachError when there is none (GPT-2's Conv1D, fused experts) or the model has an adapter already.
    """
    if any(isinstance(module, LoraLinear) for module in model.modules()):
        raise AttachError(f"{type(model).__name__} already has an adapter: a second one would adapt the first. Load the model afresh")
    found = linear_layers(model)
    if not found:
        raise AttachError(f"{type(model).__name__} has no nn.Linear projection besides its head: LoRA has nowhere to go")
    return found


def shapes(layers: dict[str, nn.Linear]) -> list[ProjectionShape]:
    """The widths of the layers, in the model's order."""
    return [ProjectionShape(name, layer.in_features, layer.out_features) for name, layer in layers.items()]


@torch.no_grad()
def input_groups(model: nn.Module, layers: dict[str, nn.Linear]) -> list[list[str]]:
    """Names of layers that are given the same tensor object, in the order of the calls; one token through the model (any device).

    Raises AttachError for a layer that one forward pass does not call exactly once.
    """
    inputs: list[Tensor] = []  # held until the end: a freed tensor's id can be used again
    groups: dict[int, list[str]] = {}

    def watch(name: str, x: Tensor) -> None:
        inputs.append(x)
        groups.setdefault(id(x), []).append(name)

    handles = [layer.register_forward_pre_hook(lambda _, args, name=name: watch(name, args[0])) for name, layer in layers.items()]
    try:
        like = next(model.parameters())
        token = torch.zeros(1, 1, dtype=torch.long, device=like.device)
        # A ready 4-d mask: transformers would look at values to build one, which the meta device does not have.
        model(input_ids=token, attention_mask=torch.zeros(1, 1, 1, 1, dtype=like.dtype, device=like.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    called = [name for group in groups.values() for name in group]
    if sorted(called) != sorted(layers):
        odd = sorted(set(layers) - set(called)) or sorted({name for name in called if called.count(name) > 1})
        raise AttachError(f"{odd[0]} is not called exactly once in a forward pass; its input group cannot be determined")
    return list(groups.values())
