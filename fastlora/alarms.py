"""Signs that a run is collapsing: a metric that stays beyond its threshold for `patience` steps in a row.

    advantage_std   advantage/std           at or above     one spike of process rewards drags the policy away
    truncated       completion/truncated    at or above     completions run to the length limit
    zero_std        reward/frac_zero_std    at or above     groups without spread teach nothing
    entropy         entropy                 at or below     the policy no longer explores
    mismatch        mismatch_kl             at or above     the sampler is another policy than the trainer

An episode begins with the first step beyond the threshold and ends with the first one that is not (NaN is beyond nothing, infinity beyond
everything). An alarm goes off once an episode, at its `patience`-th step. The state is the first step of each episode; a checkpoint keeps
it, so that a run that is killed and resumed gives the same alarms at the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fastlora.alarm_config import AlarmConfig
from fastlora.config import RunConfig
from fastlora.errors import FastloraError


@dataclass(frozen=True, slots=True)
class Watched:
    """A metric that has an alarm."""

    metric: str
    """Its name in metrics.jsonl."""
    side: Literal["above", "below"]
    """Where it must not be; the threshold itself is on that side."""


WATCHED = {
    "advantage_std": Watched("advantage/std", "above"),
    "truncated": Watched("completion/truncated", "above"),
    "zero_std": Watched("reward/frac_zero_std", "above"),
    "entropy": Watched("entropy", "below"),
    "mismatch": Watched("mismatch_kl", "above"),
}
"""Key of [alarms] -> what it watches."""


class UnknownMetricError(FastloraError):
    """An alarm watches a metric that the run does not have: it would never go off."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """One line of alarms.jsonl."""

    step: int
    """At which it went off."""
    name: str
    """Key of [alarms]."""
    metric: str
    value: float | None
    """Of the metric at that step; None = infinite."""
    threshold: float
    side: Literal["above", "below"]
    """Of the threshold that the metric is on."""
    since: int
    """First step of the episode."""
    action: Literal["warn", "stop"]

    def __str__(self) -> str:
        steps = f"for {self.step - self.since + 1} steps" if self.step > self.since else "in 1 step"
        where = f"at or {self.side} {self.threshold:g}"
        value = "infinite" if self.value is None else f"{self.value:.4g}"
        return f"{self.metric} = {value} has been {where} {steps} (alarms.{self.name}, step {self.step})"


class Alarms:
    """The alarms of one run. `check` after every step, in order."""

    def __init__(self, config: RunConfig) -> None:
        sections: dict[str, AlarmConfig] = {name: getattr(config.alarms, name) for name in WATCHED}
        if config.objective == "sft":  # it has none of these metrics
            sections = {}
        self._config = {name: section for name, section in sections.items() if section.threshold is not None}
        self._since: dict[str, int] = {}  # first step of the episode that goes on

    def check(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """The alarms that go off at this step. Raises UnknownMetricError for a watched metric that `metrics` does not have."""
        return [alarm for name in self._config if (alarm := self._check(name, step, metrics)) is not None]

    def _check(self, name: str, step: int, metrics: Mapping[str, float]) -> Alarm | None:
        config, watched = self._config[name], WATCHED[name]
        assert config.threshold is not None
        if watched.metric not in metrics:
            raise UnknownMetricError(f"alarms.{name} watches {watched.metric}, which this run does not measure: set its threshold to None")
        value = metrics[watched.metric]
        beyond = value >= config.threshold if watched.side == "above" else value <= config.threshold
        if not beyond:
            self._since.pop(name, None)
            return None
        since = self._since.setdefault(name, step)
        if step - since + 1 != config.patience:
            return None
        shown = value if math.isfinite(value) else None
        return Alarm(step, name, watched.metric, shown, config.threshold, watched.side, since, config.action)

    def state(self) -> dict[str, int]:
        """Alarm -> first step of its episode, for the checkpoint; none where there is no episode."""
        return dict(self._since)

    def restore(self, state: Mapping[str, int]) -> None:
        """Takes over `state`."""
        self._since = dict(state)
