"""From the same TTIR as emit.py, what a kernel asks of memory and nothing else: C++ that lists the loads and stores of each program.

Kept is what addresses, masks, bounds of loops and branches depend on (a backward slice, `needed_values`). So the values of a tile table
are read when they place a tile; matrices are not read, products are counted and not computed, and exponentials and sums are left out. An
element of a kept tensor is computed when it is asked for: nothing but addresses is ever stored, and launches of real shapes take seconds.
"""

from __future__ import annotations

import re

from bench.triton_cpu.emit import Argument, Translation, Translator, Type, results_of, split

MEMORY = ("tt.load", "tt.store", "tt.descriptor_load", "tt.descriptor_store", "tt.atomic_rmw")
REDUCE = '"tt.reduce"'
VALUE = re.compile(r"%[\w.]+(?:#\d+)?")
LOOP = re.compile(r"scf\.for (%\S+) = (%\S+) to (%\S+) step (%\S+?)(?: iter_args\((.*?)\) -> .*|\s+.*)$")
DOT = re.compile(r"tt\.dot .* : tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x\w+> -> ")


def translate_trace(ttir: str) -> Translation:
    """Like emit.translate: `launch` counts what the launch moves, `list_accesses` lists it. Raises NotImplementedError."""
    return _Tracer(ttir).translate()


def needed_values(lines: list[str]) -> set[str]:
    """What addresses, masks, bounds and conditions are computed from."""
    needed: set[str] = set()
    carried = _carried(lines)
    size = -1
    while size != len(needed):  # a loop hands a value back to its own beginning: until nothing is added
        size = len(needed)
        for at in reversed(range(len(lines))):
            results, operation = results_of(lines[at])
            needed.update(_operands(operation, bool(needed.intersection(results))))
            for group in carried.get(at, ()):
                if needed.intersection(group):
                    needed.update(group)
    return needed


def _operands(operation: str, wanted: bool) -> list[str]:
    """What an operation needs, given whether one of its results is wanted."""
    if match := LOOP.match(operation):
        return [match[k] for k in (2, 3, 4)]
    values = VALUE.findall(operation)
    if operation.startswith("scf.if"):
        return values
    if operation.startswith("scf.yield"):
        return []  # decided for each value: `_carried`
    if operation.startswith(MEMORY):
        return _of_memory(operation, values, wanted)
    return values if wanted else []


def _of_memory(operation: str, values: list[str], wanted: bool) -> list[str]:
    """Pointer, mask, indices; what is stored or added is not needed, what stands in for a masked element only with the result."""
    if operation.startswith("tt.descriptor_store"):
        return values[:-1]
    if operation.startswith(("tt.store", "tt.atomic_rmw")):
        return [values[0], *values[2:]]
    return values if wanted or operation.startswith("tt.descriptor_load") else values[:2]


def _carried(lines: list[str]) -> dict[int, list[tuple[str, ...]]]:
    """Line of a loop, a branch or a reduction -> values that are needed together: a result, its start and what is yielded for it."""
    groups: dict[int, list[tuple[str, ...]]] = {}
    open_regions: list[int] = []
    for at, line in enumerate(lines):
        results, operation = results_of(line)
        if line.startswith("}") and open_regions:
            region = open_regions.pop()
        if line.startswith("} else"):
            open_regions.append(region)
        elif line.endswith("{"):
            open_regions.append(at)
            loop = LOOP.match(operation)
            starts = [part.split(" = ") for part in split(loop[5] or "")] if loop else [[]] * len(results)
            groups[at] = [(result, *start) for result, start in zip(results, starts, strict=True)]
        elif operation.startswith("scf.yield "):
            values = split(operation.removeprefix("scf.yield ").split(" : ")[0])
            owner = groups[open_regions[-1]]
            owner[:] = [(*group, value) for group, value in zip(owner, values, strict=True)]
    return groups


class _Tracer(Translator):
    def __init__(self, ttir: str) -> None:
        super().__init__(ttir)
        self.needed = needed_values(self.lines)

    def wanted(self, value: str) -> bool:
        return value in self.needed

    def operation(self, at: int) -> int:
        results, operation = results_of(self.lines[at])
        if match := DOT.match(operation):
            self.code.append(f"trace.flops += {2 * int(match[1]) * int(match[2]) * int(match[3])};")
        if results and not operation.startswith((*MEMORY, "scf.")) and not any(map(self.wanted, results)):
            return self.end_of_region(at) if operation.startswith(REDUCE) else at + 1
        return super().operation(at)

    def end_of_region(self, at: int) -> int:
        """The line after a reduction's."""
        return next(n for n in range(at, len(self.lines)) if self.lines[n].startswith("tt.reduce.return")) + 2

    def program(self, arguments: list[Argument]) -> str:
        declared = "".join(
            f", {'char*' if 'tensordesc' in argument.type else self.types[argument.name].c} {self.name(argument.name)}"
            for argument in arguments
        )
        given = "".join(f", {self.name(argument.name)}" for argument in arguments)
        body = "\n".join(self.code)
        return f"""#include "lockstep.h"
static void program(trace::Trace& trace{declared}, int px, int py, int pz, int gx, int gy, int gz) {{
{body}
}}
extern "C" const char* launch(trace::Cache* cache, const trace::Buffers* buffers, trace::Order order, trace::Counts* counts, int gx, int gy,
                              int gz{declared}) {{
  return trace::in_lockstep(*cache, *buffers, order, *counts, gx, gy, gz, [&](trace::Trace& trace, int px, int py, int pz) {{
    program(trace{given}, px, py, pz, gx, gy, gz);
  }});
}}
extern "C" const char* list_accesses(const trace::Buffers* buffers, trace::Listing* listing, int gx, int gy, int gz{declared}) {{
  return trace::listed(*buffers, *listing, gx, gy, gz, [&](trace::Trace& trace, int px, int py, int pz) {{
    program(trace{given}, px, py, pz, gx, gy, gz);
  }});
}}
"""

    # tensors are functions of the element's index

    def each(self, result: str, type_: Type, expression: str) -> None:
        if type_.shape is None:
            super().each(result, type_, expression)
        else:
            self.types[result] = type_
            self.code.append(f"auto {self.name(result)} = trace::lazy<{type_.c}, {type_.size}>([&](long i) {{ return {expression}; }});")

    def gather(self, result: str, type_: Type, source: str, strides: list[int]) -> None:
        assert type_.shape is not None
        index, inner = [], type_.size
        for n, stride in zip(type_.shape, strides, strict=True):
            inner //= n
            if stride:
                index.append(f"i / {inner} % {n} * {stride}")
        self.each(result, type_, f"{self.name(source)}[{' + '.join(index) or 0}]")

    # memory

    def load(self, match: re.Match[str], results: list[str], at: int) -> None:
        values = [part for part in split(match[1]) if part.startswith("%")]
        pointers = self.types[values[0]]
        assert pointers.pointee is not None
        mask = self.element(values[1]) if len(values) > 1 else "true"
        self.access("LOAD", values[0], mask)
        if self.wanted(results[0]):
            type_ = self.declare(results[0], pointers.of(pointers.pointee))
            other = self.element(values[2]) if len(values) > 2 else f"undefined<{type_.c}>()"
            out = self.element(results[0])
            self.for_each(type_, f"if ({mask}) {out} = *trace.real({self.element(values[0])}); else {out} = {other};")

    def store(self, match: re.Match[str], results: list[str], at: int) -> None:
        values = [part for part in split(match[1]) if part.startswith("%")]
        self.access("STORE", values[0], self.element(values[2]) if len(values) > 2 else "true")

    def atomic(self, match: re.Match[str], results: list[str], at: int) -> None:
        values = split(match[2])
        if self.wanted(results[0]):
            raise NotImplementedError(f"an address that depends on {match[0]}")
        self.access("LOAD | trace::STORE", values[0], self.element(values[2]) if len(values) > 2 else "true")

    def access(self, kind: str, pointer: str, mask: str) -> None:
        """One access of a program: the elements at a tensor of pointers."""
        type_ = self.types[pointer]
        size, address = max(type_.size, 1), self.element(pointer)
        self.code.append(
            f"if (!trace.pointers<{size}, sizeof *{address.replace('[i]', '[0]')}>(trace::{kind},"
            f" [&](long i) {{ return {mask} ? (int64_t){address} : 0; }})) return;"
        )

    def descriptor_load(self, match: re.Match[str], results: list[str], at: int) -> None:
        if self.wanted(results[0]):
            raise NotImplementedError(f"an address that depends on {match[0]}")
        self.block("LOAD", match[1], split(match[2]), Type.parse(match[3]))

    def descriptor_store(self, match: re.Match[str], results: list[str], at: int) -> None:
        self.block("STORE", match[1], split(match[2]), Type.parse(split(match[0].rsplit(" : ", 1)[1])[-1]))

    def block(self, kind: str, descriptor: str, indices: list[str], type_: Type) -> None:
        """One access of a program: what of a block lies inside a descriptor's tensor."""
        name = self.name(descriptor)
        axes = ", ".join(
            f"{{{self.name(index)}, {n}, {name}_shape_{k}, {name}_stride_{k}}}"
            for k, (index, n) in enumerate(zip(indices, type_.shape or (), strict=True))
        )
        self.code.append(f"if (!trace.block(trace::{kind}, {name}, sizeof({type_.c}), {{{axes}}})) return;")
