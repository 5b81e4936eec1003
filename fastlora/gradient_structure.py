"""How the gradients of several batches lie to each other: direction from batch to batch, and the rank of all of them together.

Rows g_b of G [b, N] are the gradients of b batches. From their Gram matrix K = G Gᵀ [b, b] and its eigenvalues λ_i = σ_i² (σ the singular
values of G, p_i = σ_i / Σ σ):

    cosine of consecutive rows    K_{i, i+1} / √(K_ii K_{i+1, i+1})
    stable rank                   ‖G‖_F² / ‖G‖₂² = Σ λ / max λ                (Rudelson & Vershynin 2007, section 1)
    effective rank                exp(−Σ p_i ln p_i)                          (Roy & Vetterli 2007, EUSIPCO, definition 1)

Both ranks lie between 1 and b: 1 = all batches pull in one direction (arXiv 2605.12207 says so of SFT), b = they are orthogonal and of one
size (of GRPO).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS_LIMIT = 2 * 2**30
"""Bytes of float32 rows that are kept exactly: 16 batches of 33 million entries."""
BLOCK = 2**20
"""Columns that are widened to float64 together."""


class ConsecutiveCosine:
    """Cosine of each gradient with the one before it; costs a copy of the gradient, and two reads of both."""

    def __init__(self, like: Tensor) -> None:
        """like: the flat gradient [N]."""
        self.last = torch.zeros_like(like)
        """The last gradient that was finite and not zero; zeros before there was one. What a checkpoint keeps."""

    @torch.no_grad()
    def next(self, grad: Tensor) -> float | None:
        """cos(grad, last), and grad becomes the last one. None for the first, and for one that is zero or not finite (passed over)."""
        norm, before = float(torch.linalg.vector_norm(grad)), float(torch.linalg.vector_norm(self.last))
        if not (math.isfinite(norm) and norm > 0):
            return None
        cosine = float(torch.dot(grad, self.last)) / (norm * before) if before else None
        self.last.copy_(grad)
        return cosine


@dataclass(frozen=True, slots=True)
class Structure:
    """Of the rows of one G; None where a row of zeros leaves a number undefined."""

    consecutive_cosines: tuple[float | None, ...]
    """[b − 1]."""
    stable_rank: float | None
    effective_rank: float | None
    gram: tuple[tuple[float, ...], ...]
    """K [b, b], from which every other measure of this kind follows."""


def structure_of(gram_bb: Tensor) -> Structure:
    """The measures of a Gram matrix, float64 [b, b]."""
    norms = gram_bb.diagonal().clamp(min=0).sqrt().tolist()
    cosines = [float(gram_bb[i, i + 1]) / (norms[i] * norms[i + 1]) if norms[i] and norms[i + 1] else None for i in range(len(norms) - 1)]
    eigenvalues = torch.linalg.eigvalsh(gram_bb).clamp(min=0) if len(norms) else gram_bb.new_zeros(0)
    stable = effective = None
    if bool((eigenvalues > 0).any()):
        stable = float(eigenvalues.sum() / eigenvalues.max())
        singular = eigenvalues.sqrt()
        effective = math.exp(float(torch.special.entr(singular / singular.sum()).sum()))
    return Structure(tuple(cosines), stable, effective, tuple(map(tuple, gram_bb.tolist())))


class GradientRows:
    """Gradients of several batches, kept in parts so that the Gram matrix of each part, and of all, can be taken at the end.

    All rows in float32 while they fit into `limit` bytes. Else each part is sketched: a seeded sign and bucket for every entry, entries
    of a bucket added up. Inner products keep their expectation; their standard error is at most √2 ‖x‖ ‖y‖ / √buckets (Charikar et al.
    2002; Weinberger et al. 2009, appendix A).
    """

    def __init__(
        self, parts: Mapping[str, Sequence[slice]], num_rows: int, *, seed: int, device: torch.device, limit: int = ROWS_LIMIT
    ) -> None:
        """parts: name -> where its entries lie in the flat gradient. num_rows: most rows that will be added."""
        self._parts = {name: tuple(slices) for name, slices in parts.items()}
        sizes = {name: sum(s.stop - s.start for s in slices) for name, slices in self._parts.items()}
        kept = limit // (4 * num_rows)
        total = sum(sizes.values())
        self.exact = total <= kept
        self.buckets = sizes if self.exact else {name: max(1, size * kept // total) for name, size in sizes.items()}
        """Columns of every part."""
        self._rows = {name: torch.zeros(num_rows, width, device=device) for name, width in self.buckets.items()}
        self._sketches: dict[str, tuple[Tensor, Tensor]] = {}
        if not self.exact:
            generator = torch.Generator().manual_seed(seed)
            for name, size in sizes.items():
                bucket = torch.randint(self.buckets[name], (size,), generator=generator)
                sign = torch.randint(2, (size,), generator=generator, dtype=torch.int8) * 2 - 1
                self._sketches[name] = bucket.to(device, torch.int32), sign.to(device)
        self.added = 0
        """Rows so far."""

    def add(self, grad: Tensor) -> None:
        """One more row, of the flat gradient [N]."""
        for name, slices in self._parts.items():
            values, row = torch.cat([grad[s] for s in slices]), self._rows[name][self.added]
            if self.exact:
                row.copy_(values)
            else:
                bucket, sign = self._sketches[name]
                row.index_add_(0, bucket, values * sign)
        self.added += 1

    def grams(self) -> dict[str, Tensor]:
        """Part -> K, float64 [b, b]; that of all parts together is their sum."""
        found = {}
        for name, rows in self._rows.items():
            blocks = [block.double() @ block.double().t() for block in rows[: self.added].split(BLOCK, dim=1)]
            found[name] = torch.stack(blocks).sum(0).cpu()
        return found
