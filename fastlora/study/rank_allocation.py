"""S1: does a rank by the gradient's profile help GRPO, and what is the published amplification of the profile made of? (arXiv 2605.07366)

Stage 1, two cells a seed: every layer has the same rank, the gradient norms of all its A and B are recorded at each step. `uniform` is
what everything is compared with; `profile`, on other problems and samples, is what ranks are chosen by. The paper has one run for both: a
profile that chooses and is then compared with knows its own noise (fastlora/study/amplification.py).
Stage 2: the same budget Σ r by layer, spread by the strategies of fastlora/allocation.py over that profile; the first scale mode runs all
of them, the others (an ablation) `proportional` alone. Scales are set so that all modes are one run at the uniform rank: α = s
(constant), s r (alpha/r), s √r (alpha/sqrt(r)).

The confrontation. The paper reports that the max/min ratio of the layers' shares of gradient norm grows from 2.17 (uniform) to 3.00
(proportional) and reads it as amplification. A matrix of rank r has r rows of like size, so that √r alone makes norm_l √(r_l / r) of the
uniform run's; that prediction (allocation.sqrt_rank_shares) stands beside every ratio here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastlora.allocation import allocate, layer_scores, modules_by_layer, rank_pattern
from fastlora.analysis.gradient_profile import LayerNorms, Measure
from fastlora.config import RunConfig
from fastlora.lora.patterns import scale_of
from fastlora.metrics import GRADIENT_PROFILE_FILE
from fastlora.statistics import correlation
from fastlora.study.amplification import (
    PUBLISHED_RATIO,
    SAME_BUDGET,
    SOURCE,
    Profiled,
    amplification_claims,
    by_runs,
    max_min,
    sqrt_law_claim,
)
from fastlora.study.cells import Cell
from fastlora.study.claims import (
    Claim,
    Estimate,
    HasInterval,
    above,
    accuracy_claim,
    below,
    by_interval,
    by_property,
    conclusions,
)
from fastlora.study.comparisons import accuracies, accuracy_table, compare_cells, comparison_table
from fastlora.study.config import StudyConfig
from fastlora.study.pictures import heat_maps, intervals, scatter_fits, share_bars
from fastlora.study.report import Picture, StudyReport, Table, Value
from fastlora.study.results import CellResult, Cells, by_strategy, read_cell
from fastlora.study.setting import adapted_modules, setting
from fastlora.study.studies import Plan

UNIFORM, DYNAMIC, PROFILE = "uniform", "dynamic", "profile"
PROFILE_SEED = 1000
"""Added to a cell's seed: that of the run whose profile chooses its ranks."""
PUBLISHED_ACCURACY = {"reduced": 0.65, "random": 0.675, "proportional": 0.70, "uniform": 0.745}
"""GSM8K, Qwen2.5-1.5B-Instruct, 200 problems, one seed; the base model .66."""
PUBLISHED_SHIFT = {"random": 0.972, "proportional": 0.946}
MEASURES: tuple[Measure, ...] = ("raw", "rank_normalised", "delta_w")
TOP_LAYERS = 0.3
FLAT = 0.5
"""A profile whose strongest 30 % of layers carry less than half is called flat: published are 36 % under GRPO, above 80 % under SFT."""
STABLE = 0.8
"""Correlation of early and late profile above which the profile is called stable; published .962."""


class RankAllocation:
    """The study; see the module."""

    def __init__(self, config: StudyConfig) -> None:
        self.config, self.own = config, config.rank_allocation
        self.modules = adapted_modules(config.base_run())
        self.layers = modules_by_layer(self.modules)
        self.budget = self.own.rank * len(self.layers)
        self._allocated((1.0,) * len(self.layers), UNIFORM, 0)  # an impossible budget is refused before anything runs

    def plan(self) -> Plan:
        """Uniform ranks, then those that are made from a profile."""
        first = self.own.scalings[0]
        folders = yield [
            Cell(named(strategy, first, seed), self._run(self._uniform_ranks(), first, seed + offset))
            for strategy, offset in ((UNIFORM, 0), (PROFILE, PROFILE_SEED))
            for seed in self.config.seeds
        ]
        cells = []
        for scaling, seed, strategy in self._later():
            scores_l = self._scores(folders[named(PROFILE, first, seed)])
            ranks_l = self._uniform_ranks() if strategy == DYNAMIC else self._allocated(scores_l, strategy, seed)
            changes = self._reallocation() if strategy == DYNAMIC else {}
            cells.append(Cell(named(strategy, scaling, seed), self._run(ranks_l, scaling, seed, changes)))
        yield cells

    def _later(self) -> Iterator[tuple[str, int, str]]:
        """(scale mode, seed, strategy) of stage 2."""
        for number, scaling in enumerate(self.own.scalings):
            dynamic = (DYNAMIC,) if self.own.dynamic_every else ()
            strategies = (*self.own.strategies, *dynamic) if number == 0 else ("proportional",)
            for seed in self.config.seeds:
                chosen = strategies
                if self.own.repeated is not None and seed != self.config.seeds[0]:
                    chosen = self.own.repeated if number == 0 else ()
                yield from ((scaling, seed, strategy) for strategy in chosen if strategy != UNIFORM)

    def _uniform_ranks(self) -> tuple[int, ...]:
        return (self.own.rank,) * len(self.layers)

    def _scores(self, folder: Path) -> tuple[float, ...]:
        """A layer's mean share of the gradient norm in a finished cell."""
        cell = read_cell(folder.name, folder)
        norms = cell.layer_norms("raw")
        profile = dict(zip(norms.layers.tolist(), norms.share_l.tolist(), strict=True))
        return layer_scores(profile, self.modules, str(folder / GRADIENT_PROFILE_FILE))

    def _allocated(self, scores_l: tuple[float, ...], strategy: str, seed: int) -> tuple[int, ...]:
        own = self.own
        bounds: dict[str, Any] = {"r_min": own.r_min, "r_max": own.r_max, "granularity": own.granularity}
        return allocate(strategy, scores_l, self.budget, power=own.power, seed=seed, fraction=own.reduced_fraction, **bounds)

    def _run(self, ranks_l: tuple[int, ...], scaling: str, seed: int, changes: Mapping[str, Any] | None = None) -> RunConfig:
        ranks = rank_pattern(ranks_l, self.modules)
        lora = {
            "scaling": scaling,
            "lora_alpha": self.own.scale / scale_of(1.0, self.own.rank, scaling),
            "alpha_pattern": {},
            "rank_pattern": ranks,
            "rank_budget": sum(ranks.values()),
            "parameter_budget": None,
        }
        return self.config.run_config({"seed": seed, "lora": lora, **(changes or {})}, f"{scaling}, seed {seed}")

    def _reallocation(self) -> dict[str, Any]:
        own = self.own
        bounds = {"r_min": own.r_min, "r_max": own.r_max, "granularity": own.granularity, "power": own.power}
        return {"reallocation": {"every": own.dynamic_every, **bounds}}

    def report(self, folders: Mapping[str, Path], command: str) -> StudyReport:
        """Tables, figures and verdicts of all cells."""
        cells = by_strategy(folders)
        everything = [cell for by_seed in cells.values() for cell in by_seed.values()]
        del cells[f"{PROFILE} @ {self.own.scalings[0]}"]
        main = {name.partition(" @ ")[0]: by_seed for name, by_seed in cells.items() if name.endswith(f" @ {self.own.scalings[0]}")}
        steps = {seed: _common_steps([by_seed[seed] for by_seed in main.values() if seed in by_seed]) for seed in main[UNIFORM]}
        profiled = [self._profiled(main, strategy, seed, steps[seed]) for strategy, by_seed in main.items() for seed in by_seed]
        common = set.intersection(*(set(by_seed) for by_seed in main.values()))
        found = compare_cells(
            {name: {seed: cell for seed, cell in by_seed.items() if seed in common} for name, by_seed in main.items()}, list(_pairs(main))
        )
        claims = (
            *self._mechanism_claims(profiled),
            *(
                accuracy_claim(
                    f"{one.second} ranks are better than {one.first} ones",
                    one.second_is_higher(),
                    one.sample(self.config.thresholds.min_items, self.config.thresholds.min_seeds),
                    source=f"{SOURCE}, table 1" if one.first in PUBLISHED_ACCURACY else "control, not published",
                    published=_published_gap(one.first, one.second),
                )
                for one in found
            ),
        )
        may, may_not = conclusions(claims)
        tables = (
            accuracy_table(cells, {f"{name} @ {self.own.scalings[0]}": value for name, value in PUBLISHED_ACCURACY.items()}),
            comparison_table(found, _published_gaps()),
            _ratio_table(profiled),
            self._ablation_table(cells),
        )
        return StudyReport(
            "Rank allocation under GRPO",
            "rank-allocation",
            may or ("Nothing: no claim is decided.",),
            (*may_not, "Anything about other models, tasks or longer training: the profile is that of this run"),
            claims,
            tables,
            self._pictures(main, profiled),
            setting(self.config, command, everything),
        )

    def _profiled(self, main: Cells, strategy: str, seed: int, steps: NDArray[np.int64]) -> Profiled:
        cell, uniform = main[strategy][seed], main[UNIFORM][seed]
        return Profiled(
            strategy,
            seed,
            self._layer_ranks(cell),
            cell.layer_norms("raw"),
            {measure: _shares_at(cell.layer_norms(measure), steps) for measure in MEASURES},
            {measure: _shares_at(uniform.layer_norms(measure), steps) for measure in MEASURES},
            self._layer_ranks(uniform),
        )

    def _layer_ranks(self, cell: CellResult) -> tuple[int, ...]:
        """Rank of each layer, whose modules share one (after the last reallocation, in a dynamic cell)."""
        return tuple(cell.ranks.get(names[0], 0) for names in self.layers)

    def _mechanism_claims(self, profiled: list[Profiled]) -> Iterator[Claim]:
        kept = {f"{one.strategy}/seed-{one.seed}": sum(one.ranks_l) == self.budget for one in profiled if one.strategy != "reduced"}
        yield by_property(kept, f"Σ r over layers = {self.budget}").claim(
            "Every strategy but `reduced` spends the same budget", source=f"{SOURCE}, section 3", published="36.9 M parameters each"
        )
        of = {name: [one for one in profiled if one.strategy == name] for name in (UNIFORM, *SAME_BUDGET)}
        what = f"share of the strongest {TOP_LAYERS:.0%} of layers, uniform ranks"
        yield by_runs(of[UNIFORM], lambda one, steps: _top_share(one.shares["raw"], steps), below(FLAT), what).claim(
            "Under GRPO the gradient is spread flatly over the layers", source=f"{SOURCE}, section 4", published="36 % (SFT: above 80 %)"
        )
        stable = _early_against_late([one.shares["raw"] for one in of[UNIFORM]])
        yield by_interval(stable, above(STABLE), "correlation of early and late profile, mean of the seeds").claim(
            "The profile is stable over training", source=f"{SOURCE}, section 4", published=".962"
        )
        if of["proportional"]:
            yield from amplification_claims(of["proportional"])
        if asked := [one for name in SAME_BUDGET for one in of[name]]:
            yield sqrt_law_claim(asked)

    def _ablation_table(self, cells: Cells) -> Table:
        rows: list[tuple[Value, ...]] = []
        for name, by_seed in cells.items():
            strategy, _, scaling = name.partition(" @ ")
            if strategy not in (UNIFORM, "proportional"):
                continue
            for seed, cell in by_seed.items():
                rows.append((scaling, strategy, seed, *_own_ratios(cell), cell.accuracy.value))
        return Table(
            "scale-modes",
            "Scale modes: α s, constant or by rank",
            ("scale mode", "strategy", "seed", "ratio raw", "ratio ÷ √r", "ratio of ∂L/∂ΔW", "accuracy"),
            tuple(rows),
            f"All modes have s = {self.own.scale:g} at rank {self.own.rank}, so that one uniform run is that of all of them. "
            "With alpha/r a larger rank has a smaller scale.",
        )

    def _pictures(self, main: Cells, profiled: list[Profiled]) -> tuple[Picture, ...]:
        first = self.config.seeds[0]
        shown = [one for one in profiled if one.seed == first]
        bars = [one for one in shown if one.strategy in (UNIFORM, "proportional", "shuffled-proportional")]
        scatter = {one.strategy: (np.array(one.ranks_l, dtype=float), one.change_l) for one in shown if len(set(one.ranks_l)) > 1}
        return (
            Picture(
                "heat-map",
                "Gradient norm by layer and step",
                heat_maps({one.strategy: one.norms for one in shown}, "‖g‖ of all A and B of a layer"),
                f"Seed {first}.",
            ),
            Picture(
                "amplification",
                "Share of the gradient norm by layer",
                share_bars(
                    list(range(len(self.layers))),
                    {one.strategy: one.shares["raw"].mean(axis=1) for one in bars},
                    {one.strategy: np.array(one.predicted_shares(np.arange(one.num_steps))) for one in bars if one.strategy != UNIFORM},
                ),
                f"Bars: measured, seed {first}. Marks: the uniform run's shares times √r, normalised; nothing else changed.",
            ),
            Picture(
                "rank-and-share",
                "Rank of a layer and the change of its share against the uniform run",
                scatter_fits(scatter, "rank", "change of share"),
                f"Seed {first}; published correlations: random .972, proportional .946.",
            ),
            Picture("accuracy-by-strategy", "Accuracy", intervals(accuracies(main), "accuracy on held-out problems"), "95 % intervals."),
        )


def _steps_with_gradient(norms: LayerNorms) -> set[int]:
    """Steps whose gradient is finite and not all zero."""
    return set(norms.steps[norms.norms_ls.sum(axis=0) > 0].tolist())


def _common_steps(cells: Sequence[CellResult]) -> NDArray[np.int64]:
    """Steps that had a gradient in all of the cells, by every measure, ascending."""
    found = set.intersection(*(_steps_with_gradient(cell.layer_norms(measure)) for cell in cells for measure in MEASURES))
    return np.array(sorted(found), dtype=np.int64)


def _shares_at(norms: LayerNorms, steps: NDArray[np.int64]) -> NDArray[np.float64]:
    """Shares of the layers at these steps, [l, s]."""
    norms_ls = norms.norms_ls[:, np.isin(norms.steps, steps)]
    return np.asarray(norms_ls / norms_ls.sum(axis=0))


def _own_ratios(cell: CellResult) -> Iterator[float]:
    """Max/min ratio by every measure, over all steps that had a gradient."""
    steps = _common_steps([cell])
    for measure in MEASURES:
        yield max_min(_shares_at(cell.layer_norms(measure), steps), np.arange(len(steps)))


def named(strategy: str, scaling: str, seed: int) -> str:
    """A cell's name."""
    return f"{strategy} @ {scaling}/seed-{seed}"


def _pairs(main: Cells) -> Iterator[tuple[str, str]]:
    """Every strategy against uniform ranks, and the profile's order against chance."""
    yield from ((name, UNIFORM) for name in main if name != UNIFORM)
    if {"shuffled-proportional", "proportional"} <= main.keys():
        yield "shuffled-proportional", "proportional"


def _published_gaps() -> dict[tuple[str, str], float]:
    return {(name, UNIFORM): PUBLISHED_ACCURACY[UNIFORM] - value for name, value in PUBLISHED_ACCURACY.items() if name != UNIFORM}


def _published_gap(first: str, second: str) -> str:
    gap = _published_gaps().get((first, second))
    return "not run" if gap is None else f"{100 * gap:+.1f} points (200 problems, one seed)"


def _top_share(shares_ls: NDArray[np.float64], steps: NDArray[np.int64]) -> float:
    share_l = np.sort(shares_ls[:, steps].mean(axis=1))[::-1]
    return float(share_l[: math.ceil(TOP_LAYERS * len(share_l))].sum())


def _early_against_late(runs: list[NDArray[np.float64]]) -> HasInterval:
    """Correlation over the layers of the shares [l, s] in the first and the last third of the steps, each the mean of the runs; NaN below
    3 steps.
    """
    third = min(shares_ls.shape[1] for shares_ls in runs) // 3
    if third == 0:
        return Estimate(math.nan, math.nan, math.nan)
    early, late = (np.mean([shares_ls[:, part].mean(axis=1) for shares_ls in runs], axis=0) for part in (slice(third), slice(-third, None)))
    return correlation(early.tolist(), late.tolist())


def _ratio_table(profiled: list[Profiled]) -> Table:
    rows: list[tuple[Value, ...]] = []
    for one in profiled:
        steps = np.arange(one.num_steps)
        shift: str | None = None
        if len(set(one.ranks_l)) > 1:
            shift = str(correlation(list(one.ranks_l), one.change_l.tolist()))
        predicted = None if one.strategy in (UNIFORM, DYNAMIC) else one.predicted_ratio(steps)
        rows.append(
            (
                one.strategy,
                one.seed,
                f"{min(one.ranks_l)}–{max(one.ranks_l)}",
                sum(one.ranks_l),
                *(one.ratio(measure, steps) for measure in MEASURES),
                predicted,
                None if shift is None or one.strategy == DYNAMIC else str(one.excess_interval),
                PUBLISHED_RATIO.get(one.strategy),
                _top_share(one.shares["raw"], steps),
                shift,
                PUBLISHED_SHIFT.get(one.strategy),
            )
        )
    return Table(
        "profiles",
        "Profiles: max/min ratio of the layers' shares, and what √r predicts",
        (
            *("strategy", "seed", "ranks", "Σ r", "ratio raw", "ratio ÷ √r", "ratio of ∂L/∂ΔW", "√r predicts", "excess over √r"),
            *("published ratio", "share of top 30 %", "correlation of rank and change of share", "published correlation"),
        ),
        tuple(rows),
        "raw: ‖g‖ of a layer's A and B. √r predicts: the raw ratio of the uniform run of that seed with every share times √(r/r uniform). "
        "Excess: (β − ½) log(max r / min r), β the slope over all layers of log share on log rank. Ranks chosen by the profile know its "
        "noise, and regress to its mean: proportional ones fall short of √r, inverse ones exceed it.",
    )
