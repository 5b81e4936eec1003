"""One pass over the head: loss, metrics and gradient of token-level losses, and which losses are token-level."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastlora import policy
from fastlora.attention import ATTENTION
from fastlora.config import LossConfig
from fastlora.losses import one_pass
from fastlora.losses.one_pass import LossOf, one_pass_loss
from fastlora.losses.policy import is_token_level, policy_loss
from fastlora.losses.sft import sft_loss
from fastlora.ops.linear_logprob import linear_logprob
from fastlora.ops.registry import implementation_counts
from fastlora.packing import PackedTokens, pack
from fastlora.policy import loss_on
from fastlora.types import TrainBatch
from tests.batches import make_batch, make_group_batch
from tests.exact import make_exact_model
from tests.lora.adapters import attach_uneven
from tests.tiny import VOCAB_SIZE
from tests.tolerances import FP64_EXACT

TEMPERATURE = 0.7
WIDTH = 24
LOSS_TYPES = get_args(LossConfig.model_fields["loss_type"].annotation)
ESTIMATORS = get_args(LossConfig.model_fields["kl_estimator"].annotation)
TOKEN_LEVEL: dict[str, dict[str, Any]] = {
    **{loss_type: {"loss_type": loss_type} for loss_type in LOSS_TYPES if loss_type != "vespo"},
    **{f"dapo, {estimator}": {"beta": 0.3, "kl_estimator": estimator} for estimator in ESTIMATORS},
    "dapo, delta": {"delta": 1.1, "epsilon_high": 0.28},
    "grpo, KL not corrected": {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False},
    **{f"dapo, {mode}": {"sampler_correction": mode, "sampler_correction_max": 1.1} for mode in ("token_truncate", "token_mask")},
    "cispo, KL": {"loss_type": "cispo", "epsilon_high": 1.1, "beta": 0.3},
}
"""Every option that a token-level loss can have."""
COUPLED: dict[str, dict[str, Any]] = {
    "sequence ratio": {"importance_sampling_level": "sequence"},
    "vespo": {"loss_type": "vespo"},
    "entropy quantile": {"top_entropy_quantile": 0.5},
    "off-policy mask": {"off_policy_mask_threshold": 0.1},
    "entropy bonus": {"entropy_coef": 0.5},
    "sampler, sequence ratio": {"sampler_correction": "sequence_truncate", "sampler_correction_max": 100.0},
    "sampler, sequence mask": {"sampler_correction": "sequence_mask", "sampler_correction_max": 1.2},
}


def _with_policies(batch: TrainBatch, noise: float = 0.2) -> TrainBatch:
    """Behaviour, reference and sampler's log-probabilities about where a random model's are, advantages per token, a token that does not
    train."""
    shape = batch.completion_ids_nt.shape
    old, ref, sampler = (noise * torch.randn(shape, dtype=torch.float64) - 5.0 for _ in range(3))
    loss_mask = batch.completion_mask_nt.clone()
    loss_mask[0, 1] = False
    batch = replace(batch, old_logp_nt=old, ref_logp_nt=ref, sampler_logp_nt=sampler, loss_mask_nt=loss_mask)
    return replace(batch, advantages_nt=torch.randn(shape, dtype=torch.float64))


def _loss_of(batch: TrainBatch, config: LossConfig) -> LossOf:
    def loss_of(logp_nt: Tensor, entropy_nt: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        options = {"accumulation_steps": 3, "steps_per_generation": 2, "max_completion_length": 13}
        return policy_loss(logp_nt, entropy_nt, batch, config, entropy_coef=config.entropy_coef, **options)

    return loss_of


def _head(packed: PackedTokens, with_bias: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states that require a gradient, a frozen head."""
    hidden_cd = torch.randn(len(packed.targets_c), WIDTH, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(VOCAB_SIZE, dtype=torch.float64) if with_bias else None
    return hidden_cd, 0.3 * torch.randn(VOCAB_SIZE, WIDTH, dtype=torch.float64), bias


def _plain(hidden_cd: Tensor, weight_vd: Tensor, bias_v: Tensor | None, packed: PackedTokens) -> tuple[Tensor, Tensor]:
    """(logp_nt, entropy_nt) by torch's log-softmax of all logits."""
    z_cv = hidden_cd @ weight_vd.t() + (0.0 if bias_v is None else bias_v)
    log_p_cv = torch.log_softmax(z_cv / TEMPERATURE, -1)
    logp_c = log_p_cv.gather(1, packed.targets_c[:, None]).squeeze(1)
    return packed.unpack(logp_c), packed.unpack(-(log_p_cv.exp() * log_p_cv).sum(1))


def _close(got: Tensor, expected: Tensor) -> bool:
    return got.shape == expected.shape and bool((got - expected).abs().max() <= FP64_EXACT * expected.abs().max().clamp(min=1))


def _compare(
    batch: TrainBatch, loss_of: LossOf, with_bias: bool, scale: float
) -> tuple[tuple[Tensor, dict[str, Tensor], Tensor], tuple[Tensor, dict[str, Tensor], Tensor]]:
    """(loss, metrics, dh of scale · loss), by one pass and by autograd of a plain log-softmax."""
    packed = pack(batch)
    hidden_cd, weight_vd, bias_v = _head(packed, with_bias)
    runs = (
        one_pass_loss(hidden_cd, weight_vd, bias_v, packed, TEMPERATURE, loss_of),
        loss_of(*_plain(hidden_cd, weight_vd, bias_v, packed)),
    )
    ours, theirs = ((loss.detach(), metrics, *torch.autograd.grad(scale * loss, hidden_cd)) for loss, metrics in runs)
    return ours, theirs


@pytest.mark.parametrize("stale", [False, True], ids=["on policy", "off policy"])
@pytest.mark.parametrize("rows", [1, 5, 1000])
@pytest.mark.parametrize("settings", TOKEN_LEVEL.values(), ids=TOKEN_LEVEL)
def test_one_pass_is_autograd_of_the_plain_loss(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], rows: int, stale: bool) -> None:
    """Value, metrics and gradient, whatever the tiles: of one row, of some with a rest, all in one."""
    monkeypatch.setattr(one_pass, "TILE_ELEMENTS", rows * VOCAB_SIZE + 1)
    batch, config = _with_policies(make_group_batch()), LossConfig(**settings)
    batch = batch if stale else replace(batch, old_logp_nt=None)
    assert is_token_level(config, config.entropy_coef)
    ours, theirs = _compare(batch, _loss_of(batch, config), with_bias=rows == 5, scale=1.0 if stale else -2.5)
    assert theirs[2].any(1).sum() > len(theirs[2]) // 4  # not everything is clipped
    assert _close(ours[0], theirs[0]) and _close(ours[2], theirs[2])
    assert ours[1].keys() == theirs[1].keys() and all(_close(ours[1][name].double(), value.double()) for name, value in theirs[1].items())


@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_one_pass_over_a_supervised_loss(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(one_pass, "TILE_ELEMENTS", rows * VOCAB_SIZE)
    batch = make_batch()
    loss_of = lambda logp, entropy: sft_loss(logp, batch.loss_mask_nt, 33, accumulation_steps=1, steps_per_generation=1)  # noqa: E731
    ours, theirs = _compare(batch, loss_of, with_bias=False, scale=1.0)
    assert _close(ours[0], theirs[0]) and _close(ours[2], theirs[2]) and _close(ours[1]["nll"], theirs[1]["nll"])


def test_two_passes_are_the_same_loss() -> None:
    """`linear_logprob` and autograd of the loss, which is what other losses take."""
    batch, config = _with_policies(make_group_batch()), LossConfig(loss_type="grpo", beta=0.3)
    packed, loss_of = pack(batch), _loss_of(batch, config)
    hidden_cd, weight_vd, bias_v = _head(packed, True)
    outputs = linear_logprob(hidden_cd, weight_vd, packed.targets_c, bias_v=bias_v, temperature=TEMPERATURE, token_chunk=4, vocab_chunk=50)
    two, _ = loss_of(*(packed.unpack(values_c) for values_c in outputs))
    one, _ = one_pass_loss(hidden_cd, weight_vd, bias_v, packed, TEMPERATURE, loss_of)
    assert _close(one.detach(), two.detach())
    assert _close(*(torch.autograd.grad(loss, hidden_cd)[0] for loss in (one, two)))


def test_a_tile_of_logits_is_the_largest_thing_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Called with each tile's tokens and zeros elsewhere, then once with everything."""
    monkeypatch.setattr(one_pass, "TILE_ELEMENTS", 9 * VOCAB_SIZE)
    batch, seen = make_group_batch(), []

    def loss_of(logp_nt: Tensor, entropy_nt: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert torch.equal(logp_nt != 0, entropy_nt != 0)
        seen.append(int((logp_nt != 0).sum()))
        return logp_nt.sum(), {}

    packed = pack(batch)
    one_pass_loss(*_head(packed, False), packed, TEMPERATURE, loss_of)
    c = len(packed.targets_c)
    assert seen == [9] * (c // 9) + [c % 9] * (c % 9 > 0) + [c]


def _coupled(settings: dict[str, Any]) -> bool:
    """Does ∂ℓ/∂logp of a sample's last token change when the others' log-probabilities and entropies do, or does ℓ have a ∂ℓ/∂entropy?

    By central differences on two samples, one of positive and one of negative advantage.
    """
    batch, step = make_batch(((3, 6), (2, 6))), 1e-5
    shape = batch.completion_ids_nt.shape
    logp_nt, entropy_nt = torch.randn(shape, dtype=torch.float64) - 5, 3 + torch.rand(shape, dtype=torch.float64)
    old, ref, sampler = (logp_nt + 0.1 * torch.randn(shape, dtype=torch.float64) for _ in range(3))
    # A ratio to the sampler has the current policy in it where that is the behaviour policy: on policy.
    old = None if "sampler_correction" in settings else old
    batch = replace(
        batch, old_logp_nt=old, ref_logp_nt=ref, sampler_logp_nt=sampler, advantages_nt=torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    )
    loss_of = _loss_of(batch, LossConfig(**settings))

    def derivative(n: int, others: float, *, by_entropy: bool = False) -> float:
        """At the last token of sample n, with `others` added to all other entries of both rectangles."""
        inputs = logp_nt + others, entropy_nt + others
        for moved, still in zip(inputs, (logp_nt, entropy_nt), strict=True):
            moved[n, -1] = still[n, -1]
        ends = []
        for sign in (1, -1):
            moved = [x.clone() for x in inputs]
            moved[by_entropy][n, -1] += sign * step
            ends.append(float(loss_of(*moved)[0]))
        return (ends[0] - ends[1]) / (2 * step)

    own = [derivative(n, 0.0) for n in (0, 1)]
    return any(
        abs(derivative(n, 0.0, by_entropy=True)) > 1e-6
        or any(abs(derivative(n, others) - own[n]) > 1e-6 for others in (-2.0, -0.15, 0.15, 2.0))
        for n in (0, 1)
    )


@pytest.mark.parametrize("settings", [*TOKEN_LEVEL.values(), *COUPLED.values()], ids=[*TOKEN_LEVEL, *COUPLED])
def test_token_level_means_that_no_derivative_depends_on_another_token(settings: dict[str, Any]) -> None:
    """Both ways: what is called token-level is not coupled, and what is left out really is (or goes through the entropy)."""
    config = LossConfig(**settings)
    assert is_token_level(config, config.entropy_coef) == (not _coupled(settings))


def test_the_entropy_bonus_of_this_step_decides() -> None:
    config = LossConfig(entropy_coef=0.5, use_adaptive_entropy=True)
    assert is_token_level(config, 0.0) and not is_token_level(config, 0.5)


def _adapted_gradient(model: PreTrainedModel, adapter: Any, loss: Tensor) -> Tensor:
    adapter.flat.grad.zero_()
    loss.backward()
    return adapter.flat.grad.clone()


@pytest.mark.parametrize("token_level", [True, False])
def test_loss_on_takes_one_pass_where_it_may(monkeypatch: pytest.MonkeyPatch, token_level: bool) -> None:
    """Same loss and gradient of the whole model either way; the head's forward op runs only where two passes are needed."""
    monkeypatch.setattr(one_pass, "TILE_ELEMENTS", 9 * VOCAB_SIZE)
    model, batch = make_exact_model("qwen2"), _with_policies(make_group_batch())
    model.set_attn_implementation(ATTENTION)
    adapter, loss_of = attach_uneven(model), _loss_of(batch, LossConfig(beta=0.1))
    expected, _ = loss_of(*policy.score_packed(model, batch, TEMPERATURE))
    expected_gradient = _adapted_gradient(model, adapter, expected)
    before = implementation_counts.copy()
    loss, metrics = loss_on(model, batch, TEMPERATURE, "auto", loss_of, token_level=token_level)
    two_passes = any(op == "linear_logprob" for op, _ in implementation_counts - before)
    assert two_passes != token_level and "kl" in metrics
    assert _close(loss.detach(), expected.detach())
    gradient = _adapted_gradient(model, adapter, loss)
    assert float((gradient - expected_gradient).norm() / expected_gradient.norm()) < torch.finfo(torch.float32).eps  # a float32 buffer


def test_a_head_that_trains_takes_two_passes() -> None:
    """Full fine-tuning, and tied embeddings under it: one pass has no gradient for the head."""
    model, batch = make_exact_model("llama"), make_batch()
    loss_of = lambda logp, entropy: (logp.sum(), {})  # noqa: E731
    loss, _ = loss_on(model, batch, 1.0, "auto", loss_of, token_level=True)
    loss.backward()
    assert model.get_output_embeddings().weight.grad.any()


def test_nothing_to_score() -> None:
    model, batch = make_exact_model("llama"), make_batch(((3, 2), (5, 4)))
    attach_uneven(model)
    batch = replace(batch, completion_mask_nt=torch.zeros_like(batch.completion_mask_nt))
    loss, metrics = loss_on(model, batch, 1.0, "auto", lambda logp, entropy: (logp.sum(), {"n": entropy.sum()}), token_level=True)
    assert loss == 0 and metrics["n"] == 0
