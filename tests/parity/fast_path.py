"""The fast path (fused layers, packed tokens with shared prompts, grouped modules, one pass over the head) against the
truth in fp64, and PEFT + TRL against the same truth.

    logp error        sqrt(mean over completion tokens of (logp − logp64)²)
    gradient error    ‖g − g64‖ / ‖g64‖, all A and B in one vector

both over several seeds together. The truth is PEFT in fp64, a plain log-softmax of its logits, and TRL's `_compute_loss` on that.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOTrainer

from bench.double import Computed, Errors, errors, in_double
from fastlora.config import LoraConfig, LossConfig
from fastlora.fused_layers import fuse_layers
from fastlora.lora.packed import PackedAdapter, attach
from fastlora.losses.policy import is_token_level, policy_loss
from fastlora.model import wrap_model
from fastlora.policy import loss_on
from fastlora.rollout.sampler import pad_left, pad_right
from fastlora.types import TrainBatch
from tests.parity.trl_cases import make_trainer, record
from tests.parity.twins import copy_to_peft, packed_tensors, peft_tensors, randomize, rank_pattern, specs_for
from tests.tiny import EOS_ID, VOCAB_SIZE, make_tiny_model, make_tiny_tokenizer

LOSS = LossConfig(loss_type="dapo", beta=0.05)


def make_batch(vocabulary: int, seed: int, prompts: Sequence[int], completions: Sequence[int]) -> TrainBatch:
    """Random tokens of these lengths, equal groups of completions for each prompt, no recorded policies (see `with_recorded_policies`)."""
    generator = torch.Generator().manual_seed(seed)
    n, p, t = len(completions), max(prompts), max(completions)
    group = n // len(prompts)
    completion_mask = torch.arange(t) < torch.tensor(completions)[:, None]
    return TrainBatch(
        prompt_ids_np=torch.randint(3, vocabulary, (len(prompts), p), generator=generator).repeat_interleave(group, 0),
        prompt_mask_np=torch.arange(p) >= p - torch.tensor(prompts).repeat_interleave(group)[:, None],
        completion_ids_nt=torch.randint(3, vocabulary, (n, t), generator=generator).masked_fill(~completion_mask, EOS_ID),
        completion_mask_nt=completion_mask,
        loss_mask_nt=completion_mask,
        advantages_nt=torch.randn(n, 1, generator=generator),
        old_logp_nt=None,
        ref_logp_nt=None,
        sampler_logp_nt=None,
        num_items_in_batch=int(completion_mask.sum()),
    )


def trl_inputs(batch: TrainBatch, dtype: torch.dtype) -> dict[str, Tensor]:
    """The batch as TRL's loss takes it."""
    return {
        "prompt_ids": batch.prompt_ids_np,
        "prompt_mask": batch.prompt_mask_np.long(),
        "completion_ids": batch.completion_ids_nt,
        "completion_mask": batch.completion_mask_nt.long(),
        "advantages": batch.advantages_nt.squeeze(1).to(dtype),
        **({} if batch.old_logp_nt is None else {"old_per_token_logps": batch.old_logp_nt.to(dtype)}),
        "ref_per_token_logps": batch.ref_logp_nt.to(dtype),
        "num_items_in_batch": torch.tensor(batch.num_items_in_batch),
    }


def trl_trainer(model: PreTrainedModel, config: LoraConfig, adapter: PackedAdapter) -> GRPOTrainer:
    """PEFT + TRL on this model (which PEFT changes) in its dtype, with our A and B; PEFT keeps a bf16 model's adapters in fp32."""
    trainer = make_trainer(model, config, lambda: record(), loss_type=LOSS.loss_type, beta=LOSS.beta)
    copy_to_peft(adapter, trainer.model)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def plain_logp(self: GRPOTrainer, model: nn.Module, ids: Tensor, mask: Tensor, keep: int, **_: Any) -> tuple[Tensor, Tensor, None]:
    """The definition: log-softmax of the logits at the next token, and its entropy."""
    log_p = model(input_ids=ids, attention_mask=mask).logits[:, -keep - 1 : -1].log_softmax(-1)
    logp_nt = log_p.gather(-1, ids[:, -keep:, None]).squeeze(-1)
    return logp_nt * mask[:, -keep:], -(log_p.exp() * log_p).sum(-1), None


def truth_trainer(model: PreTrainedModel, config: LoraConfig, adapter: PackedAdapter) -> GRPOTrainer:
    """TRL's loss on PEFT's layers, all in fp64."""
    trainer = trl_trainer(in_double(model), config, adapter)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float64}
    trainer._get_per_token_logps_and_entropies = partial(plain_logp, trainer)
    return trainer


@torch.no_grad()
def trl_logp(trainer: GRPOTrainer, batch: TrainBatch) -> Tensor:
    """[n, t]."""
    ids = torch.cat([batch.prompt_ids_np, batch.completion_ids_nt], dim=1)
    mask = torch.cat([batch.prompt_mask_np, batch.completion_mask_nt], dim=1).long()
    return trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, batch.completion_ids_nt.shape[1])[0]


def run_trl(trainer: GRPOTrainer, batch: TrainBatch, adapter: PackedAdapter, dtype: torch.dtype = torch.float32) -> Computed:
    """TRL's own loss and backward pass."""
    trainer.model.zero_grad()
    trainer._compute_loss(trainer.model, trl_inputs(batch, dtype)).backward()
    return _result(trl_logp(trainer, batch), batch, peft_tensors(trainer.model, adapter, gradient=True))


def with_recorded_policies(batch: TrainBatch, logp_nt: Tensor, seed: int) -> TrainBatch:
    """Behaviour and reference policies a little off the current one: ratios of e^±0.15, a sixth of them clipped.

    None within 5 % of a clip bound: there the gradient jumps, and one token that bf16's error (0.5 %) moves across it would
    weigh more than all rounding errors together.
    """
    generator = torch.Generator().manual_seed(seed)
    log_ratio_nt, log_ratio_ref_nt = (0.15 * torch.randn(logp_nt.shape, generator=generator) for _ in range(2))
    bounds = torch.tensor([1 - LOSS.epsilon, 1 + LOSS.epsilon]).log()
    near_nt = ((log_ratio_nt[..., None] - bounds).abs() < 0.05).any(-1)
    old = logp_nt.float() - log_ratio_nt.masked_fill(near_nt, 0.0)
    return replace(batch, old_logp_nt=old, ref_logp_nt=logp_nt.float() - log_ratio_ref_nt)


def run_ours(model: PreTrainedModel, adapter: PackedAdapter, batch: TrainBatch) -> Computed:
    """Loss and backward pass as `PolicyObjective` calls them."""
    adapter.flat.grad.zero_()
    options = {"accumulation_steps": 1, "steps_per_generation": 1, "max_completion_length": 1, "entropy_coef": 0.0}
    scored: list[Tensor] = []

    def loss_of(logp_nt: Tensor, entropy_nt: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        scored.append(logp_nt.detach())
        return policy_loss(logp_nt, entropy_nt, batch, LOSS, **options)

    loss, _ = loss_on(model, batch, 1.0, "auto", loss_of, token_level=is_token_level(LOSS, 0.0))
    loss.backward()
    return _result(scored[-1], batch, packed_tensors(adapter, adapter.flat.grad))  # the last call sees every token


def _result(logp_nt: Tensor, batch: TrainBatch, gradients: Sequence[Tensor]) -> Computed:
    return Computed(logp_nt[batch.completion_mask_nt].double(), torch.cat([g.reshape(-1) for g in gradients]).double())


def attach_fast(model: PreTrainedModel, config: LoraConfig, seed: int, std: float) -> tuple[PreTrainedModel, PackedAdapter]:
    """A copy of the model as a fast run prepares it (build.py): layers fused, then the adapter in the dtype of the activations."""
    ours = copy.deepcopy(model)
    wrap_model(ours, make_tiny_tokenizer(), "tiny")
    assert fuse_layers(ours).total() == fusible(ours)
    adapter = attach(ours, specs_for(ours, config), seed=seed, cast_to_input=True)
    randomize(adapter, std, seed)
    return ours, adapter


def fusible(model: PreTrainedModel) -> int:
    """Norms, MLPs and attentions of the model: all of them are of the kind that our ops compute."""
    return sum(type(module).__name__.endswith(("RMSNorm", "MLP", "Attention")) for module in model.modules())


def to_double(adapter: PackedAdapter) -> None:
    """Buffers and leaves in fp64, in place; runs keep them in fp32."""
    flat = adapter.flat
    flat.data, flat.grad = flat.data.double(), flat.grad.double()
    for group in adapter.groups:
        for name in ("a_rd", "b_flat"):
            old = getattr(group, name)
            setattr(group, name, flat.parameter(old.storage_offset(), *old.shape))


@dataclass(slots=True)
class Measurement:
    """One result per seed."""

    ours: list[Computed] = field(default_factory=list)
    theirs: list[Computed] = field(default_factory=list)
    truths: list[Computed] = field(default_factory=list)

    def pooled(self) -> tuple[Errors, Errors]:
        """(ours, PEFT + TRL's) over all seeds."""
        return errors(self.ours, self.truths), errors(self.theirs, self.truths)

    def seed_ratios(self) -> tuple[list[float], list[float]]:
        """(log-prob, gradient): our error over PEFT + TRL's, seed by seed."""
        pairs = [
            (errors([ours], [truth]), errors([theirs], [truth]))
            for ours, theirs, truth in zip(self.ours, self.theirs, self.truths, strict=True)
        ]
        return [ours.logp / theirs.logp for ours, theirs in pairs], [ours.gradient / theirs.gradient for ours, theirs in pairs]


class Contest:
    """One model three times: ours, PEFT + TRL's (both in the model's dtype), and the truth in fp64."""

    def __init__(self, model: PreTrainedModel, config: LoraConfig) -> None:
        self.fast, self.adapter = attach_fast(model, config, seed=0, std=0.0)
        self.truth = truth_trainer(model, config, self.adapter)
        self.theirs = trl_trainer(copy.deepcopy(model), config, self.adapter)

    def run(self, into: Measurement, batch: TrainBatch, seed: int, *, std: float, on_policy: bool = False) -> None:
        """Adds the results of one seed's adapter and batch. on_policy: the behaviour policy is the current one."""
        randomize(self.adapter, std, seed)
        for trainer in (self.truth, self.theirs):
            copy_to_peft(self.adapter, trainer.model)
        batch = with_recorded_policies(batch, trl_logp(self.truth, batch), seed)
        batch = replace(batch, old_logp_nt=None) if on_policy else batch
        into.truths.append(run_trl(self.truth, batch, self.adapter, torch.float64))
        into.theirs.append(run_trl(self.theirs, batch, self.adapter))
        into.ours.append(run_ours(self.fast, self.adapter, batch))


ADAPTER_STD = 0.02
"""A and B of this size at rank 8 and s = 2 change W by some 5 % of its norm, as trained adapters do."""


def measure_tiny(dtype: torch.dtype) -> Measurement:
    """Llamas of width 128 and 4 layers, eight seeds of weights, adapter and batch."""
    shape = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 8, "initializer_range": 0.05}
    ranks = {"q_proj": 3, "layers.0.self_attn.q_proj": 17, "layers.0.self_attn.k_proj": 0, "layers.1.self_attn.v_proj": 1, "down_proj": 1}
    config = LoraConfig(r=8, lora_alpha=16.0, rank_pattern=rank_pattern(ranks, make_tiny_model("llama", **shape)))
    measured = Measurement()
    for seed in range(8):
        batch = make_batch(VOCAB_SIZE, seed, prompts=(20, 7, 12, 3, 9, 30), completions=(24, 1, 17, 9, 40, 33) * 2)
        Contest(make_tiny_model("llama", seed=seed, dtype=dtype, **shape), config).run(measured, batch, seed, std=ADAPTER_STD)
    return measured


def text_batch(tokenizer: PreTrainedTokenizerBase, seed: int) -> TrainBatch:
    """Four sums in SmolLM2's chat format and an answer to each. (On random tokens its activations explode: bf16 is then off by 100 %.)"""
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randint(1, 100, (4, 2), generator=generator).tolist()
    prompts = [f"<|im_start|>user\nWhat is {a} + {b}?<|im_end|>\n<|im_start|>assistant\n" for a, b in pairs]
    answers = [f"To add {a} and {b}, add the tens and then the ones: {a} + {b} = {a + b}.<|im_end|>" for a, b in pairs]
    answers[0] = answers[0].partition(":")[0]  # one shorter than the others, and cut off
    tokens = [[torch.tensor(tokenizer.encode(text)) for text in texts] for texts in (prompts, answers)]
    batch = make_batch(len(tokenizer), seed, *([len(row) for row in rows] for rows in tokens))
    (prompt_ids, _), (completion_ids, _) = pad_left(tokens[0], EOS_ID), pad_right(tokens[1], EOS_ID, torch.long)
    return replace(batch, prompt_ids_np=prompt_ids, completion_ids_nt=completion_ids)


def measure_smollm2(folder: Path, dtype: torch.dtype) -> Measurement:
    """All 30 layers of the real SmolLM2-135M; four seeds of adapter and batch.

    On policy: its bf16 log-probabilities are off by 6 %, so that tokens would cross any clip bound.
    """
    config = LoraConfig(r=8, lora_alpha=16.0, rank_pattern={"q_proj": 3, "down_proj": 1, r".*\.[0-9]\.self_attn\.k_proj": 0})
    contest = Contest(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), config)
    tokenizer, measured = AutoTokenizer.from_pretrained(folder), Measurement()
    for seed in range(4):
        contest.run(measured, text_batch(tokenizer, seed), seed, std=0.01, on_policy=True)
    return measured
