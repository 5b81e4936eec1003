"""`outcome`: 1 if math-verify finds the completion's final answer mathematically equal to the gold answer, else 0.

Runs in the sandbox's worker only: math-verify's own time limit needs signals in the main thread, so it is switched off here and
the worker is killed instead. The worker imports this file by its path, without the rest of fastlora.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from math_verify import parse, verify

if TYPE_CHECKING:
    from fastlora.types import Example

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns about the missing time limit at every start


def score(texts: Sequence[str], examples: Sequence[Example]) -> list[float | None]:
    """One 1 or 0 per completion."""
    return [float(is_correct(text, example.answer)) for text, example in zip(texts, examples, strict=True)]


def is_correct(text: str, gold: str) -> bool:
    """The completion's answer is what math-verify takes for it: all its boxes as a set, else its last formula or number.

    So a second box with another answer is wrong, and betting on two does not pay.
    """
    return verify(list(parse_gold(gold)), parse(text, parsing_timeout=None), timeout_seconds=None)


def gold_problems(answers: Sequence[str]) -> list[str | None]:
    """Why each gold answer cannot be used; None = it can."""
    return [None if parse_gold(answer) else "math-verify reads nothing in it" for answer in answers]


@lru_cache(maxsize=1024)
def parse_gold(gold: str) -> tuple[Any, ...]:
    """What math-verify makes of a gold answer (sympy expressions, and its text last); kept, as all of a group share it."""
    return tuple(parse(f"\\boxed{{{gold}}}", parsing_timeout=None))
