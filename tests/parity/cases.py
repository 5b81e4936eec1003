"""Every bit-for-bit case of tests/parity, by section and name: what the tests run and what docs/parity.md lists."""

from __future__ import annotations

from collections.abc import Callable

from tests.parity import file_cases, peft_cases, training_cases, trl_cases
from tests.parity.delta import Delta

SECTIONS = {
    "PEFT layers: logits, gradient of every A and B": peft_cases.cases,
    "PEFT files: logits": file_cases.cases,
    "TRL loss: advantages, loss of every micro-batch, gradient of every A and B": trl_cases.cases,
    "TRL training, ten optimizer steps: gradient norms, every A and B": training_cases.cases,
}
"""Title -> generator of (name, comparison)."""

CASES: dict[tuple[str, str], Callable[[], Delta]] = {
    (section, name): compare for section, generate in SECTIONS.items() for name, compare in generate()
}
"""(section, name) -> comparison."""
