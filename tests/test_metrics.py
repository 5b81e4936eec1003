"""The files of a run folder: strict JSON, nothing twice after a resume, clear errors, the Parquet table against its input."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from fastlora.alarms import Alarm
from fastlora.atomic import DiskFullError
from fastlora.metrics import (
    CompletionSample,
    MetricsError,
    MetricsWriter,
    RunSummary,
    layer_of,
    write_environment,
)
from fastlora.ops.adamw_step import Segment

JSON_FILES = ("metrics.jsonl", "completions.jsonl", "alarms.jsonl")
PROFILE = "gradient_profile.parquet"
FILES = (*JSON_FILES, PROFILE)

SEGMENTS = [  # uneven ranks; gate_proj has rank 0 and so no segments; down_proj's A is frozen and has none
    Segment("model.layers.0.self_attn.q_proj.lora_A", 0, (3, 8), transposed=False),
    Segment("model.layers.0.self_attn.q_proj.lora_B", 32, (3, 5), transposed=True),
    Segment("model.layers.11.mlp.down_proj.lora_B", 48, (17, 4), transposed=True),
]


def write_step(writer: MetricsWriter, step: int) -> None:
    writer.step(step, {"loss": 1 / step, "reward/mean": step / 7})
    writer.completions([CompletionSample(step, "p", f"line\u2028{step} é", "4", {"outcome": 1.0}, 0.5, 3, True, step - 1)])
    writer.alarm(Alarm(step, "entropy", "entropy", 0.1, 0.2, "below", step, "warn"))
    components = torch.arange(3 + 3 + 17) / step
    writer.gradient_norms(step, SEGMENTS, torch.arange(3.0) + step / 3, torch.tensor([math.nan, step, math.nan]), components)


def unbroken(folder: Path, steps: int) -> dict[str, object]:
    folder.mkdir()
    with MetricsWriter(folder) as writer:
        for step in range(1, steps + 1):
            write_step(writer, step)
    return contents(folder)


def contents(folder: Path) -> dict[str, object]:
    """The JSON files' bytes; the profile's rows as pyarrow's own dataset reader finds them."""
    return {name: (folder / name).read_bytes() for name in JSON_FILES} | {PROFILE: pq.read_table(folder / PROFILE).to_pylist()}


def strict(line: str) -> dict[str, object]:
    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_rows_are_strict_json_and_on_the_disk_at_once(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.step(1, {"loss": math.nan, "kl": math.inf, "grad_norm": -math.inf, "lr": 3e-4, "tokens": 7})
    writer.completions([CompletionSample(1, "<p>", "\n", "4", {"a": math.nan, "b": None, "c": 0.5}, math.nan, 1, False, 0)])
    assert strict((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1, "loss": None, "kl": None, "grad_norm": None, "lr": 3e-4, "tokens": 7,
    }  # fmt: skip
    assert strict((tmp_path / "completions.jsonl").read_text()) == {
        "step": 1, "prompt": "<p>", "completion": "\n", "gold": "4", "rewards": {"a": None, "b": None, "c": 0.5},
        "advantage": None, "num_tokens": 1, "finished": False, "adapter_version": 0,
    }  # fmt: skip


def test_an_accuracy_without_its_n_is_refused(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match="eval/num_problems"):
        writer.step(1, {"eval/accuracy": 0.5})


def test_gradient_profile_is_the_table_that_was_given(tmp_path: Path) -> None:
    norms = {step: torch.rand(3, dtype=torch.float64) for step in (1, 2, 3)}
    delta_w = {1: torch.tensor([math.nan, 2.5, math.nan]), 2: None, 3: torch.tensor([9.0, 0.0, 4.0])}
    components = {1: None, 2: torch.rand(3 + 3 + 17), 3: None}
    with MetricsWriter(tmp_path) as writer:
        for step, values in norms.items():
            writer.gradient_norms(step, SEGMENTS, values, delta_w[step], components[step])
            if step == 2:
                writer.flush()
    table = pq.read_table(tmp_path / PROFILE)
    assert [(field.name, str(field.type)) for field in table.schema] == [
        ("step", "int32"), ("module", "string"), ("layer", "int32"), ("projection", "string"),
        ("matrix", "string"), ("rank", "int32"), ("norm", "float"), ("delta_w_norm", "float"),
        ("component_norms", "list<element: float>"),
    ]  # fmt: skip
    rows = table.to_pylist()
    assert [row["step"] for row in rows] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [tuple(rows[i][key] for key in ("module", "layer", "projection", "matrix", "rank")) for i in range(3)] == [
        ("model.layers.0.self_attn.q_proj", 0, "q_proj", "A", 3),
        ("model.layers.0.self_attn.q_proj", 0, "q_proj", "B", 3),
        ("model.layers.11.mlp.down_proj", 11, "down_proj", "B", 17),
    ]
    expected = torch.cat([norms[step] for step in (1, 2, 3)]).float().numpy()
    np.testing.assert_array_equal(table["norm"].to_numpy(), expected)
    estimates = table["delta_w_norm"].to_pylist()
    assert estimates[0] is None and estimates[1] == 2.5 and math.isnan(estimates[2]), "null at A; NaN is a value"
    assert estimates[3:] == [None, None, None, None, 0.0, 4.0]
    assert components[2] is not None
    lists = [None] * 3 + [part.tolist() for part in components[2].split([3, 3, 17])] + [None] * 3
    assert table["component_norms"].to_pylist() == lists


def test_gradient_profile_refuses_what_is_no_adapter_matrix(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match=r"embed_tokens\.weight is no adapter matrix"):
        writer.gradient_norms(1, [Segment("model.embed_tokens.weight", 0, (3, 4), transposed=False)], torch.ones(1))


@pytest.mark.parametrize(("name", "layer"), [("model.layers.3.self_attn.q_proj", 3), ("lm_head", -1), ("h.10.mlp.2.w", 10)])
def test_layer_of(name: str, layer: int) -> None:
    assert layer_of(name) == layer


@pytest.mark.parametrize("resume_step", [1, 3, 5])
def test_resumed_files_equal_unbroken_ones(tmp_path: Path, resume_step: int) -> None:
    """Killed inside step 5 (a torn line, nothing closed), resumed from the checkpoint before `resume_step`, run to step 6."""
    expected = unbroken(tmp_path / "unbroken", 6)
    run = tmp_path / "killed"
    run.mkdir()
    writer = MetricsWriter(run)
    for step in range(1, 5):
        write_step(writer, step)
        writer.flush()
    write_step(writer, 5)  # not flushed: the profile's rows of step 5 are lost with the process
    for name in JSON_FILES:
        with (run / name).open("a") as file:
            file.write('{"step": 5, "lo')
    with MetricsWriter(run, resume_step=resume_step) as resumed:
        for step in range(resume_step, 7):
            write_step(resumed, step)
    assert str(contents(run)) == str(expected), "as text: NaN is the same as NaN"


def test_a_profile_is_cut_inside_a_part_and_written_on(tmp_path: Path) -> None:
    """A part holds the steps since the write before it; a resume may begin in the middle of one, and nothing is written twice."""
    expected = unbroken(tmp_path / "run", 5)
    (part,) = (tmp_path / "run" / PROFILE).iterdir()
    assert part.name == "step-000001.parquet"
    with MetricsWriter(tmp_path / "run", resume_step=4) as resumed:
        for step in (4, 5):
            write_step(resumed, step)
    assert str(contents(tmp_path / "run")) == str(expected)
    names = sorted(path.name for path in (tmp_path / "run" / PROFILE).iterdir())
    assert names == ["step-000001.parquet", "step-000004.parquet"]


def test_a_write_of_the_profile_leaves_earlier_parts_alone(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            write_step(writer, step)
            writer.flush()
            writer.flush()  # nothing new: no part
        parts = {path: path.stat().st_ino for path in (tmp_path / PROFILE).iterdir()}
        write_step(writer, 4)
    assert len(parts) == 3 and all(path.stat().st_ino == inode for path, inode in parts.items())


@pytest.mark.parametrize("name", FILES)
def test_a_new_run_overwrites_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(MetricsError, match=rf"{name} already exists"):
        MetricsWriter(tmp_path)
    assert (tmp_path / name).read_bytes() == b"precious"


@pytest.mark.parametrize("name", FILES)
def test_resume_names_a_missing_file(tmp_path: Path, name: str) -> None:
    unbroken(tmp_path / "run", 2)
    (tmp_path / "run" / name).rename(tmp_path / name)
    with pytest.raises(MetricsError, match=rf"{name} is missing"):
        MetricsWriter(tmp_path / "run", resume_step=2)


@pytest.mark.parametrize("damage", ["{not json}\n", '{"loss": 1}\n', "[1]\n", '{"step": null}\n'])
def test_resume_names_the_damaged_line_and_leaves_the_file(tmp_path: Path, damage: str) -> None:
    unbroken(tmp_path / "run", 2)
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + damage + lines[1])
    with pytest.raises(MetricsError, match=r"metrics\.jsonl, line 2"):
        MetricsWriter(tmp_path / "run", resume_step=3)
    assert path.read_text() == lines[0] + damage + lines[1]


def test_resume_names_a_damaged_gradient_profile(tmp_path: Path) -> None:
    unbroken(tmp_path / "run", 2)
    part = tmp_path / "run" / PROFILE / "step-000001.parquet"
    data = part.read_bytes()
    part.write_bytes(data[: len(data) // 2])
    with pytest.raises(MetricsError, match=r"gradient_profile\.parquet/step-000001\.parquet is not a readable Parquet file"):
        MetricsWriter(tmp_path / "run", resume_step=2)


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = MetricsWriter(tmp_path)
    writer.step(1, {"loss": 1.0})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DiskFullError, match=r"metrics\.jsonl"):
        writer.flush()


def test_tensorboard_holds_the_same_scalars_and_purges_on_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        for step in (1, 2, 3):
            writer.step(step, {"loss": step / 4})
    with MetricsWriter(tmp_path, tensorboard=True, resume_step=3) as writer:
        writer.step(3, {"loss": 9.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.25), (2, 0.5), (3, 9.0)]


SUMMARY = RunSummary(
    name="sums", seed=3, steps=40, accuracy_before=0.5, accuracy_before_interval=(0.4, 0.6), accuracy_after=0.75,
    accuracy_after_interval=(0.65, 0.82), accuracy_gain=0.25, accuracy_gain_interval=(0.1, 0.38), mcnemar_p=1e-4, learned=None,
    train_seconds=81.5, tokens=12345, peak_memory_bytes=2**31, trainable_parameters=99,
    rank_pattern={"a.q_proj": 3, "a.k_proj": 0},
    pass_at_k_before={1: (0.25, 0.2, 0.3)},
    pass_at_k_after={},
)  # fmt: skip


def test_summary_survives_the_disk(tmp_path: Path) -> None:
    SUMMARY.write(tmp_path)
    assert RunSummary.read(tmp_path) == SUMMARY
    assert strict((tmp_path / "summary.json").read_text())["accuracy_before_interval"] == [0.4, 0.6]


def test_summary_errors_are_named(tmp_path: Path) -> None:
    with pytest.raises(MetricsError, match=r"summary\.json is missing: the run has not finished"):
        RunSummary.read(tmp_path)
    SUMMARY.write(tmp_path)
    record = json.loads((tmp_path / "summary.json").read_text())
    for damaged, match in [
        ({**record, "surprise": 1}, "surprise"),
        ({key: value for key, value in record.items() if key != "tokens"}, "tokens"),
        ({**record, "rank_pattern": {"a": "b"}}, "rank_pattern"),
    ]:
        (tmp_path / "summary.json").write_text(json.dumps(damaged))
        with pytest.raises(MetricsError, match=rf"(?s)summary\.json is damaged.*{match}"):
            RunSummary.read(tmp_path)


def test_environment_names_torch_and_this_python(tmp_path: Path) -> None:
    write_environment(tmp_path)
    environment = strict((tmp_path / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__  # type: ignore[index]
    assert set(environment) == {"commit", "python", "platform", "cpu_count", "device", "packages"}
