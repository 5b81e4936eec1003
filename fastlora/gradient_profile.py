"""What one optimizer step's gradient says about each adapted module, beyond the norms of dA and dB that the optimizer returns.

G = ∂L/∂ΔW [n, d] is the gradient with respect to the whole update ΔW = s·B·A of a module, A [r, d], B [n, r]. It is never formed; what the
backward pass leaves is (stored transposed, [r, n])

    dB = s G Aᵀ

so that, with P = Aᵀ (A Aᵀ)⁺ A the projection onto the row space of A and k its rank,

    ‖G P‖² = tr(dB (A Aᵀ)⁺ dBᵀ) / s²         exact: the part of G that this A sees
    ‖G‖²   ≈ (d / k) ‖G P‖²                  `delta_w_norms`: the estimate of all of it

The estimate is unbiased (its square) where A has independent entries, alike and symmetric about 0, and G does not depend on A: columns of
A may then be swapped and change sign, which leaves E P = (k / d) I. So it is at initialisation, B = 0 and A Kaiming-uniform. The relative
standard deviation of the square is √(2/k) for a G of rank one, less for more. While A trains it turns towards G, and the estimate then lies
above ‖G‖, by the factor √(d/k) at most. Unlike ‖dA‖ and ‖dB‖ it does not grow with r, s, A or B.

A rank component is one row of A and the matching column of B; its two norms are the row norms of dA [r, d] and of dBᵀ [r, n].
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora.flat import FlatParameters
from fastlora.lora.packed import PackedAdapter, Slot

EIGENVALUE_CUT = 2.0**-16
"""Directions of A Aᵀ with an eigenvalue at most this times the largest count as outside of A's row space. There A is below 2^-8 of its
largest singular value, and dB, which kernels compute in bfloat16, is nothing but rounding. A fresh A [r, d] with r ≤ d / 2 has no such
direction: its singular values lie within (1 ± √(r/d)), eigenvalues within a factor of 34."""


def rank_component_norms(flat: FlatParameters) -> Tensor:
    """float32 [Σ r]: L2 norm of each row of each segment's gradient (dA [r, d], dBᵀ [r, n]), segments in their order, before clipping."""
    norms = [torch.linalg.vector_norm(_rows(flat.grad, s.offset, s.shape[0], s.shape[1]), dim=1) for s in flat.segments]
    return torch.cat(norms) if norms else flat.grad.new_empty(0)


def delta_w_norms(adapter: PackedAdapter) -> Tensor | None:
    """float32 [segments], estimated ‖∂L/∂ΔW‖ of each module at its B, NaN at its A; None under a mask on B, where dB is not s G Aᵀ.

    Of the accumulated gradient, before clipping, at the A that made it: call it before the optimizer moves A. NaN for a module whose A or
    gradient is not finite, or whose A is 0 (nothing can be seen through it).
    """
    if adapter.flat.mask is not None:
        return None
    norms = {}
    slots_by_rank: dict[int, list[Slot]] = defaultdict(list)
    for slot in adapter.slots.values():
        slots_by_rank[slot.rank].append(slot)
    for slots in slots_by_rank.values():
        gram_a, gram_b = _gram_matrices(adapter.flat, slots)
        scale, d = (gram_a.new_tensor([value(slot) for slot in slots]) for value in (lambda s: s.scale, lambda s: s.in_features))
        for slot, norm in zip(slots, estimate_norms(gram_a, gram_b, scale, d).unbind(), strict=True):
            norms[f"{slot.name}.lora_B"] = norm
    missing = adapter.flat.data.new_tensor(torch.nan)
    return torch.stack([norms.get(segment.name, missing) for segment in adapter.flat.segments])


def estimate_norms(gram_a_mrr: Tensor, gram_b_mrr: Tensor, scale_m: Tensor, d_m: Tensor) -> Tensor:
    """Estimated ‖G‖ [m] of modules of one rank from A Aᵀ and dBᵀ dB [m, r, r], s [m] and the width d of A [m]; see above."""
    finite_m = gram_a_mrr.isfinite().all(-1).all(-1)
    eigenvalues_mr, vectors_mrr = torch.linalg.eigh(torch.where(finite_m[:, None, None], gram_a_mrr, 0.0))
    inside_mr = eigenvalues_mr > EIGENVALUE_CUT * eigenvalues_mr[:, -1:].clamp(min=0)
    # Squared length of dB in each direction; rounding may leave a zero below 0.
    squares_mr = torch.einsum("mri,mrs,msi->mi", vectors_mrr, gram_b_mrr, vectors_mrr).clamp(min=0)
    projected_m = torch.where(inside_mr, squares_mr / eigenvalues_mr, 0.0).sum(-1) / scale_m**2
    k_m = inside_mr.sum(-1)
    estimate_m = (projected_m * d_m / k_m).sqrt()
    return torch.where(finite_m & gram_b_mrr.isfinite().all(-1).all(-1), estimate_m, torch.nan)


def _gram_matrices(flat: FlatParameters, slots: Sequence[Slot]) -> tuple[Tensor, Tensor]:
    """A Aᵀ and dBᵀ dB [m, r, r] of modules of one rank."""
    rank = slots[0].rank
    gram_a, gram_b = (flat.data.new_empty(len(slots), rank, rank) for _ in range(2))
    for i, slot in enumerate(slots):
        a_rd = _rows(flat.data, slot.a_offset, rank, slot.in_features)
        db_rn = _rows(flat.grad, slot.b_offset, rank, slot.out_features)
        torch.mm(a_rd, a_rd.t(), out=gram_a[i])
        torch.mm(db_rn, db_rn.t(), out=gram_b[i])
    return gram_a, gram_b


def _rows(buffer: Tensor, offset: int, rows: int, width: int) -> Tensor:
    """A matrix of the flat buffer, a view."""
    return buffer[offset : offset + rows * width].view(rows, width)
