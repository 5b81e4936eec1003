"""Result rows as the benchmarks write them, of made-up numbers, for the page and its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.contender import Contender
from bench.race import Result
from bench.report import TARGETS
from bench.rollout import RIVALS, VLLM
from bench.rollout_report import Measured
from bench.rollout_report import rows as rollout_rows
from bench.rollout_report import summary as rollout_summary
from bench.rows import Row, append_rows, timing
from bench.scaling import Machine

MACHINE = Machine("Test CPU", 2, "abcdef0123456789")


def train_step_rows() -> list[Row]:
    """An update race and a step race; TRL takes ten times as long."""
    common = {"device": MACHINE.device, "threads": MACHINE.threads, "shape": "tiny", "dtype": "float32", "commit": MACHINE.commit}
    rows = []
    for op in ("train_step.update", "train_step.step"):
        for name, seconds in (("fastlora bfloat16 mb16", 2.5), ("trl float32 mb16", 25.0)):
            work = {"share_of_peak": 0.625, "x_baseline": 25.0 / seconds, "peak_bytes": 3 << 30}
            rows.append({**common, "op": op, "race": "default", "implementation": name, **timing([seconds], flops=1e12), **work})
    return rows


def summary() -> dict[str, Any]:
    """Targets: the first is met by far, all others take the value of their limit; the last is missed."""
    numbers = {target.key: target.limit for target in TARGETS}
    numbers[TARGETS[0].key], numbers[TARGETS[-1].key] = 9.87, 0.5
    return {**numbers, "flop_ratio": 0.75, "shape": "tiny", "threads": 2, "device": MACHINE.device, "commit": MACHINE.commit}


def ops_rows() -> list[Row]:
    """One op, two implementations, two dtypes."""
    rows = []
    for dtype in ("bfloat16", "float32"):
        for name, seconds in (("reference", 0.008), ("cpp", 0.002)):
            fields = {"bound": "memory", "share_of_peak": 0.5, "peak_bytes": None, "x_baseline": 0.008 / seconds}
            row = MACHINE.row("-", 0, name, dtype, "[7, 5]", **timing([seconds], flops=1e6, nbytes=1e7), **fields)
            rows.append({**row, "op": "swiglu"})
    return rows


def scaling_rows() -> list[Row]:
    """Two axes and the time split."""
    rows = []
    for value in (8, 32, 64):
        measured = {**timing([value / 8], flops=value * 1e9), "gflop": float(value), "peak_bytes": 1 << 30}
        rows.append(MACHINE.row("rank", value, "fastlora bfloat16 mb16", "bfloat16", f"r {value}", **measured))
        state = {"gb": value / 1e3, "state_bytes": 12 * value, "peak_bytes": None}
        rows.append(MACHINE.row("trainable entries", value, "AdamW", "float32", f"{value}", **timing([0.001 * value], nbytes=1e6), **state))
    for name, seconds in (("plain", {"GEMM": 3.0, "rest": 1.0}), ("fastlora", {"GEMM": 2.0, "rest": 0.5})):
        fields = {"seconds": seconds, "peak_bytes": None}
        rows.append(MACHINE.row("time split", 0, name, "bfloat16", "tiny", **timing([sum(seconds.values())]), **fields))
    return rows


def result(contender: Contender, seconds: float, metrics: Mapping[str, Sequence[float]] | None = None) -> Result:
    """Three runs of the same length."""
    return Result(contender, [seconds] * 3, [seconds] * 3, 1 << 30, {k: list(v) for k, v in (metrics or {}).items()})


def rollouts_measured(*, leak: float = 0.0) -> Measured:
    """vLLM takes 5 s, our torch sampler 8, TRL 20; a leak in bytes per swap."""
    engine = {"engine_cpu_seconds": [7.0] * 3, "engine_peak_bytes": [2.0**30] * 3}
    shares = {"sampler/swap_seconds": [0.05] * 3, "sampler/canary_seconds": [0.5] * 3, "tokens": [2048.0] * 3}
    races = {
        dtype: [result(rivals[0], 5.0, {**engine, **shares}), result(rivals[1], 8.0), result(rivals[2], 20.0)]
        for dtype, rivals in RIVALS.items()
    }
    grown = {"worker_bytes": [1e9 + leak * i for i in range(20)]}
    flat = {name: [1e6] * 20 for name in ("trainer_bytes", "folder_bytes", "tmpfs_bytes", "adapters_cached")}
    timed = {"sampler/swap_seconds": [0.05] * 20, "sampler/canary_seconds": [0.2] * 20}
    compared = {"full/max_abs": [5e-5], "full/tokens": [2048.0], "nucleus/max_abs": [0.1], "nucleus/tokens": [2000.0]}
    compared |= {"nucleus/exceptions": [1.0], "nucleus/unexplained": [0.0], "adapter_effect": [0.3]}
    return Measured(
        shape="tiny",
        threads=2,
        adapter_bytes=1000,
        rollouts=races,
        steps=races,
        merged={dtype: [race[0], race[-1]] for dtype, race in races.items()},
        defaults=[races["bfloat16"][0], races["float32"][-1]],
        swaps=Result(replace(VLLM, work="swap"), [1.0] * 20, [1.0] * 20, 1 << 30, {**grown, **flat, **timed}),
        logprobs=result(replace(VLLM, work="logprob"), 1.0, compared),
    )


def write_all(results: Path) -> None:
    """All files of a device."""
    folder = results / "test-cpu"
    append_rows(train_step_rows(), folder / "train_step.jsonl")
    append_rows([summary()], folder / "train_step_summary.jsonl")
    append_rows(ops_rows(), folder / "ops.jsonl")
    append_rows(scaling_rows(), folder / "scaling.jsonl")
    append_rows(list(rollout_rows(rollouts_measured())), folder / "rollout.jsonl")
    append_rows([rollout_summary(rollouts_measured())], folder / "rollout_summary.jsonl")
