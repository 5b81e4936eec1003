"""Alarms against episodes written out by hand, and in whole runs: warned, stopped, killed in between, resumed."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastlora.alarms import WATCHED, Alarm, Alarms, UnknownMetricError
from fastlora.analysis.run_reader import read_run
from fastlora.config import AlarmsConfig, RunConfig
from tests.trainer.runs import run, write_config

REPOSITORY = Path(__file__).parents[1]


def alarms_of(**sections: dict[str, Any]) -> Alarms:
    return Alarms(RunConfig.model_validate({"alarms": {"zero_std": {"threshold": None}, **sections}}))


def steps_of(alarms: Alarms, metric: str, values: list[float], first: int = 1) -> list[int]:
    """Steps at which something goes off."""
    return [alarm.step for step, value in enumerate(values, first) for alarm in alarms.check(step, {metric: value})]


@pytest.mark.parametrize(
    ("patience", "values", "expected"),
    [
        (1, [0.1, 0.9, 1.0, 0.1, 0.95], [2, 5]),  # the threshold itself counts; once an episode
        (2, [0.95, 0.1, 0.95, 0.95, 0.95, 0.95, 0.95], [4]),  # not again at twice the patience
        (2, [0.95, math.nan, 0.95, 0.95], [4]),  # NaN ends an episode
        (2, [math.inf, 0.95, -math.inf, 2.0, 2.0], [2, 5]),
        (3, [1.0, 1.0], []),
    ],
)
def test_an_alarm_goes_off_once_an_episode(patience: int, values: list[float], expected: list[int]) -> None:
    section = {"threshold": 0.9, "patience": patience}
    assert steps_of(alarms_of(truncated=section), "completion/truncated", values) == expected
    mirrored = {"threshold": -0.9, "patience": patience}  # entropy falls
    assert steps_of(alarms_of(entropy=mirrored), "entropy", [-value for value in values]) == expected


@pytest.mark.parametrize("killed_after", range(1, 8))
def test_state_carries_an_episode_over(killed_after: int) -> None:
    values = [1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]
    section = {"threshold": 1.0, "patience": 3}
    first, second = alarms_of(truncated=section), alarms_of(truncated=section)
    fired = steps_of(first, "completion/truncated", values[:killed_after])
    second.restore(json.loads(json.dumps(first.state())))
    fired += steps_of(second, "completion/truncated", values[killed_after:], killed_after + 1)
    assert fired == [3, 8]


def test_an_alarm_says_what_happened() -> None:
    (alarm,) = alarms_of(advantage_std={"threshold": 3, "patience": 1, "action": "stop"}).check(7, {"advantage/std": 9.051})
    assert alarm == Alarm(7, "advantage_std", "advantage/std", 9.051, 3.0, "above", 7, "stop")
    assert str(alarm) == "advantage/std = 9.051 has been at or above 3 in 1 step (alarms.advantage_std, step 7)"
    (alarm,) = alarms_of(truncated={"threshold": 0.9, "patience": 1}).check(1, {"completion/truncated": math.inf})
    assert alarm.value is None and str(alarm).startswith("completion/truncated = infinite has been")


def test_a_metric_that_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(UnknownMetricError, match=r"alarms\.advantage_std watches advantage/std, which this run does not measure"):
        alarms_of(advantage_std={"threshold": 3}).check(1, {"loss": 0.0})


def test_every_section_is_watched_and_only_the_defect_by_default() -> None:
    assert set(WATCHED) == set(AlarmsConfig.model_fields)
    on = {name for name in WATCHED if getattr(AlarmsConfig(), name).threshold is not None}
    assert on == {"zero_std"}
    assert not Alarms(RunConfig.model_validate({"objective": "sft"})).check(1, {}), "SFT has no groups"


ALWAYS = {"alarms.truncated.threshold": "0.0", "alarms.truncated.patience": "3", "alarms.entropy.threshold": "100.0"}
"""Both alarms go off at step 3 of every run: any fraction is at least 0, any entropy of 131 tokens below 100."""


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "alarms.jsonl").read_text().splitlines()]


def test_a_warning_goes_to_console_file_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(write_config(tmp_path, **ALWAYS), "--name", "a") == 0
    folder = tmp_path / "runs" / "a"
    assert [(line["step"], line["name"], line["since"], line["action"]) for line in lines(folder)] == [
        (3, "truncated", 1, "warn"), (3, "entropy", 1, "warn"),
    ]  # fmt: skip
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["value"] for line in lines(folder)] == [metrics[2]["completion/truncated"], metrics[2]["entropy"]]
    assert capsys.readouterr().out.count("(alarms.truncated, step 3)") == 1
    page = (folder / "report.html").read_text()
    assert "<h2>Alarms</h2>" in page and "var(--bad)" in page.split("<h2>Loss and policy</h2>")[1].split("</svg>")[0]
    assert [alarm.metric for alarm in read_run(folder).alarms] == ["completion/truncated", "entropy"]


def test_a_stopped_run_is_saved_and_goes_on_to_the_same_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, **ALWAYS, **{"trainer.checkpoint_every": "0"})
    assert run(config, "--name", "whole") == 0
    capsys.readouterr()
    assert run(config, "--name", "stopped", "--alarms.truncated.action", "stop") == 4
    said = capsys.readouterr().out
    for fact in ("Stopped by an alarm", "completion/truncated = ", "at or above 0", "for 3 steps", "step 3", "--resume"):
        assert fact in said
    stopped = tmp_path / "runs" / "stopped"
    assert not (stopped / "summary.json").exists() and [line["step"] for line in lines(stopped)] == [3, 3]
    assert run(Path("--resume"), str(stopped)) == 0, "it goes on past the alarm"
    whole = lines(tmp_path / "runs" / "whole")
    assert [{**line, "action": "warn"} for line in lines(stopped)] == whole
    adapters = [tmp_path / "runs" / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "stopped")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_a_run_killed_in_the_middle_of_an_episode_gives_the_same_alarms(tmp_path: Path) -> None:
    """Checkpoint after step 2, killed when the alarms of step 3 are on the disk: both are given once, at step 3."""
    config = write_config(tmp_path, **ALWAYS)
    killer = (
        "import os, signal, sys, fastlora.metrics as m\n"
        "alarm = m.MetricsWriter.alarm\n"
        "def dying(self, record):\n"
        "    alarm(self, record)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "m.MetricsWriter.alarm = dying\n"
        "import train; sys.exit(train.main(sys.argv[1:]))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", killer, str(config), "--name", "killed"]
    assert subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True).returncode == -signal.SIGKILL
    killed = tmp_path / "runs" / "killed"
    assert [line["name"] for line in lines(killed)] == ["truncated"]
    assert run(Path("--resume"), str(killed)) == 0
    assert [(line["step"], line["name"], line["since"]) for line in lines(killed)] == [(3, "truncated", 1), (3, "entropy", 1)]
