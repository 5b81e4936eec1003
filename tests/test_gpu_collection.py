"""What a machine without a GPU can prove of the GPU tests: they import and collect, are marked, their inputs build, and the step that a
CUDA graph is to hold is the trainer's and reads no number back."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves

from fastlora.config import OptimConfig
from fastlora.lora.packed import join_weights
from fastlora.ops.lora_linear import joined
from fastlora.ops.registry import Implementation, OpSpec, dispatchers, use_implementation
from fastlora.optim import AdamW
from fastlora.policy import loss_on
from tests.gpu import sanitized, test_autograd, test_numerics, test_training_step
from tests.gpu.cases import GROUP_CASES, PRECISIONS, Arguments, gpu_implementations, inputs, precisions
from tests.gpu.training_step import LEARNING_RATE, TrainingStep, loss_of, policy_model
from tests.ops.implementations import op_specs, relative_error
from tests.tolerances import FP32_ADAMW

AUTOGRAD = {
    "lora_linear": ("lora_linear_inputs", "group", "group_by_formula"),
    "linear_logprob": ("linear_logprob_inputs", "head", "head_by_formula"),
}
CPU, META = torch.device("cpu"), torch.device("meta")
GPU_TESTS = Path(__file__).with_name("gpu")


def test_they_collect_and_all_are_marked() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", str(GPU_TESTS)]
    collected, marked = (
        subprocess.run([*command, *marks], cwd=GPU_TESTS.parents[1], capture_output=True, text=True, check=True).stdout.split("\n\n")[0]
        for marks in ([], ["-m", "gpu"])
    )
    assert collected == marked
    for name in ("test_numerics", "test_autograd", "test_training_step", "test_sanitizer"):
        assert f"tests/gpu/{name}.py::" in collected
    for spec, implementation in gpu_implementations():
        assert f"test_error_against_fp64_is_that_of_torch[{spec.name}-{implementation}-" in collected


def _floating(arguments: Arguments) -> list[Tensor]:
    return [x for x in tree_leaves(arguments) if isinstance(x, Tensor) and x.is_floating_point()]


@pytest.mark.parametrize("spec", op_specs(), ids=lambda spec: spec.name)
@torch.no_grad()
def test_inputs_build_and_the_reference_takes_them(spec: OpSpec) -> None:
    """In every precision that the op is used in; exact ones are the rounded numbers in float64 (but for what a forward pass kept)."""
    for precision in precisions(spec):
        with use_implementation("reference"):
            rounded, exact = (list(inputs(spec, precision.dtype, CPU, exact=e)) for e in (False, True))
            for some, same in zip(rounded, exact, strict=True):
                dispatchers[spec.name](*(x.clone() if isinstance(x, Tensor) else x for x in same))
                for x, wide in zip(_floating(some), _floating(same), strict=True):
                    assert wide.dtype == torch.float64
                    assert spec.name.endswith("_backward") or torch.equal(wide.to(x.dtype), x)


@torch.no_grad()
def test_groups_have_joined_weights_that_triton_takes() -> None:
    """Everything but the device: the widths, the one matrix and the kept h."""
    (spec,) = (s for s in op_specs() if s.name == "lora_linear")
    arguments = list(inputs(spec, torch.bfloat16, META))
    assert len(arguments) == len(GROUP_CASES) and {0, 1, 3, 17, 64} <= {r for case in GROUP_CASES for r in case.ranks}
    for x, weights_nd, *_ in arguments:
        whole = joined(weights_nd)
        assert whole is not None and whole.is_meta
        assert all(n % 8 == 0 for n in (x.shape[-1], *map(len, weights_nd)))


@pytest.mark.parametrize("op", ["lora_linear", "lora_linear_backward", "linear_logprob", "linear_logprob_backward"])
def test_the_tests_of_numerics_see_a_wrong_kernel(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run here with the CPU in the place of the card and `torch` in Triton's: they pass, and one output that is a per cent off is seen."""
    monkeypatch.setattr(test_numerics, "GPU", CPU)
    monkeypatch.setattr(test_autograd, "GPU", CPU)
    monkeypatch.setattr(test_autograd, "IMPLEMENTATION", "torch")
    (spec,), bf16 = [s for s in op_specs() if s.name == op], PRECISIONS[0]
    forward = op.removesuffix("_backward")
    build, run, formula = (getattr(test_autograd, name) for name in AUTOGRAD[forward])
    checks = [
        lambda: test_numerics.test_error_against_fp64_is_that_of_torch(spec, "torch", bf16),
        lambda: test_autograd.test_outputs_and_gradients(forward, build, run, formula, bf16),
    ]
    for check in checks:
        check()
    right = dispatchers[op].implementations["torch"].run

    def wrong(*arguments: object) -> object:
        outputs = right(*arguments)
        outputs[0].mul_(1.01)
        return outputs

    monkeypatch.setitem(dispatchers[op].implementations, "torch", Implementation("torch", wrong, lambda device, *args: None))
    for check in checks:
        with pytest.raises(AssertionError, match="against fp64"):
            check()


@contextmanager
def triton_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, every op that has Triton kernels takes them, compiled for a GPU and run here."""
    pytest.importorskip("triton", reason="Triton kernels need triton")
    from bench.triton_cpu.launch import Watch, on_cpu

    for dispatch in dispatchers.values():
        implementations = dispatch.implementations
        if "triton" in implementations:
            here = Implementation("triton", implementations["triton"].run, lambda device, *args: None)
            monkeypatch.setitem(implementations, "triton", here)
    with on_cpu(Watch(order_seed=3)), use_implementation("triton"):
        yield


@pytest.mark.parametrize("op", AUTOGRAD)
def test_gradients_through_triton_kernels_compiled_and_run_on_the_cpu(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's own test of autograd and joined weights, with bench/triton_cpu in the place of the card: ops, public functions and
    launchers fit together, and the error in bf16 is torch's own times 1.1."""
    monkeypatch.setattr(test_autograd, "GPU", CPU)
    build, run, formula = (getattr(test_autograd, name) for name in AUTOGRAD[op])
    with triton_on_the_cpu(monkeypatch):
        test_autograd.test_outputs_and_gradients(op, build, run, formula, PRECISIONS[0])


@pytest.mark.slow  # half a minute of g++ on an empty cache, two seconds afterwards
def test_the_step_through_triton_kernels_is_that_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's own comparison of a GRPO step, likewise; weights are joined as `attach` joins them on a GPU."""
    step = TrainingStep(CPU, torch.float32)
    for group in step.adapter.groups:
        join_weights(group.layers)
    with triton_on_the_cpu(monkeypatch):
        test_training_step.assert_is_that_of_the_cpu(step)


@pytest.mark.parametrize("one_pass", [True, False], ids=["one pass", "two passes"])
def test_the_step_of_the_graph_is_the_trainers(one_pass: bool) -> None:
    """Beside `policy.loss_on` and `optim.AdamW.step` on the same batch: loss, gradient, parameters."""
    step = TrainingStep(CPU, torch.float32, one_pass=one_pass)
    model, adapter = policy_model(CPU, torch.float32)
    optimizer = AdamW(adapter.flat, OptimConfig())
    loss, _ = loss_on(model, step.batch, 1.0, "auto", lambda logp, entropy: loss_of(logp, entropy, step.batch), token_level=one_pass)
    loss.backward()
    optimizer.step(LEARNING_RATE)
    assert torch.equal(step(), loss.detach())
    assert relative_error(step.adapter.flat.grad, adapter.flat.grad) <= FP32_ADAMW
    assert float((step.adapter.flat.data - adapter.flat.data).abs().max()) <= FP32_ADAMW
    assert float(adapter.flat.grad.norm()) > 0


def test_the_step_of_the_graph_reads_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake tensors a `.item()` raises, and so does a shape that depends on numbers. (Targets are looked at on a CPU only; so is the
    gradient of the loss in one pass, whose tiles go past torch.library: that step is held to it by the graph itself, in tests/gpu.)"""
    monkeypatch.setattr("fastlora.ops.linear_logprob._check", lambda *arguments: None)
    step = TrainingStep(CPU, torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert step().shape == ()


def test_the_watched_program_builds_its_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    """On a CPU every implementation refuses by name, and a program that ran nothing says so by its status."""
    assert sanitized.main(["--device", "cpu"]) == 1
    assert "lora_linear triton: it runs on a GPU, the tensors are on cpu" in capsys.readouterr().out
