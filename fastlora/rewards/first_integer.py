"""`first_integer`: 1 if the first integer of the completion equals the gold answer, else 0.

For prompts that end in `4 + 3 =`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

from fastlora.types import Example

_INTEGER = re.compile(r"-?[0-9]+")


def score(texts: Sequence[str], examples: Sequence[Example]) -> list[float | None]:
    """One 1 or 0 per completion. Decimal compares numbers of any length; int() refuses text of more than 4,300 digits."""
    found = [_INTEGER.search(text) for text in texts]
    return [
        float(match is not None and Decimal(match[0]) == Decimal(example.answer)) for match, example in zip(found, examples, strict=True)
    ]


def gold_problems(answers: Sequence[str]) -> list[str | None]:
    """Why each gold answer cannot be used; None = it can."""
    return [None if _INTEGER.fullmatch(answer.strip()) else "it is not an integer" for answer in answers]
