"""Settings: files, overrides, refusals by name, and a --help that explains every field."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from fastlora.config import ConfigError, RunConfig, _impossibilities, load_config


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_defaults_file_and_overrides_in_that_order(tmp_path: Path) -> None:
    path = _file(
        tmp_path,
        'seed = 3\n[optim]\nlr = 2e-4\nwarmup_steps = 5\n[lora]\nr = 4\n[lora.rank_pattern]\n"q_proj" = 8\n'
        '[rollout]\nstop = ["\\n", "."]\n',
    )
    config = load_config(path, ["--optim.lr", "1e-3", "--lora.r", "2", "--trainer.gradient-checkpointing", "--model.revision", "main"])
    assert (config.seed, config.optim.lr, config.optim.warmup_steps, config.lora.r) == (3, 1e-3, 5, 2)
    assert config.lora.rank_pattern == {"q_proj": 8} and config.rollout.stop == ("\n", ".")
    assert config.trainer.gradient_checkpointing and config.model.revision == "main"
    assert config.loss == RunConfig().loss
    assert load_config(None) == RunConfig()


def test_underscores_in_overrides() -> None:
    """As in the file and in every error message."""
    assert load_config(None, ["--rollout.num_generations", "4", "--lora.lora_alpha", "8"]).rollout.num_generations == 4


def test_a_resolved_config_reads_back(tmp_path: Path) -> None:
    config = load_config(None, ["--seed", "7", "--loss.epsilon-high", "0.28"])
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sead = 3", r"run.toml: sead: unknown key"),
        ("[optim]\nlearning_rate = 1e-4", r"run.toml: optim.learning_rate: unknown key"),
        ("[lorra]\nr = 4", r"run.toml: lorra: unknown key"),
        ("[optim]\nlr = 'fast'", r"run.toml: optim.lr: .*valid number"),
        ("[optim]\nlr = 0", r"run.toml: optim.lr: .*greater than 0"),
        ("[lora]\nr = -1", r"run.toml: lora.r: .*greater than or equal to 0"),
        ("[lora]\nr = 4096", r"run.toml: lora.r: .*less than or equal to 1024"),
        ("[lora.rank_pattern]\nq_proj = -2", r"run.toml: lora.rank_pattern.q_proj: .*greater than or equal to 0"),
        ("[lora.rank_pattern]\nq_proj = 2.5", r"run.toml: lora.rank_pattern.q_proj: .*integer"),
        ("[lora]\ntarget_modules = []", r"run.toml: lora.target_modules: .*at least 1 item"),
        ("[loss]\nloss_type = 'ppo'", r"run.toml: loss.loss_type: .*'grpo', 'bnpo'"),
        ("[optim]\nbetas = [0.9, 1.0]", r"run.toml: optim.betas.1: .*less than 1"),
        ("[trainer]\nsteps = 0", r"run.toml: trainer.steps: .*greater than 0"),
        ("optim = 3", r"run.toml: optim: "),
        ("[alarms.entropy]\nthreshold = nan", r"run.toml: alarms.entropy.threshold: .*finite number"),
        ("[alarms.entropy]\naction = 'shout'", r"run.toml: alarms.entropy.action: .*'warn' or 'stop'"),
        ("[alarms.boredom]\nthreshold = 1.0", r"run.toml: alarms.boredom: unknown key"),
        ("[optim\nlr = 1", r"run.toml: not valid TOML: .*line 1"),
        ("seed = 1\nseed = 2", r"run.toml: not valid TOML: .*"),
        ("[reward.process]\nbatch_size = 0", r"run.toml: reward.process.batch_size: .*greater than 0"),
        ("[reward.distillation]\ndevice = 'tpu'", r"run.toml: reward.distillation.device: .*pattern"),
    ],
)
def test_bad_files_are_refused_with_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(_file(tmp_path, text))


def test_every_wrong_key_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(_file(tmp_path, "sead = 3\n[optim]\nlr = -1\n"))
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and "sead: unknown key" in str(caught.value) and "optim.lr" in str(caught.value)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.toml: no such config file"):
        load_config(tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(tmp_path)
    path = tmp_path / "binary.toml"
    path.write_bytes(b"seed = \xff\xfe")
    with pytest.raises(ConfigError, match=r"binary.toml: not valid TOML: .*utf-8"):
        load_config(path)


@pytest.mark.parametrize(
    "overrides", [["--optim.learning-rate", "1"], ["--optim.lr", "fast"], ["--nonsense"], ["--lora.r", "1.5"]], ids=str
)
def test_bad_overrides_end_the_command(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_config(None, overrides)
    assert caught.value.code == 2 and overrides[0] in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--lora.r", "-1"], "lora.r: .*greater than or equal to 0"),
        (["--alarms.truncated.patience", "0"], r"alarms\.\*\.patience: .*greater than 0"),
        (["--reward.process.batch-size", "0"], "reward.process.batch_size: .*greater than 0"),
        (["--rollout.num-generations", "1"], "num_generations = 1 with advantage.scale_rewards = 'group'"),
    ],
)
def test_impossible_overrides_name_the_command_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"command line: .*{message}"):
        load_config(None, overrides)


IMPOSSIBLE: dict[str, tuple[str, str]] = {
    "group of one": ("[rollout]\nnum_generations = 1", "rollout.num_generations = 1 with advantage.scale_rewards = 'group'"),
    "uneven micro-batches": (
        "[rollout]\nnum_prompts = 3\nnum_generations = 3\n[trainer]\ngradient_accumulation_steps = 2",
        "num_prompts × num_generations = 9 samples cannot be split into 2 equal micro-batches",
    ),
    "uneven micro-batches of SFT": (
        "objective = 'sft'\n[rollout]\nnum_prompts = 6\n[trainer]\ngradient_accumulation_steps = 4",
        "rollout.num_prompts = 6 samples cannot be split into 4 equal micro-batches",
    ),
    "half an optimizer step": (
        "[trainer]\nsteps_per_generation = 4\ngradient_accumulation_steps = 8",
        "steps_per_generation × num_iterations = 4 is not a multiple of trainer.gradient_accumulation_steps = 8",
    ),
    "weights": ("[reward]\nweights = [1.0, 2.0]", "reward.weights has 2 entries for 1 reward.functions"),
    "no reward": ("[reward]\nfunctions = []", "reward.functions is empty"),
    "section of an unused reward": ("[reward.process]\nbatch_size = 2", r"\[reward.process\] is set, but reward.functions = \['outcome'\]"),
    "judge of steps as grader": (
        "[reward]\nfunctions = ['process']\n[advantage]\nestimator = 'deposits'",
        "reward.grader: 'process' cannot judge whether an answer is right",
    ),
    "dense with sparse": (
        "[reward]\nfunctions = ['outcome', 'distillation']\n[reward.distillation]\nmodel = 'x'\n[advantage]\nestimator = 'deposits'",
        "'distillation' deposits at every token",
    ),
    "steps as one number": (
        "[reward]\nfunctions = ['outcome', 'process']",
        "advantage.estimator = 'trajectory' makes one number of a completion",
    ),
    "no teacher": (
        "[reward]\nfunctions = ['distillation']\ngrader = 'outcome'\n[advantage]\nestimator = 'deposits'",
        "there is no teacher: set reward.distillation.model, adapter or both",
    ),
    "one's own teacher": (
        "[lora]\ninit_from = 'a'\n[reward]\nfunctions = ['distillation']\ngrader = 'outcome'\n[reward.distillation]\nadapter = 'a'\n"
        "[advantage]\nestimator = 'deposits'",
        "the student would start as its own teacher",
    ),
    "returns of one number": ("[advantage]\nnormalize = 'returns'", "advantage.normalize = 'returns' normalises sums of the deposits"),
    "replay without path": ("[rollout]\nsampler = 'replay'", "rollout.sampler = 'replay' and rollout.replay_path go together"),
    "vllm and 4 bits": (
        "[model]\nquantization = 'nf4'\n[rollout]\nsampler = 'vllm'",
        "rollout.sampler = 'vllm' would sample from the base model in full precision",
    ),
    "vllm's settings without vllm": ("[vllm]\nmax_restarts = 1", "is set, but rollout.sampler = 'torch'"),
    "merged on a foreign server": (
        "[rollout]\nsampler = 'vllm'\n[vllm]\nservers = ['http://h:1']\nweights = 'merged'",
        "vllm.servers take adapters only",
    ),
    "an engine's memory on a foreign server": (
        "[rollout]\nsampler = 'vllm'\n[vllm]\nservers = ['http://h:1']\nkv_cache_gib = 1.0",
        "vllm.device, gpu_share and kv_cache_gib are of an engine of our own",
    ),
    "merging without an adapter": (
        "method = 'full'\n[rollout]\nsampler = 'vllm'\n[vllm]\nweights = 'merged'",
        "method = 'full' has no adapter: vllm.weights = 'merged' has no effect",
    ),
    "ahead without a correction": ("[rollout]\nsampler = 'vllm'\n[vllm]\nstaleness = 1", "set loss.sampler_correction"),
    "recording ahead": (
        "[rollout]\nsampler = 'vllm'\nrecord_path = 'x'\n[vllm]\nstaleness = 1\n[loss]\nsampler_correction = 'sequence_mask'",
        "rollout.record_path records what is sampled and trained on in the same step",
    ),
    "path without replay": ("[rollout]\nreplay_path = 'x'", "rollout.sampler = 'replay' and rollout.replay_path go together"),
    "correction of the trainer itself": (
        "[loss]\nsampler_correction = 'token_mask'",
        "sampler_correction = 'token_mask' corrects for a sampler that is not the trainer, and rollout.sampler = 'torch' is",
    ),
    "crossed bounds": ("[loss]\nsampler_correction_min = 4.0", "sampler_correction_min = 4.0 is above loss.sampler_correction_max = 3.0"),
    "vespo's own weight": (
        "[rollout]\nsampler = 'replay'\nreplay_path = 'x'\n[loss]\nloss_type = 'vespo'\nsampler_correction = 'sequence_mask'",
        "loss_type = 'vespo' makes a weight per sequence from ratios per token: loss.sampler_correction = 'sequence_mask'",
    ),
    "two losses": (
        "[loss]\nfunction = 'mine.py:loss'\nepsilon = 0.1",
        "loss.function = 'mine.py:loss' is the whole loss: of .loss. only beta, ",
    ),
    "nucleus of everything": ("[loss]\nrenormalize_top_p = true", "renormalize_top_p = true does nothing with rollout.top_p = 1"),
    "endless task": ("[data]\ntrain_size = 0", r"data.train_size = 0 \(all\) is impossible"),
    "too few samples": ("[eval]\npass_at_k = [1, 16]", "eval.num_samples = 8 is below the largest eval.pass_at_k = 16"),
    "full with ranks": ("method = 'full'\n[lora.rank_pattern]\nq_proj = 3", "method = 'full' trains every weight"),
    "full with a mask": ("method = 'full'\n[lora]\nb_mask = 'm.safetensors'", "method = 'full' trains every weight"),
    "full in 4 bits": ("method = 'full'\n[model]\nquantization = 'nf4'", "4-bit weights cannot be trained"),
    "bounds of a reallocation that is never": ("[reallocation]\nr_max = 8", "reallocation.every = 0, which is never"),
    "reallocation after the end": ("[reallocation]\nevery = 40", "every = 40 of trainer.steps = 40: no step would follow"),
    "crossed ranks": ("[reallocation]\nevery = 1\nr_min = 9\nr_max = 8", "reallocation.r_min = 9 is above reallocation.r_max = 8"),
    "full with reallocation": ("method = 'full'\n[reallocation]\nevery = 1", "method = 'full' has no ranks"),
    "reallocation under a mask": ("[reallocation]\nevery = 1\n[lora]\nb_mask = 'm.safetensors'", "shrinking mixes the columns of B"),
    "reallocation of a frozen A": ("[reallocation]\nevery = 1\n[lora]\nfreeze_a = true", "a frozen A stays as it was drawn"),
    "full with rank components": ("method = 'full'\n[log]\nrank_components = true", "method = 'full' has no rank components"),
    "alarms without a policy": ("objective = 'sft'\n[alarms.entropy]\nthreshold = 0.1", r"\[alarms\] watches the policy"),
    "mismatch with oneself": ("[alarms.mismatch]\nthreshold = 0.1", "alarms.mismatch watches a sampler that is not the trainer"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_combinations(tmp_path: Path, case: str) -> None:
    text, message = IMPOSSIBLE[case]
    with pytest.raises(ConfigError, match=rf"run.toml: config: .*{message}"):
        load_config(_file(tmp_path, text))


def test_every_impossibility_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each message of `_impossibilities` is provoked by one of the cases above, alone."""
    import tomllib

    import fastlora.config as module

    monkeypatch.setattr(module, "_impossibilities", lambda c: [])
    provoked = {}
    for case, (text, _) in IMPOSSIBLE.items():
        messages = _impossibilities(RunConfig.model_validate(tomllib.loads(text)))
        assert len(messages) == 1, case
        provoked[re.sub(r"\d+", "#", messages[0])] = case
    source = Path(module.__file__).read_text()
    body = source[source.index("    checks = [") : source.index("    return [message for bad")]
    assert len(re.findall(r"^        \(", body, re.M)) == len({m.replace(" × num_generations", "") for m in provoked})


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            assert field.annotation.__doc__
            yield from _fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def test_help_lists_every_field_with_its_description(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_config(None, ["--help"])
    assert caught.value.code == 0
    shown = "".join(capsys.readouterr().out)
    text = re.sub(r"[│\s]+", "", shown)
    for name, field in _fields(RunConfig):
        assert f"--{name.replace('_', '-')}" in shown, name
        assert field.description, f"{name} has no docstring"
        assert re.sub(r"\s+", "", field.description)[:40] in text, name


def test_sections_are_frozen() -> None:
    config = RunConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.optim.lr = 1.0
    assert not dataclasses.is_dataclass(config)


def test_optimizer_steps() -> None:
    trainer = {"steps": 10, "gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 3}
    assert RunConfig(trainer=trainer).optimizer_steps == 10 * 4 * 3 // 2
    assert RunConfig(trainer={"steps": 10, "gradient_accumulation_steps": 4}).steps_per_generation == 4


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("configs/*.toml")), ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path: Path) -> None:
    assert load_config(path).optimizer_steps > 0
