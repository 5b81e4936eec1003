"""Updates that take turns: the same batch for all, a saving that is there is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastlora.config import load_config
from fastlora.study.layer_selection import time_ratio
from fastlora.turns import Turns, TurnsError
from fastlora.update_time import run_update_time

CONFIG = Path(__file__).parents[1] / "configs" / "smollm2_sums_cpu.toml"
SMALL = ["--rollout.num-prompts", "2", "--rollout.num-generations", "2", "--rollout.max-completion-length", "4"]
LAST = {"rank_pattern": {r"layers\.29\..*": 4}, "r": 0}
ALL = {"rank_pattern": {}, "r": 4}


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["grpo", "sft"])
def test_an_adapter_on_the_last_layer_takes_half_of_the_time(objective: str, tmp_path: Path) -> None:
    """Without the backward pass below it: a third of the FLOPs at least is saved, whatever else the machine does."""
    config = load_config(CONFIG, [*SMALL, "--objective", objective])
    said: list[str] = []
    run_update_time(config, tmp_path, {"runs": {"all": ALL, "last": LAST}, "rounds": 3}, said.append)
    times = Turns.read(tmp_path)
    assert (list(times.seconds), said[-1]) == (["all", "last"], "round 3 of 3")
    assert time_ratio(times.seconds["last"], times.seconds["all"]).value < 0.75


def test_a_ratio_is_of_the_same_round() -> None:
    """A machine that gets slower from round to round slows both."""
    slower = [1.0, 2.0, 4.0, 8.0, 16.0]
    ratio = time_ratio([0.8 * one for one in slower], slower)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.8, 0.8, 0.8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runs": {}}, "0 runs, 25 rounds: times need one run and 3 rounds"),
        ({"runs": {"all": ALL}, "rounds": 2}, "1 runs, 2 rounds"),
        ({"runs": {"all": ALL}, "turns": 2}, "options of update times: turns is unknown; known are runs, rounds"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(TurnsError, match=message):
        run_update_time(load_config(CONFIG, SMALL), tmp_path, options, print)
