"""SHiRA as a peer: exactly k entries of W train and nothing else moves, PEFT reads its files back, steps by hand, the task, refusals."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
import trl
from safetensors.torch import load_file
from scipy.stats import binomtest
from torch import Tensor, nn

import fastlora.study.shira
from fastlora.build import training_examples
from fastlora.config import ConfigError, LossConfig, RunConfig, load_config
from fastlora.data import batch_indices
from fastlora.evaluate import Evaluation
from fastlora.model import BaseModel, load_base_model
from fastlora.rewards.deposits import deposit_at_end
from fastlora.rewards.registry import Rewards, load_rewards
from fastlora.study.config import load_study_config
from fastlora.study.peers import Peer, compare_peers, is_peer, peer_cells, peer_claim, peer_table
from fastlora.study.results import by_strategy
from fastlora.study.shira import OURS_ALONE, Trained, refuse_settings, require_libraries, train_shira
from fastlora.study.tasks import EVALUATION_FILE, load_task
from fastlora.types import Deposits, Example, Rollout
from tests.study.configs import HERE, write_study
from tests.study.test_results import make_cell
from tests.tolerances import FP32_SUMS
from tests.trainer.runs import write_config

PER_RANK = 2 * (128 + 96 + 128 + 160 + 160 + 160)
"""n + d of q, v, o, gate, up and down of the tiny Llama's two layers; its k_proj has rank 0 in the config, so no SHiRA either."""
SFT, GRPO = '"sft"', '"grpo"'


def configured(folder: Path, **changes: str) -> RunConfig:
    folder.mkdir(exist_ok=True)
    return load_config(write_config(folder, **{"trainer.steps": "3", **changes}))


def trained(config: RunConfig, k: int, folder: Path) -> tuple[Mapping[str, Tensor], BaseModel, Trained]:
    """(weights before, the model after, the record)."""
    model = load_base_model(config.model)
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    with load_rewards(config.reward) as rewards:
        record = train_shira(config, model, training_examples(config, model), rewards, k, folder)
    return before, model, record


def moved(before: Mapping[str, Tensor], model: BaseModel) -> dict[str, Tensor]:
    """Weight -> bool, the entries that are not what they were; weights without any are left out."""
    after = model.module.state_dict()
    assert after.keys() == before.keys()
    places = {name: tensor != before[name] for name, tensor in after.items()}
    return {name: place for name, place in places.items() if place.any()}


@pytest.mark.parametrize("objective", [SFT, GRPO])
@pytest.mark.parametrize(("k", "r"), [(500, 1), (PER_RANK, 1), (PER_RANK + 1, 2)])
def test_exactly_k_entries_move_and_nothing_else(tmp_path: Path, objective: str, k: int, r: int) -> None:
    config = configured(tmp_path, objective=objective)
    before, model, record = trained(config, k, tmp_path / "cell")
    places = moved(before, model)
    assert sum(int(place.sum()) for place in places.values()) == record.entries == k
    assert {name.split(".")[-2] for name in places} == {"q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert (record.r, record.held, record.modules) == (r, r * PER_RANK, 12)


def test_places_are_the_seed_s_and_differ_between_modules_of_one_shape(tmp_path: Path) -> None:
    places = []
    for seed in ("0", "0", "1"):
        config = configured(tmp_path, objective=SFT, seed=seed, **{"trainer.steps": "1"})
        before, model, _ = trained(config, PER_RANK, tmp_path / "cell")
        places.append(moved(before, model))
    one, same, other = places
    assert all(torch.equal(one[name], same[name]) for name in one)
    q_first, q_second = (one[f"model.layers.{layer}.self_attn.q_proj.weight"] for layer in (0, 1))
    assert int(q_first.sum()) == int(q_second.sum()) == 128 and not torch.equal(q_first, q_second)
    assert not torch.equal(q_first, other["model.layers.0.self_attn.q_proj.weight"])


def adapter_entries(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight -> (int [2, held], float32 [held]) of PEFT's file."""
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    names = [name.removesuffix(".shira_weight") for name in tensors if name.endswith(".shira_weight")]
    assert len(tensors) == 2 * len(names)
    return {f"{n.removeprefix('base_model.model.')}.weight": (tensors[f"{n}.shira_indices"], tensors[f"{n}.shira_weight"]) for n in names}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peft_reads_its_files_back_to_the_weights_that_answered(tmp_path: Path, dtype: str) -> None:
    config = configured(tmp_path, **{"model.dtype": f'"{dtype}"'})
    before, model, _ = trained(config, 700, tmp_path / "cell")
    by_peft = peft.PeftModel.from_pretrained(load_base_model(config.model).module, tmp_path / "cell" / "adapter").merge_and_unload()
    after = model.module.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in by_peft.state_dict().items())
    for name, ((rows, columns), values) in adapter_entries(tmp_path / "cell").items():
        assert values.dtype == torch.float32
        by_hand = before[name].float().index_put((rows.long(), columns.long()), values, accumulate=True)
        assert torch.equal(by_hand.to(before[name].dtype), after[name]), name


class ByHand:
    """SFT of the entries θ of W in float64: logits, mean cross-entropy over a step's target tokens, clipping, AdamW, linear schedule."""

    def __init__(self, config: RunConfig, places: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self.config, self.places = config, places
        self.model = load_base_model(config.model)
        self.model.module.double()
        self.theta = {name: nn.Parameter(torch.zeros(len(rows), dtype=torch.float64)) for name, (rows, _) in places.items()}

    def nll(self, example: Example) -> tuple[Tensor, int]:
        tokenizer = self.model.tokenizer
        prompt = tokenizer(example.prompt, add_special_tokens=False).input_ids
        target = [*tokenizer(example.completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        base = dict(self.model.module.named_parameters())
        weights = {name: base[name].index_put(self.places[name], theta, accumulate=True) for name, theta in self.theta.items()}
        ids = torch.tensor([prompt + target])
        logits = torch.func.functional_call(self.model.module, weights, (), {"input_ids": ids}).logits[0, len(prompt) - 1 : -1]
        return F.cross_entropy(logits, torch.tensor(target), reduction="sum"), len(target)

    def train(self) -> dict[str, Tensor]:
        c, examples = self.config, training_examples(self.config, self.model)
        parameters = list(self.theta.values())
        optimizer = torch.optim.AdamW(parameters, c.optim.lr, c.optim.betas, c.optim.eps, c.optim.weight_decay)
        for step in range(c.trainer.steps):
            parts = [self.nll(examples[row]) for row in batch_indices(step, c.rollout.num_prompts, len(examples), c.seed)]
            loss = torch.stack([nll for nll, _ in parts]).sum() / sum(tokens for _, tokens in parts)
            optimizer.zero_grad()
            loss.backward()
            assert nn.utils.clip_grad_norm_(parameters, c.optim.max_grad_norm) > c.optim.max_grad_norm
            optimizer.param_groups[0]["lr"] = c.optim.lr * (1 - step / c.trainer.steps)
            optimizer.step()
        return {name: theta.detach() for name, theta in self.theta.items()}


def test_sft_steps_by_hand(tmp_path: Path) -> None:
    """eps as large as the gradient's entries: else a first step of AdamW is ± lr whatever the gradient."""
    settings = {"rollout.num_prompts": "4", "trainer.gradient_accumulation_steps": "2", "optim.schedule": '"linear"', "optim.eps": "1e-2"}
    config = configured(tmp_path, objective=SFT, **settings, **{"optim.weight_decay": "0.1", "optim.max_grad_norm": "0.05"})
    trained(config, 300, tmp_path / "cell")
    held = adapter_entries(tmp_path / "cell")
    trains = {name: values != 0 for name, (_, values) in held.items()}
    assert sum(int(one.sum()) for one in trains.values()) == 300
    places = {name: tuple(indices.long()[:, trains[name]]) for name, (indices, _) in held.items()}
    expected = ByHand(config, places).train()  # type: ignore[arg-type]
    largest = max(float(theta.abs().max()) for theta in expected.values())
    for name, theta in expected.items():
        torch.testing.assert_close(held[name][1][trains[name]].double(), theta, rtol=0, atol=FP32_SUMS * largest)


class Seen:
    """A reward that gives 1 to texts with an even number of characters, and keeps what it was asked."""

    name, timeouts = "seen", 0

    def __init__(self) -> None:
        self.rollouts: list[Rollout] = []

    def __call__(self, rollout: Rollout) -> Deposits:
        self.rollouts.append(rollout)
        return deposit_at_end([float(len(text) % 2 == 0) for text in rollout.texts], rollout)

    def check(self, examples: Any) -> None: ...

    def close(self) -> None: ...


def test_trl_samples_and_rewards_the_problems_of_our_steps(tmp_path: Path) -> None:
    config = configured(tmp_path, **{"rollout.num_prompts": "6", "trainer.gradient_accumulation_steps": "3", "loss.beta": "0.04"})
    model, seen = load_base_model(config.model), Seen()
    examples = training_examples(config, model)
    train_shira(config, model, examples, Rewards([seen]), 400, tmp_path / "cell")
    asked = [tuple(example.index for example in rollout.examples) for rollout in seen.rollouts]
    assert asked == [batch_indices(step, 6, len(examples), config.seed) for step in range(3)]
    for rollout in seen.rollouts:
        assert len(rollout.texts) == 6 * 4
        ids = [row[mask].tolist() for row, mask in zip(rollout.completion_ids_nt, rollout.completion_mask_nt, strict=True)]
        assert rollout.texts == tuple(model.tokenizer.batch_decode(ids, skip_special_tokens=True))
        assert rollout.finished_n.tolist() == [row[-1] in model.eos_ids for row in ids]


def test_settings_of_the_loss_are_trl_s() -> None:
    """By name and by default, but for those that are said to be ours alone."""
    theirs = {field.name: field.default for field in dataclasses.fields(trl.GRPOConfig)}
    ours = LossConfig().model_dump()
    assert ours.keys() >= OURS_ALONE and not OURS_ALONE & theirs.keys()
    assert {name: theirs[name] for name in ours.keys() - OURS_ALONE} == {name: ours[name] for name in ours.keys() - OURS_ALONE}


class Recorded(Exception):
    """Leaves the construction of a trainer, its arguments in hand."""


def test_trl_is_given_the_run_s_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def record(**arguments: Any) -> None:
        given.update(arguments)
        raise Recorded

    monkeypatch.setattr(trl, "GRPOTrainer", record)
    settings = {
        "rollout.num_prompts": "6",
        "rollout.temperature": "0.7",
        "rollout.top_p": "0.9",
        "trainer.steps": "5",
        "trainer.gradient_accumulation_steps": "3",
        "trainer.steps_per_generation": "6",
        "trainer.num_iterations": "2",
        "loss.loss_type": '"bnpo"',
        "loss.beta": "0.04",
        "loss.epsilon_high": "0.3",
        "advantage.scale_rewards": '"batch"',
        "optim.lr": "3e-3",
        "optim.schedule": '"cosine"',
        "optim.warmup_steps": "2",
        "optim.betas": "[0.8, 0.95]",
        "optim.max_grad_norm": "0.2",
        "reward.weights": "[0.5]",
        "seed": "7",
    }
    with pytest.raises(Recorded):
        trained(configured(tmp_path, **settings), 400, tmp_path / "cell")
    expected = {
        "temperature": 0.7,
        "top_p": 0.9,
        "num_generations": 4,
        "max_completion_length": 5,
        "num_iterations": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 3,
        "steps_per_generation": 6,
        "max_steps": 20,
        "loss_type": "bnpo",
        "beta": 0.04,
        "epsilon": 0.2,
        "epsilon_high": 0.3,
        "scale_rewards": "batch",
        "reward_weights": [0.5],
        "learning_rate": 3e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "max_grad_norm": 0.2,
        "weight_decay": 0.0,
        "seed": 7,
        "bf16": False,
        "shuffle_dataset": False,
    }
    assert {name: getattr(given["args"], name) for name in expected} == expected


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["sft", "grpo"])
@pytest.mark.usefixtures("packaged_model")
def test_the_task_on_the_real_model(tmp_path: Path, objective: str) -> None:
    changes = {"trainer.steps": "2", "rollout.num-prompts": "4", "rollout.num-generations": "4", "rollout.max-completion-length": "4"}
    changes |= {"eval.num-problems": "8", "optim.lr": "1e-3", "objective": objective}
    overrides = [text for key, value in changes.items() for text in (f"--{key}", value)]
    config = load_config(HERE.parents[1] / "configs" / "smollm2_sums_cpu.toml", overrides)
    said: list[str] = []
    load_task("shira")(config, tmp_path, {"entries": 4096}, said.append)
    record, evaluation = Trained.read(tmp_path), Evaluation.read(tmp_path / EVALUATION_FILE)
    assert (record.entries, record.held, record.r, record.modules) == (4096, 305_280, 1, 210)
    assert record.seconds > 0 and len(evaluation.answers) == 8 and said[0].startswith("4,096 entries of 210 modules")
    assert sum(int((values != 0).sum()) for _, values in adapter_entries(tmp_path).values()) == 4096
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "SHIRA"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "full", "lora": {"rank_pattern": {}}}, "method = 'full'"),
        ({"model": {"quantization": "nf4"}}, "model.quantization = 'nf4'"),
        ({"lora": {"init_from": "x"}}, "lora.init_from"),
        ({"objective": "sft", "trainer": {"steps_per_generation": 2}}, "trainer.steps_per_generation, since SFTTrainer"),
        ({"rollout": {"num_generations": 1}, "advantage": {"scale_rewards": "none"}}, "num_generations = 1"),
        ({"rollout": {"sampler": "vllm"}}, "rollout.sampler = 'vllm'"),
        ({"rollout": {"stop": ["."]}}, "rollout.stop"),
        ({"reward": {"functions": ["process"], "grader": "outcome"}, "advantage": {"estimator": "deposits"}}, "run a language model"),
        ({"advantage": {"estimator": "deposits"}}, "advantage.estimator = 'deposits'"),
        ({"advantage": {"eps": 1e-8}}, "advantage.eps = 1e-08: TRL's is 0.0001"),
        ({"loss": {"function": "x.py:f"}}, "loss.function; choose"),
        ({"loss": {"beta": 0.1, "kl_estimator": "k1"}}, "loss.kl_estimator = 'k1'"),
        ({"loss": {"renormalize_top_p": True}, "rollout": {"top_p": 0.9}}, "loss.renormalize_top_p"),
    ],
)
def test_what_trl_cannot_follow_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"'shira' cannot follow .*{message}.*, or leave 'shira' out"):
        refuse_settings(RunConfig.model_validate(changes))
    refuse_settings(RunConfig())


def test_more_entries_than_peft_holds_are_refused_by_name(tmp_path: Path) -> None:
    config = configured(tmp_path, objective=SFT, **{"trainer.steps": "1"})
    most = 21 * PER_RANK  # v_proj is 64 x 32: 21 · 96 of 2,048 entries
    with pytest.raises(ConfigError, match=f"placement.k = {most + 1:,} is more than PEFT's SHiRA holds: r = 21 .* {most:,} entries"):
        trained(config, most + 1, tmp_path / "cell")
    assert trained(config, most, tmp_path / "cell")[2].entries == most


def test_prompts_that_trl_would_tokenise_otherwise_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastlora.study.shira, "encode", lambda tokenizer, prompts: [[1]] * len(prompts))
    with pytest.raises(ConfigError, match="TRL would put the special tokens"):
        trained(configured(tmp_path), 400, tmp_path / "cell")


def test_the_task_s_options_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="options of task 'shira': k; it takes entries"):
        load_task("shira")(RunConfig(), tmp_path, {"k": 3}, print)


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    require_libraries()
    monkeypatch.setattr(fastlora.study.shira, "find_spec", lambda name: None if name == "trl" else name)
    with pytest.raises(ConfigError, match="and trl is not installed: install fastlora's extra `study`"):
        require_libraries()


def placement(folder: Path, section: str) -> Any:
    base = (HERE.parents[1] / "configs" / "smollm2_sums_cpu.toml").read_text()
    return load_study_config(write_study(folder, f"seeds = [0, 1]\n[placement]\n{section}", study="placement", base=base))


def test_a_study_s_cells(tmp_path: Path) -> None:
    assert peer_cells(placement(tmp_path, "")) == []
    cells = peer_cells(placement(tmp_path, 'peers = ["shira"]\nk = [7, 9]\nshira_lr = 0.02'))
    names = [f"shira-{k}-{objective}/seed-{seed}" for objective in ("grpo", "sft") for k in (7, 9) for seed in (0, 1)]
    assert [cell.name for cell in cells] == names and all(map(is_peer, names)) and len({cell.key for cell in cells}) == 8
    assert {(cell.task, cell.config.optim.lr) for cell in cells} == {("shira", 0.02)}
    found = [(cell.options["entries"], cell.config.seed, cell.config.objective) for cell in cells[:3]]
    assert found == [(7, 0, "grpo"), (7, 1, "grpo"), (9, 0, "grpo")]
    assert not is_peer("shira-global-7-grpo/seed-0") and not is_peer("lora-grpo/seed-0")
    with pytest.raises(ConfigError, match="is more than PEFT's SHiRA holds: r = 144 of 210 modules are 43,960,320"):
        peer_cells(placement(tmp_path, 'peers = ["shira"]\nk = [43_960_321]'))
    with pytest.raises(ConfigError, match="shira_lr is set, but peers does not name 'shira'"):
        placement(tmp_path, "shira_lr = 0.02")


def test_comparisons_are_those_of_the_raw_answers(tmp_path: Path) -> None:
    folders = {f"random-global-7-sft/seed-{seed}": make_cell(tmp_path / str(seed), seed=seed) for seed in (0, 1)}
    cells = by_strategy(folders)
    mask = cells["random-global-7-sft"]
    rng = np.random.default_rng(5)
    peers = {"shira-7-sft": {}}
    for seed, cell in mask.items():
        answers = tuple(dataclasses.replace(answer, correct=bool(rng.random() < 0.4)) for answer in cell.run.eval_after)
        peers["shira-7-sft"][seed] = Peer(Evaluation(answers), Trained(7, 1664, 1, 12, 3.0, 10))
    found = compare_peers(peers, cells, [("shira-7-sft", "random-global-7-sft")])
    table = peer_table(peers, found)
    for row, (seed, cell) in zip(table.rows, mask.items(), strict=True):
        values = dict(zip(table.columns, row, strict=True))
        theirs, ours = np.array(peers["shira-7-sft"][seed].evaluation.correct), np.array(cell.correct)
        gained, lost = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
        assert (values["seed"], values["entries that train"], values["items"]) == (seed, 7, 64)
        assert values["accuracy"] == theirs.mean()
        assert values["mask less peer"] == pytest.approx((gained - lost) / 64)
        assert values["McNemar's p"] == pytest.approx(binomtest(gained, gained + lost).pvalue)
        assert values["gap low"] < values["mask less peer"] < values["gap high"]
    claim = peer_claim(found[0], placement(tmp_path, "").thresholds)
    assert claim.kind == "accuracy" and claim.verdict == "undecided" and "only 64 items of 1,000 and 2 seeds of 3" in claim.measured
