"""Every setting of a run, with its unit; TOML file + dotted command-line overrides; unknown keys are errors.

`load_config(path, overrides)` is the only way in. What can be known to be impossible from the settings alone is refused here,
before a model is loaded; what depends on the model (a pattern that hits nothing, a missed budget) is refused in `fastlora.lora`.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from pydantic import Field, ValidationError, model_validator

from fastlora.alarm_config import AlarmsConfig
from fastlora.errors import FastloraError
from fastlora.loss_config import LossConfig
from fastlora.reward_config import MODEL_REWARDS, DistillationConfig, ProcessConfig
from fastlora.section import Decay, NonNegative, Positive, Section
from fastlora.vllm_config import VllmConfig

MAX_RANK = 1024
"""Above this a LoRA of any projection we serve costs more than the projection itself; almost certainly a typing error."""


OWN_LOSS_KEEPS = {"beta", "mask_truncated_completions", "renormalize_top_p"}
"""Settings of [loss] that mean something to one's own loss: beta > 0 gives it the reference policy's log-probabilities."""


class ConfigError(FastloraError):
    """A setting that cannot work; the message names the key, the value and the fix."""


AnySection = TypeVar("AnySection", bound=Section)


class ModelConfig(Section):
    """The frozen base model."""

    name: str = "smollm2-135m-instruct"
    """`smollm2-135m-instruct` (ships as a Python package, no download), a local folder, or a Hugging Face hub id."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); only for hub ids."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the frozen weights and activations; the adapter's master copy is always float32."""
    quantization: Literal["none", "nf4"] = "none"
    """nf4: the frozen projections in 4 bits, through bitsandbytes (QLoRA); they are unpacked to `dtype` for every product."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto = cuda if there is one."""


class LoraConfig(Section):
    """The packed variable-rank adapter (PEFT's names and meanings; stricter matching)."""

    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    )
    """Patterns of the projections to adapt: exact names, dotted suffixes, or regular expressions."""
    r: Annotated[int, Field(ge=0, le=MAX_RANK)] = 16
    """Rank of every target module that `rank_pattern` does not name; 0 = no adapter there."""
    lora_alpha: Annotated[float, Field(gt=0.0)] = 32.0
    """alpha of every target module that `alpha_pattern` does not name."""
    scaling: Literal["alpha/r", "alpha/sqrt(r)", "constant"] = "alpha/r"
    """s of W + s·B·A: alpha/r (PEFT's default), alpha/sqrt(r) (PEFT's use_rslora), or alpha itself whatever the rank."""
    rank_pattern: dict[str, Annotated[int, Field(ge=0, le=MAX_RANK)]] = {}
    """Pattern -> rank. Every key must hit; no module may be hit by two keys."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0.0)]] = {}
    """Pattern -> alpha. Every key must hit; no module may be hit by two keys."""
    rank_budget: NonNegative | None = None
    """Required sum of ranks over all adapted modules; an error if missed. None = no check."""
    parameter_budget: NonNegative | None = None
    """Required number of adapter parameters; an error if missed. None = no check."""
    freeze_a: bool = False
    """Keep A at its random initialisation and train B alone."""
    b_mask: Path | None = None
    """safetensors file, module name -> bool [n, r]: the only entries of B that train. None = all of them."""
    init_seed: int | None = None
    """Seed of A's initialisation (Kaiming uniform, a = sqrt 5, as PEFT); None = the run's seed."""
    init_from: Path | None = None
    """PEFT adapter folder to start from instead of B = 0; its ranks must be those of this config."""


class ReallocationConfig(Section):
    """New ranks during a run, from its own gradients; the sum of the ranks stays."""

    every: NonNegative = 0
    """Steps between reallocations; 0 = never. Each that moves a rank writes a checkpoint and loads model and adapter anew; an engine of our
    own (rollout.sampler = "vllm") starts anew too, 20 to 66 s on a CPU."""
    unit: Literal["layer", "module"] = "layer"
    """What gets a rank: a layer (all its target modules the same), or each module its own. The budget is the sum of the units' ranks."""
    normalise: Literal["none", "sqrt_r", "s_sqrt_r"] = "s_sqrt_r"
    """What a unit is judged by: the norms of its gradients as they are, by √r, or by s √r, which neither rank nor scale changes."""
    strategy: str = "proportional"
    """Name in fastlora/allocation.py that keeps the budget, or `path/to/file.py:function`."""
    power: Annotated[float, Field(ge=0.0)] = 1.0
    """p of r ∝ score^p; 0 = all units alike."""
    r_min: NonNegative = 1
    """Smallest rank of a unit; 0 = a unit may lose its adapter. It then has no gradient to be measured, and scores 0."""
    r_max: Annotated[int, Field(ge=1, le=MAX_RANK)] = 64
    """Largest rank of a unit."""
    granularity: Positive = 1
    """Ranks are multiples of this."""


class DataConfig(Section):
    """Training and evaluation problems."""

    source: str = "reasoning_gym:chain_sum"
    """`reasoning_gym:TASK`; `gsm8k`, `math` (held out: MATH-500), `math-5000` (held out: all of MATH's test problems), all three through
    `datasets`; or the path of a JSONL file with the columns below."""
    options: dict[str, int | float | str | bool] = {}
    """Options of the source: a reasoning-gym task's own parameters."""
    train_path: Path | None = None
    """Local JSONL to read instead of the hub (gsm8k and the two math keep their columns)."""
    eval_path: Path | None = None
    """Local JSONL of the held-out split."""
    train_size: NonNegative = 2048
    """Problems in the training split, the first ones; 0 = all (a reasoning-gym task needs a number)."""
    prompt_column: str = "question"
    """JSONL column of the question."""
    answer_column: str = "answer"
    """JSONL column of the gold answer (SFT: of the target completion)."""
    system_prompt: str | None = None
    """System turn; None = none at all (the template's own default system turn is not added either)."""
    user_template: str = "{question}"
    """The user turn; {question} and the row's other columns are filled in."""
    assistant_prefix: str = ""
    """Text put at the start of the assistant's turn, before sampling; the same fields are filled in."""
    max_prompt_length: Positive = 512
    """Tokens; a longer prompt is an error that names the row."""


class RolloutConfig(Section):
    """Sampling of completions."""

    sampler: Literal["torch", "vllm", "replay"] = "torch"
    """torch = Hugging Face model with a KV cache, in this process; vllm = an engine or servers, see [vllm]; replay = from `replay_path`."""
    replay_path: Path | None = None
    """Folder of recorded rollouts, one safetensors file a step (sampler = "replay")."""
    record_path: Path | None = None
    """Folder to record every training rollout into, for a later replay."""
    num_prompts: Positive = 8
    """Prompts per generation batch."""
    num_generations: Positive = 8
    """Completions per prompt (the group)."""
    max_completion_length: Positive = 16
    """Tokens sampled at most per completion."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Sampling temperature; the trainer's log-probabilities use the same."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus size; 1 = the full softmax."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion (kept in its tokens)."""
    batch_size: Positive = 64
    """Completions decoded together."""


class RewardConfig(Section):
    """What is rewarded."""

    functions: tuple[str, ...] = ("outcome",)
    """Names from fastlora.rewards (outcome, exact_match, first_integer, gsm8k, format, process, distillation) or
    `path/to/file.py:function`."""
    weights: tuple[float, ...] | None = None
    """One weight per function; None = 1 each."""
    timeout: Annotated[float, Field(gt=0.0)] = 5.0
    """Seconds per completion after which a grader is killed and the completion scores 0 (and is counted)."""
    format_pattern: str = r"(?s)\s*<reasoning>.*</reasoning>\s*<answer>.*</answer>\s*"
    """Regular expression that a whole completion must match for the `format` reward."""
    grader: str | None = None
    """Reward that judges held-out answers: right = it gives 1. None = the first of `functions`; process and distillation cannot."""
    process: ProcessConfig = ProcessConfig()
    distillation: DistillationConfig = DistillationConfig()


class AdvantageConfig(Section):
    """Rewards to advantages."""

    estimator: Literal["trajectory", "deposits"] = "trajectory"
    """trajectory = one number per completion, exactly TRL's; deposits = the reward-density study's per-token return-to-go."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide by the standard deviation of the group, of the batch, or not at all."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Several rewards: weight and sum, then normalise (GRPO), or normalise each within its group first (GDPO)."""
    eps: Annotated[float, Field(ge=0.0)] = 1e-4
    """Added to the standard deviation (TRL 1e-4, reward-density study 1e-8)."""
    normalize: Literal["deposits", "returns"] = "deposits"
    """estimator = "deposits", sparse rewards: normalise each deposit and sum what follows a token (as published: the sum of S steps has a
    spread of √S), or sum first and normalise the returns (fastlora/advantages.py)."""


class OptimConfig(Section):
    """AdamW on the flat buffers, and its schedule."""

    lr: Annotated[float, Field(gt=0.0)] = 3e-4
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0
    """Global norm to which gradients are clipped."""
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    """Learning-rate schedule (transformers.get_scheduler)."""
    warmup_steps: NonNegative = 0
    """Optimizer steps of linear warm-up."""
    max_nonfinite_steps: Positive = 3
    """Consecutive steps with a non-finite loss or gradient that are skipped before the run stops with an error."""


class TrainerConfig(Section):
    """The loop."""

    steps: Positive = 40
    """Generation batches to train on."""
    gradient_accumulation_steps: Positive = 1
    """Micro-batches per optimizer step."""
    steps_per_generation: Positive | None = None
    """Micro-batches per generation batch; None = gradient_accumulation_steps (one optimizer step per generation)."""
    num_iterations: Positive = 1
    """Passes over each generation batch."""
    implementation: Literal["auto", "reference", "torch", "cpp", "triton"] = "auto"
    """auto = shared prompts, packed tokens, the best kernels here; torch, cpp, triton = the same on these kernels, or an error; reference =
    TRL's padded layout and order of operations, bit for bit."""
    checkpoint_every: NonNegative = 10
    """Steps between checkpoints; 0 = only at the end and on Ctrl-C."""
    keep_checkpoints: Positive = 2
    """Checkpoints kept; older ones are removed after a newer one is safely on disk."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about 1.3 × the time."""


class EvalConfig(Section):
    """Held-out evaluation."""

    num_problems: Positive = 256
    """Problems of the fixed held-out split."""
    every: NonNegative = 10
    """Steps between evaluations during training; 0 = only before and after."""
    num_problems_during: Positive = 64
    """Problems of the evaluations during training (the first of the held-out split)."""
    pass_at_k: tuple[Positive, ...] = ()
    """k of the unbiased pass@k estimates, made before and after training; () = none."""
    num_samples: Positive = 8
    """Samples per problem behind pass@k; at least the largest k."""
    required_gain: float | None = None
    """Fraction by which accuracy must rise for the command to succeed (0.10 = ten points); None = no check."""


class LogConfig(Section):
    """What is written besides metrics.jsonl."""

    tensorboard: bool = False
    """Also write TensorBoard event files into the run's folder."""
    completions: NonNegative = 4
    """Sampled completions written to completions.jsonl per step."""
    gradient_cosine: bool = False
    """Also log gradient/cosine: of each optimizer step's gradient with the last one's (a copy of the gradient, and two reads of both)."""
    rank_components: bool = False
    """Also write the gradient norm of every rank component (row of A, column of B) into gradient_profile.parquet."""


class RunConfig(Section):
    """One training run."""

    name: str | None = None
    """Folder under `output_dir`; None = the config's file name and the time. An existing run is never overwritten."""
    output_dir: Path = Path("runs")
    """Where runs are written."""
    seed: NonNegative = 0
    """Seed of everything random: data order, sampling, initialisation."""
    objective: Literal["grpo", "sft"] = "grpo"
    """grpo = reinforcement learning on sampled completions; sft = token-mean cross-entropy on given completions."""
    method: Literal["lora", "full"] = "lora"
    """What trains: the packed adapter, or every weight of the model (the baseline)."""
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    reallocation: ReallocationConfig = ReallocationConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    vllm: VllmConfig = VllmConfig()
    reward: RewardConfig = RewardConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    trainer: TrainerConfig = TrainerConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    alarms: AlarmsConfig = AlarmsConfig()

    @property
    def steps_per_generation(self) -> int:
        """Micro-batches per generation batch."""
        return self.trainer.steps_per_generation or self.trainer.gradient_accumulation_steps

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of the whole run."""
        per_generation = self.steps_per_generation * self.trainer.num_iterations // self.trainer.gradient_accumulation_steps
        return self.trainer.steps * per_generation

    @property
    def sampler_is_trainer(self) -> bool:
        """Completions come from the model that trains, in its process; else what the sampler said of them is kept and compared."""
        return self.rollout.sampler == "torch"

    @property
    def scoring_top_p(self) -> float:
        """Nucleus over which the trainer's log-probabilities are normalised; 1 = the full softmax."""
        return self.rollout.top_p if self.loss.renormalize_top_p else 1.0

    @model_validator(mode="after")
    def _refuse_impossible(self) -> RunConfig:
        for message in _impossibilities(self):
            raise ValueError(message)
        return self


def _impossibilities(c: RunConfig) -> list[str]:
    """One sentence for each combination of settings that cannot work."""
    grpo = c.objective == "grpo"
    samples = c.rollout.num_prompts * (c.rollout.num_generations if grpo else 1)
    weights, sampler, rewards = c.reward.weights, c.rollout.sampler, c.reward.functions
    teacher, grader = c.reward.distillation, c.reward.grader or (*c.reward.functions, "")[0]
    idle = [name for name in MODEL_REWARDS if getattr(c.reward, name) != getattr(RewardConfig(), name) and name not in rewards]
    mode, low, high = c.loss.sampler_correction, c.loss.sampler_correction_min, c.loss.sampler_correction_max
    checks = [
        (
            grpo and c.rollout.num_generations == 1 and c.advantage.scale_rewards == "group",
            "rollout.num_generations = 1 with advantage.scale_rewards = 'group': a group of one has no spread, every advantage "
            "would be 0. Use at least 2 generations, or scale_rewards = 'batch' or 'none'",
        ),
        (
            samples % c.steps_per_generation != 0,
            f"rollout.num_prompts{' × num_generations' if grpo else ''} = {samples} samples cannot be split into "
            f"{c.steps_per_generation} equal micro-batches (trainer.steps_per_generation)",
        ),
        (
            c.steps_per_generation * c.trainer.num_iterations % c.trainer.gradient_accumulation_steps != 0,
            f"trainer.steps_per_generation × num_iterations = {c.steps_per_generation * c.trainer.num_iterations} is not a "
            f"multiple of trainer.gradient_accumulation_steps = {c.trainer.gradient_accumulation_steps}",
        ),
        (
            weights is not None and len(weights) != len(c.reward.functions),
            f"reward.weights has {len(weights or ())} entries for {len(c.reward.functions)} reward.functions",
        ),
        (grpo and not c.reward.functions, "reward.functions is empty: there is nothing to optimise"),
        (
            bool(idle),
            f"[reward.{(*idle, '')[0]}] is set, but reward.functions = {list(rewards)} does not name it; add it or remove the section",
        ),
        (
            grader in MODEL_REWARDS,
            f"reward.grader: {grader!r} cannot judge whether an answer is right; name a reward that gives 1 to right answers, such as "
            "'outcome'",
        ),
        (
            "distillation" in rewards and len(rewards) > 1,
            f"reward.functions = {list(rewards)}: 'distillation' deposits at every token, the others at few, and the two cannot share one "
            "stream of advantages; train on one kind",
        ),
        (
            grpo and any(name in MODEL_REWARDS for name in rewards) and c.advantage.estimator == "trajectory",
            f"advantage.estimator = 'trajectory' makes one number of a completion, and reward.functions = {list(rewards)} earns at several "
            "tokens; set advantage.estimator = 'deposits'",
        ),
        (
            "distillation" in rewards and teacher.model is None and teacher.adapter is None,
            "reward.functions has 'distillation', but there is no teacher: set reward.distillation.model, adapter or both",
        ),
        (
            teacher.adapter is not None and teacher.adapter == c.lora.init_from and teacher.model in (None, c.model.name),
            f"reward.distillation.adapter and lora.init_from are both {str(teacher.adapter)!r}: the student would start as its own "
            "teacher, every reward 0",
        ),
        (
            c.advantage.normalize == "returns" and (c.advantage.estimator == "trajectory" or "distillation" in rewards),
            "advantage.normalize = 'returns' normalises sums of the deposits behind a token, which only estimator = 'deposits' with sparse "
            "rewards has; set it to 'deposits'",
        ),
        (
            (sampler == "replay") != (c.rollout.replay_path is not None),
            "rollout.sampler = 'replay' and rollout.replay_path go together: give both or neither",
        ),
        (
            sampler == "vllm" and c.model.quantization != "none",
            "rollout.sampler = 'vllm' would sample from the base model in full precision, and the trainer's is in 4 bits; "
            "set model.quantization = 'none' or rollout.sampler = 'torch'",
        ),
        (
            c.vllm != VllmConfig() and sampler != "vllm",
            f"[vllm] is set, but rollout.sampler = {sampler!r}; set it to 'vllm' or remove the section",
        ),
        (
            bool(c.vllm.servers) and (c.vllm.weights != "adapter" or c.method == "full"),
            "vllm.servers take adapters only; leave it empty (an engine of our own) for vllm.weights = 'merged' or 'auto' and for "
            "method = 'full'",
        ),
        (
            bool(c.vllm.servers) and any(x is not None for x in (c.vllm.device, c.vllm.gpu_share, c.vllm.kv_cache_gib)),
            "vllm.device, gpu_share and kv_cache_gib are of an engine of our own, and vllm.servers names others; remove them",
        ),
        (
            c.method == "full" and c.vllm.weights != "adapter",
            f"method = 'full' has no adapter: vllm.weights = '{c.vllm.weights}' has no effect; remove it",
        ),
        (
            c.vllm.staleness > 0 and mode == "none",
            "vllm.staleness = 1 trains on samples of the policy before the last step; set loss.sampler_correction (TRL's default is "
            "'sequence_mask'), which weighs them by the ratio of the two policies",
        ),
        (
            c.vllm.staleness > 0 and c.rollout.record_path is not None,
            "rollout.record_path records what is sampled and trained on in the same step; set vllm.staleness = 0",
        ),
        (
            mode != "none" and c.sampler_is_trainer,
            f"loss.sampler_correction = '{mode}' corrects for a sampler that is not the trainer, and rollout.sampler = "
            f"'{sampler}' is the trainer's own model; set loss.sampler_correction = 'none'",
        ),
        (
            high is not None and low > high,
            f"loss.sampler_correction_min = {low} is above loss.sampler_correction_max = {high}",
        ),
        (
            mode.startswith("sequence") and c.loss.loss_type == "vespo",
            f"loss.loss_type = 'vespo' makes a weight per sequence from ratios per token: loss.sampler_correction = '{mode}' cannot be; "
            "use 'token_truncate' or 'token_mask'",
        ),
        (
            c.loss.function is not None and c.loss != LossConfig(function=c.loss.function, **c.loss.model_dump(include=OWN_LOSS_KEEPS)),
            f"loss.function = {c.loss.function!r} is the whole loss: of [loss] only {', '.join(sorted(OWN_LOSS_KEEPS))} go with it; "
            "remove the others",
        ),
        (
            c.loss.renormalize_top_p and c.rollout.top_p == 1.0,
            "loss.renormalize_top_p = true does nothing with rollout.top_p = 1, where the nucleus is every token; lower top_p, or set it "
            "false",
        ),
        (
            c.reallocation.every == 0 and c.reallocation != ReallocationConfig(),
            "[reallocation] is set, but reallocation.every = 0, which is never; set every, or remove the section",
        ),
        (
            c.reallocation.every >= c.trainer.steps,
            f"reallocation.every = {c.reallocation.every} of trainer.steps = {c.trainer.steps}: no step would follow a reallocation; "
            "lower every",
        ),
        (
            c.reallocation.r_min > c.reallocation.r_max,
            f"reallocation.r_min = {c.reallocation.r_min} is above reallocation.r_max = {c.reallocation.r_max}",
        ),
        (
            c.reallocation.every > 0 and c.method == "full",
            "method = 'full' has no ranks; remove [reallocation]",
        ),
        (
            c.reallocation.every > 0 and c.lora.b_mask is not None,
            "reallocation.every > 0 with lora.b_mask: shrinking mixes the columns of B that the mask tells apart; remove one of them",
        ),
        (
            c.reallocation.every > 0 and c.lora.freeze_a,
            "reallocation.every > 0 with lora.freeze_a: shrinking turns A towards what B A has learned, and a frozen A stays as it was "
            "drawn; set lora.freeze_a = false",
        ),
        (
            c.data.source.startswith("reasoning_gym:") and c.data.train_size == 0,
            "data.train_size = 0 (all) is impossible: a reasoning-gym task generates as many problems as it is asked for",
        ),
        (
            bool(c.eval.pass_at_k) and max(c.eval.pass_at_k, default=0) > c.eval.num_samples,
            f"eval.num_samples = {c.eval.num_samples} is below the largest eval.pass_at_k = {max(c.eval.pass_at_k, default=0)}",
        ),
        (
            c.method == "full" and c.log.rank_components,
            "method = 'full' has no rank components: log.rank_components has no effect; remove it",
        ),
        (
            not grpo and c.alarms != AlarmsConfig(),
            "[alarms] watches the policy of objective = 'grpo'; remove the section",
        ),
        (
            c.alarms.mismatch.threshold is not None and c.sampler_is_trainer,
            f"alarms.mismatch watches a sampler that is not the trainer, and rollout.sampler = '{sampler}' is the trainer's own model; "
            "remove it",
        ),
        (
            c.method == "full" and (bool(c.lora.rank_pattern) or c.lora.b_mask is not None),
            "method = 'full' trains every weight: lora.rank_pattern and lora.b_mask have no effect; remove them",
        ),
        (
            c.method == "full" and c.model.quantization != "none",
            "method = 'full' trains every weight, and 4-bit weights cannot be trained; set model.quantization = 'none'",
        ),
    ]
    return [message for bad, message in checks if bad]


def load_config(path: Path | None, overrides: Sequence[str] = (), description: str = "") -> RunConfig:
    """The config of a TOML file with command-line overrides (`--optim.lr 1e-4`).

    Raises ConfigError that names file, key and problem; `--help` among the overrides prints every field and exits.
    """
    default = RunConfig() if path is None else validated(RunConfig, read_toml(path), str(path))
    shown = StringIO()
    try:
        with redirect_stderr(shown):
            return tyro.cli(RunConfig, args=list(overrides), default=default, prog="train.py CONFIG.toml", description=description)
    except SystemExit as stop:
        refused = _refused_value(stop)
        if refused is None:  # an option that does not exist or does not parse, in tyro's own words
            sys.stderr.write(shown.getvalue())
            raise
        raise ConfigError(explain(refused, "command line")) from None


def _refused_value(stop: BaseException) -> ValidationError | None:
    """The pydantic error behind tyro's exit, if that is the reason."""
    cause = stop.__context__
    while cause is not None and not isinstance(cause, ValidationError):
        cause = cause.__context__
    return cause


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ConfigError when it is missing or not TOML."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def validated(kind: type[AnySection], settings: Mapping[str, Any], where: str) -> AnySection:
    """A section from plain values. Raises ConfigError that names `where` (the file), every wrong key and its problem."""
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(explain(error, where)) from None


def explain(error: ValidationError, where: str) -> str:
    """One line for each wrong key: where, key, problem."""
    section = _section_of(error.title, RunConfig)
    lines = []
    for item in error.errors():
        key = ".".join([*section, *map(str, item["loc"])]) or "config"
        problem = "unknown key" if item["type"] == "extra_forbidden" else item["msg"].removeprefix("Value error, ")
        lines.append(f"{where}: {key}: {problem}")
    return "\n".join(lines)


def _section_of(class_name: str, within: type[Section]) -> list[str]:
    """Keys that lead to the section of a class, [] for none: tyro builds section by section, and an error in one names only its class.

    For a class of several sections (AlarmConfig) the last key is `*`.
    """
    keys: list[list[str]] = []
    for name, field in within.model_fields.items():
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
            continue
        if field.annotation.__name__ == class_name:
            keys.append([name])
        elif below := _section_of(class_name, field.annotation):
            keys.append([name, *below])
    return ["*"] if len(keys) > 1 else next(iter(keys), [])
