"""Every setting of a study: a TOML file that names a run's config as its base, what differs from it, and the study's own section.

    study = "rank-allocation"
    base = "../smollm2_sums_cpu.toml"      # relative to this file
    seeds = [0, 1, 2]
    [run]                                  # of every cell; the keys of a run's config
    trainer.steps = 20
    [rank_allocation]                      # the section of the study

`load_study_config(path)` is the only way in; unknown keys are errors, as in a run's config (fastlora/config.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, model_validator

from fastlora.config import MAX_RANK, ConfigError, RunConfig, read_toml, validated
from fastlora.plugins import is_function_spec
from fastlora.section import NonNegative, Positive, Section

STUDIES: dict[str, str] = {
    "rank-allocation": "fastlora.study.rank_allocation:RankAllocation",
    "layer-selection": "fastlora.study.layer_selection:LayerSelection",
    "placement": "fastlora.study.placement:Placement",
    "reward-density": "fastlora.study.reward_density:RewardDensity",
}
"""Registered studies: name -> module and class. Each has the section of its name in StudyConfig."""


def one_of(*known: str) -> AfterValidator:
    """A validator: one of the known names, or one's own function as `path/to/file.py:function`."""

    def check(name: str) -> str:
        if name in known or is_function_spec(name):
            return name
        near = get_close_matches(name, known)
        hint = f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(known)};"
        raise ValueError(f"{name!r} is unknown; {hint} one's own is written path/to/file.py:function")

    return AfterValidator(check)


def _some_and_none_twice(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise ValueError("is empty: there would be no cells")
    if twice := sorted({str(value) for value in values if values.count(value) > 1}):
        raise ValueError(f"{', '.join(twice)} stands there twice: two cells would have one name")
    return values


Item = TypeVar("Item")
Several = Annotated[tuple[Item, ...], AfterValidator(_some_and_none_twice)]
"""At least one item, none of them twice."""

Strategy = Annotated[str, one_of("uniform", "random", "reduced", "proportional", "inverse-proportional", "shuffled-proportional")]
Scaling = Literal["alpha/r", "alpha/sqrt(r)", "constant"]
Selection = Annotated[str, one_of("all", "top", "random", "bottom", "middle", "first", "last")]
Score = Annotated[str, one_of("sign_consistency", "signed_sum", "snr", "magnitude", "fisher", "random")]
Scope = Literal["global", "module", "projection"]
Regime = Literal["outcome", "process", "distillation"]
Objective = Literal["grpo", "sft"]
Peer = Literal["shira"]
Rank = Annotated[int, Field(gt=0, le=MAX_RANK)]
LearningRate = Annotated[float, Field(gt=0.0)]


class ResourcesConfig(Section):
    """What each cell gets of the machine (or of the cluster)."""

    cpus: Positive = 1
    """CPU cores of a cell, which are also the threads of its torch; as many cells run together as fit."""
    gpus: Annotated[float, Field(ge=0.0)] = 0.0
    """GPUs of a cell; .25 = four cells share one, 0 = it sees none and trains on the CPU."""
    engine: Literal["own", "shared"] = "own"
    """vLLM's, with rollout.sampler = "vllm": one of each cell's own, or one for all cells of a stage, on the command's machine, which holds
    the adapters of those that run together and batches their completions together."""


class ThresholdsConfig(Section):
    """Below these an accuracy claim stays undecided, whatever its interval says."""

    min_items: Positive = 1000
    """Held-out problems."""
    min_seeds: Positive = 3
    """Seeds."""


class RankAllocationConfig(Section):
    """S1: ranks from a uniform run's gradient profile."""

    strategies: Several[Strategy] = ("uniform", "random", "proportional", "reduced", "inverse-proportional", "shuffled-proportional")
    """Allocators (fastlora/allocation.py), or one's own."""
    rank: Rank = 32
    """Rank of every module in the uniform run; the budget is this times the number of layers, whose modules share a rank."""
    power: float = 1.0
    """p of r = budget · s^p / Σ s^p."""
    r_min: NonNegative = 1
    """Smallest rank of a layer."""
    r_max: Rank = MAX_RANK
    """Largest rank of a layer."""
    granularity: Positive = 1
    """Ranks are multiples of this."""
    reduced_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.7
    """Part of the budget that `reduced` spends."""
    scalings: Several[Scaling] = ("constant",)
    """Scale modes: all strategies run under the first, uniform and proportional ranks under the others."""
    scale: Annotated[float, Field(gt=0.0)] = 2.0
    """s of W + s·B·A at the uniform rank, in every scale mode."""
    dynamic_every: NonNegative = 0
    """Also a run that begins with uniform ranks and reallocates them, proportionally, every so many steps; 0 = none."""
    repeated: tuple[Strategy, ...] | None = None
    """Those of `strategies` that run with every seed; the others, the other scale modes and the dynamic run with the first one alone.
    None = everything with every seed."""

    @model_validator(mode="after")
    def _repeats_what_runs(self) -> RankAllocationConfig:
        if unknown := sorted(set(self.repeated or ()) - set(self.strategies)):
            raise ValueError(f"repeated: {unknown[0]!r} is none of the strategies: {', '.join(self.strategies)}")
        return self


CODE_TASKS = ("humaneval", "mbpp")
"""How the names of lm-eval's tasks begin that run what the model wrote. Others that do are refused when they are loaded."""


class HarnessConfig(Section):
    """Public benchmarks, through lm-evaluation-harness (fastlora/study/harness.py)."""

    tasks: tuple[str, ...] = ()
    """Names of its tasks, or of groups of them ("mmlu"); () = none."""
    num_fewshot: dict[str, NonNegative] = {}
    """Task -> solved examples in front of every question; one that is not named here has as many as it is made for."""
    limit: Positive | None = None
    """Questions of every single task (a group has many), the first ones; None = all."""
    batch_size: Positive = 8
    """Questions answered together."""
    include_path: Path | None = None
    """Folder with YAML files of one's own tasks."""
    confirm_unsafe_code: bool = False
    """Let tasks run what the model wrote (humaneval): lm-eval gives it a time limit and no walls, it has the rights of the study."""

    @model_validator(mode="after")
    def _refuse_impossible(self) -> HarnessConfig:
        if twice := sorted({name for name in self.tasks if self.tasks.count(name) > 1}):
            raise ValueError(f"tasks: {', '.join(twice)} stands there twice")
        if others := sorted(self.num_fewshot.keys() - set(self.tasks)):
            raise ValueError(f"num_fewshot: {', '.join(others)} is not among the tasks")
        if (code := [name for name in self.tasks if name.startswith(CODE_TASKS)]) and not self.confirm_unsafe_code:
            raise ValueError(
                f"tasks: {', '.join(code)} runs code that the model writes, and nothing shuts it in. Set confirm_unsafe_code = true on a "
                "machine where it can do no harm, or leave it out"
            )
        return self


class LayerSelectionConfig(Section):
    """S2: LoRA on the layers that a short probe chose."""

    selections: Several[Selection] = ("all", "top", "random", "bottom", "middle", "first", "last")
    """all layers, the chosen ones and the controls of their number (fastlora/selection.py), or one's own."""
    count: Literal["top_fraction", "above_median"] = "top_fraction"
    """How many layers: `fraction` of them, or those whose score lies above the median."""
    fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Of the layers, for `top_fraction`."""
    batches: Positive = 5
    """Probe batches."""
    batch_size: Positive = 1
    """Examples in a probe batch."""
    repeats: NonNegative = 0
    """More probes, of other batches, which only tell how stable the scores are: that needs three probes, the seeds' own included."""
    attention_rank: Rank = 16
    """Rank of q, k, v and o in an adapted layer."""
    mlp_rank: Rank = 16
    """Rank of gate, up and down."""
    objectives: Several[Objective] = ("sft", "grpo")
    """What the cells train."""
    second_task: dict[str, Any] = {}
    """[data] settings of a task that is not trained, on which every adapter and the base model answer; {} = none."""
    harness: HarnessConfig = HarnessConfig()


class PlacementConfig(Section):
    """S3: exactly k trainable entries of B."""

    scores: Several[Score] = ("sign_consistency", "magnitude", "random")
    """Scores of the entries (fastlora/placement.py), or one's own."""
    k: Several[Positive] = (4096,)
    """Trainable entries of all B together."""
    scopes: Several[Scope] = ("global",)
    """Where the k are chosen: over all entries, equally per module, or per projection type."""
    batches: Annotated[int, Field(ge=16)] = 16
    """Scoring batches."""
    objectives: Several[Objective] = ("grpo", "sft")
    """What is scored and trained."""
    peers: tuple[Peer, ...] = ()
    """Other ways to train k entries: shira = PEFT's SHiRA, k random entries of W itself, trained by TRL (extra `study`)."""
    shira_lr: LearningRate = 1e-3
    """Learning rate of `shira`. A step moves an entry of W by it, and ΔW by s lr ‖row of A‖ ≈ s lr / √3 through an entry of B."""

    @model_validator(mode="after")
    def _refuse_idle(self) -> PlacementConfig:
        if "shira_lr" in self.model_fields_set and "shira" not in self.peers:
            raise ValueError("shira_lr is set, but peers does not name 'shira'; add it or remove shira_lr")
        return self


class RewardDensityConfig(Section):
    """S4: one loss, three reward regimes, LoRA ranks and full fine-tuning."""

    regimes: Several[Regime] = ("outcome", "process", "distillation")
    """Where rewards are deposited: at the end, at each step, at each token."""
    ranks: Several[Rank] = (1, 4, 16, 64, 256)
    """LoRA ranks."""
    full: bool = True
    """Full fine-tuning beside them."""
    lr: LearningRate = 3e-5
    """Learning rate with LoRA."""
    lr_full: LearningRate = 1e-5
    """Learning rate of full fine-tuning."""
    collapse: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """A run whose accuracy falls below this part of the base model's has collapsed."""
    collapse_rank: NonNegative = 0
    """LoRA rank of one more process run that is long enough to collapse; 0 = none."""
    collapse_steps: Positive = 100
    """Its steps."""
    collapse_eval_every: Positive = 10
    """Steps between its evaluations."""
    runs: dict[str, dict[str, Any]] = {}
    """Regime -> settings of its runs that differ: its rewards, with the section of the reward."""
    teacher_rank: NonNegative = 0
    """Rank of a teacher that is trained first, on the base run's reward, and shares the base model; 0 = none, the config names one."""
    teacher_lr: LearningRate = 3e-4
    """Its learning rate."""
    teacher_steps: Positive = 40
    """Its steps."""


class StudyConfig(Section):
    """One study."""

    study: str
    """A registered study (rank-allocation, layer-selection, placement, reward-density), or one's own: `path/to/file.py:Class`."""
    base: Path
    """Config file of a run, relative to the study's file."""
    run: dict[str, Any] = {}
    """Settings of every cell's run that differ from the base."""
    seeds: Several[NonNegative] = (0, 1, 2)
    """Every cell is repeated with each of them."""
    output_dir: Path = Path("runs/studies")
    """The study writes to a folder in it that has the name of the study's file."""
    max_retries: NonNegative = 1
    """Times that a cell is tried again after its process died or raised an unexpected error."""
    timing_rounds: Annotated[int, Field(ge=3)] = 25
    """Rounds in which what is timed takes turns (updates in layer-selection, scoring in placement); 3 is the least that has an interval."""
    resources: ResourcesConfig = ResourcesConfig()
    thresholds: ThresholdsConfig = ThresholdsConfig()
    rank_allocation: RankAllocationConfig = RankAllocationConfig()
    layer_selection: LayerSelectionConfig = LayerSelectionConfig()
    placement: PlacementConfig = PlacementConfig()
    reward_density: RewardDensityConfig = RewardDensityConfig()
    own: dict[str, Any] = {}
    """Settings of one's own study, which checks them itself."""

    def run_config(self, changes: Mapping[str, Any] | None = None, where: str = "cell") -> RunConfig:
        """The base with [run], then with `changes` (see `derive`); `where` stands before the message of a ConfigError."""
        return derive(self.base_run(), changes or {}, where)

    def base_run(self, where: str = "run") -> RunConfig:
        """The base with [run]: what every cell starts from. `where` stands before the message of a ConfigError about [run]."""
        return derive(validated(RunConfig, read_toml(self.base), str(self.base)), self.run, where)

    @model_validator(mode="after")
    def _refuse_impossible(self) -> StudyConfig:
        own = "own" if is_function_spec(self.study) else self.study.replace("-", "_")
        if own != "own" and self.study not in STUDIES:
            raise ValueError(f"study = {self.study!r} is unknown; registered are {', '.join(STUDIES)}; one's own is path/to/file.py:Class")
        sections = {*(name.replace("-", "_") for name in STUDIES), "own"}
        for other in sorted(sections & self.model_fields_set - {own}):
            raise ValueError(f"[{other}] is set, but study = {self.study!r}; remove the section")
        return self


def load_study_config(path: Path, *, seeds: Iterable[int] | None = None) -> StudyConfig:
    """The config of a study's file, `seeds` in place of its own if given. Raises ConfigError that names file, key and problem."""
    settings = read_toml(path)
    if "base" in settings and isinstance(settings["base"], str):
        settings["base"] = path.parent / settings["base"]
    if seeds is not None:
        settings["seeds"] = tuple(seeds)
    config = validated(StudyConfig, settings, str(path))
    run = config.base_run(f"{path}: run")
    if run.model.device == "cuda" and config.resources.gpus == 0:
        raise ConfigError(f"{path}: resources.gpus = 0, and model.device = 'cuda': a cell would see no GPU; say how many it gets")
    if config.resources.engine == "shared" and run.rollout.sampler != "vllm":
        raise ConfigError(f"{path}: resources.engine = 'shared' is vLLM's, and rollout.sampler = {run.rollout.sampler!r}; set it to 'vllm'")
    return config


def derive(config: RunConfig, changes: Mapping[str, Any], where: str) -> RunConfig:
    """`config` with some settings replaced: {"optim.lr": 1e-4, "lora": {"r": 4}}.

    Sections are merged key by key; every other value, a rank_pattern too, is replaced as a whole. Raises ConfigError that begins with
    `where` for what no run's config may say.
    """
    return validated(RunConfig, _merged(RunConfig, config.model_dump(), changes), where)


def _merged(kind: type[Section], settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(settings)
    for key, value in changes.items():
        head, dot, rest = key.partition(".")
        section = _section(kind, head)
        if section is not None and dot:
            merged[head] = _merged(section, merged[head], {rest: value})
        elif section is not None and isinstance(value, Mapping):
            merged[head] = _merged(section, merged[head], value)
        else:
            merged[key] = value
    return merged


def _section(kind: type[Section], key: str) -> type[Section] | None:
    """The section that a key of `kind` holds; None for a value and for an unknown key, which the validation names."""
    annotation = kind.model_fields[key].annotation if key in kind.model_fields else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def differences(config: RunConfig, other: RunConfig) -> dict[str, Any]:
    """Settings of `config` that are not those of `other`, by dotted key; sections are compared key by key."""
    return dict(_differences(config, other, ""))


def _differences(one: Section, other: Section, prefix: str) -> Iterable[tuple[str, Any]]:
    for key in type(one).model_fields:
        mine, theirs = getattr(one, key), getattr(other, key)
        if isinstance(mine, Section):
            yield from _differences(mine, theirs, f"{prefix}{key}.")
        elif mine != theirs:
            yield f"{prefix}{key}", mine
