"""What bench/test_ops.py times, and bench/gpu.py with larger models: every op of fastlora.ops on arguments of the shapes that one update
gives it. SmolLM2's:

An update of 4 prompts (115 tokens) × 4 completions (128): T = 4 · (115 + 4 · 127) = 2,492 packed tokens, C = 2,048 predicting rows.
The two ops of the sampler get what a decoding step halfway through gives them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from bench.gemm_peak import Group, Model, Shape
from bench.workload import ALPHA, COMPLETION_TOKENS, NUM_GENERATIONS, PROBLEMS, RANK
from fastlora.config import LossConfig, OptimConfig
from fastlora.ops import (
    adamw_step,
    decode_attention,
    export_adapter,
    grpo_loss,
    linear_logprob,
    logprob_rows,
    lora_linear,
    nucleus_rows,
    packed_attention,
    rms_norm,
    sample_rows,
    sparse_db,
    swiglu,
)
from fastlora.ops.registry import OpSpec, dispatchers
from fastlora.packaged_model import packaged_model_folder

BOTH = (torch.bfloat16, torch.float32)
FLOAT32 = (torch.float32,)
"""Of ops on the flat buffers and on log-probabilities, which are float32 in every run."""


@dataclass(frozen=True, slots=True)
class Update:
    """The sizes of an update."""

    model: Model
    groups: tuple[Group, ...]
    rank: int
    tile_rows: int
    """Rows of logits in memory at once (losses.one_pass)."""

    @property
    def tokens(self) -> int:
        """T, packed tokens."""
        return sum(group.inputs for group in self.groups)

    @property
    def rows(self) -> int:
        """C, completion tokens, each predicted by one row of the head."""
        return sum(sum(group.completions) for group in self.groups)

    @property
    def samples(self) -> int:
        """Completions."""
        return sum(len(group.completions) for group in self.groups)


@dataclass(frozen=True, slots=True)
class Case:
    """One op at one shape."""

    spec: OpSpec
    shape: str
    """In words, for the row."""
    arguments: Callable[[torch.dtype], tuple[Any, ...]]
    """Of the op, on torch's default device. A backward op's come from the forward op, in the implementation that is selected at that
    moment."""
    gemms: Counter[Shape]
    """(m, k, n) -> how many products the op consists of; its peak is the best GEMM of these. Empty: the op moves memory."""
    dtypes: tuple[torch.dtype, ...] = BOTH

    @property
    def name(self) -> str:
        """Unique: `lora_linear gate_up`."""
        return f"{self.spec.name} {self.shape}"


def packaged_model() -> Model:
    """SmolLM2's dimensions."""
    config = AutoConfig.from_pretrained(packaged_model_folder())
    return Model(**{name: getattr(config, name) for name in Model.__slots__})


def smollm2_update() -> Update:
    """The workload of bench/workload.py with prompts of their mean length."""
    groups = (Group(115, (COMPLETION_TOKENS,) * NUM_GENERATIONS),) * len(PROBLEMS)
    return Update(packaged_model(), groups, RANK, tile_rows=256)


def cases(update: Update) -> Iterator[Case]:
    """All of them; arguments are made when asked for."""
    yield from _lora_cases(update)
    yield from _attention_cases(update)
    yield from _layer_cases(update)
    yield from _head_cases(update)
    yield from _loss_cases(update)
    yield from _optimizer_cases(update)
    yield from _sampler_cases(update)


def _generator() -> torch.Generator | None:
    """On torch's default device; none where tensors hold no numbers."""
    device = torch.get_default_device()
    return None if device.type == "meta" else torch.Generator(device).manual_seed(0)


def _indices(values: list[int]) -> Tensor:
    """int64 on torch's default device; with numbers also where other tensors have none, since costs are counted from them."""
    device = torch.get_default_device()
    return torch.tensor(values, device="cpu" if device.type == "meta" else device)


def _random() -> Callable[..., Tensor]:
    """normal(*shape) in float32, the same numbers for every case."""
    generator = _generator()
    return lambda *shape: torch.randn(*shape, generator=generator)


def _lora_cases(update: Update) -> Iterator[Case]:
    """The three kinds of input groups: three outputs, two, one (o_proj is a small down_proj)."""
    widths, t, r = update.model.projections, update.tokens, update.rank
    for name, members in (("qkv", ("q_proj", "k_proj", "v_proj")), ("gate_up", ("gate_proj", "up_proj")), ("down", ("down_proj",))):
        d, outs = widths[members[0]][0], [widths[member][1] for member in members]
        total = r * len(outs)

        def forward(dtype: torch.dtype, d: int = d, outs: list[int] = outs, total: int = total) -> tuple[Any, ...]:
            normal = _random()
            x, a_rd, b_flat = normal(t, d), normal(total, d) / d**0.5, normal(r * sum(outs)) / r**0.5
            weights = (normal(sum(outs), d) / d**0.5).to(dtype).split(outs)  # one matrix, as lora.packed.attach joins them on a GPU
            scales = [ALPHA / r] * len(outs)
            return x.to(dtype), list(weights), [None] * len(outs), a_rd.to(dtype), b_flat.to(dtype), None, [r] * len(outs), scales, []

        def backward(dtype: torch.dtype, forward: Callable[..., Any] = forward) -> tuple[Any, ...]:
            x, weights, _, a_rd, b_flat, mask, ranks, scales, absmaxes = arguments = forward(dtype)
            *ys, h = dispatchers["lora_linear"](*arguments)
            return [y.cos() for y in ys], x, h, weights, a_rd, b_flat, mask, ranks, scales, True, True, absmaxes

        words = f"{name}: [{t}, {d}] → {' + '.join(map(str, outs))}, r {r} each"
        products = Counter([(t, d, n) for n in outs] + [(t, r, n) for n in outs] + [(t, d, total)])
        yield Case(lora_linear.SPEC, words, forward, products)
        products = Counter([(t, n, d) for n in outs] + [(t, n, r) for n in outs] + [(n, t, r) for n in outs])
        yield Case(lora_linear.BACKWARD_SPEC, words, backward, products + Counter([(total, t, d), (t, total, d)]))
    yield _sparse_case(update)


def _sparse_case(update: Update) -> Case:
    """One entry in a hundred of down_proj's B."""
    _, n = update.model.projections["down_proj"]
    t, r = update.tokens, update.rank

    def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
        normal = _random()
        return [normal(t, n).to(dtype)], normal(t, r).to(dtype), torch.arange(n * r)[::100], [r], [ALPHA / r], None

    return Case(sparse_db.SPEC, f"down: [{t}, {n}], r {r}, 1 % of B", arguments, Counter())


def _segments(update: Update) -> tuple[list[int], list[int]]:
    """(cu_seqlens, roots) of the packed batch: each prompt, then its completions without their last token."""
    lengths, roots = [], []
    for group in update.groups:
        roots += [len(lengths)] * (1 + len(group.completions))
        lengths += [group.prompt, *(c - 1 for c in group.completions)]
    return list(accumulate(lengths, initial=0)), roots


def _rotary(normal: Callable[..., Tensor], tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    angles = normal(tokens, head_dim // 2).repeat(1, 2)
    return angles.cos(), angles.sin()


def _attention_cases(update: Update) -> Iterator[Case]:
    m, t = update.model, update.tokens
    q_width, kv_width = m.num_attention_heads * m.head_dim, m.num_key_value_heads * m.head_dim

    def forward(dtype: torch.dtype) -> tuple[Any, ...]:
        normal = _random()
        tensors = [normal(t, q_width), normal(t, kv_width), normal(t, kv_width), *_rotary(normal, t, m.head_dim)]
        return *(x.to(dtype) for x in tensors), *_segments(update), m.head_dim, m.head_dim**-0.5, 0

    def backward(dtype: torch.dtype) -> tuple[Any, ...]:
        arguments = forward(dtype)
        out, lse = dispatchers["packed_attention"](*arguments)
        return out.cos(), *arguments[:5], out, lse, *arguments[5:]

    words = f"{len(update.groups)} prompts × {len(update.groups[0].completions)}, [{t}, {m.num_attention_heads} × {m.head_dim}]"
    large = Counter([(t, q_width, m.hidden_size)])  # its own products are too small to be anyone's peak
    yield Case(packed_attention.SPEC, words, forward, large)
    yield Case(packed_attention.BACKWARD_SPEC, words, backward, large)


def _layer_cases(update: Update) -> Iterator[Case]:
    t, d, mlp = update.tokens, update.model.hidden_size, update.model.intermediate_size

    def norm(dtype: torch.dtype) -> tuple[Any, ...]:
        normal = _random()
        return normal(t, d).to(dtype), normal(d).to(dtype), 1e-5

    def norm_backward(dtype: torch.dtype) -> tuple[Any, ...]:
        x, weight, eps = norm(dtype)
        y, rstd = dispatchers["rms_norm"](x, weight, eps)
        return y.cos(), x, weight, rstd, False

    def gated(dtype: torch.dtype) -> tuple[Any, ...]:
        normal = _random()
        return normal(t, mlp).to(dtype), normal(t, mlp).to(dtype)

    def gated_backward(dtype: torch.dtype) -> tuple[Any, ...]:
        gate, up = gated(dtype)
        return up.cos(), gate, up

    yield Case(rms_norm.SPEC, f"[{t}, {d}]", norm, Counter())
    yield Case(rms_norm.BACKWARD_SPEC, f"[{t}, {d}]", norm_backward, Counter())
    yield Case(swiglu.SPEC, f"[{t}, {mlp}]", gated, Counter())
    yield Case(swiglu.BACKWARD_SPEC, f"[{t}, {mlp}]", gated_backward, Counter())


def _head_cases(update: Update) -> Iterator[Case]:
    c, d, v, tile = update.rows, update.model.hidden_size, update.model.vocab_size, update.tile_rows

    def targets(rows: int) -> Tensor:
        return torch.randint(v, (rows,), generator=_generator())

    def head(dtype: torch.dtype) -> tuple[Any, ...]:
        normal = _random()
        weight = 2 * normal(v, d) / d**0.5  # logits spread over ± 6 nats
        return normal(c, d).to(dtype), weight.to(dtype), None, targets(c), 1.0, True, tile, v

    def head_backward(dtype: torch.dtype) -> tuple[Any, ...]:
        hidden, weight, bias, target, temperature, _, *chunks = arguments = head(dtype)
        logp, entropy, log_z = dispatchers["linear_logprob"](*arguments)
        return logp.cos(), None, hidden, weight, bias, target, log_z, entropy, temperature, *chunks, False, False

    def rows(dtype: torch.dtype) -> tuple[Any, ...]:
        return (2 * _random()(tile, v)).to(dtype), targets(tile), 1.0, True

    def rows_backward(dtype: torch.dtype) -> tuple[Any, ...]:
        z, target, temperature, _ = arguments = rows(dtype)
        logp, entropy, log_z = dispatchers["logprob_rows"](*arguments)
        return z, target, logp.cos(), None, log_z, entropy, temperature

    def nucleus(dtype: torch.dtype) -> tuple[Any, ...]:
        z, _, temperature, _ = rows(dtype)
        return z, temperature, 0.9

    words = f"[{c}, {d}] · [{v}, {d}]ᵀ in tiles of {tile} rows"
    logits, dhidden = (tile, d, v), (tile, v, d)
    yield Case(linear_logprob.SPEC, words, head, Counter([logits]))
    yield Case(linear_logprob.BACKWARD_SPEC, words, head_backward, Counter([logits, dhidden]))
    yield Case(logprob_rows.SPEC, f"[{tile}, {v}]", rows, Counter())
    yield Case(logprob_rows.BACKWARD_SPEC, f"[{tile}, {v}]", rows_backward, Counter())
    yield Case(nucleus_rows.SPEC, f"[{tile}, {v}], top-p .9", nucleus, Counter())


def _loss_cases(update: Update) -> Iterator[Case]:
    n, t = update.samples, update.rows // update.samples
    config = LossConfig()

    def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
        normal = _random()
        logp, entropy, advantages = -normal(n, t).abs(), normal(n, t).abs(), normal(n, 1)
        options = grpo_loss.Options(
            **config.model_dump(include=set(grpo_loss.Options._fields) - {"epsilon_high", "entropy_coef"}),
            epsilon_high=config.epsilon,
            entropy_coef=0.0,
            num_items_in_batch=n * t,
            accumulation_steps=1,
            steps_per_generation=1,
            max_completion_length=t,
        )
        old = logp + 0.1 * normal(n, t)
        return *(x.to(dtype) for x in (logp, entropy)), torch.ones(n, t, dtype=torch.bool), advantages, old, None, None, None, *options

    yield Case(grpo_loss.SPEC, f"[{n}, {t}], {config.loss_type}, β = {config.beta:g}", arguments, Counter(), FLOAT32)


def adapter_segments(model: Model, rank: int) -> list[adamw_step.Segment]:
    """All A and B of an adapter of one rank on all projections; A first in the buffer, as lora.packed lays them out."""
    names_shapes: list[tuple[str, tuple[int, int]]] = []
    for kind in "AB":
        for layer in range(model.num_hidden_layers):
            for name, (d, n) in model.projections.items():
                names_shapes.append((f"{layer}.{name}.lora_{kind}", (rank, d if kind == "A" else n)))
    offsets = accumulate((rows * cols for _, (rows, cols) in names_shapes), initial=0)
    pairs = zip(names_shapes, offsets, strict=False)
    return [adamw_step.Segment(name, offset, shape, transposed=name.endswith("B")) for (name, shape), offset in pairs]


def _optimizer_cases(update: Update) -> Iterator[Case]:
    segments = adapter_segments(update.model, update.rank)
    size, config = segments[-1].offset + segments[-1].numel, OptimConfig()
    table = adamw_step.segment_table(segments, None)

    def norms(dtype: torch.dtype) -> tuple[Any, ...]:
        return _random()(size), table, None

    def step(dtype: torch.dtype) -> tuple[Any, ...]:
        normal = _random()
        param, grad, exp_avg = (normal(size) for _ in range(3))
        settings = (10, 1e-6, *config.betas, config.eps, config.weight_decay)
        return param, grad, exp_avg, exp_avg.square(), torch.tensor(0.5), table, None, *settings

    words = f"{size:,} entries in {len(segments)} matrices"
    yield Case(adamw_step.SPECS[0], words, norms, Counter(), FLOAT32)
    yield Case(adamw_step.SPECS[1], words, step, Counter(), FLOAT32)
    yield _export_case(update.rank, segments, size)


def _export_case(rank: int, segments: list[adamw_step.Segment], size: int) -> Case:
    """Every matrix of the adapter, s_m folded in, ranks as they are."""
    a, b = segments[: len(segments) // 2], segments[len(segments) // 2 :]
    lists = [[s.offset for s in a], [s.offset for s in b], [rank] * len(a), [s.shape[1] for s in a], [s.shape[1] for s in b]]

    def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
        return _random()(size), *lists, [ALPHA / rank] * len(a), None, torch.bfloat16

    return Case(export_adapter.SPEC, f"{len(a)} modules of rank {rank} into bfloat16", arguments, Counter(), FLOAT32)


def _sampler_cases(update: Update) -> Iterator[Case]:
    m, n, length = update.model, update.samples, max(max(group.completions) for group in update.groups)
    q_width, kv_width, own = m.num_attention_heads * m.head_dim, m.num_key_value_heads * m.head_dim, length // 2
    starts = list(accumulate((group.prompt for group in update.groups), initial=0))
    prompts = [index for index, group in enumerate(update.groups) for _ in group.completions]

    def attention(dtype: torch.dtype) -> tuple[Any, ...]:
        normal = _random()
        inputs = [normal(n, q_width), normal(n, kv_width), normal(n, kv_width), *_rotary(normal, n, m.head_dim)]
        inputs += [normal(starts[-1], kv_width) for _ in "kv"]
        caches = [normal(n, length, kv_width).to(dtype) for _ in "kv"]
        layout = (_indices(starts), _indices(prompts), *caches, torch.arange(n), own, m.head_dim, m.head_dim**-0.5, 0)
        return *(x.to(dtype) for x in inputs), *layout

    def rows(dtype: torch.dtype) -> tuple[Any, ...]:
        uniforms = torch.rand(n, generator=_generator(), dtype=torch.float64)
        return (2 * _random()(n, m.vocab_size)).to(dtype), uniforms, 1.0

    words = f"{n} rows, prompts of {update.groups[0].prompt} and {own} own tokens"
    yield Case(decode_attention.SPEC, words, attention, Counter())
    yield Case(sample_rows.SPEC, f"[{n}, {m.vocab_size}]", rows, Counter())
