"""Which cells the study of rank allocation asks for, and whose profile chooses their ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastlora.allocation import allocate, rank_pattern
from fastlora.study.config import load_study_config
from fastlora.study.rank_allocation import PROFILE_SEED, RankAllocation
from tests.study.configs import write_study

SECTION = """
seeds = [5, 7]
[rank_allocation]
rank = 16
strategies = ["uniform", "proportional", "random", "reduced"]
scalings = ["constant", "alpha/r"]
dynamic_every = 2
"""


def planned(folder: Path, monkeypatch: pytest.MonkeyPatch, more: str = "") -> tuple[list[str], dict[str, list[int]]]:
    """Names of the cells of stage 2, and their modules' ranks; the profile of seed 5 rises with the layer, that of seed 7 falls."""
    study = RankAllocation(load_study_config(write_study(folder, SECTION + more, study="rank-allocation")))
    plan = study.plan()
    first = next(plan)
    assert {cell.name: cell.config.seed for cell in first} == {
        f"{name} @ constant/seed-{seed}": seed + offset for name, offset in (("uniform", 0), ("profile", PROFILE_SEED)) for seed in (5, 7)
    }
    asked: list[str] = []
    rising = 1 + np.linspace(0, 1, len(study.layers))

    def scores(profile: Path) -> tuple[float, ...]:
        asked.append(profile.name)
        return tuple(rising if profile.name == "profile 5" else rising[::-1])

    monkeypatch.setattr(study, "_scores", scores)
    cells = plan.send({cell.name: Path(cell.name.partition(" @ ")[0] + f" {cell.name[-1]}") for cell in first})
    assert set(asked) == {"profile 5", "profile 7"}
    proportional = {cell.name[-1]: cell.config.lora.rank_pattern for cell in cells if cell.name.startswith("proportional @ constant")}
    for seed, scores_l in (("5", rising), ("7", rising[::-1])):
        ranks_l = allocate("proportional", tuple(scores_l), study.budget, r_min=1, r_max=256)
        assert proportional[seed] == rank_pattern(ranks_l, study.modules)
    return [cell.name for cell in cells], {cell.name: list(cell.config.lora.rank_pattern.values()) for cell in cells}


def test_all_with_every_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, ranks = planned(tmp_path, monkeypatch)
    constant = [f"{name} @ constant" for name in ("proportional", "random", "reduced", "dynamic")]
    assert sorted(names) == sorted(f"{name}/seed-{seed}" for name in (*constant, "proportional @ alpha/r") for seed in (5, 7))
    assert set(ranks["dynamic @ constant/seed-5"]) == {16}
    assert {name: sum(found) for name, found in ranks.items()} == {
        name: 30 * 7 * 16 if not name.startswith("reduced") else 7 * round(0.7 * 30 * 16) for name in names
    }


def test_some_with_every_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, _ = planned(tmp_path, monkeypatch, 'repeated = ["uniform", "proportional"]\n')
    assert [name for name in names if name.endswith("seed-7")] == ["proportional @ constant/seed-7"]
    assert len(names) == 6
