"""`exact_match`: 1 if the completion is the gold answer, white space at both ends aside, else 0."""

from __future__ import annotations

from collections.abc import Sequence

from fastlora.types import Example


def score(texts: Sequence[str], examples: Sequence[Example]) -> list[float | None]:
    """One 1 or 0 per completion."""
    return [float(text.strip() == example.answer.strip()) for text, example in zip(texts, examples, strict=True)]


def gold_problems(answers: Sequence[str]) -> list[str | None]:
    """Why each gold answer cannot be used; None = it can."""
    return [None if answer.strip() else "it is empty" for answer in answers]
