"""Objectives on tiny models in fp64: what is collected, and the loss and gradient against torch's own functions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fastlora.batches import policy_batch
from fastlora.config import RunConfig
from fastlora.lora.packed import PackedAdapter
from fastlora.model import BaseModel, wrap_model
from fastlora.objectives import PolicyObjective, SupervisedObjective, advantage_metrics, derived_seed
from fastlora.rewards.deposits import Rewarded, deposit_at_end
from fastlora.rollout.replay import RecordingSampler, ReplaySampler, read_rollout, rollout_file, write_rollout
from fastlora.rollout.sampler import Sampler
from fastlora.rollout.torch import TorchSampler
from fastlora.types import Example, Rollout, TrainBatch
from tests.exact import make_exact_model, score_one_by_one
from tests.lora.adapters import attach_uneven
from tests.rewards.rollouts import make_rollout
from tests.tolerances import FP32_ADVANTAGE, FP32_LOGPROB, FP64_EXACT

TEXTS = (("1 + 1 =", " 2"), ("a", ""), ("hello", " world!"), ("2 * 3 is", " 6"))
EXAMPLES = tuple(Example(i, prompt, "", completion) for i, (prompt, completion) in enumerate(TEXTS))
EOS = range(40, 80)
"""So many tokens end a completion that some are cut short and some are not."""


def _config(**sections: dict[str, Any] | str) -> RunConfig:
    defaults: dict[str, Any] = {
        "rollout": {"num_prompts": 2, "num_generations": 4, "max_completion_length": 6, "temperature": 0.7},
        "loss": {},
        "trainer": {},
    }
    for name, values in sections.items():
        defaults[name] = {**defaults[name], **values} if isinstance(values, dict) else values
    return RunConfig(**defaults)


@pytest.fixture
def model(tiny_tokenizer: PreTrainedTokenizerFast) -> BaseModel:
    wrapped = wrap_model(make_exact_model("llama"), tiny_tokenizer, "tiny")
    return BaseModel(wrapped.module, wrapped.tokenizer, wrapped.source, wrapped.device, wrapped.context_length, tuple(EOS), wrapped.pad_id)


def _reward(rollout: Rollout) -> Rewarded:
    """Length of the text, NaN for the first completion of the second prompt."""
    scores = [float(len(text)) for text in rollout.texts]
    scores[rollout.num_generations] = float("nan")
    rewards = torch.tensor(scores)
    deposits = deposit_at_end([None if s != s else s for s in scores], rollout)
    return Rewarded(("length",), torch.ones(1), rewards[:, None], deposits, 0)


@contextmanager
def _no_timer(_: str) -> Iterator[None]:
    yield


def _policy(config: RunConfig, model: BaseModel, adapter: PackedAdapter | None, sampler: Sampler | None = None) -> PolicyObjective:
    return PolicyObjective(config, model, adapter, sampler or TorchSampler(model, 64), _reward, EXAMPLES)


def _gradient(adapter: PackedAdapter, loss: Tensor) -> Tensor:
    adapter.flat.grad.zero_()
    loss.backward()
    return adapter.flat.grad.clone()


def _relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


FLOAT32 = torch.finfo(torch.float32).eps
"""The adapter's values and gradients, and the batch's log-probabilities, are float32 beside an fp64 model."""


def test_one_step_on_a_replayed_rollout(model: BaseModel, tmp_path: Path) -> None:
    """Recorded live, replayed: the same batch; loss = −Σ A ρ / N with ρ = 1, its gradient −Σ A ∇logp / N, from plain logits."""
    adapter, config = attach_uneven(model.module), _config()
    live = _policy(config, model, adapter, RecordingSampler(TorchSampler(model, 64), tmp_path)).collect(1, 0, _no_timer)
    objective = _policy(config, model, adapter, ReplaySampler(tmp_path))
    shares: list[str] = []
    data = objective.collect(1, 0, lambda name: shares.append(name) or nullcontext())  # type: ignore[func-returns-value]
    batch = data.batch
    assert shares == ["sampling", "reward", "update"]
    for name in TrainBatch.__dataclass_fields__:
        a, b = getattr(live.batch, name), getattr(batch, name)
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    assert batch.old_logp_nt is None and batch.ref_logp_nt is None

    loss, metrics = objective.loss(batch)
    assert loss.requires_grad and set(metrics) >= {"policy_loss", "entropy", "ratio_mean"} and "entropy_sum" not in metrics
    gradient = _gradient(adapter, loss)
    logp_nt, entropy_nt = score_one_by_one(model.module, batch, 0.7)
    mask, advantages = batch.completion_mask_nt, batch.advantages_nt.double()
    expected = -(advantages * (logp_nt - logp_nt.detach()).exp() * mask).sum() / mask.sum()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=FLOAT32)
    assert float(metrics["entropy"]) == pytest.approx(float(entropy_nt.sum() / mask.sum()), rel=FP64_EXACT)
    assert _relative(gradient, _gradient(adapter, expected)) < FLOAT32


def test_advantages_are_the_groups(model: BaseModel) -> None:
    """(r − mean) / (std + eps) inside each group; an unscorable completion has none, and the samples to read say what happened."""
    rollouts: list[Rollout] = []
    reward = lambda rollout: rollouts.append(rollout) or _reward(rollout)  # type: ignore[func-returns-value]  # noqa: E731
    objective = PolicyObjective(_config(), model, attach_uneven(model.module), TorchSampler(model, 64), reward, EXAMPLES)
    data = objective.collect(1, 5, _no_timer)
    (rollout,) = rollouts
    first = torch.tensor([float(len(text)) for text in rollout.texts[:4]])
    expected = (first - first.mean()) / (first.std() + 1e-4)
    assert first.std() > 0 and float((data.batch.advantages_nt[:4, 0] - expected).abs().max()) < FP32_ADVANTAGE
    assert rollout.adapter_version == 5 and data.metrics["reward/unscorable"] == 1.0
    assert [(s.prompt, s.completion) for s in data.samples] == [(rollout.examples[i].prompt, rollout.texts[4 * i]) for i in (0, 1)]
    assert data.samples[0].advantage == pytest.approx(float(expected[0]), abs=FP32_ADVANTAGE)
    assert data.samples[0].rewards == {"length": first[0].item()}
    active = [float(a) for n, a in enumerate(data.batch.advantages_nt[:, 0]) for _ in range(int(data.batch.loss_mask_nt[n].sum()))]
    mean = sum(active) / len(active)
    assert data.metrics["advantage/std"] == pytest.approx(math.sqrt(sum((a - mean) ** 2 for a in active) / len(active)), rel=FP64_EXACT)
    assert data.metrics["advantage/max_abs"] == max(map(abs, active)) > 1


def test_advantages_of_tokens_that_do_not_train_are_not_measured() -> None:
    rollout = make_rollout(["x"] * 2, ["1"], [2, 3])
    advantages_nt = torch.tensor([[1.0, 3.0, 0.0], [-9.0, -9.0, -9.0]])
    batch = policy_batch(replace(rollout, finished_n=torch.tensor([True, False])), advantages_nt, mask_truncated=True)
    assert advantage_metrics(batch) == {"advantage/std": 1.0, "advantage/max_abs": 3.0}
    assert advantage_metrics(replace(batch, loss_mask_nt=batch.loss_mask_nt & False)) == {"advantage/std": 0.0, "advantage/max_abs": 0.0}


@pytest.mark.parametrize(
    ("trainer", "stale"),
    [
        ({}, False),
        ({"num_iterations": 2}, True),
        ({"gradient_accumulation_steps": 2}, False),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 4}, True),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 2, "num_iterations": 2}, False),
    ],
    ids=str,
)
def test_old_log_probabilities_are_kept_where_a_step_comes_between(model: BaseModel, trainer: dict[str, int], stale: bool) -> None:
    """num_iterations 2: the second pass sees a moved policy, and the ratio says so."""
    adapter = attach_uneven(model.module)
    config = _config(trainer=trainer)
    objective = _policy(config, model, adapter)
    batch = objective.collect(1, 0, _no_timer).batch
    assert (batch.old_logp_nt is not None) == stale
    if batch.old_logp_nt is None:
        return
    assert not batch.old_logp_nt.requires_grad
    behaviour, _ = score_one_by_one(model.module, batch, 0.7)
    assert float((batch.old_logp_nt - behaviour).abs().max()) < FP64_EXACT
    with torch.no_grad():
        adapter.flat.data.mul_(1.5)
    part = batch.split(config.steps_per_generation)[0]
    _, metrics = objective.loss(part)
    moved, _ = score_one_by_one(model.module, part, 0.7)
    mask = part.completion_mask_nt
    ratio = ((moved - part.old_logp_nt).exp() * mask).sum() / mask.sum()
    assert float(metrics["ratio_mean"]) == pytest.approx(float(ratio), rel=FP64_EXACT) and abs(float(ratio) - 1) > 1e-3


def test_the_reference_policy_is_the_adapter_off(model: BaseModel) -> None:
    base = make_exact_model("llama")
    adapter = attach_uneven(model.module)
    objective = _policy(_config(loss={"beta": 0.1}), model, adapter)
    batch = objective.collect(1, 0, _no_timer).batch
    expected, _ = score_one_by_one(base, batch, 0.7)
    current, _ = score_one_by_one(model.module, batch, 0.7)
    assert batch.ref_logp_nt is not None and not batch.ref_logp_nt.requires_grad
    assert float((batch.ref_logp_nt - expected.detach()).abs().max()) < FP64_EXACT < float((current - expected).detach().abs().max())
    assert float(objective.loss(batch)[1]["kl"]) > 0


def test_the_reference_policy_of_full_fine_tuning_stands_still(model: BaseModel) -> None:
    """Every weight moves, the reference's do not."""
    base = make_exact_model("llama")
    reference = wrap_model(make_exact_model("llama"), model.tokenizer, "tiny")
    objective = PolicyObjective(_config(loss={"beta": 0.1}), model, None, TorchSampler(model, 64), _reward, EXAMPLES, reference)
    with torch.no_grad():
        for weight in model.module.parameters():
            weight.mul_(1.05)
    batch = objective.collect(1, 0, _no_timer).batch
    expected, _ = score_one_by_one(base, batch, 0.7)
    current, _ = score_one_by_one(model.module, batch, 0.7)
    assert batch.ref_logp_nt is not None and not batch.ref_logp_nt.requires_grad
    assert float((batch.ref_logp_nt - expected.detach()).abs().max()) < FP64_EXACT < float((current - expected).detach().abs().max())


def test_truncated_completions_do_not_train_when_masked(model: BaseModel) -> None:
    objective = _policy(
        _config(loss={"mask_truncated_completions": True}, rollout={"max_completion_length": 3}), model, attach_uneven(model.module)
    )
    data = objective.collect(1, 0, _no_timer)
    batch, rows = data.batch, data.batch.loss_mask_nt.any(1)
    cut = data.metrics["completion/truncated"]
    assert 0 < cut < 1 and int(rows.sum()) == round((1 - cut) * 8)
    assert batch.num_items_in_batch == int(batch.completion_mask_nt[rows].sum()) < data.num_tokens


def test_the_same_step_collects_the_same_data(model: BaseModel) -> None:
    """A resumed run needs the step alone; another step or seed is other data."""
    adapter = attach_uneven(model.module)
    ids = [
        _policy(_config(seed=seed) if seed else _config(), model, adapter).collect(step, 0, _no_timer).batch.completion_ids_nt.tolist()
        for step, seed in ((1, 0), (1, 0), (2, 0))
    ]
    assert ids[0] == ids[1] != ids[2]
    seeds = {derived_seed(seed, step) for seed in range(20) for step in range(50)}
    assert len(seeds) == 1000 and all(0 <= seed < 2**63 for seed in seeds) and derived_seed(3, 7) == derived_seed(3, 7)


def test_the_entropy_controller_survives_a_restart(model: BaseModel) -> None:
    loss = {"use_adaptive_entropy": True, "entropy_target": 50.0, "entropy_coef": 0.01}
    first = _policy(_config(loss=loss), model, attach_uneven(model.module))
    assert first.state() == {"coef": 0.01, "last_entropy": None}
    first.loss(first.collect(1, 0, _no_timer).batch)
    first.optimizer_stepped()
    state = first.state()
    assert state["coef"] == pytest.approx(0.015) and 0 < state["last_entropy"] < 50
    second = _policy(_config(loss=loss), model, None)
    for saved in (state, {"coef": 0.01, "last_entropy": None}):
        second.restore(saved)
        assert second.state() == saved


def _cross_entropy(module: PreTrainedModel, batch: TrainBatch) -> Tensor:
    """Mean over all target tokens, torch.nn.functional.cross_entropy on the logits of each sequence alone."""
    logits, targets = [], []
    for n in range(len(batch)):
        prompt, completion = batch.prompt_ids_np[n][batch.prompt_mask_np[n]], batch.completion_ids_nt[n][batch.completion_mask_nt[n]]
        logits.append(module(torch.cat([prompt, completion])[None], use_cache=False).logits[0, len(prompt) - 1 : -1])
        targets.append(completion)
    return F.cross_entropy(torch.cat(logits), torch.cat(targets))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_sft_is_the_token_mean_of_cross_entropy(model: BaseModel, accumulation: int) -> None:
    """Whatever the number of micro-batches: completions of 3, 1, 8 and 3 tokens, so that a mean of means would differ."""
    adapter = attach_uneven(model.module)
    config = _config(objective="sft", rollout={"num_prompts": 4}, trainer={"gradient_accumulation_steps": accumulation})
    objective = SupervisedObjective(config, model, EXAMPLES)
    data = objective.collect(1, 0, _no_timer)
    assert data.num_tokens == 3 + 1 + 8 + 3 and sorted(data.batch.completion_mask_nt.sum(1).tolist()) == [1, 3, 3, 8]
    losses = [objective.loss(part) for part in data.batch.split(accumulation)]
    total = torch.stack([loss for loss, _ in losses]).sum()
    expected = _cross_entropy(model.module, data.batch)
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=FP64_EXACT)
    assert _relative(_gradient(adapter, total), _gradient(adapter, expected)) < FLOAT32
    assert float(losses[0][1]["nll"]) == pytest.approx(float(_cross_entropy(model.module, data.batch.split(accumulation)[0]).detach()))


def test_sft_goes_through_the_examples_once_an_epoch(model: BaseModel) -> None:
    config = _config(objective="sft", rollout={"num_prompts": 2})
    objective = SupervisedObjective(config, model, EXAMPLES)
    seen = [n for step in (1, 2) for n in objective.collect(step, 0, _no_timer).batch.prompt_mask_np.sum(1).tolist()]
    assert sorted(seen) == sorted(len(e.prompt) for e in EXAMPLES)
    assert objective.state() == {}


def _recorded(model: BaseModel, adapter: PackedAdapter, folder: Path, noise: float = 0.0, **rollout: float) -> Rollout:
    """One step's rollout, recorded for replay as if another sampler, off by `noise`, had made it."""
    config = _config(rollout=rollout)
    _policy(config, model, adapter, RecordingSampler(TorchSampler(model, 64), folder)).collect(1, 0, _no_timer)
    path = rollout_file(folder, 0)
    rollout_ = read_rollout(path)
    said_nt = rollout_.sampler_logp_nt + noise * torch.randn(rollout_.sampler_logp_nt.shape) * rollout_.completion_mask_nt
    write_rollout(replace(rollout_, sampler_logp_nt=said_nt), path)
    return replace(rollout_, sampler_logp_nt=said_nt)


def _replaying(folder: Path, **sections: Any) -> RunConfig:
    rollout = {"sampler": "replay", "replay_path": folder, **sections.pop("rollout", {})}
    return _config(rollout=rollout, **sections)


def _forward_passes(model: BaseModel) -> list[int]:
    """Grows by one at each pass through the model's layers."""
    passes: list[int] = []
    model.module.base_model.norm.register_forward_hook(lambda *_: passes.append(1))
    return passes


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_another_sampler_is_corrected_for_without_a_forward_pass(model: BaseModel, tmp_path: Path, mode: str) -> None:
    """loss = −Σ A w / N, its gradient −Σ A w ∇logp / N, w from the plain model; two micro-batches, two forward passes."""
    adapter = attach_uneven(model.module)
    said_nt = _recorded(model, adapter, tmp_path, noise=0.3).sampler_logp_nt
    loss = {"sampler_correction": mode, "sampler_correction_max": 1.2, "sampler_correction_min": 0.7}
    objective = _policy(
        _replaying(tmp_path, loss=loss, trainer={"gradient_accumulation_steps": 2}), model, adapter, ReplaySampler(tmp_path)
    )
    passes = _forward_passes(model)
    batch = objective.collect(1, 0, _no_timer).batch
    assert batch.old_logp_nt is None and torch.equal(batch.sampler_logp_nt, said_nt)
    losses = [objective.loss(part)[0] for part in batch.split(2)]
    assert len(passes) == 2
    logp_nt, _ = score_one_by_one(model.module, batch, 0.7)
    mask = batch.completion_mask_nt
    d_nt = (logp_nt.detach() - said_nt) * mask
    w = d_nt.exp() if mode.startswith("token") else d_nt.sum(1, keepdim=True).exp()
    outside = (w < 0.7) | (w > 1.2)
    assert bool(outside.any()) and not bool(outside.all())
    w = w.clamp(0.7, 1.2) if mode.endswith("truncate") else w.masked_fill(outside, 0.0)
    expected = -(batch.advantages_nt.double() * w * (logp_nt - logp_nt.detach()).exp() * mask).sum() / mask.sum()
    total = torch.stack(losses).sum()
    assert float(total.detach()) == pytest.approx(float(expected.detach()), abs=FLOAT32)
    assert _relative(_gradient(adapter, total), _gradient(adapter, expected)) < FLOAT32


@pytest.mark.parametrize(
    "trainer",
    [{}, {"gradient_accumulation_steps": 2}, {"num_iterations": 2}, {"steps_per_generation": 2}],
    ids=["1", "2", "twice", "2 steps"],
)
def test_the_mismatch_is_that_of_the_policy_that_sampled(model: BaseModel, tmp_path: Path, trainer: dict[str, int]) -> None:
    """Of the whole generation batch, however it is trained on and however the policy moves meanwhile; of the next, nothing of this one."""
    adapter = attach_uneven(model.module)
    said_nt = _recorded(model, adapter, tmp_path, noise=0.3).sampler_logp_nt
    config = _replaying(tmp_path, trainer=trainer)
    objective = _policy(config, model, adapter, ReplaySampler(tmp_path))
    batch = objective.collect(1, 0, _no_timer).batch
    logp_nt, _ = score_one_by_one(model.module, batch, 0.7)
    difference = (said_nt - logp_nt.detach())[batch.completion_mask_nt]
    for _ in range(config.trainer.num_iterations):
        for part in batch.split(config.steps_per_generation):
            objective.loss(part)
            if batch.old_logp_nt is not None:  # an optimizer step
                adapter.flat.data.detach().mul_(1.3)
    metrics = objective.step_metrics()
    assert metrics["mismatch/mean"] == pytest.approx(float(difference.mean()), rel=1e-6)
    assert metrics["mismatch/abs_max"] == pytest.approx(float(difference.abs().max()), rel=1e-6)
    assert "mismatch/ratio_mean" not in metrics  # no correction, no ratio
    objective.collect(1, 0, _no_timer)
    assert objective.step_metrics() == {}


def test_the_trainers_own_sampler_is_not_compared(model: BaseModel) -> None:
    objective = _policy(_config(), model, attach_uneven(model.module))
    batch = objective.collect(1, 0, _no_timer).batch
    objective.loss(batch)
    assert batch.sampler_logp_nt is None and objective.step_metrics() == {}


@pytest.mark.parametrize("trainer", [{}, {"num_iterations": 2}], ids=["one pass", "old log-probabilities kept"])
def test_renormalising_closes_the_gap_of_a_nucleus(model: BaseModel, tmp_path: Path, trainer: dict[str, int]) -> None:
    """Sampled at top-p .8 with this very policy: the full softmax is up to −log .8 away, the renormalised one by float32 rounding."""
    adapter = attach_uneven(model.module)
    _recorded(model, adapter, tmp_path, top_p=0.8)
    metrics = {}
    for renormalize in (False, True):
        loss = {"renormalize_top_p": renormalize, "beta": 0.1}
        config = _replaying(tmp_path, rollout={"top_p": 0.8}, loss=loss, trainer=trainer)
        objective = _policy(config, model, adapter, ReplaySampler(tmp_path))
        batch = objective.collect(1, 0, _no_timer).batch
        _, shown = objective.loss(batch)
        assert float(shown["ratio_mean"]) == pytest.approx(1.0, abs=FLOAT32)  # behaviour and current policy are normalised alike
        metrics[renormalize] = objective.step_metrics()
    assert 0.1 < metrics[False]["mismatch/mean"] <= -math.log(0.8) + FP32_LOGPROB
    assert metrics[True]["mismatch/abs_max"] < FP32_LOGPROB * 10


def test_supervised_training_has_no_sampler(model: BaseModel) -> None:
    assert SupervisedObjective(_config(objective="sft", rollout={"num_prompts": 4}), model, EXAMPLES).step_metrics() == {}
