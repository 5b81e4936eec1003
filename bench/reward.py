"""A reward that is random, has a spread in every group, and is the same number for the same text in every library."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any


def hashed(texts: Sequence[str], examples: Sequence[Any]) -> list[float]:
    """CRC-32 of each completion, scaled into [0, 1]; `examples` are ignored (fastlora's signature of a user's reward)."""
    return [zlib.crc32(text.encode()) / 0xFFFFFFFF for text in texts]
