"""Keys and values while sampling: each prompt's once for its whole group, and what each completion has added.

The model is called with packed tokens: first all prompts in one row (`cu_seqlens`, `roots`, `cache`), then one token of every running
completion in one row (`cache` alone). Attention layers hand their q, k and v to `attend`. Nothing is copied when a completion
ends: its slot is no longer named.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.ops.decode_attention import decode_attention
from fastlora.ops.packed_attention import packed_attention, rotate


class GroupCache:
    """The cache of one sampling call."""

    def __init__(self, prompt_lengths: Sequence[int], num_generations: int, max_new_tokens: int, device: torch.device) -> None:
        """prompt_lengths: tokens of each prompt; completions of prompt i have the slots i g to (i + 1) g − 1."""
        starts = [0]
        for length in prompt_lengths:
            starts.append(starts[-1] + length)
        self.cu_seqlens, self.roots = tuple(starts), tuple(range(len(prompt_lengths)))
        self._cu_prompts = torch.tensor(starts, device=device)
        self._prompts_s = torch.arange(len(prompt_lengths), device=device).repeat_interleave(num_generations)
        self._capacity = max_new_tokens
        self._prompt: dict[int, tuple[Tensor, Tensor]] = {}
        self._own: dict[int, tuple[Tensor, Tensor]] = {}
        self.slots_t = torch.arange(len(self._prompts_s), device=device)
        self.own_tokens = 0
        """Tokens that every running completion has fed."""

    @property
    def slots_t(self) -> Tensor:
        """int64 [t], the slots whose tokens the next call feeds."""
        return self._slots_t

    @slots_t.setter
    def slots_t(self, slots_t: Tensor) -> None:
        self._slots_t, self._prompts_t = slots_t, self._prompts_s[slots_t]  # once for all layers and tokens

    @property
    def position_ids_t(self) -> Tensor:
        """int64 [t], position of the token that each row feeds next."""
        return self._cu_prompts.diff()[self._prompts_t] + self.own_tokens

    def attend(
        self, layer: int, q_td: Tensor, k_td: Tensor, v_td: Tensor, *, head_dim: int, cos_te: Any = None, sin_te: Any = None, **options: Any
    ) -> Tensor:
        """out [t, H e] of layer `layer`: of all prompts at the first call, of one new token a row afterwards; options: see the two ops."""
        options |= {"head_dim": head_dim, "cos_te": cos_te, "sin_te": sin_te}
        if layer not in self._prompt:
            self._prompt[layer] = rotate(k_td.unflatten(-1, (-1, head_dim)), cos_te, sin_te).flatten(1).contiguous(), v_td.contiguous()
            return packed_attention(q_td, k_td, v_td, self.cu_seqlens, self.roots, **options)
        if layer not in self._own:
            shape = (len(self._prompts_s), self._capacity, k_td.shape[1])
            self._own[layer] = k_td.new_empty(shape), v_td.new_empty(shape)
        prompts = (*self._prompt[layer], self._cu_prompts, self._prompts_t)
        return decode_attention(q_td, k_td, v_td, *prompts, *self._own[layer], self.slots_t, self.own_tokens, **options)
