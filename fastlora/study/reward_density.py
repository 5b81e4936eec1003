"""S4: one GRPO loss, rewards at the end, at each step or at each token, LoRA of several ranks and full fine-tuning
(github gernim/lora-reward-density).

Stage 1, if `teacher_rank` is given: a teacher is trained per seed on the outcome reward, and its adapter on the shared base model is who
distils; else reward.distillation of the config's `regimes` names one.
Stage 2: every regime × rank × seed, and full fine-tuning in float32 with its own learning rate.

The regimes differ in their rewards alone: each is a set of changes to the base run ([reward_density.runs.REGIME]), and everything behind
the deposits is the same code. Published: 3 seeds of 100 steps of Qwen3-1.7B-Base on MATH, judged on 100 problems of MATH-500.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import ttest_ind

from fastlora.config import RunConfig
from fastlora.run_folder import RunFolder
from fastlora.study.cells import Cell
from fastlora.study.claims import Claim, Estimate, above, accuracy_claim, by_interval, by_property, conclusions
from fastlora.study.comparisons import accuracies, accuracy_table, compare_cells, comparison_table
from fastlora.study.config import StudyConfig
from fastlora.study.pictures import CurvePanel, against, curves, intervals, pass_at_k_curves
from fastlora.study.report import Picture, StudyReport, Table
from fastlora.study.results import CellResult, Cells, by_strategy, stack
from fastlora.study.setting import setting
from fastlora.study.studies import Plan

SOURCE = "github gernim/lora-reward-density"
FULL, TEACHER = "full", "teacher"
OUTCOME, PROCESS, DISTILLATION = "outcome", "process", "distillation"
PUBLISHED_STD = {OUTCOME: 0.64, DISTILLATION: 1.00, PROCESS: 9.05}
PUBLISHED_ACCURACY = {
    OUTCOME: {1: 0.550, 4: 0.467, 16: 0.527, 64: 0.537, 256: 0.547, FULL: 0.553},
    PROCESS: {1: 0.467, 4: 0.500, 16: 0.457, 64: 0.483, 256: 0.510, FULL: 0.483},
    DISTILLATION: {1: 0.427, 4: 0.407, 16: 0.450, 64: 0.440, 256: 0.430, FULL: 0.420},
}
"""MATH-500, 100 problems, 3 seeds; final, for process the peak; the base model .375."""
BAND = 0.05
"""Points within which an accuracy counts as that of full fine-tuning."""
COLLAPSED_TRUNCATION = 0.9
COLLAPSE_STEP = 79


class RewardDensity:
    """The study; see the module."""

    def __init__(self, config: StudyConfig) -> None:
        self.config, self.own = config, config.reward_density

    def plan(self) -> Plan:
        """Teachers, then every regime at every rank."""
        teachers: Mapping[str, Path] = {}
        if self.own.teacher_rank and DISTILLATION in self.own.regimes:
            teachers = yield [Cell(f"{TEACHER}/seed-{seed}", self._teacher(seed)) for seed in self.config.seeds]
        yield [
            Cell(f"{regime} r {size}/seed-{seed}", self._run(regime, size, seed, teachers.get(f"{TEACHER}/seed-{seed}")))
            for regime in self.own.regimes
            for size in self._sizes
            for seed in self.config.seeds
        ]

    @property
    def _sizes(self) -> tuple[int | str, ...]:
        return (*self.own.ranks, *([FULL] if self.own.full else []))

    def _teacher(self, seed: int) -> RunConfig:
        return self.config.run_config(
            {
                "seed": seed,
                "lora.r": self.own.teacher_rank,
                "optim.lr": self.own.teacher_lr,
                "trainer.steps": self.own.teacher_steps,
                **self._lora(),
            },
            f"{TEACHER}, seed {seed}",
        )

    def _run(self, regime: str, size: int | str, seed: int, teacher: Path | None) -> RunConfig:
        changes: dict[str, Any] = {"seed": seed, "advantage.estimator": "deposits", **self.own.runs.get(regime, {}), **self._lora()}
        if regime == DISTILLATION and teacher is not None:
            changes["reward.distillation.adapter"] = RunFolder(teacher).adapter
        if size == FULL:
            changes |= {"method": "full", "optim.lr": self.own.lr_full, "model.dtype": "float32"}
        else:
            changes |= {"lora.r": size, "optim.lr": self.own.lr}
        return self.config.run_config(changes, f"{regime}, r {size}, seed {seed}")

    def _lora(self) -> dict[str, Any]:
        return {f"lora.{name}_pattern": {} for name in ("rank", "alpha")} | {f"lora.{name}_budget": None for name in ("rank", "parameter")}

    def report(self, folders: Mapping[str, Path], command: str) -> StudyReport:
        """Tables, figures and verdicts of all cells."""
        cells = by_strategy(folders)
        students = {name: by_seed for name, by_seed in cells.items() if name != TEACHER}
        found = compare_cells(students, list(self._pairs()))
        thresholds = self.config.thresholds
        inside = [
            accuracy_claim(
                f"{one.second} is as accurate as full fine-tuning, to {100 * BAND:g} points",
                one.no_difference(BAND),
                one.sample(thresholds.min_items, thresholds.min_seeds),
                source=SOURCE,
                published=self._published_gap(one.second),
            )
            for one in found
        ]
        claims = (*self._advantage_claims(students), *self._collapse_claims(students), *inside)
        may, may_not = conclusions(claims)
        tables = [accuracy_table(cells, {f"{regime} r {size}": a for regime, by in PUBLISHED_ACCURACY.items() for size, a in by.items()})]
        tables += [self._dynamics_table(students)] + ([comparison_table(found, {})] if found else [])
        return StudyReport(
            "Reward density and LoRA capacity",
            "reward-density",
            may or ("Nothing: no claim is decided.",),
            (*may_not, "Where a longer run ends: the published collapse came at steps 28 to 79 of 100"),
            claims,
            tuple(tables),
            self._pictures(cells, students),
            setting(self.config, command, [cell for by_seed in cells.values() for cell in by_seed.values()]),
        )

    def _pairs(self) -> Iterator[tuple[str, str]]:
        if self.own.full:
            yield from ((f"{regime} r {FULL}", f"{regime} r {rank}") for regime in self.own.regimes for rank in self.own.ranks)

    def _published_gap(self, name: str) -> str:
        regime, _, rank = name.partition(" r ")
        theirs = PUBLISHED_ACCURACY[regime]
        return f"{100 * (theirs[int(rank)] - theirs[FULL]):+.1f} points, called inside the band" if int(rank) in theirs else "rank not run"

    def _peaks(self, students: Cells, regime: str) -> list[float]:
        """Largest advantage std of every LoRA cell of a regime; all ranks and seeds."""
        return [
            float(np.nanmax(cell.column("advantage/std"))) for rank in self.own.ranks for cell in students[f"{regime} r {rank}"].values()
        ]

    def _advantage_claims(self, students: Cells) -> Iterator[Claim]:
        """Peak advantage std of one regime over another's, on a log scale; t interval over cells."""
        for dense, sparse in ((PROCESS, OUTCOME), (PROCESS, DISTILLATION), (DISTILLATION, OUTCOME)):
            if not {dense, sparse} <= set(self.own.regimes):
                continue
            estimate = _log_ratio(self._peaks(students, dense), self._peaks(students, sparse))
            what = f"log of the peak advantage std, {dense} over {sparse} (Welch, over ranks and seeds)"
            yield by_interval(estimate, above(0.0), what).claim(
                f"Peak advantage std is larger under {dense} than under {sparse} rewards",
                source=f"{SOURCE}, peak advantage std",
                published=f"{PUBLISHED_STD[dense]:.2f} against {PUBLISHED_STD[sparse]:.2f}",
            )

    def _collapse_claims(self, students: Cells) -> Iterator[Claim]:
        if PROCESS not in self.own.regimes:
            return
        collapsed = {
            f"{name}/seed-{seed}": _collapsed(cell, self.own.collapse)
            for name, by_seed in students.items()
            if name.startswith(f"{PROCESS} ")
            for seed, cell in by_seed.items()
        }
        what = f"accuracy below {self.own.collapse:g} of the base model's and {COLLAPSED_TRUNCATION:.0%} truncated at the end"
        decision = by_property(collapsed, what)
        steps = self.config.base_run().trainer.steps
        if steps < COLLAPSE_STEP and not any(collapsed.values()):  # nothing has happened yet that was said to happen later
            decision = replace(decision, verdict="undecided", measured=f"none of {len(collapsed)} in {steps} steps")
        yield decision.claim(
            "Process rewards collapse within the run", source=f"{SOURCE}, collapse figure", published=f"at step {COLLAPSE_STEP} of 100"
        )

    def _dynamics_table(self, students: Cells) -> Table:
        rows = []
        for name, by_seed in students.items():
            for seed, cell in by_seed.items():
                std_s, truncated_s = cell.column("advantage/std"), cell.column("completion/truncated")
                peak = int(cell.steps[int(np.nanargmax(std_s))])
                regime = name.partition(" r ")[0]
                rows.append(
                    (
                        name,
                        seed,
                        float(np.nanmax(std_s)),
                        PUBLISHED_STD[regime],
                        peak,
                        float(truncated_s[-1]),
                        cell.peak[1].value,
                        cell.accuracy.value,
                        float(np.nanmean(cell.column("entropy"))),
                        _collapsed(cell, self.own.collapse),
                    )
                )
        columns = (
            "peak advantage std",
            "published",
            "at step",
            "truncated at the end",
            "peak accuracy",
            "final accuracy",
            "mean entropy",
            "collapsed",
        )
        return Table("dynamics", "How the runs went", ("cell", "seed", *columns), tuple(rows), "Published peaks are over all ranks.")

    def _pictures(self, cells: Cells, students: Cells) -> tuple[Picture, ...]:
        pictures, found = [], accuracies(cells)
        for regime in self.own.regimes:
            series: dict[str, dict[float, Estimate]] = {regime: {float(rank): found[f"{regime} r {rank}"] for rank in self.own.ranks}}
            band = ("full fine-tuning", found[f"{regime} r {FULL}"]) if self.own.full else None
            figure = against(series, "rank", "accuracy on held-out problems", band=band)
            pictures.append(Picture(f"accuracy-{regime}", f"Accuracy against rank, {regime} rewards", figure, "95 % intervals."))
        shown = {name: list(by_seed.values()) for name, by_seed in students.items() if name.endswith(f" r {self.own.ranks[-1]}")}
        panels = []
        for metric, title, label, percent in (
            ("advantage/std", "Spread of the advantages", "std", False),
            ("completion/truncated", "Truncated completions", "fraction", True),
            ("reward/mean", "Reward", "mean", False),
        ):
            stacked = {name: stack(by_seed, metric) for name, by_seed in shown.items()}
            steps = next(iter(stacked.values()))[0]
            panels.append(CurvePanel(title, label, steps, {name: values for name, (_, values) in stacked.items()}, percent=percent))
        caption = f"Rank {self.own.ranks[-1]}; mean of the seeds, and their range."
        pictures.append(Picture("collapse", "Advantages, truncation and reward over training", curves(panels), caption))
        pictures.append(Picture("accuracy-by-cell", "Accuracy", intervals(found, "accuracy on held-out problems"), "95 % intervals."))
        if passes := _pass_at_k(cells):
            pictures.append(Picture("pass-at-k", "pass@k", pass_at_k_curves(passes), "First seed; problems resampled."))
        return tuple(pictures)


def _collapsed(cell: CellResult, fraction: float) -> bool:
    return bool(
        cell.accuracy.value < fraction * cell.accuracy_before.value and cell.column("completion/truncated")[-1] >= COLLAPSED_TRUNCATION
    )


def _log_ratio(first: list[float], second: list[float]) -> Estimate:
    """Of geometric means, with Welch's t interval of the difference of logs; without limits (NaN) for fewer than two cells on a side."""
    one, two = np.log(first), np.log(second)
    value = float(one.mean() - two.mean())
    if min(len(one), len(two)) < 2:
        return Estimate(value, float("nan"), float("nan"))
    interval = ttest_ind(one, two, equal_var=False).confidence_interval(0.95)
    return Estimate(value, float(interval.low), float(interval.high))


def _pass_at_k(cells: Cells) -> dict[str, dict[int, Estimate]]:
    """Cell -> k -> estimate of the trained model, of the first seed; empty where eval.pass_at_k is."""
    found = {}
    for name, by_seed in cells.items():
        summary = next(iter(by_seed.values())).run.summary
        if summary.pass_at_k_after:
            found[name] = {k: Estimate(*limits) for k, limits in summary.pass_at_k_after.items()}
    return found
