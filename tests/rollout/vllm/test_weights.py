"""New weights reach a real engine: full fine-tuning and merged copies give the trainer's log-probs, and no fault goes unseen.

Two engines, half a minute each: float32 with LoRA layers, a tied head and biases; bfloat16 without LoRA and with a head of its own. The
oracle is the Hugging Face model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastlora.lora.merged import merged_weights
from fastlora.lora.packed import PackedAdapter
from fastlora.model import frozen_parameters
from fastlora.rollout.vllm.client import EngineGoneError, VllmClient
from fastlora.rollout.vllm.weight_files import (
    DATA_FILE,
    INDEX_FILE,
    WeightFileError,
    WeightIndex,
    differing,
    part_checksums,
    read_weights,
    send_weights,
    write_weights,
)
from tests.lora.adapters import attach_uneven
from tests.rollout.vllm.engines import engine_process
from tests.tiny import make_tiny_model, make_tiny_tokenizer
from tests.tolerances import BF16_ROUNDED_ONCE, FP32_ONE_ROUNDING, SAMPLER_LOGP_FP32

SERVED = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
"""vLLM's attention on a CPU has no heads of 16."""

PROMPT = [1, *range(5, 53)]
"""49 tokens: one block of 32 in the prefix cache and a rest."""


def _model(family: str, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    """With a −0 in the table and in a packed matrix: no side may see a difference to +0."""
    model = make_tiny_model(family, seed=seed, dtype=dtype, **SERVED)
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 5] = -0.0
        model.model.layers[0].self_attn.q_proj.weight[3, 5] = -0.0
    return model


@dataclass
class Engine:
    """A running engine, and the models of its shape."""

    client: VllmClient
    folder: Path
    family: str
    dtype: torch.dtype

    def model(self, seed: int) -> PreTrainedModel:
        """Seed 0 is what the engine was started with."""
        return _model(self.family, seed, self.dtype)

    def update(self, tensors: Iterable[tuple[str, Tensor]], version: str, *, complete: bool) -> WeightIndex:
        """Writes and sends."""
        index = write_weights(self.folder, tensors, self.dtype, version=version, complete=complete)
        send_weights(self.client.call, self.folder, version)
        return index

    def held(self, part: int = 0, parts: int = 1) -> dict[str, int]:
        """Checksums of all tensors, or of a part of their columns."""
        return self.client.worker("fastlora_weight_checksums", None, part, parts)

    def version(self) -> str:
        """The stamp that vLLM shows."""
        return self.client.call("GET", "/weight_info").json()["weight_version"]

    def samples(self) -> tuple[list[int], list[float]]:
        """Eight sampled tokens after PROMPT and their log-probs."""
        body = {"model": "base", "prompt": PROMPT, "max_tokens": 8, "temperature": 1.0, "logprobs": 0, "seed": 0, "return_token_ids": True}
        [choice] = self.client.call("POST", "/v1/completions", body | {"ignore_eos": True}).json()["choices"]
        return choice["token_ids"], choice["logprobs"]["token_logprobs"]

    def gap(self, model: PreTrainedModel) -> float:
        """Largest |difference| of the samples' log-probs to those of a Hugging Face model."""
        tokens, logprobs = self.samples()
        with torch.no_grad():
            truth = model(torch.tensor([PROMPT + tokens])).logits[0].float().log_softmax(-1)
        rows = range(len(PROMPT) - 1, len(PROMPT) + len(tokens) - 1)
        return max(abs(logp - float(truth[row, token])) for row, token, logp in zip(rows, tokens, logprobs, strict=True))


WEIGHT_FLAGS = ("--worker-extension-cls", "tests.rollout.vllm.planting.PlantingWorker")
"""The last one counts."""


def _start(folder: Path, family: str, dtype: torch.dtype, max_lora_rank: int) -> Iterator[Engine]:
    _model(family, 0, dtype).save_pretrained(folder / "model")
    make_tiny_tokenizer().save_pretrained(folder / "model")
    name = str(dtype).removeprefix("torch.")
    memory = ["--kv-cache-memory-bytes", str(64 << 20), *WEIGHT_FLAGS]
    process = engine_process(folder / "model", folder / "log", dtype=name, max_lora_rank=max_lora_rank, memory=memory)
    try:
        yield Engine(process.start(), folder / "weights", family, dtype)
    finally:
        process.stop()


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """float32, LoRA layers, tied head, biases on q, k, v."""
    yield from _start(tmp_path_factory.mktemp("fp32"), "qwen2", torch.float32, max_lora_rank=8)


@pytest.fixture
def engine(started: Engine) -> Engine:
    """The engine with the weights it was started with."""
    started.update(frozen_parameters(started.model(0)), "step-0", complete=True)
    return started


def _move(adapter: PackedAdapter, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    adapter.flat.data.copy_(0.1 * torch.randn(len(adapter.flat.data), generator=generator))


def test_full_update_gives_the_log_probs_of_the_updated_model(engine: Engine) -> None:
    """Also from a prompt whose blocks of the old weights are in the prefix cache; and the answer to /weight_info is the new version."""
    old, new = engine.model(0), engine.model(1)
    assert engine.gap(old) <= SAMPLER_LOGP_FP32 < engine.gap(new)
    index = engine.update(frozen_parameters(new), "step-7", complete=True)
    assert engine.gap(new) <= SAMPLER_LOGP_FP32 < engine.gap(old)
    assert engine.version() == "step-7"
    held = engine.held()
    assert not differing(index.checksums, held) and held.keys() == index.checksums.keys()


def test_vllms_own_update_leaves_stale_blocks_in_the_prefix_cache(engine: Engine) -> None:
    """Why `send_weights` pauses: without it the same prompt is answered from keys and values of the old weights."""
    new = engine.model(1)
    engine.samples()
    write_weights(engine.folder, frozen_parameters(new), engine.dtype, version="step-1", complete=True)
    engine.client.call("POST", "/start_weight_update", {})
    engine.client.call("POST", "/update_weights", {"update_info": {"folder": str(engine.folder), "version": "step-1"}})
    engine.client.call("POST", "/finish_weight_update", {"weight_version": "step-1"})
    assert engine.gap(new) > SAMPLER_LOGP_FP32
    engine.client.call("POST", "/reset_prefix_cache")
    assert engine.gap(new) <= SAMPLER_LOGP_FP32


def test_merged_copy_is_the_trainers_model_with_its_adapter(engine: Engine) -> None:
    """Only groups with an adapter are sent; base and adapter of the trainer stay what they are."""
    model = engine.model(0)
    adapter = attach_uneven(model, cast_to_input=False)
    before = {name: parameter.clone() for name, parameter in frozen_parameters(model)}
    index = engine.update(merged_weights(adapter), "step-1", complete=False)
    assert engine.gap(model) <= SAMPLER_LOGP_FP32 < engine.gap(engine.model(0))
    held = engine.held()
    assert not differing(index.checksums, held) and index.checksums.keys() < held.keys()
    assert all(torch.equal(parameter, before[name]) for name, parameter in frozen_parameters(model))


def test_fifty_merges_leave_no_trace(engine: Engine) -> None:
    """Fifty copies of a moving adapter, then the adapter out: every tensor of the engine has the bits it started with."""
    model = engine.model(0)
    adapter, first = attach_uneven(model), engine.held()
    seen = []
    for step in range(50):
        _move(adapter, step)
        seen.append(engine.update(merged_weights(adapter), f"step-{step}", complete=False).checksums)
    assert len({tuple(checksums.values()) for checksums in seen}) == 50 and differing(first, engine.held())
    with adapter.disabled():
        engine.update(merged_weights(adapter), "step-50", complete=False)
    assert engine.held() == first and engine.gap(engine.model(0)) <= SAMPLER_LOGP_FP32
    adapter.flat.data.zero_()
    engine.update(merged_weights(adapter), "step-51", complete=False)
    assert engine.held() == first


def _rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    change(index)
    (folder / INDEX_FILE).write_text(json.dumps(index))


def _without(name: str) -> Callable[[dict[str, Any]], None]:
    def change(index: dict[str, Any]) -> None:
        index["tensors"] = [entry for entry in index["tensors"] if entry[0] != name]

    return change


def _swapped(one: str, other: str) -> Callable[[dict[str, Any]], None]:
    """Two tensors of one shape under each other's name: everything in the file agrees, and the wrong policy would sample."""

    def change(index: dict[str, Any]) -> None:
        for entry in index["tensors"]:
            entry[0] = {one: other, other: one}.get(entry[0], entry[0])

    return change


LAYER = "model.layers.1"


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (_without(f"{LAYER}.self_attn.o_proj.weight"), {f"{LAYER}.self_attn.o_proj.weight"}),
        (_without("model.norm.weight"), {"model.norm.weight"}),
        (_without(f"{LAYER}.self_attn.k_proj.bias"), {f"{LAYER}.self_attn.k_proj.bias"}),
        (
            _swapped(f"{LAYER}.mlp.gate_proj.weight", f"{LAYER}.mlp.up_proj.weight"),
            {f"{LAYER}.mlp.gate_proj.weight", f"{LAYER}.mlp.up_proj.weight"},
        ),
        (
            _swapped(f"{LAYER}.self_attn.k_proj.weight", f"{LAYER}.self_attn.v_proj.weight"),
            {f"{LAYER}.self_attn.k_proj.weight", f"{LAYER}.self_attn.v_proj.weight"},
        ),
    ],
    ids=["no o_proj", "no norm", "no bias", "gate and up swapped", "k and v swapped"],
)
def test_checksums_name_what_is_wrong(engine: Engine, change: Callable[[dict[str, Any]], None], wrong: set[str]) -> None:
    """A tensor that was left out, or two swapped on the way, in an update that the engine itself accepts."""
    index = write_weights(engine.folder, frozen_parameters(engine.model(1)), engine.dtype, version="step-1", complete=False)
    _rewrite(engine.folder, change)
    send_weights(engine.client.call, engine.folder, "step-1")
    assert set(differing(index.checksums, engine.held())) == wrong
    _rewrite(engine.folder, lambda current: current.update(tensors=[[t.name, t.shape, t.offset, t.checksum] for t in index.tensors]))
    assert all(set(differing(part_checksums(engine.folder, part, 5), engine.held(part, 5))) == wrong for part in range(5))


def test_checksums_see_an_old_version(engine: Engine) -> None:
    """The engine sampling from step 1 while the trainer is at step 2, one bit of one weight apart."""
    model = engine.model(1)
    engine.update(frozen_parameters(model), "step-1", complete=True)
    weight = model.get_parameter(f"{LAYER}.mlp.down_proj.weight")
    with torch.no_grad():
        weight.view(torch.int32)[3, 5] += 1
    now = write_weights(engine.folder, frozen_parameters(model), engine.dtype, version="step-2", complete=True)
    assert differing(now.checksums, engine.held()) == [f"{LAYER}.mlp.down_proj.weight"]
    seen = [differing(part_checksums(engine.folder, part, 7), engine.held(part, 7)) for part in range(7)]
    assert seen == [[f"{LAYER}.mlp.down_proj.weight"], *[[]] * 6]  # column 5 of 96 is in the first seventh


def test_checksums_see_a_head_that_was_left_behind(engine: Engine) -> None:
    """What vLLM's own reload of a tied model leaves on a CPU: the table is new and the packed head old."""
    first = engine.held()
    engine.client.worker("plant_other_head")
    assert differing(first, engine.held()) == ["model.embed_tokens.weight"]


def _cut(folder: Path) -> None:
    with (folder / DATA_FILE).open("r+b") as file:
        file.truncate(file.seek(0, 2) - 100)


def _flip(folder: Path) -> None:
    with (folder / DATA_FILE).open("r+b") as file:
        file.seek(4000)
        byte = file.read(1)[0]
        file.seek(4000)
        file.write(bytes([byte ^ 1]))


def _version(folder: Path) -> None:
    _rewrite(folder, lambda index: index.update(version="step-0"))


def _dtype(folder: Path) -> None:
    write_weights(folder, [("model.norm.weight", torch.ones(64))], torch.bfloat16, version="step-1", complete=False)


REFUSED: Mapping[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (_cut, "cut off at model.norm.weight"),
    "damaged": (_flip, "model.embed_tokens.weight in .* damaged"),
    "no index": (lambda folder: (folder / INDEX_FILE).unlink(), "no finished weights"),
    "no data": (lambda folder: (folder / DATA_FILE).unlink(), "cut off at model.embed_tokens.weight"),
    "old version": (_version, "holds version step-0, not step-1"),
    "incomplete": (lambda folder: _rewrite(folder, _without("model.norm.weight")), "lacks model.norm.weight"),
    "half of qkv": (
        lambda folder: _rewrite(folder, lambda index: (_without(f"{LAYER}.self_attn.k_proj.weight")(index), index.update(complete=False))),
        f"lacks {LAYER}.self_attn.k_proj.weight",
    ),
    "wrong dtype": (_dtype, "in torch.bfloat16, the engine runs in torch.float32"),
    "unknown name": (lambda folder: _rewrite(folder, _swapped("model.norm.weight", "model.norms.weight")), "model.norms.weight .*no such"),
}


@pytest.mark.parametrize("fault", list(REFUSED))
def test_bad_files_are_refused_by_name_and_change_nothing(engine: Engine, fault: str) -> None:
    """The engine says what is wrong, holds what it held, keeps running and takes the next update."""
    plant, message = REFUSED[fault]
    held = engine.held()
    write_weights(engine.folder, frozen_parameters(engine.model(1)), engine.dtype, version="step-1", complete=True)
    plant(engine.folder)
    with pytest.raises(WeightFileError, match=message):
        send_weights(engine.client.call, engine.folder, "step-1")
    assert engine.held() == held and engine.version() == "step-0" and engine.gap(engine.model(0)) <= SAMPLER_LOGP_FP32


@pytest.fixture(scope="module")
def bf16_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """bfloat16, no LoRA, a head of its own."""
    yield from _start(tmp_path_factory.mktemp("bf16"), "llama", torch.bfloat16, max_lora_rank=0)


def test_bfloat16(bf16_engine: Engine) -> None:
    """Checksums decide where log-probs cannot: full update, merged copy rounded once, and back to the bits of the base."""
    engine = bf16_engine
    first = engine.held()
    index = engine.update(frozen_parameters(engine.model(1).float()), "step-1", complete=True)
    assert not differing(index.checksums, engine.held()) and len(differing(first, engine.held())) == len(first)
    engine.update(frozen_parameters(engine.model(0)), "step-2", complete=True)
    assert engine.held() == first
    model = engine.model(0)
    adapter = attach_uneven(model, cast_to_input=False)
    merged = engine.update(merged_weights(adapter), "step-3", complete=False)
    assert not differing(merged.checksums, engine.held()) and differing(first, engine.held())
    with adapter.disabled():
        engine.update(merged_weights(adapter), "step-4", complete=False)
    assert engine.held() == first


def test_an_update_that_breaks_off_is_said_until_the_restart(bf16_engine: Engine) -> None:
    """Weights half replaced: every later update is refused. (Last test of this engine.)"""
    bf16_engine.client.worker("plant_failing_loader")
    for message in ("planted", "half replaced, restart it: version step-1: planted"):
        with pytest.raises(EngineGoneError, match=message):
            bf16_engine.update(frozen_parameters(bf16_engine.model(1)), "step-1", complete=True)
        bf16_engine.client.healthy()  # takes the connection that vLLM hangs up on after a status 500


def test_file_round_trip(tmp_path: Path) -> None:
    """Empty, single, odd and chunk-sized tensors, transposed ones, −0; a shorter second version in the same file."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(0,), (1,), (63, 17), (1000, 263), (513, 512)]
    tensors = {f"t{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}
    tensors["transposed"] = torch.randn(7, 11, generator=generator).t()
    tensors["zeros"] = torch.tensor([-0.0, 0.0, -1e-42])
    for dtype, names in ((torch.float32, list(tensors)), (torch.bfloat16, list(tensors)), (torch.float32, ["t2", "zeros"])):
        index = write_weights(tmp_path, [(name, tensors[name]) for name in names], dtype, version="a", complete=True)
        read, back = read_weights(tmp_path)
        assert read == index and list(back) == names and (tmp_path / DATA_FILE).stat().st_size == index.size
        for name in names:
            assert torch.equal(back[name], tensors[name].to(dtype)), name
        assert not torch.signbit(back["zeros"][:2]).any()


def test_merged_weights_round_once(tmp_path: Path) -> None:
    """Against W + s B A in float64: a bfloat16 neighbour of the sum, and W's own bits where the rank is 0."""
    model = make_tiny_model("llama", dtype=torch.bfloat16)
    adapter = attach_uneven(model)
    write_weights(tmp_path, merged_weights(adapter), torch.bfloat16, version="a", complete=False)
    merged = read_weights(tmp_path)[1]
    assert merged.keys() == {f"{name}.weight" for group in adapter.groups for name in group.names}
    for group in adapter.groups:
        for name, layer in zip(group.names, group.layers, strict=True):
            slot, w_nd, copy = adapter.slots.get(name), layer.weight, merged[f"{name}.weight"]
            if slot is None:
                assert torch.equal(copy, w_nd)
                continue
            truth = w_nd.double() + slot.scale * adapter.b_rn(name).double().t() @ adapter.a_rd(name).double()
            error = (copy.double() - truth).abs()
            assert not torch.equal(copy, w_nd) and bool((error <= BF16_ROUNDED_ONCE * truth.abs() + FP32_ONE_ROUNDING).all())
