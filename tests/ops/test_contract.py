"""One contract for every op of fastlora.ops: each implementation, dtype and sample input of every OpSpec found in the package.

What an op computes is the business of its own test; here is what all ops promise alike. Memory from `torch.empty` is filled with
NaN, so that an output entry that nobody wrote is seen.
"""

from __future__ import annotations

import copy
import importlib
import pkgutil
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

import fastlora.ops
from fastlora.ops import registry
from fastlora.ops.registry import OpSpec, implementation_counts, use_implementation
from tests.tolerances import FP64_EXACT

IMPLEMENTATIONS = ("reference", "auto")
DEVICES = [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]
FLOAT32_STATE = ("adamw_step", "gradient_norms", "grpo_loss")
"""Ops on flat buffers and log-probabilities: never given bfloat16."""


def _collect() -> list[OpSpec]:
    """Every OpSpec at the top of a module of fastlora.ops, alone or in a tuple."""
    specs: dict[str, OpSpec] = {}
    for info in pkgutil.iter_modules(fastlora.ops.__path__):
        module = importlib.import_module(f"fastlora.ops.{info.name}")
        found = [spec for value in vars(module).values() for spec in (value if isinstance(value, tuple) else (value,))]
        specs |= {spec.name: spec for spec in found if isinstance(spec, OpSpec)}
    return sorted(specs.values(), key=lambda spec: spec.name)


SPECS = _collect()


def _dtypes(spec: OpSpec) -> list[torch.dtype]:
    return [torch.float32, torch.float64] + ([] if spec.name in FLOAT32_STATE else [torch.bfloat16])


CASES = [pytest.param(spec, dtype, id=f"{spec.name}-{str(dtype)[6:]}") for spec in SPECS for dtype in _dtypes(spec)]


@pytest.fixture(autouse=True)
def _poisoned_memory() -> None:
    """torch fills new memory with NaN while deterministic algorithms are demanded (conftest.py resets the switch)."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan().all()


def _schema(spec: OpSpec) -> torch.FunctionSchema:
    return getattr(spec.op, "_opoverload", spec.op)._schema


def _clone(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Fresh tensors that share nothing and remember what requires a gradient."""
    return tree_map(lambda x: x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x, arguments)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _run(spec: OpSpec, arguments: tuple[Any, ...]) -> list[Tensor]:
    """Everything a call delivers: its outputs, then the arguments that its schema says it writes to."""
    with torch.no_grad():
        outputs = spec.op(*arguments)
    written = [x for x, declared in zip(arguments, _schema(spec).arguments, strict=True) if _writes(declared)]
    return _tensors([outputs, written])


def _writes(argument: torch.Argument) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def test_every_op_of_the_package_is_found() -> None:
    files = {info.name for info in pkgutil.iter_modules(fastlora.ops.__path__)} - {"registry"}
    assert files <= {spec.name for spec in SPECS}
    registered = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastlora::")}
    assert registered == {spec.name for spec in SPECS}


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize(
    ("spec", "implementation"),
    [(s, name) for s in SPECS for name in (IMPLEMENTATIONS if s.op in registry._switchable else ("auto",))],
    ids=lambda value: getattr(value, "name", value),
)
def test_opcheck(spec: OpSpec, implementation: str, device: torch.device) -> None:
    """torch's own: schema tells the truth about writes and aliases, autograd is registered, fake and compiled shapes are right."""
    with use_implementation(implementation):
        for arguments in spec.sample_inputs(torch.float32, device):
            torch.library.opcheck(spec.op, arguments)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("spec", "dtype"), CASES)
def test_outputs(spec: OpSpec, dtype: torch.dtype, implementation: str, device: torch.device) -> None:
    """Finite, of the fake's shape and dtype, the same bits twice, and nothing written that the schema does not declare."""
    with use_implementation(implementation):
        for arguments in spec.sample_inputs(dtype, device):
            first_arguments, second_arguments = _clone(arguments), _clone(arguments)
            first, second = _run(spec, first_arguments), _run(spec, second_arguments)
            assert all(bool(x.isfinite().all()) for x in first)
            assert len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            for declared, before, after in zip(_schema(spec).arguments, arguments, first_arguments, strict=True):
                if not _writes(declared):
                    assert all(map(torch.equal, _tensors(before), _tensors(after))), f"{spec.name} wrote to {declared.name}"
            with FakeTensorMode() as mode:
                fake = _run(spec, tree_map(lambda x: mode.from_tensor(x) if isinstance(x, Tensor) else x, arguments))
            assert [(x.shape, x.dtype, x.device) for x in fake] == [(x.shape, x.dtype, x.device) for x in first]


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_implementations_agree_in_fp64(spec: OpSpec, device: torch.device) -> None:
    for arguments in spec.sample_inputs(torch.float64, device):
        results = []
        for implementation in IMPLEMENTATIONS:
            with use_implementation(implementation):
                results.append(_run(spec, _clone(arguments)))
        for reference, other in zip(*results, strict=True):
            scale = max(1.0, float(reference.abs().max())) if reference.numel() else 1.0
            torch.testing.assert_close(other, reference, rtol=0, atol=FP64_EXACT * scale)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("spec", [s for s in SPECS if s.name != "grpo_loss"], ids=lambda spec: spec.name)
def test_gradcheck(spec: OpSpec, implementation: str, device: torch.device) -> None:
    """Where the sample inputs ask for gradients. Masks hold entries constant, which finite differences do not: the samples run without,
    and test_lora_linear.py has an oracle for them. The same goes for grpo_loss: test_grpo_loss.py checks its gradient."""
    names = [argument.name for argument in _schema(spec).arguments]
    with use_implementation(implementation):
        for sample in spec.sample_inputs(torch.float64, device):
            arguments = tuple(None if name.endswith("_mask") else x for name, x in zip(names, sample, strict=True))
            if any(x.requires_grad and x.numel() for x in _tensors(arguments)):
                keep = _differentiable_outputs(spec, arguments)
                torch.autograd.gradcheck(lambda *a, keep=keep: [_tensors(spec.op(*a))[i] for i in keep], arguments, fast_mode=True)


def _differentiable_outputs(spec: OpSpec, arguments: tuple[Any, ...]) -> list[int]:
    """Outputs with a gradient; lora_linear's last one, h, is kept for the backward pass and never leaves the public function."""
    outputs = _tensors(spec.op(*arguments))
    last = len(outputs) - 1 if spec.name == "lora_linear" else len(outputs)
    return [i for i, x in enumerate(outputs[:last]) if x.requires_grad and x.numel()]


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_the_counter_says_what_ran(spec: OpSpec, implementation: str, device: torch.device) -> None:
    """Forced to the reference, nothing else runs; on auto, an op with kernels of its own for the device does not run the reference."""
    arguments = list(spec.sample_inputs(torch.float32, device))[-1]
    before = copy.copy(implementation_counts)
    with use_implementation(implementation):
        _run(spec, _clone(arguments))
    ran = implementation_counts - before
    assert sum(ran.values()) == 1 and {op for op, _ in ran} == {spec.name}
    (name,) = {name for _, name in ran}
    assert (name == "reference") == (implementation == "reference" or spec.op not in registry._switchable)


def test_leaving_the_block_restores_the_kernels_even_after_an_error() -> None:
    spec = next(s for s in SPECS if s.op in registry._switchable)
    arguments = list(spec.sample_inputs(torch.float32, torch.device("cpu")))[-1]
    with pytest.raises(KeyError), use_implementation("reference"):
        raise KeyError
    before = copy.copy(implementation_counts)
    _run(spec, _clone(arguments))
    assert (spec.name, "reference") not in implementation_counts - before


def test_unknown_implementations_are_refused() -> None:
    with pytest.raises(ValueError, match="implementation 'triton': known are 'auto' and 'reference'"), use_implementation("triton"):
        pass


def _sizes(value: Any) -> int:
    """Entries of tensors, and sums of lists of counts, of one argument."""
    if isinstance(value, Tensor):
        return value.numel()
    if isinstance(value, list | tuple):
        return sum(_sizes(v) for v in value)
    return value if isinstance(value, int) else 0


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_cost_is_positive_and_grows_with_the_arguments(spec: OpSpec) -> None:
    samples = list(spec.sample_inputs(torch.float32, torch.device("cpu")))
    costs = [spec.cost(*arguments) for arguments in samples]
    assert all(c.flops >= 0 and c.bytes >= 0 for c in costs) and max(c.flops for c in costs) > 0 and max(c.bytes for c in costs) > 0
    for small, small_cost in zip(samples, costs, strict=True):
        for large, large_cost in zip(samples, costs, strict=True):
            same_form = [x is None for x in small] == [x is None for x in large]
            if same_form and all(_sizes(a) <= _sizes(b) for a, b in zip(small, large, strict=True)):
                assert small_cost.flops <= large_cost.flops and small_cost.bytes <= large_cost.bytes
    assert [spec.cost(*arguments).bytes for arguments in spec.sample_inputs(torch.float64, torch.device("cpu"))] >= [c.bytes for c in costs]
