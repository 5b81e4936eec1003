"""Each of the four studies for real, shortened: the model, Ray, every stage, and a report whose numbers come from the cells."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from fastlora.lora.peft_format import load_b_mask
from fastlora.metrics import RunSummary
from fastlora.study.__main__ import main
from tests.study.configs import HERE, write_study

BASE = (HERE.parents[1] / "configs" / "smollm2_sums_cpu.toml").read_text()
SHORT = """
seeds = [0]
timing_rounds = 3
[run]
trainer.steps = 3
rollout.num_prompts = 4
rollout.num_generations = 4
rollout.max_completion_length = 4
eval.num_problems = 8
eval.every = 0
lora.rank_pattern = {}
lora.r = 2
"""
"""Three steps: the fewest that early and late profiles and intervals over steps can be made of."""

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray"), pytest.mark.timeout(900), pytest.mark.usefixtures("ray")]


def run(folder: Path, study: str, section: str) -> tuple[dict[str, Path], dict[str, list[dict[str, str]]], str]:
    """(cell folders, tables by file stem, Markdown) of a study that must succeed."""
    file = write_study(folder, SHORT + section, study=study, base=BASE)
    out = folder / "out"
    assert main([study, "--config", str(file), "--out", str(out)]) == 0
    cells = {name: out / "cells" / key for name, key in json.loads((out / "cells.json").read_text()).items()}
    tables = {path.stem: list(csv.DictReader(path.open())) for path in out.glob("*.csv")}
    return cells, tables, (out / "report.md").read_text()


def test_rank_allocation(tmp_path: Path) -> None:
    section = """
[rank_allocation]
rank = 4
r_max = 8
strategies = ["uniform", "proportional"]
dynamic_every = 2
"""
    cells, tables, page = run(tmp_path, "rank-allocation", section)
    assert set(cells) == {f"{name} @ constant/seed-0" for name in ("uniform", "profile", "proportional", "dynamic")}
    ranks = {name: RunSummary.read(folder).rank_pattern for name, folder in cells.items()}
    assert {sum(found.values()) for found in ranks.values()} == {30 * 7 * 4}
    assert len(set(ranks["proportional @ constant/seed-0"].values())) > 1
    by_strategy = {row["strategy"]: row for row in tables["profiles"]}
    assert "| **supported** | Every strategy but" in page
    assert float(by_strategy["proportional"]["√r predicts"]) > float(by_strategy["uniform"]["ratio raw"]) > 1


def test_layer_selection(tmp_path: Path) -> None:
    section = """
[layer_selection]
selections = ["all", "top", "last"]
objectives = ["sft"]
batches = 2
attention_rank = 2
mlp_rank = 4
[layer_selection.second_task]
source = "reasoning_gym:products"
options = { min_terms = 2, max_terms = 2, min_digits = 1, max_digits = 1 }
"""
    cells, tables, page = run(tmp_path, "layer-selection", section)
    last = RunSummary.read(cells["last-sft/seed-0"]).rank_pattern
    assert min(int(name.split(".")[2]) for name in last) == 15 and set(last.values()) == {2, 4}
    rows = {row["cell"]: row for row in tables["selections"]}
    assert float(rows["last-sft"]["× all"]) < 1 and (rows["all-sft"]["layers"], rows["last-sft"]["layers"]) == ("0–29", "15–29")
    assert len({name.split(".")[2] for name in RunSummary.read(cells["top-sft/seed-0"]).rank_pattern}) == 15
    assert {row["cell"] for row in tables["forgetting"]} == {"all-sft/seed-0", "top-sft/seed-0", "last-sft/seed-0"}
    assert "as accurate as all-sft" in page and "undecided" in page


def test_placement(tmp_path: Path) -> None:
    section = """
[placement]
scores = ["sign_consistency", "random"]
k = [500]
objectives = ["sft"]
peers = ["shira"]
"""
    cells, tables, page = run(tmp_path, "placement", section)
    masked = {name: folder for name, folder in cells.items() if "-global-500-" in name}
    assert len(masked) == 2
    for name, folder in masked.items():
        assert RunSummary.read(folder).trainable_parameters == 500, name
    masks = sorted((cells["scores/sft/seed-0"] / "masks").glob("*.safetensors"))
    assert [sum(int(mask.sum()) for mask in load_b_mask(path).values()) for path in masks] == [500, 500]
    assert int(next(row for row in tables["structure"])["batches"]) == 16
    assert [(row["peer"], int(row["entries that train"])) for row in tables["peers"]] == [("shira-500-sft", 500)] * 2
    assert "as many entries of W in PEFT's SHiRA" in page and "| Scoring is cheap (sft: " in page
    assert "| **supported** | Masks hold exactly k entries" in page


def test_reward_density(tmp_path: Path) -> None:
    section = """
[reward_density]
ranks = [1]
full = false
teacher_rank = 2
teacher_steps = 4
[reward_density.runs.process.reward]
functions = ["process"]
grader = "first_integer"
process = { model = "smollm2-135m-instruct", step_tag = " ok", positive_tag = " yes", negative_tag = " no" }
[reward_density.runs.distillation.reward]
functions = ["distillation"]
grader = "first_integer"
"""
    cells, tables, page = run(tmp_path, "reward-density", section)
    assert set(cells) == {
        "teacher/seed-0",
        *(f"{regime} r 1/seed-0" for regime in ("outcome", "process", "distillation")),
    }
    peaks = {row["cell"]: float(row["peak advantage std"]) for row in tables["dynamics"]}
    assert peaks["distillation r 1"] > 0
    assert "The advantages' peak std is larger under process than under outcome rewards" in page
