"""The built-in scorers that read numbers and strings, against hand-written cases and the real GSM8K."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlora.rewards import exact_match, first_integer, gsm8k
from fastlora.types import Example

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"


def score_one(module: object, text: str, gold: str) -> float | None:
    [score] = module.score([text], [Example(0, "", gold)])  # type: ignore[attr-defined]
    return score


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("He has 48+24 = 72 clips.\n#### 72", "72"),
        ("#### 72.0", "72"),
        ("#### 72.", "72"),
        ("#### 1,234", "1234"),
        ("#### 1234", "#### 1,234"),
        ("#### $1,234,567.50", "1234567.5"),
        ("#### -3 dollars", "-3"),
        ("#### -$3", "-3"),
        ("#### $-3", "-3"),
        ("#### −3", "-3"),
        (r"#### \$18", "18"),
        ("####18", "18"),
        ("#### x = 18 eggs", "18"),
        ("#### 18\n\nQuestion: and then?\n#### 5", "18"),  # the first mark counts; what is rambled on does not
        ("The answer is 18.", "18"),
        ("first 3, then 10-3 = 7", "7"),
        ("it falls by 10-3", "3"),  # a difference, not minus three
        ("(a)-3", "3"),
        ("about .5", "0.5"),
        ("18 \n####", "18"),  # a mark without a number
        pytest.param("#### " + "9" * 5000, "9" * 5000, id="longer than int() reads"),
        ("007", "7"),
    ],
)
def test_gsm8k_right(text: str, gold: str) -> None:
    assert score_one(gsm8k, text, gold) == 1.0


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("#### 72", "73"),
        ("#### 72.01", "72"),
        ("72\n#### 71", "72"),
        ("#### -3", "3"),
        ("#### 1,234", "1"),
        ("18 or 19", "18"),
        ("eighteen", "18"),
        ("", "18"),
        ("####", "18"),
    ],
)
def test_gsm8k_wrong(text: str, gold: str) -> None:
    assert score_one(gsm8k, text, gold) == 0.0


@given(
    st.decimals(min_value=-(10**9), max_value=10**9, places=2),
    st.sampled_from(["{:,}", "{}"]),
    st.sampled_from(["#### {}", "so the total is {}", "#### {} eggs", "is {}."]),
)
def test_gsm8k_reads_what_was_written(value: Decimal, number_format: str, sentence: str) -> None:
    text = sentence.format(number_format.format(value))
    assert gsm8k.answer(text) == value
    assert score_one(gsm8k, text, str(value + 1)) == 0.0


@pytest.mark.parametrize("split", ["test", "train"])
def test_gsm8k_real_data(split: str) -> None:
    """Every gold answer parses, to what the data set's own expression reads (Cobbe et al., grade_school_math/dataset.py)."""
    path = GSM8K / f"{split}.jsonl"
    if not path.is_file():
        pytest.skip("GSM8K is not in ../shared/data/gsm8k beside the repository")
    solutions = [json.loads(line)["answer"] for line in path.read_text().splitlines()]
    assert len(solutions) == {"test": 1319, "train": 7473}[split]
    golds = [re.search(r"#### (\-?[0-9\.\,]+)", solution)[1].replace(",", "") for solution in solutions]  # type: ignore[index]
    texts = [gsm8k.gold_text(solution) or "" for solution in solutions]
    assert gsm8k.gold_problems(texts) == [None] * len(texts)
    assert [gsm8k.number(text) for text in texts] == [Decimal(gold) for gold in golds]
    own = [Example(i, "", text) for i, text in enumerate(texts)]
    assert gsm8k.score(solutions, own) == [1.0] * len(own)
    off_by_one = [Example(i, "", str(Decimal(gold) + 1)) for i, gold in enumerate(golds)]
    assert gsm8k.score(solutions, off_by_one) == [0.0] * len(own)


@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        (" 7", "7", True),
        (" 7 and 8", "7", True),
        (" 8 and 7", "7", False),
        ("-4", "-4", True),
        (" 4", "-4", False),
        ("72", "7", False),
        ("007", "7", True),
        ("none", "7", False),
        ("", "7", False),
        pytest.param("1" * 5000, "7", False, id="longer than int() reads"),
        ("٧", "7", False),  # an Arabic-Indic seven: the gold answers are ASCII
    ],
)
def test_first_integer(text: str, gold: str, right: bool) -> None:
    assert score_one(first_integer, text, gold) == float(right)


def test_exact_match() -> None:
    assert [score_one(exact_match, text, " ab c\n") for text in ("ab c", "\nab c ", "abc", "")] == [1.0, 1.0, 0.0, 0.0]


def test_unusable_gold_answers_are_told() -> None:
    assert gsm8k.gold_problems(["#### 1,234", "many"]) == [None, "there is no number in it"]
    assert first_integer.gold_problems(["-4", "7.5", ""]) == [None, "it is not an integer", "it is not an integer"]
    assert exact_match.gold_problems(["x", " "]) == [None, "it is empty"]
