"""`gsm8k`: the data set's own convention (Cobbe et al., arXiv 2110.14168): the number after `####` equals the gold one, 1 or 0.

A completion without `#### NUMBER` is judged by its last number. Numbers may carry thousands separators, a currency sign, a unit
and decimals: `$1,234.50`, `72.0`, `-3 dollars`. They are compared exactly, as decimals of any length.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

from fastlora.types import Example

_NUMBER = re.compile(
    r"""(?: (?<![\w)]) (?P<minus>[-−]) )?          # a minus sign, but not the one of 10-3 or (a)-3
        (?: \\?[$€£] (?P<inner>[-−])? )?           # $5, -$5, $-5, \$5
        (?P<digits> (?: [0-9]{1,3}(?:,[0-9]{3})+(?![0-9]) | [0-9]+ ) (?:\.[0-9]+)? | \.[0-9]+ )""",
    re.VERBOSE,
)
_MARK = re.compile(r"####(.*)")


def score(texts: Sequence[str], examples: Sequence[Example]) -> list[float | None]:
    """One 1 or 0 per completion."""
    return [float(is_correct(text, example.answer)) for text, example in zip(texts, examples, strict=True)]


def is_correct(text: str, gold: str) -> bool:
    """Whether the answer of a completion is the gold number, exactly."""
    found = answer(text)
    return found is not None and found == number(gold)


def answer(text: str) -> Decimal | None:
    """The first number behind the first `####` on its line, else the last number in the text, else None."""
    marked = gold_text(text)
    if marked is not None:
        return number(marked)
    *_, last = [None, *_NUMBER.finditer(text)]
    return None if last is None else _value(last)


def gold_text(text: str) -> str | None:
    """What stands behind the first `####` on its line, without white space; None if there is no number."""
    mark = _MARK.search(text)
    return mark[1].strip() if mark is not None and _NUMBER.search(mark[1]) else None


def number(text: str) -> Decimal | None:
    """The first number in the text; a leading `####` does no harm."""
    match = _NUMBER.search(text)
    return None if match is None else _value(match)


def gold_problems(answers: Sequence[str]) -> list[str | None]:
    """Why each gold answer cannot be used; None = it can."""
    return [None if number(text) is not None else "there is no number in it" for text in answers]


def _value(match: re.Match[str]) -> Decimal:
    magnitude = Decimal(match["digits"].replace(",", ""))
    return -magnitude if match["minus"] or match["inner"] else magnitude
