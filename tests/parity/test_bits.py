"""Every case of tests/parity/cases.py has Δ = 0 on the reference path, in fp32 on a CPU."""

from __future__ import annotations

import pytest

from tests.parity.cases import CASES


@pytest.mark.parametrize("case", CASES, ids=[f"{section.split(':')[0]}: {name}" for section, name in CASES])
def test_bits(case: tuple[str, str]) -> None:
    delta = CASES[case]()
    assert delta.numbers > 0
    assert delta.max_ulp == 0 and delta.max_abs == 0.0, delta
