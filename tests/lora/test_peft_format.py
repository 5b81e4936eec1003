"""Adapters as files: round trips to the bit, and every file that is not a plain LoRA of this model refused by name.

That PEFT reads what we write, and we read what PEFT writes, is in tests/parity.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fastlora.build import load_into
from fastlora.config import LoraConfig
from fastlora.lora.groups import AttachError
from fastlora.lora.packed import PackedAdapter
from fastlora.lora.patterns import scale_of
from fastlora.lora.peft_format import AdapterFileError, _alpha_for, load_adapter, load_b_mask, save_adapter
from fastlora.lora.saved import attach_saved
from fastlora.model import wrap_model
from tests.lora.adapters import attach_uneven
from tests.tiny import make_tiny_model

IDS = torch.arange(3, 24).reshape(3, 7)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SCALINGS = ("alpha/r", "alpha/sqrt(r)", "constant")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved uneven adapter of the tiny Llama."""
    save_adapter(attach_uneven(make_tiny_model("llama")), tmp_path, base_model="tiny-llama", scaling="alpha/r")
    return tmp_path


def _same(adapter: PackedAdapter, other: PackedAdapter) -> bool:
    """The same modules, scales and bits, in whatever order."""
    return adapter.slots.keys() == other.slots.keys() and all(
        np.float32(slot.scale) == np.float32(other.slots[name].scale)  # what multiplies float32 tensors
        and torch.equal(adapter.a_rd(name), other.a_rd(name))
        and torch.equal(adapter.b_rn(name), other.b_rn(name))
        for name, slot in adapter.slots.items()
    )


@pytest.mark.parametrize("scaling", SCALINGS)
def test_round_trip(scaling: str, tmp_path: Path, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Matrices, ranks and scales to the bit; the loaded adapter on a fresh model gives the same bits of the logits."""
    lora = {"scaling": scaling, "lora_alpha": 0.7, "alpha_pattern": {"v_proj": 1 / 3}}
    family = tiny_model.config.model_type
    adapter = attach_uneven(tiny_model, lora=lora)
    save_adapter(adapter, tmp_path / "adapter", base_model="tiny", scaling=scaling)
    fresh = wrap_model(make_tiny_model(family), tiny_tokenizer, "tiny")
    loaded = attach_saved(fresh, tmp_path / "adapter")
    assert _same(adapter, loaded)
    assert torch.equal(fresh.module(IDS).logits, tiny_model(IDS).logits)
    assert load_adapter(tmp_path / "adapter").base_model == "tiny"


def test_saving_again_replaces_the_files(saved: Path) -> None:
    adapter = attach_uneven(make_tiny_model("llama"), noise=0.5)
    save_adapter(adapter, saved, base_model="tiny-llama", scaling="alpha/r")
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG, WEIGHTS]
    name = next(iter(adapter.slots))
    assert torch.equal(load_adapter(saved).b_nr[name], adapter.b_rn(name).t())


def test_patterns_are_anchored_and_escaped(saved: Path) -> None:
    """layers.1 must not reach a layers.11, and a dot only a dot: each key matches its own module among 20 layers."""
    config = json.loads((saved / CONFIG).read_text())
    for field in ("rank_pattern", "alpha_pattern"):
        assert len(config[field]) == len(config["target_modules"])
        for key in config[field]:
            others = [
                f"{prefix}model.layers.{i}.{tail}"
                for prefix in ("", "x.", "x")
                for i in range(20)
                for tail in ("self_attn.q_proj", "mlp.up_proj")
            ]
            others += [name.replace(".", "x") for name in config["target_modules"]]
            hits = [name for name in [*config["target_modules"], *others] if re.match(rf"(.*\.)?({key})$", name)]
            assert len(set(hits)) == 1


@given(alpha=st.floats(1e-3, 1e4), rank=st.integers(1, 1024), scaling=st.sampled_from(("alpha/r", "constant")))
def test_alpha_gives_the_very_bits_of_the_scale(alpha: float, rank: int, scaling: str) -> None:
    """PEFT divides what we wrote by r in double precision, and multiplies float32 tensors with the result."""
    scale = scale_of(alpha, rank, scaling)
    for s in (scale, float(np.float32(scale)) + float(np.spacing(np.float32(scale))) / 2):  # the second lies between two float32
        assert np.float32(_alpha_for(s, rank) / rank) == np.float32(s)
        assert abs(_alpha_for(s, rank) / rank - s) <= np.spacing(s)
    if scaling == "alpha/r":
        assert _alpha_for(scale, rank) / rank == scale


def _edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def _edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), f"no {CONFIG}; give the folder of a saved adapter"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"no {WEIGHTS}"),
    "config cut": (lambda f: (f / CONFIG).write_text((f / CONFIG).read_text()[:40]), f"{CONFIG} is damaged"),
    "config binary": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), f"{CONFIG} is damaged"),
    "config a list": (lambda f: (f / CONFIG).write_text("[]"), "a JSON object is needed, not list"),
    "config without r": (lambda f: (f / CONFIG).write_text("{}"), "has no r; it is not the config of a LoRA adapter"),
    "weights cut": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-7]), f"{WEIGHTS} is damaged"),
    "weights empty": (lambda f: (f / WEIGHTS).write_bytes(b""), f"{WEIGHTS} is damaged"),
    "DoRA": (lambda f: _edit(f, use_dora=True), "use_dora = True; only plain LoRA"),
    "DoRA's tensors": (
        lambda f: _edit_weights(f, lambda t: t.update({f"{Q0}.lora_magnitude_vector": torch.ones(64)})),
        "q_proj.lora_magnitude_vector is not a LoRA matrix of a linear layer",
    ),
    "embedding": (
        lambda f: _edit_weights(f, lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 2)})),
        "lora_embedding_A is not a LoRA matrix",
    ),
    "biases": (lambda f: _edit(f, bias="lora_only"), "bias = 'lora_only'"),
    "trained modules": (lambda f: _edit(f, modules_to_save=["lm_head"]), "modules_to_save = "),
    "IA3": (lambda f: _edit(f, peft_type="IA3"), "peft_type = 'IA3'"),
    "activated LoRA": (lambda f: _edit(f, alora_invocation_tokens=[1, 2]), "alora_invocation_tokens"),
    "PiSSA": (lambda f: _edit(f, init_lora_weights="pissa_niter_4"), "init_lora_weights = 'pissa_niter_4' changes the base weights"),
    "A without B": (lambda f: _edit_weights(f, lambda t: t.pop(f"{Q0}.lora_B.weight")), "q_proj has only one of lora_A and lora_B"),
    "ranks of A and B": (
        lambda f: _edit_weights(f, lambda t: t.update({f"{Q0}.lora_B.weight": torch.ones(64, 2)})),
        r"q_proj has A \(3, 64\), B \(64, 2\) and another rank",
    ),
    "rank of the config": (lambda f: _edit(f, rank_pattern={}, r=99), "and another rank in adapter_config.json"),
    "keys that disagree": (
        lambda f: _edit(f, alpha_pattern={"q_proj": 1.0, "layers.0.self_attn.q_proj": 2.0}),
        "alpha_pattern keys 'q_proj', 'layers.0.self_attn.q_proj' disagree about model.layers.0.self_attn.q_proj",
    ),
    "a key that is no pattern": (lambda f: _edit(f, rank_pattern={"(q_proj": 3}), "rank_pattern has a key that is no regular expression"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_refusals(damage: str, saved: Path) -> None:
    break_it, message = DAMAGE[damage]
    break_it(saved)
    with pytest.raises(AdapterFileError, match=message):
        load_adapter(saved)


def test_keys_that_agree_are_read_as_peft_reads_them(saved: Path) -> None:
    """The first layer's q_proj by two keys with one value; r and lora_alpha where no key matches; rsLoRA's root."""
    ranks = {name: spec.rank for name, spec in ((s.name, s) for s in load_adapter(saved).specs)}
    _edit(saved, alpha_pattern={"q_proj": 6.0, r"layers\.0\.self_attn\.q_proj": 6.0}, lora_alpha=5, use_rslora=True)
    specs = {spec.name: spec for spec in load_adapter(saved).specs}
    assert specs["model.layers.0.self_attn.q_proj"].scale == 6.0 / math.sqrt(3)
    assert all(spec.scale == 5.0 / math.sqrt(ranks[name]) for name, spec in specs.items() if "q_proj" not in name)


def test_an_adapter_for_another_model_is_refused(saved: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    narrow = wrap_model(make_tiny_model("llama", hidden_size=32), tiny_tokenizer, "narrow")
    message = r"is an adapter for tiny-llama, not for narrow: it adapts model.layers.0.mlp.gate_proj .* one of 32 in, 96 out"
    with pytest.raises(AttachError, match=message):
        attach_saved(narrow, saved)
    shallow = wrap_model(make_tiny_model("llama", num_hidden_layers=1), tiny_tokenizer, "shallow")
    with pytest.raises(AttachError, match=r"it adapts model.layers.1.*this model has no such layer"):
        attach_saved(shallow, saved)


def test_starting_from_a_saved_adapter(saved: Path) -> None:
    adapter, fresh = attach_uneven(make_tiny_model("llama")), attach_uneven(make_tiny_model("llama"), noise=0.0, seed=5)
    load_into(fresh, saved, LoraConfig())
    assert _same(adapter, fresh)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"r": 9}, r"o_proj: .* has rank 8 and s = 1.5, this run rank 9 and s = 1.33333; set lora.rank_pattern"),
        ({"lora_alpha": 13.0}, "this run rank"),
        ({"rank_pattern": {"k_proj": 0, "down_proj": 0}}, "has rank"),
        ({"target_modules": ("q_proj",), "rank_pattern": {"q_proj": 3}}, "exists only in the adapter file"),
    ],
    ids=str,
)
def test_starting_from_an_adapter_of_another_shape_is_refused(saved: Path, lora: dict[str, Any], message: str) -> None:
    adapter = attach_uneven(make_tiny_model("llama"), lora=lora)
    before = adapter.flat.data.clone()
    with pytest.raises(AttachError, match=message):
        load_into(adapter, saved, LoraConfig())
    assert torch.equal(adapter.flat.data, before)


def test_masks(tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    with pytest.raises(AttachError, match=r"lora.b_mask = .*: no such file"):
        load_b_mask(path)
    path.write_bytes(b"not a mask")
    with pytest.raises(AttachError, match="is damaged"):
        load_b_mask(path)
    save_file({"q_proj": torch.ones(4, 2)}, path)
    with pytest.raises(AttachError, match=r"q_proj is torch.float32, a mask is bool \[n, r\]"):
        load_b_mask(path)
    mask = torch.tensor([[True, False], [False, False]])
    save_file({"q_proj": mask}, path)
    assert torch.equal(load_b_mask(path)["q_proj"], mask)
