"""linear_logprob: log-probability of each token's target and the entropy at it, without the logits [t, v].

    z_tv = (h_td W_vdᵀ + b_v) / temperature        log_z_t = log Σ_v exp z_tv        p_tv = exp(z_tv − log_z_t)
    logp_t    = z_t[target_t] − log_z_t
    entropy_t = −Σ_v p_tv log p_tv = log_z_t − Σ_v p_tv z_tv                                   (nats)

Backward, which keeps log_z and entropy only and recomputes z from h and W:

    d logp_t / dz_tv = 1[v = target_t] − p_tv        d entropy_t / dz_tv = −p_tv (log p_tv + entropy_t)
    dh_td = dz_tv W_vd / temperature        dW_vd = dz_tvᵀ h_td / temperature        db_v = Σ_t dz_tv / temperature

The head of a LoRA run is frozen, and then dW [v, d] and db are never computed; full fine-tuning needs them.

Memory beside inputs and outputs: one tile of logits of token_chunk · vocab_chunk entries, reused for every chunk, and in the
reference a few temporaries of its shape. FLOPs: 2 t d v forward, 4 t d v backward, 6 with dW.

Implementations. `reference` walks the vocabulary in chunks with a running maximum and rescaled running sums (Milakov & Gimelshein
2018, "Online normalizer calculation for softmax", algorithm 3), in the order of operations of TRL 1.16's ChunkedLogProbFunction on a
CPU (trl/kernels/chunked_logprob.py): with the same chunk sizes logp, entropy and the gradients have its bits. `torch`
takes whole rows of the vocabulary, as many as fill the tile, and leaves them to `logprob_rows`, which overwrites the tile with
dz in the backward pass. `triton` (kernels/fastlora_triton/linear_logprob.py) walks the vocabulary on the chip and stores no logits at all
in the forward pass; it takes a frozen head without a bias.

Precision: sums and everything after the product h Wᵀ run in float32 (float64 when h is); dW and db are accumulated in the same
and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.ops.logprob_rows import logprob_rows, logprob_rows_backward_
from fastlora.ops.registry import Cost, Dispatch, OpSpec, call, tma_refuses


def _accumulation_dtype(hidden_td: Tensor) -> torch.dtype:
    return torch.promote_types(hidden_td.dtype, torch.float32)


def _logit_tiles(
    hidden_td: Tensor, weight_vd: Tensor, bias_v: Tensor | None, token_chunk: int, vocab_chunk: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """(tokens, vocabulary, logits before the temperature). All tiles share their memory: be done with one before the next."""
    t, v = hidden_td.shape[0], weight_vd.shape[0]
    buffer = hidden_td.new_empty(min(t, token_chunk) * min(v, vocab_chunk))
    for token_start in range(0, t, token_chunk):
        tokens = slice(token_start, min(token_start + token_chunk, t))
        for vocab_start in range(0, v, vocab_chunk):
            vocab = slice(vocab_start, min(vocab_start + vocab_chunk, v))
            shape = (tokens.stop - tokens.start, vocab.stop - vocab.start)
            tile_tv = buffer[: math.prod(shape)].view(shape)
            torch.mm(hidden_td[tokens], weight_vd[vocab].t(), out=tile_tv)
            if bias_v is not None:
                tile_tv.add_(bias_v[vocab])
            yield tokens, vocab, tile_tv


def _target_column(targets_t: Tensor, vocab: slice) -> tuple[Tensor, Tensor]:
    """(column [t, 1] of the target in this chunk of the vocabulary, bool [t, 1]: is it there at all?)."""
    column_t1 = (targets_t - vocab.start).unsqueeze(-1)
    last = vocab.stop - vocab.start - 1
    return column_t1.clamp(0, last), (column_t1 >= 0) & (column_t1 <= last)


def _reference(
    hidden_td: Tensor,
    weight_vd: Tensor,
    bias_v: Tensor | None,
    targets_t: Tensor,
    temperature: float,
    with_entropy: bool,
    token_chunk: int,
    vocab_chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp_t, entropy_t, log_z_t); entropy_t is empty [0] when not wanted."""
    t, dtype = hidden_td.shape[0], _accumulation_dtype(hidden_td)
    max_t = hidden_td.new_full((t,), -math.inf, dtype=dtype)
    sum_exp_t = hidden_td.new_zeros(t, dtype=dtype)
    sum_z_exp_t = hidden_td.new_zeros(t if with_entropy else 0, dtype=dtype)
    # A target outside [0, v) is found in no chunk and stays NaN: seen downstream without making a GPU wait for a check.
    target_z_t = hidden_td.new_full((t,), math.nan, dtype=dtype)
    for tokens, vocab, tile_tv in _logit_tiles(hidden_td, weight_vd, bias_v, token_chunk, vocab_chunk):
        z_tv = tile_tv.to(dtype).mul_(1 / temperature)
        column_t1, present_t1 = _target_column(targets_t[tokens], vocab)
        target_z_t[tokens] = torch.where(present_t1, z_tv.gather(-1, column_t1), target_z_t[tokens].unsqueeze(-1)).squeeze(-1)

        new_max_t = torch.maximum(max_t[tokens], z_tv.amax(-1))
        rescale_t = torch.exp(max_t[tokens] - new_max_t)
        exp_tv = (z_tv - new_max_t.unsqueeze(-1)).exp_()
        sum_exp_t[tokens].mul_(rescale_t).add_(exp_tv.sum(-1))
        if with_entropy:
            sum_z_exp_t[tokens].mul_(rescale_t).add_(exp_tv.mul_(z_tv).sum(-1))
        max_t[tokens] = new_max_t

    log_z_t = max_t + torch.log(sum_exp_t)
    entropy_t = log_z_t - sum_z_exp_t / sum_exp_t if with_entropy else sum_z_exp_t
    return target_z_t - log_z_t, entropy_t, log_z_t


_forward = Dispatch("linear_logprob", _reference)


def row_tiles(hidden_td: Tensor, weight_vd: Tensor, bias_v: Tensor | None, tile_elements: int) -> Iterator[tuple[slice, Tensor]]:
    """(tokens, their logits before the temperature), whole rows, at most `tile_elements` entries (but at least a row) at a time."""
    t, v = hidden_td.shape[0], weight_vd.shape[0]
    rows = max(1, tile_elements // v)
    for start in range(0, t, rows):
        tokens = slice(start, min(start + rows, t))
        yield tokens, F.linear(hidden_td[tokens], weight_vd, bias_v)


@_forward.add("torch")
def _by_rows(
    hidden_td: Tensor,
    weight_vd: Tensor,
    bias_v: Tensor | None,
    targets_t: Tensor,
    temperature: float,
    with_entropy: bool,
    token_chunk: int,
    vocab_chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    tiles = row_tiles(hidden_td, weight_vd, bias_v, token_chunk * min(vocab_chunk, weight_vd.shape[0]))
    return forward_of_tiles(tiles, hidden_td, targets_t, temperature, with_entropy)


def forward_of_tiles(
    tiles: Iterable[tuple[slice, Tensor]], hidden_td: Tensor, targets_t: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp_t, entropy_t or empty [0], log_z_t) of tiles of whole rows; hidden_td says dtype and device."""
    outputs = [logprob_rows(z_tv, targets_t[tokens], temperature, with_entropy) for tokens, z_tv in tiles]
    nothing = [hidden_td.new_empty(0, dtype=_accumulation_dtype(hidden_td)) for _ in range(3)]
    logp_t, entropy_t, log_z_t = (torch.cat(parts) for parts in zip(nothing, *outputs, strict=True))
    return logp_t, entropy_t, log_z_t


def _triton_refuses(device: torch.device, *args: Any) -> str | None:
    """The kernels take the frozen head of a decoder, in rows that start on 16 bytes."""
    if (reason := tma_refuses(device, *args)) or not args:
        return reason
    hidden_td, weight_vd, bias_v = args[:3]
    if bias_v is not None:
        return "it takes a head without a bias"
    if hidden_td.dtype != weight_vd.dtype:
        return f"it takes hidden states and head in one dtype, not {hidden_td.dtype} and {weight_vd.dtype}"
    rows = hidden_td.shape[1] * hidden_td.element_size()
    return None if rows % 16 == 0 else f"it needs rows of a multiple of 16 bytes, not {rows}"


@_forward.add("triton", _triton_refuses)
def _triton(
    hidden_td: Tensor,
    weight_vd: Tensor,
    bias_v: Tensor | None,
    targets_t: Tensor,
    temperature: float,
    with_entropy: bool,
    token_chunk: int,
    vocab_chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """No tile of logits leaves the chip: the chunks, which bound it elsewhere, do not matter."""
    from fastlora_triton import linear_logprob as kernels

    return kernels.forward(hidden_td.contiguous(), weight_vd, targets_t, temperature, with_entropy)


linear_logprob_op = _forward.torch_op()


@linear_logprob_op.register_fake
def _(hidden_td, weight_vd, bias_v, targets_t, temperature, with_entropy, token_chunk, vocab_chunk):  # type: ignore[no-untyped-def]
    logp_t = hidden_td.new_empty(hidden_td.shape[0], dtype=_accumulation_dtype(hidden_td))
    return logp_t, torch.empty_like(logp_t) if with_entropy else logp_t.new_empty(0), torch.empty_like(logp_t)


def _reference_backward(
    grad_logp_t: Tensor | None,
    grad_entropy_t: Tensor | None,
    hidden_td: Tensor,
    weight_vd: Tensor,
    bias_v: Tensor | None,
    targets_t: Tensor,
    log_z_t: Tensor,
    entropy_t: Tensor,
    temperature: float,
    token_chunk: int,
    vocab_chunk: int,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dh_td, dw_vd, db_v) in the dtype of h, empty [0] where not needed.

    An incoming gradient that is None contributes nothing and costs nothing.
    """
    dtype = _accumulation_dtype(hidden_td)
    dh_td = hidden_td.new_zeros(hidden_td.shape, dtype=dtype)
    dw_vd = hidden_td.new_zeros(weight_vd.shape if need_dw else 0, dtype=dtype)
    db_v = hidden_td.new_zeros(weight_vd.shape[0] if need_db else 0, dtype=dtype)
    for tokens, vocab, tile_tv in _logit_tiles(hidden_td, weight_vd, bias_v, token_chunk, vocab_chunk):
        log_p_tv = tile_tv.to(dtype).mul_(1 / temperature).sub_(log_z_t[tokens].unsqueeze(-1))
        p_tv = log_p_tv.exp()
        dz_tv = torch.zeros_like(p_tv)
        if grad_logp_t is not None:
            column_t1, present_t1 = _target_column(targets_t[tokens], vocab)
            dz_tv.sub_(p_tv).scatter_add_(-1, column_t1, present_t1.to(dtype))  # 1[v = target] − p
            dz_tv.mul_(grad_logp_t[tokens].unsqueeze(-1))
        if grad_entropy_t is not None:
            log_p_tv.add_(entropy_t[tokens].unsqueeze(-1))
            dz_tv.sub_(p_tv.mul_(grad_entropy_t[tokens].unsqueeze(-1)).mul_(log_p_tv))
        # Rounded to the dtype of h, as the tensor cores of a GPU will want both factors.
        dz_tv = dz_tv.mul_(1 / temperature).to(hidden_td.dtype)
        dh_td[tokens].addmm_(dz_tv.to(dtype), weight_vd[vocab].to(dtype))
        if need_dw:
            dw_vd[vocab].addmm_(dz_tv.t().to(dtype), hidden_td[tokens].to(dtype))
        if need_db:
            db_v[vocab] += dz_tv.sum(dim=0, dtype=dtype)
    return dh_td.to(hidden_td.dtype), dw_vd.to(hidden_td.dtype), db_v.to(hidden_td.dtype)


_backward = Dispatch("linear_logprob_backward", _reference_backward)


@_backward.add("torch")
def _backward_by_rows(
    grad_logp_t: Tensor | None,
    grad_entropy_t: Tensor | None,
    hidden_td: Tensor,
    weight_vd: Tensor,
    bias_v: Tensor | None,
    targets_t: Tensor,
    log_z_t: Tensor,
    entropy_t: Tensor,
    temperature: float,
    token_chunk: int,
    vocab_chunk: int,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tiles = row_tiles(hidden_td, weight_vd, bias_v, token_chunk * min(vocab_chunk, weight_vd.shape[0]))
    saved = (hidden_td, weight_vd, targets_t, log_z_t, entropy_t)
    return backward_of_tiles(tiles, grad_logp_t, grad_entropy_t, *saved, temperature, need_dw, need_db)


def backward_of_tiles(
    tiles: Iterable[tuple[slice, Tensor]],
    grad_logp_t: Tensor | None,
    grad_entropy_t: Tensor | None,
    hidden_td: Tensor,
    weight_vd: Tensor,
    targets_t: Tensor,
    log_z_t: Tensor,
    entropy_t: Tensor,
    temperature: float,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dh_td, dw_vd, db_v) from the tiles of the forward pass, made anew; empty [0] where not needed. The tiles are overwritten."""
    dtype = _accumulation_dtype(hidden_td)
    dw_vd = hidden_td.new_zeros(weight_vd.shape if need_dw else 0, dtype=dtype)
    db_v = hidden_td.new_zeros(weight_vd.shape[0] if need_db else 0, dtype=dtype)
    if grad_logp_t is None and grad_entropy_t is None:
        return torch.zeros_like(hidden_td), dw_vd.to(hidden_td.dtype), db_v.to(hidden_td.dtype)
    dh_td = torch.empty_like(hidden_td)
    d_logp_t = torch.zeros_like(log_z_t) if grad_logp_t is None else grad_logp_t
    for tokens, z_tv in tiles:
        d_entropy, entropy = (None, entropy_t) if grad_entropy_t is None else (grad_entropy_t[tokens], entropy_t[tokens])
        logprob_rows_backward_(z_tv, targets_t[tokens], d_logp_t[tokens], d_entropy, log_z_t[tokens], entropy, temperature)
        dh_td[tokens] = z_tv.mm(weight_vd)
        if need_dw:
            dw_vd += z_tv.t().mm(hidden_td[tokens])
        if need_db:
            db_v += z_tv.sum(dim=0, dtype=dtype)
    return dh_td, dw_vd.to(hidden_td.dtype), db_v.to(hidden_td.dtype)


def _triton_refuses_backward(device: torch.device, *args: Any) -> str | None:
    if not args:
        return tma_refuses(device)
    _, _, hidden_td, weight_vd, bias_v, *_, need_dw, need_db = args
    if reason := _triton_refuses(device, hidden_td, weight_vd, bias_v):
        return reason
    return "it gives no gradient to the head" if need_dw or need_db else None


@_backward.add("triton", _triton_refuses_backward)
def _triton_backward(
    grad_logp_t: Tensor | None,
    grad_entropy_t: Tensor | None,
    hidden_td: Tensor,
    weight_vd: Tensor,
    bias_v: Tensor | None,
    targets_t: Tensor,
    log_z_t: Tensor,
    entropy_t: Tensor,
    temperature: float,
    token_chunk: int,
    vocab_chunk: int,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from fastlora_triton import linear_logprob as kernels

    d_logp_t = torch.zeros_like(log_z_t) if grad_logp_t is None else grad_logp_t
    arguments = (hidden_td.contiguous(), weight_vd, targets_t, d_logp_t, grad_entropy_t, entropy_t, log_z_t, temperature)
    return kernels.backward(*arguments), hidden_td.new_empty(0), hidden_td.new_empty(0)


linear_logprob_backward_op = _backward.torch_op()


@linear_logprob_backward_op.register_fake
def _(grad_logp_t, grad_entropy_t, hidden_td, weight_vd, *rest):  # type: ignore[no-untyped-def]
    need_dw, need_db = rest[-2:]
    shapes = (hidden_td.shape, weight_vd.shape if need_dw else 0, weight_vd.shape[0] if need_db else 0)
    return tuple(hidden_td.new_empty(shape) for shape in shapes)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden_td, weight_vd, bias_v, targets_t, ctx.temperature, ctx.with_entropy, ctx.token_chunk, ctx.vocab_chunk = inputs
    _, entropy_t, log_z_t = output
    ctx.save_for_backward(hidden_td, weight_vd, bias_v, targets_t, log_z_t, entropy_t)
    ctx.mark_non_differentiable(log_z_t)
    # The entropy is often only logged: its missing gradient then stays None instead of becoming a pass over zeros.
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_logp_t: Tensor | None, grad_entropy_t: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if not ctx.with_entropy:
        grad_entropy_t = None  # of the empty output: torch.compile passes it as zeros [0]
    _, need_dw, need_db, *_ = ctx.needs_input_grad
    options = (ctx.temperature, ctx.token_chunk, ctx.vocab_chunk, need_dw, need_db)
    dh_td, dw_vd, db_v = linear_logprob_backward_op(grad_logp_t, grad_entropy_t, *ctx.saved_tensors, *options)
    return dh_td, dw_vd if need_dw else None, db_v if need_db else None, None, None, None, None, None


linear_logprob_op.register_autograd(_autograd, setup_context=_setup_context)


def linear_logprob(
    hidden_td: Tensor,
    weight_vd: Tensor,
    targets_t: Tensor,
    *,
    bias_v: Tensor | None = None,
    temperature: float = 1.0,
    with_entropy: bool = True,
    token_chunk: int = 4096,
    vocab_chunk: int = 32768,
) -> tuple[Tensor, Tensor]:
    """(logp_t, entropy_t), float32 [t] (float64 for float64 inputs), in nats, of a language-model head.

    hidden_td: [t, d]. weight_vd: [v, d], bias_v: [v] or None, both in the dtype of hidden_td. All three are differentiable.
    targets_t: int64 [t], in [0, v). temperature: divides the logits. with_entropy = False saves a pass over each tile and
    returns an empty entropy_t [0]. token_chunk, vocab_chunk: shape of the tile of logits; they do not change the result
    beyond rounding.

    Raises ValueError when shapes or dtypes disagree, temperature is not a positive number, a chunk is empty, or a target is out
    of range. Targets on a GPU are not looked at, which would stall it: there an out-of-range target makes its logp NaN.
    """
    _check(hidden_td, weight_vd, targets_t, bias_v, temperature, token_chunk, vocab_chunk)
    args = (hidden_td, weight_vd, bias_v, targets_t, temperature, with_entropy, token_chunk, vocab_chunk)
    logp_t, entropy_t, _ = call(linear_logprob_op, _forward, *args)
    return logp_t, entropy_t


def _check(
    hidden_td: Tensor,
    weight_vd: Tensor,
    targets_t: Tensor,
    bias_v: Tensor | None,
    temperature: float,
    token_chunk: int,
    vocab_chunk: int,
) -> None:
    (t, d), v = hidden_td.shape, weight_vd.shape[0]
    if weight_vd.shape != (v, d) or targets_t.shape != (t,) or (bias_v is not None and bias_v.shape != (v,)):
        raise ValueError(
            f"linear_logprob: shapes do not fit: hidden_td {tuple(hidden_td.shape)}, weight_vd {tuple(weight_vd.shape)}, "
            f"targets_t {tuple(targets_t.shape)}, bias_v {None if bias_v is None else tuple(bias_v.shape)}"
        )
    for name, head in (("weight_vd", weight_vd), ("bias_v", bias_v)):
        if head is not None and head.dtype != hidden_td.dtype:
            raise ValueError(f"linear_logprob: {name} is {head.dtype} but hidden_td is {hidden_td.dtype}; cast one of them")
    if not 0 < temperature < math.inf:
        raise ValueError(f"linear_logprob: temperature must be a positive number, got {temperature}")
    if token_chunk < 1 or vocab_chunk < 1:
        raise ValueError(f"linear_logprob: chunks must hold at least 1, got token_chunk {token_chunk}, vocab_chunk {vocab_chunk}")
    if t and targets_t.device.type == "cpu":
        low, high = int(targets_t.min()), int(targets_t.max())
        if low < 0 or high >= v:
            raise ValueError(f"linear_logprob: targets span [{low}, {high}], outside the vocabulary [0, {v})")


def cost(hidden_td: Tensor, weight_vd: Tensor, bias_v: Tensor | None, targets_t: Tensor, *options: Any) -> Cost:
    """Forward pass: the head GEMM; h, W, targets and the three outputs once."""
    (t, d), v = hidden_td.shape, weight_vd.shape[0]
    outputs = 3 * t * _accumulation_dtype(hidden_td).itemsize
    return Cost(2 * t * d * v, (t * d + v * d) * hidden_td.element_size() + t * targets_t.element_size() + outputs)


def backward_cost(grad_logp_t: Tensor | None, grad_entropy_t: Tensor | None, hidden_td: Tensor, weight_vd: Tensor, *rest: Any) -> Cost:
    """Backward pass: the head GEMM again, the one for dh and, if wanted, that for dW; h, W, dh, dW and four vectors [t] once."""
    (t, d), v, need_dw = hidden_td.shape, weight_vd.shape[0], rest[-2]
    vectors = 4 * t * _accumulation_dtype(hidden_td).itemsize
    return Cost((6 if need_dw else 4) * t * d * v, (2 * t * d + (1 + need_dw) * v * d) * hidden_td.element_size() + vectors)


def sample_inputs(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Odd token counts and vocabularies; chunks that do not divide them; with and without bias, entropy and a trained head."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    for t, d, v, with_bias, with_entropy, train_head, temperature, token_chunk, vocab_chunk in (
        (0, 8, 97, False, True, False, 1.0, 4096, 32768),
        (1, 8, 97, True, True, False, 0.7, 4096, 32768),
        (63, 24, 97, False, False, False, 1.0, 16, 31),
        (63, 24, 97, True, True, True, 1.3, 20, 32),
        (130, 16, 1031, False, True, True, 0.9, 64, 500),
    ):
        weight_vd, bias_v = randn(v, d).requires_grad_(train_head), randn(v).requires_grad_(train_head) if with_bias else None
        targets_t = torch.randint(v, (t,), generator=generator).to(device)
        options = (temperature, with_entropy, token_chunk, vocab_chunk)
        yield randn(t, d).requires_grad_(), weight_vd, bias_v, targets_t, *options


def backward_sample_inputs(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Any, ...]]:
    """The forward samples with gradients of both outputs, or of logp alone where the entropy was not computed."""
    for hidden_td, weight_vd, bias_v, targets_t, temperature, with_entropy, *chunks in sample_inputs(dtype, device):
        heads = (weight_vd.detach(), None if bias_v is None else bias_v.detach())
        inputs = (hidden_td.detach(), *heads, targets_t)
        logp_t, entropy_t, log_z_t = linear_logprob_op(*inputs, temperature, with_entropy, *chunks)
        needs = (weight_vd.requires_grad, bias_v is not None and bias_v.requires_grad)
        grads = (logp_t.cos(), entropy_t.sin() if with_entropy else None)
        yield *grads, *inputs, log_z_t, entropy_t, temperature, *chunks, *needs


SPEC = OpSpec("linear_logprob", linear_logprob_op, sample_inputs, cost)
BACKWARD_SPEC = OpSpec("linear_logprob_backward", linear_logprob_backward_op, backward_sample_inputs, backward_cost)
