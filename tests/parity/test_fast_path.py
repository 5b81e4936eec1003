"""The fast path equals the reference in fp64, and in fp32 and bf16 errs no more than PEFT + TRL does."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from scipy.stats import ttest_1samp

from fastlora.losses import one_pass
from fastlora.ops.registry import implementation_counts
from tests.parity import fast_path
from tests.parity.peft_cases import SCALINGS, TARGETS, lora_config
from tests.tiny import TINY_FAMILIES, VOCAB_SIZE, make_tiny_model
from tests.tolerances import FAST_PATH_ERROR_FACTOR, FP64_EXACT

FAST_IN_FP64 = {
    ("rms_norm", "reference"),
    ("swiglu", "reference"),
    ("packed_attention", "reference"),
    ("logprob_rows", "reference"),
    ("lora_linear", "torch"),
}
"""(op, implementation) that a fast run goes through in fp64, which the C++ kernels do not take; two passes over the head would be
`linear_logprob`."""


def _odd_batch(seed: int = 0) -> fast_path.TrainBatch:
    return fast_path.make_batch(VOCAB_SIZE, seed, prompts=(20, 7, 12), completions=(24, 1, 17, 9, 40, 33))


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_fp64(monkeypatch: pytest.MonkeyPatch, family: str, targets: str) -> None:
    """Fused, packed, grouped, one pass over the head (16 rows at a time) against PEFT, a plain log-softmax and TRL's loss."""
    monkeypatch.setattr(one_pass, "TILE_ELEMENTS", 16 * VOCAB_SIZE)
    config = lora_config(family, targets, SCALINGS[list(TARGETS).index(targets)])
    model = make_tiny_model(family)
    fast, adapter = fast_path.attach_fast(fast_path.in_double(model), config, seed=0, std=0.05)
    fast_path.to_double(adapter)
    truth = fast_path.truth_trainer(model, config, adapter)
    batch = _odd_batch()
    batch = fast_path.with_recorded_policies(batch, fast_path.trl_logp(truth, batch), seed=0)
    expected = fast_path.run_trl(truth, batch, adapter, torch.float64)
    before = implementation_counts.copy()
    got = fast_path.run_ours(fast, adapter, batch)
    ran = implementation_counts - before
    assert set(ran) >= FAST_IN_FP64 and not any(op == "linear_logprob" for op, _ in ran), ran
    assert got.gradient.any()
    torch.testing.assert_close(got.logp, expected.logp, rtol=FP64_EXACT, atol=FP64_EXACT)
    assert (got.gradient - expected.gradient).norm() <= FP64_EXACT * expected.gradient.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_errs_no_more_than_peft_and_trl(dtype: torch.dtype) -> None:
    ours, theirs = fast_path.measure_tiny(dtype).pooled()
    assert ours.logp <= FAST_PATH_ERROR_FACTOR * theirs.logp, (ours, theirs)
    assert ours.gradient <= FAST_PATH_ERROR_FACTOR * theirs.gradient, (ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_errs_no_more_than_peft_and_trl_on_smollm2(packaged_model: Path, dtype: torch.dtype) -> None:
    """The real model's error hangs on a few huge activations: the ratio scatters from .6 to 1.9 between seeds (1.05 pooled over 16,
    fp32). Four seeds can only tell whether it is significantly above the factor; the tiny models hold the rule itself."""
    for ratios in fast_path.measure_smollm2(packaged_model, dtype).seed_ratios():
        above = ttest_1samp([math.log(ratio) for ratio in ratios], math.log(FAST_PATH_ERROR_FACTOR), alternative="greater")
        assert above.pvalue > 0.01, ratios
