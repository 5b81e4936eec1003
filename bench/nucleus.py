"""How near a sampled token is to its nucleus' edge, and how far two sides' log-probabilities of it are apart.

    p = softmax(logits / T), tokens in falling order          before_i = Σ_{j < i} p_j          nucleus = {i : before_i < top_p}

Two correct programs may disagree about a token on the edge: whether before_i is below top_p is then a matter of rounding, and with it the
nucleus' mass, which all its log-probabilities are divided by. The sampled token, the last one inside and the first one outside are the
three that can be on it; `edge` is the smallest |before_i − top_p| of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EDGE = 1e-4
"""Of cumulative probability: 49,152 float32 terms summed in two orders, and logits that differ by 3e-5 (facts of vLLM against torch)."""

CLOSE = 1e-4
"""Nats; issue 5's bound."""

ROWS = 256
"""Sorted at once: 50 MB of float32 at SmolLM2's vocabulary, a few times over."""


def nucleus_edge(logits_tv: Tensor, targets_t: Tensor, temperature: float, top_p: float) -> Tensor:
    """Distances [t] of cumulative probability, in the logits' dtype, at least float32."""
    parts = zip(logits_tv.split(ROWS), targets_t.split(ROWS), strict=True)
    return torch.cat([_edge_of_some(logits, targets, temperature, top_p) for logits, targets in parts])


def _edge_of_some(logits_tv: Tensor, targets_t: Tensor, temperature: float, top_p: float) -> Tensor:
    scaled = logits_tv.to(torch.promote_types(logits_tv.dtype, torch.float32)) / temperature
    p_tv, order_tv = scaled.softmax(-1).sort(-1, descending=True)
    before_tv = p_tv.cumsum(-1) - p_tv
    sampled_t1 = (order_tv == targets_t[:, None]).int().argmax(-1, keepdim=True)
    last_t1 = (before_tv < top_p).sum(-1, keepdim=True) - 1  # the most probable token is always inside
    first_outside_t1 = (last_t1 + 1).clamp(max=p_tv.shape[1] - 1)
    places_t3 = torch.cat([sampled_t1, last_t1, first_outside_t1], dim=1)
    return (before_tv.gather(1, places_t3) - top_p).abs().amin(1)


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of two sides' log-probabilities of the same tokens."""

    tokens: int
    max_abs: float
    """Nats."""
    within: float
    """Share of the tokens that agree to CLOSE."""
    exceptions: int
    """Tokens that do not."""
    unexplained: int
    """Of these, the ones that are not within EDGE of the nucleus' edge."""

    def metrics(self, prefix: str) -> dict[str, float]:
        """For a worker's answer."""
        return {f"{prefix}/{name}": float(getattr(self, name)) for name in self.__slots__}


def agreement(theirs_t: Tensor, ours_t: Tensor, edge_t: Tensor) -> Agreement:
    """NaN never agrees."""
    gap_t = (theirs_t.double() - ours_t.double()).abs()
    odd_t = ~(gap_t <= CLOSE)
    unexplained = int((odd_t & ~(edge_t <= EDGE)).sum())
    return Agreement(len(gap_t), float(gap_t.max()), 1 - float(odd_t.double().mean()), int(odd_t.sum()), unexplained)
