"""`format`: 1 if the whole completion matches the regular expression `reward.format_pattern`, else 0.

Runs in the sandbox's worker: a pattern can backtrack for ever on a text that nearly matches.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastlora.types import Example


def score(texts: Sequence[str], examples: Sequence[Example], *, pattern: str) -> list[float | None]:
    """One 1 or 0 per completion."""
    return [float(re.fullmatch(pattern, text) is not None) for text in texts]
