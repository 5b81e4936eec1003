"""Mismatch metrics against sums and sorts in plain Python, and what the objective makes of a sampler that is not the trainer."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastlora.config import LossConfig
from fastlora.mismatch import THIRDS, mismatch_metrics
from fastlora.types import TrainBatch
from tests.batches import make_batch
from tests.tolerances import FP64_EXACT

MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
LENGTHS = ((3, 7), (2, 1), (4, 2), (5, 12), (1, 3), (2, 9))
"""Prompt and completion tokens."""


def scored_batch(noise: float = 0.5) -> TrainBatch:
    """With a behaviour policy, another sampler's log-probabilities (NaN at some tokens), and a token that does not train."""
    batch = make_batch(LENGTHS)
    shape = batch.completion_ids_nt.shape
    old_nt = -torch.rand(shape, dtype=torch.float64) * 5 * batch.completion_mask_nt
    sampler_nt = old_nt + noise * torch.randn(shape, dtype=torch.float64) * batch.completion_mask_nt
    sampler_nt[3, 5], sampler_nt[0, 6] = math.nan, math.nan
    loss_mask = batch.completion_mask_nt.clone()
    loss_mask[5, 2] = False
    return replace(batch, old_logp_nt=old_nt, sampler_logp_nt=sampler_nt, loss_mask_nt=loss_mask)


def by_token(batch: TrainBatch) -> list[tuple[int, int, float]]:
    """(sample, place, sampler − trainer) of every token that trains, NaN where it has no number."""
    assert batch.sampler_logp_nt is not None and batch.old_logp_nt is not None
    n, t = batch.loss_mask_nt.shape
    rows = ((i, j, float(batch.sampler_logp_nt[i, j]) - float(batch.old_logp_nt[i, j])) for i in range(n) for j in range(t))
    return [row for row in rows if bool(batch.loss_mask_nt[row[0], row[1]])]


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_differences(parts: int) -> None:
    """However the batch is split."""
    batch = scored_batch()
    rows = by_token(batch)
    known = [row for row in rows if not math.isnan(row[2])]
    sizes = sorted(abs(d) for _, _, d in known)
    lengths = batch.completion_mask_nt.sum(1).tolist()
    expected = {
        "mismatch/mean": statistics.fmean(d for *_, d in known),
        "mismatch/abs_mean": statistics.fmean(sizes),
        "mismatch/abs_max": sizes[-1],
        "mismatch/abs_p50": sizes[math.ceil(0.5 * len(sizes)) - 1],
        "mismatch/abs_p99": sizes[math.ceil(0.99 * len(sizes)) - 1],
        "mismatch_kl": statistics.fmean(math.exp(-d) - 1 + d for *_, d in known),
        "mismatch/unscored": 2 / len(rows),
    }
    for third, name in enumerate(THIRDS):
        expected[f"mismatch/{name}"] = statistics.fmean(abs(d) for i, j, d in known if 3 * j // lengths[i] == third)
    got = mismatch_metrics(batch.split(parts), LossConfig())
    assert got == pytest.approx(expected, rel=FP64_EXACT, abs=FP64_EXACT)


@pytest.mark.parametrize("mode", MODES)
def test_ratios(mode: str) -> None:
    """Those that multiply the loss, and the share of tokens whose ratio is not π_old / π_sampler."""
    low, high, batch = 0.6, 1.5, scored_batch()
    level, way = mode.split("_")
    log_ratio: dict[object, float] = {}
    for i, j, d in by_token(batch):
        key = (i, j) if level == "token" else i
        log_ratio[key] = log_ratio.get(key, 0.0) - (0.0 if math.isnan(d) else d)
    outside = {key: not low <= math.exp(x) <= high for key, x in log_ratio.items()}
    applied = [
        (min(max(math.exp(x), low), high) if way == "truncate" else 0.0) if outside[key] else math.exp(x) for key, x in log_ratio.items()
    ]
    tokens = [outside[(i, j) if level == "token" else i] for i, j, _ in by_token(batch)]
    assert any(tokens) and not all(tokens)
    config = LossConfig(sampler_correction=mode, sampler_correction_min=low, sampler_correction_max=high)
    got = mismatch_metrics(batch.split(2), config)
    expected = {"min": min(applied), "mean": statistics.fmean(applied), "max": max(applied)}
    assert {name: got[f"mismatch/ratio_{name}"] for name in expected} == pytest.approx(expected, rel=FP64_EXACT)
    assert got["mismatch/corrected"] == pytest.approx(sum(tokens) / len(tokens), rel=FP64_EXACT)


def test_the_kl_is_that_of_the_sampler_from_the_trainer() -> None:
    """The mean of k3 over tokens drawn from the sampler is KL(sampler ‖ trainer), which the other direction is not."""
    sampler_v, trainer_v = (torch.tensor(p, dtype=torch.float64) for p in ([0.7, 0.2, 0.1], [0.3, 0.3, 0.4]))
    tokens = torch.tensor([0] * 7 + [1] * 2 + [2])  # exactly the sampler's frequencies
    batch = replace(
        make_batch(((2, 10),)),
        old_logp_nt=trainer_v.log()[tokens][None],
        sampler_logp_nt=sampler_v.log()[tokens][None],
    )
    kl = float((sampler_v * (sampler_v / trainer_v).log()).sum())
    assert mismatch_metrics([batch], LossConfig())["mismatch_kl"] == pytest.approx(kl, rel=FP64_EXACT)


@pytest.mark.parametrize("mode", ["none", *MODES])
def test_a_sampler_that_is_the_trainer_has_none(mode: str) -> None:
    batch = scored_batch(noise=0.0)
    batch = replace(batch, sampler_logp_nt=batch.old_logp_nt)
    got = mismatch_metrics([batch], LossConfig(sampler_correction=mode))
    assert all(value == (1.0 if "ratio" in name else 0.0) for name, value in got.items()) and len(got) == (10 if mode == "none" else 14)


@pytest.mark.parametrize("mode", ["none", *MODES])
def test_nothing_trained_and_nothing_scored(mode: str) -> None:
    """NaN, written as null; no division by zero."""
    batch = scored_batch()
    nothing: Tensor = torch.zeros_like(batch.loss_mask_nt)
    config = LossConfig(sampler_correction=mode)
    empty = mismatch_metrics([replace(batch, loss_mask_nt=nothing)], config)
    unscored = mismatch_metrics([replace(batch, sampler_logp_nt=torch.full_like(batch.old_logp_nt, math.nan))], config)
    assert all(math.isnan(value) for name, value in empty.items() if name != "mismatch/unscored")
    assert unscored["mismatch/unscored"] == 1.0 and math.isnan(unscored["mismatch_kl"])
    assert mode == "none" or unscored["mismatch/ratio_mean"] == 1.0
