"""The supervised objective: mean cross-entropy of the target tokens."""

from __future__ import annotations

from torch import Tensor


def sft_loss(
    logp_nt: Tensor, loss_mask_nt: Tensor, num_items_in_batch: int, *, accumulation_steps: int, steps_per_generation: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss to call backward on, metrics as 0-dim tensors) of one micro-batch:

        −Σ m logp / (num_items_in_batch · accumulation_steps / steps_per_generation)

    so that the losses of an optimizer step add up to the mean over its tokens, however these spread over micro-batches (where a
    generation batch feeds several optimizer steps: over an equal share of its tokens each).

    logp_nt: float [n, t], nats. loss_mask_nt: bool [n, t], the tokens that train. num_items_in_batch: how many of them the
    whole generation batch has. accumulation_steps, steps_per_generation: micro-batches per optimizer step and per generation
    batch. Metrics: nll, the mean over this micro-batch's own tokens (nats).

    Raises ValueError when num_items_in_batch is not positive: there is nothing to learn from.
    """
    if num_items_in_batch < 1:
        raise ValueError(f"sft_loss: num_items_in_batch = {num_items_in_batch}; no token of the batch is a target")
    nll_sum = -(logp_nt * loss_mask_nt).sum()
    loss = nll_sum / (num_items_in_batch * accumulation_steps / steps_per_generation)
    return loss, {"nll": nll_sum.detach() / loss_mask_nt.sum().clamp(min=1)}
