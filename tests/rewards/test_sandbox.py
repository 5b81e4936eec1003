"""Graders in their own process: math-verify, users' functions that raise, hang and die, a parent interrupted or killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastlora.config import RewardConfig
from fastlora.rewards.deposits import RewardError
from fastlora.rewards.registry import Rewards, load_rewards
from fastlora.types import Example
from tests.rewards.rollouts import make_rollout

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def outcome() -> Iterator[Rewards]:
    """One worker for all tests of this file: it starts once and is used again."""
    with load_rewards(RewardConfig(functions=("outcome",), timeout=20.0)) as rewards:
        yield rewards


def user_reward(tmp_path: Path, body: str, **config: float) -> Rewards:
    path = tmp_path / "mine.py"
    path.write_text(textwrap.dedent(body))
    return load_rewards(RewardConfig(functions=(f"{path}:f",), **config))  # type: ignore[arg-type]


def gone(pid: int, seconds: float) -> bool:
    """Whether the process ends within the time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


RIGHT = [
    (r"so it is \boxed{\frac{2}{4}}", r"\frac{1}{2}"),
    ("The answer is 0.5.", r"\frac12"),
    (r"$\{3, 2, 1\}$", r"\{1,2,3\}"),
    (r"$x^2 + 2x + 1$", "(x+1)^2"),
    (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}"),
    ("we find 1,234 apples", "1,234"),
    (" 72", "72"),
    (r"\boxed{72}, as 71 is too small", "72"),
]
WRONG = [
    (r"\boxed{\frac{2}{3}}", r"\frac{1}{2}"),
    (r"$\{1, 2\}$", r"\{1,2,3\}"),
    ("I do not know.", "3"),
    ("", "3"),
    ("4", "-4"),
    (r"\boxed{", "3"),
    (r"either \boxed{3} or \boxed{4}", "4"),  # math-verify takes several boxes for a set
    ("\x00\\frac{{{", "3"),
]


def test_outcome_grades_mathematics(outcome: Rewards) -> None:
    texts, golds = zip(*RIGHT, *WRONG, strict=True)
    rewarded = outcome(make_rollout(texts, golds))
    graded = dict(zip(texts, rewarded.rewards_nk[:, 0].tolist(), strict=True))
    assert graded == {**{text: 1.0 for text, _ in RIGHT}, **{text: 0.0 for text, _ in WRONG}}
    assert rewarded.names == ("outcome",)
    assert (rewarded.timeouts, rewarded.unscorable) == (0, 0)


def test_outcome_of_a_huge_power_is_0_and_the_next_completion_is_graded() -> None:
    with load_rewards(RewardConfig(functions=("outcome",), timeout=4.0)) as rewards:
        rewarded = rewards(make_rollout([r"\boxed{5}", "$10^{10^{10}}$", r"\boxed{5}"], ["5"]))
    assert rewarded.rewards_nk[:, 0].tolist() == [1.0, 0.0, 1.0]
    assert rewarded.timeouts == 1


def test_outcome_checks_gold_answers_before_training(outcome: Rewards) -> None:
    outcome.check([Example(0, "", "72"), Example(1, "", r"\frac{1}{2}")])
    with pytest.raises(RewardError, match=r"outcome cannot use the gold answer '' of example 1: .*\(1 of 2 rows"):
        outcome.check([Example(0, "", "72"), Example(1, "", "")])


def test_user_function_sees_a_prompt_at_a_time(tmp_path: Path) -> None:
    body = """
        def f(texts, examples):
            assert len({e.index for e in examples}) == 1
            return [None if t == "?" else len(texts) * 100 + int(t) - int(e.answer) for t, e in zip(texts, examples)]
    """
    with user_reward(tmp_path, body) as rewards:
        rewarded = rewards(make_rollout(["4", "5", "?", "7"], ["1", "2"]))
    assert rewarded.rewards_nk[:2, 0].tolist() == [203.0, 204.0]
    assert rewarded.rewards_nk[2, 0].isnan()
    assert rewarded.rewards_nk[3, 0] == 205.0
    assert rewarded.unscorable == 1


def test_worker_is_reused_and_starts_lazily_and_without_torch(tmp_path: Path) -> None:
    body = f"""
        import os, sys
        open({str(tmp_path / "started")!r}, "a").write(f"{{os.getpid()}}\\n")
        from fastlora.rewards import outcome
        import helper
        def f(texts, examples):
            return [float("torch" in sys.modules)] * len(texts)
    """
    (tmp_path / "helper.py").write_text("")  # a file beside the user's can be imported
    with user_reward(tmp_path, body) as rewards:
        assert not (tmp_path / "started").exists()
        for _ in range(3):
            assert rewards(make_rollout(["a", "b"], ["1"])).rewards_nk.tolist() == [[0.0], [0.0]]
        [pid] = (tmp_path / "started").read_text().split()
    assert gone(int(pid), 5.0)


def test_user_function_that_raises_is_named_with_its_example(tmp_path: Path) -> None:
    body = """
        def f(texts, examples):
            return [1 / int(e.answer) for e in examples]
    """
    with user_reward(tmp_path, body) as rewards:
        with pytest.raises(RewardError, match=r"mine\.py:f raised ZeroDivisionError: .*mine\.py:3.* example 101"):
            rewards(make_rollout(["a"] * 4, ["1", "0"]))
        assert rewards(make_rollout(["a"], ["2"])).rewards_nk.item() == 0.5  # the worker has outlived it


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("[1.0]", r"mine\.py:f gave \[1\.0\] for 2 completions of example 100"),
        ("1.0", r"TypeError: returned a float where a list is wanted"),
        ("['a', 'b']", r"gave \['a', 'b'\]"),
        ("[1.0, float('inf')]", r"returned inf \(float\)"),
        ("[object(), 1]", r"returned <object .*\(object\)"),
        ("(x for x in texts)", r"returned a generator"),
    ],
)
def test_user_function_with_a_wrong_result_is_refused(tmp_path: Path, returned: str, message: str) -> None:
    body = f"def f(texts, examples): return {returned}"
    with user_reward(tmp_path, body) as rewards, pytest.raises(RewardError, match=message):
        rewards(make_rollout(["a", "b"], ["1"]))


DEEDS = (
    "time.sleep(1000)",
    "10 ** 10 ** 10",
    "signal.signal(signal.SIGALRM, signal.SIG_IGN), time.sleep(1000)",
    "os._exit(0)",
    "sys.exit()",
    "os.kill(os.getpid(), 9)",
)


@pytest.mark.parametrize("deed", DEEDS)
def test_only_the_guilty_completion_scores_0(tmp_path: Path, deed: str) -> None:
    body = f"""
        import os, signal, sys, time
        def f(texts, examples):
            for t in texts:
                if t == "bad":
                    {deed}
            return [1.0] * len(texts)
    """
    with user_reward(tmp_path, body, timeout=1.0) as rewards:
        rewarded = rewards(make_rollout(["good", "bad", "good"], ["1"]))
        assert rewarded.rewards_nk[:, 0].tolist() == [1.0, 0.0, 1.0]
        assert rewarded.timeouts == 1
        again = rewards(make_rollout(["good"], ["1"]))
        assert (again.rewards_nk.item(), again.timeouts) == (1.0, 0)


def test_function_that_never_answers_is_an_error(tmp_path: Path) -> None:
    message = r"mine\.py:f hangs or dies: .*example 100.*reward\.timeout"
    with (
        user_reward(tmp_path, "import os\ndef f(texts, examples): os._exit(1)") as rewards,
        pytest.raises(RewardError, match=message),
    ):
        rewards(make_rollout(["a"] * 8, ["1"]))


def test_processes_that_a_killed_function_started_die_with_it(tmp_path: Path) -> None:
    body = f"""
        import subprocess, time
        def f(texts, examples):
            child = subprocess.Popen(["sleep", "1000"])
            open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
            time.sleep(1000)
    """
    with user_reward(tmp_path, body, timeout=1.0) as rewards:
        assert rewards(make_rollout(["a"], ["1"])).rewards_nk.item() == 0.0
    assert gone(int((tmp_path / "pid").read_text()), 5.0)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def g(texts, examples): ...", r"mine\.py:f: cannot be loaded:(?s:.*)has no attribute 'f'"),
        ("import no_such_module_at_all", r"cannot be loaded:(?s:.*)no_such_module_at_all"),
        ("def f(:", r"cannot be loaded:(?s:.*)SyntaxError"),
        ("import os; os._exit(3)", "did not start"),
    ],
)
def test_file_that_cannot_be_loaded_is_refused_before_training(tmp_path: Path, body: str, message: str) -> None:
    with user_reward(tmp_path, body) as rewards, pytest.raises(RewardError, match=message):
        rewards.check([])


PARENT = """
import sys
from fastlora.config import RewardConfig
from fastlora.rewards.registry import load_rewards
from tests.rewards.rollouts import make_rollout
load_rewards(RewardConfig(functions=(sys.argv[1],), timeout=float(sys.argv[2])))(make_rollout(["a"], ["1"]))
"""


def start_parent(tmp_path: Path, deed: str, timeout: float) -> tuple[subprocess.Popen[str], int]:
    """A process in the middle of a reward call that does not return, and the id of its worker."""
    (tmp_path / "mine.py").write_text(
        textwrap.dedent(f"""
        import os, time
        def f(texts, examples):
            open({str(tmp_path / "half")!r}, "w").write(str(os.getpid()))
            os.rename({str(tmp_path / "half")!r}, {str(tmp_path / "pid")!r})
            {deed}
    """)
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, f"{tmp_path / 'mine.py'}:f", str(timeout)],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60.0
    while not (tmp_path / "pid").exists():
        assert time.monotonic() < deadline and parent.poll() is None, parent.communicate()
        time.sleep(0.05)
    return parent, int((tmp_path / "pid").read_text())


def test_ctrl_c_ends_parent_and_worker_without_a_second_traceback(tmp_path: Path) -> None:
    parent, worker = start_parent(tmp_path, "time.sleep(1000)", 60.0)
    os.kill(worker, signal.SIGINT)
    time.sleep(0.2)
    assert not gone(worker, 0.2)
    os.killpg(parent.pid, signal.SIGINT)
    _, errors = parent.communicate(timeout=30)
    assert errors.count("Traceback") == 1
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert gone(worker, 5.0)


def test_killed_parent_leaves_no_orphan_even_inside_c_code(tmp_path: Path) -> None:
    """Nothing in Python can interrupt 10 ** 10 ** 10; the kernel's alarm ends the worker a second after its limit."""
    parent, worker = start_parent(tmp_path, "10 ** 10 ** 10", 1.5)
    parent.kill()
    parent.communicate()
    assert gone(worker, 20.0)
