"""The base model: loaded from a folder, checked, hashed; what cannot be served is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, LlamaConfig, MixtralConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen3MoeConfig

from fastlora.attention import ATTENTION
from fastlora.config import ModelConfig
from fastlora.model import ModelError, load_base_model, meta_model, refuse_unserved, select_device, weights_hash, wrap_model
from tests.tiny import EOS_ID, TINY_FAMILIES, make_tiny_model, make_tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A saved tiny Llama with its tokenizer."""
    make_tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    return tmp_path


def _load(folder: Path, **settings: Any) -> Any:
    return load_base_model(ModelConfig(**{"name": str(folder), "dtype": "float32", "device": "cpu", **settings}))


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_local_folder(family: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """The same bits as what was saved, frozen, in eval mode, with the packed attention."""
    original = make_tiny_model(family)
    original.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    model = _load(tmp_path)
    ids = torch.arange(3, 13)[None]
    assert torch.equal(model.module(ids).logits, original(ids).logits)
    assert weights_hash(model.module) == weights_hash(original)
    assert not model.module.training and not any(p.requires_grad for p in model.module.parameters())
    assert model.module.config._attn_implementation == ATTENTION
    assert (model.source, model.device, model.context_length) == (str(tmp_path), torch.device("cpu"), 256)
    assert model.eos_ids == (EOS_ID,) and model.pad_id == EOS_ID


def test_dtype(folder: Path) -> None:
    model = _load(folder, dtype="bfloat16")
    assert {p.dtype for p in model.module.parameters()} == {torch.bfloat16}


def test_every_eos_of_the_generation_config_counts(tiny_llama: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Qwen has two; without a generation config the tokenizer's own is taken; without a pad token the first eos pads."""
    tiny_llama.generation_config = GenerationConfig(eos_token_id=[7, 9])
    assert wrap_model(tiny_llama, tiny_tokenizer, "x").eos_ids == (7, 9)
    tiny_llama.generation_config = GenerationConfig()
    assert wrap_model(tiny_llama, tiny_tokenizer, "x").eos_ids == (EOS_ID,)
    bare = make_tiny_tokenizer()
    bare.pad_token = None
    tiny_llama.generation_config = GenerationConfig(eos_token_id=[7, 9])
    assert wrap_model(tiny_llama, bare, "x").pad_id == 7
    bare.eos_token = None
    tiny_llama.generation_config = GenerationConfig()
    with pytest.raises(ModelError, match="neither the model's generation config nor its tokenizer has an eos token"):
        wrap_model(tiny_llama, bare, "x")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MixtralConfig(num_local_experts=4), r"m: num_local_experts = 4; mixtures of experts are not supported yet"),
        (Qwen3MoeConfig(num_experts=8), r"m: num_(local_)?experts = 8; mixtures of experts"),
        (LlamaConfig(final_logit_softcapping=30.0), r"final_logit_softcapping = 30.0; the log-probability op does not apply it"),
        (LlamaConfig(logit_scale=0.0625), "logit_scale = 0.0625"),
        (LlamaConfig(logits_scaling=8.0), "logits_scaling = 8.0"),
    ],
    ids=["mixtral", "qwen3-moe", "gemma's cap", "cohere's scale", "granite's scale"],
)
def test_architectures_that_are_not_served(config: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        refuse_unserved(config, "m")


def test_neutral_values_are_served() -> None:
    refuse_unserved(LlamaConfig(logit_scale=1.0, num_local_experts=1, final_logit_softcapping=None), "m")


def test_an_unserved_architecture_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    MixtralConfig(num_local_experts=4).save_pretrained(tmp_path)  # a config and nothing else
    with pytest.raises(ModelError, match="mixtures of experts"):
        _load(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(folder: Path, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"weight model.layers.1.mlp.up_proj.weight holds NaN or Inf; the file is damaged"):
        _load(folder)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "weights cut": lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-50]),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "config cut": lambda f: (f / "config.json").write_text("{"),
    "no config": lambda f: (f / "config.json").unlink(),
    "unknown architecture": lambda f: (f / "config.json").write_text('{"model_type": "no_such_model"}'),
    "no tokenizer": lambda f: [path.unlink() for path in f.glob("token*")],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders_are_named(folder: Path, damage: str) -> None:
    DAMAGE[damage](folder)
    with pytest.raises(ModelError, match=rf"model '{folder}' could not be loaded: .*Give a local folder"):
        _load(folder)


def test_weights_missing_from_the_file_are_not_made_up(folder: Path) -> None:
    """transformers would fill them with random numbers and a warning."""
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model.layers.0.self_attn.q_proj.weight"):
        _load(folder)


def test_an_unknown_name_is_refused_offline() -> None:
    with pytest.raises(ModelError, match=r"model 'no/such-model' could not be loaded"):
        load_base_model(ModelConfig(name="no/such-model"))


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=r"model.device = 'cuda', but torch sees no GPU here"):
        select_device(ModelConfig(device="cuda"))
    assert select_device(ModelConfig(device="auto")) == torch.device("cpu")


def test_the_meta_model_has_shapes_and_no_weights(folder: Path) -> None:
    module = meta_model(ModelConfig(name=str(folder)))
    assert {p.device.type for p in module.parameters()} == {"meta"}
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in make_tiny_model("llama").parameters())


def test_the_hash_covers_names_shapes_and_bits() -> None:
    hashes = {
        weights_hash(make_tiny_model("llama", seed=seed, dtype=dtype)) for seed in (0, 1) for dtype in (torch.float32, torch.bfloat16)
    }
    assert len(hashes) == 4 and weights_hash(make_tiny_model("llama")) in hashes
    assert weights_hash(make_tiny_model("llama")) == weights_hash(make_tiny_model("llama"))
