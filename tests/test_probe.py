"""Layer scores against autograd with every weight unfrozen, on plain logits in fp64; what is refused; that the model stays as it was."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

import fastlora.probe
from fastlora.attention import ATTENTION
from fastlora.config import RunConfig, load_config
from fastlora.data import batch_indices
from fastlora.fused_layers import fuse_layers
from fastlora.model import BaseModel, weights_hash, wrap_model
from fastlora.objectives import PolicyObjective, StepData
from fastlora.probe import ProbeError, gradient_norms, layer_parameters, probe, read_probe, run_probe, with_target
from fastlora.types import Example, TrainBatch
from tests.exact import make_exact_model, score_one_by_one
from tests.tiny import make_tiny_model, make_tiny_tokenizer
from tests.tolerances import FP64_EXACT
from tests.trainer.runs import write_config

FAMILIES = {"llama": {}, "qwen2": {}, "qwen3": {"num_hidden_layers": 3}}
"""Untied head; tied head and biases; norms on q and k, three layers."""

Scores = tuple[Mapping[int, float], Mapping[str, float]]
"""(layers, modules)."""


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return load_config(write_config(tmp_path))


def exact_model(family: str, **overrides: Any) -> BaseModel:
    model = wrap_model(make_exact_model(family, **overrides), make_tiny_tokenizer(), "tiny")
    model.module.requires_grad_(False)
    fuse_layers(model.module)
    return model


def use_model(monkeypatch: pytest.MonkeyPatch, model: BaseModel) -> None:
    """`probe` loads this model instead of the config's."""
    monkeypatch.setattr(fastlora.probe, "prepared_model", lambda config: model)
    monkeypatch.setattr(fastlora.probe, "meta_model", lambda config: model.module)


def naive_scores(family: str, losses: list[Callable[[PreTrainedModel], Tensor]], **overrides: Any) -> Scores:
    """Σ over batches Σ over parameters of the norm, of a plain model of which everything is unfrozen."""
    layers: dict[int, float] = defaultdict(float)
    modules: dict[str, float] = defaultdict(float)
    for loss in losses:
        plain = make_exact_model(family, **overrides).requires_grad_(True)
        loss(plain).backward()
        for name, parameter in plain.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["model", "layers"]:
                assert parameter.grad is not None
                norm = float(parameter.grad.square().sum().sqrt())
                layers[int(parts[2])] += norm
                modules[".".join(parts[:-1])] += norm
    return layers, modules


def cross_entropy_of(prompts: list[str], completions: list[str]) -> Callable[[PreTrainedModel], Tensor]:
    """Token mean over completions and their eos, each sequence alone through transformers' own attention."""
    tokenizer = make_tiny_tokenizer()

    def loss(plain: PreTrainedModel) -> Tensor:
        plain.set_attn_implementation("sdpa")
        terms, count = [], 0
        for prompt, completion in zip(prompts, completions, strict=True):
            first = tokenizer(prompt, add_special_tokens=False).input_ids
            target = [*tokenizer(completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            logits = plain(torch.tensor([first + target]), use_cache=False).logits[0, len(first) - 1 : -1]
            terms.append(F.cross_entropy(logits, torch.tensor(target), reduction="sum"))
            count += len(target)
        return torch.stack(terms).sum() / count

    return loss


def assert_equal(found: Scores, expected: Scores) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(ours[key] == pytest.approx(theirs[key], rel=FP64_EXACT) for key in theirs)


@pytest.mark.parametrize("layers_at_once", [1, 2, 7])
@pytest.mark.parametrize("family", FAMILIES)
def test_sft_scores_are_the_naive_ones(monkeypatch: pytest.MonkeyPatch, config: RunConfig, family: str, layers_at_once: int) -> None:
    """Two rows a batch, three batches; modules add up to layers; nothing of the model has changed."""
    model = exact_model(family, **FAMILIES[family])
    use_model(monkeypatch, model)
    before, said = weights_hash(model.module), []
    found = probe(config, batches=3, batch_size=2, seed=5, layers_at_once=layers_at_once, say=said.append)

    examples = fastlora.probe.training_examples(fastlora.probe.probe_config(config, 3, 2, 5, 1, "sft"), model)
    chosen = [[examples[row] for row in batch_indices(step, 2, len(examples), 5)] for step in range(3)]
    losses = [cross_entropy_of([e.prompt for e in rows], [e.answer for e in rows]) for rows in chosen]
    assert_equal((found.layers, found.modules), naive_scores(family, losses, **FAMILIES[family]))
    for layer, score in found.layers.items():
        own = [value for name, value in found.modules.items() if name.startswith(f"model.layers.{layer}.")]
        assert score == pytest.approx(math.fsum(own), rel=FP64_EXACT)
        assert score == pytest.approx(math.fsum(found.layers_by_batch[layer]), rel=FP64_EXACT)
    assert weights_hash(model.module) == before
    assert not any(p.requires_grad or p.grad is not None for p in model.module.parameters())
    assert (found.batches, found.batch_size, found.seed, found.batches_without_signal) == (3, 2, 5, 0)
    assert "expected peak memory" in said[0] and len(said) == 4


def test_the_same_scores_on_the_reference_path(monkeypatch: pytest.MonkeyPatch, config: RunConfig) -> None:
    """Padded batches through a model that nothing was fused in."""
    use_model(monkeypatch, exact_model("llama"))
    packed = probe(config, batches=2, batch_size=2, layers_at_once=1)
    padded = exact_model("llama")
    padded = BaseModel(make_exact_model("llama").requires_grad_(False), *(getattr(padded, name) for name in BaseModel.__slots__[1:]))
    padded.module.set_attn_implementation(ATTENTION)
    use_model(monkeypatch, padded)
    trainer = config.trainer.model_copy(update={"implementation": "reference"})
    other = probe(config.model_copy(update={"trainer": trainer}), batches=2, batch_size=2, layers_at_once=2)
    assert_equal((other.layers, other.modules), (packed.layers, packed.modules))


def test_grpo_scores_are_the_naive_ones(monkeypatch: pytest.MonkeyPatch, config: RunConfig) -> None:
    """The loss of the run on the completions that the probe sampled: −Σ A logp / N, on policy."""
    collected: list[TrainBatch] = []
    own = PolicyObjective.collect

    def collect(self: PolicyObjective, *args: Any) -> StepData:
        data = own(self, *args)
        collected.append(data.batch)
        return data

    monkeypatch.setattr(PolicyObjective, "collect", collect)
    use_model(monkeypatch, exact_model("llama"))
    found = probe(config, batches=3, batch_size=2, objective="grpo", layers_at_once=1)
    signal = [batch for batch in collected if bool(batch.advantages_nt.any())]
    assert len(collected) == 3 and len(signal) >= 1 and found.batches_without_signal == 3 - len(signal)

    def loss_of(batch: TrainBatch) -> Callable[[PreTrainedModel], Tensor]:
        def loss(plain: PreTrainedModel) -> Tensor:
            logp_nt, _ = score_one_by_one(plain, batch, config.rollout.temperature)
            return -(batch.advantages_nt.double() * logp_nt * batch.completion_mask_nt).sum() / batch.completion_mask_nt.sum()

        return loss

    assert_equal((found.layers, found.modules), naive_scores("llama", [loss_of(batch) for batch in signal]))


def test_no_more_than_so_many_layers_are_unfrozen() -> None:
    """And flags that were set before, here the head's, come back afterwards."""
    model = make_tiny_model("llama", num_hidden_layers=5).requires_grad_(False)
    model.lm_head.requires_grad_(True)
    unfrozen: list[list[int]] = []

    def loss() -> Tensor:
        training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        unfrozen.append([layer for layer, names in layer_parameters(model).items() if training.issuperset(names)])
        assert len(training) == sum(len(layer_parameters(model)[layer]) for layer in unfrozen[-1])
        return model(torch.arange(3, 9)[None], use_cache=False).logits.square().mean()

    norms = gradient_norms(model, loss, 2)
    assert unfrozen == [[0, 1], [2, 3], [4]]
    assert len(norms) == 5 * 9 and min(norms.values()) > 0
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == ["lm_head.weight"]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_task_writes_what_the_probe_found(config: RunConfig, tmp_path: Path) -> None:
    """From the model's files, in float32; read back as it was."""
    options = {"batches": 2, "layers_at_once": 1}
    run_probe(config, tmp_path, options, lambda message: None)
    found = read_probe(tmp_path / "probe.json")
    assert sorted(found.layers) == [0, 1] and found.model == config.model.name
    assert found.seed == 42 and found.batch_size == 1 and found.objective == "sft" and found.seconds > 0
    layer = sum(p.numel() for name, p in make_tiny_model("llama").named_parameters() if name.startswith("model.layers.0."))
    assert found.gradient_bytes == 4 * layer
    again = probe(config, **options)
    assert (found.layers, found.modules) == (again.layers, again.modules)
    with pytest.raises(ProbeError, match="layers is unknown; known are batches"):
        run_probe(config, tmp_path, {"layers": 3}, lambda message: None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": 0}, "batches = 0: it must be at least 1"),
        ({"layers_at_once": 0}, "layers_at_once = 0"),
        ({"batch_size": -1}, "batch_size = -1"),
        ({"objective": "dpo"}, "objective = 'dpo': 'sft' or 'grpo'"),
    ],
)
def test_arguments_that_cannot_be(config: RunConfig, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ProbeError, match=message):
        probe(config, **arguments)


def test_packed_weights_are_refused(config: RunConfig) -> None:
    quantized = config.model_copy(update={"model": config.model.model_copy(update={"quantization": "nf4"})})
    with pytest.raises(ProbeError, match="quantization = 'nf4': packed weights have no gradient"):
        probe(quantized)


def test_targets() -> None:
    """The completion; the gold answer where there is none; nothing to predict is an error that names the row."""
    assert with_target(Example(0, "p", "a", "c")).completion == "c"
    assert with_target(Example(0, "p", "a", "")).completion == "a"
    with pytest.raises(ProbeError, match=r"row 7 .* neither a completion nor an answer"):
        with_target(Example(7, "p", "", ""))


def test_rewards_without_a_spread_are_no_score(config: RunConfig, tmp_path: Path) -> None:
    path = tmp_path / "same.py"
    path.write_text("def same(texts, examples):\n    return [1.0] * len(texts)\n")
    reward = config.reward.model_copy(update={"functions": (f"{path}:same",)})
    with pytest.raises(ProbeError, match="zero in all 2 batches: every group's rewards were equal"):
        probe(config.model_copy(update={"reward": reward}), batches=2, objective="grpo")


def test_a_gradient_that_is_not_finite_is_named() -> None:
    model = make_tiny_model("llama")
    with pytest.raises(ProbeError, match=r"gradient of model.layers.0.self_attn.q_proj.weight is not finite"):
        gradient_norms(model, lambda: model(torch.arange(3, 9)[None], use_cache=False).logits.sum() * math.nan, 1)


def test_files_that_are_no_probe(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="no such file"):
        read_probe(tmp_path / "probe.json")
    (tmp_path / "probe.json").write_text('{"layers": {}}')
    with pytest.raises(ProbeError, match="is damaged"):
        read_probe(tmp_path / "probe.json")
