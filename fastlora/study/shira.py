"""SHiRA (arXiv 2406.13175) as PEFT and TRL train it: entries of the frozen W itself, the peer of as many entries of B.

    W' = W + Δ      Δ [n, d] sparse: 0 but at r (n + d) places of every target module, by PEFT's random mask

PEFT counts by r, one for all modules: on SmolLM2 in multiples of 305,280. The smallest r is taken whose places suffice; exactly k of
them, drawn by seed over all modules together, train, and the gradients of the others are zeroed before the norm is clipped: AdamW leaves
those at 0. PEFT's mask function is called with a seed of its own for every module; with one seed for all, as PEFT has it, modules of one
shape would train the same places.

TRL's own GRPOTrainer or SFTTrainer trains, under the cell's config: the problems of every step, reward, loss, micro-batches, AdamW and
schedule are those of our cells (with the cell's own optim.lr). Samples are drawn by transformers' generate, as TRL does it. The held-out
problems are answered by our sampler and judged by our grader, with W' in the model.

CELL/shira.json          what trained, and what it cost
     adapter/            PEFT's own files; PeftModel.from_pretrained reads them
     evaluation.jsonl    as of the `evaluate` task
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastlora.atomic import atomic_write_text
from fastlora.batches import completion_batch
from fastlora.build import held_out_examples, peak_memory_bytes, training_examples
from fastlora.config import ConfigError, RunConfig
from fastlora.data import batch_indices
from fastlora.evaluate import evaluate
from fastlora.lora.groups import projections, shapes
from fastlora.lora.patterns import ProjectionShape, resolve
from fastlora.model import BaseModel, load_base_model
from fastlora.prompt import encode
from fastlora.reward_config import MODEL_REWARDS
from fastlora.rewards.deposits import RewardFunction
from fastlora.rewards.registry import Rewards, load_grader, load_rewards
from fastlora.rollout.assemble import assemble
from fastlora.rollout.sampler import derived_seed
from fastlora.rollout.torch import TorchSampler
from fastlora.study.tasks import EVALUATION_FILE, Say
from fastlora.types import Example

if TYPE_CHECKING:
    import peft
    import trl

SHIRA_FILE = "shira.json"
ADAPTER_FOLDER = "adapter"
LIBRARIES = ("trl", "peft")
OPTIONS = {"entries"}
"""Of the task."""
TRL_ADVANTAGE_EPS = 1e-4
"""TRL adds it to the standard deviation of a group's rewards, whatever one asks for."""
OURS_ALONE = {"function", "kl_estimator", "sampler_correction", "sampler_correction_max", "sampler_correction_min", "renormalize_top_p"}
"""Settings of [loss] that TRL's GRPOConfig does not have; all others are its own, by name and meaning."""
NO_TARGET = -100
"""transformers' label of a token that carries no loss."""


@dataclass(frozen=True, slots=True)
class Trained:
    """shira.json."""

    entries: int
    """Of W, that train."""
    held: int
    """That PEFT's layers hold: r Σ (n + d). Those that do not train are 0."""
    r: int
    modules: int
    seconds: float
    """Wall clock of TRL's train()."""
    peak_bytes: int
    """Of the process up to the end of it (CPU), or of the device."""

    def write(self, folder: Path) -> None:
        """Writes `folder`/shira.json."""
        atomic_write_text(folder / SHIRA_FILE, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Trained:
        """What `write` wrote."""
        return cls(**json.loads((folder / SHIRA_FILE).read_text()))


def run_shira(config: RunConfig, folder: Path, options: Mapping[str, Any], say: Say) -> None:
    """The task of a study: trains `options["entries"]` entries of W and answers the held-out problems. An attempt that died starts anew.

    Raises ConfigError for what `refuse_settings`, `smallest_rank` and `require_libraries` do, and for other options; else what loading
    model, data and rewards raises.
    """
    if options.keys() != OPTIONS:
        raise ConfigError(f"options of task 'shira': {', '.join(options) or 'none'}; it takes entries, how many of W train")
    require_libraries()
    refuse_settings(config)
    model = load_base_model(config.model)
    examples, held_out = training_examples(config, model), held_out_examples(config, model)
    with load_rewards(config.reward) if config.objective == "grpo" else load_grader(config.reward) as rewards:
        rewards.check([*examples, *held_out])
        trained = train_shira(config, model, examples, rewards, options["entries"], folder)
        say(f"{trained.entries:,} entries of {trained.modules} modules trained in {trained.seconds:.0f} s")
        sampler = TorchSampler(model, config.rollout.batch_size)
        evaluation = evaluate(sampler, rewards.grader, held_out, config, adapter_version=config.optimizer_steps)
    say(f"accuracy {evaluation.accuracy}")
    trained.write(folder)
    evaluation.write(folder / EVALUATION_FILE)


def require_libraries() -> None:
    """Raises ConfigError unless TRL and PEFT are installed."""
    if missing := [name for name in LIBRARIES if find_spec(name) is None]:
        raise ConfigError(
            f"placement.peers: 'shira' is trained by TRL and PEFT, and {' and '.join(missing)} is not installed: "
            "install fastlora's extra `study`, or leave 'shira' out"
        )


def refuse_settings(config: RunConfig) -> None:
    """Raises ConfigError for the first setting that PEFT's SHiRA or TRL's trainer has no counterpart for."""
    for message in _without_counterpart(config):
        raise ConfigError(f"placement.peers: 'shira' cannot follow {message}, or leave 'shira' out")


def _without_counterpart(c: RunConfig) -> list[str]:
    """One clause for each."""
    grpo = c.objective == "grpo"
    checks = [
        (c.method == "full", "method = 'full', which trains every weight; set 'lora'"),
        (c.model.quantization != "none", "model.quantization = 'nf4': packed weights have no entries to train; set 'none'"),
        (c.lora.init_from is not None, "lora.init_from: it starts from W alone; remove it"),
        (
            not grpo and c.steps_per_generation != c.trainer.gradient_accumulation_steps,
            "trainer.steps_per_generation, since SFTTrainer has no generation batch; leave it at trainer.gradient_accumulation_steps",
        ),
        (grpo and c.rollout.num_generations < 2, "rollout.num_generations = 1, which TRL refuses; use at least 2"),
        (
            grpo and c.rollout.sampler != "torch",
            f"rollout.sampler = '{c.rollout.sampler}': TRL's own sampler here is transformers' generate; set 'torch'",
        ),
        (grpo and bool(c.rollout.stop), "rollout.stop: TRL's completions end at eos alone; remove it"),
        (grpo and any(name in MODEL_REWARDS for name in c.reward.functions), "rewards that run a language model; use others"),
        (grpo and c.advantage.estimator != "trajectory", "advantage.estimator = 'deposits'; set 'trajectory'"),
        (grpo and c.advantage.eps != TRL_ADVANTAGE_EPS, f"advantage.eps = {c.advantage.eps:g}: TRL's is {TRL_ADVANTAGE_EPS:g}; set that"),
        (grpo and c.loss.function is not None, "loss.function; choose a loss.loss_type"),
        (grpo and c.loss.beta > 0 and c.loss.kl_estimator != "k3", f"loss.kl_estimator = '{c.loss.kl_estimator}'; set 'k3', TRL's"),
        (grpo and c.loss.renormalize_top_p, "loss.renormalize_top_p; set it false"),
    ]
    return [message for bad, message in checks if bad]


def adapted(module: nn.Module, config: RunConfig) -> list[ProjectionShape]:
    """The projections that our cells give a B, which are those that SHiRA adapts."""
    everything = shapes(projections(module))
    with_rank = {spec.name for spec in resolve(everything, config.lora) if spec.rank}
    return [shape for shape in everything if shape.name in with_rank]


def smallest_rank(layers: Sequence[ProjectionShape], entries: int) -> int:
    """PEFT's smallest r with r Σ (n + d) >= entries. Raises ConfigError when the narrowest module has no room for it, r (n + d) > n d."""
    per_rank = sum(layer.in_features + layer.out_features for layer in layers)
    r = math.ceil(entries / per_rank)
    most = min(layer.in_features * layer.out_features // (layer.in_features + layer.out_features) for layer in layers)
    if r > most:
        raise ConfigError(
            f"placement.k = {entries:,} is more than PEFT's SHiRA holds: r = {most} of {len(layers)} modules are {most * per_rank:,} "
            "entries of W; choose a k of at most that, or leave 'shira' out of placement.peers"
        )
    return r


def train_shira(config: RunConfig, model: BaseModel, examples: Sequence[Example], rewards: Rewards, entries: int, folder: Path) -> Trained:
    """Trains, saves PEFT's files in `folder`/adapter, and leaves W' in `model`, merged by PEFT in the model's own dtype."""
    layers = adapted(model.module, config)
    r = smallest_rank(layers, entries)
    if config.objective == "sft":
        trainer = _sft_trainer(config, model, examples, _adapter(layers, r, config.seed), folder)
    else:
        trainer = _grpo_trainer(config, model, examples, rewards, _adapter(layers, r, config.seed), folder)
    held, training = train_only(trainer.model, entries, config.seed)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    trainer.model.save_pretrained(folder / ADAPTER_FOLDER, save_embedding_layers=False)
    trainer.model.merge_and_unload()
    return Trained(training, held, r, len(layers), seconds, peak_memory_bytes(model.device))


def _adapter(layers: Sequence[ProjectionShape], r: int, seed: int) -> peft.ShiraConfig:
    """PEFT's random mask, a seed a module; PEFT makes the masks in the model's order."""
    import peft
    from peft.tuners.shira.mask_functions import random_mask

    modules = count()

    def mask(base_layer: nn.Module, r: int, **_: Any) -> Tensor:
        return random_mask(base_layer, r, random_seed=derived_seed(seed, next(modules)))

    config = peft.ShiraConfig(task_type="CAUSAL_LM", r=r, target_modules=[layer.name for layer in layers])
    config.mask_fn = mask
    return config


def train_only(model: nn.Module, entries: int, seed: int) -> tuple[int, int]:
    """`entries` of all that may train, drawn by seed, do: the gradients of the others are zeroed. Returns (how many there are, how many
    train)."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sizes = [weight.numel() for weight in weights]
    chosen = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(seed))[:entries]
    trains = torch.zeros(sum(sizes), dtype=torch.bool).index_fill_(0, chosen, True)
    for weight, mask in zip(weights, trains.split(sizes), strict=True):
        weight.register_hook(mask.to(weight.device).mul)
    return len(trains), int(trains.sum())


def _grpo_trainer(
    config: RunConfig, model: BaseModel, examples: Sequence[Example], rewards: Rewards, adapter: peft.ShiraConfig, folder: Path
) -> trl.GRPOTrainer:
    """TRL's, on the prompts of our runs in their order. Raises ConfigError if TRL would turn a prompt into other tokens."""
    import trl
    from datasets import Dataset

    prompts = [example.prompt for example in examples]
    if model.tokenizer(text=prompts)["input_ids"] != encode(model.tokenizer, prompts):
        raise ConfigError(
            f"placement.peers: TRL would put the special tokens of {model.source} before prompts whose chat template has written them "
            "already; leave 'shira' out"
        )
    c, rollout = config, config.rollout
    arguments = trl.GRPOConfig(
        **_shared_arguments(c, model, rollout.num_prompts * rollout.num_generations, folder),
        **c.loss.model_dump(exclude=OURS_ALONE),
        shuffle_dataset=False,
        steps_per_generation=c.steps_per_generation,
        num_iterations=c.trainer.num_iterations,
        num_generations=rollout.num_generations,
        max_completion_length=rollout.max_completion_length,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        reward_weights=rewards.weights_k.tolist(),
        scale_rewards=c.advantage.scale_rewards,
        multi_objective_aggregation=c.advantage.multi_objective_aggregation,
    )
    return trl.GRPOTrainer(
        model=model.module,
        reward_funcs=[scorer(function, examples, model, rollout.num_generations) for function in rewards.functions],
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": prompts[row], "row": row} for row in _order(c, len(examples))]),
        processing_class=model.tokenizer,
        peft_config=adapter,
    )


def _sft_trainer(
    config: RunConfig, model: BaseModel, examples: Sequence[Example], adapter: peft.ShiraConfig, folder: Path
) -> trl.SFTTrainer:
    """TRL's, on the very tokens of our supervised batches; every pass over a generation batch is written out."""
    import trl
    from datasets import Dataset

    arguments = trl.SFTConfig(
        **_shared_arguments(config, model, config.rollout.num_prompts, folder),
        train_sampling_strategy="sequential",
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    order = _order(config, len(examples), times=config.trainer.num_iterations)
    labelled = {row: _labelled(examples[row], model) for row in set(order)}
    return trl.SFTTrainer(
        model=model.module,
        args=arguments,
        train_dataset=Dataset.from_list([labelled[row] for row in order]),
        processing_class=model.tokenizer,
        peft_config=adapter,
    )


def _order(config: RunConfig, num_examples: int, times: int = 1) -> list[int]:
    """Rows of all steps, as our objectives take them; those of a step `times` over."""
    steps = [batch_indices(step, config.rollout.num_prompts, num_examples, config.seed) for step in range(config.trainer.steps)]
    return [row for rows in steps for row in rows * times]


def _labelled(example: Example, model: BaseModel) -> dict[str, list[int]]:
    batch = completion_batch([example], model)  # of one example: nothing is padded
    prompt, target = batch.prompt_ids_np[0].tolist(), batch.completion_ids_nt[0].tolist()
    return {"input_ids": prompt + target, "labels": [NO_TARGET] * len(prompt) + target}


def _shared_arguments(c: RunConfig, model: BaseModel, samples: int, folder: Path) -> dict[str, Any]:
    """Of both of TRL's configs. samples: of a generation batch."""
    return {
        "output_dir": str(folder),
        "seed": c.seed,
        "use_cpu": model.device.type == "cpu",
        "bf16": False,  # no autocast: the base is in model.dtype already, and PEFT keeps what trains in float32
        "gradient_checkpointing": c.trainer.gradient_checkpointing,
        "per_device_train_batch_size": samples // c.steps_per_generation,
        "gradient_accumulation_steps": c.trainer.gradient_accumulation_steps,
        "max_steps": c.optimizer_steps,
        "learning_rate": c.optim.lr,
        "lr_scheduler_type": c.optim.schedule,
        "warmup_steps": c.optim.warmup_steps,
        "adam_beta1": c.optim.betas[0],
        "adam_beta2": c.optim.betas[1],
        "adam_epsilon": c.optim.eps,
        "weight_decay": c.optim.weight_decay,
        "max_grad_norm": c.optim.max_grad_norm,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def scorer(
    function: RewardFunction, examples: Sequence[Example], model: BaseModel, num_generations: int
) -> Callable[..., list[float | None]]:
    """One of our rewards in TRL's signature: completions of one prompt adjacent, `row` a column of the data; None = cannot be scored."""

    def score(completion_ids: Sequence[Sequence[int]], row: Sequence[int], **_: Any) -> list[float | None]:
        asked = [examples[index] for index in row[::num_generations]]
        prompts = [torch.tensor(ids) for ids in encode(model.tokenizer, [example.prompt for example in asked])]
        completions = [(torch.tensor(ids), torch.zeros(len(ids)), ids[-1] in model.eos_ids) for ids in completion_ids]
        rewards_n = function(assemble(model, asked, prompts, completions, adapter_version=0)).trajectory_rewards_n
        return [None if math.isnan(reward) else reward for reward in rewards_n.tolist()]

    score.__name__ = function.name  # names the reward in TRL's log
    return score
