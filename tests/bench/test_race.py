"""The workers' protocol, with a contender that does nothing: turns, warm-up, medians, memory, and a worker that dies."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench.contender import Contender
from bench.race import Worker, WorkerError, race

FAKE = (sys.executable, "-m", "tests.bench.fake_worker")


def test_contenders_take_turns_after_a_warm_up(tmp_path: Path) -> None:
    said: list[str] = []
    fast, slow = race([Contender("fastlora", micro_batch=1), Contender("trl", micro_batch=4)], tmp_path, 1, 3, said.append, FAKE)
    log = [line.split()[0] for line in (tmp_path / "log").read_text().splitlines()]
    assert log == ["fastlora", "trl", *["fastlora", "trl"] * 3]
    assert fast.seconds == [2.0, 3.0, 4.0], "the warm-up is not among the timed runs"
    assert (fast.median, fast.percentile(20), slow.median) == (3.0, pytest.approx(2.4), 6.0)
    assert slow.cpu_seconds == [8.0] * 3
    assert 1 << 20 < slow.peak_bytes < 4 << 30
    assert slow.summary()["settings"]["library"] == "trl"
    assert len(said) == 2 + 2 * 3 + 2  # loading, runs, medians


def test_commands_carry_a_path(tmp_path: Path) -> None:
    with Worker(Contender("plain"), tmp_path, 1, FAKE) as worker:
        worker.wait_until_ready()
        worker.run("gradient", "there")
    assert (tmp_path / "log").read_text() == "plain gradient there\n"


def test_a_worker_that_dies_is_named_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"(?s)plain float32 mb13: worker ended with status 1.*bad luck"):
        race([Contender("plain", micro_batch=13)], tmp_path, 1, 1, lambda _: None, FAKE)
