"""Who is called when, which calls count, and the file."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fastlora.turns import Turns, TurnsError, take_turns


def test_every_round_is_the_other_way_round_and_the_first_does_not_count() -> None:
    order: list[str] = []
    said: list[str] = []
    turns = take_turns({name: lambda name=name: order.append(name) for name in "abc"}, 3, said.append)
    assert "".join(order) == "abccbaabccba"
    assert list(turns.seconds) == ["a", "b", "c"] and {len(seconds) for seconds in turns.seconds.values()} == {3}
    assert said == [f"round {number} of 3" for number in range(4)]


def test_seconds_are_of_the_call() -> None:
    slept = iter([0.0, 0.05, 0.1, 0.05])
    turns = take_turns({"sleeps": lambda: time.sleep(next(slept)), "does not": lambda: None}, 3)
    assert [round(seconds, 2) >= least for seconds, least in zip(turns.seconds["sleeps"], (0.05, 0.1, 0.05), strict=True)] == [True] * 3
    assert max(turns.seconds["does not"]) < 0.05


@pytest.mark.parametrize(("runs", "rounds"), [({}, 3), ({"a": lambda: None}, 2)])
def test_too_little_is_refused_before_anything_runs(runs: dict[str, object], rounds: int) -> None:
    with pytest.raises(TurnsError, match=f"{len(runs)} runs, {rounds} rounds: times need one run and 3 rounds at least"):
        take_turns({name: lambda: pytest.fail("ran") for name in runs}, rounds)


def test_the_file(tmp_path: Path) -> None:
    turns = Turns({"a": [1.0, 2.0], "b": [3.0, 4.0]})
    with pytest.raises(TurnsError, match=r"turns\.json: no such file"):
        Turns.read(tmp_path)
    turns.write(tmp_path)
    assert Turns.read(tmp_path) == turns
    (tmp_path / "turns.json").write_text('{"seconds": {}, "tokens": 3}')
    with pytest.raises(TurnsError, match=r"turns\.json is damaged"):
        Turns.read(tmp_path)
