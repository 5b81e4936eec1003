"""Which bytes a kernel asks for, counted by hand for small kernels, and checked against the values that a full run depends on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton kernels need triton")

from triton.tools.tensor_descriptor import TensorDescriptor

from bench.l2 import Memory
from bench.triton_cpu.launch import LaunchError, on_cpu
from bench.triton_cpu.trace import needed_values
from fastlora_triton import lora_linear
from fastlora_triton.launch import use_launcher
from tests.triton_cpu import kernels

LOAD, STORE = 1, 2
Run = tuple[int, ...]


def accesses(kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> tuple[Memory, list[Run]]:
    memory = Memory()
    return memory, memory.accesses(kernel, grid, *args, **options)


def test_masked_copy() -> None:
    """Program 1 has 36 of its 64 elements: 4 bytes each, one row of each tensor."""
    x, y = torch.zeros(100), torch.zeros(100)
    memory, found = accesses(kernels.double_kernel, (2,), x, y, 100, BLOCK=64)
    at_x, at_y = memory.address(x), memory.address(y)
    assert found == [
        (0, LOAD, at_x, 0, 1, 256),
        (0, STORE, at_y, 0, 1, 256),
        (1, LOAD, at_x + 256, 0, 1, 144),
        (1, STORE, at_y + 256, 0, 1, 144),
    ]


def test_a_program_without_an_element_asks_for_nothing() -> None:
    _, found = accesses(kernels.double_kernel, (3,), torch.zeros(100), torch.zeros(100), 100, BLOCK=64)
    assert {program for program, *_ in found} == {0, 1}


def test_blocks_of_descriptors_end_with_their_tensor() -> None:
    """x [63, 72] in blocks of [64, 32]: 63 rows, the third block 8 columns wide. y [63, 40]."""
    x, w, y = (torch.zeros(*shape, dtype=torch.bfloat16) for shape in ((63, 72), (40, 72), (63, 40)))
    descriptors = [TensorDescriptor.from_tensor(t, block) for t, block in ((x, [64, 32]), (w, [64, 32]), (y, [64, 64]))]
    memory, found = accesses(kernels.product_kernel, (1, 1), *descriptors, 72, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, PRECISION="ieee")
    at_x, at_w, at_y = (memory.address(t) for t in (x, w, y))
    steps = [((at_x + 64 * k, 63), (at_w + 64 * k, 40), 64 if k < 2 else 16) for k in range(3)]
    expected = [(0, LOAD, first, 144, rows, width) for *sides, width in steps for first, rows in sides]
    assert found == [*expected, (0, STORE, at_y, 80, 63, 80)]


def test_addresses_follow_a_table_and_a_carried_pointer() -> None:
    table = torch.tensor([[32, 2], [0, 1], [64, 0]], dtype=torch.int32)
    scale, x, y = torch.ones(1), torch.zeros(128), torch.zeros(96)
    memory, found = accesses(kernels.through_table_kernel, (3,), table, scale, x, y, 30, BLOCK=32)
    at_x, at_y = memory.address(x), memory.address(y)
    of_x = [(program, first) for program, _, first, *_ in found if at_x <= first < at_x + 512]
    assert of_x == [(0, at_x + 128), (0, at_x + 256), (1, at_x)]
    assert {run[3:] for run in found if at_x <= run[2] < at_x + 512} == {(0, 1, 120)}
    assert [run for run in found if run[1] == STORE] == [(p, STORE, at_y + 128 * p, 0, 1, 128) for p in range(3)]


def test_a_tile_read_column_by_column_asks_once_for_every_row() -> None:
    x, y = torch.zeros(16, 100), torch.zeros(8, 16)
    memory, found = accesses(kernels.column_major_kernel, (1,), x, y, 100, ROWS=16, COLUMNS=8)
    assert found == [(0, LOAD, memory.address(x), 400, 16, 32), (0, STORE, memory.address(y), 0, 1, 512)]


def test_an_atomic_operation_loads_and_stores() -> None:
    x, y = torch.zeros(100), torch.zeros(1)
    memory, found = accesses(kernels.atomic_sum_kernel, (1,), x, y, 100, BLOCK=128)
    assert found == [(0, LOAD, memory.address(x), 0, 1, 400), (0, LOAD | STORE, memory.address(y), 0, 1, 4)]


def test_a_branch_that_is_not_taken_asks_for_nothing() -> None:
    inputs, y = tuple(torch.zeros(20) for _ in range(3)), torch.zeros(20)
    memory, found = accesses(kernels.chosen_kernel, (1,), inputs, y, 1, 20, BLOCK=32)
    assert [first for _, _, first, *_ in found] == [memory.address(inputs[1]), memory.address(y)]


def test_leaving_a_tensor_is_reported_with_program_and_tensor() -> None:
    with pytest.raises(LaunchError, match=r"unmasked_kernel: program 1: load out of bounds: x_ptr \(100,\)"):
        accesses(kernels.unmasked_kernel, (2,), torch.zeros(100), torch.zeros(128), 100, BLOCK=64)


def test_values_that_only_change_values_are_left_out() -> None:
    """A loop carries a pointer, a sum and a counter's bound: the sum is not needed, and what it is made of neither."""
    lines = [
        "%c1 = arith.constant 1 : i32",
        "%zero = arith.constant 0.0 : f32",
        "%times = tt.load %table : !tt.ptr<i32>",
        "%r:2 = scf.for %i = %c0 to %times step %c1 iter_args(%p = %x, %sum = %zero) -> (!tt.ptr<f32>, f32)  : i32 {",
        "%value = tt.load %p : !tt.ptr<f32>",
        "%more = arith.addf %sum, %value : f32",
        "%next = tt.addptr %p, %c1 : !tt.ptr<f32>, i32",
        "scf.yield %next, %more : !tt.ptr<f32>, f32",
        "}",
        "tt.store %y, %r#1 : !tt.ptr<f32>",
    ]
    assert needed_values(lines) == {"%c1", "%times", "%table", "%c0", "%p", "%x", "%next", "%r#0", "%y"}


@pytest.mark.parametrize("ranks", [(17, 0, 3), (16, 1, 5)])
def test_what_a_full_run_touches_is_what_is_counted(ranks: tuple[int, ...]) -> None:
    """A group's launches, run on the CPU: x and the weights lie between rows that are not to be read. NaN there changes nothing, and they
    are not counted; NaN in any other element reaches an output, and they are. Every element that was written is counted as stored."""
    t, d, outs, scales = 70, 72, (40, 8, 24), [1.0, 2.0, 3.0]
    sizes = {"x": t * d, "w": sum(outs) * d, "a": sum(ranks) * d, "b": sum(n * r for n, r in zip(outs, ranks, strict=True))}
    whole = {name: torch.cat([nans(64), torch.randn(n), nans(64)]) for name, n in sizes.items()}

    def group(whole: dict[str, Tensor]) -> list[Tensor]:
        x, w, a, b = (tensor[64:-64] for tensor in whole.values())
        return lora_linear.forward(x.view(-1, d), w.view(-1, d), None, a.view(-1, d), b, outs, ranks, scales)[0]

    with on_cpu():
        assert not any(y.isnan().any() for y in group(whole))
        for name, n in sizes.items():
            for element in torch.randint(n, (2,)).tolist():
                poisoned = whole | {name: whole[name].clone()}
                poisoned[name][64 + element] = float("nan")
                assert any(y.isnan().any() for y in group(poisoned)), f"{name}: element {element} does not matter"
    memory, runs, ys = Memory(), [], []

    def count(kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
        runs.extend(memory.accesses(kernel, grid, *args, **options))

    with use_launcher(count):
        ys = group(whole)
    for name, tensor in whole.items():
        read = touched(memory, tensor, runs, LOAD)
        assert read[64:-64].all() and not read[:64].any() and not read[-64:].any(), name
    assert all(touched(memory, y, runs, STORE).all() for y in ys)


def nans(n: int) -> Tensor:
    return torch.full((n,), float("nan"))


def touched(memory: Memory, tensor: Tensor, runs: Sequence[Run], kind: int) -> Tensor:
    """Which elements of a tensor the runs of a kind cover."""
    covered = torch.zeros(tensor.numel(), dtype=torch.bool)
    size, first = tensor.element_size(), memory.address(tensor)
    for _, kind_of_run, start, stride, rows, width in runs:
        if kind_of_run & kind and first <= start < first + tensor.numel() * size:
            for row in range(rows):
                at = (start + row * stride - first) // size
                covered[at : at + width // size] = True
    return covered
