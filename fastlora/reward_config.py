"""Settings of the rewards that run a language model of their own: [reward.process] and [reward.distillation]."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from fastlora.section import Positive, Section

MODEL_REWARDS = ("process", "distillation")
"""Names in reward.functions that run a language model of their own; each has its section."""


class RewardModelConfig(Section):
    """A frozen language model that a reward runs."""

    model: str | None = None
    """As model.name. None, or the name of the model that trains: its base weights, which are shared where precision, device and revision
    are the same too (with method = "full" they move, and a second copy is loaded)."""
    revision: str | None = None
    """Hub revision; None = the default one, or that of the model that trains where it is the same model."""
    adapter: Path | None = None
    """PEFT adapter folder to put on that model; on shared weights it costs its own matrices alone. None = no adapter."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of its weights and activations; None = model.dtype."""
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] | None = None
    """cpu, cuda or cuda:1; None = the device of the model that trains."""


class ProcessConfig(RewardModelConfig):
    """The `process` reward (fastlora/rewards/process.py); the defaults fit Math-Shepherd's model."""

    model: str | None = "peiyi9979/math-shepherd-mistral-7b-prm"
    """As in every model of a reward: None, or the name of the model that trains, shares its base weights."""
    step_tag: Annotated[str, Field(min_length=1)] = "ки"
    """Written behind every step; its prediction is the judgement. One token of the model's."""
    positive_tag: Annotated[str, Field(min_length=1)] = "+"
    """Predicted at the tag of a good step. One token of the model's."""
    negative_tag: Annotated[str, Field(min_length=1)] = "-"
    """Predicted at the tag of a bad step. One token of the model's."""
    prompt_template: str = "{question} "
    """What stands before the first step; {question} and the row's other columns are filled in."""
    step_template: str = "{step} {tag}\n"
    """One step: {step} once, then {tag} once."""
    batch_size: Positive = 8
    """Completions that are judged together."""


class DistillationConfig(RewardModelConfig):
    """The `distillation` reward (fastlora/rewards/distillation.py): the teacher."""

    clip: Annotated[float, Field(gt=0.0)] | None = None
    """Largest |log π_teacher − log π_θ| of a token (nats); None = no limit."""
