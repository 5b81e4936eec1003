"""fuse_layers: what is given a fused forward, what is not, and that nothing changes but the speed, in fp64."""

from __future__ import annotations

from collections import Counter
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    GemmaConfig,
    GlmConfig,
    Olmo2Config,
    PreTrainedConfig,
    PreTrainedModel,
    SmolLM3Config,
    StableLmConfig,
)

from fastlora.attention import ATTENTION, PREPARED_MASK
from fastlora.fused_layers import fuse_layers, fuse_linears
from fastlora.ops.registry import implementation_counts
from fastlora.policy import score_packed, score_padded
from fastlora.types import TrainBatch
from tests.batches import make_batch, make_group_batch
from tests.exact import make_exact_model, score_one_by_one
from tests.tiny import TINY_FAMILIES, make_tiny_config, make_tiny_model
from tests.tolerances import FP32_LOGPROB, FP64_EXACT

MODELS: dict[str, tuple[str, dict[str, Any]]] = {family: (family, {}) for family in TINY_FAMILIES}
MODELS |= {
    "mistral, window 4": ("mistral", {"sliding_window": 4}),
    "qwen2, windows in some layers": ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
    "llama, GELU": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
}
BATCHES = {"lone": make_batch(), "groups": make_group_batch()}


def _model(case: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    family, overrides = MODELS[case]
    model = make_exact_model(family, **overrides) if dtype == torch.float64 else make_tiny_model(family, **overrides)
    model.set_attn_implementation(ATTENTION)
    return model


def _kinds(fused: Counter[str]) -> dict[str, int]:
    """By the end of the class name: RMSNorm, MLP, Attention."""
    return {kind: sum(n for name, n in fused.items() if name.endswith(kind)) for kind in ("RMSNorm", "MLP", "Attention")}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_everything_of_the_tiny_families_is_fused(family: str, dtype: torch.dtype) -> None:
    model = _model(family, dtype).to(dtype)
    layers = model.config.num_hidden_layers
    norms = layers * (4 if family == "qwen3" else 2) + 1
    assert _kinds(fuse_layers(model)) == {"RMSNorm": norms, "MLP": layers, "Attention": layers}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("case", MODELS)
def test_outputs_and_gradients_are_the_models_own(case: str, batch: TrainBatch) -> None:
    """Packed and padded, against one sequence at a time through the model as transformers runs it; gradient of the embedding."""
    plain, model = _model(case), _model(case)
    kinds = _kinds(fuse_layers(model))
    assert kinds["Attention"] == model.config.num_hidden_layers and bool(kinds["MLP"]) == ("GELU" not in case)
    weights = torch.randn(2, *batch.completion_ids_nt.shape, dtype=torch.float64)
    results = []
    for net, run in ((plain, score_one_by_one), (model, score_packed), (model, score_padded)):
        net.requires_grad_(False)
        head, leaf = net.get_output_embeddings(), net.get_input_embeddings().weight
        if head.weight is leaf:  # tied: the head's share of the gradient is not the layers' business
            head.weight = nn.Parameter(leaf.detach().clone(), requires_grad=False)
        leaf.requires_grad_(True)
        logp, entropy = run(net, batch, 0.7)
        results.append((logp.detach(), entropy.detach(), *torch.autograd.grad((weights[0] * logp + weights[1] * entropy).sum(), leaf)))
    for got in results[1:]:
        for ours, theirs in zip(got, results[0], strict=True):
            assert float((ours - theirs).abs().max()) <= FP64_EXACT * max(1.0, float(theirs.abs().max()))


def test_a_packed_call_runs_our_ops_and_a_padded_one_sdpa() -> None:
    model, batch = _model("qwen3"), make_group_batch()
    fuse_layers(model)
    with torch.no_grad():
        before = implementation_counts.copy()
        score_packed(model, batch, 1.0)
        packed = implementation_counts - before
        score_padded(model, batch, 1.0)
        padded = implementation_counts - before - packed
    count = lambda ran, op: sum(n for (name, _), n in ran.items() if name == op)  # noqa: E731
    assert (count(packed, "packed_attention"), count(packed, "rms_norm"), count(packed, "swiglu")) == (2, 9, 2)
    assert (count(padded, "packed_attention"), count(padded, "rms_norm"), count(padded, "swiglu")) == (0, 9, 2)


def _gain_from_one(self: Any, x: Tensor) -> Tensor:
    """Gemma's norm."""
    return F.rms_norm(x, self.weight.shape, 1 + self.weight, self.variance_epsilon)


def _centred(self: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x, self.weight.shape, self.weight, eps=self.variance_epsilon)


def _gelu(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))


def _gate_and_up_swapped(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(F.silu(self.up_proj(x)) * self.gate_proj(x))


PLANTED = {
    "1 + w": ("model.layers.1.input_layernorm", _gain_from_one),
    "mean taken off": ("model.norm", _centred),
    "GELU": ("model.layers.1.mlp", _gelu),
    "gate and up swapped": ("model.layers.0.mlp", _gate_and_up_swapped),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_module_that_computes_something_else_is_left_alone(planted: str) -> None:
    """One of its class; the others are fused."""
    whole = fuse_layers(_model("llama")).total()
    model, (path, forward) = _model("llama"), PLANTED[planted]
    module = model.get_submodule(path)
    module.forward = MethodType(forward, module)
    assert fuse_layers(model).total() == whole - 1
    assert module.forward.__func__ is forward


@pytest.mark.parametrize("planted", ["scaling", "rotation", "interleaved", "values", "window"])
def test_an_attention_that_computes_something_else_is_left_alone(monkeypatch: pytest.MonkeyPatch, planted: str) -> None:
    """Small weights: attention is almost uniform, and its output alone would tell nothing of scores. The bug is in one layer of two."""
    import transformers.models.llama.modeling_llama as llama

    model = make_tiny_model("llama", initializer_range=0.02)
    model.set_attn_implementation(ATTENTION)
    odd = model.model.layers[1].self_attn
    own = type(odd).forward

    def forward(self: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any) -> Any:
        cos, sin = position_embeddings
        with monkeypatch.context() as patch:
            if planted == "scaling":
                patch.setattr(self, "scaling", 1.1 * self.scaling)
            if planted == "values":
                patch.setattr(self, "v_proj", self.k_proj)
            if planted == "window":
                kwargs["sliding_window"] = 3
            if planted == "rotation":
                cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
            if planted == "interleaved":
                patch.setattr(llama, "rotate_half", lambda x: torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2))
                cos, sin = (table[..., : self.head_dim // 2].repeat_interleave(2, -1) for table in position_embeddings)
            return own(self, hidden_states, position_embeddings=(cos, sin), **kwargs)

    odd.forward = MethodType(forward, odd)
    assert _kinds(fuse_layers(model)) == {"RMSNorm": 5, "MLP": 2, "Attention": 1}
    assert odd.forward.__func__ is forward


OTHERS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any], dict[str, int]]] = {
    "Gemma: gain 1 + w, GELU": (GemmaConfig, {"hidden_act": "gelu_pytorch_tanh"}, {"RMSNorm": 0, "MLP": 0, "Attention": 4}),
    "GLM: half of each head is rotated, one matrix for gate and up": (GlmConfig, {}, {"RMSNorm": 9, "MLP": 0, "Attention": 0}),
    "Cohere: interleaved rotation, layer norm": (CohereConfig, {"logit_scale": 1.0}, {"RMSNorm": 0, "MLP": 4, "Attention": 0}),
    "OLMo 2: q and k normed over all heads": (Olmo2Config, {}, {"RMSNorm": 17, "MLP": 4, "Attention": 0}),
    "SmolLM3: every fourth layer without rotation": (SmolLM3Config, {}, {"RMSNorm": 9, "MLP": 4, "Attention": 3}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(name: str) -> None:
    """What of them our ops compute, and that a packed call of the fused model is the plain model's."""
    config_class, overrides, expected = OTHERS[name]
    shape = {**make_tiny_config("llama").to_diff_dict(), "num_hidden_layers": 4, **overrides}
    config = config_class(**{key: value for key, value in shape.items() if key not in ("model_type", "architectures", "rope_parameters")})
    model = AutoModelForCausalLM.from_config(config).eval()
    model.set_attn_implementation(ATTENTION)
    ids, positions = torch.arange(3, 43)[None], torch.arange(40)[None]
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        assert _kinds(fuse_layers(model)) == expected
        call = {"attention_mask": PREPARED_MASK, "use_cache": False, "cu_seqlens": (0, 40), "roots": (0,)}
        packed = model(ids, position_ids=positions, **call).logits
    assert float((packed - plain).abs().max()) < FP32_LOGPROB * float(plain.abs().max())


def test_a_model_that_keeps_the_layout_from_its_attention_is_seen() -> None:
    """StableLM's layers drop the arguments of a packed call: NaN, not tokens that see each other."""
    shape = {
        key: getattr(make_tiny_config("llama"), key) for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    }
    model = AutoModelForCausalLM.from_config(StableLmConfig(**shape, num_attention_heads=4, num_key_value_heads=4)).eval()
    model.set_attn_implementation(ATTENTION)
    with torch.no_grad():
        logits = model(torch.arange(3, 9)[None], attention_mask=PREPARED_MASK, use_cache=False, cu_seqlens=(0, 6), roots=(0,)).logits
    assert logits.isnan().any()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_trained_linears(family: str) -> None:
    """Full fine-tuning in fp64: the same output, the same gradient of every parameter, weights and biases."""
    plain, model, batch = _model(family), _model(family), make_group_batch()
    fuse_linears(model)
    results = []
    for net in (plain, model):
        logp, _ = score_packed(net, batch, 1.0)
        (logp * torch.linspace(-1, 1, logp.shape[1], dtype=torch.float64)).sum().backward()
        results.append([logp.detach(), *(p.grad for p in net.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert theirs.any() and float((ours - theirs).abs().max()) <= FP64_EXACT * max(1.0, float(theirs.abs().max()))


def test_trained_linears_leave_the_head_alone() -> None:
    model = _model("llama")
    fuse_linears(model)
    changed = {name for name, module in model.named_modules() if "forward" in vars(module) and type(module) is nn.Linear}
    assert changed == {name for name, module in model.named_modules() if type(module) is nn.Linear} - {"lm_head"}
