"""A base model in 4 bits: the format is QLoRA's, the adapter on it computes what PEFT computes on bitsandbytes' layers, and is small."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fastlora import nf4
from fastlora.config import LoraConfig, ModelConfig
from fastlora.model import ModelError, load_base_model, refuse_unserved
from fastlora.nf4 import BLOCK, QuantizationError, dequantize, quantize
from fastlora.nf4_linear import Nf4Linear, quantize_projections
from fastlora.ops.lora_linear import SPEC, lora_linear
from fastlora.ops.registry import use_implementation
from tests.ops.implementations import relative_error
from tests.parity.twins import make_twins
from tests.tiny import make_tiny_config, make_tiny_model
from tests.tolerances import SAME_IN_FLOAT32

bnb = pytest.importorskip("bitsandbytes", reason="4-bit weights need bitsandbytes")

NF4_CODE = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
"""Dettmers et al. 2023, appendix E."""


def test_format_is_the_paper_s() -> None:
    """Every weight becomes its block's absmax times the nearest of the 16 numbers; the first of a pair is the upper half of a byte."""
    weight_nd = torch.randn(6, 96, dtype=torch.float64)
    packed, absmax = quantize(weight_nd.float())
    assert packed.dtype == torch.uint8 and packed.shape == (6, 48) and absmax.shape == (6 * 96 // BLOCK,)
    blocks = weight_nd.view(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    code = torch.tensor(NF4_CODE, dtype=torch.float64)
    nearest = (blocks / largest).unsqueeze(-1).sub(code).abs().argmin(-1)
    assert relative_error(dequantize(packed, absmax, torch.float32), (code[nearest] * largest).view(6, 96)) < 1e-7
    halves = torch.stack([packed >> 4, packed & 15], dim=-1).view(6, 96)
    assert torch.equal(halves.long(), nearest.view(6, 96))


def bitsandbytes_layers(model: PreTrainedModel) -> PreTrainedModel:
    """The model with bitsandbytes' own layers, as transformers loads it with load_in_4bit; in train mode (see Nf4Linear)."""
    theirs = copy.deepcopy(model)
    for name, module in list(theirs.named_modules()):
        if type(module) is nn.Linear and module is not theirs.get_output_embeddings():
            layer = bnb.nn.Linear4bit(module.in_features, module.out_features, module.bias is not None, model.dtype, False, "nf4")
            layer.weight = bnb.nn.Params4bit(module.weight.data.clone(), requires_grad=False, compress_statistics=False, quant_type="nf4")
            layer.bias = module.bias
            theirs.set_submodule(name, layer.to("cpu"))
    return theirs.train()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(("implementation", "limit"), [("reference", 0.0), ("torch", SAME_IN_FLOAT32)])
def test_adapter_computes_what_peft_computes_on_bitsandbytes(family: str, implementation: str, limit: float) -> None:
    """Logits, dA and dB; bit for bit on the reference path."""
    model = make_tiny_model(
        family, intermediate_size=128
    )  # rows of whole blocks: bitsandbytes 0.50 misreads others on a CPU (fastlora/nf4.py)
    theirs = bitsandbytes_layers(model)
    quantize_projections(model)
    config = LoraConfig(r=4, target_modules=("q_proj", "v_proj", "down_proj"))
    twins = make_twins(model, config, for_peft=theirs)
    ids = torch.arange(3, 40).view(1, -1)
    with use_implementation(implementation):
        logits = twins.ours(ids).logits
        logits.sin().sum().backward()
    their_logits = twins.theirs(ids).logits
    their_logits.sin().sum().backward()
    for mine, peft_s in zip([logits, *twins.gradients()[0]], [their_logits, *twins.gradients()[1]], strict=True):
        assert peft_s.abs().max() > 0 and relative_error(mine, peft_s) <= limit


def make_problem(dtype: torch.dtype) -> tuple[list[Any], list[Any]]:
    """Arguments of lora_linear for three projections, ranks 3, 0 and 17: packed, and unpacked beforehand."""
    weights = [torch.randn(n, 64) for n in (40, 16, 33)]
    packed, absmaxes = (list(part) for part in zip(*(quantize(w) for w in weights), strict=True))
    unpacked = [dequantize(p, a, dtype) for p, a in zip(packed, absmaxes, strict=True)]
    x, a_rd, b_flat = torch.randn(7, 64), torch.randn(20, 64), torch.randn(3 * 40 + 17 * 33)
    leaves = [leaf.to(dtype).requires_grad_() for leaf in (x, a_rd, b_flat)]
    options = [[3, 0, 17], [2.0, 0.0, 0.5], None]
    return [leaves[0], packed, [None] * 3, *leaves[1:], *options, absmaxes], [leaves[0], unpacked, [None] * 3, *leaves[1:], *options]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_packed_weights_are_the_unpacked_ones(implementation: str, dtype: torch.dtype) -> None:
    """Outputs and gradients, bit for bit."""
    packed, unpacked = make_problem(dtype)
    results = []
    with use_implementation(implementation):
        for arguments in (packed, unpacked):
            outputs = lora_linear(*arguments)
            leaves = [arguments[0], *arguments[3:5]]
            results.append([*outputs, *torch.autograd.grad(sum(y.double().sin().sum() for y in outputs), leaves)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_op_check_with_packed_weights() -> None:
    x, weights, biases, a_rd, b_flat, ranks, scales, mask, absmaxes = make_problem(torch.float32)[0]
    torch.library.opcheck(SPEC.op, (x, weights, biases, a_rd, b_flat, mask, ranks, scales, absmaxes))


def test_graph_keeps_no_unpacked_weight() -> None:
    """Between the passes nothing of a weight's size in floats is alive; what autograd keeps of a layer are bytes."""
    model = make_tiny_model()
    quantize_projections(model)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        model.model.layers[1](torch.randn(1, 2, 64, requires_grad=True), position_embeddings=(torch.ones(1, 2, 16), torch.zeros(1, 2, 16)))
    matrices = [t for t in kept if t.ndim == 2 and t.shape[0] >= 32 and t.shape[1] >= 32]
    assert len(matrices) == 7 and {t.dtype for t in matrices} == {torch.uint8}


@pytest.fixture
def folder(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A saved tiny Llama with its tokenizer."""
    make_tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path) -> PreTrainedModel:
    return load_base_model(ModelConfig(name=str(folder), dtype="float32", device="cpu", quantization="nf4")).module


def test_every_projection_is_packed_and_nothing_else(folder: Path) -> None:
    model = load(folder)
    packed = [name for name, module in model.named_modules() if type(module) is Nf4Linear]
    assert len(packed) == 2 * 7 and type(model.lm_head) is nn.Linear
    assert {p.dtype for name, p in model.named_parameters() if not name.startswith("model.layers")} == {torch.float32}
    assert not any(p.requires_grad for p in model.parameters())
    dense = make_tiny_model("llama")
    weight, layer = dense.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj
    assert 0.02 < relative_error(dequantize(layer.weight, layer.absmax, torch.float32), weight) < 0.15


def test_a_row_that_cannot_be_packed_is_named() -> None:
    model = make_tiny_model("llama", intermediate_size=95)
    with pytest.raises(QuantizationError, match=r"model.layers.0.mlp.down_proj: a weight \[64, 95\] does not fill whole blocks of 64"):
        quantize_projections(model)


def test_without_bitsandbytes_the_setting_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nf4._load_bitsandbytes.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(QuantizationError, match=r"4-bit weights need bitsandbytes, .* `pip install bitsandbytes`, or model.quantization"):
        load(folder)
    nf4._load_bitsandbytes.cache_clear()


def test_weights_that_come_quantized_are_refused() -> None:
    config = make_tiny_config()
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(ModelError, match=r"x comes with quantized weights; load the original and set model.quantization = 'nf4'"):
        refuse_unserved(config, "x")
