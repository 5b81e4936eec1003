"""S2: adapters on the layers that a short probe of gradients chose, against every other way to choose as many (Aletheia, arXiv 2604.15351).

Stage 1: the probe (fastlora/probe.py) scores the layers of the untouched model, once a seed, and `repeats` times more to tell how alike the
scores of other batches are; the base model answers whatever stage 3 asks (what cannot be asked is found before the training).
Stage 2: for every objective, selection and seed a run with adapters on the chosen layers; `all` has them on every layer. And for every
objective the updates of the first seed's selections, which take turns in one process (fastlora/update_time.py).
Stage 3: what was forgotten. Every adapter answers the problems of another task, if `second_task` gives one, and public benchmarks, if
`harness` names any.

Time is that of the update (loss, backward, clip, step): a selection saves adapters, and the backward pass below its lowest layer. How near
that comes to the FLOPs is measured by `python -m bench.layer_selection`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastlora.config import RunConfig
from fastlora.evaluate import Evaluation
from fastlora.probe import PROBE_FILE, read_probe
from fastlora.run_folder import RunFolder
from fastlora.selection import layer_count, read_layer_scores, select_layers, selected_rank_pattern
from fastlora.statistics import correlation, holm, paired_test
from fastlora.study.cells import Cell
from fastlora.study.claims import Claim, Estimate, above, accuracy_claim, by_interval, conclusions
from fastlora.study.comparisons import Comparison, accuracies, accuracy_table, compare_cells, comparison_table
from fastlora.study.config import HarnessConfig, StudyConfig
from fastlora.study.harness import HarnessResult
from fastlora.study.pictures import against, intervals
from fastlora.study.report import Picture, StudyReport, Table, Value
from fastlora.study.resampling import leave_one_out, over_steps
from fastlora.study.results import Cells, by_strategy
from fastlora.study.setting import adapted_modules, setting
from fastlora.study.studies import Plan
from fastlora.study.tasks import EVALUATION_FILE
from fastlora.turns import Turns

SOURCE = "arXiv 2604.15351"
ALL, TOP, LAST = "all", "top", "last"
TIMES = "update time/"
"""Cells that time updates; one an objective."""
PUBLISHED_SAVING, HALFWAY_SAVING = 0.231, 0.20
"""Published are 15 to 28 % less training time, 23.1 % on average, for the half that a probe chose. The last half saves more: by FLOPs a
quarter of an update and up (bench/layer_selection.py)."""
MARGIN = 0.03
"""Three points of accuracy: a smaller gap counts as matched."""
STABLE = 0.8
PROBE_SEED, REPEATED_SEED = 42, 10_042
"""Of the batches of the first seed's probe, and of the first repetition's."""
PUBLISHED_TASKS = {"mmlu": "MMLU", "gsm8k": "GSM8K", "humaneval": "HumanEval"}
"""lm-eval's name of a benchmark that the published study used -> how people write it."""


class LayerSelection:
    """The study; see the module."""

    def __init__(self, config: StudyConfig) -> None:
        self.config, self.own = config, config.layer_selection
        self.modules = adapted_modules(config.base_run())

    def plan(self) -> Plan:
        """Probes, runs, and what they forgot."""
        options = {"batches": self.own.batches, "batch_size": self.own.batch_size}
        probes = {f"seed-{seed}": (seed, PROBE_SEED + seed) for seed in self.config.seeds}
        probes |= {f"repeat-{i}": (self.config.seeds[0], REPEATED_SEED + i) for i in range(self.own.repeats)}
        folders = yield [
            *self._afterwards("base", None),
            *(
                Cell(f"probe/{name}", self._run({}, "sft", seed), "probe", {**options, "seed": probe_seed})
                for name, (seed, probe_seed) in probes.items()
            ),
        ]
        cells = [
            Cell(
                named(selection, objective, seed), self._run(self._chosen(selection, folders[f"probe/seed-{seed}"], seed), objective, seed)
            )
            for objective in self.own.objectives
            for selection in self.own.selections
            for seed in self.config.seeds
        ]
        trained = yield [*cells, *self._times(folders)]
        if afterwards := [one for cell in cells for one in self._afterwards(cell.name, RunFolder(trained[cell.name]).adapter)]:
            yield afterwards

    def _times(self, probes: Mapping[str, Path]) -> Iterator[Cell]:
        """What an update of each selection costs; nothing where `all` is none of them, to compare with."""
        if not self._has_all:
            return
        seed = self.config.seeds[0]
        probe = probes[f"probe/seed-{seed}"]
        runs = {selection: _lora(self._chosen(selection, probe, seed)) for selection in self.own.selections}
        options = {"runs": runs, "rounds": self.config.timing_rounds}
        for objective in self.own.objectives:
            yield Cell(f"{TIMES}{objective}", self._run({}, objective, seed), "update_time", options)

    def _chosen(self, selection: str, probe: Path, seed: int) -> dict[str, int]:
        """`lora.rank_pattern` of a selection."""
        scores_l = read_layer_scores(probe / PROBE_FILE, self.modules)
        count = layer_count(self.own.count, scores_l, self.own.fraction)
        layers = range(len(scores_l)) if selection == ALL else select_layers(selection, scores_l, count, seed)
        return selected_rank_pattern(layers, self.modules, attention_rank=self.own.attention_rank, mlp_rank=self.own.mlp_rank)

    def _run(self, ranks: Mapping[str, int], objective: str, seed: int) -> RunConfig:
        return self.config.run_config({"seed": seed, "objective": objective, "lora": _lora(ranks)}, f"{objective}, seed {seed}")

    def _afterwards(self, name: str, adapter: Path | None) -> Iterator[Cell]:
        """An adapter, or the base model, on the second task and on public benchmarks; nothing where none is named."""
        if self.own.second_task:
            changes = {"data": self.own.second_task, "lora.init_from": adapter}
            yield Cell(f"second task/{name}", self.config.run_config(changes, "layer_selection.second_task"), "evaluate")
        if self.own.harness.tasks:
            config = self.config.run_config({"lora.init_from": adapter}, "layer_selection.harness")
            yield Cell(f"harness/{name}", config, "harness", self.own.harness.model_dump())

    def report(self, folders: Mapping[str, Path], command: str) -> StudyReport:
        """Tables, figures and verdicts of all cells."""
        probes = {name: folder for name, folder in folders.items() if name.startswith("probe/")}
        second, harness = _under("second task/", folders), _under("harness/", folders)
        others = ("probe/", TIMES, "second task/", "harness/")
        trained = {name: folder for name, folder in folders.items() if not name.startswith(others)}
        cells = by_strategy(trained)
        found = compare_cells(cells, [pair for objective in self.own.objectives for pair in self._pairs(objective)])
        times = {name: Turns.read(folder).seconds for name, folder in _under(TIMES, folders).items()}
        ratios = {
            f"{selection}-{objective}": time_ratio(seconds[selection], seconds[ALL])
            for objective, seconds in times.items()
            for selection in seconds
            if selection != ALL
        }
        claims = (*self._claims(probes, ratios), *map(self._accuracy_claim, found))
        may, may_not = conclusions(claims)
        tables = [accuracy_table(cells, {}), self._selection_table(cells, times, ratios), self._probe_table(probes)]
        tables += [comparison_table(found, {})] if found else []
        tables += [_forgetting_table(second)] if second else []
        tables += [harness_table(harness)] if harness else []
        return StudyReport(
            "Layers chosen by gradient",
            "layer-selection",
            may or ("Nothing: no claim is decided.",),
            (*may_not, not_run(self.config.base_run().model.name, self.own.harness)),
            claims,
            tuple(tables),
            self._pictures(cells, probes, ratios),
            setting(self.config, command, [cell for by_seed in cells.values() for cell in by_seed.values()]),
        )

    @property
    def _has_all(self) -> bool:
        return ALL in self.own.selections

    def _pairs(self, objective: str) -> Iterator[tuple[str, str]]:
        """(against, selection): the chosen layers against all of them, and against each control."""
        if TOP not in self.own.selections:
            return
        for other in self.own.selections:
            if other != TOP:
                yield f"{other}-{objective}", f"{TOP}-{objective}"

    def _accuracy_claim(self, one: Comparison) -> Claim:
        sample = one.sample(self.config.thresholds.min_items, self.config.thresholds.min_seeds)
        if one.first.startswith(f"{ALL}-"):
            text = f"{one.second} is as accurate as {one.first}, to {100 * MARGIN:g} points"
            return accuracy_claim(text, one.no_difference(MARGIN), sample, source=SOURCE, published="broadly matched")
        text = f"{one.second} is more accurate than {one.first}"
        return accuracy_claim(text, one.second_is_higher(), sample, source="control, not published", published="not run")

    def _claims(self, probes: Mapping[str, Path], times: Mapping[str, Estimate]) -> Iterator[Claim]:
        for objective in self.own.objectives:
            for selection, least, text, source, published in (
                (TOP, PUBLISHED_SAVING, "Adapters on the layers that the probe chose", SOURCE, "15–28 %, mean 23.1 %"),
                (LAST, HALFWAY_SAVING, "Adapters on as many last layers", "control, not published", "not run"),
            ):
                if (ratio := times.get(f"{selection}-{objective}")) is not None:
                    saved = Estimate(1 - ratio.value, 1 - ratio.high, 1 - ratio.low)
                    what = f"1 − update seconds of {selection} over {ALL} in the same round, {objective} (blocks of rounds resampled)"
                    yield by_interval(saved, above(least), what).claim(
                        f"{text} train at least {100 * least:g}% faster ({objective})", source=source, published=published
                    )
        scores = [list(read_probe(folder / PROBE_FILE).layers.values()) for folder in probes.values()]
        if len(scores) > 1:

            def agreement(probes: NDArray[np.int64]) -> float:
                pairs = [correlation(scores[i], scores[j], method="spearman").value for i, j in combinations(probes, 2)]
                return float(np.mean(pairs))

            what = f"mean rank correlation of the layers' scores over the pairs of {len(scores)} probes (jackknife over probes)"
            yield by_interval(leave_one_out(agreement, len(scores)), above(STABLE), what).claim(
                "Five probe batches suffice to order the layers", source=SOURCE, published="5 batches of 1, no interval"
            )

    def _selection_table(self, cells: Cells, times: Mapping[str, Mapping[str, Sequence[float]]], ratios: Mapping[str, Estimate]) -> Table:
        rows = []
        for name, by_seed in cells.items():
            cell = by_seed[self.config.seeds[0]]
            layers = sorted({int(module.split(".layers.")[1].split(".")[0]) for module in cell.ranks})
            ratio = ratios.get(name)
            selection, _, objective = name.rpartition("-")
            seconds = float(np.median(times[objective][selection])) if objective in times else None
            shown = runs_of(layers)
            limits = (ratio.value, ratio.low, ratio.high) if ratio else (None, None, None)
            rows.append((name, shown, min(layers), cell.run.summary.trainable_parameters, seconds, *limits))
        return Table(
            "selections",
            "What was chosen, and what an update costs",
            ("cell", "layers", "lowest", "parameters", "update s", "× all", "low", "high"),
            tuple(rows),
            f"Seed {self.config.seeds[0]}. The updates of all selections take turns in one process, on one batch; the ratio is a median of "
            "rounds. The backward pass ends at the lowest adapted layer, so that layer 0 in a choice costs most.",
        )

    def _probe_table(self, probes: Mapping[str, Path]) -> Table:
        found = [read_probe(folder / PROBE_FILE) for folder in probes.values()]
        rows = tuple((layer, *(one.layers[layer] for one in found)) for layer in found[0].layers)
        cost = "; ".join(f"{one.seconds:.1f} s, peak {one.peak_bytes / 2**30:.2f} GiB" for one in found)
        return Table(
            "probe", "Scores of the layers", ("layer", *(name.partition("/")[2] for name in probes)), rows, f"The probes took {cost}."
        )

    def _pictures(self, cells: Cells, probes: Mapping[str, Path], times: Mapping[str, Estimate]) -> tuple[Picture, ...]:
        scores = {
            name.partition("/")[2]: {float(layer): Estimate(s, s, s) for layer, s in read_probe(folder / PROBE_FILE).layers.items()}
            for name, folder in probes.items()
        }
        pictures = [
            Picture(
                "probe-scores", "Scores of the layers", against(scores, "layer", "Σ ‖∂L/∂θ‖", percent=False), "One curve a set of batches."
            ),
            Picture(
                "accuracy-by-selection",
                "Accuracy",
                intervals(accuracies(cells), "accuracy on held-out problems"),
                "95 % intervals.",
            ),
        ]
        if times:
            shown = intervals(times, "update seconds over those of all layers", reference=1.0)
            pictures.append(Picture("update-time", "Time of an update", shown, "Blocks of rounds resampled, first seed."))
        return tuple(pictures)


def named(selection: str, objective: str, seed: int) -> str:
    """A cell's name."""
    return f"{selection}-{objective}/seed-{seed}"


def _lora(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Settings of [lora] for these ranks and no others; no ranks: the config's own."""
    return {"rank_pattern": dict(ranks), "rank_budget": None, "parameter_budget": None, **({"r": 0} if ranks else {})}


def time_ratio(own: Sequence[float], everything: Sequence[float]) -> Estimate:
    """Seconds of an update over those of `all` in the same round: median over the rounds, blocks of them resampled."""
    ratio_i = np.divide(own, everything)
    return over_steps(lambda rounds: float(np.median(ratio_i[rounds])), len(ratio_i))


def runs_of(layers: Sequence[int]) -> str:
    """Layers in order, neighbours as one run: "0–3, 8"."""
    starts = [layer for layer in layers if layer - 1 not in layers]
    ends = [layer for layer in layers if layer + 1 not in layers]
    return ", ".join(str(start) if start == end else f"{start}–{end}" for start, end in zip(starts, ends, strict=True))


def _under(prefix: str, folders: Mapping[str, Path]) -> dict[str, Path]:
    return {name.removeprefix(prefix): folder for name, folder in folders.items() if name.startswith(prefix)}


def not_run(model: str, harness: HarnessConfig) -> str:
    """What the published study measured and this one did not."""
    missing = [f"models larger than {model}", *(shown for task, shown in PUBLISHED_TASKS.items() if task not in harness.tasks)]
    if harness.tasks and harness.limit:
        missing.append(f"all of {', '.join(harness.tasks)} (the first {harness.limit} questions of each task were asked)")
    return f"Anything about {', '.join(missing)}: the published study measured them, this one did not"


def _forgetting_table(second: Mapping[str, Path]) -> Table:
    """Every adapter's answers to the second task against the base model's."""
    answers = {name: Evaluation.read(folder / EVALUATION_FILE) for name, folder in second.items()}
    base = answers.pop("base")
    rows = []
    for name, one in answers.items():
        test = paired_test(base.correct, one.correct)
        rows.append((name, base.accuracy.value, one.accuracy.value, test.difference, test.low, test.high, test.p_value))
    return Table(
        "forgetting",
        "A second task, before and after",
        ("cell", "base model", "with the adapter", "change", "low", "high", "McNemar's p"),
        tuple(rows),
        f"{base.accuracy.n} problems of a task that was not trained; Newcombe's interval, p not corrected.",
    )


def harness_table(harness: Mapping[str, Path]) -> Table:
    """Every adapter's answers to public benchmarks against the base model's. harness: folders of `base` and of the adapters' cells.

    Raises HarnessError for a file that is damaged, and for two models that were not asked the same.
    """
    results = {name: HarnessResult.read(folder) for name, folder in harness.items()}
    base = results.pop("base")
    rows: list[tuple[Value, ...]] = []
    p_values: list[float] = []
    for name, one in results.items():
        base.same_questions(one, f"harness/{name}")
        for task, before in base.tasks.items():
            after = one.tasks[task]
            test = paired_test(before.correct, after.correct)
            rows.append((name, task, test.n, before.value, after.value, test.difference, test.low, test.high, test.p_value))
            p_values.append(test.p_value)
    corrected = holm(p_values).adjusted
    asked = "; ".join(f"{task}: {one.metric}, {'/'.join(map(str, one.num_fewshot))} examples" for task, one in base.tasks.items())
    return Table(
        "harness",
        "Public benchmarks, before and after",
        ("cell", "task", "n", "base model", "with the adapter", "change", "low", "high", "McNemar's p", "p, Holm"),
        tuple((*row, p_holm) for row, p_holm in zip(rows, corrected, strict=True)),
        f"lm-evaluation-harness {base.harness}. {asked}. Newcombe's interval of each change; exact McNemar, corrected over all rows.",
    )
