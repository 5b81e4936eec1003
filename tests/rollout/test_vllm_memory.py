"""The engine's memory: counted as a real engine reported it, split with the trainer, refused by name. No engine, and no GPU, is needed."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig

from fastlora import memory_plan
from fastlora.config import RunConfig
from fastlora.memory_plan import announce_engine, longest_possible, plan_memory
from fastlora.rollout.sampler import SamplerError
from fastlora.rollout.vllm.memory import (
    GIB,
    OUTSIDE_POOL,
    EngineLoad,
    EngineMemory,
    engine_card,
    engine_memory,
    memory_flags,
    run_load,
    shared_load,
    sleeps,
)
from fastlora.rollout.vllm.process import environment
from tests.tiny import TINY_FAMILIES, make_tiny_model

SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)
CARD = 80 * GIB
CUDA = torch.device("cuda")


def config(vllm: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    base = {
        "rollout": {"sampler": "vllm", "batch_size": 16, "max_completion_length": 128},
        "data": {"max_prompt_length": 128},
        "vllm": vllm or {},
        "loss": {"sampler_correction": "sequence_mask" if vllm and "staleness" in vllm else "none"},
    }
    return RunConfig.model_validate(base | changes)


def planned(settings: RunConfig, model_config: Any, slot_rank: int, card_bytes: int | None) -> tuple[EngineLoad, EngineMemory]:
    load = run_load(settings, model_config, slot_rank, on_cpu=card_bytes is None)
    return load, engine_memory(settings, model_config, load, card_bytes)


def size(engine: EngineMemory, name: str) -> int:
    return next(size for part, size in engine.parts if part.startswith(name))


def test_slots_and_cache_are_those_of_a_real_engine() -> None:
    """vLLM 0.32 on a CPU: bytes of lora_a_stacked and lora_b_stacked of all its layers, and of its KV caches, as it reported them."""
    _, engine = planned(config(model={"dtype": "bfloat16"}), SMOLLM2, 32, None)
    assert size(engine, "adapter slots") == 51_806_208
    assert size(engine, "KV cache of 16 × 256 tokens") == 141_557_760
    assert size(planned(config(), SMOLLM2, 0, None)[1], "adapter slots") == 0


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_weights_are_the_models_matrices(family: str) -> None:
    model = make_tiny_model(family)
    _, engine = planned(config(model={"dtype": "float32"}), model.config, 8, None)
    assert size(engine, "weights") == 4 * sum(p.numel() for p in model.parameters() if p.ndim == 2)


def test_a_cpu_is_not_asked_to_sleep() -> None:
    settings = config()
    load, engine = planned(settings, SMOLLM2, 32, None)
    assert memory_flags(settings, SMOLLM2, load, engine, None) == ["--kv-cache-memory-bytes", str(size(engine, "KV cache"))]
    assert engine.beside and engine.at_rest == engine.total and not sleeps(settings, on_cpu=True)


def test_on_the_trainers_gpu_it_sleeps_and_takes_what_the_plan_found() -> None:
    settings = config()
    load, engine = planned(settings, SMOLLM2, 32, CARD)
    flags = memory_flags(settings, SMOLLM2, load, engine, CARD)
    assert flags[:3] == ["--enable-sleep-mode", "--kv-cache-memory-bytes", str(size(engine, "KV cache"))]
    assert flags[3] == "--gpu-memory-utilization" and 0 <= float(flags[4]) - engine.total / CARD <= 1e-4
    assert engine.at_rest == OUTSIDE_POOL[False] < engine.total and engine.beside


@pytest.mark.parametrize("vllm", [{"device": 1}, {"staleness": 1}])
def test_it_stays_awake_where_the_trainer_does_not_need_its_memory_or_it_samples_ahead(vllm: dict[str, Any]) -> None:
    settings = config(vllm)
    load, engine = planned(settings, SMOLLM2, 32, CARD)
    assert "--enable-sleep-mode" not in memory_flags(settings, SMOLLM2, load, engine, CARD)
    assert engine.at_rest == engine.total and engine.beside == ("device" not in vllm)


def test_given_shares_and_caches_are_taken() -> None:
    share = config({"gpu_share": 0.3})
    load, engine = planned(share, SMOLLM2, 32, CARD)
    assert engine.total == int(0.3 * CARD)
    assert memory_flags(share, SMOLLM2, load, engine, CARD) == ["--enable-sleep-mode", "--gpu-memory-utilization", "0.3"]
    both = config({"gpu_share": 0.3, "kv_cache_gib": 1.5})
    assert memory_flags(both, SMOLLM2, load, engine, CARD)[3:] == ["--kv-cache-memory-bytes", str(3 * GIB // 2)]
    with pytest.raises(SamplerError, match=r"vllm.gpu_share = 0.02 of 80.0 GiB leaves no KV cache: the engine's other parts need 2\.\d"):
        planned(config({"gpu_share": 0.02}), SMOLLM2, 32, CARD)


def test_what_several_runs_ask_of_one_engine() -> None:
    """Any two of three at once: the two largest batches, two slots each, the longest sequence, the highest rank; it never sleeps."""
    loads = [
        EngineLoad(sequences, longest, rank, 2, sleeps=True) for sequences, longest, rank in ((16, 256, 8), (4, 512, 64), (24, 128, 16))
    ]
    assert shared_load(loads, 2) == EngineLoad(40, 512, 64, 4, sleeps=False)
    assert shared_load(loads[:1], 1) == EngineLoad(16, 256, 8, 2, sleeps=False)
    both = shared_load([run_load(config(), SMOLLM2, 32, on_cpu=False)] * 2, 2)
    one, two = (engine_memory(config(), SMOLLM2, load, CARD) for load in (run_load(config(), SMOLLM2, 32, on_cpu=False), both))
    assert size(two, "adapter slots") == 2 * size(one, "adapter slots") and size(two, "weights") == size(one, "weights")
    assert two.at_rest == two.total


def test_a_card_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert engine_card(config({"device": 1}), CUDA) == torch.device("cuda", 1)
    assert engine_card(config(), CUDA) == CUDA and engine_card(config(), torch.device("cpu")) is None
    for device in (0, 2):
        with pytest.raises(SamplerError, match=f"vllm.device = {device}: there are 2 GPUs here, and the trainer has number 0"):
            engine_card(config({"device": device}), CUDA)
    with pytest.raises(SamplerError, match=r"vllm.device = 1 is a GPU, and the trainer is on the CPU"):
        engine_card(config({"device": 1}), torch.device("cpu"))


def test_the_engine_sees_only_its_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch counts what CUDA_VISIBLE_DEVICES leaves: cuda:1 of "4,7" is card 7."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert environment(1)["CUDA_VISIBLE_DEVICES"] == "7" and environment(None)["CUDA_VISIBLE_DEVICES"] == "4,7"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert environment(1)["CUDA_VISIBLE_DEVICES"] == "1" and "CUDA_VISIBLE_DEVICES" not in environment(None)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """A card of `gib`, with the tiny model on it, as far as the plan can see."""
    card = {"gib": 80.0}
    monkeypatch.setattr(memory_plan, "select_device", lambda _: CUDA)
    monkeypatch.setattr(memory_plan, "machine_bytes", lambda _: int(card["gib"] * GIB))
    monkeypatch.setattr(memory_plan, "meta_model", lambda _: make_tiny_model())
    return card


def announced(settings: RunConfig) -> str:
    console = Console(file=io.StringIO(), width=200)
    announce_engine(settings, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_split_is_printed_and_a_card_that_is_too_small_refused(gpu: dict[str, float]) -> None:
    settings = config()
    plan = plan_memory(settings, make_tiny_model(), longest_possible(settings))
    assert plan.engine is not None and plan.sampling == ()  # vLLM samples, here and in evaluation
    shown = announced(settings)
    assert f"vLLM's engine: {plan.engine.total / GIB:.2f} GiB: weights 0.00, adapter slots, 2 of rank 16 0.00, KV cache of 16" in shown
    both = max(plan.while_sampling + plan.engine.total, plan.while_updating + OUTSIDE_POOL[False])
    assert f"{plan.while_updating / GIB + 2:.2f} while the trainer updates (the engine sleeps and keeps 2.00)" in shown
    assert plan.peak_with_engine == max(both, plan.loading) > plan.peak
    gpu["gib"] = math.ceil(100 * both / GIB) / 100
    announced(settings)
    gpu["gib"] -= 0.02
    with pytest.raises(SamplerError, match=r"vLLM's engine and the trainer need \d\.\d\d GiB, and cuda has .* Lower rollout.batch_size or"):
        announced(settings)


def test_ahead_of_the_trainer_both_need_their_memory_at_once(gpu: dict[str, float]) -> None:
    settings = config({"staleness": 1})
    plan = plan_memory(settings, make_tiny_model(), longest_possible(settings))
    assert plan.engine is not None and plan.peak_with_engine == plan.while_updating + plan.engine.total
    assert "the engine keeps all" in announced(settings)


def test_servers_and_the_torch_sampler_have_no_engine_of_ours(gpu: dict[str, float]) -> None:
    gpu["gib"] = 0.001
    assert announced(config({"servers": ["http://localhost:8000"]})) == ""
    assert announced(config(rollout={"sampler": "torch"})) == ""
