"""The rollout benchmark without an engine: the nucleus' edge against fp64, what it explains, growth, JSON keys, ratios, red and green."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from bench.figures import main as figures
from bench.nucleus import agreement, nucleus_edge
from bench.report import device_slug
from bench.rollout import RIVALS, TORCH, TRL, VLLM, TokensError, check_tokens, parse
from bench.rollout_report import TARGETS, missed, numbers, print_tables, slope, summary, write_measured
from bench.rows import read_rows
from bench.workload import RANK, SMALLEST_RANK, Settings, read_settings, uneven_ranks, write_settings
from tests.bench.synthetic_rows import rollouts_measured, write_all
from tests.tolerances import CUMULATIVE_PROBABILITY

REQUIRED = {"swap_seconds", "swap_share", "canary_share", "rollout_speedup", "step_speedup", "logprob_max_abs", "device", "commit"}


def oracle(logits_v: Tensor, target: int, temperature: float, top_p: float) -> float:
    """In fp64, one token after the other; the most probable one is inside whatever top_p is."""
    p = torch.softmax(logits_v.double() / temperature, 0).tolist()
    before = {token: sum(q for q in p if q > p[token]) for token in range(len(p))}  # no two are equal
    inside = [token for token in before if before[token] < top_p]
    outside = [token for token in before if token not in inside]
    on_the_edge = [target, max(inside, key=before.__getitem__), *sorted(outside, key=before.__getitem__)[:1]]
    return min(abs(before[token] - top_p) for token in on_the_edge)


@pytest.mark.parametrize(("t", "v"), [(1, 1), (63, 17), (300, 101)])  # 300: more than one block of rows
@pytest.mark.parametrize("top_p", [0.1, 0.9, 1.0])
def test_edges_against_fp64(t: int, v: int, top_p: float) -> None:
    generator = torch.Generator().manual_seed(t)
    logits_tv = 3 * torch.randn(t, v, generator=generator)
    targets_t = torch.randint(v, (t,), generator=generator)
    edge_t = nucleus_edge(logits_tv, targets_t, 0.7, top_p)
    expected = torch.tensor([oracle(logits_tv[i], int(targets_t[i]), 0.7, top_p) for i in range(t)], dtype=torch.float64)
    torch.testing.assert_close(edge_t.double(), expected, rtol=0, atol=CUMULATIVE_PROBABILITY)


def test_the_edge_is_seen_from_both_sides() -> None:
    """p = .5, .3, .15, .05: before = 0, .5, .8, .95."""
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()
    for token in range(4):  # .8 is the first one outside, whatever was sampled
        assert float(nucleus_edge(logits, torch.tensor([token]), 1.0, 0.8 - 1e-5)) == pytest.approx(1e-5, rel=1e-6)
        assert float(nucleus_edge(logits, torch.tensor([token]), 1.0, 0.8 + 1e-5)) == pytest.approx(1e-5, rel=1e-6)  # the last inside
    assert float(nucleus_edge(logits, torch.tensor([3]), 1.0, 0.949)) == pytest.approx(0.001)  # the sampled one
    assert float(nucleus_edge(logits, torch.tensor([0]), 1.0, 0.65)) == pytest.approx(0.15)


def test_exceptions_are_counted_and_explained() -> None:
    ours, edge = torch.zeros(5), torch.tensor([1.0, 1.0, 1e-5, 1e-5, 1.0])
    found = agreement(torch.tensor([0.0, 9e-5, 0.1, 0.0, 0.2]), ours, edge)
    assert (found.tokens, found.exceptions, found.unexplained) == (5, 2, 1)
    assert (found.within, found.max_abs) == (pytest.approx(0.6), pytest.approx(0.2))
    nothing = agreement(torch.full((5,), torch.nan), ours, edge)
    assert (nothing.exceptions, nothing.unexplained) == (5, 3), "NaN agrees with nothing"


def test_slope_leaves_the_warm_up_out() -> None:
    assert slope([100.0, 50.0, *(3.0 * i for i in range(8))]) == pytest.approx(3.0)
    assert slope([1.0, 2.0]) == 0.0


def test_json() -> None:
    found = json.loads(json.dumps(summary(rollouts_measured())))
    assert found.keys() >= REQUIRED | {target.key for target in TARGETS}
    ours = found["rollout_contenders"][0]
    assert (ours["name"], ours["tokens_per_second"]) == (VLLM.name, pytest.approx(2048 / 5))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            ("rollout_speedup", 4.0),
            ("step_speedup_bf16", 4.0),
            ("step_speedup_defaults", 4.0),
            ("rollout_vs_torch", 1.6),
            ("swap_share", 0.01),
            ("canary_share_bf16", 0.1),
        ),
        *(("swap_seconds", 0.05), ("canary_seconds", 0.2), ("soak_worker_growth", 0.02), ("soak_latency_ratio", 1.0)),
        *(("logprob_max_abs", 5e-5), ("logprob_nucleus_within", 1 - 1 / 2000), ("boundary_exceptions", 1)),
    ],
)
def test_numbers(key: str, value: float) -> None:
    assert numbers(rollouts_measured(leak=20.0))[key] == pytest.approx(value)


def test_targets_are_green_or_red() -> None:
    assert missed(numbers(rollouts_measured())) == ["canary, share of a step, fp32", "canary, share of a step, bf16"]
    assert "growth of the engine worker's memory per swap, in adapters" in missed(numbers(rollouts_measured(leak=20.0)))
    console = Console(record=True, width=200)
    print_tables(rollouts_measured(), console)
    lines = console.export_text().splitlines()
    assert all(any(target.what in line and ("met" in line or "missed" in line) for line in lines) for target in TARGETS)
    assert sum("missed" in line for line in lines) == 2


def test_a_part_alone_has_its_own_numbers_and_goes_into_the_last_summary(tmp_path: Path) -> None:
    swaps = replace(rollouts_measured(), rollouts={}, steps={}, logprobs=None)
    assert "swap_seconds" in numbers(swaps) and "rollout_speedup" not in numbers(swaps)
    assert not parse(["--only", "swaps", "--check", "--out", str(tmp_path)]).writes
    write_measured(rollouts_measured(leak=20.0), "steps", tmp_path, anew=False)  # nothing was there: it begins
    write_measured(swaps, "swaps", tmp_path, anew=False)
    last = read_rows(tmp_path / device_slug() / "rollout_summary.jsonl")[-1]
    assert (last["soak_worker_growth"], last["rollout_speedup"]) == (pytest.approx(0.0, abs=1e-6), 4.0)
    assert last["again"].keys() == {"swaps"}


def test_rows_count_the_engine_too(tmp_path: Path) -> None:
    write_measured(rollouts_measured(), "steps", tmp_path, anew=True)
    rows = read_rows(tmp_path / device_slug() / "rollout.jsonl")
    assert [row["op"] for row in rows] == ["rollout.sample"] * 6 + ["rollout.step"] * 12 + ["rollout.swap", "rollout.canary"]
    assert (rows[0]["cpu_seconds"], rows[0]["peak_bytes"], rows[2]["cpu_seconds"]) == (12.0, 2 << 30, 20.0)
    assert [row["x_baseline"] for row in rows[:3]] == [4.0, 2.5, 1.0]


def test_the_page_has_the_rollouts(tmp_path: Path) -> None:
    write_all(tmp_path / "results")
    assert figures(["--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")]) == 0
    page = (tmp_path / "docs" / "README.md").read_text()
    assert "| canary, share of a step, fp32 | 0.1 | ≤ 0.03 | **missed** |" in page
    assert "| sample | float32 | fastlora-vllm float32 mb16 rollout | 5.000 | 5.000 | 5.000 | 12.00 | 410 | 2.00 | 4.00 |" in page


def test_the_workload_is_uneven_and_the_same_every_time(tmp_path: Path) -> None:
    ranks = uneven_ranks()
    assert ranks == uneven_ranks() and len(ranks) == 210
    assert set(ranks.values()) == set(range(SMALLEST_RANK, RANK + 1))
    write_settings(Settings(ranks, 7), tmp_path)
    assert read_settings(tmp_path) == Settings(ranks, 7)
    assert read_settings(tmp_path / "elsewhere") == Settings()


def test_whoever_samples_other_tokens_is_named() -> None:
    """vLLM ended completions at eos once: 6 of 128 tokens fewer, and nothing else showed it."""
    race = rollouts_measured().rollouts["float32"]
    check_tokens(race, 2048)
    with pytest.raises(TokensError, match="fastlora-vllm float32 mb16 rollout sampled 2048 tokens in a run instead of 2054"):
        check_tokens(race, 2054)


def test_races_are_fair() -> None:
    """One dtype a race; ours first, TRL last; a dry run is small."""
    for dtype, rivals in RIVALS.items():
        assert [rival.library for rival in rivals] == [VLLM.library, TORCH.library, TRL.library]
        assert {rival.dtype for rival in rivals} == {dtype}
    assert parse(["--dry-run"]).swaps < 10
