"""From measurements of rollouts to issue 5's numbers, tables, rows and one JSON object."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.race import REPOSITORY, Result
from bench.report import GIB, Target, commit, device_name, device_slug, merge_summary, speedup, target_table
from bench.rows import Row, append_rows, timing
from bench.workload import DType

TARGETS = (
    Target("swap_seconds", "swap in memory, export to first token possible, seconds", 0.1, False),
    Target("swap_share", "swap, share of a step, fp32", 0.02, False),
    Target("swap_share_bf16", "swap, share of a step, bf16", 0.02, False),
    Target("canary_share", "canary, share of a step, fp32", 0.03, False),
    Target("canary_share_bf16", "canary, share of a step, bf16", 0.03, False),
    Target("rollout_speedup", "rollout vs TRL's Hugging Face generate, fp32", 1.3, True),
    Target("rollout_speedup_bf16", "rollout vs TRL's Hugging Face generate, bf16", 1.3, True),
    Target("step_speedup", "whole step vs the fastest TRL's with Hugging Face generate, both fp32", 3.0, True),
    Target("step_speedup_bf16", "the same, both bf16", 3.0, True),
    Target("step_speedup_merged", "the same, merged in the engine, both fp32", 3.0, True),
    Target("step_speedup_merged_bf16", "the same, merged in the engine, both bf16", 3.0, True),
    Target("step_speedup_defaults", "the same, fastlora's defaults (bf16) vs TRL's (fp32, micro-batch 16)", 3.0, True),
    Target("logprob_max_abs", "log-prob vLLM − trainer, fp32, T .7, top-p 1: max, nats", 1e-4, False),
    Target("logprob_nucleus_within", "the same at top-p .9: share of tokens within 1e-4", 0.999, True),
    Target("boundary_unexplained", "exceptions that are no boundary tokens", 0.0, False),
    Target("soak_trainer_growth", "growth of the trainer's memory per swap, in adapters", 0.01, False),
    Target("soak_worker_growth", "growth of the engine worker's memory per swap, in adapters", 0.01, False),
    Target("soak_tmpfs_growth", "growth of the tmpfs per swap, in adapters", 0.01, False),
    Target("soak_latency_ratio", "swap's median of the last fifth over the first fifth's", 1.1, False),
)
"""Issue 5's table. A leak of every adapter would be a growth of 1."""

SUFFIXES: Mapping[DType, str] = {"float32": "", "bfloat16": "_bf16"}
"""Of the JSON's keys."""

SUMMARY = "rollout_summary"
"""File of the JSON objects."""

WARMED_UP = 0.2
"""Of the swaps: caches fill, and the allocator takes what it will keep."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured; a part that was not asked for is empty. In every race vLLM comes first, TRL last; in rollouts and steps our torch
    sampler stands between them."""

    shape: str
    threads: int
    adapter_bytes: int
    """Of one version in the engine, at the swaps' dtype."""
    rollouts: Mapping[DType, Sequence[Result]] = field(default_factory=dict)
    steps: Mapping[DType, Sequence[Result]] = field(default_factory=dict)
    merged: Mapping[DType, Sequence[Result]] = field(default_factory=dict)
    defaults: Sequence[Result] = ()
    """Whole steps, both."""
    swaps: Result | None = None
    logprobs: Result | None = None
    compiled: Sequence[Result] = ()
    """The engine as it runs, and compiled."""


def summary(measured: Measured) -> dict[str, Any]:
    """The JSON object."""
    where = {"shape": measured.shape, "threads": measured.threads, "device": device_name(), "commit": commit()}
    return numbers(measured) | where


def numbers(measured: Measured) -> dict[str, Any]:
    """Of the parts that were measured; ratios of medians of one race each."""
    found: dict[str, Any] = {}
    for dtype, race in measured.rollouts.items():
        found |= {f"rollout_speedup{SUFFIXES[dtype]}": speedup(race), f"rollout_vs_torch{SUFFIXES[dtype]}": race[1].median / race[0].median}
    for dtype, race in measured.steps.items():
        found |= {f"step_speedup{SUFFIXES[dtype]}": speedup(race), f"step_vs_torch{SUFFIXES[dtype]}": race[1].median / race[0].median}
        found |= {f"{what}_share{SUFFIXES[dtype]}": share(race[0], f"sampler/{what}_seconds") for what in ("swap", "canary")}
    found |= {f"step_speedup_merged{SUFFIXES[dtype]}": speedup(race) for dtype, race in measured.merged.items()}
    if measured.defaults:
        found["step_speedup_defaults"] = speedup(measured.defaults)
    if measured.swaps:
        found |= swap_numbers(measured.swaps, measured.adapter_bytes)
    if measured.logprobs:
        found |= logprob_numbers(measured.logprobs)
    if measured.compiled:
        found["compiled_speedup"] = measured.compiled[0].median / measured.compiled[1].median
    groups = {
        "rollout": measured.rollouts.values(),
        "step": measured.steps.values(),
        "merged_step": measured.merged.values(),
        "default_step": [measured.defaults],
        "compiled": [measured.compiled],
    }
    contenders = {f"{name}_contenders": [about(result) for race in races for result in race] for name, races in groups.items()}
    return found | {name: shown for name, shown in contenders.items() if shown}


def about(result: Result) -> dict[str, Any]:
    """One contender, JSON-able."""
    # A reward's metric has the path of its file, which is this machine's.
    metrics = {name.replace(f"{REPOSITORY}/", ""): float(np.median(values)) for name, values in result.metrics.items()}
    return {"name": result.contender.name, **result.summary(), "tokens_per_second": tokens_per_second(result), "metrics": metrics}


def share(result: Result, metric: str) -> float:
    """Median over the runs of a metric in seconds over the run's own."""
    return float(np.median(np.divide(result.metrics[metric], result.seconds)))


def tokens_per_second(result: Result) -> float | None:
    """Completion tokens over wall seconds; None where none were counted."""
    return float(np.median(result.metrics["tokens"])) / result.median if "tokens" in result.metrics else None


def swap_numbers(swaps: Result, adapter_bytes: int) -> dict[str, Any]:
    """Medians over all swaps, and whether anything grew."""
    seconds = {what: swaps.metrics[f"sampler/{what}_seconds"] for what in ("swap", "canary")}
    slopes = {what: slope(swaps.metrics[f"{what}_bytes"]) for what in ("trainer", "worker", "folder", "tmpfs")}
    fifth = max(1, len(swaps.seconds) // 5)
    early, late = (float(np.median(part)) for part in (seconds["swap"][:fifth], seconds["swap"][-fifth:]))
    return {
        **{f"{what}_seconds": float(np.median(values)) for what, values in seconds.items()},
        **{f"soak_{what}_growth": slopes[what] / adapter_bytes for what in ("trainer", "worker", "tmpfs")},
        "soak_latency_ratio": late / early,
        "soak": {
            "swaps": len(swaps.seconds),
            "adapter_bytes": adapter_bytes,
            "bytes_per_swap": slopes,
            "first_and_last_bytes": {what: [swaps.metrics[f"{what}_bytes"][i] for i in (0, -1)] for what in slopes},
            "adapters_cached": max(swaps.metrics["adapters_cached"]),
            "swap_seconds": {"first_fifth": early, "last_fifth": late, "slope_per_swap": slope(seconds["swap"])},
            "canary_seconds": {"first_fifth": float(np.median(seconds["canary"][:fifth])), "slope_per_swap": slope(seconds["canary"])},
        },
    }


def slope(values: Sequence[float]) -> float:
    """Least squares, per step, without the first WARMED_UP of them; 0 of fewer than three."""
    kept = values[int(WARMED_UP * len(values)) :]
    return float(np.polyfit(np.arange(len(kept)), kept, 1)[0]) if len(kept) > 2 else 0.0


def logprob_numbers(logprobs: Result) -> dict[str, Any]:
    """All runs together."""
    total = {name: sum(values) for name, values in logprobs.metrics.items()}
    return {
        "logprob_max_abs": max(logprobs.metrics["full/max_abs"]),
        "logprob_tokens": int(total["full/tokens"]),
        "logprob_nucleus_within": 1 - total["nucleus/exceptions"] / total["nucleus/tokens"],
        "logprob_nucleus_max_abs": max(logprobs.metrics["nucleus/max_abs"]),
        "boundary_exceptions": int(total["nucleus/exceptions"]),
        "boundary_unexplained": int(total["nucleus/unexplained"]),
        "adapter_effect": float(np.mean(logprobs.metrics["adapter_effect"])),
    }


def step_races(measured: Measured) -> dict[str, Sequence[Result]]:
    """By name, all that time whole steps."""
    merged = {f"{dtype}, merged": race for dtype, race in measured.merged.items()}
    return {**measured.steps, **merged, "defaults": measured.defaults}


def rows(measured: Measured) -> Iterator[Row]:
    """One per contender of every race, and the swaps'."""
    for op, races in (("rollout.sample", measured.rollouts), ("rollout.step", step_races(measured))):
        for name, race in races.items():
            for result in race:
                yield row(measured, op, name, result, result.seconds, race[-1].median)
    for result in measured.compiled:
        yield row(measured, "rollout.sample", "compiled engine", result, result.seconds, measured.compiled[0].median)
    if measured.swaps:
        for what in ("swap", "canary"):
            yield row(measured, f"rollout.{what}", "swaps", measured.swaps, measured.swaps.metrics[f"sampler/{what}_seconds"], None)


def row(measured: Measured, op: str, race: str, result: Result, seconds: Sequence[float], baseline: float | None) -> Row:
    """baseline: seconds that `x_baseline` is over."""
    timed = timing(seconds)
    return {
        "op": op,
        "race": race,
        "implementation": result.contender.name,
        "device": device_name(),
        "dtype": result.contender.dtype,
        "shape": measured.shape,
        "threads": measured.threads,
        **timed,
        "tokens_per_s": tokens_per_second(result) if op != "rollout.swap" else None,
        "cpu_seconds": cpu_seconds(result),
        "share_of_peak": None,
        "x_baseline": None if baseline is None else baseline / timed["median"],
        "peak_bytes": memory(result),
        "commit": commit(),
    }


def cpu_seconds(result: Result) -> float:
    """Median of a run, the engine's included."""
    engine = result.metrics.get("engine_cpu_seconds", [0.0] * len(result.cpu_seconds))
    return float(np.median(np.add(result.cpu_seconds, engine)))


def memory(result: Result) -> int:
    """Peak, the engine's processes included."""
    return result.peak_bytes + int(max(result.metrics.get("engine_peak_bytes", [0.0])))


def write_measured(measured: Measured, part: str, folder: Path, *, anew: bool) -> None:
    """Appends the rows to `folder`/DEVICE/rollout.jsonl and the numbers to the newest summary in rollout_summary.jsonl beside it.

    anew: they begin a summary; so do the first ones of a device.
    """
    append_rows(list(rows(measured)), folder / device_slug() / "rollout.jsonl")
    path = folder / device_slug() / f"{SUMMARY}.jsonl"
    if anew or not path.is_file():
        append_rows([summary(measured)], path)
    else:
        merge_summary(numbers(measured), [part], folder, SUMMARY)


def print_tables(measured: Measured, console: Console) -> None:
    """Races, the swaps' growth, targets."""
    table = Table(title=f"rollouts: {measured.shape}, {measured.threads} threads, {device_name()}", caption="× = over the race's last, TRL")
    for heading in ("what", "race", "contender"):
        table.add_column(heading)
    for heading in ("median s", "p20", "p80", "CPU s", "tokens/s", "peak GiB", "×"):
        table.add_column(heading, justify="right")
    for found in rows(measured):
        shown = [f"{found[name]:.3f}" for name in ("median", "p20", "p80")]
        rate, ratio = (
            "" if found[name] is None else format(found[name], form) for name, form in (("tokens_per_s", ".0f"), ("x_baseline", ".2f"))
        )
        rest = (f"{found['cpu_seconds']:.2f}", rate, f"{found['peak_bytes'] / GIB:.2f}", ratio)
        table.add_row(found["op"], found["race"], found["implementation"], *shown, *rest)
    console.print(table)
    found = numbers(measured)
    if measured.swaps:
        console.print(json.dumps(found["soak"]), markup=False, highlight=False)
    console.print(target_table(found, TARGETS, "growth: 1 = an adapter stays behind at every swap"))


def missed(found: Mapping[str, Any]) -> list[str]:
    """The targets that were measured and are not met."""
    return [target.what for target in TARGETS if target.key in found and not target.met(found[target.key])]
