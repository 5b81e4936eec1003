"""TRL's own GRPOTrainer on recorded rollouts against our reference path: the loss of every micro-batch, the gradient of every A and B.

One rollout is recorded for all: token ids, rewards, and the behaviour and reference policies' log-probabilities (policies with
noise in their adapters, so that ratios leave the clip range). TRL turns it into its inputs with its own
`_generate_and_score_completions` (only `_generate`, the sampling itself, is replaced by the recording), and into a loss with its own
`_compute_loss`; we go through `trajectory_advantages`, `policy_batch`, `score` and `policy_loss`.

Constructing a trainer takes as long as ten losses, so one serves many cases: `configure` sets on it what its constructor would
have set. tests/parity/test_grpo_loss_trl.py checks that a trainer constructed afresh gives the same bits.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, get_args

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import split_tensor_dict

from fastlora.advantages import trajectory_advantages
from fastlora.batches import policy_batch, with_policies
from fastlora.config import AdvantageConfig, LoraConfig, LossConfig
from fastlora.losses.importance_sampling import sampler_ratio
from fastlora.losses.policy import policy_loss
from fastlora.ops.registry import use_implementation
from fastlora.packaged_model import packaged_model_folder
from fastlora.policy import score
from fastlora.rollout.sampler import pad_left, pad_right
from fastlora.types import Example, Rollout, TrainBatch
from tests.parity.delta import Delta, compare, worst
from tests.parity.twins import UNEVEN, Twins, copy_to_peft, make_twins, peft_config, perturbed, rank_pattern, specs_for
from tests.tiny import EOS_ID, VOCAB_SIZE, make_tiny_model, make_tiny_tokenizer

NUM_GENERATIONS, MAX_LENGTH = 4, 13
PROMPT_LENGTHS = (5, 3, 8)
SAMPLES = NUM_GENERATIONS * len(PROMPT_LENGTHS)

LOSS_TYPES = get_args(LossConfig.model_fields["loss_type"].annotation)
CORRECTIONS = get_args(LossConfig.model_fields["sampler_correction"].annotation)[1:]
LEVELS = get_args(LossConfig.model_fields["importance_sampling_level"].annotation)
SCALES = get_args(AdvantageConfig.model_fields["scale_rewards"].annotation)
BETAS = (0.0, 0.05)
SMOLLM2 = "SmolLM2-135M"
"""Begins the name of the case that needs the packaged model, and some seconds."""
SPLITS = (1, 2)
"""Micro-batches per optimizer step."""

OPTIONS: dict[str, dict[str, Any]] = {
    "delta 1.3": {"delta": 1.3},
    "epsilon_high 0.28": {"epsilon_high": 0.28},
    "top_entropy_quantile 0.8": {"top_entropy_quantile": 0.8},
    "off_policy_mask_threshold 0.02": {"off_policy_mask_threshold": 0.02},
    "entropy_coef 0.02": {"entropy_coef": 0.02},
    "mask_truncated_completions": {"mask_truncated_completions": True},
    "no bias correction of the KL": {"beta": 0.05, "use_bias_correction_kl": False},
    "everything at once": {
        "beta": 0.05,
        "delta": 1.5,
        "epsilon_high": 0.28,
        "top_entropy_quantile": 0.6,
        "off_policy_mask_threshold": 0.05,
        "entropy_coef": 0.02,
        "mask_truncated_completions": True,
    },
}


def loss_config(loss_type: str, **settings: Any) -> LossConfig:
    """cispo gets a cap that some ratios reach and others do not; its default, epsilon = 0.2, caps them all."""
    cap = {"epsilon_high": 1.2} if loss_type == "cispo" else {}
    return LossConfig.model_validate({"loss_type": loss_type, **cap, **settings})


@dataclass(frozen=True, slots=True)
class Recording:
    """What the sampler and the reward functions delivered."""

    prompts: tuple[tuple[int, ...], ...]
    """Token ids, one per sample."""
    completions: tuple[tuple[int, ...], ...]
    """Token ids, one per sample; those that do not end in eos were truncated."""
    rewards_n: Tensor
    """float32."""
    sampler_logp: tuple[tuple[float | None, ...], ...] | None = None
    """Of each completion token, as TRL has it from vLLM: None where it has no number. None at all = the sampler is the trainer."""


def record(seed: int = 0) -> Recording:
    """Random tokens; completions of 1 to MAX_LENGTH tokens, a quarter of them truncated; no reward twice in a group."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist())

    prompts = [tokens(length) for length in PROMPT_LENGTHS]
    completions = []
    for n in range(SAMPLES):
        length = MAX_LENGTH if n % 4 == 3 else int(torch.randint(1, MAX_LENGTH, (), generator=generator))
        completions.append(tokens(length) if n % 4 == 3 else (*tokens(length - 1), EOS_ID))
    rewards_n = torch.randn(len(completions), generator=generator)
    return Recording(tuple(p for p in prompts for _ in range(NUM_GENERATIONS)), tuple(completions), rewards_n)


def from_another_sampler(recording: Recording, seed: int = 0) -> Recording:
    """With log-probabilities about those of a tiny model, ± .4, and one token in eight without: token ratios of 1/4 to 6, sequence ratios
    of 1/50 to 30."""
    generator = torch.Generator().manual_seed(100 + seed)
    logp = []
    for completion in recording.completions:
        values = (0.4 * torch.randn(len(completion), generator=generator) - math.log(VOCAB_SIZE) - 0.3).tolist()
        logp.append(tuple(None if (i + len(completion)) % 10 == 4 else value for i, value in enumerate(values)))
    return replace(recording, sampler_logp=tuple(logp))


def as_rollout(recording: Recording, examples: tuple[Example, ...] | None = None, adapter_version: int = 0) -> Rollout:
    """The recording as fastlora's samplers deliver it; `examples` only give the prompts their names."""
    prompt_ids, prompt_mask = pad_left([torch.tensor(p) for p in recording.prompts], EOS_ID)
    ids, mask = pad_right([torch.tensor(c) for c in recording.completions], EOS_ID, torch.long)
    prompts = recording.prompts[::NUM_GENERATIONS]
    said = recording.sampler_logp or [[0.0] * len(c) for c in recording.completions]
    sampler_logp, _ = pad_right([torch.tensor([math.nan if x is None else x for x in row]) for row in said], 0.0, torch.float32)
    return Rollout(
        examples=examples or tuple(Example(i, str(i), "") for i in range(len(prompts))),
        num_generations=NUM_GENERATIONS,
        prompt_ids_np=prompt_ids,
        prompt_mask_np=prompt_mask,
        completion_ids_nt=ids,
        completion_mask_nt=mask,
        sampler_logp_nt=sampler_logp,
        finished_n=torch.tensor([c[-1] == EOS_ID for c in recording.completions]),
        texts=("",) * len(recording.completions),
        adapter_version=adapter_version,
    )


@dataclass(slots=True)
class Rig:
    """A trainer of TRL and our adapter, the same policy in both."""

    trainer: GRPOTrainer
    twins: Twins
    temperature: float
    recording: Recording
    policy_noise: float
    """Standard deviation of the noise in the adapters of the recorded policies."""


def lora() -> LoraConfig:
    """Uneven ranks, scale alpha/r."""
    return LoraConfig(r=5, lora_alpha=11.0, rank_pattern=rank_pattern(UNEVEN, make_tiny_model()))


def make_trainer(model: PreTrainedModel, config: LoraConfig, recording: Callable[[], Recording], **args: Any) -> GRPOTrainer:
    """TRL's trainer on a model that its own `peft_config` adapts; `_generate` and the reward function return the recording."""
    specs = specs_for(model, config)

    def reward(prompts: list[str], **_: object) -> list[float]:
        return recording().rewards_n.tolist()

    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(prefix="trl-"),
            **{
                "use_cpu": True,
                "bf16": False,
                "report_to": [],
                "gradient_checkpointing": False,
                "per_device_train_batch_size": SAMPLES,
                "num_generations": NUM_GENERATIONS,
                "max_completion_length": MAX_LENGTH,
                **args,
            },
        ),
        train_dataset=Dataset.from_list([{"prompt": str(i)} for i in range(len(PROMPT_LENGTHS))]),
        processing_class=make_tiny_tokenizer(),
        peft_config=peft_config(specs, config),
    )

    def generate(prompts: list[str]) -> tuple[Any, ...]:
        now = recording()
        ids = [list(p) for p in now.prompts], [list(c) for c in now.completions]
        return *ids, None, [""] * len(prompts), now.sampler_logp, {}, None, None

    trainer._generate = generate
    trainer.model.train()
    return trainer


def record_unpadded() -> Recording:
    """Prompts of one length and completions of full length, some of which end there: no padding, hence no attention mask."""
    generator = torch.Generator().manual_seed(3)
    tokens_np = torch.randint(3, VOCAB_SIZE, (len(PROMPT_LENGTHS), 6), generator=generator).repeat_interleave(NUM_GENERATIONS, 0)
    tokens_nt = torch.randint(3, VOCAB_SIZE, (SAMPLES, MAX_LENGTH), generator=generator)
    tokens_nt[::3, -1] = EOS_ID
    rewards_n = torch.randn(SAMPLES, generator=generator)
    return Recording(tuple(map(tuple, tokens_np.tolist())), tuple(map(tuple, tokens_nt.tolist())), rewards_n)


POLICY_NOISE = 0.06
"""On the tiny models: more than 5 % of tokens beyond each clip bound, and not all of them."""


def make_rig(temperature: float = 1.0, recording: Recording | None = None, **args: Any) -> Rig:
    """A trainer on a tiny Llama and its twin, with the same random A and B."""
    return _rig(make_tiny_model(), lora(), temperature, recording or record(), POLICY_NOISE, std=0.05, **args)


def smollm2_rig() -> Rig:
    """The real SmolLM2-135M, all 30 layers at their real widths, uneven ranks."""
    model = AutoModelForCausalLM.from_pretrained(packaged_model_folder(), dtype=torch.float32).eval()
    ranks = {"q_proj": 3, "down_proj": 1, r".*\.[0-9]\.self_attn\.k_proj": 0, "layers.10.self_attn.v_proj": 17}
    return _rig(model, LoraConfig(r=8, lora_alpha=16.0, rank_pattern=ranks), 1.0, record(), policy_noise=0.003, std=0.01)


def _rig(
    model: PreTrainedModel, config: LoraConfig, temperature: float, recording: Recording, policy_noise: float, std: float, **args: Any
) -> Rig:
    twins = make_twins(model, config, std=std)
    trainer = make_trainer(model, config, lambda: recording, temperature=temperature, **args)
    copy_to_peft(twins.adapter, trainer.model)
    return Rig(trainer, replace(twins, theirs=trainer.model), temperature, recording, policy_noise)


@cache
def shared_rig(temperature: float = 1.0) -> Rig:
    """The trainer that the cases share; the temperature is built into its fused head."""
    return make_rig(temperature)


def trl_arguments(config: LossConfig, advantage: AdvantageConfig) -> dict[str, Any]:
    """GRPOConfig's arguments for our two configs: names and meanings are the same."""
    ours_alone = {"kl_estimator", "use_adaptive_entropy", "entropy_target", "entropy_coef_delta", "entropy_coef_min", "entropy_coef_max"}
    otherwise_named = {"sampler_correction", "sampler_correction_max", "sampler_correction_min", "renormalize_top_p", "function"}
    arguments = {**config.model_dump(exclude=ours_alone | otherwise_named), "scale_rewards": advantage.scale_rewards}
    if config.sampler_correction != "none":
        arguments |= {
            "vllm_importance_sampling_mode": config.sampler_correction,
            "vllm_importance_sampling_clip_max": config.sampler_correction_max,
            "vllm_importance_sampling_clip_min": config.sampler_correction_min or None,
        }
    return arguments


def configure(trainer: GRPOTrainer, config: LossConfig, advantage: AdvantageConfig, split: int) -> None:
    """Sets what GRPOTrainer's constructor takes from these arguments (lines 819 to 946), and the loop's own number."""
    for name, value in trl_arguments(config, advantage).items():
        setattr(trainer.args, name, value)
        if hasattr(trainer, name):
            setattr(trainer, name, value)
    trainer.epsilon_low = config.epsilon
    trainer.epsilon_high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    trainer._entropy_bonus_enabled = config.entropy_coef != 0.0
    trainer.use_vllm = config.sampler_correction != "none"  # the constructor would look for an engine
    trainer.args.steps_per_generation = trainer.args.gradient_accumulation_steps = split
    trainer.current_gradient_accumulation_steps = split


@torch.no_grad()
def recorded_logp(trainer: GRPOTrainer, inputs: dict[str, Tensor], std: float, seed: int) -> Tensor:
    """[n, t], log-probabilities under a policy with noise of `std` in its adapter."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    with perturbed(trainer.model, std, seed):
        logp_nt, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, inputs["completion_ids"].shape[1])
    return logp_nt


def trl_inputs(rig: Rig) -> dict[str, Tensor]:
    """What TRL's loop would hand to its loss, from its own code; then the recorded policies in place of its own."""
    inputs = rig.trainer._generate_and_score_completions([{"prompt": "0"}] * len(rig.recording.completions))
    inputs["old_per_token_logps"] = recorded_logp(rig.trainer, inputs, rig.policy_noise, seed=5)
    inputs["ref_per_token_logps"] = recorded_logp(rig.trainer, inputs, rig.policy_noise, seed=6)
    return inputs


def our_batch(rig: Rig, config: LossConfig, advantage: AdvantageConfig, inputs: dict[str, Tensor]) -> TrainBatch:
    """The same from our code; of TRL's inputs only the recorded log-probabilities are used."""
    advantages_n = trajectory_advantages(rig.recording.rewards_n[:, None], torch.ones(1), NUM_GENERATIONS, advantage)
    batch = policy_batch(as_rollout(rig.recording), advantages_n, mask_truncated=config.mask_truncated_completions)
    return with_policies(batch, inputs["old_per_token_logps"], inputs["ref_per_token_logps"] if config.beta else None)


def trl_losses(rig: Rig, inputs: dict[str, Tensor], split: int) -> list[Tensor]:
    """TRL's loss of each micro-batch, each followed by a backward pass."""
    losses = []
    for part in split_tensor_dict(inputs, split):
        losses.append(rig.trainer._compute_loss(rig.trainer.model, part))
        losses[-1].backward()
    return losses


def our_losses(rig: Rig, batch: TrainBatch, config: LossConfig, split: int) -> list[Tensor]:
    """Our loss of each micro-batch on the reference path, each followed by a backward pass."""
    losses = []
    with use_implementation("reference"):
        for part in batch.split(split):
            logp_nt, entropy_nt = score(rig.twins.ours, part, rig.temperature, "reference")
            loss, _ = policy_loss(
                logp_nt,
                entropy_nt,
                part,
                config,
                accumulation_steps=split,
                steps_per_generation=split,
                max_completion_length=MAX_LENGTH,
                entropy_coef=config.entropy_coef,
            )
            loss.backward()
            losses.append(loss)
    return losses


def loss_delta(rig: Rig, config: LossConfig, advantage: AdvantageConfig, split: int) -> Delta:
    """Losses and gradients of one optimizer step under one configuration."""
    configure(rig.trainer, config, advantage, split)
    inputs = trl_inputs(rig)
    batch = our_batch(rig, config, advantage, inputs)
    rig.twins.zero_gradients()
    theirs = trl_losses(rig, inputs, split)
    ours = our_losses(rig, batch, config, split)
    our_gradients, their_gradients = rig.twins.gradients()
    assert all(bool(gradient.any()) for gradient in their_gradients)
    assert batch.num_items_in_batch == int(inputs["num_items_in_batch"])
    advantages = (batch.advantages_nt.squeeze(1), inputs["advantages"])
    return compare([*ours, advantages[0], *our_gradients], [*theirs, advantages[1], *their_gradients])


@cache
def correction_rig() -> Rig:
    """A trainer whose completions come from another sampler."""
    return make_rig(recording=from_another_sampler(record()))


def correction_delta(rig: Rig, config: LossConfig, split: int, *, stale: bool) -> Delta:
    """Ratios, losses and gradients of one optimizer step on another sampler's completions.

    TRL's behaviour policy and ratio are its own, from a forward pass before the loss, in the micro-batches that will train. Ours: without
    `stale` the training pass itself is the behaviour policy; with it the policy moves between sampling and loss.
    """
    configure(rig.trainer, config, AdvantageConfig(), split)
    rig.trainer.args.per_device_train_batch_size = SAMPLES // split
    inputs = rig.trainer._generate_and_score_completions([{"prompt": "0"}] * SAMPLES)
    advantages_n = trajectory_advantages(rig.recording.rewards_n[:, None], torch.ones(1), NUM_GENERATIONS, AdvantageConfig())
    options = {"mask_truncated": config.mask_truncated_completions, "sampler_is_trainer": False}
    batch = policy_batch(as_rollout(rig.recording), advantages_n, **options)
    old_nt = _scores(rig, batch, split)
    batch = with_policies(batch, old_nt if stale else None, inputs["ref_per_token_logps"] if config.beta else None)
    ratio = sampler_ratio(old_nt, batch, config)
    with _moved(rig, 1.5 if stale else 1.0):
        rig.twins.zero_gradients()
        theirs, ours = trl_losses(rig, inputs, split), our_losses(rig, batch, config, split)
        our_gradients, their_gradients = rig.twins.gradients()
    assert ratio is not None and all(bool(gradient.any()) for gradient in their_gradients)
    return compare([ratio, *ours, *our_gradients], [inputs["importance_sampling_ratio"], *theirs, *their_gradients])


@torch.no_grad()
def _scores(rig: Rig, batch: TrainBatch, split: int) -> Tensor:
    """Our log-probabilities, as PolicyObjective makes those of the behaviour policy."""
    with use_implementation("reference"):
        return torch.cat([score(rig.twins.ours, part, rig.temperature, "reference")[0] for part in batch.split(split)])


@contextmanager
def _moved(rig: Rig, factor: float) -> Iterator[None]:
    """Both adapters times `factor`; themselves again afterwards."""
    data = rig.twins.adapter.flat.data
    before = data.clone()
    data.mul_(factor)
    copy_to_peft(rig.twins.adapter, rig.trainer.model)
    yield
    data.copy_(before)
    copy_to_peft(rig.twins.adapter, rig.trainer.model)


BOUNDS = {"token": (0.7, 1.4), "sequence": (0.3, 3.0)}
"""Of the ratio; some tokens, and some sequences, are beyond each."""


def correction_config(mode: str, loss_type: str, **settings: Any) -> LossConfig:
    """Both bounds set."""
    low, high = BOUNDS[mode.split("_")[0]]
    return loss_config(loss_type, sampler_correction=mode, sampler_correction_min=low, sampler_correction_max=high, **settings)


def _correction_case(mode: str) -> Delta:
    """The worst of all loss types (vespo takes token ratios only), on and off policy, in 1 and 2 micro-batches, plain and with all else."""
    configs = [
        correction_config(mode, loss_type, **settings)
        for loss_type, settings in itertools.product(LOSS_TYPES, ({}, OPTIONS["everything at once"]))
        if loss_type != "vespo" or mode.startswith("token")
    ]
    # TRL's defaults, and one bound alone.
    configs += [
        loss_config("dapo", sampler_correction=mode),
        loss_config("dapo", sampler_correction=mode, sampler_correction_max=None, sampler_correction_min=0.5),
    ]
    return worst(
        correction_delta(correction_rig(), config, split, stale=stale) for config in configs for split in SPLITS for stale in (False, True)
    )


def _matrix_case(loss_type: str, beta: float, level: str) -> Delta:
    """The worst of all reward scales and accumulation splits."""
    config = loss_config(loss_type, beta=beta, importance_sampling_level=level)
    return worst(
        loss_delta(shared_rig(), config, AdvantageConfig(scale_rewards=scale), split) for scale, split in itertools.product(SCALES, SPLITS)
    )


def _option_case(option: str, temperature: float = 1.0) -> Delta:
    """The worst of all loss types, in two micro-batches."""
    settings = OPTIONS.get(option, {})
    configs = (loss_config(loss_type, **settings) for loss_type in LOSS_TYPES)
    return worst(loss_delta(shared_rig(temperature), config, AdvantageConfig(), 2) for config in configs)


def _unpadded_case() -> Delta:
    """TRL masks truncated completions out of the attention too, which here changes the kernel that it runs; we do not."""
    rig = make_rig(recording=record_unpadded())
    configs = [loss_config("dapo", beta=0.05, mask_truncated_completions=masked) for masked in (False, True)]
    return worst(loss_delta(rig, config, AdvantageConfig(), split) for config in configs for split in (1, 2, SAMPLES))


def cases() -> Iterator[tuple[str, Callable[[], Delta]]]:
    """(name, comparison)."""
    for loss_type, beta, level in itertools.product(LOSS_TYPES, BETAS, LEVELS):
        yield (
            f"{loss_type}, β = {beta:g}, {level} ratio",
            lambda loss_type=loss_type, beta=beta, level=level: _matrix_case(loss_type, beta, level),
        )
    for option in OPTIONS:
        yield f"all loss types, {option}", lambda option=option: _option_case(option)
    for mode in CORRECTIONS:
        yield f"all loss types, another sampler, {mode}", lambda mode=mode: _correction_case(mode)
    yield "all loss types, temperature 0.7", lambda: _option_case("temperature", 0.7)
    yield (
        f"{SMOLLM2}, uneven ranks, dapo, β = 0.05, two micro-batches",
        lambda: loss_delta(smollm2_rig(), loss_config("dapo", beta=0.05), AdvantageConfig(), 2),
    )
    yield "dapo, β = 0.05, no padding, truncated completions masked or not, 1, 2 and 12 micro-batches", _unpadded_case
