"""Settings of a study, runs derived from a base, names and keys of cells. No Ray."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from fastlora.config import ConfigError, RunConfig, Section, load_config
from fastlora.study.cells import Cell, add_names
from fastlora.study.config import STUDIES, StudyConfig, derive, differences, load_study_config
from fastlora.study.tasks import load_task
from tests.study.configs import HERE, write_study

RUN = RunConfig()


def cell(changes: dict[str, Any] | None = None, **more: Any) -> Cell:
    return Cell("a", derive(RUN, changes or {}, "cell"), **more)


def test_key_says_what_is_computed_and_not_what_it_is_called() -> None:
    key = cell().key
    assert re.fullmatch(r"[0-9a-f]{16}", key)
    renamed = Cell("b", RUN.model_copy(update={"name": "x", "output_dir": Path("elsewhere")}))
    assert renamed.key == key
    others = [cell({"seed": 1}), cell({"lora.r": 3}), cell(task="probe"), cell(options={"batches": 16}), cell(options={"batches": 17})]
    assert len({key, *(other.key for other in others)}) == 6
    assert cell(options={"a": 1, "b": [2]}).key == cell(options={"b": [2], "a": 1}).key


@pytest.mark.parametrize(
    ("setting", "file", "changes"),
    [
        ("lora.b_mask", "mask.safetensors", {}),
        ("data.eval_path", "problems.jsonl", {}),
        ("data.source", "problems.jsonl", {}),
        ("reward.functions", "reward.py", {}),
        ("lora.init_from", "adapter", {}),
        ("rollout.replay_path", "rollouts", {"rollout.sampler": "replay"}),
    ],
)
def test_a_file_counts_by_its_bytes_wherever_it_lies(tmp_path: Path, setting: str, file: str, changes: dict[str, str]) -> None:
    def key(folder: str) -> str:
        path = str(tmp_path / folder / file)
        return cell({**changes, setting: [f"{path}:digits"] if setting == "reward.functions" else path}).key

    def write(folder: str, content: bytes) -> str:
        path = tmp_path / folder / file
        path = path if path.suffix else path / "inner.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return key(folder)

    first = write("here", b"1")
    assert write("there", b"1") == first
    assert write("here", b"2") != first
    assert write("here", b"1") == first
    shutil.rmtree(tmp_path / "here")
    with pytest.raises(ConfigError, match=rf"cell 'a': {re.escape(setting)}: .*here.*: No such file"):
        key("here")


def test_a_folder_of_options_counts_by_its_files_and_not_by_compiled_python(tmp_path: Path) -> None:
    def key() -> str:
        return cell(options={"include_path": tmp_path}).key

    (tmp_path / "task.py").write_text("1")
    first = key()
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "task.pyc").write_text("compiled")
    assert key() == first
    (tmp_path / "task.py").write_text("2")
    assert key() != first


def test_what_a_run_writes_is_no_part_of_it(tmp_path: Path) -> None:
    recording = cell({"rollout.record_path": tmp_path})
    before = recording.key
    (tmp_path / "step-1.safetensors").write_bytes(b"1")
    assert recording.key == before


@pytest.mark.parametrize("options", [{"x": Path}, {"x": float("nan")}, {"x": {1, 2}}])
def test_options_are_plain_json(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="cell 'a': its options must be plain JSON"):
        assert cell(options=options).key


def test_two_cells_of_one_name_are_refused_also_across_stages() -> None:
    names = add_names([cell()], {})
    assert names == {"a": cell().key}
    with pytest.raises(ConfigError, match="two cells are named 'a'"):
        add_names([cell({"seed": 3})], names)
    with pytest.raises(ConfigError, match="two cells are named 'a'"):
        add_names([cell(), cell()], {})


def test_derive_merges_sections_and_replaces_values() -> None:
    base = derive(RUN, {"lora.rank_pattern": {"q_proj": 3, "k_proj": 4}, "optim": {"lr": 1e-3}}, "base")
    config = derive(base, {"lora.rank_pattern": {"v_proj": 5}, "optim": {"eps": 1e-6}, "optim.warmup_steps": 2, "seed": 9}, "cell")
    assert config.lora.rank_pattern == {"v_proj": 5}
    assert (config.optim.lr, config.optim.eps, config.optim.warmup_steps, config.seed) == (1e-3, 1e-6, 2, 9)
    assert differences(config, base) == {"lora.rank_pattern": {"v_proj": 5}, "optim.eps": 1e-6, "optim.warmup_steps": 2, "seed": 9}
    assert base == RunConfig.model_validate({"lora": {"rank_pattern": {"q_proj": 3, "k_proj": 4}}, "optim": {"lr": 1e-3}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim.learning_rate": 1}, "cell x: optim.learning_rate: unknown key"),
        ({"lorra.r": 1}, "cell x: lorra.r: unknown key"),
        ({"lora.r": -1}, "cell x: lora.r: .*greater than or equal to 0"),
        ({"lora.r.x": 1}, "cell x: lora.r.x: unknown key"),
        ({"optim": 3}, "cell x: optim: "),
        ({"method": "full", "lora.rank_pattern": {"q_proj": 1}}, "cell x: config: .*lora.rank_pattern .*no effect"),
    ],
)
def test_derive_refuses_by_name_what_a_run_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        derive(RUN, changes, "cell x")


def test_study_file_base_and_run(tmp_path: Path) -> None:
    path = write_study(
        tmp_path, "seeds = [3, 4]\n[run]\noptim.lr = 2e-4\nlora.r = 2\n[own]\ntask = 'write'\n", base="seed = 7\n[lora]\nr = 9\n"
    )
    config = load_study_config(path)
    assert (config.seeds, config.own, config.base) == ((3, 4), {"task": "write"}, tmp_path / "base.toml")
    run = config.run_config({"seed": 4})
    assert (run.seed, run.optim.lr, run.lora.r) == (4, 2e-4, 2)
    assert load_study_config(path, seeds=[5]).seeds == (5,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sead = [1]", "little.toml: sead: unknown key"),
        ("[run]\noptim.lrr = 1", "little.toml: run: optim.lrr: unknown key"),
        ("[run]\nmodel.device = 'cuda'", "little.toml: resources.gpus = 0, and model.device = 'cuda'"),
        ("seeds = []", "little.toml: seeds: is empty"),
        ("seeds = [1, 2, 1]", "little.toml: seeds: 1 stands there twice"),
        ("[resources]\ncpus = 0", "little.toml: resources.cpus: .*greater than 0"),
        ("[thresholds]\nmin_seed = 1", "little.toml: thresholds.min_seed: unknown key"),
        ("[placement]\nk = [1]", r"little.toml: config: \[placement\] is set, but study = "),
    ],
)
def test_bad_study_files_are_refused_with_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_study_config(write_study(tmp_path, text))


@pytest.mark.parametrize(
    ("study", "text", "message"),
    [
        ("rank-alocation", "", "study = 'rank-alocation' is unknown; registered are rank-allocation, layer-selection"),
        ("rank-allocation", "[own]\nx = 1", r"\[own\] is set, but study = 'rank-allocation'"),
        (
            "rank-allocation",
            "[rank_allocation]\nstrategies = ['proportionl']",
            "strategies.0: 'proportionl' is unknown; did you mean proport",
        ),
        ("rank-allocation", "[rank_allocation]\nstrategies = ['uniform', 'uniform']", "strategies: uniform stands there twice"),
        (
            "rank-allocation",
            "[rank_allocation]\nstrategies = ['uniform']\nrepeated = ['random']",
            "repeated: 'random' is none of the strategies: uniform",
        ),
        ("layer-selection", "[layer_selection]\nselections = ['best']", "selections.0: 'best' is unknown; .*path/to/file.py:function"),
        ("placement", "[placement]\nbatches = 5", "placement.batches: .*greater than or equal to 16"),
        ("reward-density", "[reward_density]\nregimes = ['dense']", "regimes.0: .*'outcome', 'process' or 'distillation'"),
    ],
)
def test_unknown_studies_strategies_and_sections(tmp_path: Path, study: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_study_config(write_study(tmp_path, text, study=study))


def test_ones_own_strategy_is_allowed(tmp_path: Path) -> None:
    path = write_study(tmp_path, "[rank_allocation]\nstrategies = ['uniform', 'mine.py:flat']", study="rank-allocation")
    assert load_study_config(path).rank_allocation.strategies == ("uniform", "mine.py:flat")


def test_missing_base_is_named(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    (tmp_path / "base.toml").unlink()
    with pytest.raises(ConfigError, match=r"base.toml: no such config file"):
        load_study_config(path)


def test_every_study_has_its_section_and_every_field_its_docstring() -> None:
    def check(kind: type[Section]) -> None:
        for name, field in kind.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                check(field.annotation)
            else:
                assert field.description, f"{kind.__name__}.{name}"

    assert {name.replace("-", "_") for name in STUDIES} <= set(StudyConfig.model_fields)
    check(StudyConfig)


def test_tasks_are_found_by_name_or_file() -> None:
    assert callable(load_task("train")) and callable(load_task(f"{HERE / 'quick_tasks.py'}:write"))
    with pytest.raises(ConfigError, match="task 'trian' is unknown; known are train"):
        load_task("trian")
    with pytest.raises(ConfigError, match=r"task: .*has no nothing"):
        load_task(f"{HERE / 'quick_tasks.py'}:nothing")


def test_the_shipped_base_derives() -> None:
    base = load_config(HERE.parents[1] / "configs" / "smollm2_sums_cpu.toml")
    assert derive(base, {"lora.rank_pattern": {}, "lora.r": 32}, "cell").lora.rank_pattern == {}
