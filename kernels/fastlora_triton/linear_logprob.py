"""linear_logprob on a GPU: log-probability and entropy of tokens from hidden states and the head, without logits in memory.

    z_tv = h_td W_vdᵀ / T        log Z_t = log Σ_v e^z        logp_t = z_t,target − log Z_t        entropy_t = log Z_t − Σ_v p z

Forward: a program holds a tile of rows and one part of the vocabulary; it walks over its vocabulary tiles with a running maximum m, Σ e^(z
− m) and Σ e^(z − m) z (Milakov & Gimelshein 2018, algorithm 3). Parts are joined by `join_parts_kernel`. Gradient, with g_t = dℓ/dlogp and
e_t = dℓ/dentropy:

    dz_tv = (g_t (1[v = target] − p_tv) − e_t p_tv (log p_tv + entropy_t)) / T        dh_td = Σ_v dz_tv W_vd

The logits of a tile are computed again; dz goes to memory for one slab of rows × one slab of the vocabulary at a time and is multiplied
there. Offsets of rows are int64: T × V passes 2³¹ at 16,384 tokens of Qwen's vocabulary.

Not run on a GPU: compiled for sm_90 and run on a CPU (tests/ops/test_triton_linear_logprob.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora_triton.launch import launch
from fastlora_triton.tiles import SMS, tiles_for

OUTSIDE = tl.constexpr(-1e30)
"""Logit behind the vocabulary's end: its e^(z − m) is 0, and 0 · z stays 0, which −inf would make NaN."""


@triton.jit
def _logits(h_desc, w_desc, t0, v0, d, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """h Wᵀ [BLOCK_T, BLOCK_V] from row t0 and vocabulary entry v0, before the temperature. Every other tile of the vocabulary goes through
    d backwards: the end of h is still in L2, of which all rows' h (25 MB for 8,192 tokens of 1,536) may be as much as there is."""
    z = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    back = v0 // BLOCK_V % 2 == 1
    last = (tl.cdiv(d, BLOCK_K) - 1) * BLOCK_K
    for k in range(0, d, BLOCK_K):
        k0 = tl.where(back, last - k, k)
        z = tl.dot(h_desc.load([t0, k0]), w_desc.load([v0, k0]).T, z, input_precision=PRECISION)
    return z


@triton.jit(do_not_specialize=["T", "v_of_a_part"])
def logprob_parts_kernel(
    h_desc,  # [T, d], blocks [BLOCK_T, BLOCK_K]
    w_desc,  # [V, d], blocks [BLOCK_V, BLOCK_K]
    target_ptr,  # int64 [T]
    parts_ptr,  # float32 [4, PARTS, T]: maximum, sum, sum of z, z of the target (OUTSIDE where it lies in another part)
    T,
    V,
    d,
    v_of_a_part,
    inverse_temperature,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    t0 = tl.program_id(0) * BLOCK_T
    part, parts = tl.program_id(1), tl.num_programs(1)
    t, v = t0 + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_V)
    target = tl.load(target_ptr + t, mask=t < T, other=-1).to(tl.int32)  # 64-bit comparisons of a whole tile would spill
    top = tl.full((BLOCK_T,), OUTSIDE, tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    weighted = tl.zeros((BLOCK_T,), tl.float32)
    at_target = tl.full((BLOCK_T,), OUTSIDE, tl.float32)
    for v0 in range(part * v_of_a_part, min((part + 1) * v_of_a_part, V), BLOCK_V):
        z = _logits(h_desc, w_desc, t0, v0, d, BLOCK_T, BLOCK_V, BLOCK_K, PRECISION)
        z = tl.where((v0 + v < V)[None, :], z * inverse_temperature, OUTSIDE)
        at_target = tl.maximum(at_target, tl.max(tl.where(v[None, :] == (target - v0)[:, None], z, OUTSIDE), axis=1))
        higher = tl.maximum(top, tl.max(z, axis=1))
        shrink = tl.exp(top - higher)
        e = tl.exp(z - higher[:, None])
        total = total * shrink + tl.sum(e, axis=1)
        weighted = weighted * shrink + tl.sum(e * z, axis=1)
        top = higher
    out = parts_ptr + part * T + t
    tl.store(out, top, mask=t < T)
    tl.store(out + parts * T, total, mask=t < T)
    tl.store(out + 2 * parts * T, weighted, mask=t < T)
    tl.store(out + 3 * parts * T, at_target, mask=t < T)


@triton.jit(do_not_specialize=["T", "parts"])
def join_parts_kernel(parts_ptr, logp_ptr, entropy_ptr, log_z_ptr, T, parts, BLOCK: tl.constexpr):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = t < T
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    at_target = tl.full((BLOCK,), -float("inf"), tl.float32)
    for part in range(parts):
        top = tl.maximum(top, tl.load(parts_ptr + part * T + t, mask=there, other=0.0))
        at_target = tl.maximum(at_target, tl.load(parts_ptr + (3 * parts + part) * T + t, mask=there, other=0.0))
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        factor = tl.exp(tl.load(parts_ptr + part * T + t, mask=there, other=0.0) - top)
        total += factor * tl.load(parts_ptr + (parts + part) * T + t, mask=there, other=1.0)
        weighted += factor * tl.load(parts_ptr + (2 * parts + part) * T + t, mask=there, other=0.0)
    log_z = top + tl.log(total)
    tl.store(log_z_ptr + t, log_z, mask=there)
    tl.store(logp_ptr + t, at_target - log_z, mask=there)
    tl.store(entropy_ptr + t, log_z - weighted / total, mask=there)


def forward(h_td: Tensor, w_vd: Tensor, target_t: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(logp_t, entropy_t, log_z_t) float32. h_td, w_vd: one dtype; target_t: int64 in [0, V); one outside gives about −1e30."""
    tiles = tiles_for(h_td)
    t, d = h_td.shape
    v = w_vd.shape[0]
    logp_t, entropy_t, log_z_t = (torch.empty(t, dtype=torch.float32, device=h_td.device) for _ in range(3))
    if t == 0:
        return logp_t, entropy_t, log_z_t
    vocabulary_tiles = triton.cdiv(v, tiles.v)
    row_tiles = triton.cdiv(t, tiles.t)
    tiles_of_a_part = triton.cdiv(vocabulary_tiles, _parts(row_tiles, vocabulary_tiles))
    parts = triton.cdiv(vocabulary_tiles, tiles_of_a_part)  # none is empty: an empty part would have the maximum −inf
    partial = torch.empty(4, parts, t, dtype=torch.float32, device=h_td.device)
    launch(
        logprob_parts_kernel,
        (row_tiles, parts),
        TensorDescriptor.from_tensor(h_td, [tiles.t, tiles.k]),
        TensorDescriptor.from_tensor(w_vd, [tiles.v, tiles.k]),
        target_t,
        partial,
        t,
        v,
        d,
        tiles_of_a_part * tiles.v,
        1.0 / temperature,
        BLOCK_T=tiles.t,
        BLOCK_V=tiles.v,
        BLOCK_K=tiles.k,
        PRECISION=tiles.precision,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    launch(join_parts_kernel, (triton.cdiv(t, 256),), partial, logp_t, entropy_t, log_z_t, t, parts, BLOCK=256, num_warps=4)
    return logp_t, entropy_t, log_z_t


def _parts(row_tiles: int, vocabulary_tiles: int) -> int:
    """Into how many parts the vocabulary is split: whatever ends soonest, of those the fewest. 64 row tiles take 2 parts: 128 programs, all
    at once on 132 SMs (one fits an SM), so that W is read once."""
    most = min(triton.cdiv(2 * SMS, row_tiles), vocabulary_tiles)
    return min(range(1, most + 1), key=lambda parts: triton.cdiv(row_tiles * parts, SMS) / parts)


@triton.jit(do_not_specialize=["T", "first_v"])
def logit_gradient_kernel(
    h_desc,  # [T, d], blocks [BLOCK_T, BLOCK_K]
    w_desc,  # [V, d], blocks [BLOCK_V, BLOCK_K]
    dz_desc,  # [T, width of the slab], blocks [BLOCK_T, BLOCK_V]
    target_ptr,
    dlogp_ptr,
    dentropy_ptr,
    entropy_ptr,
    log_z_ptr,
    T,
    V,
    d,
    first_v,
    inverse_temperature,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    t0, slab0 = tl.program_id(0) * BLOCK_T, tl.program_id(1) * BLOCK_V
    v0 = first_v + slab0
    z = _logits(h_desc, w_desc, t0, v0, d, BLOCK_T, BLOCK_V, BLOCK_K, PRECISION)
    t, v = t0 + tl.arange(0, BLOCK_T), v0 + tl.arange(0, BLOCK_V)
    there = t < T
    log_z = tl.load(log_z_ptr + t, mask=there, other=0.0)
    target = tl.load(target_ptr + t, mask=there, other=-1)
    dlogp = tl.load(dlogp_ptr + t, mask=there, other=0.0)
    dentropy = tl.load(dentropy_ptr + t, mask=there, other=0.0)
    entropy = tl.load(entropy_ptr + t, mask=there, other=0.0)
    log_p = z * inverse_temperature - log_z[:, None]
    p = tl.where((v < V)[None, :], tl.exp(log_p), 0.0)
    one_hot = (v[None, :] == target[:, None]).to(tl.float32)
    dz = dlogp[:, None] * (one_hot - p) - dentropy[:, None] * p * (log_p + entropy[:, None])
    dz_desc.store([t0, slab0], (dz * inverse_temperature).to(dz_desc.dtype))


def backward(
    h_td: Tensor,
    w_vd: Tensor,
    target_t: Tensor,
    dlogp_t: Tensor,
    dentropy_t: Tensor,
    entropy_t: Tensor,
    log_z_t: Tensor,
    temperature: float,
    slab: int = 8192,
) -> Tensor:
    """dh [t, d]: the logits' gradient of `slab` vocabulary entries at a time, then a GEMM that adds its product (in h's dtype) in
    float32."""
    tiles = tiles_for(h_td)
    (t, d), v = h_td.shape, w_vd.shape[0]
    dh_td = torch.zeros(t, d, dtype=torch.float32, device=h_td.device)
    if t == 0:
        return dh_td.to(h_td.dtype)
    dz = h_td.new_empty(t, min(slab, triton.cdiv(v, tiles.n) * tiles.n))
    for first in range(0, v, dz.shape[1]):
        width = min(dz.shape[1], v - first)
        launch(
            logit_gradient_kernel,
            (triton.cdiv(t, tiles.t), triton.cdiv(width, tiles.n)),
            TensorDescriptor.from_tensor(h_td, [tiles.t, tiles.k]),
            TensorDescriptor.from_tensor(w_vd, [tiles.n, tiles.k]),
            TensorDescriptor.from_tensor(dz, [tiles.t, tiles.n]),
            target_t,
            dlogp_t,
            dentropy_t,
            entropy_t,
            log_z_t,
            t,
            v,
            d,
            first,
            1.0 / temperature,
            BLOCK_T=tiles.t,
            BLOCK_V=tiles.n,
            BLOCK_K=tiles.k,
            PRECISION=tiles.precision,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        dh_td += dz[:, :width] @ w_vd[first : first + width]
    return dh_td.to(h_td.dtype)
