"""A user's own policy loss: one function in a file, named by `loss.function = "path/to/file.py:function"`.

    function(logp_nt, batch) -> loss_nt          of each token, differentiable in logp_nt
    loss = Σ mask · loss_nt / (active tokens of the generation batch · accumulation / steps per generation)        (TRL's dapo)

batch (types.TrainBatch) has the advantages, the mask, and old and reference log-probabilities where the config computes them.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastlora.errors import FastloraError
from fastlora.types import TrainBatch

OwnLoss = Callable[[Tensor, TrainBatch], Tensor]


class OwnLossError(FastloraError):
    """A user's loss that returned something else than one number per token."""


def own_loss(
    function: OwnLoss, logp_nt: Tensor, entropy_nt: Tensor, batch: TrainBatch, *, accumulation_steps: int, steps_per_generation: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss to call backward on, metrics) of one micro-batch, as losses.policy.policy_loss gives them.

    logp_nt, entropy_nt: float [n, t]. What the function returns at positions outside of `batch.loss_mask_nt` does not count. Raises
    OwnLossError unless it returns a tensor [n, t].
    """
    loss_nt = function(logp_nt, batch)
    if not isinstance(loss_nt, Tensor) or loss_nt.shape != logp_nt.shape:
        shown = list(loss_nt.shape) if isinstance(loss_nt, Tensor) else f"a {type(loss_nt).__name__}"
        raise OwnLossError(f"loss.function returned {shown}; one number per token, {list(logp_nt.shape)}, is needed")
    mask_nt = batch.loss_mask_nt
    total = loss_nt.masked_fill(~mask_nt, 0.0).sum() / max(batch.num_items_in_batch, 1)
    tokens = mask_nt.sum()
    entropy = entropy_nt.detach().masked_fill(~mask_nt, 0.0).sum()
    metrics = {
        "policy_loss": total.detach(),
        "entropy": entropy / tokens.clamp(min=1),
        "entropy_sum": entropy,
        "entropy_tokens": tokens.to(entropy.dtype),
    }
    return total * steps_per_generation / accumulation_steps, metrics
