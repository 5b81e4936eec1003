"""lora_linear: frozen projections with LoRA for a group of modules that read the same input, a rank for each.

    y_m = x W_mᵀ + b_m + s_m (x A_mᵀ) B_mᵀ                       for every module m of the group

Shapes: x [*, d]; W_m [n_m, d]; A_m [r_m, d]; B_m [n_m, r_m]. The A of the group is one matrix `a_rd` [R, d], R = Σ r_m, rows in the
order of the modules. The B of the group is one flat vector `b_flat`, B_mᵀ [r_m, n_m] after B_{m-1}ᵀ, so that rows stay
aligned at any rank. r_m = 0 is a plain frozen projection.

Backward, with dH_m = s_m dY_m B_m [t, r_m] and H_m = x A_mᵀ [t, r_m]:

    dA_m = dH_mᵀ x        dB_m = (s_m dY_mᵀ H_m) ∘ mask_m        dX = Σ_m dY_m W_m + dH_m A_m

W and b are frozen and get no gradient; the mask selects the entries of B that train (it does not change the forward pass).

FLOPs (forward): 2 t d Σ n_m for the base, 2 t R d + 2 t Σ r_m n_m for the adapter; the backward costs the same for dX, plus the
adapter's once more for dA and dB, and never the 2 t d Σ n_m of a weight gradient that a trained W would need.

Implementations: `reference` works module by module in PEFT's order of operations, bit for bit (peft/tuners/lora/layer.py,
Linear.forward, and what autograd derives from it); `torch` shares one shrink GEMM and accumulates into the base GEMM's output; `triton`
(kernels/fastlora_triton/lora_linear.py, lora_linear_backward.py) takes the group's W as one matrix, which `lora.packed.attach` makes of
them on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.nf4 import dense
from fastlora.ops.registry import Cost, Dispatch, OpSpec, call, tma_refuses
from fastlora_triton.group_layout import rank_columns


def module_b(b_flat: Tensor, outs: Sequence[int], ranks: Sequence[int]) -> list[Tensor]:
    """B_mᵀ [r_m, n_m] of every module, as views of the flat vector."""
    sizes = [n * r for n, r in zip(outs, ranks, strict=True)]
    return [part.view(r, n) for part, r, n in zip(b_flat.split(sizes), ranks, outs, strict=True)]


def _outs(weights_nd: Sequence[Tensor]) -> list[int]:
    return [w.shape[0] for w in weights_nd]


def _reference(
    x: Tensor,
    weights_nd: Sequence[Tensor],
    biases_n: Sequence[Tensor | None],
    a_rd: Tensor,
    b_flat: Tensor,
    b_mask: Tensor | None,
    ranks: Sequence[int],
    scales: Sequence[float],
    absmaxes: Sequence[Tensor],
) -> list[Tensor]:
    """[y_m for every module] + [h], h [*, R] = x a_rdᵀ kept for the backward pass."""
    h = [F.linear(x.to(a_rd.dtype), a) for a in a_rd.split(list(ranks))]
    outputs = []
    for m, (bias, b_rn, h_m, rank, scale) in enumerate(
        zip(biases_n, module_b(b_flat, _outs(weights_nd), ranks), h, ranks, scales, strict=True)
    ):
        y = F.linear(x, dense(weights_nd, absmaxes, m, x.dtype), bias)
        if rank:
            # PEFT keeps B as [n, r] contiguous; the copy gives the GEMM the same operand layout, hence the same bits.
            y = (y + F.linear(h_m, b_rn.t().contiguous()) * scale).to(y.dtype)
        outputs.append(y)
    return [*outputs, torch.cat(h, dim=-1)]


def _add_product(target: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0) -> None:
    """target += alpha · left @ right: one GEMM, or in the adapter's dtype and rounded once where that is wider than target's."""
    if left.dtype == target.dtype:
        target.addmm_(left, right, alpha=alpha)
    else:
        target.add_(left @ right, alpha=alpha)


_forward = Dispatch("lora_linear", _reference)


@_forward.add("torch")
def _grouped(
    x: Tensor,
    weights_nd: Sequence[Tensor],
    biases_n: Sequence[Tensor | None],
    a_rd: Tensor,
    b_flat: Tensor,
    b_mask: Tensor | None,
    ranks: Sequence[int],
    scales: Sequence[float],
    absmaxes: Sequence[Tensor],
) -> list[Tensor]:
    x_td = x.reshape(-1, x.shape[-1])
    h_tr = x_td.to(a_rd.dtype) @ a_rd.t()
    outputs = []
    for m, (bias, b_rn, h_m, rank, scale) in enumerate(
        zip(biases_n, module_b(b_flat, _outs(weights_nd), ranks), h_tr.split(list(ranks), dim=1), ranks, scales, strict=True)
    ):
        y_tn = F.linear(x_td, dense(weights_nd, absmaxes, m, x.dtype), bias)
        if rank:
            _add_product(y_tn, h_m, b_rn, scale)
        outputs.append(y_tn.view(*x.shape[:-1], y_tn.shape[1]))
    return [*outputs, h_tr.view(*x.shape[:-1], a_rd.shape[0])]


def joined(weights_nd: Sequence[Tensor]) -> Tensor | None:
    """The matrix [Σ n_m, d] that the W_m are adjacent rows of, or None when they lie apart."""
    first, end = weights_nd[0], weights_nd[0].storage_offset()
    for weight in weights_nd:
        same = weight.untyped_storage()._cdata == first.untyped_storage()._cdata
        if not same or weight.storage_offset() != end or not weight.is_contiguous():
            return None
        end += weight.numel()
    return first.as_strided((sum(_outs(weights_nd)), first.shape[1]), (first.shape[1], 1))


def _triton_refuses(device: torch.device, *args: Any) -> str | None:
    """Of the forward pass; the kernels count on rows that start on 16 bytes."""
    if (reason := tma_refuses(device, *args)) or not args:
        return reason
    x, weights_nd, _, a_rd, *_, absmaxes = args
    if absmaxes:
        return "it takes dense weights, these are packed in 4 bits"
    if a_rd.dtype != x.dtype:
        return f"it runs adapter and input in one dtype, not {a_rd.dtype} beside {x.dtype}"
    widths = [x.shape[-1], *_outs(weights_nd)]
    if odd := [n for n in widths if n % 8]:
        return f"it needs widths that are multiples of 8, not {odd[0]}"
    return None if joined(weights_nd) is not None else "the weights of the group are not one matrix (lora.packed.attach joins them)"


@_forward.add("triton", _triton_refuses)
def _triton(
    x: Tensor,
    weights_nd: Sequence[Tensor],
    biases_n: Sequence[Tensor | None],
    a_rd: Tensor,
    b_flat: Tensor,
    b_mask: Tensor | None,
    ranks: Sequence[int],
    scales: Sequence[float],
    absmaxes: Sequence[Tensor],
) -> list[Tensor]:
    """h comes back as [*, P], a module's ranks rounded up to 16."""
    from fastlora_triton import lora_linear as kernels

    x_td, outs = x.reshape(-1, x.shape[-1]), _outs(weights_nd)
    bias_n = None
    if any(bias is not None for bias in biases_n):
        bias_n = torch.cat([x.new_zeros(n) if bias is None else bias for bias, n in zip(biases_n, outs, strict=True)])
    ys, h_tp = kernels.forward(x_td, joined(weights_nd), bias_n, a_rd, b_flat, outs, ranks, scales)
    return [part.view(*x.shape[:-1], part.shape[1]) for part in (*ys, h_tp)]


lora_linear_op = _forward.torch_op()


@lora_linear_op.register_fake
def _(x, weights_nd, biases_n, a_rd, b_flat, b_mask, ranks, scales, absmaxes):  # type: ignore[no-untyped-def]
    lead = x.shape[:-1]
    kept = a_rd.shape[0]
    if _forward.select(x.device, x, weights_nd, biases_n, a_rd, b_flat, b_mask, ranks, scales, absmaxes).name == "triton":
        kept = rank_columns(ranks)
    return [x.new_empty(*lead, w.shape[0]) for w in weights_nd] + [x.new_empty(*lead, kept, dtype=a_rd.dtype)]


def _reference_backward(
    dys: Sequence[Tensor],
    x: Tensor,
    h: Tensor,
    weights_nd: Sequence[Tensor],
    a_rd: Tensor,
    b_flat: Tensor,
    b_mask: Tensor | None,
    ranks: Sequence[int],
    scales: Sequence[float],
    need_dx: bool,
    need_da: bool,
    absmaxes: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums into dX run from the last module to the first, LoRA branch before base: the order in which autograd's engine reaches
    the nodes of PEFT's graph (latest created first). A different order changes the last bit of every gradient below.
    """
    x_td = x.reshape(-1, x.shape[-1]).to(a_rd.dtype)
    h_tr = h.reshape(len(x_td), a_rd.shape[0])
    da_rd = torch.zeros_like(a_rd) if need_da else a_rd.new_empty(0)
    db_flat = torch.zeros_like(b_flat)
    outs = _outs(weights_nd)
    parts = list(
        zip(
            range(len(dys)),
            dys,
            a_rd.split(list(ranks)),
            da_rd.split(list(ranks)) if need_da else [da_rd] * len(ranks),
            module_b(b_flat, outs, ranks),
            module_b(db_flat, outs, ranks),
            h_tr.split(list(ranks), dim=1),
            ranks,
            scales,
            strict=True,
        )
    )
    dx_td: Tensor | None = None
    for m, dy, a_m, da_m, b_rn, db_rn, h_m, rank, scale in reversed(parts):
        terms = []
        dy_tn = dy.reshape(-1, outs[m])
        if rank:
            ds_tn = (dy.to(a_rd.dtype) * scale).reshape(-1, outs[m])
            db_rn.copy_(ds_tn.t().mm(h_m.contiguous()).t())
            if need_da or need_dx:
                dh_tr = ds_tn.mm(b_rn.t().contiguous())
            if need_da:
                da_m.copy_(dh_tr.t().mm(x_td))
            if need_dx:
                terms.append(dh_tr.mm(a_m).to(x.dtype))
        if need_dx:
            terms.append(dy_tn.mm(dense(weights_nd, absmaxes, m, x.dtype)))
        for term in terms:
            dx_td = term if dx_td is None else dx_td + term
    if b_mask is not None:
        db_flat.mul_(b_mask)
    return (x.new_empty(0) if dx_td is None else dx_td.view(x.shape)), da_rd, db_flat


_backward = Dispatch("lora_linear_backward", _reference_backward)


@_backward.add("torch")
def _grouped_backward(
    dys: Sequence[Tensor],
    x: Tensor,
    h: Tensor,
    weights_nd: Sequence[Tensor],
    a_rd: Tensor,
    b_flat: Tensor,
    b_mask: Tensor | None,
    ranks: Sequence[int],
    scales: Sequence[float],
    need_dx: bool,
    need_da: bool,
    absmaxes: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    x_td = x.reshape(-1, x.shape[-1])
    h_tr = h.reshape(len(x_td), a_rd.shape[0])
    dh_tr, db_flat = torch.empty_like(h_tr), torch.empty_like(b_flat)
    outs = _outs(weights_nd)
    dx_td: Tensor | None = None
    for m, dy, b_rn, db_rn, h_m, dh_m, scale in zip(
        range(len(dys)),
        dys,
        module_b(b_flat, outs, ranks),
        module_b(db_flat, outs, ranks),
        h_tr.split(list(ranks), dim=1),
        dh_tr.split(list(ranks), dim=1),
        scales,
        strict=True,
    ):
        dy_tn = dy.reshape(-1, outs[m])
        dy_a = dy_tn.to(a_rd.dtype)
        if need_da or need_dx:  # neither: the lowest group of an adapter whose A is frozen
            torch.addmm(dh_m, dy_a, b_rn.t(), beta=0, alpha=scale, out=dh_m)
        torch.addmm(db_rn, h_m.t(), dy_a, beta=0, alpha=scale, out=db_rn)
        if not need_dx:
            continue
        weight = dense(weights_nd, absmaxes, m, x.dtype)
        if dx_td is None:
            dx_td = dy_tn.mm(weight)
        else:
            _add_product(dx_td, dy_tn, weight)
    if dx_td is not None:
        _add_product(dx_td, dh_tr, a_rd)
    if b_mask is not None:
        db_flat.mul_(b_mask)
    da_rd = dh_tr.t().mm(x_td.to(a_rd.dtype)) if need_da else a_rd.new_empty(0)
    return (x.new_empty(0) if dx_td is None else dx_td.view(x.shape)), da_rd, db_flat


def _triton_refuses_backward(device: torch.device, *args: Any) -> str | None:
    if not args:
        return tma_refuses(device)
    _, x, h, weights_nd, a_rd, *_, ranks, _, _, _, absmaxes = args
    if reason := _triton_refuses(device, x, weights_nd, None, a_rd, absmaxes):
        return reason
    kept = rank_columns(ranks)
    return None if h.shape[-1] == kept else f"the forward pass kept h with {h.shape[-1]} columns, it needs {kept}"


@_backward.add("triton", _triton_refuses_backward)
def _triton_backward(
    dys: Sequence[Tensor],
    x: Tensor,
    h: Tensor,
    weights_nd: Sequence[Tensor],
    a_rd: Tensor,
    b_flat: Tensor,
    b_mask: Tensor | None,
    ranks: Sequence[int],
    scales: Sequence[float],
    need_dx: bool,
    need_da: bool,
    absmaxes: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    from fastlora_triton import lora_linear_backward as kernels

    outs = _outs(weights_nd)
    dys_tn = [dy.reshape(-1, n).contiguous() for dy, n in zip(dys, outs, strict=True)]
    x_td = x.reshape(-1, x.shape[-1])
    h_tp, w_nd = h.reshape(len(x_td), h.shape[-1]), joined(weights_nd)
    dx, da_rd, db_flat = kernels.backward(dys_tn, x_td, h_tp, w_nd, a_rd, b_flat, b_mask, outs, ranks, scales, need_dx, need_da)
    return dx.view(x.shape) if need_dx else dx, da_rd, db_flat


lora_linear_backward_op = _backward.torch_op()


@lora_linear_backward_op.register_fake
def _(dys, x, h, weights_nd, a_rd, b_flat, b_mask, ranks, scales, need_dx, need_da, absmaxes):  # type: ignore[no-untyped-def]
    dx = x.new_empty(x.shape) if need_dx else x.new_empty(0)
    return dx, torch.empty_like(a_rd) if need_da else a_rd.new_empty(0), torch.empty_like(b_flat)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights_nd, biases_n, a_rd, b_flat, b_mask, ranks, scales, absmaxes = inputs
    # Only dA reads x: a frozen A keeps its shape alone, and the activations of a layer of SmolLM2 shrink by a third.
    kept_x = x if a_rd.requires_grad else x.new_empty(()).expand(x.shape)
    ctx.save_for_backward(kept_x, output[-1], a_rd, b_flat, b_mask, *weights_nd, *absmaxes)
    ctx.ranks, ctx.scales = ranks, scales
    # torch.library wants the gradients of a list of tensors as a list, and sees a list with a None in it as one argument.
    ctx.bias_grads = None if any(bias is None for bias in biases_n) else [None] * len(biases_n)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    x, h, a_rd, b_flat, b_mask, *frozen = ctx.saved_tensors
    weights_nd, absmaxes = frozen[: len(ctx.ranks)], frozen[len(ctx.ranks) :]
    dys = [x.new_zeros(*x.shape[:-1], weight.shape[0]) if dy is None else dy for dy, weight in zip(grads[:-1], weights_nd, strict=True)]
    need_dx, need_da = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    options = (ctx.ranks, ctx.scales, need_dx, need_da, absmaxes)
    dx, da_rd, db_flat = lora_linear_backward_op(dys, x, h, weights_nd, a_rd, b_flat, b_mask, *options)
    frozen_grads = [None] * len(weights_nd), ctx.bias_grads
    return dx if need_dx else None, *frozen_grads, da_rd if need_da else None, db_flat, None, None, None, [None] * len(absmaxes)


lora_linear_op.register_autograd(_autograd, setup_context=_setup_context)


def lora_linear(
    x: Tensor,
    weights_nd: Sequence[Tensor],
    biases_n: Sequence[Tensor | None],
    a_rd: Tensor,
    b_flat: Tensor,
    ranks: Sequence[int],
    scales: Sequence[float],
    b_mask: Tensor | None = None,
    absmaxes: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Outputs y_m [*, n_m] of a group of projections that share the input x [*, d].

    weights_nd: frozen W_m [n_m, d], dtype of x. biases_n: frozen [n_m] or None each. a_rd: [R, d]. b_flat: [Σ r_m n_m], B_mᵀ one after
    another. a_rd and b_flat share a dtype: that of x, or float32 beside a bfloat16 x (PEFT's default; the adapter branch then runs
    in float32). b_mask: bool [Σ r_m n_m], entries of B that receive gradient; None = all. absmaxes: given when every W_m is packed in 4
    bits, uint8 [n_m, d / 2] (fastlora/nf4.py): it is unpacked for a product and thrown away, in both passes. Differentiable in x, a_rd
    and b_flat.

    Raises ValueError when ranks and shapes disagree.
    """
    outs = _outs(weights_nd)
    if a_rd.shape != (sum(ranks), x.shape[-1]) or b_flat.numel() != sum(n * r for n, r in zip(outs, ranks, strict=True)):
        raise ValueError(
            f"lora_linear: a_rd {tuple(a_rd.shape)} and b_flat {tuple(b_flat.shape)} do not fit ranks {list(ranks)}, "
            f"outputs {outs} and input width {x.shape[-1]}"
        )
    return call(lora_linear_op, _forward, x, weights_nd, biases_n, a_rd, b_flat, b_mask, list(ranks), list(scales), list(absmaxes))[:-1]


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def cost(
    x: Tensor, weights_nd: Sequence[Tensor], biases_n: Any, a_rd: Tensor, b_flat: Tensor, b_mask: Any, ranks: Sequence[int], *rest: Any
) -> Cost:
    """Forward pass: base and adapter GEMMs; x, W (packed, if it is), A, B and every y and h once."""
    _, absmaxes = rest
    t, d, outs = x.numel() // x.shape[-1], x.shape[-1], _outs(weights_nd)
    flops = 2 * t * (d * sum(outs) + d * sum(ranks) + sum(n * r for n, r in zip(outs, ranks, strict=True)))
    activations, adapter = t * (d + sum(outs)) * x.element_size(), (a_rd.numel() + b_flat.numel() + t * sum(ranks)) * a_rd.element_size()
    return Cost(flops, activations + _bytes(weights_nd) + _bytes(absmaxes) + adapter)


def sample_inputs(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Odd token counts and mixed ranks, with and without biases and mask; 2-d and 3-d inputs."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    d = 24
    for lead, ranks, with_bias, with_mask in (
        ((0,), (3,), False, False),
        ((1,), (1, 0, 17), True, False),
        ((63,), (0, 3, 17), True, True),
        ((2, 5), (0, 1), False, True),
    ):
        outs = [40, 16, 33][: len(ranks)]
        size = sum(n * r for n, r in zip(outs, ranks, strict=True))
        yield (
            randn(*lead, d).requires_grad_(),
            [randn(n, d) for n in outs],
            [randn(n) if with_bias else None for n in outs],
            randn(sum(ranks), d).requires_grad_(),
            randn(size).requires_grad_(),
            (torch.rand(size, generator=generator) < 0.5).to(device) if with_mask else None,
            list(ranks),
            [0.5 + m for m in range(len(ranks))],
            [],
        )


def backward_cost(dys: Any, x: Tensor, h: Tensor, weights_nd: Sequence[Tensor], a_rd: Tensor, b_flat: Tensor, *options: Any) -> Cost:
    """Backward pass with all outputs: base GEMMs of dX, two adapter GEMMs each for dA, dB and the branch of dX; every tensor once."""
    _, ranks, _, need_dx, need_da, absmaxes = options
    t, d, outs = x.numel() // x.shape[-1], x.shape[-1], _outs(weights_nd)
    expand, shrink = sum(n * r for n, r in zip(outs, ranks, strict=True)), d * sum(ranks)
    flops = 2 * t * (2 * expand + (shrink if need_da else 0) + (d * sum(outs) + shrink if need_dx else 0))
    activations = t * (d + sum(outs) + (d if need_dx else 0)) * x.element_size()
    adapter = (h.numel() + a_rd.numel() * (2 if need_da else 1) + 2 * b_flat.numel()) * a_rd.element_size()
    return Cost(flops, activations + (_bytes(weights_nd) + _bytes(absmaxes) if need_dx else 0) + adapter)


def backward_sample_inputs(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Any, ...]]:
    """The forward samples with a gradient for every output; with dX, with dA, with both and with neither."""
    for index, (x, weights_nd, _, a_rd, b_flat, b_mask, ranks, scales, absmaxes) in enumerate(sample_inputs(dtype, device)):
        x, a_rd, b_flat = x.detach(), a_rd.detach(), b_flat.detach()
        dys = [F.linear(x, w).cos() for w in weights_nd]
        yield dys, x, F.linear(x, a_rd), weights_nd, a_rd, b_flat, b_mask, ranks, scales, index != 1, index % 2 == 0, absmaxes


SPEC = OpSpec("lora_linear", lora_linear_op, sample_inputs, cost)
BACKWARD_SPEC = OpSpec("lora_linear_backward", lora_linear_backward_op, backward_sample_inputs, backward_cost)
