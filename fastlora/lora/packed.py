"""The packed adapter: all A in one flat buffer, all Bᵀ behind them, an index from module to rank, scale, offset and mask.

    buffer   A of group 0 | A of group 1 | ... | Bᵀ of group 0 | Bᵀ of group 1 | ...            (float32)

A group's block starts at a multiple of ALIGNMENT; inside it module follows module without a gap, so that the A of a group are one
matrix [Σ r, d] whatever the ranks and widths.

Gradients and optimizer moments have the same layout, so that the optimizer is one launch, a data-parallel reduction one all-reduce
and a gradient norm one table. A is [r, d]; B is stored transposed, [r, n], so that its rows stay aligned at any rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastlora.flat import FlatParameters, Segment, align
from fastlora.lora.groups import AttachError, LoraGroup, LoraLinear, input_groups, projections, shapes
from fastlora.lora.patterns import ModuleSpec, ProjectionShape


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one adapted module lives in the flat buffer."""

    name: str
    in_features: int
    out_features: int
    rank: int
    alpha: float
    scale: float
    a_offset: int
    """First element of A [r, d] in the flat buffer."""
    b_offset: int
    """First element of Bᵀ [r, n] in the flat buffer."""

    def a_rd(self, buffer: Tensor) -> Tensor:
        """What belongs to A [r, d] in a buffer of the adapter's layout (values, gradients, moments), a view."""
        return buffer[self.a_offset :][: self.rank * self.in_features].view(self.rank, self.in_features)

    def b_rn(self, buffer: Tensor) -> Tensor:
        """What belongs to Bᵀ [r, n], likewise."""
        return buffer[self.b_offset :][: self.rank * self.out_features].view(self.rank, self.out_features)


InputGroups = Sequence[Sequence[ProjectionShape]]
"""The projections of a model, those that read the same x together, adapted or not."""


class PackedAdapter:
    """One adapter, attached to one model. `flat` is what the optimizer and the checkpoint see."""

    def __init__(
        self,
        specs: Sequence[ModuleSpec],
        input_groups: InputGroups,
        slots: Mapping[str, Slot],
        groups: Sequence[LoraGroup],
        flat: FlatParameters,
    ) -> None:
        self.specs = tuple(specs)
        """Of every target module, rank 0 included."""
        self.input_groups = input_groups
        self.slots = dict(slots)
        self.groups = tuple(groups)
        self.flat = flat

    @property
    def rank_pattern(self) -> dict[str, int]:
        """Module -> rank, adapted modules only, in the model's order."""
        return {name: slot.rank for name, slot in self.slots.items()}

    @property
    def num_parameters(self) -> int:
        """Entries of all A and B (alignment gaps not counted)."""
        return sum(slot.rank * (slot.in_features + slot.out_features) for slot in self.slots.values())

    def a_rd(self, name: str) -> Tensor:
        """A of a module [r, d], a view of the flat buffer."""
        return self.slots[name].a_rd(self.flat.data)

    def b_rn(self, name: str) -> Tensor:
        """Bᵀ of a module [r, n], a view of the flat buffer."""
        return self.slots[name].b_rn(self.flat.data)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model alone: the reference policy."""
        for group in self.groups:
            group.enabled = False
        try:
            yield
        finally:
            for group in self.groups:
                group.enabled = True

    @contextmanager
    def fresh(self) -> Iterator[None]:
        """Only dB is computed, of an adapter that changes nothing yet (fastlora/lora/fresh.py). Raises AttachError unless B = 0 everywhere,
        A is frozen and all of B trains.
        """
        touched = [name for name in self.slots if bool(self.b_rn(name).any())]
        trains_a = any(group.a_rd.requires_grad for group in self.groups)
        if touched or trains_a or self.flat.mask is not None:
            why = f"B of {touched[0]} is not zero" if touched else "A trains" if trains_a else "a mask selects entries of B"
            raise AttachError(f"this adapter is not fresh: {why}, and more than dB, or less, is to be computed")
        for group in self.groups:
            group.fresh = True
        try:
            yield
        finally:
            for group in self.groups:
                group.fresh = False

    def load(self, a_rd: Mapping[str, Tensor], b_nr: Mapping[str, Tensor]) -> None:
        """Copies A [r, d] and B [n, r] of every module in.

        Raises AttachError, before anything is copied, naming a module that is missing, unknown or misshapen.
        """
        for kind, tensors in (("lora_A", a_rd), ("lora_B", b_nr)):
            odd = sorted(set(tensors) ^ set(self.slots))
            if odd:
                where = "the adapter file" if odd[0] in tensors else "this run"
                raise AttachError(f"{odd[0]}: {kind} exists only in {where}; the adapter is for another model or other ranks")
        pairs = [(f"{name}: lora_A", self.a_rd(name), a_rd[name]) for name in self.slots]
        pairs += [(f"{name}: lora_B", self.b_rn(name).t(), b_nr[name]) for name in self.slots]
        for what, target, source in pairs:
            if target.shape != source.shape:
                raise AttachError(f"{what} has shape {tuple(source.shape)}, this run needs {tuple(target.shape)}")
        with torch.no_grad():
            for _, target, source in pairs:
                target.copy_(source)


def attach(
    model: nn.Module,
    specs: Sequence[ModuleSpec],
    *,
    seed: int,
    freeze_a: bool = False,
    b_mask_nr: Mapping[str, Tensor] | None = None,
    cast_to_input: bool,
) -> PackedAdapter:
    """Puts a fresh adapter (A Kaiming-uniform, B = 0) into the model; the base weights are frozen and not copied.

    specs: from `patterns.resolve`; modules of rank 0 are left as they are. b_mask_nr: module -> bool [n, r], True where B trains; modules
    that it does not name train nothing of B. cast_to_input: see LoraGroup. Raises AttachError, naming the module.
    """
    model.requires_grad_(False)
    layers = projections(model)
    if unknown := sorted({spec.name for spec in specs if spec.rank} - layers.keys()):
        raise AttachError(f"{unknown[0]} is not a linear layer of {type(model).__name__}; the adapter is for another model")
    projection = {shape.name: shape for shape in shapes(layers)}
    inputs = [[projection[name] for name in names] for names in input_groups(model, layers)]
    slots, size = place(specs, inputs)
    device = next(model.parameters()).device
    flat = FlatParameters.zeros(size, _segments(slots.values(), freeze_a), device)
    flat.mask = None if b_mask_nr is None else _flat_mask(b_mask_nr, slots, size, freeze_a).to(device)
    _initialise_a(flat.data, slots.values(), seed)
    adapted = [[shape.name for shape in group] for group in inputs if any(shape.name in slots for shape in group)]
    groups = [_build_group(model, names, layers, slots, flat, freeze_a, cast_to_input) for names in adapted]
    return PackedAdapter(specs, inputs, slots, groups, flat)


def place(specs: Sequence[ModuleSpec], input_groups: InputGroups) -> tuple[dict[str, Slot], int]:
    """Where every module with a rank lies, by name in the order of the specs, and the elements of the whole buffer."""
    ranks = {spec.name: spec.rank for spec in specs}
    a_offsets, end_of_a = _offsets(input_groups, ranks, lambda shape: shape.in_features, 0)
    b_offsets, end = _offsets(input_groups, ranks, lambda shape: shape.out_features, end_of_a)
    projection = {shape.name: shape for group in input_groups for shape in group}
    slots = {}
    for spec in (spec for spec in specs if spec.rank):
        shape, offsets = projection[spec.name], (a_offsets[spec.name], b_offsets[spec.name])
        slots[spec.name] = Slot(spec.name, shape.in_features, shape.out_features, spec.rank, spec.alpha, spec.scale, *offsets)
    return slots, end


def _offsets(
    groups: InputGroups, ranks: Mapping[str, int], width: Callable[[ProjectionShape], int], start: int
) -> tuple[dict[str, int], int]:
    """First element of every module's matrix, groups aligned, members of a group adjacent; and the end."""
    offsets, position = {}, start
    for group in groups:
        position = align(position)
        for shape in group:
            offsets[shape.name] = position
            position += ranks.get(shape.name, 0) * width(shape)
    return offsets, align(position)


def _segments(slots: Iterable[Slot], freeze_a: bool) -> tuple[Segment, ...]:
    """PEFT's parameter order: per module A, then B. A frozen A has no segment."""
    segments = []
    for slot in slots:
        if not freeze_a:
            segments.append(Segment(f"{slot.name}.lora_A", slot.a_offset, (slot.rank, slot.in_features), transposed=False))
        segments.append(Segment(f"{slot.name}.lora_B", slot.b_offset, (slot.rank, slot.out_features), transposed=True))
    return tuple(segments)


def random_a(rank: int, in_features: int, generator: torch.Generator) -> Tensor:
    """PEFT's default for A [r, d]: Kaiming uniform with a = √5, that is U(−1/√d, 1/√d) whatever the rank."""
    return nn.init.kaiming_uniform_(torch.empty(rank, in_features), a=math.sqrt(5), generator=generator)


def _initialise_a(flat: Tensor, slots: Iterable[Slot], seed: int) -> None:
    """A of every module from one generator; B stays 0."""
    generator = torch.Generator().manual_seed(seed)
    for slot in slots:
        slot.a_rd(flat).copy_(random_a(slot.rank, slot.in_features, generator))


def _flat_mask(b_mask_nr: Mapping[str, Tensor], slots: Mapping[str, Slot], size: int, freeze_a: bool) -> Tensor:
    """The masks on B in the layout of the buffer; A trains unless frozen."""
    mask = torch.zeros(size, dtype=torch.bool)
    for slot in slots.values():
        mask[slot.a_offset :][: slot.rank * slot.in_features] = not freeze_a
    for name, module_mask in b_mask_nr.items():
        if name not in slots or module_mask.shape != (slots[name].out_features, slots[name].rank):
            needed = f"[{slots[name].out_features}, {slots[name].rank}]" if name in slots else "no mask: it has no adapter"
            raise AttachError(f"mask on B of {name} has shape {list(module_mask.shape)}; this run needs {needed}")
        mask[slots[name].b_offset :][: module_mask.numel()] = module_mask.t().reshape(-1)
    return mask


def join_weights(layers: Sequence[nn.Linear]) -> None:
    """Moves the weights of layers of one width into one matrix, of whose rows each keeps its own: a kernel can then read them as one.

    Layers of another type (4-bit weights) and dtypes that differ are left as they are.
    """
    if any(type(layer) is not nn.Linear for layer in layers) or len({layer.weight.dtype for layer in layers}) > 1:
        return
    whole = torch.cat([layer.weight.data for layer in layers])
    for layer, rows in zip(layers, whole.split([layer.out_features for layer in layers]), strict=True):
        layer.weight.data = rows


def _build_group(
    model: nn.Module,
    names: Sequence[str],
    layers: Mapping[str, nn.Linear],
    slots: Mapping[str, Slot],
    flat: FlatParameters,
    freeze_a: bool,
    cast_to_input: bool,
) -> LoraGroup:
    """Makes the group's leaves and puts its LoraLinear layers into the model; on a GPU joins its weights."""
    if flat.data.device.type == "cuda":
        join_weights([layers[name] for name in names])
    members = [slots[name] for name in names if name in slots]
    total_rank, width = sum(slot.rank for slot in members), members[0].in_features
    size_b = sum(slot.rank * slot.out_features for slot in members)
    a_rd = flat.parameter(members[0].a_offset, total_rank, width)
    a_rd.requires_grad_(not freeze_a)
    b_flat = flat.parameter(members[0].b_offset, size_b)
    mask = None if flat.mask is None else flat.mask[members[0].b_offset :][:size_b]
    group = LoraGroup(
        names,
        [layers[name] for name in names],
        [slots[name].rank if name in slots else 0 for name in names],
        [slots[name].scale if name in slots else 0.0 for name in names],
        a_rd,
        b_flat,
        mask,
        cast_to_input,
    )
    for member, name in enumerate(names):
        model.set_submodule(name, LoraLinear(layers[name], group, member))
    return group
