"""What the terminal shows of a run: a live display while it trains, plain lines where there is no terminal, a table at the end.

    sums_cpu ━━━━━━━━━━━━━━━━━━━━━━━━╸━━━━━━━━━━━━━━━ step 25/40 0:03:51 < 0:02:19
    reward 0.62 ± 0.49 ▁▂▂▃▃▅▄▅▆▆▇▇   accuracy 0.641 (step 20)   212 tokens/s
    sampling 41%   reward 1%   update 47%   other 11%

Every number comes from the metrics row of the step (names: `fastlora.metrics`).
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fastlora.metrics import RunSummary

STAGES = ("sampling", "reward", "update")
"""The timed stages of a step; what is left (evaluation, checkpoints, logging) is "other"."""

TREND_STEPS = 24
"""Steps in the reward's sparkline."""

SPARKS = "▁▂▃▄▅▆▇█"


class StepTimer:
    """Wall-clock seconds of each stage of a step.

    with timer("sampling"):
        rollout = sampler.sample(...)
    metrics |= timer.lap()     # seconds/sampling, seconds/reward, seconds/update, seconds/other: they sum to the step's
    """

    def __init__(self) -> None:
        self._running: str | None = None
        self._restart()

    def _restart(self) -> None:
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._start = _now()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Adds the block's time to `stage`. Raises ValueError for an unknown stage, RuntimeError inside another one's block."""
        if stage not in self._seconds:
            raise ValueError(f"{stage!r} is no stage of a step; the stages are {', '.join(STAGES)}")
        if self._running is not None:
            raise RuntimeError(f"{stage!r} is timed inside {self._running!r}: the seconds would be counted twice")
        self._running, start = stage, _now()
        try:
            yield
        finally:
            self._seconds[stage] += _now() - start
            self._running = None

    def lap(self) -> dict[str, float]:
        """Seconds of each stage, and of the rest, since the last lap (or since the timer was made)."""
        total = _now() - self._start
        seconds = {**self._seconds, "other": total - sum(self._seconds.values())}
        self._restart()
        return {f"seconds/{stage}": value for stage, value in seconds.items()}


def _now() -> float:
    """Seconds; waits for a GPU in use first, whose queued work would otherwise be billed to whichever stage comes next."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class TrainingProgress:
    """Live display on a terminal, one plain line a step elsewhere (CI, nohup, a pipe); a context manager.

    `completed` steps of an earlier process are shown as done and left out of the estimate of the remaining time.
    """

    def __init__(self, total_steps: int, name: str, completed: int = 0, console: Console | None = None) -> None:
        self._console = console or Console()
        self._rewards: deque[float] = deque(maxlen=TREND_STEPS)
        self._accuracy = Text()
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("step"),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
            console=self._console,
            speed_estimate_period=3600,  # seconds; rich's default of 30 holds one step or two of ours
        )
        self._task = self._bar.add_task(escape(name), total=total_steps, completed=completed)
        self._live = Live(self._bar, console=self._console, refresh_per_second=4) if self._console.is_terminal else None

    def __enter__(self) -> TrainingProgress:
        if self._live is not None:
            self._live.start(refresh=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, metrics: Mapping[str, float]) -> None:
        """Shows a finished step: its metrics row, `step` among it."""
        step = int(metrics["step"])
        self._bar.update(self._task, completed=step)
        if "eval/accuracy" in metrics:
            self._accuracy = Text(f"accuracy {metrics['eval/accuracy']:.3f} (step {step})")
        if "reward/mean" in metrics:
            self._rewards.append(metrics["reward/mean"])
        outcome = _join([*_outcome(metrics, self._rewards), self._accuracy, *_speed(metrics)])
        if self._live is not None:
            self._live.update(Group(self._bar, outcome, _time_split(metrics)))
        else:
            task = self._bar.tasks[0]
            eta = Text(f"ETA {timedelta(seconds=round(task.time_remaining))}" if task.time_remaining is not None else "")
            self.note(_join([Text(f"step {step}/{task.total:.0f}"), outcome, _time_split(metrics), eta]).plain)

    def note(self, message: str) -> None:
        """A line of its own, above the live display; printed as it is."""
        self._console.print(Text(message), soft_wrap=True)
        self._console.file.flush()


def sparkline(values: Iterable[float]) -> str:
    """One block character a value, scaled to the smallest and largest; a space for a value that is not finite."""
    values = list(values)
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    top = len(SPARKS) - 1

    def spark(value: float) -> str:
        if not math.isfinite(value):
            return " "
        return SPARKS[round(top * (value - low) / (high - low))] if high > low else SPARKS[top // 2]

    return "".join(map(spark, values))


def accuracy_table(summary: RunSummary) -> Table:
    """The two accuracies with their intervals, the gain, and the paired test behind it."""
    table = Table(title=f"Held-out accuracy · {escape(summary.name)}", title_justify="left")
    table.add_column("")
    table.add_column("greedy pass@1", justify="right")
    table.add_column("95% interval", justify="right")
    rows = [
        ("before", f"{summary.accuracy_before:.1%}", _interval(summary.accuracy_before_interval)),
        (f"after {summary.steps} steps", f"{summary.accuracy_after:.1%}", _interval(summary.accuracy_after_interval)),
    ]
    for row in rows:
        table.add_row(*row)
    table.add_section()
    gain_low, gain_high = summary.accuracy_gain_interval
    points = f"{100 * summary.accuracy_gain:+.1f} points"
    table.add_row("gain (paired)", points, f"{100 * gain_low:+.1f} to {100 * gain_high:+.1f} points", style="bold")
    table.caption = f"Exact McNemar test on the same problems: {format_p(summary.mcnemar_p)}"
    return table


def format_p(p_value: float) -> str:
    """A p-value as one prints it: "p = 0.031", "p < 0.0001"."""
    return "p < 0.0001" if p_value < 1e-4 else f"p = {p_value:.2g}"


def _interval(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.1%} to {interval[1]:.1%}"


def _outcome(metrics: Mapping[str, float], rewards: Iterable[float]) -> list[Text]:
    """The reward with its spread and trend; the loss where nothing is rewarded (SFT)."""
    if "reward/mean" not in metrics:
        return [Text(f"loss {metrics['loss']:.4f}")] if "loss" in metrics else []
    spread = f" ± {metrics['reward/std']:.2f}" if "reward/std" in metrics else ""
    return [Text.assemble("reward ", (f"{metrics['reward/mean']:.2f}", "bold"), spread, " ", (sparkline(rewards), "cyan"))]


def _speed(metrics: Mapping[str, float]) -> list[Text]:
    return [Text(f"{metrics['tokens_per_second']:,.0f} tokens/s")] if "tokens_per_second" in metrics else []


def _time_split(metrics: Mapping[str, float]) -> Text:
    """Share of each stage in the step's seconds, in per cent."""
    seconds = {stage: metrics[f"seconds/{stage}"] for stage in (*STAGES, "other") if f"seconds/{stage}" in metrics}
    total = sum(seconds.values())
    return _join([Text(f"{stage} {value / total:.0%}") for stage, value in seconds.items() if total > 0])


def _join(texts: Iterable[Text]) -> Text:
    """The texts that are not empty, three spaces apart."""
    return Text("   ").join(text for text in texts if text)
