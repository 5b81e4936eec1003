"""One module's LoRA at another rank, with its optimizer state.

ΔW = s B A, with A [r, d] and B [n, r]; G = ∂L/∂ΔW, so that dA = s Bᵀ G and dB = s G Aᵀ. A new pair A' = P A, B' = (s/s') B Q, with
P [r', r] and Q [r, r'], has the gradients

    dA' = Qᵀ dA                dB' = (s'/s) dB Pᵀ

and the first moments, which are sums of gradients, carry over by the same products. Second moments carry over by the squares of the
factors, m ↦ P m, v ↦ P² v: exact for components whose gradients are uncorrelated, else an estimate.

Shrinking (r' < r) keeps the best approximation of ΔW of rank r' (Eckart & Young 1936), from three small factorisations and never an
[n, d] matrix: Aᵀ = Q_a R_a, B = Q_b R_b, R_b R_aᵀ = U S Vᵀ, V' the first r' columns of V:

    P = c V'ᵀ (R_aᵀ)⁺          A' = c V'ᵀ Q_aᵀ: orthogonal rows, c long, which is the root mean square length of the rows of A
    Q = R_aᵀ V' / c            B' = (s/s') Q_b U' S' / c

Only A is inverted, which has full rank from its random start on; B may be 0. Growing (r' > r) leaves the components as they are and adds
rows of A, random as at the start of a run, and columns 0 of B: ΔW stays. Their first moments start at 0. Their second moments start at the
mean of the module's old components, which is what a random row of A and a column of B would have had by now. AdamW's bias correction goes
by the steps t of the run, not of the entry: a v that starts at 0 makes the k-th update of a steady gradient √(1 − β2^t) (1 − β1^k) /
√(1 − β2^k) times the learning rate, up to 6.6 with β = .9, .999 late in a run. A module without old components has no such estimate: there
v starts at 0 too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.lora.packed import random_a


class Sides(NamedTuple):
    """What belongs to A and to Bᵀ, component by component."""

    a_rd: Tensor
    b_rn: Tensor


@dataclass(frozen=True, slots=True)
class Components:
    """The r components of one module, float64 on the CPU."""

    scale: float
    """s; 0 at rank 0."""
    value: Sides
    exp_avg: Sides
    """AdamW's m."""
    exp_avg_sq: Sides
    """AdamW's v."""

    @property
    def rank(self) -> int:
        """Number of components."""
        return len(self.value.a_rd)


@dataclass(frozen=True, slots=True)
class Resized:
    """A module at its new rank, and what that did to ΔW."""

    components: Components
    cut: float
    """‖ΔW − ΔW'‖², Frobenius: what shrinking cut off."""
    whole: float
    """‖ΔW‖², before."""


def resize(old: Components, rank: int, scale: float, generator: torch.Generator) -> Resized:
    """The module at `rank` and s = `scale` (0 at rank 0); see the head of this file. generator: of new rows of A."""
    r_a, r_b = torch.linalg.qr(old.value.a_rd.t()).R, torch.linalg.qr(old.value.b_rn.t()).R
    _, singular, vh = torch.linalg.svd(r_b @ r_a.t())
    kept = old.rank if rank >= old.rank else min(rank, len(vh))  # more components than d say no more than d of them
    p = q_t = torch.eye(old.rank, dtype=torch.float64)
    if kept < old.rank:
        c = float(old.value.a_rd.norm()) / old.rank**0.5 or 1.0
        p, q_t = c * vh[:kept] @ torch.linalg.pinv(r_a.t()), vh[:kept] @ r_a / c
    energy = old.scale**2 * singular.square()
    components = _turned(old, p, q_t, scale)
    if kept < rank:
        components = _grown(components, rank - kept, generator)
    return Resized(components, float(energy[kept:].sum()), float(energy.sum()))


def _turned(old: Components, p: Tensor, q_t: Tensor, scale: float) -> Components:
    """A' = P A, B' = (s/s') B Q, and the moments of their gradients."""
    gain = scale / old.scale if len(p) else 1.0
    return Components(
        scale,
        value=Sides(p @ old.value.a_rd, q_t @ old.value.b_rn / gain),
        exp_avg=Sides(q_t @ old.exp_avg.a_rd, gain * p @ old.exp_avg.b_rn),
        exp_avg_sq=Sides(q_t.square() @ old.exp_avg_sq.a_rd, gain**2 * p.square() @ old.exp_avg_sq.b_rn),
    )


def _grown(old: Components, new: int, generator: torch.Generator) -> Components:
    """`new` components behind the old ones."""
    a_rd = random_a(new, old.value.a_rd.shape[1], generator).double()

    def zeros(old_rx: Tensor) -> Tensor:
        return torch.cat([old_rx, old_rx.new_zeros(new, old_rx.shape[1])])

    def means(old_rx: Tensor) -> Tensor:
        mean_x = old_rx.mean(0) if len(old_rx) else old_rx.new_zeros(old_rx.shape[1])
        return torch.cat([old_rx, mean_x.expand(new, -1)])

    return Components(
        old.scale,
        value=Sides(torch.cat([old.value.a_rd, a_rd]), zeros(old.value.b_rn)),
        exp_avg=Sides(*map(zeros, old.exp_avg)),
        exp_avg_sq=Sides(*map(means, old.exp_avg_sq)),
    )
