"""What every op of `fastlora.ops` has in common: its library, the record that describes it, and the counter of what ran.

One file per op holds the formula, the schema, the torch reference, the fake (shapes only), the autograd formula, `cost()`,
`sample_inputs()` and the public function. Reference implementations are the default key of `torch.library`; C++ and Triton
ones register for CPU and CUDA under the same schema.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

NAMESPACE = "fastlora"

implementation_counts: Counter[tuple[str, str]] = Counter()
"""(op, implementation) -> calls since the process started; tests and the doctor read it to prove what ran."""


def count(op: str, implementation: str) -> None:
    """Called first thing by every implementation of every op."""
    implementation_counts[op, implementation] += 1


@dataclass(frozen=True, slots=True)
class Cost:
    """Work of one call: useful floating-point operations (multiply and add = 2) and compulsory bytes (inputs + outputs once)."""

    flops: int
    bytes: int


@dataclass(frozen=True, slots=True)
class OpSpec:
    """What the contract test and the benchmarks need to know of an op."""

    name: str
    """Stem of the op: its file in fastlora/ops, csrc and kernels."""
    op: Any
    """The registered torch op (`torch.library.custom_op` object or OpOverload), for opcheck."""
    sample_inputs: Callable[[torch.dtype, torch.device], Iterator[tuple[Any, ...]]]
    """Positional arguments of `op`, odd shapes first (t in 0, 1, 63; ranks 0, 1, 3, 17)."""
    cost: Callable[..., Cost]
    """Cost of a call, from the same positional arguments."""


_switchable: list[Any] = []


def switchable(op: Any) -> None:
    """Names a custom op whose device kernels `use_implementation` turns on and off; each op file calls it once per op."""
    _switchable.append(op)


@contextmanager
def use_implementation(name: str) -> Iterator[None]:
    """Inside the block every op runs its best kernel (`auto`) or its torch reference (`reference`), on every device.

    Raises ValueError on any other name.
    """
    if name not in ("auto", "reference"):
        raise ValueError(f"implementation {name!r}: known are 'auto' and 'reference'")
    with ExitStack() as stack:
        if name == "reference":
            for op in _switchable:
                stack.enter_context(op.set_kernel_enabled("cpu", enabled=False))
                stack.enter_context(op.set_kernel_enabled("cuda", enabled=False))
        yield
