"""What every op of `fastlora.ops` has in common: its library, its implementations and how one is chosen, and the record that describes it.

One file per op holds the formula, the schema, the torch reference, the fake (shapes only), the autograd formula, `cost()`,
`sample_inputs()` and the public function. An op is a `torch.library` op whose body is a `Dispatch`: the reference first, faster
implementations after it, each with a name (`torch`, `cpp`, `triton`, `cuda`) and the reason, if any, why it cannot run here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from fastlora import extension
from fastlora.errors import FastloraError

NAMESPACE = "fastlora"
NAMES = ("reference", "torch", "cpp", "triton", "cuda", "liger", "flex", "flash")
"""Implementations that can be asked for, besides `auto`."""
ON_A_CPU = ("reference", "torch", "cpp")
"""Those that run on every machine; all others are for a GPU."""
TRITON_CAPABILITIES = ((8, 0), (9, 0), (10, 0))
"""A100; H100 and H200; B200: the rows of kernels/fastlora_triton/tiles.py, which this module cannot import where triton is missing."""


class ImplementationError(FastloraError):
    """A forced implementation that cannot run; the message names op, implementation and reason."""


implementation_counts: Counter[tuple[str, str]] = Counter()
"""(op, implementation) -> calls since the process started; tests and the doctor read it to prove what ran."""

dispatchers: dict[str, Dispatch] = {}
"""Every op of the package, by name."""

_forced = "auto"
"""What `use_implementation` asked for: of the process, since autograd runs the backward pass of a GPU in threads of its own."""


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to compute an op."""

    name: str
    run: Callable[..., Any]
    refuses: Callable[..., str | None]
    """(device, *arguments of the op; none when the doctor asks) -> why it cannot compute them, or None."""


class Dispatch:
    """The implementations of one op, best last; calling it runs the one that is selected."""

    def __init__(self, op: str, reference: Callable[..., Any]) -> None:
        self.op = op
        self.implementations = {"reference": Implementation("reference", reference, lambda device, *args: None)}
        dispatchers[op] = self

    def add(
        self, name: str, refuses: Callable[..., str | None] = lambda device, *args: None
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator: registers the next better implementation."""

        def register(run: Callable[..., Any]) -> Callable[..., Any]:
            self.implementations[name] = Implementation(name, run, refuses)
            return run

        return register

    def select(self, device: torch.device, *args: Any) -> Implementation:
        """The best implementation for the device and arguments, or the forced one.

        An op that has no implementation of the forced name at all is not affected by it (`grpo_loss` has no C++). Raises
        ImplementationError when it has one that cannot run.
        """
        if _forced in self.implementations:
            chosen = self.implementations[_forced]
            if reason := chosen.refuses(device, *args):
                raise ImplementationError(f"{self.op}: implementation '{_forced}' was asked for but cannot run: {reason}")
            return chosen
        return next(i for i in reversed(self.implementations.values()) if i.refuses(device, *args) is None)

    def __call__(self, *args: Any) -> Any:
        chosen = self.select(_device(args), *args)
        implementation_counts[self.op, chosen.name] += 1
        return chosen.run(*args)

    def torch_op(self, mutates_args: Sequence[str] = ()) -> Any:
        """The `torch.library` op of this name: its schema is the reference's signature, its body whatever is selected.

        torch leaves out trailing arguments that equal their defaults: implementations of an op that has some have them too.
        """
        schema = torch.library.infer_schema(self.implementations["reference"].run, mutates_args=mutates_args)
        return torch.library.custom_op(f"{NAMESPACE}::{self.op}", lambda *args: self(*args), mutates_args=mutates_args, schema=schema)


def _device(args: tuple[Any, ...]) -> torch.device:
    """Device of the first tensor among the arguments, lists searched too."""
    for arg in args:
        first = arg[0] if isinstance(arg, list | tuple) and arg else arg
        if isinstance(first, torch.Tensor):
            return first.device
    return torch.device("cpu")


def cpp_refuses(device: torch.device, *args: Any) -> str | None:
    """Why the C++ kernels cannot run: no extension, another device than the CPU, a dtype besides float32 and bfloat16."""
    if reason := extension.missing():
        return reason
    if device.type != "cpu":
        return f"it runs on the CPU, the tensors are on {device.type}"
    for arg in args:
        if isinstance(arg, torch.Tensor) and arg.is_floating_point() and arg.dtype not in (torch.float32, torch.bfloat16):
            return f"it takes float32 and bfloat16, not {arg.dtype}"
    return None


def triton_refuses(device: torch.device, *args: Any) -> str | None:
    """Why the Triton kernels cannot run: no triton, no GPU or an old one, a dtype besides float32, bfloat16 and float16."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda":
        return f"it runs on a GPU, the tensors are on {device.type}"
    if (capability := torch.cuda.get_device_capability(device)) not in TRITON_CAPABILITIES:
        made_for = ", ".join(f"{major}.{minor}" for major, minor in TRITON_CAPABILITIES)
        return f"it has tiles for compute capability {made_for}, this GPU has {capability[0]}.{capability[1]}"
    return _refuses_float64(args)


def cuda_refuses(device: torch.device, *args: Any) -> str | None:
    """Why the CUDA kernels cannot run: no CUDA extension, no GPU or an old one, a dtype besides float32, bfloat16 and float16."""
    if reason := extension.missing_cuda():
        return reason
    if device.type != "cuda":
        return f"it runs on a GPU, the tensors are on {device.type}"
    if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"it is compiled for compute capability 8.0 and above, this GPU has {capability[0]}.{capability[1]}"
    return _refuses_float64(args)


def _refuses_float64(args: Sequence[Any]) -> str | None:
    """Of tensors among the arguments, lists searched too."""
    for arg in args:
        for x in arg if isinstance(arg, list | tuple) else (arg,):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float64:
                return "it takes float32, bfloat16 and float16, not torch.float64"
    return None


def tma_refuses(device: torch.device, *args: Any) -> str | None:
    """Why the Triton kernels that load through tensor descriptors cannot run: `triton_refuses`, and a GPU without a TMA."""
    if reason := triton_refuses(device, *args):
        return reason
    if torch.cuda.get_device_capability(device) < (9, 0):
        return "it loads through the TMA, which this GPU (compute capability 8.0) does not have"
    return None


def kernels_refuse(name: str, device: torch.device) -> str | None:
    """Why no op can run this implementation on the device; None where some may, and for what is no kernel of ours."""
    refuses = {"cpp": cpp_refuses, "triton": triton_refuses, "cuda": cuda_refuses}.get(name)
    return refuses(device) if refuses else None


@contextmanager
def use_implementation(name: str) -> Iterator[None]:
    """Inside the block every op runs its best implementation (`auto`), or the one of this name where it has one.

    Raises ValueError on an unknown name, and ImplementationError at once when the extension that `cpp` or `cuda` needs is not there.
    """
    if name not in ("auto", *NAMES):
        raise ValueError(f"implementation {name!r}: known are {', '.join(map(repr, ('auto', *NAMES)))}")
    missing = {"cpp": extension.missing, "cuda": extension.missing_cuda}.get(name, lambda: None)
    if reason := missing():
        raise ImplementationError(f"implementation '{name}' was asked for but cannot run: {reason}")
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def call(op: Any, dispatch: Dispatch, *args: Any) -> Any:
    """The registered op where autograd or a compiler must see it; else its implementation without torch.library's 40 µs of wrapping.

    A decoding step of SmolLM2 makes some 300 such calls: 12 ms of 40.
    """
    return op(*args) if torch.is_grad_enabled() or torch.compiler.is_compiling() else dispatch(*args)


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
