"""Checkpoints that are whole or absent: safetensors and JSON in a folder, checksummed, published by one rename.

    run_dir/checkpoints/step-000010/tensors.safetensors    every tensor
                                    state.json             everything else
                                    manifest.json          size and SHA-256 of both, step, config hash; carries its own SHA-256

A save writes into `.tmp-step-000010`, waits until every byte is on the disk, and renames. Whatever moment the run is killed at,
a folder named `step-*` is complete. Only after the new one is safe are older ones removed. One process writes a run's folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastlora import __version__
from fastlora.atomic import DISK_FULL_ERRORS, fsync_path, naming_disk_full, write_durably
from fastlora.config import RunConfig
from fastlora.errors import FastloraError

FORMAT = 1
"""Version of the layout above; a checkpoint with another one is refused."""

FOLDER, TENSORS, STATE, MANIFEST = "checkpoints", "tensors.safetensors", "state.json", "manifest.json"
TEMPORARY, REPLACED = ".tmp-", ".replaced-"

CONFIG_WITHOUT_EFFECT = {"name", "output_dir", "log"}
"""Sections that say where things are written, not what is computed; a run may be moved and still resumes."""


class CheckpointError(FastloraError):
    """No checkpoint can be loaded as asked; the message names the file, what is wrong with it, and what to do."""


class _DamageError(Exception):
    """One checkpoint is not what its manifest says; the message names the file and the fault."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint read back, after every checksum has been verified."""

    path: Path
    """Its folder."""
    step: int
    """The step it was saved after."""
    tensors: dict[str, Tensor]
    """On the CPU, to the bit what was saved."""
    state: dict[str, Any]
    """What was saved as JSON."""
    passed_over: tuple[str, ...]
    """One line for each newer checkpoint that was damaged (`allow_previous` only); the caller shows them."""


def hash_config(config: RunConfig) -> str:
    """SHA-256 of every setting that changes what is computed; a checkpoint resumes only under the config that made it."""
    settings = config.model_dump(mode="json", exclude=CONFIG_WITHOUT_EFFECT)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def save_checkpoint(
    run_dir: Path, *, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], config_hash: str, keep: int
) -> Path:
    """Write `checkpoints/step-<step>` and return its folder; then only the newest `keep` up to this step remain.

    Checkpoints of later steps are removed too: they are of a future that this run was resumed before. `state` must come back
    from JSON as it was (string keys, lists, finite numbers), else ValueError. Raises DiskFullError on a full disk; this and any
    other failure removes what was written and leaves the earlier checkpoints as they were.
    """
    if keep < 1:
        raise ValueError(f"keep = {keep}: at least the new checkpoint has to be kept")
    state_bytes = _exact_json(state)
    root = run_dir / FOLDER
    final, temporary = root / _folder_name(step), root / (TEMPORARY + _folder_name(step))
    try:
        with naming_disk_full(final, _what_is_intact(root)):
            root.mkdir(parents=True, exist_ok=True)
            fsync_path(run_dir)
            _clear_leftovers(root)
            temporary.mkdir()
            _write_files(temporary, step, tensors, state_bytes, config_hash)
            _publish(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _remove_all_but(root, step, keep)
    return final


def has_checkpoint(run_dir: Path) -> bool:
    """Whether a checkpoint was ever published in this run, damaged or not (a replacement that was interrupted included)."""
    _restore_replaced(run_dir / FOLDER)
    return bool(_folders(run_dir / FOLDER))


def load_checkpoint(run_dir: Path, *, config_hash: str, step: int | None = None, allow_previous: bool = False) -> Checkpoint:
    """The checkpoint of `step`, or the newest one, after verifying its sizes and checksums.

    A damaged one is an error; with `allow_previous` the newest intact one before it is returned instead, and says so in
    `passed_over`. Raises CheckpointError: none there, damaged (names the file, the fault and an intact earlier one), made by
    another config, or of another format.
    """
    root = run_dir / FOLDER
    _restore_replaced(root)
    candidates = [folder for folder in _folders(root) if step is None or _step_of(folder) <= step]
    if not candidates or (step is not None and _step_of(candidates[0]) != step):
        wanted = "" if step is None else f" of step {step}"
        found = ", ".join(folder.name for folder in _folders(root)) or "none"
        raise CheckpointError(f"{root}: no checkpoint{wanted}; found: {found}. Start a new run, or name one that exists")
    faults: list[str] = []
    for folder in candidates:
        try:
            manifest = _verified_manifest(folder)
        except _DamageError as damage:
            faults.append(str(damage))
            if not allow_previous:
                raise CheckpointError(f"{damage}. {_way_out(candidates[1:])}") from None
        else:
            return _read(folder, manifest, config_hash, tuple(faults))
    raise CheckpointError("; ".join(faults) + ". No checkpoint is intact: start the run again")


def rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State of the process's global generators: torch's (CPU and every GPU) as uint8 tensors, Python's and NumPy's as JSON."""
    tensors = {"rng.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"rng.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    version, words, next_gauss = random.getstate()
    twister: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - not ours: a user's reward function may draw from it
    numpy_state = twister | {"state": {"key": twister["state"]["key"].tolist(), "pos": twister["state"]["pos"]}}
    return tensors, {"python": [version, list(words), next_gauss], "numpy": numpy_state}


def restore_rng_state(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Put back what `rng_state` gave; `tensors` may hold others beside the `rng.*` ones.

    Raises CheckpointError when the checkpoint was made with another number of GPUs.
    """
    saved_gpus = sum(name.startswith("rng.cuda.") for name in tensors)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if saved_gpus != gpus:
        raise CheckpointError(f"the checkpoint was made with {saved_gpus} GPUs, here are {gpus}: resume where it was made")
    torch.set_rng_state(tensors["rng.torch"])
    for i in range(gpus):
        torch.cuda.set_rng_state(tensors[f"rng.cuda.{i}"], i)
    version, words, next_gauss = state["python"]
    random.setstate((version, tuple(words), next_gauss))
    np.random.set_state(state["numpy"])  # noqa: NPY002 - as in rng_state


def _write_files(folder: Path, step: int, tensors: Mapping[str, Tensor], state_bytes: bytes, config_hash: str) -> None:
    """The three files and the folder's list of names, all on the disk when this returns."""
    _save_tensors(folder / TENSORS, tensors)
    write_durably(folder / STATE, state_bytes)
    manifest = {
        "format": FORMAT,
        "fastlora_version": __version__,
        "step": step,
        "config_hash": config_hash,
        "files": {n: {"bytes": (folder / n).stat().st_size, "sha256": _sha256(folder / n)} for n in (TENSORS, STATE)},
    }
    write_durably(folder / MANIFEST, _sealed(manifest))
    fsync_path(folder)


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """`save_file`, durably. It streams (`save` to bytes takes twice the data in memory) but tells a full disk in words only."""
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        for code in DISK_FULL_ERRORS:
            if f"(os error {code})" in str(error):
                raise OSError(code, os.strerror(code)) from error
        raise
    fsync_path(path)


def _publish(temporary: Path, final: Path) -> None:
    """Give the finished folder its name. A checkpoint that has it already steps aside first: folders cannot be swapped
    atomically in portable Python, so a kill between the two renames is undone by `_restore_replaced`."""
    aside = final.with_name(REPLACED + final.name)
    if final.exists():
        os.rename(final, aside)
    os.rename(temporary, final)
    fsync_path(final.parent)
    if aside.exists():
        shutil.rmtree(aside)


def _restore_replaced(root: Path) -> None:
    """Finish or undo a replacement that was interrupted."""
    for aside in root.glob(f"{REPLACED}*"):
        final = root / aside.name.removeprefix(REPLACED)
        if final.exists():
            shutil.rmtree(aside)
        else:
            os.rename(aside, final)


def _clear_leftovers(root: Path) -> None:
    """What a killed run left half-written or half-removed."""
    _restore_replaced(root)
    for folder in root.glob(f"{TEMPORARY}*"):
        shutil.rmtree(folder)


def _remove_all_but(root: Path, step: int, keep: int) -> None:
    """Renamed before removal, so that a kill half-way leaves no folder that looks like a damaged checkpoint."""
    kept = [folder for folder in _folders(root) if _step_of(folder) <= step][:keep]
    for folder in _folders(root):
        if folder not in kept:
            doomed = folder.with_name(TEMPORARY + folder.name)
            os.rename(folder, doomed)
            shutil.rmtree(doomed)


def _folder_name(step: int) -> str:
    return f"step-{step:06d}"


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _folders(root: Path) -> list[Path]:
    """Published checkpoints, newest first."""
    found = [path for path in root.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=_step_of, reverse=True)


def _what_is_intact(root: Path) -> str:
    folders = _folders(root)
    return f"the last checkpoint, {folders[0].name}, is untouched" if folders else "there is no earlier checkpoint"


def _exact_json(state: Mapping[str, Any]) -> bytes:
    """JSON of `state`; ValueError when it would not come back as it is."""
    text = json.dumps(state, indent=1, allow_nan=False)
    if json.loads(text) != state:
        raise ValueError("state would come back changed from JSON: keys must be strings, and sequences lists")
    return text.encode()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sealed(manifest: dict[str, Any]) -> bytes:
    """The manifest's one spelling, its own SHA-256 included: any changed byte makes it differ from what this returns."""
    body = json.dumps(manifest, indent=1, sort_keys=True)
    seal = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps(manifest | {"manifest_sha256": seal}, indent=1, sort_keys=True).encode()


def _verified_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, after checking it and every file it lists; raises _DamageError at the first fault."""
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
        manifest = _parsed_manifest(path, data)
        if manifest["step"] != _step_of(folder):
            raise _DamageError(f"{path}: is of step {manifest['step']}; the folder was renamed")
        for name, expected in manifest["files"].items():
            path = folder / name
            size = path.stat().st_size
            if size != expected["bytes"]:
                raise _DamageError(f"{path}: damaged, {size} bytes instead of {expected['bytes']}")
            if _sha256(path) != expected["sha256"]:
                raise _DamageError(f"{path}: damaged, its SHA-256 is not the one in {MANIFEST}")
    except FileNotFoundError:
        raise _DamageError(f"{path}: missing") from None
    except OSError as error:
        raise _DamageError(f"{path}: cannot be read ({error.strerror})") from None
    return manifest


def _parsed_manifest(path: Path, data: bytes) -> dict[str, Any]:
    try:
        manifest = json.loads(data)
    except ValueError:  # not UTF-8, or not JSON
        raise _DamageError(f"{path}: damaged, not JSON any more") from None
    if not isinstance(manifest, dict) or _sealed({k: v for k, v in manifest.items() if k != "manifest_sha256"}) != data:
        raise _DamageError(f"{path}: damaged, it does not match its own SHA-256")
    return manifest


def _way_out(earlier: list[Path]) -> str:
    """What to do about a damaged checkpoint, after looking for an intact one among the earlier."""
    for folder in earlier:
        try:
            _verified_manifest(folder)
        except _DamageError:
            continue
        return f"{folder.name} is intact: add --resume-previous to continue from it"
    return "No earlier checkpoint is intact: start the run again"


def _read(folder: Path, manifest: dict[str, Any], config_hash: str, passed_over: tuple[str, ...]) -> Checkpoint:
    """The content of a verified checkpoint; refuses another format or config, which no earlier checkpoint would cure."""
    where = folder / MANIFEST
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{where}: format {manifest['format']}, written by fastlora {manifest['fastlora_version']}; this version "
            f"({__version__}) reads format {FORMAT}. Resume with the version that wrote it"
        )
    if manifest["config_hash"] != config_hash:
        raise CheckpointError(
            f"{where}: made by another config (hash {manifest['config_hash'][:12]}, this run's is {config_hash[:12]}). "
            "Resume with the config saved in the run's folder, or start a new run with the changed one"
        )
    return Checkpoint(
        path=folder,
        step=manifest["step"],
        tensors=load_file(folder / TENSORS),
        state=json.loads((folder / STATE).read_bytes()),
        passed_over=passed_over,
    )
