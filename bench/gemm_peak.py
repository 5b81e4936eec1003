"""What the update's matrix products cost on this machine at best: their list, their FLOPs, the fastest GEMM for each shape.

    useful FLOPs  =  Σ 2 m k n of the products below + attention                      shared prompts: T = Σ_groups P + G (C − 1)
    peak rate     =  Σ FLOPs / Σ (FLOPs / best rate of that shape)                    measured
    share         =  useful FLOPs / (seconds of the update × peak rate)

Products of one LoRA update, for a projection W [n, d] with adapter A [r, d], B [n, r], and x [T, d]:

    forward   x Wᵀ       [T, d] [d, n]        H = x Aᵀ   [T, d] [d, r]        H Bᵀ      [T, r] [r, n]
    backward  dY W       [T, n] [n, d]        dH = dY B  [T, n] [n, r]        dH A      [T, r] [r, d]
                                              dB = dYᵀ H [n, T] [T, r]        dA = dHᵀx [r, T] [T, d]

The head sees the G·C predicting rows of a group: logits and dHidden. Nothing below the lowest adapted layer trains: its q, k, v need no
dX, and below it there is no backward pass at all; a layer without adapters above it has its dY W alone. Full fine-tuning has dW = dYᵀ x
and the head's dW in place of the adapter's products, and every dX.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, int, int]
"""(m, k, n) of [m, k] @ [k, n]."""

ATTENTION_BACKWARD = 2.5
"""FLOPs of attention's backward over its forward: five products (one recomputes the scores) for two (Dao 2023, FlashAttention-2)."""
MIN_REPEATS, MIN_SECONDS = 3, 0.1
"""A shape is timed at least this often and this long; its best time counts."""


@dataclass(frozen=True, slots=True)
class Model:
    """What counts of a decoder's config (field names of transformers)."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Name -> (d, n) of the seven projections of a layer."""
        hidden, mlp = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        attention = {"q_proj": (hidden, q), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (q, hidden)}
        return {**attention, "gate_proj": (hidden, mlp), "up_proj": (hidden, mlp), "down_proj": (mlp, hidden)}


@dataclass(frozen=True, slots=True)
class Group:
    """Samples of one prompt."""

    prompt: int
    """Tokens, computed once."""
    completions: tuple[int, ...]
    """Tokens of each; the last one predicts nothing and is no input."""

    @property
    def inputs(self) -> int:
        """Tokens that the model reads."""
        return self.prompt + sum(c - 1 for c in self.completions)

    @property
    def pairs(self) -> int:
        """Query-key pairs of causal attention: prompt on itself; a completion's i-th token on the prompt and on 1..i."""
        return self.prompt * (self.prompt + 1) // 2 + sum((c - 1) * self.prompt + (c - 1) * c // 2 for c in self.completions)


@dataclass(frozen=True, slots=True)
class Work:
    """The useful work of one update."""

    gemms: Counter[Shape]
    """(m, k, n) -> how many."""
    attention_flops: float
    """Forward and backward, all layers."""

    @property
    def gemm_flops(self) -> float:
        """2 m k n, summed."""
        return float(sum(2 * m * k * n * count for (m, k, n), count in self.gemms.items()))

    @property
    def flops(self) -> float:
        """Products and attention."""
        return self.gemm_flops + self.attention_flops


def lora_work(model: Model, groups: Sequence[Group], rank: int, layers: Collection[int] | None = None) -> Work:
    """An update of rank-`rank` adapters on all seven projections of these layers (None: of all)."""
    adapted = range(model.num_hidden_layers) if layers is None else layers
    tokens = sum(group.inputs for group in groups)
    gemms: Counter[Shape] = Counter()
    for layer, name, d, n in _projections(model):
        gemms[tokens, d, n] += 1
        needs_dx = layer > min(adapted) or (layer == min(adapted) and name not in ("q_proj", "k_proj", "v_proj"))
        if needs_dx:
            gemms[tokens, n, d] += 1
        if layer in adapted:
            gemms.update([(tokens, d, rank), (tokens, rank, n), (tokens, n, rank), (n, tokens, rank), (rank, tokens, d)])
            if needs_dx:
                gemms[tokens, rank, d] += 1
    gemms.update(_head(model, groups))
    return Work(gemms, _attention_flops(model, groups, model.num_hidden_layers - min(adapted)))


def full_work(model: Model, groups: Sequence[Group]) -> Work:
    """An update of every weight."""
    tokens, rows = sum(group.inputs for group in groups), _rows(groups)
    gemms: Counter[Shape] = Counter()
    for _, _, d, n in _projections(model):
        gemms.update([(tokens, d, n), (tokens, n, d), (n, tokens, d)])
    gemms.update(_head(model, groups))
    gemms[model.vocab_size, rows, model.hidden_size] += 1
    return Work(gemms, _attention_flops(model, groups, model.num_hidden_layers))


def _projections(model: Model) -> Iterator[tuple[int, str, int, int]]:
    for layer in range(model.num_hidden_layers):
        for name, (d, n) in model.projections.items():
            yield layer, name, d, n


def _rows(groups: Sequence[Group]) -> int:
    """Completion tokens, each predicted by one row of the head."""
    return sum(sum(group.completions) for group in groups)


def _head(model: Model, groups: Sequence[Group]) -> list[Shape]:
    rows = _rows(groups)
    return [(rows, model.hidden_size, model.vocab_size), (rows, model.vocab_size, model.hidden_size)]


def _attention_flops(model: Model, groups: Sequence[Group], backward_layers: int) -> float:
    """q·k and p·v of every pair, 2 · head_dim each: forward in every layer, backward in the upper `backward_layers`."""
    pairs = sum(group.pairs for group in groups)
    passes = model.num_hidden_layers + ATTENTION_BACKWARD * backward_layers
    return passes * 4 * pairs * model.num_attention_heads * model.head_dim


def measure_rates(shapes: Sequence[Shape], dtype: torch.dtype, progress: Callable[[Shape], None]) -> dict[Shape, float]:
    """Best FLOP/s of each shape, of torch.mm with either layout of the right operand.

    In float32 that is MKL. oneDNN's float32 product runs at twice its speed on Zen 5, but with 1.5 times its error (LOG.md): the update
    may not use it, and it is no peak for the update either.
    """
    rates = {}
    for shape in shapes:
        progress(shape)
        m, k, n = shape
        rates[shape] = 2 * m * k * n / min(map(_best_seconds, _products(shape, dtype)))
    return rates


def best_product(shape: Shape, dtype: torch.dtype) -> Callable[[], Tensor]:
    """torch.mm on one set of operands of that shape, in the faster of the two layouts."""
    return min(_products(shape, dtype), key=_best_seconds)


def _products(shape: Shape, dtype: torch.dtype) -> list[Callable[[], Tensor]]:
    m, k, n = shape
    x_mk, w_nk = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
    w_kn, out = w_nk.t().contiguous(), torch.empty(m, n, dtype=dtype)
    return [
        lambda: torch.mm(x_mk, w_nk.t(), out=out),
        lambda: torch.mm(x_mk, w_kn, out=out),
    ]


@torch.no_grad()
def _best_seconds(product: Callable[[], Tensor]) -> float:
    product()
    best, total, repeats = math.inf, 0.0, 0
    while repeats < MIN_REPEATS or total < MIN_SECONDS:
        start = time.perf_counter()
        product()
        seconds = time.perf_counter() - start
        best, total, repeats = min(best, seconds), total + seconds, repeats + 1
    return best


def peak_rate(work: Work, rates: Mapping[Shape, float]) -> float:
    """FLOP/s of the list of products at the best rate of each: the mean weighted by their time."""
    seconds = sum(2 * m * k * n * count / rates[m, k, n] for (m, k, n), count in work.gemms.items())
    return work.gemm_flops / seconds
