"""Log-probabilities under a nucleus, from full logits, and how near each token is to the nucleus' edge.

    p = softmax(logits / T), tokens in falling order          before_i = Σ_{j < i} p_j
    nucleus = {i : before_i < top_p} and the sampled token    log π(y) = log p_y − log Σ_nucleus p

Two correct programs may disagree about a token on the edge: whether before_i is below top_p is then a matter of rounding. The sampled
token, the last one inside and the first one outside are the three that can be on it; `edge` is the smallest |before_i − top_p| of them.
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


def nucleus_logp(logits_tv: Tensor, targets_t: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """(log π(y) [t], edge [t]) in the logits' dtype, at least float32."""
    parts = zip(logits_tv.split(ROWS), targets_t.split(ROWS), strict=True)
    logp, edge = zip(*(_some_rows(logits, targets, temperature, top_p) for logits, targets in parts), strict=True)
    return torch.cat(logp), torch.cat(edge)


def _some_rows(logits_tv: Tensor, targets_t: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    scaled = logits_tv.to(torch.promote_types(logits_tv.dtype, torch.float32)) / temperature
    logp_tv, order_tv = scaled.log_softmax(-1).sort(-1, descending=True)
    p_tv = logp_tv.exp()
    before_tv = p_tv.cumsum(-1) - p_tv
    place_t1 = (order_tv == targets_t[:, None]).int().argmax(-1, keepdim=True)
    inside_tv = before_tv < top_p
    last_t1 = inside_tv.sum(-1, keepdim=True) - 1  # the most probable token is always inside
    first_outside_t1 = (last_t1 + 1).clamp(max=p_tv.shape[1] - 1)
    nearest = torch.cat([before_tv.gather(1, at) - top_p for at in (place_t1, last_t1, first_outside_t1)], dim=1).abs()
    mass_t1 = p_tv.masked_fill(~inside_tv.scatter(1, place_t1, True), 0).sum(-1, keepdim=True)
    return (logp_tv.gather(1, place_t1) - mass_t1.log()).squeeze(1), nearest.amin(1)


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
