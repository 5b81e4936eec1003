"""Peers of S3's masks: other libraries' ways to train k entries, on the same problems with the same seeds.

    shira-K-OBJECTIVE/seed-N    K entries of W itself: PEFT's SHiRA, trained by TRL (fastlora/study/shira.py)

A peer's cell holds answers and what it cost (`evaluation.jsonl`, `shira.json`), not a run folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from fastlora.evaluate import Evaluation
from fastlora.model import meta_model
from fastlora.study.cells import Cell
from fastlora.study.claims import Claim, Estimate, accuracy_claim
from fastlora.study.comparisons import Answers, Comparison, answers_after, compare, mean_accuracy
from fastlora.study.config import StudyConfig, ThresholdsConfig
from fastlora.study.report import Table, Value
from fastlora.study.results import SEED_IN_NAME, Cells
from fastlora.study.shira import Trained, adapted, refuse_settings, require_libraries, smallest_rank
from fastlora.study.tasks import EVALUATION_FILE

PEER_NAME = re.compile(r"shira-\d+-[a-z]+/seed-\d+")
"""Of a cell. A mask by one's own score in shira.py has its scope in the middle: shira-global-4096-grpo."""
SOURCE = "arXiv 2406.13175"


@dataclass(frozen=True, slots=True)
class Peer:
    """One finished cell."""

    evaluation: Evaluation
    trained: Trained


Peers = Mapping[str, Mapping[int, Peer]]
"""Name without the seed -> seed -> cell."""


def peer_name(k: int, objective: str) -> str:
    """Without the seed: "shira-4096-grpo"."""
    return f"shira-{k}-{objective}"


def is_peer(name: str) -> bool:
    """Of a cell: it is a peer's."""
    return PEER_NAME.fullmatch(name) is not None


def peer_cells(config: StudyConfig) -> list[Cell]:
    """Every peer at every k, objective and seed. Raises ConfigError for one that cannot run: before anything has trained."""
    own = config.placement
    if not own.peers:
        return []
    require_libraries()
    cells = []
    for objective, k, seed in product(own.objectives, own.k, config.seeds):
        name = f"{peer_name(k, objective)}/seed-{seed}"
        run = config.run_config({"seed": seed, "objective": objective, "optim.lr": own.shira_lr}, name)
        refuse_settings(run)
        cells.append(Cell(name, run, "shira", {"entries": k}))
    layers = adapted(meta_model(cells[0].config.model), cells[0].config)
    smallest_rank(layers, max(own.k))
    return cells


def read_peers(folders: Mapping[str, Path]) -> dict[str, dict[int, Peer]]:
    """Of finished cells."""
    found: dict[str, dict[int, Peer]] = {}
    for cell, folder in folders.items():
        match = SEED_IN_NAME.fullmatch(cell)
        assert match is not None, "peer_cells names them"
        found.setdefault(match["strategy"], {})[int(match["seed"])] = Peer(Evaluation.read(folder / EVALUATION_FILE), Trained.read(folder))
    return found


def peer_accuracies(peers: Peers) -> dict[str, Estimate]:
    """After training, by name."""
    return {name: mean_accuracy(_answers(by_seed)) for name, by_seed in peers.items()}


def compare_peers(peers: Peers, cells: Cells, pairs: Iterable[tuple[str, str]]) -> tuple[Comparison, ...]:
    """Every (peer, strategy) of `pairs`, corrected together; a gap is the strategy's accuracy less the peer's."""
    answers = {name: answers_after(by_seed) for name, by_seed in cells.items()}
    return compare(answers | {name: _answers(by_seed) for name, by_seed in peers.items()}, list(pairs))


def peer_table(peers: Peers, comparisons: Iterable[Comparison]) -> Table:
    """One row a peer, seed and strategy: accuracy with Wilson's interval, gap with Newcombe's, McNemar's p."""
    rows: list[tuple[Value, ...]] = []
    for one in comparisons:
        for seed, test in one.per_seed.items():
            peer = peers[one.first][seed]
            accuracy, trained = peer.evaluation.accuracy, peer.trained
            measured = (accuracy.value, accuracy.low, accuracy.high)
            gap = (test.difference, test.low, test.high, test.p_value)
            rows.append((one.first, seed, trained.entries, trained.seconds, test.n, *measured, one.second, *gap))
    return Table(
        "peers",
        "PEFT's SHiRA with as many entries of W",
        (
            *("peer", "seed", "entries that train", "training s", "items", "accuracy", "low", "high"),
            *("mask of B", "mask less peer", "gap low", "gap high", "McNemar's p"),
        ),
        tuple(rows),
        "SHiRA trains entries of W itself, drawn at random, at a learning rate of its own. 95 % intervals: Wilson's of an accuracy, "
        "Newcombe's of a gap; p not corrected.",
    )


def peer_claim(one: Comparison, thresholds: ThresholdsConfig) -> Claim:
    """Of a strategy against a peer."""
    text = f"{one.second} is more accurate than as many entries of W in PEFT's SHiRA, {one.first}"
    sample = one.sample(thresholds.min_items, thresholds.min_seeds)
    return accuracy_claim(text, one.second_is_higher(), sample, source=SOURCE, published="not compared")


def _answers(by_seed: Mapping[int, Peer]) -> Answers:
    return {seed: peer.evaluation.answers for seed, peer in by_seed.items()}
