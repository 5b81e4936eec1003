"""What the GPU tests compute with: arguments of every op that its GPU kernels take, on any device.

The samples of an op itself (`OpSpec.sample_inputs`) are for every implementation; Triton's `lora_linear` wants widths that are multiples
of 8 and the group's W as one matrix, so that group and head have cases of their own: tokens 0, 1, 63, 1,000; ranks 0, 1, 3, 17, 64;
masks; 3-d input; vocabularies that no tile divides. tests/test_gpu_collection.py builds all of them on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bench.test_ops import fresh
from fastlora.lora.packed import join_weights
from fastlora.ops.registry import ON_A_CPU, OpSpec, dispatchers
from tests.ops.implementations import op_specs

Arguments = tuple[Any, ...]
"""Of an op, by position."""

WIDTH = 72
"""Of inputs: a multiple of 8 that no tile divides."""
FLOAT32_STATE = ("adamw_step", "gradient_norms", "grpo_loss")
"""Ops on flat buffers and log-probabilities: never given less than float32."""
MATRIX_OPS = ("lora_linear", "linear_logprob", "packed_attention")
"""Ops that consist of matrix products: float32 may run as TF32 there."""


@dataclass(frozen=True, slots=True)
class Precision:
    """How numbers are held and multiplied."""

    name: str
    dtype: torch.dtype
    tf32: bool = False
    """torch may round float32 operands of products to TF32."""

    def __str__(self) -> str:
        return self.name


PRECISIONS = (
    Precision("bf16", torch.bfloat16),
    Precision("fp16", torch.float16),
    Precision("tf32", torch.float32, tf32=True),
    Precision("fp32", torch.float32),
)


def precisions(spec: OpSpec) -> list[Precision]:
    """Those that an op is used in."""
    if spec.name in FLOAT32_STATE:
        return [p for p in PRECISIONS if p.name == "fp32"]
    return [p for p in PRECISIONS if not p.tf32 or spec.name.startswith(MATRIX_OPS)]


@dataclass(frozen=True, slots=True)
class GroupCase:
    """One group of projections."""

    lead: tuple[int, ...]
    """Shape of the input before its width."""
    outs: tuple[int, ...]
    ranks: tuple[int, ...]
    biases: bool = False
    masked: bool = False


GROUP_CASES = (
    GroupCase((0,), (40,), (3,)),
    GroupCase((1,), (136, 16, 40), (1, 0, 17), biases=True),
    GroupCase((63,), (40, 264), (64, 3), masked=True),
    GroupCase((1000,), (136, 16, 40), (17, 64, 0), biases=True, masked=True),
    GroupCase((2, 130), (40, 16), (0, 0)),
)
HEAD_CASES = ((0, 131, 1.0), (1, 97, 0.7), (63, 1000, 1.3), (1000, 2049, 1.0))
"""(tokens, vocabulary, temperature)."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """Random tensors of a case: the same numbers on every device, rounded to `dtype` once."""

    dtype: torch.dtype
    device: torch.device
    exact: bool
    """Hold the rounded numbers in float64: what is computed from them is the truth."""
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """N(0, scale²); dtype: another one to round to."""
        rounded = (scale * torch.randn(*shape, generator=self.generator, dtype=torch.float64)).to(dtype or self.dtype)
        return (rounded.double() if self.exact else rounded).to(self.device)

    def below(self, limit: int, size: int) -> Tensor:
        """int64 [size] in [0, limit)."""
        return torch.randint(limit, (size,), generator=self.generator).to(self.device)

    def mask(self, size: int) -> Tensor:
        """bool [size], half of it True."""
        return (torch.rand(size, generator=self.generator) < 0.5).to(self.device)


def joined_layers(numbers: Numbers, outs: Sequence[int], biases: bool) -> list[nn.Linear]:
    """Frozen projections whose weights are one matrix, as `lora.packed.attach` joins them on a GPU."""
    layers = [nn.Linear(WIDTH, n, bias=biases, device=numbers.device) for n in outs]
    for layer in layers:
        layer.requires_grad_(False)
        layer.weight.data = numbers.normal(layer.out_features, WIDTH, scale=WIDTH**-0.5)
        if biases:
            layer.bias.data = numbers.normal(layer.out_features)
    join_weights(layers)
    return layers


def lora_linear_inputs(numbers: Numbers) -> Iterator[Arguments]:
    """Of `lora_linear_op`."""
    for case in GROUP_CASES:
        layers = joined_layers(numbers, case.outs, case.biases)
        size = sum(n * r for n, r in zip(case.outs, case.ranks, strict=True))
        yield (
            numbers.normal(*case.lead, WIDTH).requires_grad_(),
            [layer.weight.data for layer in layers],
            [None if layer.bias is None else layer.bias.data for layer in layers],
            numbers.normal(sum(case.ranks), WIDTH, scale=WIDTH**-0.5).requires_grad_(),
            numbers.normal(size, scale=0.3).requires_grad_(),
            numbers.mask(size) if case.masked else None,
            list(case.ranks),
            [0.5 + m for m in range(len(case.ranks))],
            [],
        )


@torch.no_grad()
def lora_linear_backward_inputs(numbers: Numbers) -> Iterator[Arguments]:
    """Of `lora_linear_backward_op`, with the h that the selected implementation's forward pass keeps; with and without dX and dA."""
    for index, arguments in enumerate(lora_linear_inputs(numbers)):
        x, weights_nd, _, a_rd, b_flat, b_mask, ranks, scales, absmaxes = detached = _detached(arguments)
        *ys, h = dispatchers["lora_linear"](*detached)
        dys = [numbers.normal(*y.shape) for y in ys]
        yield dys, x, h, weights_nd, a_rd, b_flat, b_mask, ranks, scales, index != 1, index != 2, absmaxes


def linear_logprob_inputs(numbers: Numbers) -> Iterator[Arguments]:
    """Of `linear_logprob_op`; the head is frozen, as under LoRA, and has no bias."""
    for t, v, temperature in HEAD_CASES:
        weight_vd = numbers.normal(v, WIDTH, scale=2 * WIDTH**-0.5)  # logits spread over ± 6 nats
        yield numbers.normal(t, WIDTH).requires_grad_(), weight_vd, None, numbers.below(v, t), temperature, True, 256, 1024


@torch.no_grad()
def linear_logprob_backward_inputs(numbers: Numbers) -> Iterator[Arguments]:
    """Of `linear_logprob_backward_op`, for dh; with and without a gradient of the entropy."""
    for index, arguments in enumerate(linear_logprob_inputs(numbers)):
        hidden_td, weight_vd, bias_v, targets_t, temperature, _, *chunks = detached = _detached(arguments)
        _, entropy_t, log_z_t = dispatchers["linear_logprob"](*detached)
        grads = [numbers.normal(len(hidden_td), dtype=torch.float32) for _ in range(2)]
        inputs = (hidden_td, weight_vd, bias_v, targets_t, log_z_t, entropy_t, temperature, *chunks)
        yield grads[0], grads[1] if index % 2 else None, *inputs, False, False


_OWN: dict[str, Callable[[Numbers], Iterator[Arguments]]] = {
    "lora_linear": lora_linear_inputs,
    "lora_linear_backward": lora_linear_backward_inputs,
    "linear_logprob": linear_logprob_inputs,
    "linear_logprob_backward": linear_logprob_backward_inputs,
}


def inputs(spec: OpSpec, dtype: torch.dtype, device: torch.device, *, exact: bool = False) -> Iterator[Arguments]:
    """Arguments of an op, odd shapes first. What a backward op gets from its forward pass comes from the selected implementation.

    exact: the numbers of `dtype`, held in float64.
    """
    if spec.name in _OWN:
        yield from _OWN[spec.name](Numbers(dtype, device, exact))
    else:
        for arguments in spec.sample_inputs(dtype, device):
            yield fresh(arguments, torch.float64) if exact else arguments


def _detached(arguments: Arguments) -> Arguments:
    return tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)


def gpu_implementations() -> list[tuple[OpSpec, str]]:
    """(op, implementation) of everything that is made for a GPU."""
    return [(spec, name) for spec in op_specs() for name in dispatchers[spec.name].implementations if name not in ON_A_CPU]
