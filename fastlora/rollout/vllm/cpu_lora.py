"""LoRA on vLLM's CPU backend: one GEMM per run of tokens with the same adapter, instead of gathering an adapter's matrices per token.

    tokens of segment [first, end) with adapter slot i      y += (x A_iᵀ) B_iᵀ      i = −1: nothing

vLLM 0.32 gathers A [tokens, r, d] and B [tokens, n, r], padded to max_lora_rank, for every projection, and adds the *last* slot's
adapter to tokens of the base model (index −1) that share a batch with adapter tokens. Here index −1 is left alone.

The embedding and the head, which have slots whether they are adapted or not, are not touched: no adapter of fastlora's has them. vLLM
multiplies by their zeros: B [tokens, v, r] of the head is 100 MB for 16 completions of SmolLM2 at rank 32 in fp32, gathered for every token
that they grow by. Applied by FastloraWorker on CPU only; GPUs have their own kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


def add_lora_linear(
    self: PunicaWrapperCPU,
    y: Tensor,
    x: Tensor,
    lora_a_stacked: tuple[Tensor, ...],
    lora_b_stacked: tuple[Tensor, ...],
    scale: float,
    output_slices: tuple[int, ...],
    **_: Any,
) -> None:
    """y [*, Σ n] += scale (x A_iᵀ) B_iᵀ, slice by slice; x [*, d]; stacked: [slots, 1, r, d] and [slots, 1, n, r]."""
    y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
    for first, end, slot in self.fastlora_segments:
        rows, columns = x[first:end], y[first:end].split(output_slices, dim=1)
        for a, b, part in zip(lora_a_stacked, lora_b_stacked, columns, strict=True):
            part.addmm_(rows @ a[slot, 0].t(), b[slot, 0].t(), alpha=scale)


def add_nothing(self: PunicaWrapperCPU, *_: Any, **__: Any) -> None:
    """To the embedding's rows and to the logits."""


def _update_prefill_metadata(self: PunicaWrapperCPU, token_lora_tensor: Tensor) -> None:
    """Works out, once per batch instead of once per projection, (first token, end, slot) of every run of tokens that has an adapter."""
    _original_update(self, token_lora_tensor)
    slots, lengths = torch.unique_consecutive(token_lora_tensor, return_counts=True)
    ends = lengths.cumsum(0).tolist()
    runs = zip([0, *ends[:-1]], ends, slots.tolist(), strict=True)
    self.fastlora_segments = [run for run in runs if run[2] >= 0]


_original_update = PunicaWrapperCPU._update_prefill_metadata


def install() -> None:
    """Replaces these methods of vLLM's class, for all of its instances."""
    PunicaWrapperCPU.fastlora_segments = []  # until the first batch with an adapter
    PunicaWrapperCPU._update_prefill_metadata = _update_prefill_metadata
    PunicaWrapperCPU.add_lora_linear = add_lora_linear
    PunicaWrapperCPU.add_lora_embedding = PunicaWrapperCPU.add_lora_logits = add_nothing
