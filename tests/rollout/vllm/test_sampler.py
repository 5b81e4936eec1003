"""Rollouts of a real engine against the trainer's own model and sampler."""

from __future__ import annotations

import dataclasses
import time

import psutil
import pytest
import torch

from fastlora.batches import policy_batch
from fastlora.lora.groups import projections, shapes
from fastlora.lora.patterns import ModuleSpec
from fastlora.policy import score
from fastlora.rollout.sampler import SamplerError
from fastlora.rollout.torch import TorchSampler
from fastlora.types import Rollout
from tests import tolerances
from tests.rollout.vllm.engines import EXAMPLES, PARAMS, KeptEngine, adapted, move, sampler_on, specs, tiny_model

MODEL = tiny_model()
SHAPES = shapes(projections(MODEL.module))


def only_some_layers() -> list[ModuleSpec]:
    """Layers 0 and 2 alone, and of layer 2 only one of q, k, v and one of gate, up."""
    kept = [spec for spec in specs(SHAPES, ranks=(4,)) if ".0." in spec.name or spec.name.endswith(("2.self_attn.k_proj", "2.mlp.up_proj"))]
    assert 0 < len(kept) < len(SHAPES)
    return kept


ADAPTERS = {
    "uneven, alpha/r": specs(SHAPES),
    "uneven, alpha/sqrt(r)": specs(SHAPES, "alpha/sqrt(r)"),
    "uneven, constant": [dataclasses.replace(s, scale=s.alpha / 8) for s in specs(SHAPES, "constant")],
    "some layers": only_some_layers(),
    "rank 1": specs(SHAPES, ranks=(1,)),
    "largest rank": specs(SHAPES, ranks=(32,)),
}


def trainer_logp(model, rollout: Rollout, temperature: float, top_p: float = 1.0) -> torch.Tensor:
    batch = policy_batch(rollout, torch.zeros(len(rollout.texts)), mask_truncated=False, sampler_is_trainer=False)
    with torch.no_grad():
        return score(model.module, batch, temperature, "auto", top_p)[0]


def gap(model, rollout: Rollout, temperature: float) -> float:
    assert bool(rollout.completion_mask_nt.any())
    return float((trainer_logp(model, rollout, temperature) - rollout.sampler_logp_nt).abs().max())


@pytest.mark.parametrize("case", ADAPTERS)
def test_log_probabilities_are_the_trainers(case: str, engine: KeptEngine) -> None:
    model = tiny_model()
    adapter = adapted(model, ADAPTERS[case])
    with sampler_on(engine, model, adapter) as sampler:
        rollout = sampler.sample(EXAMPLES, PARAMS, seed=3, adapter_version=1)
        assert rollout.adapter_version == 1
        assert gap(model, rollout, PARAMS.temperature) <= tolerances.SAMPLER_LOGP_FP32
        with adapter.disabled():  # the adapter matters: the base model's are elsewhere
            assert gap(model, rollout, PARAMS.temperature) > 100 * tolerances.SAMPLER_LOGP_FP32
        assert rollout.metrics["sampler/canary_undecided"] == 0


@pytest.mark.parametrize(("case", "strength"), [("B = 0", 0.0), ("no module has a rank", 1.0)])
def test_adapters_that_do_nothing(case: str, strength: float, engine: KeptEngine) -> None:
    model = tiny_model()
    module_specs = specs(SHAPES, ranks=(0,)) if case == "no module has a rank" else None
    adapter = adapted(model, module_specs, strength=strength)
    with sampler_on(engine, model, adapter) as sampler:
        rollout = sampler.sample(EXAMPLES, PARAMS, seed=3, adapter_version=0)
    assert gap(model, rollout, PARAMS.temperature) <= tolerances.SAMPLER_LOGP_FP32


def test_every_step_is_swapped_in_and_old_ones_go(engine: KeptEngine) -> None:
    model = tiny_model()
    adapter = adapted(model)
    with sampler_on(engine, model, adapter) as sampler:
        for version in range(1, 6):
            move(adapter, seed=version)
            rollout = sampler.sample(EXAMPLES, PARAMS, seed=version, adapter_version=version)
            assert gap(model, rollout, PARAMS.temperature) <= tolerances.SAMPLER_LOGP_FP32
            assert len(list(sampler._folder.iterdir())) == 1
        held = engine.client.worker("fastlora_adapters")
        assert len(held["cached"]) <= 2
        names = [model["id"] for model in engine.client.models()]
        assert [name for name in names if name.startswith(sampler._source._name)] == [f"{sampler._source._name}-v5"]
        assert len(held["names"]) <= 3  # the two cached ones, and the one that the last of them replaced
    assert not sampler._folder.exists()


def test_an_engine_that_waits_leaves_the_cores_alone(engine: KeptEngine) -> None:
    """vLLM's own worker spins for a second after every answer (cpu_idle.py): .5 s of the .5 s that are measured here."""

    def cpu_seconds() -> float:
        return sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children(recursive=True))

    model = tiny_model()
    with sampler_on(engine, model, adapted(model)) as sampler:
        sampler.sample(EXAMPLES, PARAMS, seed=3, adapter_version=1)
        before = cpu_seconds()
        time.sleep(0.5)
        assert cpu_seconds() - before < 0.15


def test_seeds_repeat_and_differ(engine: KeptEngine) -> None:
    model = tiny_model()
    adapter = adapted(model)
    same = (EXAMPLES[0], EXAMPLES[0])
    with sampler_on(engine, model, adapter) as sampler:
        first, again, other = (sampler.sample(same, PARAMS, seed=seed, adapter_version=1) for seed in (1, 1, 2))
    assert first.texts == again.texts
    assert torch.equal(first.sampler_logp_nt, again.sampler_logp_nt)
    assert len({*first.texts, *other.texts}) == 12, "samples of a group, of two equal prompts and of two seeds are all different"


def test_greedy_is_the_torch_samplers(engine: KeptEngine) -> None:
    model = tiny_model()
    adapter = adapted(model)
    greedy = dataclasses.replace(PARAMS, num_generations=1, temperature=0.0)
    with sampler_on(engine, model, adapter) as sampler:
        ours = sampler.sample(EXAMPLES, greedy, seed=0, adapter_version=1)
    truth = TorchSampler(model, 8).sample(EXAMPLES, greedy, seed=0, adapter_version=1)
    assert torch.equal(ours.completion_ids_nt, truth.completion_ids_nt)
    assert torch.equal(ours.prompt_ids_np, truth.prompt_ids_np)
    assert torch.equal(ours.prompt_mask_np, truth.prompt_mask_np)
    assert ours.finished_n.tolist() == truth.finished_n.tolist()
    assert float((ours.sampler_logp_nt - truth.sampler_logp_nt).abs().max()) <= tolerances.SAMPLER_LOGP_FP32


def test_eos_and_stop_strings_end_a_completion_and_stay_in_it(engine: KeptEngine) -> None:
    model = tiny_model()
    adapter = adapted(model)
    many = dataclasses.replace(PARAMS, num_generations=16, max_completion_length=64, stop=("e",))
    with sampler_on(engine, model, adapter) as sampler:
        rollout = sampler.sample(EXAMPLES, many, seed=5, adapter_version=1)
    last = rollout.completion_ids_nt.gather(1, rollout.completion_mask_nt.sum(1, keepdim=True) - 1).squeeze(1)
    ended_by_eos = torch.isin(last, torch.tensor(model.eos_ids))
    ended_by_stop = torch.tensor([text.endswith("e") for text in rollout.texts])
    assert bool(ended_by_stop.any())
    assert torch.equal(rollout.finished_n, ended_by_eos | ended_by_stop)
    assert all("e" not in text[:-1] for text in rollout.texts)


def test_nucleus_log_probabilities_are_renormalised(engine: KeptEngine) -> None:
    """The probabilities of one prompt's first tokens sum to 1 inside the nucleus: log π − log Σ_nucleus."""
    model = tiny_model()
    adapter = adapted(model)
    nucleus = dataclasses.replace(PARAMS, top_p=0.5, max_completion_length=1, num_generations=200, temperature=1.0)
    with sampler_on(engine, model, adapter) as sampler:
        rollout = sampler.sample(EXAMPLES[:1], nucleus, seed=5, adapter_version=1)
    found = dict(zip(rollout.completion_ids_nt[:, 0].tolist(), rollout.sampler_logp_nt[:, 0].exp().tolist(), strict=True))
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-3)


def test_the_trainer_renormalises_as_the_engine_does(engine: KeptEngine) -> None:
    """At top-p .9 the full softmax is off by −log .9 and more; over the trainer's own nucleus the two sides agree but at a boundary."""
    model = tiny_model()
    adapter = adapted(model)
    nucleus = dataclasses.replace(PARAMS, top_p=0.9, num_generations=40)
    with sampler_on(engine, model, adapter) as sampler:
        rollout = sampler.sample(EXAMPLES, nucleus, seed=5, adapter_version=1)
    mask = rollout.completion_mask_nt
    assert int(mask.sum()) > 3000
    off, full = ((trainer_logp(model, rollout, 0.7, p) - rollout.sampler_logp_nt)[mask].abs() for p in (0.9, 1.0))
    assert float(full.mean()) > 0.02
    assert float((off <= tolerances.SAMPLER_LOGP_FP32).float().mean()) >= 0.999


def test_a_changed_adapter_under_an_old_version_is_refused(engine: KeptEngine) -> None:
    model = tiny_model()
    adapter = adapted(model)
    with sampler_on(engine, model, adapter) as sampler:
        sampler.sample(EXAMPLES[:1], PARAMS, seed=1, adapter_version=1)
        move(adapter, seed=99)
        with pytest.raises(SamplerError, match="still called version 1"):
            sampler.sample(EXAMPLES[:1], PARAMS, seed=1, adapter_version=1)


def test_a_rollout_in_flight_finishes_on_its_version(engine: KeptEngine) -> None:
    model = tiny_model()
    adapter = adapted(model, seed=1)
    long = dataclasses.replace(PARAMS, max_completion_length=64)
    with sampler_on(engine, model, adapter) as sampler:
        old = sampler.begin(EXAMPLES, long, seed=1, adapter_version=1)
        move(adapter, seed=2)
        new = sampler.begin(EXAMPLES, long, seed=1, adapter_version=2)
        new, old = new.result(), old.result()
        assert (old.adapter_version, new.adapter_version) == (1, 2)
        assert gap(model, new, PARAMS.temperature) <= tolerances.SAMPLER_LOGP_FP32
        move(adapter, seed=1)
        assert gap(model, old, PARAMS.temperature) <= tolerances.SAMPLER_LOGP_FP32
