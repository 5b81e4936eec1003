"""Checkpoints under every accident: damage of each file, kill -9 at any moment, a full disk, another config."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastlora import checkpoint as checkpoint_module
from fastlora.atomic import DiskFullError, atomic_write_text
from fastlora.checkpoint import (
    Checkpoint,
    CheckpointError,
    has_checkpoint,
    hash_config,
    load_checkpoint,
    restore_rng_state,
    rng_state,
    save_checkpoint,
)
from fastlora.config import RunConfig

FILES = ("tensors.safetensors", "state.json", "manifest.json")
CONFIG = "0123456789abcdef" * 4


def content(step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of every dtype a run saves, and a state; all tell their step."""
    tensors = {
        "data": torch.full((1000,), float(step)),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "mask": torch.tensor([True, False]),
        "rng": torch.arange(5, dtype=torch.uint8),
        "moments": torch.full((3, 5), 1 / 3, dtype=torch.bfloat16),
        "empty": torch.empty(0),
    }
    return tensors, {"step": step, "position": [step, 0.1 + step], "nested": {"name": "é\n", "none": None}}


def save(run_dir: Path, step: int, keep: int = 3) -> Path:
    tensors, state = content(step)
    return save_checkpoint(run_dir, step=step, tensors=tensors, state=state, config_hash=CONFIG, keep=keep)


def assert_is(loaded: Checkpoint, step: int) -> None:
    tensors, state = content(step)
    assert loaded.step == step and loaded.state == state and loaded.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        got = loaded.tensors[name]
        assert got.dtype == tensor.dtype and got.shape == tensor.shape
        assert got.flatten().view(torch.uint8).tolist() == tensor.flatten().view(torch.uint8).tolist(), name


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    for step in (5, 10):
        folder = save(tmp_path, step)
    assert folder == tmp_path / "checkpoints" / "step-000010"
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES), "safetensors and JSON, nothing else"
    assert_is(load_checkpoint(tmp_path, config_hash=CONFIG), 10)
    assert_is(load_checkpoint(tmp_path, config_hash=CONFIG, step=5), 5)
    assert load_checkpoint(tmp_path, config_hash=CONFIG, allow_previous=True).passed_over == ()


def test_manifest_can_be_checked_with_sha256sum(tmp_path: Path) -> None:
    """Oracle: the sha256sum command on the files."""
    folder = save(tmp_path, 7)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 7 and manifest["config_hash"] == CONFIG and manifest["fastlora_version"]
    for name, entry in manifest["files"].items():
        digest = subprocess.run(["sha256sum", folder / name], capture_output=True, text=True, check=True).stdout.split()[0]
        assert entry == {"bytes": os.path.getsize(folder / name), "sha256": digest}


def test_views_and_parameters_can_be_saved(tmp_path: Path) -> None:
    tensors = {"view": torch.arange(6.0).view(2, 3).t(), "leaf": torch.ones(2, requires_grad=True)}
    save_checkpoint(tmp_path, step=1, tensors=tensors, state={}, config_hash=CONFIG, keep=1)
    loaded = load_checkpoint(tmp_path, config_hash=CONFIG).tensors
    assert torch.equal(loaded["view"], tensors["view"]) and torch.equal(loaded["leaf"], torch.ones(2))


# ------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_found_and_named(tmp_path: Path, name: str) -> None:
    save(tmp_path, 5)
    file = save(tmp_path, 10) / name
    good = file.read_bytes()
    positions = random.Random(0)
    for position in [0, len(good) - 1, *(positions.randrange(len(good)) for _ in range(200))]:
        bad = bytearray(good)
        bad[position] ^= 1 << positions.randrange(8)
        file.write_bytes(bad)
        with pytest.raises(CheckpointError, match="step-000005 is intact: add --resume-previous") as caught:
            load_checkpoint(tmp_path, config_hash=CONFIG)
        assert f"step-000010/{name}: damaged" in str(caught.value)
    file.write_bytes(good)
    assert_is(load_checkpoint(tmp_path, config_hash=CONFIG), 10)


@pytest.mark.parametrize("name", FILES)
def test_any_truncation_is_found_and_named(tmp_path: Path, name: str) -> None:
    save(tmp_path, 5)
    file = save(tmp_path, 10) / name
    good = file.read_bytes()
    sizes = {0, 1, 7, 8, 9, len(good) // 2, len(good) - 1} | set(range(0, len(good), max(1, len(good) // 40)))
    for bad in [*(good[:size] for size in sizes), good + b"\0", good + good]:
        file.write_bytes(bad)
        with pytest.raises(CheckpointError, match=f"step-000010/{name}: damaged"):
            load_checkpoint(tmp_path, config_hash=CONFIG)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    save(tmp_path, 5)
    (save(tmp_path, 10) / name).unlink()
    with pytest.raises(CheckpointError, match=f"step-000010/{name}: missing. step-000005 is intact"):
        load_checkpoint(tmp_path, config_hash=CONFIG)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 10)
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()
    with pytest.raises(CheckpointError, match=r"manifest.json: cannot be read .* No earlier checkpoint is intact"):
        load_checkpoint(tmp_path, config_hash=CONFIG)


def test_files_of_two_checkpoints_mixed_are_damage(tmp_path: Path) -> None:
    """Each file is intact in itself; same size, other content."""
    old, new = save(tmp_path, 5), save(tmp_path, 10)
    shutil.copy(old / "tensors.safetensors", new / "tensors.safetensors")
    with pytest.raises(CheckpointError, match=r"step-000010/tensors.safetensors: damaged, its SHA-256"):
        load_checkpoint(tmp_path, config_hash=CONFIG)
    shutil.rmtree(new)
    old.rename(new)
    with pytest.raises(CheckpointError, match="is of step 5; the folder was renamed"):
        load_checkpoint(tmp_path, config_hash=CONFIG)


def test_the_one_before_is_used_only_when_asked_and_says_so(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        save(tmp_path, step)
    for step in (10, 15):
        os.truncate(tmp_path / "checkpoints" / f"step-{step:06d}" / "state.json", 3)
    with pytest.raises(CheckpointError, match=r"step-000015.*step-000005 is intact: add --resume-previous"):
        load_checkpoint(tmp_path, config_hash=CONFIG)
    loaded = load_checkpoint(tmp_path, config_hash=CONFIG, allow_previous=True)
    assert_is(loaded, 5)
    for fault, name in zip(loaded.passed_over, ("step-000015/state.json", "step-000010/state.json"), strict=True):
        assert name in fault
    with pytest.raises(CheckpointError, match=r"step-000010/state.json: damaged"):
        load_checkpoint(tmp_path, config_hash=CONFIG, step=10)

    os.truncate(tmp_path / "checkpoints" / "step-000005" / "tensors.safetensors", 0)
    with pytest.raises(CheckpointError, match="No checkpoint is intact: start the run again"):
        load_checkpoint(tmp_path, config_hash=CONFIG, allow_previous=True)


def test_nothing_to_load(tmp_path: Path) -> None:
    assert not has_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint; found: none"):
        load_checkpoint(tmp_path, config_hash=CONFIG)
    save(tmp_path, 5)
    with pytest.raises(CheckpointError, match="no checkpoint of step 7; found: step-000005"):
        load_checkpoint(tmp_path, config_hash=CONFIG, step=7)


def test_another_config_is_refused_even_when_earlier_ones_are_allowed(tmp_path: Path) -> None:
    save(tmp_path, 5)
    changed = hash_config(RunConfig())
    with pytest.raises(CheckpointError, match=f"manifest.json: made by another config .hash {CONFIG[:12]}.*{changed[:12]}"):
        load_checkpoint(tmp_path, config_hash=changed, allow_previous=True)


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 5)
    monkeypatch.setattr(checkpoint_module, "FORMAT", 2)
    with pytest.raises(CheckpointError, match=r"format 1, written by fastlora .* reads format 2"):
        load_checkpoint(tmp_path, config_hash=CONFIG)


def test_the_hash_sees_what_is_computed_and_not_where_it_is_written() -> None:
    base = RunConfig()
    same = RunConfig(name="x", output_dir=Path("elsewhere"))
    assert hash_config(base) == hash_config(same)
    assert hash_config(base) != hash_config(RunConfig(seed=1))
    assert hash_config(base) != hash_config(base.model_copy(update={"optim": base.optim.model_copy(update={"lr": 1e-3})}))


# ------------------------------------------------------------------------------------------------ saving


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    for step in range(1, 6):
        save(tmp_path, step, keep)
    assert names(tmp_path) == [f"step-{step:06d}" for step in range(6 - keep, 6)]


def test_keeping_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep = 0"):
        save(tmp_path, 1, keep=0)


def test_a_run_resumed_before_later_checkpoints_replaces_them(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        save(tmp_path, step)
    os.truncate(tmp_path / "checkpoints" / "step-000010" / "state.json", 3)
    save(tmp_path, 10, keep=2)
    assert names(tmp_path) == ["step-000005", "step-000010"]
    assert_is(load_checkpoint(tmp_path, config_hash=CONFIG), 10)


def test_leftovers_of_a_killed_run_are_cleared(tmp_path: Path) -> None:
    save(tmp_path, 5)
    root = tmp_path / "checkpoints"
    for leftover in (".tmp-step-000010", ".tmp-step-000001", ".replaced-step-000005"):
        (root / leftover).mkdir()
        (root / leftover / "tensors.safetensors").write_bytes(b"half")
    assert_is(load_checkpoint(tmp_path, config_hash=CONFIG), 5)
    save(tmp_path, 10)
    assert names(tmp_path) == ["step-000005", "step-000010"]


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    folder.rename(folder.with_name(".replaced-step-000005"))
    assert has_checkpoint(tmp_path)
    assert_is(load_checkpoint(tmp_path, config_hash=CONFIG), 5)
    assert names(tmp_path) == ["step-000005"]


@pytest.mark.parametrize("state", [{"a": float("nan")}, {1: "a"}, {"a": (1, 2)}, {"a": {1, 2}}, {"a": torch.ones(1)}])
def test_a_state_that_json_would_change_is_refused(tmp_path: Path, state: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        save_checkpoint(tmp_path, step=1, tensors={}, state=state, config_hash=CONFIG, keep=1)
    assert not (tmp_path / "checkpoints").exists()


def test_every_byte_is_on_the_disk_before_the_rename_and_the_rename_before_any_removal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut would show and a kill cannot: the order of fsync, rename and removal."""
    save(tmp_path, 5, keep=1)
    events: list[tuple[str, str]] = []
    fsync, rename, rmtree = os.fsync, os.rename, shutil.rmtree

    def logged_fsync(descriptor: int) -> None:
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def logged_rename(old: Path, new: Path) -> None:
        events.append(("rename", new.name))
        rename(old, new)

    def logged_rmtree(path: Path, **options: Any) -> None:
        events.append(("rmtree", path.name))
        rmtree(path, **options)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "rename", logged_rename)
    monkeypatch.setattr(shutil, "rmtree", logged_rmtree)
    save(tmp_path, 10, keep=1)
    assert events == [
        ("fsync", tmp_path.name),
        *(("fsync", name) for name in FILES),
        ("fsync", ".tmp-step-000010"),
        ("rename", "step-000010"),
        ("fsync", "checkpoints"),
        ("rename", ".tmp-step-000005"),
        ("rmtree", ".tmp-step-000005"),
    ]


def save_until_killed(run_dir: Path, first: int, reports: Path) -> None:
    """Every step is saved twice, so that kills meet replacements too; reports each step that is safely there."""
    with reports.open("w", buffering=1) as report:
        for half_step in range(2 * first, 10**9):
            save(run_dir, half_step // 2, keep=1)
            report.write(f"{half_step // 2}\n")


def test_kill_9_at_any_moment_leaves_the_old_or_the_new_checkpoint(tmp_path: Path) -> None:
    """Forty kills at random moments, only one checkpoint kept: what was reported as saved, or its successor, always loads."""
    processes = multiprocessing.get_context("forkserver")  # imports torch once; each run is a fork of that server
    processes.set_forkserver_preload([__name__])
    run_dir, reports = tmp_path / "run", tmp_path / "reports"
    run_dir.mkdir()
    delays, saved, interrupted = random.Random(1), 0, 0
    for _ in range(40):
        reports.unlink(missing_ok=True)
        run = processes.Process(target=save_until_killed, args=(run_dir, saved + 1, reports))
        run.start()
        while not (reports.exists() and reports.read_text()):
            assert run.is_alive(), "the run died by itself"
            time.sleep(0.001)
        time.sleep(delays.uniform(0.0, 0.02))
        run.kill()
        run.join()
        reported = int(reports.read_text().split()[-1])
        interrupted += any(name.startswith(".") for name in names(run_dir))
        loaded = load_checkpoint(run_dir, config_hash=CONFIG)
        assert loaded.step in (reported, reported + 1)
        assert_is(loaded, loaded.step)
        saved = loaded.step
    assert interrupted > 0, "no kill met a save: the test would pass with any implementation"
    save(run_dir, saved + 1, keep=1)
    assert names(run_dir) == [f"step-{saved + 1:06d}"]


# ------------------------------------------------------------------------------------------------ full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB; needs the right to mount one (root), else the test is skipped by name."""
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount_point], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small tmpfs here: {mounted.stderr.strip()}")
    yield mount_point
    subprocess.run(["umount", mount_point], check=True)


@pytest.mark.parametrize("large", ["tensors", "state"])
def test_a_full_disk_is_named_and_the_checkpoint_before_survives(small_disk: Path, large: str) -> None:
    save(small_disk, 5)
    tensors, state = content(10)
    if large == "tensors":
        tensors["large"] = torch.zeros(1 << 19)
    else:
        state["large"] = "x" * (1 << 21)
    with pytest.raises(DiskFullError, match=r"No space left on device.*step-000005, is untouched. Free space") as caught:
        save_checkpoint(small_disk, step=10, tensors=tensors, state=state, config_hash=CONFIG, keep=1)
    assert str(caught.value.filename).endswith("step-000010")
    assert names(small_disk) == ["step-000005"], "nothing half-written is left"
    assert_is(load_checkpoint(small_disk, config_hash=CONFIG), 5)
    save(small_disk, 10)
    assert_is(load_checkpoint(small_disk, config_hash=CONFIG), 10)


@pytest.mark.parametrize("failing_call", range(1, 7))
def test_any_failing_fsync_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_call: int) -> None:
    """The same without a mount, at each place: some file systems report a full disk (or quota) only when they flush.

    The six calls: run folder, three files, temporary folder, checkpoints folder. The last comes after the rename.
    """
    save(tmp_path, 5)
    calls, fsync = 0, os.fsync

    def failing_fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise OSError(122, "Disk quota exceeded")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing_fsync)
        with pytest.raises(DiskFullError, match="Disk quota exceeded while writing; the last checkpoint, step-000005"):
            save(tmp_path, 10, keep=1)
    assert names(tmp_path) == ["step-000005"] + ["step-000010"] * (failing_call == 6)
    assert_is(load_checkpoint(tmp_path, config_hash=CONFIG), 10 if failing_call == 6 else 5)


def test_atomic_write_keeps_the_old_file_on_a_full_disk(small_disk: Path) -> None:
    path = small_disk / "summary.json"
    atomic_write_text(path, "old é")
    with pytest.raises(DiskFullError, match="No space left on device while writing; what was there before is intact"):
        atomic_write_text(path, "x" * (1 << 21))
    assert path.read_text() == "old é" and [p.name for p in small_disk.iterdir()] == ["summary.json"]
    atomic_write_text(path, "new")
    assert path.read_text() == "new"


def test_atomic_write_replaces_the_file_and_never_writes_into_it(tmp_path: Path) -> None:
    """Whoever has the old file open keeps reading the old content: there is no moment at which it is half written."""
    path = tmp_path / "summary.json"
    path.write_text("old")
    (tmp_path / ".summary.json.tmp").write_text("left by a killed run")
    with path.open() as reader:
        atomic_write_text(path, "new")
        assert reader.read() == "old"
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_other_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        atomic_write_text(tmp_path / "no such folder" / "file", "x")


# ------------------------------------------------------------------------------------------------ random numbers


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    random.gauss(0, 1), np.random.standard_normal(), torch.randn(3)  # noqa: NPY002 - leaves half-used Gaussian pairs
    tensors, state = rng_state()
    save_checkpoint(tmp_path, step=1, tensors=tensors, state={"rng": state}, config_hash=CONFIG, keep=1)

    def draw() -> list[Any]:
        from_numpy = [np.random.standard_normal(), np.random.standard_normal()]  # noqa: NPY002 - the global one is the subject
        return [random.gauss(0, 1), random.random(), from_numpy, torch.randn(5).tolist()]

    expected = draw()
    loaded = load_checkpoint(tmp_path, config_hash=CONFIG)
    restore_rng_state(loaded.tensors, loaded.state["rng"])
    assert draw() == expected


def test_random_numbers_of_another_machine_are_refused() -> None:
    tensors, state = rng_state()
    with pytest.raises(CheckpointError, match=r"made with \d+ GPUs, here are"):
        restore_rng_state(tensors | {"rng.cuda.99": torch.zeros(16, dtype=torch.uint8)}, state)
