"""Any adapter, or the base model, on a config's held-out problems, without a run."""

from __future__ import annotations

from pathlib import Path

from fastlora.build import held_out_examples
from fastlora.config import RunConfig
from fastlora.evaluate import Evaluation, evaluate
from fastlora.lora.saved import attach_saved
from fastlora.model import load_base_model
from fastlora.rewards.registry import load_grader
from fastlora.rollout.torch import TorchSampler


def evaluate_adapter(config: RunConfig, adapter: Path | None) -> Evaluation:
    """Loads model, adapter (a PEFT folder; None = the base model) and problems, and answers them.

    Raises ModelError, AdapterFileError, AttachError, DataError or RewardError.
    """
    model = load_base_model(config.model)
    examples = held_out_examples(config, model)
    if adapter is not None:
        attach_saved(model, adapter)
    sampler = TorchSampler(model, config.rollout.batch_size)
    with load_grader(config.reward) as rewards:
        return evaluate(sampler, rewards.grader, examples, config, adapter_version=0)
