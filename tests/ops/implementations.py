"""Which implementations there are to test, and how to run one: name and, for `cpp`, the instruction set of its kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

import fastlora.ops.grpo_loss
import fastlora.ops.linear_logprob
import fastlora.ops.lora_linear
import fastlora.ops.packed_attention
import fastlora.ops.rms_norm
import fastlora.ops.swiglu  # noqa: F401 - registers the dispatchers
from fastlora import extension
from fastlora.ops.registry import dispatchers, use_implementation

ALL_INSTRUCTION_SETS = ("generic", "avx2", "avx512", "avx512bf16")
INSTRUCTION_SETS = () if extension.missing() else ALL_INSTRUCTION_SETS[: ALL_INSTRUCTION_SETS.index(extension.instruction_set()) + 1]
"""Of this processor, from the least to the best."""

needs_extension = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))
