"""Adapters as PEFT files: `adapter_config.json` and `adapter_model.safetensors`, both ways, variable ranks included.

PEFT 0.21 matches pattern keys as regular expressions, lets the first match win, and re-sorts the keys when it saves, which changes
what overlapping keys mean. What is written here is anchored, escaped and one key a module, so that no order can change it;
what is read here is refused when two of its keys disagree about a module.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from fastlora.atomic import atomic_write_bytes, atomic_write_text
from fastlora.errors import FastloraError
from fastlora.lora.groups import AttachError
from fastlora.lora.packed import PackedAdapter
from fastlora.lora.patterns import ModuleSpec, scale_of

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."


class AdapterFileError(FastloraError):
    """An adapter folder that cannot be used; the message names the file, the reason and what to do."""


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An adapter read from disk."""

    base_model: str
    specs: tuple[ModuleSpec, ...]
    """One per adapted module; `scale` is what PEFT would compute."""
    a_rd: Mapping[str, Tensor]
    """Module -> A [r, d]."""
    b_nr: Mapping[str, Tensor]
    """Module -> B [n, r]."""


def save_adapter(adapter: PackedAdapter, folder: Path, *, base_model: str, scaling: str) -> None:
    """Writes the adapter so that PEFT's `PeftModel.from_pretrained(model, folder)` computes the same logits.

    scaling: `lora.scaling` of the run; alpha/sqrt(r) becomes use_rslora, everything else an alpha with alpha/r = s.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name in adapter.slots:
        tensors[f"{PREFIX}{name}.lora_A.weight"] = adapter.a_rd(name).cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = adapter.b_rn(name).t().cpu().contiguous()
    # Weights first: a folder with a config is complete.
    atomic_write_bytes(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
    atomic_write_text(folder / CONFIG_FILE, json.dumps(_peft_config(adapter, base_model, scaling), indent=2) + "\n")


def _peft_config(adapter: PackedAdapter, base_model: str, scaling: str) -> dict[str, Any]:
    rslora = scaling == "alpha/sqrt(r)"
    alphas = {slot.name: slot.alpha if rslora else _alpha_for(slot.scale, slot.rank) for slot in adapter.slots.values()}
    first = next(iter(adapter.slots.values()))
    return plain_lora_config(base_model, first.rank, alphas[first.name], list(adapter.slots)) | {
        "use_rslora": rslora,
        "rank_pattern": {anchored(slot.name): slot.rank for slot in adapter.slots.values()},
        "alpha_pattern": {anchored(name): alpha for name, alpha in alphas.items()},
    }


def plain_lora_config(base_model: str, r: int, lora_alpha: float, target_modules: Sequence[str]) -> dict[str, Any]:
    """PEFT's adapter_config.json of a LoRA without patterns."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_dropout": 0.0,
        "r": r,
        "lora_alpha": lora_alpha,
        "use_rslora": False,
        "target_modules": list(target_modules),
    }


def anchored(name: str) -> str:
    """A key that PEFT's `re.match(rf"(.*\\.)?({key})$", path)` lets match this path alone."""
    return "^" + re.escape(name)


def _alpha_for(scale: float, rank: int) -> float:
    """The alpha for which PEFT's alpha / r is s, or a neighbour of s with the same float32 bits where no double gives s itself
    (0.7 · 3 / 3); float32 is what multiplies the tensors. One of three fits: they lie on both sides of s.
    """
    alpha = scale * rank
    candidates = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return min(candidates, key=lambda a: (np.float32(a / rank) != np.float32(scale), abs(a / rank - scale)))


def load_adapter(folder: Path) -> AdapterFile:
    """Reads a LoRA adapter that fastlora or PEFT saved.

    Raises AdapterFileError: files missing or damaged, not a plain LoRA (DoRA, biases, trained modules), A without B, or patterns
    whose meaning depends on the order of their keys.
    """
    config, tensors = _read(folder)
    _refuse_unserved(config, folder)
    a_rd: dict[str, Tensor] = {}
    b_nr: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise AdapterFileError(f"{folder / WEIGHTS_FILE}: {key} is not a LoRA matrix of a linear layer; only plain LoRA is served")
        (a_rd if match[2] == "A" else b_nr)[match[1]] = tensor.float()
    if odd := sorted(a_rd.keys() ^ b_nr.keys()):
        raise AdapterFileError(f"{folder / WEIGHTS_FILE}: {odd[0]} has only one of lora_A and lora_B")
    specs = []
    for name, a in a_rd.items():
        rank = int(a.shape[0])
        if b_nr[name].shape[1] != rank or _lookup(config, "rank_pattern", config["r"], name, folder) != rank:
            shapes = f"A {tuple(a.shape)}, B {tuple(b_nr[name].shape)}"
            raise AdapterFileError(f"{folder}: {name} has {shapes} and another rank in {CONFIG_FILE}")
        alpha = float(_lookup(config, "alpha_pattern", config["lora_alpha"], name, folder))
        specs.append(ModuleSpec(name, rank, alpha, scale_of(alpha, rank, "alpha/sqrt(r)" if config.get("use_rslora") else "alpha/r")))
    return AdapterFile(str(config.get("base_model_name_or_path")), tuple(specs), a_rd, b_nr)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise AdapterFileError(f"{folder}: no {file}; give the folder of a saved adapter, such as runs/NAME/adapter")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
    except ValueError as error:  # not JSON, or not even text
        raise AdapterFileError(f"{folder / CONFIG_FILE} is damaged: {error}") from None
    if not isinstance(config, dict):
        raise AdapterFileError(f"{folder / CONFIG_FILE} is damaged: a JSON object is needed, not {type(config).__name__}")
    try:
        return config, load_file(folder / WEIGHTS_FILE)
    except SafetensorError as error:
        raise AdapterFileError(f"{folder / WEIGHTS_FILE} is damaged: {error}") from None


_PLAIN: Mapping[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    **dict.fromkeys(("use_dora", "fan_in_fan_out", "use_qalora", "lora_bias")),
    **dict.fromkeys(("modules_to_save", "layer_replication", "alora_invocation_tokens", "arrow_config", "use_bdlora", "kasa_config")),
}
"""Fields of PEFT 0.21's LoraConfig under which y is not W x + s B A x, and the value (or nothing at all) that keeps it so."""

_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Those of `init_lora_weights` that leave the base weights alone; PiSSA, OLoRA, CorDA, LoftQ subtract the initial B·A from them."""


def _refuse_unserved(config: Mapping[str, Any], folder: Path) -> None:
    for key in ("r", "lora_alpha"):
        if key not in config:
            raise AdapterFileError(f"{folder / CONFIG_FILE} has no {key}; it is not the config of a LoRA adapter")
    for key, needed in _PLAIN.items():
        if (config.get(key, needed) or None) != needed:
            raise AdapterFileError(f"{folder / CONFIG_FILE}: {key} = {config[key]!r}; only plain LoRA ({key} = {needed!r}) is served")
    if (start := config.get("init_lora_weights")) not in _INITIALISATIONS:
        raise AdapterFileError(
            f"{folder / CONFIG_FILE}: init_lora_weights = {start!r} changes the base weights; convert the adapter to plain LoRA with "
            "PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )


def _lookup(config: Mapping[str, Any], field: str, default: Any, name: str, folder: Path) -> Any:
    """PEFT's value for a module, refused when its keys disagree (PEFT would let their order decide)."""
    pattern = config.get(field) or {}
    try:
        hits = {key: pattern[key] for key in pattern if re.match(rf"(.*\.)?({key})$", name)}
    except re.error as error:
        raise AdapterFileError(f"{folder / CONFIG_FILE}: {field} has a key that is no regular expression: {error}") from None
    if len(set(hits.values())) > 1:
        raise AdapterFileError(f"{folder / CONFIG_FILE}: {field} keys {', '.join(map(repr, hits))} disagree about {name}")
    return next(iter(hits.values()), default)


def save_b_mask(path: Path, masks_nr: Mapping[str, Tensor], metadata: Mapping[str, str | int | float]) -> None:
    """Writes module -> bool [n, r] as the file that `lora.b_mask` names, with what it was made from and k, its number of entries.

    Raises AttachError for a mask that is not boolean.
    """
    for name, mask in masks_nr.items():
        _check_mask_dtype(path, name, mask)
    k = sum(int(mask.sum()) for mask in masks_nr.values())
    tensors = {name: mask.cpu().contiguous() for name, mask in masks_nr.items()}
    atomic_write_bytes(path, save(tensors, metadata={key: str(value) for key, value in metadata.items()} | {"k": str(k)}))


def load_b_mask(path: Path) -> dict[str, Tensor]:
    """Module -> bool [n, r] from a safetensors file.

    Raises AttachError when it is missing, damaged or not boolean, or has not the k entries that its metadata (if any) say.
    """
    if not path.is_file():
        raise AttachError(f"lora.b_mask = {str(path)!r}: no such file")
    try:
        masks = load_file(path)
    except SafetensorError as error:
        raise AttachError(f"lora.b_mask = {str(path)!r} is damaged: {error}") from None
    for name, mask in masks.items():
        _check_mask_dtype(path, name, mask)
    said, k = b_mask_metadata(path).get("k"), sum(int(mask.sum()) for mask in masks.values())
    if said is not None and said != str(k):
        raise AttachError(f"lora.b_mask = {str(path)!r} has {k} entries and its metadata say k = {said}; write it again")
    return masks


def _check_mask_dtype(path: Path, name: str, mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise AttachError(f"lora.b_mask = {str(path)!r}: {name} is {mask.dtype}, a mask is bool [n, r]")


def b_mask_metadata(path: Path) -> dict[str, str]:
    """What `save_b_mask` was given, and k; empty for a file that has none. The file must be a readable one."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def check_b_mask(path: Path, masks_nr: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], k: int | None = None) -> None:
    """Do these masks fit the adapter whose B matrices have these shapes (module -> (n, r)), and have they k entries?

    A module without a mask stays untrained, which fits. Raises AttachError that names every kind of misfit, with its first module.
    """
    strange = [name for name in masks_nr if name not in shapes]
    misshapen = [name for name, mask in masks_nr.items() if name in shapes and tuple(mask.shape) != tuple(shapes[name])]
    entries = sum(int(mask.sum()) for mask in masks_nr.values())
    faults = []
    if strange:
        faults.append(f"{len(strange)} modules have no adapter, the first is {strange[0]}")
    if misshapen:
        first = misshapen[0]
        faults.append(f"{len(misshapen)} have another shape, {first} {list(masks_nr[first].shape)} where B is {list(shapes[first])}")
    if k is not None and entries != k:
        faults.append(f"{entries} entries are chosen, {k} were asked for")
    if faults:
        raise AttachError(f"lora.b_mask = {str(path)!r} does not fit: {'; '.join(faults)}")
