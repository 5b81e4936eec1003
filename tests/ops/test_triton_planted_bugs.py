"""The numerical tests of the Triton kernels can fail: each of these bugs, planted into a copy of a kernel's source, is seen."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton", reason="Triton kernels need triton")

import fastlora_triton
from bench.triton_cpu.launch import LaunchError
from fastlora_triton import linear_logprob, lora_linear, lora_linear_backward
from tests.ops import test_triton_linear_logprob, test_triton_lora_linear

HERE = Path(fastlora_triton.__file__).parent


@contextmanager
def planted(module: ModuleType, users: list[ModuleType], right: str, wrong: str, folder: Path) -> Iterator[None]:
    """Inside, `users` see a copy of `module` with the text `right` replaced."""
    source = Path(module.__file__ or "").read_text()
    assert source.count(right) == 1, f"{right!r} stands {source.count(right)} times in {module.__name__}"
    stem = module.__name__.split(".")[-1]
    copy = folder / f"{stem}_with_a_bug.py"
    copy.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(f"{stem}_with_a_bug", copy)
    assert spec and spec.loader
    buggy = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = buggy  # Triton looks a kernel's globals up by module
    spec.loader.exec_module(buggy)
    names = [(user, name) for user in users for name, value in vars(user).items() if value is module]
    for user, name in names:
        setattr(user, name, buggy)
    try:
        yield
    finally:
        for user, name in names:
            setattr(user, name, module)
        del sys.modules[spec.name]


def lora() -> None:
    test_triton_lora_linear.compare(63, "fused", "ragged", "ieee")


def lora_added() -> None:
    test_triton_lora_linear.compare(200, "cublas", "ragged", "ieee")


def logprob() -> None:
    test_triton_linear_logprob.compare(200, 9001, 0.7, torch.float32)


BUGS: list[tuple[ModuleType, ModuleType, Callable[[], None], str, str]] = [
    # a rank too many is read: the next module's
    (lora_linear, test_triton_lora_linear, lora, "mask=(r0 + r < rank)[:, None] & (columns < n)[None, :]", "mask=(columns < n)[None, :]"),
    # one scale for all modules, as old samplers have it
    (lora_linear, test_triton_lora_linear, lora_added, "tl.store(y_ptrs[i] + at, y.to", "tl.store(y_ptrs[0] + at, y.to"),
    # the last tokens of a tile are stored behind the end
    (lora_linear, test_triton_lora_linear, lora, "row = tl.load(row_of_column_ptr + column, mask=column < P, other=-1)", "row = column"),
    (lora_linear_backward, test_triton_lora_linear, lora, "acc *= tl.load(factors_ptr + tl.program_id(0))", "acc *= 1.0"),
    (lora_linear_backward, test_triton_lora_linear, lora, "for split in range(splits):", "for split in range(1, splits):"),
    (
        lora_linear_backward,
        test_triton_lora_linear,
        lora,
        "tl.load(mask_ptr + i, mask=there & in_b, other=1) != 0",
        "tl.load(mask_ptr + i, mask=there & in_b, other=1) >= 0",
    ),
    (linear_logprob, test_triton_linear_logprob, logprob, "(v0 + v < V)[None, :], z * inverse_temperature", "(v0 + v < V)[None, :], z"),
    (
        linear_logprob,
        test_triton_linear_logprob,
        logprob,
        "total = total * shrink + tl.sum(e, axis=1)",
        "total = total + tl.sum(e, axis=1)",
    ),
    (linear_logprob, test_triton_linear_logprob, logprob, "one_hot - p", "one_hot"),
]


@pytest.mark.parametrize(("module", "tests", "run", "right", "wrong"), BUGS, ids=[right[:40] for *_, right, _ in BUGS])
def test_a_planted_bug_is_seen(
    module: ModuleType, tests: ModuleType, run: Callable[[], None], right: str, wrong: str, tmp_path: Path
) -> None:
    with planted(module, [tests, lora_linear_backward], right, wrong, tmp_path), pytest.raises((AssertionError, LaunchError)):
        run()
