"""TTIR, the hardware-independent form in which Triton's compiler holds a kernel, as C++ that computes the same on a CPU.

What is translated is the compiler's own output for the GPU target (argument specialisation, type rules, all passes on TTIR), printed as
text. A tensor becomes an array, an operation a loop over its elements. TTIR has neither layouts nor shared memory nor barriers: what goes
wrong below it can be seen on a GPU only.

An operation is one line of text, or a line that opens a region; `_OPERATIONS` has a pattern and a method for each. One that is not there
raises NotImplementedError with its line.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

C_TYPES = {
    "f32": "float",
    "f64": "double",
    "bf16": "bf16",
    "f16": "f16",
    "i1": "bool",
    "i8": "int8_t",
    "i16": "int16_t",
    "i32": "int32_t",
    "i64": "int64_t",
    "index": "int64_t",
}
INFIX = {
    "addi": "+",
    "subi": "-",
    "muli": "*",
    "divsi": "/",
    "remsi": "%",
    "divui": "/",
    "remui": "%",
    "addf": "+",
    "subf": "-",
    "mulf": "*",
    "divf": "/",
    "andi": "&",
    "ori": "|",
    "xori": "^",
    "shli": "<<",
    "shrsi": ">>",
    "shrui": ">>",
}
UNSIGNED = {"divui", "remui", "shrui", "ult", "ule", "ugt", "uge", "maxui", "minui"}
# maxnumf ignores NaN, maximumf passes it on
CALLS = {
    "maxnumf": "std::fmax",
    "minnumf": "std::fmin",
    "maxsi": "std::max",
    "minsi": "std::min",
    "maxui": "std::max",
    "minui": "std::min",
    "maximumf": "nan_max",
    "minimumf": "nan_min",
    "remf": "std::fmod",
}
COMPARISONS = {
    "eq": "==",
    "ne": "!=",
    "slt": "<",
    "sle": "<=",
    "sgt": ">",
    "sge": ">=",
    "ult": "<",
    "ule": "<=",
    "ugt": ">",
    "uge": ">=",
    "oeq": "==",
    "une": "!=",
    "olt": "<",
    "ole": "<=",
    "ogt": ">",
    "oge": ">=",
}
MATH = {
    "exp": "std::exp",
    "exp2": "std::exp2",
    "log": "std::log",
    "log2": "std::log2",
    "sqrt": "std::sqrt",
    "absf": "std::fabs",
    "absi": "std::abs",
    "floor": "std::floor",
    "ceil": "std::ceil",
    "tanh": "std::tanh",
    "rsqrt": "1.0f / std::sqrt",
    "erf": "std::erf",
}


@dataclass(frozen=True, slots=True)
class Type:
    """A scalar (shape None) or a tensor, of numbers or of pointers to `pointee`."""

    shape: tuple[int, ...] | None
    element: str
    pointee: str | None

    @classmethod
    def parse(cls, text: str) -> Type:
        """`i32`, `tensor<64x128xbf16>`, `!tt.ptr<f32>`, `tensor<64x!tt.ptr<f32>>`."""
        match = re.fullmatch(r"tensor<((?:\d+x)*)(.+)>", text.strip())
        shape = tuple(int(n) for n in match[1].split("x")[:-1]) if match else None
        element = match[2] if match else text.strip()
        pointer = re.fullmatch(r"!tt\.ptr<(\w+)>", element)
        return cls(shape, element, pointer[1] if pointer else None)

    @property
    def c(self) -> str:
        """C++ type of an element."""
        return f"{C_TYPES[self.pointee]}*" if self.pointee else C_TYPES[self.element]

    @property
    def size(self) -> int:
        """Elements."""
        return prod(self.shape or ())

    def of(self, element: str) -> Type:
        """The same shape with other elements."""
        return Type(self.shape, element, None)


def split(text: str) -> list[str]:
    """At the commas outside brackets."""
    parts, depth, current = [], 0, ""
    for letter in text:
        depth += (letter in "<([{") - (letter in ">)]}")
        if letter == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += letter
    return [*parts, current.strip()] if current.strip() else parts


@dataclass(frozen=True, slots=True)
class Argument:
    """Of the kernel, after specialisation: constants are gone, a tensor descriptor is its pointer, shapes and strides."""

    name: str
    type: str


@dataclass(frozen=True, slots=True)
class Translation:
    """A kernel in C++: `launch` runs it."""

    name: str
    source: str
    arguments: tuple[Argument, ...]


def translate(ttir: str) -> Translation:
    """Raises NotImplementedError with the line that it cannot translate."""
    return Translator(ttir).translate()


def results_of(line: str) -> tuple[list[str], str]:
    """(results, operation) of a line: `%x:2 = scf.for ...` has the results `%x#0` and `%x#1`."""
    match = re.match(r"(%[\w.]+)(?::(\d+))?(?:, %[\w.]+)* = (.*)$", line)
    if match is None:
        return [], line
    return [f"{match[1]}#{k}" for k in range(int(match[2]))] if match[2] else [match[1]], match[3]


class Translator:
    """Walks over the lines of a kernel. A subclass may keep less of it (trace.py): `wanted`, and the methods of single operations."""

    def __init__(self, ttir: str) -> None:
        # Neither places in the source nor hints of divisibility change what is computed.
        noise = re.compile(r"\s+loc\((?:[^()]|\([^()]*\))*\)|\s*\{tt\.[^{}]*\}")
        self.lines = [noise.sub("", line).strip() for line in ttir.splitlines() if not line.startswith("#loc")]
        self.types: dict[str, Type] = {}
        self.code: list[str] = []
        self.yields: list[list[str]] = []
        """Results that the yield of each open region assigns."""

    def wanted(self, value: str) -> bool:
        """Whether a value that a loop carries or a branch gives is computed."""
        return True

    # names and elements

    def name(self, value: str) -> str:
        return "v_" + value[1:].replace(".", "_").replace("#", "_r")

    def element(self, value: str, index: str = "i") -> str:
        return self.name(value) if self.types[value].shape is None else f"{self.name(value)}[{index}]"

    def storage(self, value: str) -> str:
        """C++ type of a variable for the value."""
        type_ = self.types[value]
        return type_.c if type_.shape is None else f"Array<{type_.c}, {type_.size}>"

    def declare(self, value: str, type_: Type) -> Type:
        self.types[value] = type_
        where = "" if type_.shape is None else "static thread_local "  # programs run on threads, and tiles are too large for a stack
        self.code.append(f"{where}{self.storage(value)} {self.name(value)};")
        return type_

    def each(self, result: str, type_: Type, expression: str) -> None:
        """result[i] = expression for every element i."""
        self.declare(result, type_)
        self.for_each(type_, f"{self.element(result)} = {expression};")

    def for_each(self, type_: Type, statement: str) -> None:
        self.code.append(statement if type_.shape is None else f"for (long i = 0; i < {type_.size}; ++i) {{ {statement} }}")

    # the kernel

    def translate(self) -> Translation:
        at = next(n for n, line in enumerate(self.lines) if line.startswith("tt.func"))
        match = re.match(r"tt\.func public @(\w+)\((.*)\)(?: attributes \{.*\})?\s*\{$", self.lines[at])
        if match is None:
            raise NotImplementedError(self.lines[at])
        arguments = []
        for text in split(match[2]):
            name, type_ = text.split(":", 1)
            argument = Argument(name.strip(), type_.strip())
            arguments.append(argument)
            self.types[argument.name] = Type(None, "i64", None) if "tensordesc" in argument.type else Type.parse(argument.type)
        end = self.region(at + 1, "tt.return")
        if self.lines[end] != "tt.return":
            raise NotImplementedError(self.lines[end])
        return Translation(match[1], self.program(arguments), tuple(arguments))

    def program(self, arguments: list[Argument]) -> str:
        declared = [
            f"{'char*' if 'tensordesc' in argument.type else self.types[argument.name].c} {self.name(argument.name)}"
            for argument in arguments
        ]
        body = "\n".join(self.code)
        names = ", ".join(self.name(argument.name) for argument in arguments)
        comma = ", " if arguments else ""
        return f"""#include "runtime.h"
using namespace launch_state;
template <class T> static T nan_max(T a, T b) {{ return a != a ? a : b != b ? b : a > b ? a : b; }}
template <class T> static T nan_min(T a, T b) {{ return a != a ? a : b != b ? b : a < b ? a : b; }}
static void program({", ".join(declared)}{comma}int program_id, int px, int py, int pz, int gx, int gy, int gz) {{
{body}
}}
extern "C" const char* launch(const char** first, const char** end, const char** names, int count, int track, int threads, unsigned
order_seed,
                              int gx, int gy, int gz{comma}{", ".join(declared)}) {{
  begin_launch(first, end, names, count, track);
  return run_programs((long)gx * gy * gz, threads, order_seed, [&](long p) {{
    program({names}{comma}(int)p, p % gx, p / gx % gy, p / gx / gy, gx, gy, gz);
  }});
}}
"""

    def region(self, at: int, *ends: str) -> int:
        """Translates from line `at` to the first line that starts with one of `ends`; its number."""
        while not self.lines[at].startswith(ends):
            at = self.operation(at)
        return at

    def operation(self, at: int) -> int:
        """Translates the operation at a line; the line after it."""
        line = self.lines[at]
        if not line or line.startswith("//"):
            return at + 1
        results, line = results_of(line)
        for pattern, method in _OPERATIONS:
            if match := pattern.match(line):
                after = getattr(self, method.__name__)(match, results, at)  # a subclass may have its own
                return at + 1 if after is None else after
        raise NotImplementedError(line)

    # constants, shapes

    def constant(self, match: re.Match[str], results: list[str], at: int) -> None:
        text = re.sub(r"^dense<(.*)>$", r"\1", match[1])
        type_ = Type.parse(match[2] or "i1")
        self.each(results[0], type_, f"({type_.c})({_number(text, type_.element)})")

    def program_id(self, match: re.Match[str], results: list[str], at: int) -> None:
        self.each(results[0], Type.parse("i32"), {"get_program_id": "p", "get_num_programs": "g"}[match[1]] + match[2])

    def make_range(self, match: re.Match[str], results: list[str], at: int) -> None:
        self.each(results[0], Type.parse(match[2]), f"i + {match[1]}")

    def splat(self, match: re.Match[str], results: list[str], at: int) -> None:
        self.each(results[0], Type.parse(match[2]), self.name(match[1]))

    def same_elements(self, match: re.Match[str], results: list[str], at: int) -> None:
        """expand_dims, reshape: the same elements in the same order."""
        self.types[results[0]] = Type.parse(match[2])
        self.code.append(f"auto& {self.name(results[0])} = {self.name(match[1])};")

    def unsplat(self, match: re.Match[str], results: list[str], at: int) -> None:
        source = self.types[match[1]]
        self.each(results[0], Type(None, source.element, source.pointee), f"{self.name(match[1])}[0]")

    def broadcast(self, match: re.Match[str], results: list[str], at: int) -> None:
        source, type_ = self.types[match[1]], Type.parse(match[2])
        assert source.shape is not None
        self.gather(
            results[0], type_, match[1], [0 if n == 1 else stride for n, stride in zip(source.shape, _strides(source.shape), strict=True)]
        )

    def transpose(self, match: re.Match[str], results: list[str], at: int) -> None:
        source, type_ = self.types[match[1]], Type.parse(match[3])
        assert source.shape is not None
        self.gather(results[0], type_, match[1], [_strides(source.shape)[int(axis)] for axis in match[2].split(",")])

    def gather(self, result: str, type_: Type, source: str, strides: list[int]) -> None:
        """result[j0, j1, ...] = source[Σ j_k strides_k]."""
        self.declare(result, type_)
        index = " + ".join(f"j{k} * {stride}" for k, stride in enumerate(strides))
        self.code.append(f"{{ long o = 0; {_loops(type_)} {self.name(result)}[o++] = {self.name(source)}[{index}]; }}")

    # arithmetic

    def compare(self, match: re.Match[str], results: list[str], at: int) -> None:
        type_ = Type.parse(match[4])
        left, right = self.operands(match[1], match[2], match[3], type_)
        self.each(results[0], type_.of("i1"), f"{left} {COMPARISONS[match[1]]} {right}")

    def operands(self, operation: str, left: str, right: str, type_: Type) -> tuple[str, str]:
        cast = "(float)" if type_.element in ("bf16", "f16") else f"(u{type_.c})" if operation in UNSIGNED else ""
        return f"{cast}{self.element(left)}", f"{cast}{self.element(right)}"

    def binary(self, match: re.Match[str], results: list[str], at: int) -> None:
        operation, type_ = match[1], Type.parse(match[4])
        left, right = self.operands(operation, match[2], match[3], type_)
        if operation in INFIX:
            self.each(results[0], type_, f"{left} {INFIX[operation]} {right}")
        elif operation in CALLS:
            self.each(results[0], type_, f"{CALLS[operation]}({left}, {right})")
        else:
            raise NotImplementedError(match[0])

    def select(self, match: re.Match[str], results: list[str], at: int) -> None:
        self.each(
            results[0], Type.parse(split(match[4])[-1]), f"{self.element(match[1])} ? {self.element(match[2])} : {self.element(match[3])}"
        )

    def cast(self, match: re.Match[str], results: list[str], at: int) -> None:
        source, type_ = self.types[match[2]], Type.parse(match[3])
        widen = (
            f"(u{source.c})" if match[1] == "extui" and source.element != "i1" else "(float)" if source.element in ("bf16", "f16") else ""
        )
        self.each(results[0], type_, f"({type_.c})({widen}{self.element(match[2])})")

    def bitcast(self, match: re.Match[str], results: list[str], at: int) -> None:
        type_ = self.declare(results[0], Type.parse(match[2]))
        self.for_each(type_, f"std::memcpy(&{self.element(results[0])}, &{self.element(match[1])}, sizeof({type_.c}));")

    def negate(self, match: re.Match[str], results: list[str], at: int) -> None:
        self.each(results[0], Type.parse(match[2]), f"-{self.element(match[1])}")

    def fused_multiply_add(self, match: re.Match[str], results: list[str], at: int) -> None:
        self.each(results[0], Type.parse(match[4]), "std::fma(" + ", ".join(self.element(match[k]) for k in (1, 2, 3)) + ")")

    def math(self, match: re.Match[str], results: list[str], at: int) -> None:
        if match[1] not in MATH:
            raise NotImplementedError(match[0])
        self.each(results[0], Type.parse(match[3]), f"{MATH[match[1]]}({self.element(match[2])})")

    def precise(self, match: re.Match[str], results: list[str], at: int) -> None:
        values = [self.element(value) for value in split(match[2])]
        self.each(results[0], Type.parse(match[3]), f"std::sqrt({values[0]})" if match[1] == "sqrt" else f"{values[0]} / {values[1]}")

    def dot(self, match: re.Match[str], results: list[str], at: int) -> None:
        """float accumulation in the order of k; a tensor core adds in another one."""
        (m, k), (_, n) = self.types[match[1]].shape, self.types[match[2]].shape  # type: ignore[misc]
        read = "tf32" if match[4] == "tf32" and self.types[match[1]].element == "f32" else "(float)"
        out = self.name(results[0])
        self.declare(results[0], Type.parse(match[5]))
        self.code.append(
            f"{{ static thread_local float right[{k * n}]; for (long i = 0; i < {k * n}; ++i) right[i] = {read}({self.name(match[2])}[i]);"
            f" {out} = {self.name(match[3])};"
            f" for (long a = 0; a < {m}; ++a) for (long z = 0; z < {k}; ++z) {{"
            f" const float left = {read}({self.name(match[1])}[a * {k} + z]);"
            f" for (long b = 0; b < {n}; ++b) {out}[a * {n} + b] += left * right[z * {n} + b]; }} }}"
        )

    # memory

    def add_pointer(self, match: re.Match[str], results: list[str], at: int) -> None:
        self.each(results[0], self.types[match[1]], f"{self.element(match[1])} + {self.element(match[2])}")

    def load(self, match: re.Match[str], results: list[str], at: int) -> None:
        values = [part for part in split(match[1]) if part.startswith("%")]
        pointers = self.types[values[0]]
        assert pointers.pointee is not None
        type_ = self.declare(results[0], pointers.of(pointers.pointee))
        mask = self.element(values[1]) if len(values) > 1 else "true"
        other = self.element(values[2]) if len(values) > 2 else f"undefined<{type_.c}>()"
        address, out = self.element(values[0]), self.element(results[0])
        self.for_each(
            type_,
            f"if ({mask}) {{ if (!may_load({address}, sizeof({type_.c}), program_id)) return; {out} = *{address}; }} else {out} = {other};",
        )

    def store(self, match: re.Match[str], results: list[str], at: int) -> None:
        values = [part for part in split(match[1]) if part.startswith("%")]
        pointers = self.types[values[0]]
        mask = self.element(values[2]) if len(values) > 2 else "true"
        address = self.element(values[0])
        self.for_each(
            pointers,
            f"if ({mask}) {{ if (!may_store({address}, sizeof(*{address}), program_id)) return; *{address} = {self.element(values[1])}; }}",
        )

    def atomic(self, match: re.Match[str], results: list[str], at: int) -> None:
        values, type_ = split(match[2]), Type.parse(match[3])
        if match[1] not in ("fadd", "add"):
            raise NotImplementedError(match[0])
        self.declare(results[0], type_)
        mask = self.element(values[2]) if len(values) > 2 else "true"
        address = self.element(values[0])
        self.for_each(
            type_,
            f'if ({mask}) {{ if (!checked({address}, sizeof(*{address}), "atomic", program_id)) return;'
            f" {self.element(results[0])} = atomic_add({address}, {self.element(values[1])}); }}",
        )

    def descriptor_load(self, match: re.Match[str], results: list[str], at: int) -> None:
        type_ = self.declare(results[0], Type.parse(match[3]))
        inside, address = self.in_descriptor(match[1], split(match[2]), type_)
        self.code.append(
            f"{{ long o = 0; {_loops(type_)} {{ {type_.c} value(0); if ({inside}) {{ const {type_.c}* p = {address};"
            f" if (!may_load(p, sizeof *p, program_id)) return; value = *p; }} {self.name(results[0])}[o++] = value; }} }}"
        )

    def descriptor_store(self, match: re.Match[str], results: list[str], at: int) -> None:
        type_ = self.types[match[3]]
        inside, address = self.in_descriptor(match[1], split(match[2]), type_)
        self.code.append(
            f"{{ long o = 0; {_loops(type_)} {{ if ({inside}) {{ {type_.c}* p = {address};"
            f" if (!may_store(p, sizeof *p, program_id)) return; *p = {self.name(match[3])}[o]; }} ++o; }} }}"
        )

    def in_descriptor(self, descriptor: str, indices: list[str], type_: Type) -> tuple[str, str]:
        """(condition, pointer) of element [j0, j1, ...] of a block at `indices`: outside the tensor a load gives 0, a store does
        nothing."""
        name = self.name(descriptor)
        positions = [f"({self.name(index)} + j{k})" for k, index in enumerate(indices)]
        inside = " && ".join(f"{p} >= 0 && {p} < {name}_shape_{k}" for k, p in enumerate(positions))
        offset = " + ".join(f"{p} * {name}_stride_{k}" for k, p in enumerate(positions))
        return inside, f"({type_.c}*){name} + {offset}"

    # regions

    def loop(self, match: re.Match[str], results: list[str], at: int) -> int:
        carried = [part.split(" = ") for part in split(match[5] or "")]
        types = [Type.parse(text) for text in split(match[6] or "")]
        kept = [entry for entry in zip(results, carried, types, strict=True) if self.wanted(entry[0])]
        for result, (_, start), type_ in kept:
            self.declare(result, type_)
            self.code.append(f"{self.name(result)} = {self.name(start)};")
        counter = match[1]
        self.types[counter] = Type.parse(match[7] or "i32")
        c, variable = self.types[counter].c, self.name(counter)
        self.code.append(
            f"for ({c} {variable} = {self.name(match[2])}; {variable} < {self.name(match[3])}; {variable} += {self.name(match[4])}) {{"
        )
        for result, (inner, _), type_ in kept:
            self.types[inner] = type_
            self.code.append(f"auto& {self.name(inner)} = {self.name(result)};")
        return self.nested(at + 1, results)

    def branch(self, match: re.Match[str], results: list[str], at: int) -> int:
        for result, text in zip(results, split(match[2] or ""), strict=True):
            if self.wanted(result):
                self.declare(result, Type.parse(text))
        self.code.append(f"if ({self.name(match[1])}) {{")
        return self.nested(at + 1, results)

    def nested(self, at: int, results: list[str]) -> int:
        """The region that opens before line `at`, and its else; the line after it."""
        self.yields.append(results)
        at = self.region(at, "}")
        if self.lines[at] == "} else {":
            self.code.append("} else {")
            at = self.region(at + 1, "}")
        self.yields.pop()
        self.code.append("}")
        return at + 1

    def yield_(self, match: re.Match[str], results: list[str], at: int) -> None:
        """All values are read before any result is written: they may be each other."""
        pairs = [(r, value) for r, value in zip(self.yields[-1], split(match[1] or ""), strict=True) if self.wanted(r)]
        copies = " ".join(f"{self.storage(r)} const y{k} = {self.name(value)};" for k, (r, value) in enumerate(pairs))
        self.code.append(f"{{ {copies} " + " ".join(f"{self.name(r)} = y{k};" for k, (r, _) in enumerate(pairs)) + " }")

    def reduce(self, match: re.Match[str], results: list[str], at: int) -> int:
        """Along one axis, in the order of a tree: halves onto halves."""
        sources, axis = split(match[1]), int(match[2])
        shape = self.types[sources[0]].shape
        assert shape is not None
        length, inner = shape[axis], prod(shape[axis + 1 :])
        block = re.match(r"\^bb0\((.*)\):", self.lines[at + 1])
        end = next(n for n in range(at, len(self.lines)) if self.lines[n].startswith("tt.reduce.return"))
        returned = re.match(r"tt\.reduce\.return (.*?) :", self.lines[end])
        signature = re.match(r"\}\) : \(.*\) -> (.*)$", self.lines[end + 1])
        assert block and returned and signature
        for result, text in zip(results, split(signature[1].strip("()")), strict=True):
            self.declare(result, Type.parse(text))
        names = [part.split(":")[0].strip() for part in split(block[1])]
        self.code.append(f"for (long u = 0; u < {prod(shape) // length // inner}; ++u) for (long w = 0; w < {inner}; ++w) {{")
        for k, source in enumerate(sources):
            c = self.types[source].c
            self.code.append(
                f"{c} part{k}[{length}];"
                f" for (long z = 0; z < {length}; ++z) part{k}[z] = {self.name(source)}[(u * {length} + z) * {inner} + w];"
            )
        self.code.append(f"for (long half = {length} / 2; half; half /= 2) for (long z = 0; z < half; ++z) {{")
        for k, source in enumerate(sources):
            scalar = Type(None, self.types[source].element, self.types[source].pointee)
            for name, index in ((names[k], "z"), (names[k + len(sources)], "z + half")):
                self.types[name] = scalar
                self.code.append(f"{scalar.c} {self.name(name)} = part{k}[{index}];")
        self.region(at + 2, "tt.reduce.return")
        self.code += [f"part{k}[z] = {self.name(value)};" for k, value in enumerate(split(returned[1]))]
        self.code.append("}")
        self.code += [f"{self.element(result, f'u * {inner} + w')} = part{k}[0];" for k, result in enumerate(results)]
        self.code.append("}")
        return end + 2


def _number(text: str, element: str) -> str:
    """A constant of TTIR in C++; floats may be given as their bits."""
    if not (text.startswith("0x") and element in ("f32", "f16", "bf16")):
        return text
    bits = int(text, 16)
    if element == "f16":
        value = struct.unpack("<e", struct.pack("<H", bits))[0]
    else:
        value = struct.unpack("<f", struct.pack("<I", bits << 16 if element == "bf16" else bits))[0]
    return "NAN" if value != value else f"{'-' if value < 0 else ''}INFINITY" if abs(value) == float("inf") else repr(value)


def _strides(shape: tuple[int, ...]) -> list[int]:
    return [prod(shape[k + 1 :]) for k in range(len(shape))]


def _loops(type_: Type) -> str:
    return "".join(f"for (long j{k} = 0; j{k} < {n}; ++j{k}) " for k, n in enumerate(type_.shape or ()))


_Method = Callable[[Translator, re.Match[str], list[str], int], int | None]
_OPERATIONS: list[tuple[re.Pattern[str], _Method]] = [
    (re.compile(pattern), method)
    for pattern, method in (
        (r"arith\.constant (dense<.*?>|\S+) : (.*)$", Translator.constant),
        (r"arith\.constant (true|false)()$", Translator.constant),
        (r"tt\.(get_program_id|get_num_programs) (\w)", Translator.program_id),
        (r"tt\.make_range \{end = \d+ : i32, start = (\d+) : i32\} : (.*)$", Translator.make_range),
        (r"tt\.splat (%\S+) : .* -> (.*)$", Translator.splat),
        (
            r"tt\.(?:expand_dims|reshape) (%\S+)(?: allow_reorder)?(?: efficient_layout)?(?: \{.*?\})? : .* -> (.*)$",
            Translator.same_elements,
        ),
        (r"tt\.unsplat (%\S+) : .*$", Translator.unsplat),
        (r"tt\.broadcast (%\S+) : \S+ -> (.*)$", Translator.broadcast),
        (r"tt\.trans (%\S+) \{order = array<i32: (.*?)>\} : \S+ -> (.*)$", Translator.transpose),
        (r"arith\.cmp[if] (\w+), (%\S+), (%\S+) : (.*)$", Translator.compare),
        (r"arith\.select (%\S+), (%\S+), (%\S+) : (.*)$", Translator.select),
        (r"arith\.(ext[fsui]+|trunc[fi]|sitofp|uitofp|fptosi|index_cast) (%\S+) : .* to (.*)$", Translator.cast),
        (r"(?:arith|tt)\.bitcast (%\S+) : .* (?:to|->) (.*)$", Translator.bitcast),
        (r"arith\.negf (%\S+) : (.*)$", Translator.negate),
        (r"math\.fma (%\S+), (%\S+), (%\S+) : (.*)$", Translator.fused_multiply_add),
        (r"math\.(\w+) (%\S+) : (.*)$", Translator.math),
        (r"tt\.precise_(sqrt|divf) (.*?) : (.*)$", Translator.precise),
        (r"arith\.(\w+) (%\S+), (%\S+)(?: overflow<.*>)? : (.*)$", Translator.binary),
        (r"tt\.dot (%\S+), (%\S+), (%\S+?)(?:, inputPrecision = (\w+))? : \S+ \* \S+ -> (.*)$", Translator.dot),
        (r"tt\.addptr (%\S+), (%\S+) : .*$", Translator.add_pointer),
        (r"tt\.load (.*?)(?: cacheModifier = \w+)?(?: evictionPolicy = \w+)? : .*$", Translator.load),
        (r"tt\.store (.*?)(?: cacheModifier = \w+)?(?: evictionPolicy = \w+)? : .*$", Translator.store),
        (r"tt\.atomic_rmw (\w+), \w+, \w+, (.*?) : .* -> (.*)$", Translator.atomic),
        (r"tt\.descriptor_load (%[\w.]+)\[(.*?)\] : \S+ -> (.*)$", Translator.descriptor_load),
        (r"tt\.descriptor_store (%[\w.]+)\[(.*?)\], (%\S+) : .*$", Translator.descriptor_store),
        (
            r"scf\.for (%\S+) = (%\S+) to (%\S+) step (%\S+)(?: iter_args\((.*?)\) -> \((.*)\))?\s*(?:: (\w+))?\s*\{",
            Translator.loop,
        ),
        (r"scf\.if (%\S+)(?: -> \((.*)\))? \{", Translator.branch),
        (r"scf\.yield(?: (.*?) : .*)?$", Translator.yield_),
        (r'"tt\.reduce"\((.*?)\) <\{axis = (\d+) : i32.*?\}> \(\{', Translator.reduce),
    )
]
