"""docs/parity.md, as committed, lists the cases that the tests run, and claims no difference where they allow none."""

from __future__ import annotations

import re

from tests.parity.cases import CASES
from tests.parity.table import FAST_PATH_ROWS, TABLE
from tests.tolerances import FAST_PATH_ERROR_FACTOR


def _rows() -> list[list[str]]:
    """Cells of every table row, section titles as rows of one cell."""
    lines = [line for line in TABLE.read_text().splitlines() if re.match(r"\| |## ", line)]
    return [[line[3:]] if line.startswith("## ") else [cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_every_case_is_listed_once_and_nothing_else() -> None:
    listed, section = [], ""
    for cells in _rows():
        if len(cells) == 1:
            section = cells[0]
        elif len(cells) == 4 and cells[0] != "case":
            listed.append((section, cells[0]))
            assert cells[2:] == ["0", "0"], f"{cells[0]} is listed with a difference"
            assert int(cells[1].replace(",", "")) > 0
    assert listed == list(CASES), "docs/parity.md is out of date: python -m tests.parity.table"


def test_fast_path_rows_are_within_the_rule() -> None:
    rows = {cells[0]: cells for cells in _rows() if len(cells) == 7 and cells[0] != "model, dtype"}
    assert list(rows) == list(FAST_PATH_ROWS), "docs/parity.md is out of date: python -m tests.parity.table"
    assert all(float(ratio) <= FAST_PATH_ERROR_FACTOR for cells in rows.values() for ratio in (cells[3], cells[6]))
