"""S3: which k entries of B train, with A frozen at random, under SFT and under GRPO (arXiv 2605.12207).

Stage 1, one cell an objective and seed: at least 16 batches of the untouched model are scored (fastlora/scoring.py).
Beside them a batch of scoring and a step of training take turns, for what scoring costs (fastlora/scoring_time.py; first seed).
Stage 2: masks of exactly k entries from these sums, by every score, k and scope, and a run with each; beside them, per objective and seed,
`all-B` (A frozen, every entry of B trains) and `lora` (A and B), and the peers that the config names (fastlora/study/peers.py).

A is the same in all cells (lora.init_seed = 0): an entry of B means something only beside its A, and masks of different seeds can be laid
over each other. Seeds change data and sampling. Masks are written beside the sums that they are made of, and are files that any run's
config may name (lora.b_mask).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import hypergeom
from torch import Tensor

from fastlora.config import RunConfig
from fastlora.gradient_structure import Structure, structure_of
from fastlora.lora.peft_format import load_b_mask, save_b_mask
from fastlora.placement import overlap, projection_shares, scores, top_k_mask
from fastlora.scoring import SCORES_FILE, STRUCTURE_FILE, SUMS, read_sums
from fastlora.scoring_time import SCORING, STEP
from fastlora.statistics import holm
from fastlora.study.cells import Cell
from fastlora.study.claims import Claim, Estimate, above, accuracy_claim, below, by_interval, by_p_value, by_property, conclusions
from fastlora.study.comparisons import Comparison, accuracies, accuracy_table, compare_cells, comparison_table
from fastlora.study.config import StudyConfig
from fastlora.study.peers import compare_peers, is_peer, peer_accuracies, peer_cells, peer_claim, peer_name, peer_table, read_peers
from fastlora.study.pictures import CurvePanel, against, curves, intervals, stacked_shares
from fastlora.study.report import Picture, StudyReport, Table, Value
from fastlora.study.resampling import leave_one_out, over_steps
from fastlora.study.results import Cells, by_strategy
from fastlora.study.setting import setting
from fastlora.study.studies import Plan
from fastlora.turns import Turns

SOURCE = "arXiv 2605.12207"
A_SEED = 0
RANDOM = "random"
MAGNITUDE_ROW = SUMS.index("|g|")
VALUE_PATH = ("v_proj", "o_proj", "down_proj")
"""Where the chosen entries are said to concentrate."""
ORTHOGONAL = 0.2
"""Mean cosine of consecutive gradients below which they are called nearly orthogonal."""
PUBLISHED_STEPS, MOST_PERCENT = 3200, 0.5
"""Scoring is said to cost less than .5 % of the training; with 16 batches that needs some 3,200 steps."""
TIMES = "scoring time/"
MARGIN = 0.03


@dataclass(frozen=True, slots=True)
class Structured:
    """structure.json of one scoring cell."""

    objective: str
    seed: int
    gram_bb: NDArray[np.float64]
    seconds: float
    batches: int
    silent: int

    def cosine(self, batches: NDArray[np.int64]) -> float:
        """Mean over consecutive pairs of these batches."""
        return float(self.cosines(batches).mean())

    def cosines(self, batches: NDArray[np.int64]) -> NDArray[np.float64]:
        """Of consecutive pairs of these batches, all of which had a gradient."""
        return np.array(self.structure(batches).consecutive_cosines, dtype=np.float64)

    def stable_rank(self, batches: NDArray[np.int64]) -> float:
        """Of these batches' gradients at length 1."""
        return float(self.structure(batches).stable_rank or math.nan)

    def effective_rank(self, batches: NDArray[np.int64]) -> float:
        """Of these batches' gradients at length 1."""
        return float(self.structure(batches).effective_rank or math.nan)

    def structure(self, batches: NDArray[np.int64]) -> Structure:
        """Of these batches' gradients, each scaled to length 1: a single long one would count as rank 1."""
        gram = self.gram_bb[np.ix_(batches, batches)]
        norms = np.sqrt(gram.diagonal())
        return structure_of(torch.from_numpy(gram / np.outer(norms, norms)))


class Placement:
    """The study; see the module."""

    def __init__(self, config: StudyConfig) -> None:
        self.config, self.own = config, config.placement

    def plan(self) -> Plan:
        """Scoring, then the runs under the masks that come of it, and the peers. Raises ConfigError at once for a peer that cannot run."""
        peers = peer_cells(self.config)
        folders = yield [
            Cell(f"scores/{objective}/seed-{seed}", self._run(objective, seed, {}), "score", {"batches": self.own.batches})
            for objective in self.own.objectives
            for seed in self.config.seeds
        ]
        timed, rounds = self.config.seeds[0], {"rounds": self.config.timing_rounds}
        cells = [Cell(f"{TIMES}{objective}", self._run(objective, timed, {}), "scoring_time", rounds) for objective in self.own.objectives]
        for objective in self.own.objectives:
            for seed in self.config.seeds:
                for name, mask in self._masks(folders[f"scores/{objective}/seed-{seed}"], seed):
                    cells.append(Cell(f"{name}-{objective}/seed-{seed}", self._run(objective, seed, {"freeze_a": True, "b_mask": mask})))
                cells.append(Cell(f"all-B-{objective}/seed-{seed}", self._run(objective, seed, {"freeze_a": True})))
                cells.append(Cell(f"lora-{objective}/seed-{seed}", self._run(objective, seed, {})))
        yield [*cells, *peers]

    def _run(self, objective: str, seed: int, lora: Mapping[str, Any]) -> RunConfig:
        return self.config.run_config(
            {"seed": seed, "objective": objective, "lora": {"init_seed": A_SEED, **lora}}, f"{objective}, seed {seed}"
        )

    def _masks(self, folder: Path, seed: int) -> Iterator[tuple[str, Path]]:
        """(name of score, k and scope; file) of every mask, written unless it is there."""
        path = folder / SCORES_FILE
        sums: dict[str, Tensor] = {}
        for kind in self.own.scores:
            score: dict[str, Tensor] = {}
            for scope in self.own.scopes:
                for k in self.own.k:
                    name = _mask_name(kind, scope, k)
                    file = folder / "masks" / f"{name}.safetensors"
                    if not file.exists():
                        sums = sums or read_sums(path)[0]
                        score = score or scores(sums, self.own.batches, kind, seed=seed)
                        magnitude = {module: sums_4nr[MAGNITUDE_ROW] for module, sums_4nr in sums.items()}
                        file.parent.mkdir(exist_ok=True)
                        save_b_mask(file, top_k_mask(score, magnitude, k, scope=scope, seed=seed), {"score": kind, "scope": scope})
                    yield name, file

    def report(self, folders: Mapping[str, Path], command: str) -> StudyReport:
        """Tables, figures and verdicts of all cells."""
        scoring = {name: folder for name, folder in folders.items() if name.startswith("scores/")}
        times = {name.removeprefix(TIMES): Turns.read(folder) for name, folder in folders.items() if name.startswith(TIMES)}
        trained = {name: folder for name, folder in folders.items() if name not in scoring and not name.startswith(TIMES)}
        cells = by_strategy({name: folder for name, folder in trained.items() if not is_peer(name)})
        peers = read_peers({name: folder for name, folder in trained.items() if is_peer(name)})
        structures = [_structured(name, folder) for name, folder in scoring.items()]
        masks = {
            f"{name}-{objective}/seed-{seed}": load_b_mask(file)
            for objective in self.own.objectives
            for seed in self.config.seeds
            for name, file in self._masks(scoring[f"scores/{objective}/seed-{seed}"], seed)
        }
        found = compare_cells(cells, [pair for objective in self.own.objectives for pair in self._pairs(objective)])
        beside_peers = compare_peers(peers, cells, self._peer_pairs())
        claims = (
            *self._mechanism_claims(structures, masks, times),
            *map(self._accuracy_claim, found),
            *(peer_claim(one, self.config.thresholds) for one in beside_peers),
        )
        may, may_not = conclusions(claims)
        tables = [accuracy_table(cells, {}), _structure_table(structures), self._projection_table(masks), self._cost_table(cells)]
        tables += [comparison_table(found, {})] if found else []
        tables += [peer_table(peers, beside_peers)] if beside_peers else []
        tables += [table] if (table := _overlap_table(masks)).rows else []
        return StudyReport(
            "Placement of k trainable entries in B",
            "placement",
            may or ("Nothing: no claim is decided.",),
            (*may_not, "That the paper's own score behaves like these: it is not public, and a family stands in for it"),
            claims,
            tuple(tables),
            self._pictures(cells, structures, masks, peer_accuracies(peers)),
            setting(self.config, command, [cell for by_seed in cells.values() for cell in by_seed.values()]),
        )

    def _pairs(self, objective: str) -> Iterator[tuple[str, str]]:
        """(random, informed) at the same k and scope, and (lora, informed)."""
        for kind in self.own.scores:
            for scope in self.own.scopes:
                for k in self.own.k:
                    informed = f"{_mask_name(kind, scope, k)}-{objective}"
                    if kind != RANDOM and RANDOM in self.own.scores:
                        yield f"{_mask_name(RANDOM, scope, k)}-{objective}", informed
                    yield f"lora-{objective}", informed

    def _peer_pairs(self) -> Iterator[tuple[str, str]]:
        """(peer, mask) of the same k under the same objective."""
        if self.own.peers:
            for objective, k, kind, scope in product(self.own.objectives, self.own.k, self.own.scores, self.own.scopes):
                yield peer_name(k, objective), f"{_mask_name(kind, scope, k)}-{objective}"

    def _accuracy_claim(self, one: Comparison) -> Claim:
        sample = one.sample(self.config.thresholds.min_items, self.config.thresholds.min_seeds)
        if one.first.startswith("lora"):
            text, published = f"{one.second} recovers LoRA, to {100 * MARGIN:g} points", "recovered if informed"
            decision = by_interval(one.gap, above(-MARGIN), f"the accuracy of {one.second} less that of {one.first}")
        elif one.second.endswith("-sft"):
            text, published = f"Under SFT {one.second} is no better than random", "random ≈ informed"
            decision = one.no_difference(MARGIN)
        else:
            text, published = f"Under GRPO {one.second} is better than random", "random stays at the base model"
            decision = one.second_is_higher()
        return accuracy_claim(text, decision, sample, source=SOURCE, published=published)

    def _mechanism_claims(
        self, structures: list[Structured], masks: Mapping[str, Mapping[str, Tensor]], times: Mapping[str, Turns]
    ) -> Iterator[Claim]:
        exact = {name: sum(int(mask.sum()) for mask in one.values()) == _k_of(name) for name, one in masks.items()}
        yield by_property(exact, "a mask has exactly k entries").claim("Masks hold exactly k entries", source=SOURCE, published="exactly k")
        first = {one.objective: one for one in structures if one.seed == self.config.seeds[0]}
        if "grpo" in first:
            grpo = first["grpo"]
            cosine = leave_one_out(grpo.cosine, grpo.batches)
            what = "mean cosine of consecutive GRPO gradients (jackknife over batches)"
            yield by_interval(cosine, below(ORTHOGONAL), what).claim(
                "GRPO gradients are nearly orthogonal from step to step", source=f"{SOURCE}, figure 3", published="near 0"
            )
        if {"grpo", "sft"} <= first.keys():
            for text, name in (
                ("SFT gradients keep their direction more than GRPO's", "cosine"),
                ("GRPO gradients span more directions than SFT's", "stable_rank"),
            ):
                yield _contrast(text, name, first["sft"], first["grpo"])
        yield from self._concentration_claims(masks)
        steps = self.config.base_run().trainer.steps
        yield from (_cost_claim(first[objective], turns, steps) for objective, turns in times.items())

    def _concentration_claims(self, masks: Mapping[str, Mapping[str, Tensor]]) -> Iterator[Claim]:
        """Chosen entries on V, O and down against a random choice of as many, GRPO."""
        tested = {name: _concentration(mask) for name, mask in masks.items() if "-grpo/" in name and not name.startswith(RANDOM)}
        if not tested:
            return
        adjusted = holm([p for *_, p in tested.values()]).adjusted
        for (name, (chosen, chance, _)), p in zip(tested.items(), adjusted, strict=True):
            decision = by_p_value(
                chosen - chance,
                p,
                "higher",
                "share of V, O and down minus their share of entries",
                test_name="exact hypergeometric test, Holm",
            )
            yield decision.claim(
                f"{name}: the chosen entries concentrate on V, O and down", source=f"{SOURCE}, figure 5", published="concentrated"
            )

    def _projection_table(self, masks: Mapping[str, Mapping[str, Tensor]]) -> Table:
        kinds = tuple(projection_shares(next(iter(masks.values()))))
        rows: list[tuple[Value, ...]] = []
        for name, mask in masks.items():
            shares = projection_shares(mask)
            rows.append((name, _k_of(name), *(shares[kind].share_of_chosen for kind in kinds)))
        entries = projection_shares(next(iter(masks.values())))
        rows.append(("all entries", sum(one.entries for one in entries.values()), *(entries[kind].share_of_entries for kind in kinds)))
        return Table("projections", "Where the chosen entries are", ("mask", "k", *kinds), tuple(rows), "Last row: by chance.")

    def _cost_table(self, cells: Cells) -> Table:
        rows: list[tuple[Value, ...]] = []
        for name, by_seed in cells.items():
            for seed, cell in by_seed.items():
                summary = cell.run.summary
                update = float(np.median(cell.column("seconds/update")))
                rows.append(
                    (
                        name,
                        seed,
                        summary.trainable_parameters,
                        8 * summary.trainable_parameters / 2**20,
                        update,
                        summary.peak_memory_bytes / 2**30,
                    )
                )
        return Table(
            "cost",
            "What k entries cost",
            ("cell", "seed", "entries that train", "optimizer state MiB", "update s", "peak GiB"),
            tuple(rows),
            "Two float32 moments an entry that trains.",
        )

    def _pictures(
        self,
        cells: Cells,
        structures: list[Structured],
        masks: Mapping[str, Mapping[str, Tensor]],
        peers: Mapping[str, Estimate],
    ) -> tuple[Picture, ...]:
        first = self.config.seeds[0]
        shares = {
            name.partition("/")[0]: {kind: one.share_of_chosen for kind, one in projection_shares(mask).items()}
            for name, mask in masks.items()
            if name.endswith(f"/seed-{first}") and f"-{self.own.scopes[0]}-{self.own.k[-1]}-" in name
        }
        length = min(one.batches for one in structures) - 1
        cosines: dict[str, NDArray[np.float64]] = {
            objective: np.array([one.cosines(np.arange(length + 1)) for one in structures if one.objective == objective])
            for objective in self.own.objectives
        }
        panel = CurvePanel("", "cosine", np.arange(1, length + 1), cosines, references={"orthogonal": 0.0})
        return (
            Picture(
                "projections-chosen",
                "Where the chosen entries are",
                stacked_shares(shares, "share of the chosen entries"),
                f"Seed {first}.",
            ),
            Picture(
                "cosines", "Cosine of consecutive gradients", curves([panel]), "Of the scoring batches; mean of the seeds, and their range."
            ),
            Picture("accuracy-by-k", "Accuracy against k", self._accuracy_by_k(cells), "95 % intervals; scope " + self.own.scopes[0] + "."),
            Picture(
                "accuracy-by-cell",
                "Accuracy",
                intervals({**accuracies(cells), **peers}, "accuracy on held-out problems"),
                "95 % intervals.",
            ),
        )

    def _accuracy_by_k(self, cells: Cells) -> Figure:
        found = accuracies(cells)
        series: dict[str, dict[float, Estimate]] = {
            f"{kind}, {objective}": {float(k): found[f"{_mask_name(kind, self.own.scopes[0], k)}-{objective}"] for k in self.own.k}
            for objective in self.own.objectives
            for kind in self.own.scores
        }
        return against(series, "k, entries that train", "accuracy on held-out problems")


def _mask_name(kind: str, scope: str, k: int) -> str:
    return f"{Path(kind).stem if ':' in kind else kind}-{scope}-{k}"


def _k_of(name: str) -> int:
    """Of a mask's cell: "snr-global-4096-grpo/seed-0"."""
    return int(name.partition("/")[0].split("-")[-2])


def _structured(name: str, folder: Path) -> Structured:
    _, objective, seed = name.split("/")
    found = json.loads((folder / STRUCTURE_FILE).read_text())
    gram = np.array(found["whole"]["gram"], dtype=np.float64)
    return Structured(
        objective, int(seed.removeprefix("seed-")), gram, sum(found["seconds"].values()), found["batches"], found["batches_without_signal"]
    )


def _cost_claim(one: Structured, turns: Turns, steps: int) -> Claim:
    """Of all batches that scoring passed, those without a gradient too; one was timed beside every step. steps: of the runs here."""
    scoring_r, step_r = (np.array(turns.seconds[name]) for name in (SCORING, STEP))
    passed = one.batches + one.silent

    def percent(rounds: NDArray[np.int64]) -> float:
        return float(100 * passed * scoring_r[rounds].mean() / (PUBLISHED_STEPS * step_r[rounds].mean()))

    here = percent(np.arange(len(step_r))) * PUBLISHED_STEPS / steps
    what = f"seconds of {passed} batches in % of {PUBLISHED_STEPS:,} steps, taking turns (blocks of rounds resampled)"
    return by_interval(over_steps(percent, len(step_r)), below(MOST_PERCENT), what).claim(
        f"Scoring is cheap ({one.objective}: {one.seconds:.0f} s, {here:.0f}% of the {steps} steps here)",
        source=SOURCE,
        published="< 10 s, < .5 %",
    )


def _contrast(text: str, measure: str, sft: Structured, grpo: Structured) -> Claim:
    """The larger minus the smaller one as claimed; standard errors of the two jackknives added in squares."""
    one, two = (sft, grpo) if measure == "cosine" else (grpo, sft)
    a, b = (leave_one_out(getattr(each, measure), each.batches) for each in (one, two))
    reach = float(np.hypot((a.high - a.low) / 2, (b.high - b.low) / 2))
    value = a.value - b.value
    what = f"{measure.replace('_', ' ')}, {one.objective} − {two.objective} (jackknife over batches)"
    published = "SFT low-rank and stable, GRPO high-rank and nearly orthogonal"
    return by_interval(Estimate(value, value - reach, value + reach), above(0.0), what).claim(
        text, source=f"{SOURCE}, figure 3", published=published
    )


def _concentration(mask: Mapping[str, Tensor]) -> tuple[float, float, float]:
    """(share of the chosen entries on the value path, of all entries, p of as many by chance)."""
    shares = projection_shares(mask)
    chosen = sum(shares[kind].chosen for kind in VALUE_PATH if kind in shares)
    inside = sum(shares[kind].entries for kind in VALUE_PATH if kind in shares)
    k, entries = sum(one.chosen for one in shares.values()), sum(one.entries for one in shares.values())
    tails = hypergeom.sf(chosen - 1, entries, inside, k), hypergeom.cdf(chosen, entries, inside, k)
    return chosen / k, inside / entries, float(min(1.0, 2 * min(tails)))


def _structure_table(structures: list[Structured]) -> Table:
    rows: list[tuple[Value, ...]] = []
    for one in structures:
        everything = np.arange(one.batches)
        ranks = [leave_one_out(measure, one.batches) for measure in (one.stable_rank, one.effective_rank)]
        rows.append(
            (
                one.objective,
                one.seed,
                one.batches,
                one.silent,
                one.cosine(everything),
                *(x for r in ranks for x in (r.value, r.low, r.high)),
                one.seconds,
            )
        )
    columns = ("stable rank", "stable low", "stable high", "effective rank", "effective low", "effective high")
    return Table(
        "structure",
        "Structure of the gradients of B at initialisation",
        ("objective", "seed", "batches", "without signal", "mean cosine", *columns, "scoring s"),
        tuple(rows),
        "Every batch's gradient at length 1: ranks from 1 (one direction) to the number of batches (all orthogonal). Jackknife.",
    )


def _overlap_table(masks: Mapping[str, Mapping[str, Tensor]]) -> Table:
    """Masks of one kind and k between seeds and between objectives."""
    rows: list[tuple[Value, ...]] = []
    for one, two in combinations(masks, 2):
        (name_one, _, seed_one), (name_two, _, seed_two) = (name.partition("/") for name in (one, two))
        kind_one, kind_two = (name.rpartition("-")[0] for name in (name_one, name_two))
        if kind_one == kind_two and (name_one == name_two or seed_one == seed_two):
            found = overlap(masks[one], masks[two])
            rows.append((one, two, found.shared, found.jaccard, found.chance, found.chance_within_modules))
    return Table(
        "overlap",
        "Overlap of masks between seeds and objectives",
        ("mask", "and", "shared", "Jaccard", "by chance", "by chance within modules"),
        tuple(rows),
        "All masks are over the same A.",
    )
