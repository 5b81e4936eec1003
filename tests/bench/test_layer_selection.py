"""bench.layer_selection: adapters are where a set says, sets take turns, targets are judged by the stated ratios."""

from __future__ import annotations

from pathlib import Path

import pytest

import bench.layer_selection as bench_layers
from bench.gemm_peak import lora_work
from bench.layer_selection import POINTS, layers_config, layers_table, missed, parse, race_sets
from bench.op_cases import packaged_model as dimensions
from fastlora.config import RunConfig
from fastlora.lora.groups import projections, shapes
from fastlora.lora.patterns import resolve
from fastlora.model import meta_model

HALF = range(15, 30)


@pytest.mark.usefixtures("packaged_model")
@pytest.mark.parametrize("layers", [range(30), HALF, (0, 3, 29)], ids=str)
@pytest.mark.parametrize("kind", POINTS)
def test_adapters_are_on_these_layers(tmp_path: Path, kind: bench_layers.BatchKind, layers: tuple[int, ...]) -> None:
    config = layers_config(tmp_path, kind, POINTS[kind], layers)
    specs = resolve(shapes(projections(meta_model(config.model))), config.lora)
    ranks = {spec.name: spec.rank for spec in specs}
    assert {int(name.split(".")[2]) for name, rank in ranks.items() if rank} == set(layers)
    assert set(ranks.values()) <= {0, 32} and config.objective == kind


@pytest.mark.usefixtures("packaged_model")
def test_sets_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warm-up, then rounds, every other one backwards; ratios are against the same round's `all`, predictions the FLOPs'."""
    order: list[int] = []

    def fake(config: RunConfig, *_: object) -> object:
        adapted = 30 - sum(not rank for rank in config.lora.rank_pattern.values()) * 15
        return lambda: order.append(adapted)

    monkeypatch.setattr(bench_layers, "ready_update", fake)
    options = parse(["--pairs", "3"])
    rows = list(race_sets(tmp_path, "grpo", POINTS["grpo"], {"all": range(30), "last half": HALF}, options, lambda message: None))
    assert order == [30, 15, 15, 30] * 2
    flops = [lora_work(dimensions(), POINTS["grpo"].groups, 32, layers).flops for layers in (range(30), HALF)]
    assert [row["predicted_ratio"] for row in rows] == [1.0, flops[1] / flops[0]]
    assert rows[0]["ratio"] == 1.0 and rows[1]["op"] == "layer_selection.grpo" and len(rows[1]["layers"]) == 15
    assert layers_table(rows).row_count == 2


@pytest.mark.parametrize(
    ("name", "ratio", "predicted", "expected"),
    [
        ("last half", 0.79, 0.77, False),
        ("last half", 0.81, 0.77, True),
        ("random half", 0.95, 0.93, False),
        ("random half", 0.80, 0.93, True),
    ],
)
def test_targets(name: str, ratio: float, predicted: float, expected: bool) -> None:
    assert missed({"implementation": name, "ratio": ratio, "predicted_ratio": predicted}) == expected


@pytest.mark.parametrize("text", ["30", "-1,2"])
def test_layers_that_the_model_has_not(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([f"--layers={text}"])
    assert "layers go from 0 to 29" in capsys.readouterr().err


def test_too_few_rounds_are_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--pairs", "2"])
    assert "--pairs 2: 3 at least" in capsys.readouterr().err


def test_layers_of_ones_own() -> None:
    assert parse(["--layers", "7,3,7"]).layers == (3, 7)
