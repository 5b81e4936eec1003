"""Log-probabilities renormalised over the nucleus: against plain fp64 torch, and against what the torch sampler says it sampled from."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fastlora.attention import ATTENTION
from fastlora.batches import policy_batch
from fastlora.losses import one_pass
from fastlora.losses.nucleus_logprob import nucleus_logprob
from fastlora.losses.one_pass import one_pass_loss
from fastlora.model import wrap_model
from fastlora.ops.registry import use_implementation
from fastlora.packing import pack
from fastlora.policy import loss_on, score
from fastlora.rollout.sampler import SamplingParams
from fastlora.rollout.torch import TorchSampler, choose
from fastlora.types import Example
from tests.batches import make_group_batch
from tests.exact import make_exact_model
from tests.lora.adapters import attach_uneven
from tests.ops.test_nucleus_rows import counted_nucleus
from tests.tiny import VOCAB_SIZE, make_tiny_model
from tests.tolerances import FP32_LOGPROB, FP64_EXACT

TEMPERATURE = 0.7
LARGEST_LOGIT = 4.0
"""Of the tiny models, about."""
TOP_PS = (1e-9, 0.3, 0.9, 0.999)


def _plain(hidden_td: Tensor, weight_vd: Tensor, bias_v: Tensor | None, targets_t: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """(logp_t, entropy_t) by log-softmax over the counted nucleus and the target."""
    z_tv = hidden_td @ weight_vd.t() + (0.0 if bias_v is None else bias_v)
    inside_tv = counted_nucleus(z_tv.detach(), TEMPERATURE, top_p)
    inside_tv[torch.arange(len(z_tv)), targets_t] = True
    log_p_tv = torch.log_softmax((z_tv / TEMPERATURE).masked_fill(~inside_tv, -math.inf), -1)
    entropy_t = -(log_p_tv.exp() * log_p_tv.masked_fill(~inside_tv, 0.0)).sum(-1)
    return log_p_tv.gather(1, targets_t[:, None]).squeeze(1), entropy_t


def _problem(t: int, v: int, d: int = 8, *, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Hidden states and a head that trains, in fp64."""
    hidden_td, weight_vd = (torch.randn(n, d, dtype=torch.float64, requires_grad=True) for n in (t, v))
    bias_v = torch.randn(v, dtype=torch.float64, requires_grad=True) if bias else None
    return hidden_td, weight_vd, bias_v, torch.randint(v, (t,))


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize(("t", "v"), [(0, 5), (1, 1), (63, 97), (20, 1031)])
def test_values_and_gradients_are_those_of_plain_torch(t: int, v: int, rows: int, implementation: str) -> None:
    """Of hidden states, head and bias; logp and entropy both differentiated; tiles of one row, of some with a rest, all in one."""
    for top_p, bias in zip(TOP_PS, (True, False, True, False), strict=True):
        inputs = hidden_td, weight_vd, bias_v, targets_t = _problem(t, v, bias=bias)
        leaves = [x for x in inputs[:3] if x is not None]
        dlogp_t, dentropy_t = torch.randn(2, t, dtype=torch.float64)
        with use_implementation(implementation):
            ours = nucleus_logprob(hidden_td, weight_vd, bias_v, targets_t, TEMPERATURE, top_p, rows * v)
            gradients = torch.autograd.grad([*ours], leaves, [dlogp_t, dentropy_t])
        plain = _plain(hidden_td, weight_vd, bias_v, targets_t, top_p)
        expected = torch.autograd.grad([*plain], leaves, [dlogp_t, dentropy_t])
        for got, right in zip((*ours, *gradients), (*plain, *expected), strict=True):
            assert got.shape == right.shape
            torch.testing.assert_close(got, right, rtol=FP64_EXACT, atol=10 * FP64_EXACT)


def test_gradcheck() -> None:
    """Finite differences move no token over the boundary of its nucleus."""
    *leaves, targets_t = _problem(5, 31)
    assert torch.autograd.gradcheck(lambda *x: nucleus_logprob(*x, targets_t, TEMPERATURE, 0.8, 2 * 31), leaves)


def test_one_pass_is_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the loss is shown in the end, its value and gradient; none of them the full softmax's."""
    monkeypatch.setattr(one_pass, "TILE_ELEMENTS", 9 * VOCAB_SIZE)
    packed = pack(make_group_batch())
    hidden_cd = torch.randn(len(packed.targets_c), 24, dtype=torch.float64, requires_grad=True)
    weight_vd, targets_c = torch.randn(VOCAB_SIZE, 24, dtype=torch.float64), packed.targets_c
    seen = []

    def loss_of(logp_nt: Tensor, entropy_nt: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append((logp_nt.detach(), entropy_nt))
        return (logp_nt * torch.arange(logp_nt.numel()).view(logp_nt.shape)).sum(), {}

    one, _ = one_pass_loss(hidden_cd, weight_vd, None, packed, TEMPERATURE, loss_of, 0.8)
    shown = seen[-1]
    scores_nt = [packed.unpack(x_c) for x_c in nucleus_logprob(hidden_cd, weight_vd, None, targets_c, TEMPERATURE, 0.8, 10**6)]
    two, _ = loss_of(*scores_nt)
    full, _ = one_pass_loss(hidden_cd, weight_vd, None, packed, TEMPERATURE, loss_of)
    for a, b in zip(shown, scores_nt, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=FP64_EXACT, atol=FP64_EXACT)
    torch.testing.assert_close(one, two, rtol=FP64_EXACT, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(x, hidden_cd)[0] for x in (one, two)), rtol=FP64_EXACT, atol=FP64_EXACT * 100)
    assert abs(float((one - full).detach())) > 1


@pytest.mark.parametrize("top_p", TOP_PS)
@pytest.mark.parametrize("token_level", [True, False])
def test_padded_and_packed_agree(top_p: float, token_level: bool) -> None:
    """score_padded, score_packed and the one pass, through a whole model in fp64; loss and gradient of the adapter."""
    model, batch = make_exact_model("llama"), make_group_batch()
    model.set_attn_implementation(ATTENTION)
    adapter = attach_uneven(model)
    padded, packed = (score(model, batch, TEMPERATURE, implementation, top_p) for implementation in ("reference", "auto"))
    for a, b in zip(padded, packed, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=10 * FP64_EXACT)
    gradients = []
    for implementation in ("reference", "auto"):
        adapter.flat.grad.zero_()
        loss_of = lambda logp, entropy: ((logp * logp.detach()).sum(), {"entropy": entropy.sum()})  # noqa: E731
        loss, _ = loss_on(model, batch, TEMPERATURE, implementation, loss_of, token_level=token_level, top_p=top_p)
        loss.backward()
        gradients.append(adapter.flat.grad.clone())
    norm = float(gradients[0].norm())
    assert float((gradients[0] - gradients[1]).norm()) <= torch.finfo(torch.float32).eps * norm  # float32 buffers
    assert norm > 0  # also where the nucleus is one token: the sampled one is counted in


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.99])
def test_the_trainer_says_what_the_sampler_chose_from(top_p: float) -> None:
    """`choose` of random logits, which it takes to float32; no token falls between the two nuclei."""
    z_tv = 3 * torch.randn(500, 97, dtype=torch.float64)
    params = SamplingParams(1, 1, TEMPERATURE, top_p)
    tokens_t, sampler_logp_t = choose(z_tv, params, torch.rand(500, dtype=torch.float64))
    logp_t, _ = nucleus_logprob(z_tv, torch.eye(97, dtype=torch.float64), None, tokens_t, TEMPERATURE, top_p, 10**6)
    rounding = FP32_LOGPROB * float(z_tv.abs().max()) / TEMPERATURE
    assert float((logp_t - sampler_logp_t).abs().max()) < rounding
    full_t = torch.log_softmax(z_tv / TEMPERATURE, -1).gather(1, tokens_t[:, None]).squeeze(1)
    off_t = sampler_logp_t - full_t  # −log of the nucleus's mass, which is top_p or a little more
    assert float(off_t.max()) < -math.log(top_p) + rounding and float(off_t.mean()) > 0.2 * -math.log(top_p)


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_a_sampled_rollout_has_the_trainers_log_probabilities(tiny_tokenizer: PreTrainedTokenizerFast, implementation: str) -> None:
    """TorchSampler at top-p .9 on a tiny model, scored by the trainer; the full softmax is .05 away."""
    model = wrap_model(make_tiny_model("llama"), tiny_tokenizer, "tiny")
    attach_uneven(model.module)
    examples = [Example(i, text, "") for i, text in enumerate(("1 + 1 =", "hello", "a"))]
    rollout = TorchSampler(model, 64).sample(examples, SamplingParams(8, 12, TEMPERATURE, 0.9), seed=3, adapter_version=0)
    batch = policy_batch(rollout, torch.zeros(24), mask_truncated=False)
    mask_nt = batch.completion_mask_nt
    with torch.no_grad():
        nucleus_nt, full_nt = (score(model.module, batch, TEMPERATURE, implementation, top_p)[0] for top_p in (0.9, 1.0))
    difference_t = (rollout.sampler_logp_nt - nucleus_nt)[mask_nt].abs()
    assert float(difference_t.max()) < FP32_LOGPROB * LARGEST_LOGIT / TEMPERATURE
    assert float((rollout.sampler_logp_nt - full_nt)[mask_nt].mean()) > 0.05


def test_nothing_to_score() -> None:
    model, batch = make_exact_model("llama"), make_group_batch()
    batch = replace(batch, completion_mask_nt=torch.zeros_like(batch.completion_mask_nt))
    logp_nt, entropy_nt = score(model, batch, 1.0, "auto", 0.9)
    assert not logp_nt.any() and not entropy_nt.any()
