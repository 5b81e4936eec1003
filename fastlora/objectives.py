"""What a step trains on and how it is scored: GRPO on sampled completions, or cross-entropy on given ones. Same loop for both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from fastlora.advantages import deposit_advantages, trajectory_advantages
from fastlora.batches import completion_batch, policy_batch, with_policies
from fastlora.config import RunConfig
from fastlora.data import batch_indices
from fastlora.lora.packed import PackedAdapter
from fastlora.losses.entropy_control import EntropyControl, applied_entropy_coef, next_entropy_control
from fastlora.losses.importance_sampling import behaviour_logp
from fastlora.losses.own import OwnLoss, own_loss
from fastlora.losses.policy import is_token_level, policy_loss
from fastlora.losses.sft import sft_loss
from fastlora.metrics import CompletionSample
from fastlora.mismatch import mismatch_metrics
from fastlora.model import BaseModel
from fastlora.plugins import load_function
from fastlora.policy import loss_on, score_in_parts
from fastlora.rewards.deposits import Rewarded
from fastlora.rollout.ahead import Ahead, BackgroundSampler, OnTime, Request, Rollouts
from fastlora.rollout.replay import put_together, take_apart
from fastlora.rollout.sampler import Sampler, SamplingParams, derived_seed
from fastlora.types import Example, Rollout, TrainBatch

Timer = Callable[[str], AbstractContextManager[None]]
"""`with timer("sampling"):` adds the time inside to that share of the step."""


@dataclass(frozen=True, slots=True)
class StepData:
    """One generation batch, ready to train on."""

    batch: TrainBatch
    num_tokens: int
    """Completion tokens in it."""
    metrics: Mapping[str, float]
    samples: Sequence[CompletionSample]
    """A few completions to read."""


class Objective(Protocol):
    """What the trainer needs of an objective."""

    def collect(self, step: int, adapter_version: int, timer: Timer) -> StepData:
        """The data of generation batch `step` (from 1) under the current policy."""
        ...

    def loss(self, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss to call backward on, metrics) of one micro-batch."""
        ...

    def optimizer_stepped(self) -> None:
        """Called after every optimizer step."""
        ...

    def step_metrics(self) -> dict[str, float]:
        """Called after the last optimizer step on a generation batch: metrics of all of it that its losses brought to light."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs: tensors, and what JSON can hold."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over `state`."""
        ...


class PolicyObjective:
    """GRPO: sample, reward, advantages, clipped surrogate."""

    def __init__(
        self,
        config: RunConfig,
        model: BaseModel,
        adapter: PackedAdapter | None,
        sampler: Sampler,
        reward: Callable[[Rollout], Rewarded],
        examples: Sequence[Example],
        reference: BaseModel | None = None,
    ) -> None:
        """reference: the policy that loss.beta holds on to; None = `model` without its adapter, where one stands on it."""
        self._config, self._model, self._adapter, self._reference = config, model, adapter, reference or model
        self._reward, self._examples = reward, examples
        self._own_loss: OwnLoss | None = load_function(config.loss.function, "loss.function") if config.loss.function else None
        ahead = config.vllm.staleness > 0
        self._rollouts: Rollouts = (
            Ahead(cast(BackgroundSampler, sampler), self._request, config.trainer.steps) if ahead else OnTime(sampler, self._request)
        )
        self._entropy = EntropyControl(config.loss.entropy_coef)
        self._entropy_sum = self._entropy_tokens = 0.0
        self._scored: list[TrainBatch] = []  # micro-batches of this step with their behaviour policy, where the sampler is another

    def collect(self, step: int, adapter_version: int, timer: Timer) -> StepData:
        """Samples, rewards and, where the loss needs them, scores under the behaviour and the reference policy."""
        c = self._config
        self._scored = []
        with timer("sampling"):
            rollout = self._rollouts.take(step, adapter_version)
        with timer("reward"):
            rewarded = self._reward(rollout)
            advantages = self._advantages(rollout, rewarded)
        with timer("update"):
            options = {"mask_truncated": c.loss.mask_truncated_completions, "sampler_is_trainer": c.sampler_is_trainer}
            batch = self._with_policies(policy_batch(rollout, advantages.to(self._model.device), **options))
        samples = completion_samples(step, rollout, rewarded, advantages)[: c.log.completions]
        metrics = rollout_metrics(rollout, rewarded) | advantage_metrics(batch)
        staleness = {"sampler/staleness": float(adapter_version - rollout.adapter_version)} if c.rollout.sampler == "vllm" else {}
        return StepData(batch, rollout.num_tokens, metrics | staleness, samples)

    def _request(self, step: int) -> Request:
        """What step `step` samples, a function of the config alone."""
        c, r = self._config, self._config.rollout
        rows = batch_indices(step - 1, r.num_prompts, len(self._examples), c.seed)
        params = SamplingParams(r.num_generations, r.max_completion_length, r.temperature, r.top_p, r.stop)
        return Request(tuple(self._examples[row] for row in rows), params, derived_seed(c.seed, step))

    def _advantages(self, rollout: Rollout, rewarded: Rewarded) -> Tensor:
        c = self._config.advantage
        if c.estimator == "deposits":
            return deposit_advantages(rewarded.deposits, rollout.completion_mask_nt.cpu(), rollout.num_generations, c)
        return trajectory_advantages(rewarded.rewards_nk, rewarded.weights_k, rollout.num_generations, c)

    @torch.no_grad()
    def _with_policies(self, batch: TrainBatch) -> TrainBatch:
        """Behaviour log-probs where an optimizer step will come between sampling and loss (TRL's rule); reference ones where beta > 0."""
        c = self._config
        micro_batches = c.steps_per_generation * c.trainer.num_iterations
        stale = c.trainer.gradient_accumulation_steps % micro_batches != 0
        old = self._score(self._model, batch) if stale else None
        if c.loss.beta == 0:
            return with_policies(batch, old, None)
        with self._adapter.disabled() if self._adapter else nullcontext():
            return with_policies(batch, old, self._score(self._reference, batch))

    def _score(self, model: BaseModel, batch: TrainBatch) -> Tensor:
        c = self._config
        how = (c.steps_per_generation, c.rollout.temperature, c.trainer.implementation, c.scoring_top_p)
        return score_in_parts(model.module, batch, *how)

    def loss(self, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """See Objective."""
        c = self._config
        entropy_coef = applied_entropy_coef(self._entropy, c.loss)
        scored_nt = torch.empty(0)
        split = {"accumulation_steps": c.trainer.gradient_accumulation_steps, "steps_per_generation": c.steps_per_generation}

        def loss_of(logp_nt: Tensor, entropy_nt: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            nonlocal scored_nt
            scored_nt = logp_nt.detach()  # in the end those of the last call, which has every token
            if self._own_loss is not None:
                return own_loss(self._own_loss, logp_nt, entropy_nt, batch, **split)
            return policy_loss(
                logp_nt,
                entropy_nt,
                batch,
                c.loss,
                **split,
                max_completion_length=c.rollout.max_completion_length,
                entropy_coef=entropy_coef,
            )

        model, temperature, implementation = self._model.module, c.rollout.temperature, c.trainer.implementation
        token_level = is_token_level(c.loss, entropy_coef)
        loss, metrics = loss_on(model, batch, temperature, implementation, loss_of, token_level=token_level, top_p=c.scoring_top_p)
        if batch.sampler_logp_nt is not None:
            self._scored.append(replace(batch, old_logp_nt=behaviour_logp(scored_nt, batch)))
        self._entropy_sum += float(metrics.pop("entropy_sum"))
        self._entropy_tokens += float(metrics.pop("entropy_tokens"))
        return loss, metrics

    def optimizer_stepped(self) -> None:
        """Moves the adaptive entropy coefficient."""
        self._entropy = next_entropy_control(self._entropy, self._entropy_sum, self._entropy_tokens, self._config.loss)
        self._entropy_sum = self._entropy_tokens = 0.0

    def step_metrics(self) -> dict[str, float]:
        """The mismatch, where the sampler is not the trainer. Every pass over the batch has the same, so that several do no harm."""
        return mismatch_metrics(self._scored, self._config.loss) if self._scored else {}

    def state(self) -> dict[str, Any]:
        """The entropy control, `last_entropy` None for infinite; the rollouts that were sampled ahead."""
        state = asdict(self._entropy)
        state["last_entropy"] = state["last_entropy"] if np.isfinite(state["last_entropy"]) else None
        ahead = {}
        for step, rollout in self._rollouts.kept().items():
            tensors, ahead[str(step)] = take_apart(rollout)
            state |= {f"ahead.{step}.{name}": tensor for name, tensor in tensors.items()}
        if ahead:
            state["ahead"] = ahead
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        """See Objective."""
        last = state["last_entropy"]
        self._entropy = EntropyControl(state["coef"], float("inf") if last is None else last)
        for step, record in state.get("ahead", {}).items():
            tensors = {name.rpartition(".")[2]: value for name, value in state.items() if name.startswith(f"ahead.{step}.")}
            self._rollouts.put(int(step), put_together(tensors, record, self._request(int(step)).examples, self._model.device))


class SupervisedObjective:
    """SFT: token-mean cross-entropy on the data set's completions; `rollout.num_prompts` of them per step."""

    def __init__(self, config: RunConfig, model: BaseModel, examples: Sequence[Example]) -> None:
        self._config, self._model, self._examples = config, model, examples

    def collect(self, step: int, adapter_version: int, timer: Timer) -> StepData:
        """The next rows of the epoch's order."""
        rows = batch_indices(step - 1, self._config.rollout.num_prompts, len(self._examples), self._config.seed)
        batch = completion_batch([self._examples[row] for row in rows], self._model)
        return StepData(batch, batch.num_items_in_batch, {}, ())

    def loss(self, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """See Objective; log-probabilities at temperature 1."""
        c = self._config

        def loss_of(logp_nt: Tensor, entropy_nt: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return sft_loss(
                logp_nt,
                batch.loss_mask_nt,
                batch.num_items_in_batch,
                accumulation_steps=c.trainer.gradient_accumulation_steps,
                steps_per_generation=c.steps_per_generation,
            )

        return loss_on(self._model.module, batch, 1.0, c.trainer.implementation, loss_of, token_level=True)

    def optimizer_stepped(self) -> None:
        """Nothing to do."""

    def step_metrics(self) -> dict[str, float]:
        """None."""
        return {}

    def state(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing to take over."""


def rollout_metrics(rollout: Rollout, rewarded: Rewarded) -> dict[str, float]:
    """Reward statistics (unscorable completions left out), lengths and truncation of a rollout."""
    total_n = rewarded.deposits.trajectory_rewards_n
    scored = total_n[~total_n.isnan()]
    per_group = total_n.view(-1, rollout.num_generations)
    spread = per_group.nan_to_num(0.0).amax(1) - per_group.nan_to_num(0.0).amin(1)
    metrics = {
        **rollout.metrics,
        "reward/mean": float(scored.mean()) if len(scored) else float("nan"),
        "reward/std": float(scored.std()) if len(scored) > 1 else 0.0,
        "reward/frac_zero_std": float((spread == 0).float().mean()),
        "reward/timeouts": float(rewarded.timeouts),
        "reward/unscorable": float(rewarded.unscorable),
        "completion/length_mean": rollout.num_tokens / len(rollout.texts),
        "completion/truncated": float((~rollout.finished_n).float().mean()),
    }
    for name, rewards_n in zip(rewarded.names, rewarded.rewards_nk.unbind(1), strict=True):
        metrics[f"reward/{name}"] = float(rewards_n.nanmean())
    return metrics


def advantage_metrics(batch: TrainBatch) -> dict[str, float]:
    """Standard deviation (of all, not of a sample) and largest size of the advantages of the tokens that train; 0 if there are none."""
    active = batch.advantages_nt.expand(batch.loss_mask_nt.shape)[batch.loss_mask_nt].double()
    if not len(active):
        return {"advantage/std": 0.0, "advantage/max_abs": 0.0}
    return {"advantage/std": float(active.std(correction=0)), "advantage/max_abs": float(active.abs().max())}


def completion_samples(step: int, rollout: Rollout, rewarded: Rewarded, advantages: Tensor) -> list[CompletionSample]:
    """One completion per prompt, to be read; its advantage is that of its first token."""
    samples = []
    first_advantage_n = advantages.view(len(rollout.texts), -1)[:, :1].sum(1)
    for n in range(0, len(rollout.texts), rollout.num_generations):
        example = rollout.examples[n // rollout.num_generations]
        rewards = dict(zip(rewarded.names, rewarded.rewards_nk[n].tolist(), strict=True))
        samples.append(
            CompletionSample(
                step=step,
                prompt=example.prompt,
                completion=rollout.texts[n],
                gold=example.answer,
                rewards=rewards,
                advantage=float(first_advantage_n[n]),
                num_tokens=int(rollout.completion_mask_nt[n].sum()),
                finished=bool(rollout.finished_n[n]),
                adapter_version=rollout.adapter_version,
            )
        )
    return samples
