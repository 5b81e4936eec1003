"""One contract for every op of fastlora.ops: each implementation, instruction set, dtype and sample input of every OpSpec of the package.

What an op computes is the business of its own test; here is what all ops promise alike. Memory from `torch.empty` is filled with
NaN, so that an output entry that nobody wrote is seen.
"""

from __future__ import annotations

import pkgutil
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

import fastlora.ops
from fastlora import extension
from fastlora.ops.registry import ON_A_CPU, ImplementationError, OpSpec, dispatchers, implementation_counts, use_implementation
from tests.ops.implementations import CPP, PooledErrors, Variant, needs_extension, op_specs, running, threads
from tests.tolerances import FP64_EXACT, KERNEL_ERROR_FACTOR, KERNEL_ERROR_FLOOR

DEVICES = [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]
CPU = torch.device("cpu")
FLOAT32_STATE = ("adamw_step", "export_adapter", "gradient_norms", "grpo_loss")
"""Ops on flat buffers and log-probabilities: never given bfloat16."""
IN_FLOAT64 = ("reference", "torch")
"""Implementations that take float64, which is for proofs."""
REFERENCE = Variant("reference")


SPECS = op_specs()


def _variants(spec: OpSpec) -> list[Variant]:
    """The implementations that the op lists, `cpp` once for every instruction set of this processor."""
    names = dispatchers[spec.name].implementations
    return [variant for name in names for variant in (CPP if name == "cpp" else [Variant(name)])]


def _dtypes(spec: OpSpec, variant: Variant) -> list[torch.dtype]:
    """What the variant must take."""
    dtypes = [torch.float32, torch.float64, torch.bfloat16]
    left_out = [torch.bfloat16] * (spec.name in FLOAT32_STATE) + [torch.float64] * (variant.implementation not in IN_FLOAT64)
    return [dtype for dtype in dtypes if dtype not in left_out]


def _id(*parts: Any) -> str:
    return "-".join(str(part).removeprefix("torch.") for part in parts)


VARIANTS = [pytest.param(spec, variant, id=_id(spec.name, variant)) for spec in SPECS for variant in _variants(spec)]
CASES = [
    pytest.param(spec, variant, dtype, id=_id(spec.name, variant, dtype))
    for spec in SPECS
    for variant in _variants(spec)
    for dtype in _dtypes(spec, variant)
]
LOW_PRECISION = [case for case in CASES if case.values[1] != REFERENCE and case.values[2] != torch.float64]
CPP_SPECS = [pytest.param(spec, id=spec.name) for spec in SPECS if "cpp" in dispatchers[spec.name].implementations]


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


def _in_float64(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same numbers, wider; fresh tensors."""
    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, _clone(arguments))


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


def _samples(spec: OpSpec, variant: Variant, dtype: torch.dtype, device: torch.device) -> list[tuple[Any, ...]]:
    """Those that the variant does not refuse by name: CUDA's adamw_step takes an index only. To be called while it runs."""
    implementations = dispatchers[spec.name].implementations
    samples = list(spec.sample_inputs(dtype, device))
    if variant.implementation in implementations:
        refuses = implementations[variant.implementation].refuses
        samples = [arguments for arguments in samples if refuses(device, *arguments) is None]
    assert samples, f"{spec.name}: {variant} refuses every sample"
    return samples


def _is_on(variant: Variant, device: torch.device) -> None:
    if variant.implementation == "cpp" and device.type != "cpu":
        pytest.skip("the C++ kernels run on the CPU")
    if variant.implementation not in ON_A_CPU:
        pytest.skip("for a GPU (tests/gpu); tests/ops/test_triton_*.py and tests/cuda_cpu run its kernels on the CPU")


def test_every_op_of_the_package_is_found() -> None:
    files = {info.name for info in pkgutil.iter_modules(fastlora.ops.__path__)} - {"registry", "gemm"}
    assert files <= {spec.name for spec in SPECS}
    registered = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastlora::")}
    assert registered == {spec.name for spec in SPECS} == set(dispatchers)
    assert all(next(iter(dispatch.implementations)) == "reference" for dispatch in dispatchers.values())


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize(("spec", "variant"), [case for case in VARIANTS if case.values[1] not in CPP[:-1]])
def test_opcheck(spec: OpSpec, variant: Variant, device: torch.device) -> None:
    """torch's own: schema tells the truth about writes and aliases, autograd is registered, fake and compiled shapes are right."""
    _is_on(variant, device)
    with running(variant):
        for arguments in _samples(spec, variant, torch.float32, device):
            torch.library.opcheck(spec.op, arguments)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize(("spec", "variant", "dtype"), CASES)
def test_outputs(spec: OpSpec, variant: Variant, dtype: torch.dtype, device: torch.device) -> None:
    """Finite, of the fake's shape and dtype, the same bits twice, and nothing written that the schema does not declare."""
    _is_on(variant, device)
    with running(variant):
        for arguments in _samples(spec, variant, dtype, device):
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


@pytest.mark.parametrize(("spec", "variant", "dtype"), [case for case in CASES if case.values[1] in CPP])
def test_bits_do_not_depend_on_threads(spec: OpSpec, variant: Variant, dtype: torch.dtype) -> None:
    """The samples; the ops that split large inputs only have such inputs in tests of their own."""
    with running(variant):
        for arguments in spec.sample_inputs(dtype, CPU):
            results = []
            for count in (1, 2):
                with threads(count):
                    results.append(_run(spec, _clone(arguments)))
            assert all(map(torch.equal, *results))


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_implementations_agree_in_fp64(spec: OpSpec, device: torch.device) -> None:
    others = [Variant("auto"), *(v for v in _variants(spec) if v != REFERENCE and torch.float64 in _dtypes(spec, v))]
    for arguments in spec.sample_inputs(torch.float64, device):
        with running(REFERENCE):
            references = _run(spec, _clone(arguments))
        for variant in others:
            with running(variant):
                results = _run(spec, _clone(arguments))
            for reference, other in zip(references, results, strict=True):
                scale = max(1.0, float(reference.abs().max())) if reference.numel() else 1.0
                torch.testing.assert_close(other, reference, rtol=0, atol=FP64_EXACT * scale)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize(("spec", "variant", "dtype"), LOW_PRECISION)
def test_error_against_fp64_is_that_of_the_reference(spec: OpSpec, variant: Variant, dtype: torch.dtype, device: torch.device) -> None:
    """Relative L2 error of each output over all samples; the truth is the reference in fp64 at the very same numbers."""
    _is_on(variant, device)
    errors = PooledErrors()
    with running(variant):  # what a backward pass gets from its forward pass is this variant's own
        samples = _samples(spec, variant, dtype, device)
        results = [_run(spec, _clone(arguments)) for arguments in samples]
    with running(REFERENCE):
        for arguments, got in zip(samples, results, strict=True):
            errors.add(got, _run(spec, _clone(arguments)), _run(spec, _in_float64(arguments)))
    errors.assert_within(KERNEL_ERROR_FACTOR, KERNEL_ERROR_FLOOR)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize(
    ("spec", "variant"),
    [case for case in VARIANTS if case.values[0].name != "grpo_loss" and case.values[1].implementation in IN_FLOAT64],
)
def test_gradcheck(spec: OpSpec, variant: Variant, device: torch.device) -> None:
    """Where the sample inputs ask for gradients. Masks hold entries constant, which finite differences do not: the samples run without,
    and test_lora_linear.py has an oracle for them. The same goes for grpo_loss: test_grpo_loss.py checks its gradient."""
    names = [argument.name for argument in _schema(spec).arguments]
    with running(variant):
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


def _what_ran(spec: OpSpec, arguments: tuple[Any, ...]) -> Counter[tuple[str, str]]:
    before = implementation_counts.copy()
    _run(spec, _clone(arguments))
    return implementation_counts - before


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize(("spec", "variant"), VARIANTS)
def test_a_forced_implementation_is_what_ran(spec: OpSpec, variant: Variant, device: torch.device) -> None:
    """Once, and no other of the same op; the reference runs nothing but references, of whatever op."""
    _is_on(variant, device)
    with running(variant):
        ran = _what_ran(spec, _samples(spec, variant, torch.float32, device)[-1])
    assert {name: count for (op, name), count in ran.items() if op == spec.name} == {variant.implementation: 1}
    assert variant != REFERENCE or {name for _, name in ran} == {"reference"}


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_auto_runs_the_best_that_can(spec: OpSpec, dtype: torch.dtype) -> None:
    """On the CPU: C++ where the op has it and the dtype is not float64, else torch's, else the reference."""
    listed = dispatchers[spec.name].implementations
    wanted = "cpp" if "cpp" in listed and dtype == torch.float32 else "torch" if "torch" in listed else "reference"
    ran = _what_ran(spec, list(spec.sample_inputs(dtype, CPU))[-1])
    assert {name for op, name in ran if op == spec.name} == {wanted}


FOR_A_GPU = [(spec, name) for spec in SPECS for name in dispatchers[spec.name].implementations if name not in ON_A_CPU]


@pytest.mark.parametrize(("spec", "name"), FOR_A_GPU, ids=[_id(spec.name, name) for spec, name in FOR_A_GPU])
def test_what_is_for_a_gpu_is_refused_on_a_cpu_by_name(spec: OpSpec, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not the CUDA extension was built here."""
    monkeypatch.setattr(extension, "missing_cuda", lambda: None)
    arguments = list(spec.sample_inputs(torch.float32, CPU))[-1]
    message = rf"^{spec.name}: implementation '{name}' .* (runs on a GPU|is not installed)"
    with use_implementation(name), pytest.raises(ImplementationError, match=message):
        _run(spec, _clone(arguments))


def test_without_the_cuda_extension_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "missing_cuda", lambda: "it was left on a train")
    with pytest.raises(ImplementationError, match=r"^implementation 'cuda' .* it was left on a train"), use_implementation("cuda"):
        pass


WITHOUT = [(spec, name) for spec in SPECS for name in ("torch", "cpp") if name not in dispatchers[spec.name].implementations]


@pytest.mark.parametrize(("spec", "name"), WITHOUT, ids=[_id(spec.name, name) for spec, name in WITHOUT])
def test_ops_without_the_forced_implementation_stay_on_auto(spec: OpSpec, name: str) -> None:
    if name == "cpp" and extension.missing():
        pytest.skip("no extension: 'cpp' is refused at once")
    arguments = list(spec.sample_inputs(torch.float32, CPU))[-1]
    on_auto = _what_ran(spec, arguments)
    with use_implementation(name):
        assert _what_ran(spec, arguments) == on_auto


@needs_extension
@pytest.mark.parametrize("spec", CPP_SPECS)
def test_cpp_refuses_float64_by_name(spec: OpSpec) -> None:
    samples = list(spec.sample_inputs(torch.float64, CPU))
    for arguments in samples:
        with (
            use_implementation("cpp"),
            pytest.raises(
                ImplementationError, match=rf"^{spec.name}: implementation 'cpp' .* it takes float32 and bfloat16, not torch.float64"
            ),
        ):
            _run(spec, _clone(arguments))


@pytest.mark.parametrize("spec", CPP_SPECS)
def test_without_the_extension_cpp_is_refused_and_auto_runs_something_else(spec: OpSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = list(spec.sample_inputs(torch.float32, CPU))[-1]
    monkeypatch.setattr(extension, "missing", lambda: "it was left on a train")
    assert {name for _, name in _what_ran(spec, arguments)} == {"reference"}
    with pytest.raises(ImplementationError, match=r"^implementation 'cpp' .* it was left on a train"), use_implementation("cpp"):
        pass
    with use_implementation("auto"):  # and where the extension vanished after the block was entered
        monkeypatch.setattr("fastlora.ops.registry._forced", "cpp")
        with pytest.raises(ImplementationError, match=rf"^{spec.name}: implementation 'cpp' .* it was left on a train"):
            _run(spec, _clone(arguments))


def test_nested_blocks_restore_what_was_forced_even_after_an_error() -> None:
    spec = next(s for s in SPECS if s.name == "lora_linear")
    arguments = list(spec.sample_inputs(torch.float32, CPU))[-1]

    def ran() -> str:
        ((_, name),) = _what_ran(spec, arguments)
        return name

    with use_implementation("reference"):
        with use_implementation("torch"):
            assert ran() == "torch"
        with pytest.raises(KeyError), use_implementation("torch"):
            raise KeyError
        assert ran() == "reference"
        with use_implementation("auto"):
            assert ran() == "torch"
        with pytest.raises(ValueError), use_implementation("nothing"):
            pass
        assert ran() == "reference"
    assert ran() == "torch"


def test_unknown_implementations_are_refused() -> None:
    message = "implementation 'grouped': known are 'auto', 'reference', 'torch', 'cpp'"
    with pytest.raises(ValueError, match=message), use_implementation("grouped"):
        pass


@needs_extension
def test_unknown_instruction_sets_are_refused() -> None:
    before = extension.instruction_set()
    with pytest.raises(RuntimeError, match="use_instruction_set: 'avx1024' is unknown, or this processor does not have it"):
        torch.ops.fastlora_cpu.use_instruction_set("avx1024")
    assert extension.instruction_set() == before


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
