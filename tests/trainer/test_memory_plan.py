"""The memory planner: tokens of the largest batch by hand, and the expected peak against the measured one in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlora.config import RunConfig
from fastlora.memory_plan import LargestBatch, largest_batch, plan_memory
from fastlora.packing import pack
from fastlora.types import TrainBatch
from tests.tiny import make_tiny_model
from tests.tolerances import MEMORY_PLAN

ROOT = Path(__file__).parents[2]
RUN = """
import re, sys
from pathlib import Path
import train
status = train.main(sys.argv[1:])
assert status == 0, status
print("measured peak", re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


BATCH = LargestBatch(1000, 800, ((100, 8),))


def config(**changes: object) -> RunConfig:
    base = {"rollout": {"num_prompts": 2, "num_generations": 3, "max_completion_length": 4}, "trainer": {"steps": 1}}
    return RunConfig.model_validate(base | changes)


def test_tokens_of_a_step_are_those_that_packing_finds() -> None:
    lengths, parts = [5, 9], 2
    # Micro-batches of 2 of 4 samples: the first prompt's two, then the second's; with 3 of 6 likewise.
    settings = config(trainer={"steps": 1, "gradient_accumulation_steps": parts})
    batch = largest_batch(settings, lengths, None, [1])
    prompt_mask = torch.arange(9).flip(0) < torch.tensor([5, 9]).repeat_interleave(3)[:, None]
    completions = torch.ones(6, 4, dtype=torch.long)
    prompts = torch.arange(6).div(3, rounding_mode="floor")[:, None].expand(6, 9) + 3
    train = TrainBatch(prompts, prompt_mask, completions, completions.bool(), completions.bool(), torch.zeros(6, 1), None, None, None, 24)
    packed = [pack(part) for part in train.split(parts)]
    assert batch.packed == max(len(p.input_ids_t) for p in packed) == 9 + 3 * 3
    assert batch.scored == max(len(p.targets_c) for p in packed) == 12
    assert batch.decoded == ((1, 1), (14, 6))


def test_sft_takes_the_lengths_of_its_completions() -> None:
    settings = config(objective="sft", advantage={"scale_rewards": "none"})
    batch = largest_batch(settings, [5, 9], [2, 8], [3, 4])
    assert (batch.packed, batch.scored) == (14 + 1 + 7, 10)
    assert batch.decoded == ((7, 2),)


def test_activations_grow_by_what_autograd_keeps() -> None:
    """The planned bytes a token against the tensors that a forward pass of the fast path really saves, counted by autograd's own hook."""
    from fastlora.fused_layers import fuse_layers
    from fastlora.lora.groups import projections, shapes
    from fastlora.lora.packed import attach
    from fastlora.lora.patterns import resolve
    from fastlora.policy import score_packed

    settings = config(lora={"r": 3, "rank_pattern": {"k_proj": 0, "down_proj": 5}}, model={"dtype": "float32"})
    model = make_tiny_model("llama", head_dim=32)
    plain = make_tiny_model("llama", head_dim=32)
    fuse_layers(model)
    attach(model, resolve(shapes(projections(model)), settings.lora), seed=0, cast_to_input=True)

    def saved(tokens: int) -> int:
        """Bytes of the distinct storages that carry tokens."""
        storages: dict[int, int] = {}

        def keep(x: torch.Tensor) -> torch.Tensor:
            if tokens in x.shape:
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        ones = torch.ones(1, tokens, dtype=torch.long)
        prompt = torch.full((1, 1), 3)
        batch = TrainBatch(prompt, prompt.bool(), ones, ones.bool(), ones.bool(), torch.zeros(1, 1), None, None, None, tokens)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            logp, _ = score_packed(model, batch, 1.0)
        assert logp.requires_grad
        return sum(storages.values())

    def planned(tokens: int) -> int:
        return plan_memory(settings, plain, LargestBatch(tokens, tokens, ()), 0).update[0][1]

    # Planned in another row or below counting: x of the final norm and the head's rows (two of width 64 where the first layer's norm keeps
    # none), cos and sin of width 32, and per token targets, indices, log Z and entropy (8 + 16 + 4 + 4).
    beside_layers = 4 * 64 + 2 * 4 * 32 + 32
    assert saved(211) - saved(101) == planned(211) - planned(101) + (211 - 101) * beside_layers


def test_each_term_reacts_to_its_setting() -> None:
    def plan(batch: LargestBatch = BATCH, **changes: object):  # type: ignore[no-untyped-def]
        return plan_memory(config(**({"model": {"dtype": "float32"}} | changes)), make_tiny_model("llama"), batch, 0)

    def total(parts: tuple[tuple[str, int], ...]) -> int:
        return sum(size for _, size in parts)

    base = plan()
    assert total(plan(trainer={"steps": 1, "gradient_checkpointing": True}).update) < total(base.update)
    assert total(plan(lora={"r": 64}).update) > total(base.update)
    assert total(plan(model={"dtype": "bfloat16"}).update) < total(base.update)
    assert total(plan(LargestBatch(1000, 800, ((100, 64),))).sampling) > total(base.sampling)
    counted = plan_memory(config(model={"dtype": "float32"}), make_tiny_model("llama"), BATCH)
    assert counted.peak > base.peak


@pytest.mark.slow
@pytest.mark.xdist_group("real-model")
@pytest.mark.usefixtures("packaged_model")
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc/self/status, which is not there")
def test_the_expected_peak_is_the_measured_one(quantization: str, tmp_path: Path) -> None:
    size = "--trainer.steps 3 --eval.num-problems 64 --eval.required-gain None"
    arguments = f"configs/smollm2_sums_cpu.toml {size} --model.quantization {quantization} --name a --output-dir"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-c", RUN, *arguments.split(), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = float(re.search(r"expected peak memory: ([\d.]+) GiB", done.stdout)[1])  # type: ignore[index]
    measured = int(re.search(r"measured peak (\d+)", done.stdout)[1]) / 2**20  # type: ignore[index]
    assert abs(expected / measured - 1) <= MEMORY_PLAN, f"expected {expected:.2f} GiB, measured {measured:.2f} GiB"
