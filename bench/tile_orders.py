"""Other orders in which the programs of a launch could start, and what each would move: the yardstick of the kernels' own order.

The programs of a launch are a matrix, rows of tokens × columns. Order g: g rows of tiles together, column by column, then the next g. Order
1 is row by row, as many as there are rows is column by column. "back": every other group goes through its columns backwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bench.l2 import Memory
from bench.rows import Row
from fastlora_triton.launch import use_launcher

GROUPS = (1, 8, 16, 22, 32, 64)
AS_LAUNCHED = "as launched"
NEAR = 1.02
"""× compulsory: a launch within it has nothing to gain, and is not tried in other orders."""


def search(part: Callable[[], Any]) -> list[Row]:
    """Of every launch of a part whose programs are a matrix: {"kernel", "orders": name -> [bytes from memory at 25 MB, at 50 MB]}."""
    rows: list[Row] = []

    def every_order(kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
        own = Memory().launch(kernel, grid, *args, **options)
        orders = {AS_LAUNCHED: [own.dram_25, own.dram_50]}
        if max(own.dram_25, own.dram_50) > NEAR * own.compulsory:
            for name, order, plain in other_orders(grid, args, options):
                traffic = Memory(order=lambda _, order=order: order).launch(kernel, grid, *args, **plain)
                orders[name] = [traffic.dram_25, traffic.dram_50]
        rows.append({"kernel": kernel.__name__, "orders": orders})

    with use_launcher(every_order):
        part()
    return rows


def other_orders(grid: Sequence[int], args: Sequence[Any], options: dict[str, Any]) -> Iterator[tuple[str, list[int], dict[str, Any]]]:
    """(name, program ids in their order, the launch's options)."""
    if len(grid) == 2:
        rows, columns = grid
        program, plain = [[row + rows * column for column in range(columns)] for row in range(rows)], options
    elif "ROW_GROUP" in options:
        # The kernel maps programs to tiles itself; in groups of one row it goes row by row, odd rows backwards.
        rows = -(-len_of_rows(args) // options["BLOCK_T"])
        columns, plain = grid[0] // rows, {**options, "ROW_GROUP": 1}
        in_a_row = range(columns)
        program = [[row * columns + column for column in (in_a_row if row % 2 == 0 else reversed(in_a_row))] for row in range(rows)]
    else:
        return
    for g in (g for g in GROUPS if g <= rows):
        for back in (False, True) if 8 < g < rows else (False,):
            yield f"{g}{' back' if back else ''}", [program[row][column] for row, column in tiles(rows, columns, g, back)], plain


def tiles(rows: int, columns: int, g: int, back: bool) -> Iterator[tuple[int, int]]:
    """(row, column) in order g."""
    for group, first in enumerate(range(0, rows, g)):
        for column in reversed(range(columns)) if back and group % 2 else range(columns):
            for row in range(first, min(first + g, rows)):
                yield row, column


def len_of_rows(args: Sequence[Any]) -> int:
    """Tokens: the rows of the first descriptor, of x or of the first dy."""
    first = args[0]
    return (first[0] if isinstance(first, tuple) else first).shape[0]
