"""linear_logprob on a GPU: log-probability and entropy of tokens from hidden states and the head, without logits in memory.

    z_tv = h_td W_vdᵀ / T        log Z_t = log Σ_v e^z        logp_t = z_t,target − log Z_t        entropy_t = log Z_t − Σ_v p z

Forward: a program holds a tile of rows and one part of the vocabulary; it walks over its vocabulary tiles with a running maximum m, Σ e^(z
− m) and Σ e^(z − m) z (Milakov & Gimelshein 2018, algorithm 3). Parts are joined by `join_parts_kernel`. Gradient, with g_t = dℓ/dlogp and
e_t = dℓ/dentropy:

    dz_tv = (g_t (1[v = target] − p_tv) − e_t p_tv (log p_tv + entropy_t)) / T        dh_td = Σ_v dz_tv W_vd

The logits of a tile are computed again; dz goes to memory for one slab of rows × one slab of the vocabulary at a time and is multiplied
there. Offsets of rows are int64: T × V passes 2³¹ at 16,384 tokens of Qwen's vocabulary.

sm_90, bf16: logprob_parts_kernel 255 registers, one CTA an SM, no spill; from memory 1.00 × compulsory with 50 MB of L2 and 2.89 × with 25
(8,192 tokens of 1,536 are 25.2 MB of h). logit_gradient_kernel 196 registers, one CTA; 2.11 × with 25 MB.

Not run on a GPU: compiled for sm_80, sm_90 and sm_100 and run on a CPU (tests/ops/test_triton_linear_logprob.py); docs/kernels.md has all
machine codes, docs/bytes.md the model of L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora_triton.launch import launch
from fastlora_triton.tiles import Tiles, multiprocessors, tiles_for

OUTSIDE = tl.constexpr(-1e30)
"""Logit behind the vocabulary's end: its e^(z − m) is 0, and 0 · z stays 0, which −inf would make NaN."""


@triton.jit
def _logits(h_desc, w_desc, t0, v0, d, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """h Wᵀ [BLOCK_T, BLOCK_V] from row t0 and vocabulary entry v0, before the temperature.

    Every other tile of the vocabulary goes through d backwards: the end of h is still in L2, of which all rows' h alone (25 MB for 8,192
    tokens of 1,536) may be as much as there is.
    """
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
    WITH_ENTROPY: tl.constexpr,
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
        if WITH_ENTROPY:
            weighted = weighted * shrink + tl.sum(e * z, axis=1)
        top = higher
    out = parts_ptr + part * T + t
    tl.store(out, top, mask=t < T)
    tl.store(out + parts * T, total, mask=t < T)
    if WITH_ENTROPY:
        tl.store(out + 2 * parts * T, weighted, mask=t < T)
    tl.store(out + 3 * parts * T, at_target, mask=t < T)


@triton.jit(do_not_specialize=["T", "parts"])
def join_parts_kernel(
    parts_ptr, target_ptr, logp_ptr, entropy_ptr, log_z_ptr, T, V, parts, WITH_ENTROPY: tl.constexpr, BLOCK: tl.constexpr
):
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
        if WITH_ENTROPY:
            weighted += factor * tl.load(parts_ptr + (2 * parts + part) * T + t, mask=there, other=0.0)
    log_z = top + tl.log(total)
    target = tl.load(target_ptr + t, mask=there, other=0)
    at_target = tl.where((target >= 0) & (target < V), at_target, float("nan"))  # seen downstream; a check would make the GPU wait
    tl.store(log_z_ptr + t, log_z, mask=there)
    tl.store(logp_ptr + t, at_target - log_z, mask=there)
    if WITH_ENTROPY:
        tl.store(entropy_ptr + t, log_z - weighted / total, mask=there)


def forward(h_td: Tensor, w_vd: Tensor, target_t: Tensor, temperature: float, with_entropy: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """(logp_t, entropy_t or empty [0], log_z_t) float32. h_td, w_vd: one dtype; target_t: int64, logp is NaN outside [0, V)."""
    tiles, t = tiles_for(h_td), h_td.shape[0]
    logp_t, log_z_t = (torch.empty(t, dtype=torch.float32, device=h_td.device) for _ in range(2))
    entropy_t = torch.empty(t if with_entropy else 0, dtype=torch.float32, device=h_td.device)
    if t == 0:
        return logp_t, entropy_t, log_z_t
    partial = _parts(h_td, w_vd, target_t, temperature, with_entropy, tiles)
    launch(
        join_parts_kernel,
        (triton.cdiv(t, 256),),
        partial,
        target_t,
        logp_t,
        entropy_t if with_entropy else logp_t,  # not written without
        log_z_t,
        t,
        w_vd.shape[0],
        partial.shape[1],
        WITH_ENTROPY=with_entropy,
        BLOCK=256,
        num_warps=4,
    )
    return logp_t, entropy_t, log_z_t


def _parts(h_td: Tensor, w_vd: Tensor, target_t: Tensor, temperature: float, with_entropy: bool, tiles: Tiles) -> Tensor:
    """float32 [4, parts, t]: see `logprob_parts_kernel`."""
    (t, d), v = h_td.shape, w_vd.shape[0]
    vocabulary_tiles, row_tiles = triton.cdiv(v, tiles.v), triton.cdiv(t, tiles.t)
    tiles_of_a_part = triton.cdiv(vocabulary_tiles, best_parts(row_tiles, vocabulary_tiles, multiprocessors(h_td.device)))
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
        WITH_ENTROPY=with_entropy,
        BLOCK_T=tiles.t,
        BLOCK_V=tiles.v,
        BLOCK_K=tiles.k,
        PRECISION=tiles.precision,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return partial


def best_parts(row_tiles: int, vocabulary_tiles: int, sms: int) -> int:
    """Into how many parts the vocabulary is split: whatever ends soonest, of those the fewest.

    64 row tiles take 2 parts: 128 programs, all at once on 132 SMs (one fits an SM), so that W is read once.
    """
    most = min(triton.cdiv(2 * sms, row_tiles), vocabulary_tiles)
    return min(range(1, most + 1), key=lambda parts: triton.cdiv(row_tiles * parts, sms) / parts)


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
    HAS_DENTROPY: tl.constexpr,
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
    log_p = z * inverse_temperature - log_z[:, None]
    p = tl.where((v < V)[None, :], tl.exp(log_p), 0.0)
    one_hot = (v[None, :] == target[:, None]).to(tl.float32)
    dz = dlogp[:, None] * (one_hot - p)
    if HAS_DENTROPY:
        dentropy = tl.load(dentropy_ptr + t, mask=there, other=0.0)
        entropy = tl.load(entropy_ptr + t, mask=there, other=0.0)
        dz -= dentropy[:, None] * p * (log_p + entropy[:, None])
    dz_desc.store([t0, slab0], (dz * inverse_temperature).to(dz_desc.dtype))


def backward(
    h_td: Tensor,
    w_vd: Tensor,
    target_t: Tensor,
    dlogp_t: Tensor,
    dentropy_t: Tensor | None,
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
            dlogp_t if dentropy_t is None else dentropy_t,  # not read without, nor the entropy
            dlogp_t if dentropy_t is None else entropy_t,
            log_z_t,
            t,
            v,
            d,
            first,
            1.0 / temperature,
            HAS_DENTROPY=dentropy_t is not None,
            BLOCK_T=tiles.t,
            BLOCK_V=tiles.n,
            BLOCK_K=tiles.k,
            PRECISION=tiles.precision,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        dh_td += dz[:, :width] @ w_vd[first : first + width]
    return dh_td.to(h_td.dtype)
