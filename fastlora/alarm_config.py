"""[alarms] of a run's config."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fastlora.section import Positive, Section


class AlarmConfig(Section):
    """One metric that is watched."""

    threshold: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Value, itself included, from which on the metric is where it must not be; None = not watched."""
    patience: Positive = 3
    """Consecutive steps there until the alarm goes off."""
    action: Literal["warn", "stop"] = "warn"
    """warn = a line on the console, in alarms.jsonl and in the report, once until the metric has been back; stop = the same, and the run
    ends, saved; resumed, it goes on until the next time."""


class AlarmsConfig(Section):
    """Signs of a collapse, looked for after every step (objective = "grpo"). The numbers are those of the reward-density study: 4 × 4
    completions of Qwen3-1.7B, 100 steps; its process rewards collapsed at step 79."""

    advantage_std: AlarmConfig = AlarmConfig()
    """Standard deviation of the advantages, upwards. Healthy runs peaked at .64 (outcome) and 1.0 (distillation), the collapse at 9.05, 50
    steps before accuracy was gone: 3 tells them apart."""
    truncated: AlarmConfig = AlarmConfig()
    """Fraction of completions cut off at the length limit, upwards. It rose about ten steps before accuracy was gone: .9."""
    zero_std: AlarmConfig = AlarmConfig(threshold=1.0, patience=10)
    """Fraction of groups whose rewards are all alike, upwards. At 1 nothing is learned."""
    entropy: AlarmConfig = AlarmConfig()
    """Mean entropy of the policy, nats per token, downwards: .01 is a policy that has stopped exploring."""
    mismatch: AlarmConfig = AlarmConfig()
    """KL(sampler ‖ trainer), nats per token, upwards; only where they are two. bfloat16 alone gives some 1e-3: .1 is another policy."""
