"""nucleus_rows: the smallest logit of each row's nucleus, and rows of logits without what is outside it.

    p_tv = softmax(z_tv / temperature)
    nucleus_t = {v : Σ_{w : p_tw > p_tv} p_tw < top_p}        floor_t = min {z_tv : v in nucleus_t}

the smallest set of most probable tokens whose probability reaches top_p (A. Holtzman et al. 2020, arXiv 1904.09751); tokens that tie with
its last one are in it too, since samplers break ties in different orders. The most probable token is always in.

Policy losses that renormalise over the nucleus (`keep_nucleus_`) set the logits outside it to −∞; `logprob_rows` then gives

    logp_t = z_ty / temperature − log Σ_{v in nucleus} e^(z_tv / temperature)

the entropy of the same distribution, and gradients in which the nucleus is a constant. The sampled token y is always counted in: at the
boundary the sampler's nucleus may hold a token that the trainer's, of slightly other logits, does not.

A sort of 49,152 logits takes 1.4–3.7 ms on two Zen 4 cores, the 64 largest .13 ms, the 1,024 largest .6–.8 ms: `torch` takes these first,
and sorts only the rows whose 1,024 largest do not reach top_p; the floor is the sort's in every case. Sums run in float64. On a GPU the
rows that are left make it wait (not run on a GPU). Bytes: reads z; FLOPs: some 20 an entry (an exponential), comparisons not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastlora.ops.logprob_rows import logprob_rows
from fastlora.ops.registry import Cost, Dispatch, OpSpec

TOP_K = (64, 1024)
"""Largest logits looked at before a row is sorted whole."""
SORTED_ELEMENTS = 2**24
"""Logits copied, and in the worst case sorted, at once: with their int64 indices 168 MB in bfloat16."""


def _scaled(z_tv: Tensor, temperature: float) -> Tensor:
    return z_tv.to(torch.promote_types(z_tv.dtype, torch.float32)) / temperature


def _floor(top_tk: Tensor, log_z_t: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """(floor_t; float64 [t], the probability of the largest logits top_tk, which are in falling order)."""
    p_tk = (_scaled(top_tk, temperature) - log_z_t[:, None]).double().exp()
    cumulative_tk = p_tk.cumsum(-1)
    last_t = ((cumulative_tk - p_tk) < top_p).sum(-1) - 1
    # A row with a NaN has no nucleus: its floor is its first entry, the NaN, below which nothing lies.
    return top_tk.gather(-1, last_t.clamp(min=0)[:, None]).squeeze(-1), cumulative_tk[:, -1]


def _reference(z_tv: Tensor, temperature: float, top_p: float) -> Tensor:
    """floor_t [t], in the dtype of z."""
    return _floor(z_tv.sort(-1, descending=True).values, _scaled(z_tv, temperature).logsumexp(-1), temperature, top_p)[0]


_dispatch = Dispatch("nucleus_rows", _reference)


@_dispatch.add("torch")
def _by_top_k(z_tv: Tensor, temperature: float, top_p: float) -> Tensor:
    (t, v), floor_t = z_tv.shape, z_tv.new_empty(len(z_tv))
    left_r = torch.arange(t, device=z_tv.device)
    _, _, log_z_t = logprob_rows(z_tv, torch.zeros_like(left_r), temperature, False)
    reached_t = torch.zeros_like(log_z_t, dtype=torch.float64)
    for k in (*TOP_K, v):
        for rows in left_r.split(max(1, SORTED_ELEMENTS // v)):
            floor_t[rows], reached_t[rows] = _floor(z_tv[rows].topk(min(k, v)).values, log_z_t[rows], temperature, top_p)
        left_r = left_r[~(reached_t[left_r] >= top_p)]
        if k >= v or not len(left_r):
            break
    return floor_t


nucleus_rows_op = _dispatch.torch_op()


@nucleus_rows_op.register_fake
def _(z_tv: Tensor, temperature: float, top_p: float) -> Tensor:
    return z_tv.new_empty(z_tv.shape[0])


def nucleus_rows(z_tv: Tensor, temperature: float, top_p: float) -> Tensor:
    """floor_t [t], in the dtype of the logits z_tv [t, v]; NaN where a row holds one. Not differentiable.

    Raises ValueError when temperature is not positive or top_p not in (0, 1).
    """
    if temperature <= 0 or not 0 < top_p < 1:
        raise ValueError(f"nucleus_rows: a positive temperature and a top_p between 0 and 1 are needed, got {temperature} and {top_p}")
    return _dispatch(z_tv, temperature, top_p)


@torch.no_grad()
def keep_nucleus_(z_tv: Tensor, targets_t: Tensor, temperature: float, top_p: float) -> None:
    """Sets the logits z_tv [t, v] outside each row's nucleus to −∞, but for that of the row's target. targets_t: int64 [t] in [0, v)."""
    floor_t1, target_t1 = nucleus_rows(z_tv, temperature, top_p)[:, None], targets_t[:, None]
    target_z_t1 = z_tv.gather(-1, target_t1)
    z_tv.masked_fill_(z_tv < floor_t1, -math.inf).scatter_(-1, target_t1, target_z_t1)


def cost(z_tv: Tensor, temperature: float, top_p: float) -> Cost:
    """The logits once."""
    return Cost(20 * z_tv.numel(), (z_tv.numel() + len(z_tv)) * z_tv.element_size())


def sample_inputs(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Tensor, float, float]]:
    """Odd sizes, one token, ties, nuclei of one token and of nearly all, rows that need each of the steps of `torch`."""
    generator = torch.Generator().manual_seed(0)
    for t, v, temperature, top_p in ((0, 5, 1.0, 0.9), (1, 1, 0.7, 0.5), (63, 97, 1.3, 1e-6), (7, 2500, 0.9, 0.9), (3, 2500, 1.0, 0.99)):
        z_tv = torch.randn(t, v, generator=generator, dtype=torch.float64)
        z_tv[::3] *= 6  # one row in three is sharp
        z_tv[1::3] = z_tv[1::3].round()  # and one has ties
        yield z_tv.to(dtype).to(device), temperature, top_p


SPEC = OpSpec("nucleus_rows", nucleus_rows_op, sample_inputs, cost)
