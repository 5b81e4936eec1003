"""Names of rewards: what is built in, what is refused, several at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastlora.config import RewardConfig
from fastlora.rewards.deposits import RewardError
from fastlora.rewards.registry import BUILT_IN, load_grader, load_rewards
from fastlora.types import Example
from tests.rewards.rollouts import make_rollout


def test_several_rewards_with_weights() -> None:
    config = RewardConfig(functions=("format", "first_integer"), weights=(0.5, 2.0), format_pattern=r"<a>.*</a>")
    with load_rewards(config) as rewards:
        rewarded = rewards(make_rollout(["<a>7</a>", "7", "<a></a>!", "<a>8</a>"], ["7"], [2, 1, 4, 3]))
    assert rewarded.names == ("format", "first_integer")
    assert rewarded.weights_k.tolist() == [0.5, 2.0]
    assert rewarded.rewards_nk.tolist() == [[1, 1], [0, 1], [0, 0], [1, 0]]
    assert rewarded.deposits.trajectory_rewards_n.tolist() == [2.5, 2.0, 0.0, 0.5]
    assert rewarded.deposits.token_rewards_nt.tolist() == [[0, 2.5, 0, 0], [2.0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0.5, 0]]


def test_a_pattern_that_backtracks_for_ever_scores_0() -> None:
    config = RewardConfig(functions=("format",), format_pattern=r"(a+)+b", timeout=1.0)
    with load_rewards(config) as rewards:
        rewarded = rewards(make_rollout(["aab", "a" * 60], ["7"]))
    assert rewarded.rewards_nk[:, 0].tolist() == [1.0, 0.0]
    assert rewarded.timeouts == 1


def test_the_default_format() -> None:
    with load_rewards(RewardConfig(functions=("format",))) as rewards:
        good = "<reasoning>\n1 + 1\n</reasoning>\n<answer>\n2\n</answer>\n"
        rewarded = rewards(make_rollout([good, good.replace("</answer>", ""), "said: " + good, ""], ["2"]))
    assert rewarded.rewards_nk[:, 0].tolist() == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_name_loads_and_closes(name: str) -> None:
    with load_rewards(RewardConfig(functions=(name,))) as rewards:
        assert rewards.names == (name,)
        assert rewards.weights_k.tolist() == [1.0]


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        (("outcom",), "'outcom' is unknown; did you mean outcome?"),
        (("xyzzy",), "built in are outcome, exact_match"),
        (("mine.py",), "one's own is written path/to/file.py:function"),
        (("mine.py:",), "one's own is written"),
        (("no/such/file.py:f",), "no such file as /.*no/such/file.py"),
        (("gsm8k", "gsm8k"), "names gsm8k twice"),
        (("proces",), "did you mean process?"),
        (("process",), "process runs a language model beside the one that trains, and there is none here"),
        (("distillation",), "distillation runs a language model"),
    ],
)
def test_names_that_are_refused(functions: tuple[str, ...], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        load_rewards(RewardConfig(functions=functions))


def test_invalid_format_pattern_is_refused() -> None:
    with pytest.raises(RewardError, match=r"reward\.format_pattern = '\(' is no regular expression"):
        load_rewards(RewardConfig(functions=("format",), format_pattern="("))


def test_gold_answers_are_checked_by_every_reward(tmp_path: Path) -> None:
    rewards = load_rewards(RewardConfig(functions=("exact_match", "first_integer")))
    rewards.check([Example(0, "", "7")])
    with pytest.raises(RewardError, match=r"first_integer cannot use the gold answer 'x' of example 4: it is not an integer \(2 of 3"):
        rewards.check([Example(3, "", "7"), Example(4, "", "x"), Example(5, "", "y")])


def test_the_grader_is_the_first_function_or_the_one_that_is_named() -> None:
    first = load_rewards(RewardConfig(functions=("exact_match", "gsm8k")))
    assert first.grader is first.functions[0]
    second = load_rewards(RewardConfig(functions=("exact_match", "gsm8k"), grader="gsm8k"))
    assert second.grader is second.functions[1]
    config = RewardConfig(functions=("exact_match",), grader="first_integer")
    for rewards in (load_rewards(config), load_grader(config)):
        assert rewards.grader.name == "first_integer"
        with pytest.raises(RewardError, match="first_integer cannot use the gold answer 'x'"):
            rewards.check([Example(0, "", "x")])
    assert load_rewards(config).names == ("exact_match",)
    assert load_grader(RewardConfig(functions=("process",), grader="gsm8k")).grader.name == "gsm8k"  # and no model is loaded
