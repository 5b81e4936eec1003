"""trajectory_advantages has the bits of TRL 1.16's GRPOTrainer, which computes them inside its generation step.

A real trainer on a tiny model, with recorded completions in place of sampling and reward functions that return recorded ones.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import get_args

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from fastlora.advantages import trajectory_advantages
from fastlora.config import AdvantageConfig
from tests.tiny import make_tiny_model, make_tiny_tokenizer

SCALES = get_args(AdvantageConfig.model_fields["scale_rewards"].annotation)
AGGREGATIONS = get_args(AdvantageConfig.model_fields["multi_objective_aggregation"].annotation)
WEIGHTS = (1.0, 0.3, 2.5)
N = 12


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> GRPOTrainer:
    """Three reward functions that read column k of `trainer.recorded_nk`; one token per completion."""
    folder: Path = tmp_path_factory.mktemp("trl")

    def column(k: int):  # type: ignore[no-untyped-def]
        def reward(prompts: list[str], **_: object) -> list[float | None]:
            return [None if math.isnan(value) else value for value in trainer.recorded_nk[:, k].tolist()]

        reward.__name__ = f"reward_{k}"
        return reward

    trainer = GRPOTrainer(
        model=make_tiny_model("llama"),
        reward_funcs=[column(k) for k in range(len(WEIGHTS))],
        args=GRPOConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            report_to=[],
            gradient_checkpointing=False,
            per_device_train_batch_size=N,
            num_generations=N,
            reward_weights=list(WEIGHTS),
        ),
        train_dataset=Dataset.from_list([{"prompt": "1+1="}]),
        processing_class=make_tiny_tokenizer(),
    )
    one_token = [[5] for _ in range(N)]
    trainer._generate = lambda prompts: (one_token, one_token, None, ["x"] * N, None, {}, None, None)
    return trainer


def _rewards(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    rewards_nk = torch.randn(N, len(WEIGHTS), generator=generator)
    if kind == "binary":
        return (rewards_nk > 0.2).float()
    if kind == "equal":
        return torch.full_like(rewards_nk, 0.1)
    if kind == "nan":
        rewards_nk[torch.rand(rewards_nk.shape, generator=generator) < 0.35] = math.nan
        rewards_nk[1] = math.nan  # not scored by any function
        rewards_nk[6:8] = math.nan
        rewards_nk[9:11] = math.nan
    return rewards_nk


@pytest.mark.parametrize("g", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("kind", ["normal", "binary", "equal", "nan"])
def test_bits_equal_trl(trainer: GRPOTrainer, kind: str, g: int) -> None:
    rewards_nk = _rewards(kind)
    trainer.recorded_nk, trainer.num_generations = rewards_nk, g
    trainer.model.train()
    for scale, aggregation in itertools.product(SCALES, AGGREGATIONS):
        trainer.scale_rewards, trainer.multi_objective_aggregation = scale, aggregation
        expected_n = trainer._generate_and_score_completions([{"prompt": "1+1="}] * N)["advantages"]
        config = AdvantageConfig(scale_rewards=scale, multi_objective_aggregation=aggregation)
        got_n = trajectory_advantages(rewards_nk, torch.tensor(WEIGHTS), g, config)
        assert torch.equal(got_n, expected_n), (scale, aggregation, (got_n - expected_n).abs().max())
        assert got_n.any() or kind == "equal" or g == 1
