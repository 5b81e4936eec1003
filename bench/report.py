"""From measurements to numbers, tables, result rows and one JSON object."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.accuracy import Errors
from bench.gemm_peak import Work
from bench.race import Result
from bench.rows import append_rows, slug
from bench.workload import DType
from fastlora.metrics import environment, processor_name

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Target:
    """One row of the target table."""

    key: str
    """In the JSON object."""
    what: str
    limit: float
    at_least: bool
    """The number must reach the limit; False: stay below it."""

    def met(self, value: float) -> bool:
        """True when it is."""
        return value >= self.limit if self.at_least else value <= self.limit

    @property
    def bound(self) -> str:
        """The limit in print."""
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"


TARGETS = (
    Target("update_speedup_default", "update vs TRL default", 4.5, True),
    Target("update_speedup_best", "update vs the fastest TRL + PEFT", 3.0, True),
    Target("update_speedup_plain", "update vs the fastest plain PEFT loop", 2.0, True),
    Target("full_finetune_ratio", "update vs our full fine-tuning, time", 0.88, False),
    Target("memory_ratio_default", "peak memory vs TRL default", 0.25, False),
    Target("memory_ratio_best", "peak memory vs TRL bf16, micro-batch 4", 0.7, False),
    Target("gemm_share_bf16", "share of the GEMM peak, bf16", 0.6, True),
    Target("gemm_share_fp32", "share of the GEMM peak, fp32", 0.7, True),
    Target("logprob_error_ratio", "log-prob error vs TRL + PEFT, bf16", 1.1, False),
    Target("gradient_error_ratio", "gradient error vs TRL + PEFT, bf16, median of 8 seeds", 1.1, False),
    Target("logprob_error_ratio_fp32", "log-prob error vs TRL + PEFT, fp32", 1.1, False),
    Target("gradient_error_ratio_fp32", "gradient error vs TRL + PEFT, fp32, median of 8 seeds", 1.1, False),
    Target("step_speedup", "whole step vs TRL default", 3.0, True),
    Target("step_speedup_best", "whole step vs the fastest TRL + PEFT", 2.0, True),
)
"""Issue 3's table."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Everything one run of the benchmark has found. In every race fastlora comes first."""

    shape: str
    """The workload in words."""
    threads: int
    cosines: Mapping[str, float]
    """Contender -> cosine of its gradient with TRL's."""
    trials: Sequence[Result]
    """The search for the fastest settings of TRL and of the plain loop; TRL bf16 micro-batch 4 is among them."""
    updates: Mapping[str, Sequence[Result]]
    """default, best, plain: against TRL's defaults, the fastest TRL, the fastest plain loop; full: LoRA, full fine-tuning, in fp32."""
    steps: Mapping[str, Sequence[Result]]
    """default, best."""
    errors: Mapping[DType, tuple[Errors, Errors]]
    """(ours, TRL + PEFT's)."""
    lora: Work
    full: Work
    gemms: Mapping[DType, Sequence[Result]]
    """(ours, the products of our update and nothing else)."""


def summary(measured: Measured) -> dict[str, Any]:
    """The JSON object: ratios of medians of one race each, never of two."""
    updates, steps = measured.updates, measured.steps
    ours, default = updates["default"]
    small = next(t for t in measured.trials if (t.contender.library, t.contender.dtype, t.contender.micro_batch) == ("trl", "bfloat16", 4))
    races = [result for race in (*updates.values(), *steps.values()) for result in race]
    return {
        **{f"update_speedup_{name}": speedup(updates[name]) for name in ("default", "best", "plain")},
        "full_finetune_ratio": 1 / speedup(updates["full"]),
        "full_finetune_dtype": updates["full"][0].contender.dtype,
        "flop_ratio": measured.lora.flops / measured.full.flops,
        "memory_ratio_default": ours.peak_bytes / default.peak_bytes,
        "memory_ratio_best": ours.peak_bytes / small.peak_bytes,
        **gemm_numbers(measured.lora, measured.gemms),
        "step_speedup": speedup(steps["default"]),
        "step_speedup_best": speedup(steps["best"]),
        **error_ratios(measured.errors),
        "gradient_cosines": dict(measured.cosines),
        "contenders": [{"name": result.contender.name, **result.summary()} for result in races],
        "trials": [{"name": result.contender.name, **result.summary()} for result in measured.trials],
        "gflop": {"lora": measured.lora.flops / 1e9, "attention": measured.lora.attention_flops / 1e9, "full": measured.full.flops / 1e9},
        "shape": measured.shape,
        "threads": measured.threads,
        "device": device_name(),
        "commit": commit(),
    }


def speedup(race: Sequence[Result]) -> float:
    """The last contender's median over the first's, which is ours."""
    return race[-1].median / race[0].median


def gemm_numbers(lora: Work, gemms: Mapping[DType, Sequence[Result]]) -> dict[str, Any]:
    """Share of the GEMM peak: useful FLOPs (products and attention) over what the machine's GEMMs do in the time of our update, both of one
    race; and the peaks."""
    found: dict[str, Any] = {"gemm_peak_gflops": {}}
    suffixes: dict[DType, str] = {"bfloat16": "bf16", "float32": "fp32"}
    for dtype, suffix in suffixes.items():
        ours, products = gemms[dtype]
        peak = lora.gemm_flops / products.median
        found[f"gemm_share_{suffix}"] = lora.flops / (ours.median * peak)
        found["gemm_peak_gflops"][dtype] = peak / 1e9
    return found


def error_ratios(errors: Mapping[DType, tuple[Errors, Errors]]) -> dict[str, Any]:
    """Ours over TRL + PEFT's; bf16 without a suffix, and the errors themselves."""
    found: dict[str, Any] = {"errors": {}}
    suffixes: dict[DType, str] = {"bfloat16": "", "float32": "_fp32"}
    for dtype, suffix in suffixes.items():
        ours, theirs = errors[dtype]
        found[f"logprob_error_ratio{suffix}"] = ours.logp / theirs.logp
        found[f"gradient_error_ratio{suffix}"] = ours.gradient / theirs.gradient
        found["errors"][dtype] = {
            "logprob": {"fastlora": ours.logp, "trl": theirs.logp},
            "gradient": {"fastlora": ours.gradient, "trl": theirs.gradient},
            "gradient_by_seed": {"fastlora": ours.gradient_by_seed, "trl": theirs.gradient_by_seed},
        }
    return found


def result_rows(measured: Measured) -> Iterator[dict[str, Any]]:
    """One row per contender of every race."""
    device, commit_id = device_name(), commit()
    peaks = gemm_numbers(measured.lora, measured.gemms)["gemm_peak_gflops"]
    for op, races in (("train_step.update", measured.updates), ("train_step.step", measured.steps)):
        baseline = races["default"][-1].median
        for name, race in races.items():
            for result in race:
                contender = result.contender
                work = measured.full if contender.method == "full" else measured.lora
                rate = work.flops / result.median if op == "train_step.update" else None
                yield {
                    "op": op,
                    "race": name,
                    "implementation": contender.name,
                    "device": device,
                    "dtype": contender.dtype,
                    "shape": measured.shape,
                    "threads": measured.threads,
                    "median": result.median,
                    "p20": result.percentile(20),
                    "p80": result.percentile(80),
                    "gflop_per_s": None if rate is None else rate / 1e9,
                    "gb_per_s": None,  # a whole update has no compulsory traffic that would mean anything; bench/ops.py has it by op
                    "share_of_peak": None if rate is None else rate / 1e9 / peaks[contender.dtype],
                    "x_baseline": baseline / result.median,
                    "peak_bytes": result.peak_bytes,
                    "commit": commit_id,
                }


def write_rows(measured: Measured, folder: Path) -> Path:
    """Appends the rows to `folder`/DEVICE/train_step.jsonl (returned) and the JSON object to train_step_summary.jsonl beside it."""
    path = folder / device_slug() / "train_step.jsonl"
    append_rows(list(result_rows(measured)), path)
    append_rows([summary(measured)], path.with_name("train_step_summary.jsonl"))
    return path


def merge_summary(numbers: Mapping[str, Any], parts: Sequence[str], folder: Path, name: str = "train_step_summary") -> dict[str, Any]:
    """The newest summary `name` of this device with `numbers` in place of its own, appended as a row (returned).

    `again` says which parts are newer than the rest, and of which commit. Raises FileNotFoundError when nothing was measured here before.
    """
    path = folder / device_slug() / f"{name}.jsonl"
    last = json.loads(path.read_text().splitlines()[-1])
    merged = {**last, **numbers, "again": {**last.get("again", {}), **dict.fromkeys(parts, commit())}}
    append_rows([merged], path)
    return merged


def print_tables(measured: Measured, console: Console) -> None:
    """Contenders by race, trials, targets."""
    for title, races in (("update", measured.updates), ("whole step", measured.steps)):
        baseline = races["default"][-1].median
        table = contender_table(f"{title}: {measured.shape}, {measured.threads} threads, {device_name()}", baseline)
        for name, race in races.items():
            for result in race:
                add_result(table, name, result, baseline)
            table.add_section()
        console.print(table)
    baseline = measured.updates["default"][-1].median
    table = contender_table("trials of an update", baseline)
    for result in measured.trials:
        add_result(table, "trial", result, baseline)
    console.print(table)
    numbers = summary(measured)
    console.print(target_table(numbers, TARGETS, f"FLOPs of LoRA / full fine-tuning: {numbers['flop_ratio']:.3f}"))


def contender_table(title: str, baseline: float) -> Table:
    """Empty; `baseline`: seconds of TRL default."""
    table = Table(title=title, caption=f"× = TRL default's {baseline:.2f} s over these seconds")
    table.add_column("race")
    table.add_column("contender")
    for heading in ("median s", "p20", "p80", "CPU s", "peak GiB", "×"):
        table.add_column(heading, justify="right")
    return table


def add_result(table: Table, race: str, result: Result, baseline: float) -> None:
    """One line."""
    shown = result.summary()
    numbers = (shown["seconds"], shown["p20"], shown["p80"], shown["cpu_seconds"], result.peak_bytes / GIB, baseline / result.median)
    table.add_row(race, result.contender.name, *(f"{number:.2f}" for number in numbers))


def target_table(numbers: Mapping[str, Any], targets: Sequence[Target], caption: str) -> Table:
    """The targets that were measured, and whether that is enough."""
    table = Table(title="targets", caption=caption)
    for heading in ("what", "measured", "target", ""):
        table.add_column(heading)
    for target in targets:
        if target.key in numbers:
            value = numbers[target.key]
            table.add_row(target.what, f"{value:.4g}", target.bound, "[green]met[/]" if target.met(value) else "[red]missed[/]")
    return table


def json_line(measured: Measured) -> str:
    """The summary on one line."""
    return json.dumps(summary(measured))


def device_name() -> str:
    """Of the CPU."""
    return processor_name()


def device_slug() -> str:
    """The folder of this machine's rows."""
    return slug(device_name())


@cache
def commit() -> str | None:
    """Of this checkout when it was first asked for, as every run of fastlora records it: rows that are written later make a tree dirty."""
    return environment()["commit"]
