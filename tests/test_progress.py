"""The live display on a terminal, the plain lines elsewhere, the stage timer, the final table."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from fastlora import progress
from fastlora.metrics import RunSummary
from fastlora.progress import StepTimer, TrainingProgress, accuracy_table, format_p, sparkline

ROW = {
    "reward/mean": 0.625, "reward/std": 0.484, "tokens_per_second": 1234.4, "seconds/sampling": 4.0, "seconds/reward": 0.1,
    "seconds/update": 5.0, "seconds/other": 0.9,
}  # fmt: skip


def terminal(width: int = 120) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width)


def pipe() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_without_a_terminal_one_plain_line_a_step() -> None:
    console = pipe()
    with TrainingProgress(3, "sums", console=console) as display:
        display.update({"step": 1, **ROW})
        display.note("checkpoint [bold]step-1[/bold] written to a/long/path " + 40 * "x")
        display.update({"step": 2, **ROW, "eval/accuracy": 0.5})
        display.update({"step": 3, **ROW})
    lines = written(console).splitlines()
    assert len(lines) == 4
    assert not any(ord(character) < 32 for line in lines for character in line), "control characters in a log file"
    assert lines[0].startswith("step 1/3   reward 0.62 ± 0.48 ▄   1,234 tokens/s   sampling 40%   reward 1%   update 50%   other 9%")
    assert lines[1].startswith("checkpoint [bold]step-1[/bold]")
    assert "accuracy 0.500 (step 2)" in lines[2]
    assert "accuracy 0.500 (step 2)" in lines[3], "the last accuracy stays"


def test_eta_is_the_pace_of_this_process() -> None:
    """Steps 1 to 6 were done by an earlier process; from then on a step takes 90 s: at step 8 of 10, 3 minutes are left."""
    now = 0.0
    console = Console(file=io.StringIO(), force_terminal=False, get_time=lambda: now)
    with TrainingProgress(10, "sums", completed=6, console=console) as display:
        for step in (7, 8):
            now += 90.0
            display.update({"step": step, **ROW})
    assert written(console).splitlines()[-1].endswith("ETA 0:03:00")


def test_a_terminal_shows_bar_reward_time_split_and_notes() -> None:
    console = terminal()
    with TrainingProgress(4, "sums [v2]", completed=1, console=console) as display:
        display.update({"step": 2, **ROW, "eval/accuracy": 0.5})
        display.note("hello")
    shown = written(console)
    for text in ("sums [v2]", "2/4", "reward", "± 0.48", "accuracy 0.500 (step 2)", "sampling 40%", "1,234 tokens/s", "hello"):
        assert text in shown, text


def test_the_display_ends_when_training_raises() -> None:
    console = terminal()
    with pytest.raises(KeyboardInterrupt), TrainingProgress(4, "sums", console=console):
        raise KeyboardInterrupt
    assert written(console).endswith("\x1b[?25h"), "the cursor must come back"


def test_sft_shows_the_loss() -> None:
    console = pipe()
    with TrainingProgress(2, "sft", console=console) as display:
        display.update({"step": 1, "loss": 1.23456})
    assert written(console) == "step 1/2   loss 1.2346\n"


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], ""), ([2.0], "▄"), ([1.0, 1.0], "▄▄"), ([0.0, 7.0, 3.0], "▁█▄"), ([0.0, float("nan"), 1.0], "▁ █")],
)
def test_sparkline(values: list[float], expected: str) -> None:
    assert sparkline(values) == expected


def test_stage_timer_splits_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 4.0, 5.0, 5.5, 6.0, 8.0, 10.0, 100.0, 101.0, 101.0])
    monkeypatch.setattr(progress, "_now", lambda: next(clock))
    timer = StepTimer()
    for stage in ("sampling", "reward", "update"):
        with timer(stage):
            pass
    assert timer.lap() == {"seconds/sampling": 3.0, "seconds/reward": 0.5, "seconds/update": 2.0, "seconds/other": 4.5}
    assert timer.lap() == {"seconds/sampling": 0.0, "seconds/reward": 0.0, "seconds/update": 0.0, "seconds/other": 1.0}


def test_stage_timer_measures_wall_time_and_refuses_double_counting() -> None:
    timer = StepTimer()
    with timer("reward"):
        time.sleep(0.02)
        with pytest.raises(RuntimeError, match="'update' is timed inside 'reward'"), timer("update"):
            pass
    with pytest.raises(ValueError, match="'evaluation' is no stage"), timer("evaluation"):
        pass
    assert timer.lap()["seconds/reward"] >= 0.02


def test_accuracy_table_shows_both_accuracies_and_the_test() -> None:
    summary = RunSummary(
        "sums", 0, 40, 0.53, (0.469, 0.59), 0.68, (0.62, 0.734), 0.15, (0.093, 0.206), 1.3e-6, True, 650.0, 1, 1, 1, {}, {}, {}
    )
    console = pipe()
    console.print(accuracy_table(summary))
    shown = written(console)
    for text in ("53.0%", "46.9% to 59.0%", "68.0%", "+15.0 points", "+9.3 to +20.6 points", "after 40 steps", "p < 0.0001"):
        assert text in shown, text


def test_format_p() -> None:
    assert [format_p(p) for p in (1.0, 0.0314, 1e-4, 9.9e-5)] == ["p = 1", "p = 0.031", "p = 0.0001", "p < 0.0001"]
