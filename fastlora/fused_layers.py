"""The memory-bound parts of a decoder on our ops: RMS norms, SwiGLU, and rotary embedding inside packed attention.

Only a third of a naive update is GEMM; the rest is these parts, as chains of small torch calls over float32 copies. A module of a Hugging
Face model is given a fused forward when a probe with random numbers shows that it computes what our op computes, whatever its
class is called; all others keep their own. The model's code, names and weights stay as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastlora.attention import ATTENTION, LAYOUT, attend_packed
from fastlora.ops.packed_attention import rotate
from fastlora.ops.rms_norm import rms_norm
from fastlora.ops.swiglu import swiglu

PROBE_TOKENS = 5
PROBE_POSITIONS = range(0, 7 * PROBE_TOKENS, 7)
PROBE_TOLERANCE = 0.05
"""Relative to the output's largest entry: bf16 chains differ by a few 2^-8; another formula (Gemma's gain 1 + w, GELU, partial rotation)
differs by its own size."""


def fuse_layers(model: PreTrainedModel) -> Counter[str]:
    """Gives every norm, MLP and attention of `model` that our ops can compute a fused forward; returns how many of each class.

    Call it on the plain model, before an adapter is attached. Nothing is fused where the probe disagrees, and every layer is probed: those
    of one class differ (SmolLM3 rotates three of four).
    """
    model.set_attn_implementation(ATTENTION)
    fused: Counter[str] = Counter()
    for module in list(model.modules()):
        for fits, forward, probe in _KINDS:
            if fits(module) and probe(model, module, forward):
                module.forward = MethodType(forward(module.forward), module)
                fused[type(module).__name__] += 1
    return fused


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon") and isinstance(weight, Tensor)


def _is_mlp(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Linear) for name in ("gate_proj", "up_proj", "down_proj"))


def _is_attention(module: nn.Module) -> bool:
    linear = all(isinstance(getattr(module, name, None), nn.Linear) for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    if not (linear and hasattr(module, "head_dim") and hasattr(module, "scaling")):
        return False
    norms = [getattr(module, name) for name in ("q_norm", "k_norm") if hasattr(module, name)]
    return all(_is_norm(norm) and norm.weight.shape == (module.head_dim,) for norm in norms)  # of each head, not of all (OLMo 2)


def _window(module: Any) -> int | None:
    """Tokens that a query of this layer sees at most; Mistral's layers have it in their config alone."""
    return getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))


def _norm_forward(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)

    return forward


def _mlp_forward(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))

    return forward


def _attention_forward(own: Callable[..., Any]) -> Callable[..., Any]:
    """Packed calls only; a padded batch goes to the module's own forward."""

    def forward(self: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any) -> Any:
        layout = {name: kwargs[name] for name in LAYOUT if name in kwargs}
        if not layout:
            return own(hidden_states, position_embeddings=position_embeddings, **kwargs)
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if hasattr(self, "q_norm"):
            q, k = (norm(x.unflatten(-1, (-1, self.head_dim))).flatten(-2) for norm, x in ((self.q_norm, q), (self.k_norm, k)))
        tables = {"cos_te": position_embeddings[0][0], "sin_te": position_embeddings[1][0]}
        options = {"head_dim": self.head_dim, "scaling": self.scaling, "window": _window(self)}
        out_td = attend_packed(self, q[0], k[0], v[0], layout, **tables, **options)
        return self.o_proj(out_td[None]), None

    return forward


def _random(like: Tensor, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator).to(like)


def _agrees(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= PROBE_TOLERANCE * theirs.abs().max())


@torch.no_grad()
def _probe_rows(model: PreTrainedModel, module: Any, fused: Callable[..., Any]) -> bool:
    """Norms and MLPs: rows in, rows out. Not centred, or a norm without the mean would pass; gates of size 1, where activations differ."""
    width = module.gate_proj.in_features if _is_mlp(module) else module.weight.shape[0]
    x = 1 + _random(next(model.parameters()), 1, PROBE_TOKENS, width)
    x = x / module.gate_proj(x).std() if _is_mlp(module) else x
    return _agrees(fused(module.forward)(module, x), module.forward(x))


class _Recorder:
    """Stands in for the cache of a packed call: keeps what a layer hands to attention, rotated, and gives its queries back."""

    def __init__(self) -> None:
        self.tensors: tuple[Tensor, ...] = ()
        self.options: dict[str, Any] = {}

    def attend(
        self, layer: int, q_td: Tensor, k_td: Tensor, v_td: Tensor, *, cos_te: Any = None, sin_te: Any = None, **options: Any
    ) -> Tensor:
        q_td, k_td = (rotate(x.unflatten(-1, (-1, options["head_dim"])), cos_te, sin_te).flatten(1) for x in (q_td, k_td))
        self.tensors, self.options = (q_td, k_td, v_td), options
        return q_td


@torch.no_grad()
def _probe_attention(model: PreTrainedModel, module: Any, fused: Callable[..., Any]) -> bool:
    """The same rotated q, k, v and options for attention, and the same output after it. (Outputs alone would hide the rotation where
    scores are small.)"""
    rotary = getattr(model.base_model, "rotary_emb", None)
    if rotary is None:
        return False
    x = _random(next(model.parameters()), 1, PROBE_TOKENS, module.q_proj.in_features)
    try:
        embeddings = rotary(x, torch.tensor([PROBE_POSITIONS], device=x.device))
    except TypeError:  # a rotary embedding per layer type: not the plain one
        return False
    if embeddings[0].shape != (1, PROBE_TOKENS, module.head_dim):
        return False
    ours, theirs = _Recorder(), _Recorder()
    call = {"position_embeddings": embeddings, "attention_mask": None}
    outputs = fused(module.forward)(module, x, **call, cache=ours)[0], module.forward(x, **call, cache=theirs)[0]
    pairs = zip((*ours.tensors, outputs[0]), (*theirs.tensors, outputs[1]), strict=True)
    return ours.options == theirs.options and all(_agrees(*pair) for pair in pairs)


_KINDS: tuple[tuple[Callable[[nn.Module], bool], Callable[..., Any], Callable[..., bool]], ...] = (
    (_is_norm, _norm_forward, _probe_rows),
    (_is_mlp, _mlp_forward, _probe_rows),
    (_is_attention, _attention_forward, _probe_attention),
)
