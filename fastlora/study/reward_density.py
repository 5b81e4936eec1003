"""S4: one GRPO loss, rewards at the end, at each step or at each token, LoRA of several ranks and full fine-tuning
(github gernim/lora-reward-density).

Stage 1, if `teacher_rank` is given: a teacher is trained per seed on the outcome reward, and its adapter on the shared base model is who
distils; else reward.distillation of the config's `regimes` names one.
Stage 2: every regime × rank × seed, and full fine-tuning in float32 with its own learning rate. Where these are shorter than what is said
to end in collapse, one more process run of `collapse_rank` and `collapse_steps` a seed.

The regimes differ in their rewards alone: each is a set of changes to the base run ([reward_density.runs.REGIME]), and everything behind
the deposits is the same code. Published: 3 seeds of 100 steps of Qwen3-1.7B-Base on MATH, judged on 100 problems of MATH-500.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fastlora.config import RunConfig
from fastlora.run_folder import RunFolder
from fastlora.study.cells import Cell
from fastlora.study.claims import Claim, Decision, Estimate, above, accuracy_claim, by_interval, by_property, conclusions
from fastlora.study.comparisons import accuracies, accuracy_table, compare_cells, comparison_table
from fastlora.study.config import StudyConfig
from fastlora.study.pictures import CurvePanel, against, curves, intervals, pass_at_k_curves
from fastlora.study.report import Picture, StudyReport, Table
from fastlora.study.resampling import over_steps
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
LARGER = 0.25
"""Part by which one spread must exceed another over a whole run to count as larger; published peaks differ by factors of 1.6 to 14."""
TRUNCATED = 0.9
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
        cells = []
        if self._longer:  # first, since cells that run together should end together
            longer = {"trainer.steps": self.own.collapse_steps, "eval.every": self.own.collapse_eval_every}
            cells = [
                Cell(f"{self._longer}/seed-{seed}", self._run(PROCESS, self.own.collapse_rank, seed, None, longer))
                for seed in self.config.seeds
            ]
        cells += [
            Cell(f"{regime} r {size}/seed-{seed}", self._run(regime, size, seed, teachers.get(f"{TEACHER}/seed-{seed}")))
            for regime in self.own.regimes
            for size in self._sizes
            for seed in self.config.seeds
        ]
        yield cells

    @property
    def _sizes(self) -> tuple[int | str, ...]:
        return (*self.own.ranks, *([FULL] if self.own.full else []))

    @property
    def _longer(self) -> str:
        """Name of the process run that is to show whether it collapses; empty = none."""
        rank, steps = self.own.collapse_rank, self.own.collapse_steps
        return f"{PROCESS} r {rank}, {steps} steps" if rank and PROCESS in self.own.regimes else ""

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

    def _run(self, regime: str, size: int | str, seed: int, teacher: Path | None, more: Mapping[str, Any] | None = None) -> RunConfig:
        own = {"seed": seed, "advantage.estimator": "deposits"}
        changes: dict[str, Any] = {**own, **self.own.runs.get(regime, {}), **self._lora(), **(more or {})}
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
            (*may_not, "How other runs would end: what is said of a collapse is said of the long runs that were made"),
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

    def _advantage_claims(self, students: Cells) -> Iterator[Claim]:
        """Spread of the advantages under one regime against another's: at the peak of every run, and over the run."""
        for dense, sparse in ((PROCESS, OUTCOME), (PROCESS, DISTILLATION), (DISTILLATION, OUTCOME)):
            if not {dense, sparse} <= set(self.own.regimes):
                continue
            pairs = {
                f"r {rank}/seed-{seed}": (students[f"{dense} r {rank}"][seed], students[f"{sparse} r {rank}"][seed])
                for rank in self.own.ranks
                for seed in self.config.seeds
            }
            higher = {name: _peak(one)[1] > _peak(two)[1] for name, (one, two) in pairs.items()}
            yield by_property(higher, f"peak advantage std under {dense} above that under {sparse} at equal rank and seed").claim(
                f"The advantages' peak std is larger under {dense} than under {sparse} rewards",
                source=f"{SOURCE}, peak advantage std",
                published=f"{PUBLISHED_STD[dense]:.2f} against {PUBLISHED_STD[sparse]:.2f}",
            )
            ratio = _log_ratio([one for one, _ in pairs.values()], [two for _, two in pairs.values()])
            what = f"log of the advantage std, mean of the runs, {dense} over {sparse} (blocks of steps resampled)"
            yield by_interval(ratio, above(math.log1p(LARGER)), what).claim(
                f"Over the whole run, too, it is over {LARGER:.0%} larger under {dense} than under {sparse} rewards",
                source="control, not published",
                published="peaks only",
            )

    def _collapse_claims(self, students: Cells) -> Iterator[Claim]:
        """That a long run collapses, and that it does so by completions that do not end: there is a way to collapse without the other."""
        if PROCESS not in self.own.regimes:
            return
        runs = {
            f"{name}/seed-{seed}": cell
            for name, by_seed in students.items()
            if name.startswith(f"{PROCESS} ")
            for seed, cell in by_seed.items()
        }
        long_enough = {name: cell for name, cell in runs.items() if cell.run.summary.steps >= COLLAPSE_STEP}
        most = max(cell.run.summary.steps for cell in runs.values())

        def decided(what: str, happened: Callable[[CellResult], bool]) -> Decision:
            if not long_enough:  # nothing has happened yet that was said to happen later
                return Decision("undecided", f"no run is longer than {most} steps", f"{what}, in runs of {COLLAPSE_STEP} steps and more")
            return by_property({name: happened(cell) for name, cell in long_enough.items()}, what)

        for text, decision, published in (
            (
                f"Process rewards collapse in runs of {COLLAPSE_STEP} steps and more",
                decided(f"accuracy below {self.own.collapse:g} of the base model's at the end", self._collapsed),
                f"pass@1 near 0 at step {COLLAPSE_STEP} of 100",
            ),
            (
                "Completions of such a run no longer end",
                decided(f"{TRUNCATED:.0%} truncated at the last step", lambda cell: _truncated(cell) >= TRUNCATED),
                "truncated from step 70",
            ),
        ):
            yield decision.claim(text, source=f"{SOURCE}, collapse figure", published=published)

    def _collapsed(self, cell: CellResult) -> bool:
        return cell.accuracy.value < self.own.collapse * cell.accuracy_before.value

    def _dynamics_table(self, students: Cells) -> Table:
        rows = []
        for name, by_seed in students.items():
            for seed, cell in by_seed.items():
                step, peak = _peak(cell)
                regime = name.partition(" r ")[0]
                rows.append(
                    (
                        name,
                        seed,
                        cell.run.summary.steps,
                        peak,
                        PUBLISHED_STD[regime],
                        step,
                        float(np.nanmean(cell.column("advantage/std"))),
                        _truncated(cell),
                        cell.peak[1].value,
                        cell.accuracy.value,
                        float(np.nanmean(cell.column("entropy"))),
                        self._collapsed(cell),
                    )
                )
        columns = (
            "steps",
            "peak advantage std",
            "published",
            "at step",
            "mean advantage std",
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
        shown = {name: by_seed for name, by_seed in students.items() if name.endswith(f" r {self.own.ranks[-1]}")}
        caption = f"Rank {self.own.ranks[-1]}; mean of the seeds, and their range."
        pictures.append(Picture("dynamics", "Advantages, truncation and reward over training", _curves(shown), caption))
        if self._longer:
            longer = {self._longer: students[self._longer]}
            pictures.append(Picture("collapse", "A long run under process rewards", _curves(longer), "Mean of the seeds."))
        pictures.append(Picture("accuracy-by-cell", "Accuracy", intervals(found, "accuracy on held-out problems"), "95 % intervals."))
        if passes := _pass_at_k(cells):
            pictures.append(Picture("pass-at-k", "pass@k", pass_at_k_curves(passes), "First seed; problems resampled."))
        return tuple(pictures)


PANELS = (
    ("advantage/std", "Spread of the advantages", "std", False),
    ("completion/truncated", "Truncated completions", "fraction", True),
    ("reward/mean", "Reward", "mean", False),
    ("eval/accuracy", "Accuracy on held-out problems", "fraction", True),
)
"""(metric, title, label, in per cent)."""


def _curves(shown: Cells) -> Figure:
    """Over the steps of the cells, which are as long as each other; without a panel of what no cell has measured."""
    panels = []
    for metric, title, label, percent in PANELS:
        stacked = {name: stack(list(by_seed.values()), metric) for name, by_seed in shown.items()}
        steps = next(iter(stacked.values()))[0]
        values = {name: values_ns for name, (_, values_ns) in stacked.items()}
        if any(np.isfinite(values_ns).any() for values_ns in values.values()):
            panels.append(CurvePanel(title, label, steps, values, percent=percent))
    return curves(panels)


def _truncated(cell: CellResult) -> float:
    """Fraction of the last step's completions."""
    return float(cell.column("completion/truncated")[-1])


def _peak(cell: CellResult) -> tuple[int, float]:
    """(step, value) of the largest advantage std."""
    std_s = cell.column("advantage/std")
    at = int(np.nanargmax(std_s))
    return int(cell.steps[at]), float(std_s[at])


def _log_ratio(first: list[CellResult], second: list[CellResult]) -> Estimate:
    """Of mean advantage stds. Cells of a seed see the same prompts at a step, so that a step of all of them is resampled, not a cell."""
    means = [stack(cells, "advantage/std")[1].mean(axis=0) for cells in (first, second)]
    return over_steps(lambda steps: float(np.log(means[0][steps].mean() / means[1][steps].mean())), len(means[0]))


def _pass_at_k(cells: Cells) -> dict[str, dict[int, Estimate]]:
    """Cell -> k -> estimate of the trained model, of the first seed; empty where eval.pass_at_k is."""
    found = {}
    for name, by_seed in cells.items():
        summary = next(iter(by_seed.values())).run.summary
        if summary.pass_at_k_after:
            found[name] = {k: Estimate(*limits) for k, limits in summary.pass_at_k_after.items()}
    return found
