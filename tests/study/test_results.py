"""What is read from cells' folders is what runs wrote there; comparisons are scipy's and statsmodels' on the raw answers."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest
from statsmodels.stats.multitest import multipletests

from fastlora.analysis.run_reader import read_run
from fastlora.evaluate import Answer
from fastlora.metrics import GRADIENT_PROFILE_SCHEMA
from fastlora.statistics import proportion_interval
from fastlora.study.comparisons import Answers, answers_after, answers_before, compare, comparison_table, mean_accuracy
from fastlora.study.results import FINISHED_FILE, CellResult, ResultError, by_strategy, read_cell, stack
from tests.study.synthetic_cell import make_cell

STRATEGIES = {"uniform": 0, "placement/k-4": 10}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two strategies × seeds 3 and 0, in this order."""
    root = tmp_path_factory.mktemp("cells")
    return {
        f"{name}/seed-{seed}": make_cell(root / f"{first + seed}", seed=first + seed)
        for name, first in STRATEGIES.items()
        for seed in (3, 0)
    }


@pytest.fixture(scope="module")
def cell(folders: dict[str, Path]) -> CellResult:
    return read_cell("uniform/seed-0", folders["uniform/seed-0"])


def rows(cell: CellResult) -> list[dict[str, float]]:
    return [json.loads(line) for line in (cell.run.path / "metrics.jsonl").read_text().splitlines()]


def test_a_cell_is_what_its_files_say(cell: CellResult) -> None:
    lines = (cell.run.path / "eval_after.jsonl").read_text().splitlines()
    assert cell.correct == [json.loads(line)["correct"] for line in lines]
    assert cell.correct_before == [answer.correct for answer in cell.run.eval_before]
    assert (cell.accuracy.value, cell.accuracy.n) == (sum(cell.correct) / 64, 64)
    assert cell.accuracy_before.successes == sum(cell.correct_before)
    assert cell.steps.tolist() == [row["step"] for row in rows(cell)] == list(range(1, 13))
    assert cell.column("reward/mean").tolist() == [row["reward/mean"] for row in rows(cell)]
    assert np.isnan(cell.column("no/such")).tolist() == [True] * 12
    assert cell.seconds == {
        stage: pytest.approx(sum(row[f"seconds/{stage}"] for row in rows(cell))) for stage in ("sampling", "reward", "update", "other")
    }
    assert cell.ranks == cell.run.summary.rank_pattern
    assert cell.layer_norms().norms_ls.shape == (2, 12)


def test_layer_norms_can_be_rank_normalised(cell: CellResult) -> None:
    """B of layer 1 at step 5, by a plain loop."""
    picked = [r for r in cell.run.gradient_profile.to_pylist() if (r["layer"], r["step"], r["matrix"]) == (1, 5, "B")]
    for measure in ("raw", "rank_normalised"):
        expected = sum(r["norm"] ** 2 / (r["rank"] if measure == "rank_normalised" else 1) for r in picked) ** 0.5
        assert cell.layer_norms(measure, "B").norms_ls[1, 4] == pytest.approx(expected, rel=1e-6)


def test_the_peak_counts_evaluations_during_training(cell: CellResult) -> None:
    during = [(row["step"], row["eval/accuracy"]) for row in rows(cell) if "eval/accuracy" in row]
    assert during, "the run evaluates at step 10"
    step, peak = cell.peak
    assert peak.value == max(cell.accuracy.value, *(accuracy for _, accuracy in during))
    high = dataclasses.replace(cell.run, metrics={**cell.run.metrics, "eval/accuracy": np.where(cell.steps % 4 == 0, 1.0, np.nan)})
    high.metrics["eval/num_problems"][:] = 32  # type: ignore[index]
    step, peak = CellResult("x", high).peak
    assert (step, peak) == (4, proportion_interval(32, 32)), "the earliest of equal ones, with its own number of problems"


def test_strategies_by_seed(folders: dict[str, Path]) -> None:
    found = by_strategy(folders)
    assert {name: list(cells) for name, cells in found.items()} == {"uniform": [0, 3], "placement/k-4": [0, 3]}
    assert found["placement/k-4"][3].run.path == folders["placement/k-4/seed-3"]
    with pytest.raises(ResultError, match=r"cell probe \(.*\): its name does not end in /seed-N"):
        by_strategy({**folders, "probe": folders["uniform/seed-0"]})


def test_stack_puts_steps_under_one_another(cell: CellResult) -> None:
    longer = dataclasses.replace(cell.run, metrics={"step": np.array([2.0, 30.0]), "loss": np.array([7.0, 8.0])})
    steps, values_ns = stack([cell, CellResult("other", longer)], "loss")
    assert steps.tolist() == [*range(1, 13), 30]
    np.testing.assert_array_equal(values_ns[0], [*(row["loss"] for row in rows(cell)), np.nan])
    np.testing.assert_array_equal(values_ns[1], [np.nan, 7, *[np.nan] * 10, 8])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (FINISHED_FILE, None, r"cell a/seed-0 \(.*\) is not finished: it has no finished.json. Run the study again"),
        (FINISHED_FILE, "{", r"cell a/seed-0: .*finished.json is damaged"),
        ("summary.json", None, r"cell a/seed-0 is damaged: .*summary.json is missing"),
        ("summary.json", "{}", r"cell a/seed-0 is damaged: .*summary.json is damaged"),
        ("eval_after.jsonl", None, r"cell a/seed-0 is damaged: .*eval_after.jsonl is missing"),
        (
            "metrics.jsonl",
            '{"step": 1}\n{"st',
            r"cell a/seed-0 is damaged: .*metrics.jsonl, line 2: cut off.* remove .* and run the study again",
        ),
        (
            "gradient_profile.parquet/step-000001.parquet",
            "x",
            r"cell a/seed-0 is damaged: .*gradient_profile.parquet/step-000001.parquet is not a readable",
        ),
    ],
)
def test_an_unfinished_or_damaged_cell_is_named(
    folders: dict[str, Path], tmp_path: Path, name: str, damage: str | None, message: str
) -> None:
    folder = tmp_path / "cell"
    shutil.copytree(folders["uniform/seed-0"], folder)
    if damage is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(damage)
    with pytest.raises(ResultError, match=message):
        by_strategy({"a/seed-0": folder})


def test_full_fine_tuning_has_no_layer_norms(cell: CellResult) -> None:
    full = CellResult("full/seed-0", dataclasses.replace(cell.run, gradient_profile=GRADIENT_PROFILE_SCHEMA.empty_table()))
    with pytest.raises(ResultError, match="cell full/seed-0 "):
        full.layer_norms()


def answers(accuracy: float, seeds: int = 3, items: int = 200, start: int = 0) -> Answers:
    """Random answers to the same problems."""
    right_si = np.random.default_rng(start).random((seeds, items)) < accuracy
    return {s: [Answer(i, f"p{i}", "c", f"g{i}", bool(r)) for i, r in enumerate(right_i)] for s, right_i in enumerate(right_si)}


STRATEGY_ANSWERS = {"base": answers(0.4), "low": answers(0.45, start=1), "high": answers(0.8, start=2)}


def right(strategy: Answers) -> np.ndarray:
    return np.array([[answer.correct for answer in one] for one in strategy.values()], dtype=float)


def test_comparisons_are_mcnemar_a_seed_and_holm_together() -> None:
    pairs = [("base", "low"), ("base", "high"), ("low", "high")]
    found = compare(STRATEGY_ANSWERS, pairs)
    assert [(one.first, one.second) for one in found] == pairs
    for one in found:
        first_si, second_si = right(STRATEGY_ANSWERS[one.first]), right(STRATEGY_ANSWERS[one.second])
        assert one.gap.value == pytest.approx((second_si - first_si).mean())
        assert one.gap.low <= one.gap.value <= one.gap.high
        for seed, test in one.per_seed.items():
            gained, lost = int((second_si > first_si)[seed].sum()), int((second_si < first_si)[seed].sum())
            assert test.p_value == pytest.approx(binomtest(gained, gained + lost).pvalue)
            assert test.difference == pytest.approx((gained - lost) / 200)
        assert re.fullmatch(
            r"a gap of .* needs [\d,]+ items × 3 seeds .*|no number of items finds .* at least \d+ seeds are needed", one.needed
        )
    assert [one.p_holm for one in found] == pytest.approx(multipletests([one.pooled.p_value for one in found], method="holm")[1])


def test_the_order_of_the_seeds_does_not_matter() -> None:
    backwards = dict(reversed(STRATEGY_ANSWERS["low"].items()))
    (one,), (other,) = (compare({"a": STRATEGY_ANSWERS["base"], "b": b}, [("a", "b")]) for b in (STRATEGY_ANSWERS["low"], backwards))
    assert one == other


def test_verdicts_of_comparisons() -> None:
    _, high, back = compare(STRATEGY_ANSWERS, [("base", "low"), ("base", "high"), ("high", "base")])
    assert (high.second_is_higher().verdict, back.second_is_higher().verdict) == ("supported", "not supported")
    assert "paired bootstrap over items and seeds, Holm over 3 comparisons: p < 0.05" in high.second_is_higher().test
    assert "points [+" in high.second_is_higher().measured
    assert (high.no_difference(0.02).verdict, high.no_difference(0.99).verdict) == ("not supported", "supported")
    (same,) = compare({"a": STRATEGY_ANSWERS["low"], "b": STRATEGY_ANSWERS["low"]}, [("a", "b")])
    assert (same.gap.value, same.needed, same.second_is_higher().verdict) == (0.0, "", "undecided")
    assert same.sample(1000, 3).items == 200 and same.sample(1000, 3).seeds == 3


def test_one_seed_is_compared_too() -> None:
    (one,) = compare({"a": answers(0.4, seeds=1), "b": answers(0.6, seeds=1, start=5)}, [("a", "b")])
    assert not one.pooled.seeds_resampled and "items of one seed" in one.needed
    assert "paired bootstrap over items, Holm over 1" in one.second_is_higher().test


def test_mean_accuracy_repeats_items_over_seeds() -> None:
    """Three seeds with equal answers are no more evidence than one: the interval must not shrink by √3."""
    one = answers(0.5, seeds=1, items=400)
    three = dict.fromkeys(range(3), one[0])
    single, repeated = mean_accuracy(one), mean_accuracy(three)
    expected = proportion_interval(int(right(one).sum()), 400)
    assert (single.value, single.low, single.high) == (expected.value, expected.low, expected.high)
    assert repeated.value == single.value
    assert repeated.high - repeated.low == pytest.approx(single.high - single.low, rel=0.05)


def test_what_cannot_be_paired_is_named() -> None:
    pair = [("a", "b")]
    with pytest.raises(ResultError, match=r"a has seeds \[0, 1, 2\], b has \[0, 1\]"):
        compare({"a": answers(0.5), "b": answers(0.5, seeds=2)}, pair)
    other = {seed: [dataclasses.replace(answer, gold="?") for answer in one] for seed, one in answers(0.5).items()}
    with pytest.raises(ResultError, match="b/seed-0 did not answer the same problems as a/seed-0"):
        compare({"a": answers(0.5), "b": other}, pair)
    with pytest.raises(ResultError, match="no cell of strategy b is there to compare; there are a"):
        compare({"a": answers(0.5)}, pair)
    assert compare({}, []) == ()


def test_the_table_holds_every_pair(folders: dict[str, Path]) -> None:
    found = by_strategy(folders)
    strategies = {"base": answers_before(found["uniform"]), **{name: answers_after(cells) for name, cells in found.items()}}
    assert [answer.correct for answer in strategies["base"][3]] == [a.correct for a in read_run(folders["uniform/seed-3"]).eval_before]
    comparisons = compare(strategies, [("base", "uniform"), ("uniform", "placement/k-4")])
    table = comparison_table(comparisons, {("base", "uniform"): 0.085})
    by_column = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [row["published gap"] for row in by_column] == [0.085, None]
    assert [row["gap"] for row in by_column] == [one.pooled.difference for one in comparisons]
    assert [row["seed 3: McNemar p"] for row in by_column] == [one.per_seed[3].p_value for one in comparisons]
    assert {row["items"] for row in by_column} == {64} and {row["seeds"] for row in by_column} == {2}
