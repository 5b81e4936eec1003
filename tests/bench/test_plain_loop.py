"""The plain loop against the definition, and split and trimmed against whole."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.plain_loop import Batch, dapo_loss, token_logp
from tests.tiny import VOCAB_SIZE, make_tiny_model
from tests.tolerances import FP32_LOGPROB


def batch() -> Batch:
    """Four samples, prompts of 3, 3, 6, 6 tokens and completions of 5, 2, 1, 4, in rectangles of 8 and 5: two columns are padding only."""
    prompts, completions = torch.tensor([3, 3, 6, 6])[:, None], torch.tensor([5, 2, 1, 4])[:, None]
    mask = torch.cat([torch.arange(8) >= 8 - prompts, torch.arange(5) < completions], dim=1)
    ids = torch.randint(3, VOCAB_SIZE, mask.shape).masked_fill(~mask, 2)
    old = -torch.rand(4, 5) * 5
    return Batch(ids, mask, 5, torch.tensor([1.0, -0.5, 0.7, -1.2]), old)


def definition(model: torch.nn.Module, samples: Batch) -> Tensor:
    """Sample by sample, without padding; min and clip as the paper (GRPO, arXiv 2402.03300, eq. 3) writes them."""
    total, count = torch.zeros(()), 0
    for n, (ids, mask) in enumerate(zip(samples.ids_nl, samples.mask_nl, strict=True)):
        tokens, length = ids[mask], int(mask[-5:].sum())
        logp = model(input_ids=tokens[None]).logits[0, -length - 1 : -1].log_softmax(-1).gather(1, tokens[-length:, None]).squeeze(1)
        assert samples.old_logp_nt is not None
        ratio, advantage = (logp - samples.old_logp_nt[n, :length]).exp(), samples.advantages_n[n]
        total = total - torch.min(ratio * advantage, ratio.clip(0.8, 1.2) * advantage).sum()
        count += length
    return total / count


def gradient(model: torch.nn.Module, loss: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def test_loss_and_gradient_in_micro_batches() -> None:
    model, samples = make_tiny_model("llama").requires_grad_(True), batch()
    expected = definition(model, samples)
    count = int(samples.scored_nt.sum())
    for size, trim in ((4, False), (2, True), (1, True)):
        parts = list(samples.micro_batches(size, trim=trim))
        loss = sum((dapo_loss(token_logp(model, part), part, count) for part in parts), torch.zeros(()))
        assert [part.ids_nl.shape[1] for part in parts] == {4: [13], 2: [8, 11], 1: [8, 8, 11, 11]}[size]
        torch.testing.assert_close(loss, expected, rtol=FP32_LOGPROB, atol=FP32_LOGPROB)
        torch.testing.assert_close(gradient(model, loss), gradient(model, definition(model, samples)), rtol=1e-3, atol=1e-5)
