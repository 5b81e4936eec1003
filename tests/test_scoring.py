"""Sums of dB over batches against autograd through a plain model with the adapter written out in fp64; masked runs; the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import fastlora.build
import fastlora.scoring
from fastlora.config import RunConfig, load_config
from fastlora.data import batch_indices
from fastlora.fused_layers import fuse_layers
from fastlora.gradient_structure import structure_of
from fastlora.lora.groups import projections, shapes
from fastlora.lora.packed import attach
from fastlora.lora.patterns import resolve
from fastlora.loss_config import LossConfig
from fastlora.losses.policy import policy_loss
from fastlora.model import BaseModel, weights_hash, wrap_model
from fastlora.objectives import PolicyObjective, StepData
from fastlora.optim import AdamW, StepResult
from fastlora.scoring import (
    LEAST_BATCHES,
    SUMS,
    EntryScores,
    ScoringError,
    is_linear_in_advantages,
    read_sums,
    run_score,
    score_entries,
    scoring_config,
    with_advantages_only,
)
from fastlora.types import TrainBatch
from tests.batches import make_batch
from tests.exact import make_exact_model, score_one_by_one
from tests.tiny import make_tiny_tokenizer
from tests.tolerances import FP32_SUMS, FP64_EXACT
from tests.trainer.runs import adapter_tensors, run, write_config

BATCHES = LEAST_BATCHES


def configured(tmp_path: Path, **changes: str) -> RunConfig:
    return load_config(write_config(tmp_path, **changes))


def changed(config: RunConfig, section: str, **fields: Any) -> RunConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=fields)})


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> BaseModel:
    """`build` takes this fp64 model instead of the config's."""
    model = wrap_model(make_exact_model("llama"), make_tiny_tokenizer(), "tiny")
    model.module.requires_grad_(False)
    fuse_layers(model.module)
    monkeypatch.setattr(fastlora.build, "prepared_model", lambda config: model)
    return model


class PlainLora(nn.Module):
    """x Wᵀ + s (x Aᵀ) Bᵀ, B = 0 and trained."""

    def __init__(self, base: nn.Linear, a_rd: Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.a_rd, self.scale = base, a_rd.double(), scale
        self.b_nr = nn.Parameter(torch.zeros(base.out_features, len(a_rd), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * (x @ self.a_rd.t()) @ self.b_nr.t()


def plain_gradients(config: RunConfig, losses: list[Callable[[PreTrainedModel], Tensor]]) -> dict[str, Tensor]:
    """Module -> dB [batches, n, r] under the A that the config's seed gives."""
    model, twin = make_exact_model("llama").requires_grad_(False), make_exact_model("llama")
    adapter = attach(twin, resolve(shapes(projections(twin)), config.lora), seed=config.seed, freeze_a=True, cast_to_input=True)
    layers = {}
    for name, slot in adapter.slots.items():
        layers[name] = PlainLora(model.get_submodule(name), adapter.a_rd(name), slot.scale)
        model.set_submodule(name, layers[name])
    gradients: dict[str, list[Tensor]] = {name: [] for name in layers}
    for loss in losses:
        model.zero_grad()
        loss(model).backward()
        for name, layer in layers.items():
            assert layer.b_nr.grad is not None
            gradients[name].append(layer.b_nr.grad.clone())
    return {name: torch.stack(values) for name, values in gradients.items()}


def sums_of(gradients_bnr: Tensor) -> Tensor:
    g = gradients_bnr
    return torch.stack([g.sum(0), g.sign().sum(0), g.abs().sum(0), g.square().sum(0)])


def assert_sums(found: EntryScores, gradients: dict[str, Tensor]) -> None:
    """Signs may differ where a gradient is rounding noise: not one in these models is."""
    assert found.sums.keys() == gradients.keys()
    for name, gradients_bnr in gradients.items():
        ours, theirs = found.sums[name], sums_of(gradients_bnr)
        assert ours.shape == theirs.shape and ours.dtype == torch.float32
        for row, what in enumerate(SUMS):
            error = float((ours[row] - theirs[row]).abs().max() / theirs[row].abs().max())
            assert error < (FP32_SUMS if what != "sign g" else 1e-9), (name, what, error)


def assert_structure(found: EntryScores, gradients: dict[str, Tensor]) -> None:
    for name, structure in [("", found.structure), *found.structure_by_projection.items()]:
        flat = torch.cat([g.flatten(1) for module, g in gradients.items() if module.endswith(name)], dim=1)
        expected = structure_of(flat @ flat.t())
        assert structure.consecutive_cosines == pytest.approx(expected.consecutive_cosines, abs=FP32_SUMS)
        assert structure.stable_rank == pytest.approx(expected.stable_rank, rel=FP32_SUMS)
        assert structure.effective_rank == pytest.approx(expected.effective_rank, rel=10 * FP32_SUMS)


def test_sft_sums(exact: BaseModel, tmp_path: Path) -> None:
    """Two micro-batches a batch: the batch's whole gradient is what is summed. Base and config's own adapter settings as they were."""
    config = configured(tmp_path, objective='"sft"', **{"trainer.gradient_accumulation_steps": "2"})
    before, said = weights_hash(exact.module), []
    found = score_entries(config, say=said.append)
    examples = fastlora.build.training_examples(config, exact)
    tokenizer = exact.tokenizer

    def loss_of(step: int) -> Callable[[PreTrainedModel], Tensor]:
        rows = [examples[row] for row in batch_indices(step, 2, len(examples), config.seed)]

        def loss(plain: PreTrainedModel) -> Tensor:
            plain.set_attn_implementation("sdpa")
            terms, count = [], 0
            for example in rows:
                prompt = tokenizer(example.prompt, add_special_tokens=False).input_ids
                target = [*tokenizer(example.completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
                logits = plain(torch.tensor([prompt + target]), use_cache=False).logits[0, len(prompt) - 1 : -1]
                terms.append(F.cross_entropy(logits, torch.tensor(target), reduction="sum"))
                count += len(target)
            return torch.stack(terms).sum() / count

        return loss

    gradients = plain_gradients(config, [loss_of(step) for step in range(BATCHES)])
    assert_sums(found, gradients)
    assert_structure(found, gradients)
    assert (found.batches, found.batches_without_signal, found.objective, found.a_seed) == (BATCHES, 0, "sft", 0)
    assert weights_hash(exact.module) == before and len(said) == BATCHES and found.exact


def test_grpo_sums(exact: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the completions that were sampled; batches without a spread are counted and do not count."""
    collected: list[TrainBatch] = []
    own = PolicyObjective.collect

    def collect(self: PolicyObjective, *args: Any) -> StepData:
        data = own(self, *args)
        collected.append(data.batch)
        return data

    monkeypatch.setattr(PolicyObjective, "collect", collect)
    config = configured(tmp_path, **{"rollout.num_generations": "2", "rollout.max_completion_length": "2"})
    found = score_entries(config)
    signal = [batch for batch in collected if bool(batch.advantages_nt.any())]
    assert len(signal) == found.batches == BATCHES and found.batches_without_signal == len(collected) - BATCHES > 0

    def loss_of(batch: TrainBatch) -> Callable[[PreTrainedModel], Tensor]:
        def loss(plain: PreTrainedModel) -> Tensor:
            logp_nt, _ = score_one_by_one(plain, batch, config.rollout.temperature)
            return -(batch.advantages_nt.double() * logp_nt * batch.completion_mask_nt).sum() / batch.completion_mask_nt.sum()

        return loss

    gradients = plain_gradients(config, [loss_of(batch) for batch in signal])
    assert_sums(found, gradients)
    assert_structure(found, gradients)


@pytest.mark.parametrize(
    ("loss", "linear"),
    [
        ({"loss_type": "dapo"}, True),
        ({"loss_type": "grpo"}, True),
        ({"loss_type": "dr_grpo"}, True),
        ({"loss_type": "cispo"}, True),
        ({"loss_type": "bnpo"}, False),
        ({"loss_type": "dapo", "entropy_coef": 0.1}, False),
        ({"loss_type": "dapo", "beta": 0.1}, False),
        ({"loss_type": "dapo", "top_entropy_quantile": 0.5}, False),
    ],
    ids=str,
)
def test_samples_without_an_advantage_may_be_left_out(loss: dict[str, Any], linear: bool) -> None:
    """By dloss/dlogp in fp64, of all losses that say so; bnpo, which does not, counts tokens. Five of seven samples are left out."""
    config = LossConfig(**loss)
    assert is_linear_in_advantages(config) is linear
    batch = make_batch()
    advantages_n1 = batch.advantages_nt * (torch.arange(len(batch)) % 3 == 1)[:, None]
    batch = replace(batch, advantages_nt=advantages_n1, ref_logp_nt=torch.zeros(batch.completion_ids_nt.shape, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    logp_nt = -torch.rand(batch.completion_ids_nt.shape, generator=generator, dtype=torch.float64).requires_grad_()

    def gradient(of: TrainBatch) -> Tensor:
        split = {"accumulation_steps": 1, "steps_per_generation": 1, "max_completion_length": 11}
        value, _ = policy_loss(logp_nt, -logp_nt.detach(), of, config, entropy_coef=config.entropy_coef, **split)
        return torch.autograd.grad(value, logp_nt)[0]

    some = with_advantages_only(batch)
    assert int(some.loss_mask_nt.any(1).sum()) == 2 and torch.equal(some.loss_mask_nt, some.completion_mask_nt)
    left_out = float((gradient(some) - gradient(batch)).abs().max() / gradient(batch).abs().max())
    if linear:
        assert left_out < FP64_EXACT
    elif config.loss_type == "bnpo":
        assert left_out > 1e-3


def test_the_task_writes_two_files(tmp_path: Path) -> None:
    config = configured(tmp_path, **{"lora.init_seed": "7"})
    run_score(config, tmp_path, {"batches": BATCHES + 1}, lambda message: None)
    sums, metadata = read_sums(tmp_path / "scores.safetensors")
    again = score_entries(config, BATCHES + 1)
    assert sums.keys() == again.sums.keys() and all(torch.equal(sums[name], again.sums[name]) for name in sums)
    assert sums["model.layers.0.self_attn.q_proj"].shape == (4, 64, 3) and "model.layers.0.self_attn.k_proj" not in sums
    assert (metadata["batches"], metadata["objective"], metadata["a_seed"]) == (str(BATCHES + 1), "grpo", "7")
    assert set(json.loads(metadata["seconds"])) == {"sampling", "reward", "update", "other"}
    structure = json.loads((tmp_path / "structure.json").read_text())
    assert len(structure["whole"]["consecutive_cosines"]) == BATCHES and 1 <= structure["whole"]["effective_rank"] <= BATCHES + 1
    assert set(structure["projections"]) == {"q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert structure["seconds"]["sampling"] > 0 and structure["batches"] == BATCHES + 1
    with pytest.raises(ScoringError, match="seed is unknown; known are batches"):
        run_score(config, tmp_path, {"seed": 3}, lambda message: None)


def test_what_contradicts_a_fresh_adapter_is_refused(tmp_path: Path) -> None:
    config = configured(tmp_path)
    with pytest.raises(ScoringError, match="batches = 15: signs of fewer than 16"):
        score_entries(config, 15)
    for section, message in (
        ({"lora": {"b_mask": tmp_path / "m"}}, r"lora\.b_mask is set"),
        ({"lora": {"init_from": tmp_path}}, r"lora\.init_from is set"),
        ({"method": "full", "lora": {"rank_pattern": {}}}, "method is set"),
    ):
        settings = config.model_dump()
        settings |= {"lora": settings["lora"] | section.pop("lora"), **section}
        with pytest.raises(ScoringError, match=message):
            scoring_config(RunConfig.model_validate(settings), BATCHES)


def test_no_signal_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastlora.scoring, "MOST_SILENT", 1)
    path = tmp_path / "same.py"
    path.write_text("def same(texts, examples):\n    return [1.0] * len(texts)\n")
    config = changed(configured(tmp_path), "reward", functions=(f"{path}:same",))
    with pytest.raises(ScoringError, match="only 0 of 16 batches had a gradient, 16 are needed"):
        score_entries(config)


def test_files_that_are_no_scores(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    with pytest.raises(ScoringError, match="no such file"):
        read_sums(path)
    path.write_bytes(b"no scores")
    with pytest.raises(ScoringError, match="is damaged"):
        read_sums(path)
    save_file({"q_proj": torch.zeros(3, 2)}, path)
    with pytest.raises(ScoringError, match="not a module's sums"):
        read_sums(path)


def save_mask(folder: Path, scores: EntryScores, share: float) -> dict[str, Tensor]:
    """A random `share` of every B but one module's, which gets none."""
    generator = torch.Generator().manual_seed(3)
    masks = {name: torch.rand(sums.shape[1:], generator=generator) < share for name, sums in scores.sums.items()}
    masks["model.layers.1.mlp.up_proj"].zero_()
    save_file(masks, folder / "mask.safetensors")
    return masks


def test_a_masked_run_moves_the_chosen_entries_alone(tmp_path: Path) -> None:
    """A as drawn, B exactly 0 outside the mask and moved inside it; optimizer state for k entries; an ordinary adapter file."""
    plain = configured(tmp_path)
    masks = save_mask(tmp_path, score_entries(plain), 0.1)
    mask_line = {"lora.freeze_a": "true", "lora.b_mask": f'"{tmp_path / "mask.safetensors"}"'}
    assert run(write_config(tmp_path, **mask_line), "--name", "masked") == 0
    tensors = adapter_tensors(tmp_path / "runs" / "masked")
    assert len(tensors) == 2 * len(masks)
    fresh = fastlora.build.build(scoring_config(plain, BATCHES), Console(quiet=True)).adapter
    assert fresh is not None
    for name, mask in masks.items():
        prefix = f"base_model.model.{name}"
        b_nr = tensors[f"{prefix}.lora_B.weight"]
        assert torch.equal(tensors[f"{prefix}.lora_A.weight"], fresh.a_rd(name))
        assert not b_nr[~mask].any() and bool(b_nr[mask].all())
    summary = json.loads((tmp_path / "runs" / "masked" / "summary.json").read_text())
    assert summary["trainable_parameters"] == sum(int(mask.sum()) for mask in masks.values())


def test_cosine_of_each_step_with_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what the optimizer was given, from the second step on. (That a resumed run logs the same: tests/trainer/test_run.py.)"""
    given: list[Tensor] = []
    step = AdamW.step

    def watched(self: AdamW, *args: Any, **options: Any) -> StepResult:
        given.append(self.flat.grad.double().clone())
        return step(self, *args, **options)

    monkeypatch.setattr(AdamW, "step", watched)
    assert run(write_config(tmp_path, objective='"sft"', **{"log.gradient_cosine": "true"}), "--name", "a") == 0
    rows = [json.loads(line) for line in (tmp_path / "runs" / "a" / "metrics.jsonl").read_text().splitlines()]
    expected = [float(F.cosine_similarity(a, b, dim=0)) for a, b in pairwise(given)]
    assert "gradient/cosine" not in rows[0]
    assert [row["gradient/cosine"] for row in rows[1:]] == pytest.approx(expected, abs=FP32_SUMS)
