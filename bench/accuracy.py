"""Errors against fp64, ours over TRL + PEFT's, in the dtype of both.

    logp error        sqrt(mean over the completion tokens of all seeds of (logp − logp64)²)
    gradient error    ‖g − g64‖ / ‖g64‖, all A and B in one vector, the median of the seeds

A seed has its own B, and four sampled completions of each of four prompts; the behaviour policy is the adapter
with noise, scored in fp64, so that ratios are real and none is 1. The truth is PEFT in fp64 with the plain loop's loss; TRL computes
its own `_compute_loss`, ours PolicyObjective's, the one that a run trains on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import peft
import torch
from rich.console import Console
from torch import Tensor
from trl import GRPOTrainer

from bench.double import Computed, Errors, errors, in_double
from bench.fastlora_side import gradients
from bench.peft_model import load_peft_model, peft_gradients, peft_parameters
from bench.plain_loop import Batch, dapo_loss, make_batch, token_logp
from bench.record import randomize_b, write_problems
from bench.reward import hashed
from bench.trl_side import make_trainer
from bench.workload import MODEL, NUM_GENERATIONS, DType, run_config
from fastlora.batches import policy_batch, with_policies
from fastlora.build import Parts, build
from fastlora.lora.packed import PackedAdapter
from fastlora.lora.peft_format import save_adapter
from fastlora.objectives import PolicyObjective
from fastlora.rollout.sampler import SamplingParams
from fastlora.types import Rollout

PROBLEMS = (9, 14, 21, 24, 25, 30, 33, 37)
"""Rows of gsm_symbolic with short prompts (48 to 73 tokens), so that fp64 stays affordable. Seed s has those from the s-th on."""
NUM_PROMPTS = 4
"""Of a seed. With one, the pooled ratio of two roundings of the same formula moved by ±.15 (LOG.md)."""
COMPLETION_TOKENS = 32
BEHAVIOUR_NOISE = 0.0005
"""Standard deviation of the noise in A and B of the behaviour policy: log-ratios of about ±0.01, none near a bound in the truth."""
EPSILON = 1.0
"""Clip range 0 to 2, out of reach of every side. At a bound the gradient jumps, and a token on the wrong side weighs more than all rounding
errors together: with 0.2, bf16's log-probs (off by 0.05 RMS, heavy tail) put a few of 512 there; without a bound and with noise of
0.002, one token of a large ratio doubled a seed's error in fp32 (LOG.md)."""

Gradients = dict[str, Tensor]


def measure_errors(dtype: DType, progress: Callable[[str], None]) -> tuple[Errors, Errors]:
    """(ours, TRL + PEFT's) on SmolLM2 in `dtype`, over as many seeds as PROBLEMS."""
    sides: tuple[list[Computed], list[Computed], list[Computed]] = ([], [], [])
    with tempfile.TemporaryDirectory() as scratch:
        contest = Contest(Path(scratch), dtype)
        for seed in range(len(PROBLEMS)):
            progress(f"errors in {dtype}: seed {seed + 1} of {len(PROBLEMS)}")
            for side, computed in zip(sides, contest.run(seed), strict=True):
                side.append(computed)
        contest.parts.rewards.close()
    ours, theirs, truth = sides
    return errors(ours, truth), errors(theirs, truth)


class Contest:
    """One model three times: ours and TRL + PEFT's in `dtype`, and the truth in fp64, with the same adapter in all."""

    def __init__(self, folder: Path, dtype: DType) -> None:
        write_problems(folder, PROBLEMS)
        config = run_config(folder, dtype, sampler="torch", completion_tokens=COMPLETION_TOKENS, adapter=False)
        evaluated, unclipped = (
            config.eval.model_copy(update={"num_problems": len(PROBLEMS)}),
            config.loss.model_copy(update={"epsilon": EPSILON}),
        )
        config = config.model_copy(update={"eval": evaluated, "loss": unclipped})
        self.parts: Parts = build(config, Console(quiet=True))
        assert self.parts.adapter is not None
        self.adapter: PackedAdapter = self.parts.adapter
        save_adapter(self.adapter, folder / "adapter", base_model=MODEL, scaling=config.lora.scaling)
        self.theirs = load_peft_model(folder / "adapter", dtype)
        self.truth = in_double(self.theirs)
        prompts = [example.prompt for example in self.parts.eval_examples]
        self.trainer = make_trainer(self.theirs, prompts, folder / "trl", NUM_PROMPTS * NUM_GENERATIONS, NUM_PROMPTS * NUM_GENERATIONS)
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.epsilon_low = self.trainer.epsilon_high = EPSILON

    def run(self, seed: int) -> tuple[Computed, Computed, Computed]:
        """(ours, TRL + PEFT's, the truth) of one seed."""
        randomize_b(self.adapter, seed)
        for model in (self.theirs, self.truth):
            copy_adapter(self.adapter, model)
        params = SamplingParams(NUM_GENERATIONS, COMPLETION_TOKENS)
        examples = [self.parts.eval_examples[(seed + i) % len(PROBLEMS)] for i in range(NUM_PROMPTS)]
        rollout = self.parts.sampler.sample(examples, params, seed=seed, adapter_version=0)
        batch = make_batch(rollout, hashed(rollout.texts, rollout.examples))
        with torch.no_grad(), perturbed(self.truth, seed):
            old = token_logp(self.truth, batch).masked_fill(~batch.scored_nt, 0.0)
        # every side reads the same float32 numbers, as a run would record them
        batch = replace(batch, old_logp_nt=old.float(), advantages_n=batch.advantages_n.float())
        return self._ours(rollout, batch), compute_trl(self.trainer, rollout, batch), compute_truth(self.truth, batch)

    def _ours(self, rollout: Rollout, batch: Batch) -> Computed:
        objective, flat = self.parts.objective, self.adapter.flat
        assert isinstance(objective, PolicyObjective)
        records = with_policies(policy_batch(rollout, batch.advantages_n, mask_truncated=False), batch.old_logp_nt, None)
        flat.grad.zero_()
        loss, _ = objective.loss(records)
        loss.backward()
        with torch.no_grad():
            logp_nt = objective._score(records)
        return computed(logp_nt, batch, gradients(flat))


def compute_trl(trainer: GRPOTrainer, rollout: Rollout, batch: Batch) -> Computed:
    """TRL's own loss and log-probabilities."""
    inputs = {
        "prompt_ids": rollout.prompt_ids_np,
        "prompt_mask": rollout.prompt_mask_np.long(),
        "completion_ids": rollout.completion_ids_nt,
        "completion_mask": rollout.completion_mask_nt.long(),
        "advantages": batch.advantages_n,
        "old_per_token_logps": batch.old_logp_nt,
        "num_items_in_batch": batch.scored_nt.sum(),
    }
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._compute_loss(trainer.model, inputs).backward()
    with torch.no_grad():
        logp_nt, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, batch.ids_nl, batch.mask_nl.long(), batch.completion_width
        )
    return computed(logp_nt, batch, peft_gradients(trainer.model))


def compute_truth(model: peft.PeftModel, batch: Batch) -> Computed:
    """The plain loss, in the model's fp64."""
    model.zero_grad()
    logp_nt = token_logp(model, batch)
    dapo_loss(logp_nt, batch, int(batch.scored_nt.sum()), EPSILON).backward()
    return computed(logp_nt.detach(), batch, peft_gradients(model))


def computed(logp_nt: Tensor, batch: Batch, gradient: Gradients) -> Computed:
    """Completion tokens only; matrices in the order of their names."""
    return Computed(logp_nt[batch.scored_nt].double(), torch.cat([gradient[name].double().flatten() for name in sorted(gradient)]))


@torch.no_grad()
def copy_adapter(adapter: PackedAdapter, model: peft.PeftModel) -> None:
    """Our A and B into PEFT's layers."""
    for name, parameter in peft_parameters(model).items():
        module, _, kind = name.rpartition(".")
        parameter.copy_(adapter.a_rd(module) if kind == "lora_A" else adapter.b_rn(module).t())


@contextmanager
def perturbed(model: peft.PeftModel, seed: int) -> Iterator[None]:
    """Inside, A and B carry noise of BEHAVIOUR_NOISE."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [parameter.data for parameter in peft_parameters(model).values()]
    before = [parameter.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.add_(BEHAVIOUR_NOISE * torch.randn(parameter.shape, generator=generator))
    try:
        yield
    finally:
        for parameter, old in zip(parameters, before, strict=True):
            parameter.copy_(old)
