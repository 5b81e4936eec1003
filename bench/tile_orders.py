"""Other orders in which the programs of a launch could start, and what each would move: the yardstick of the kernels' own order.

The programs of a launch are a matrix, rows of tokens × columns. Order g: g rows of tiles together, column by column, then the next g. Order
1 is row by row, as many as there are rows is column by column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bench.l2 import Memory
from bench.rows import Row
from fastlora_triton.launch import use_launcher

GROUPS = (1, 2, 4, 8, 16, 22, 32, 64, 128)
AS_LAUNCHED = "as launched"


def search(part: Callable[[], Any]) -> list[Row]:
    """Of every launch of a part whose programs are a matrix: {"kernel", "orders": name -> [bytes from memory at 25 MB, at 50 MB]}."""
    rows: list[Row] = []

    def every_order(kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
        orders = {AS_LAUNCHED: moved(Memory(), kernel, grid, args, options)}
        for name, order, plain in other_orders(grid, args, options):
            orders[name] = moved(Memory(order=lambda _, order=order: order), kernel, grid, args, plain)
        rows.append({"kernel": kernel.__name__, "orders": orders})

    with use_launcher(every_order):
        part()
    return rows


def moved(memory: Memory, kernel: Any, grid: Sequence[int], args: Sequence[Any], options: dict[str, Any]) -> list[int]:
    """Bytes at 25 MB and at 50 MB."""
    traffic = memory.launch(kernel, grid, *args, **options)
    return [traffic.dram_25, traffic.dram_50]


def other_orders(grid: Sequence[int], args: Sequence[Any], options: dict[str, Any]) -> Iterator[tuple[str, list[int], dict[str, Any]]]:
    """(name, program ids, the launch's options). A kernel with ROW_GROUP maps its programs itself: at 1 they are row by row."""
    if len(grid) == 2:
        rows, columns = grid
        step_of_a_row, step_of_a_column, plain = 1, rows, options
    elif "ROW_GROUP" in options:
        rows = -(-len_of_rows(args) // options["BLOCK_T"])
        columns = grid[0] // rows
        step_of_a_row, step_of_a_column, plain = columns, 1, {**options, "ROW_GROUP": 1}
    else:
        return
    for g in (g for g in GROUPS if g <= rows):
        first_rows = range(0, rows, g)
        yield (
            str(g),
            [
                row * step_of_a_row + column * step_of_a_column
                for first in first_rows
                for column in range(columns)
                for row in range(first, min(first + g, rows))
            ],
            plain,
        )


def len_of_rows(args: Sequence[Any]) -> int:
    """Tokens: the rows of the first descriptor, of x or of the first dy."""
    first = args[0]
    return (first[0] if isinstance(first, tuple) else first).shape[0]
