"""The frozen base model: found, loaded, checked, hashed. With fastlora.lora the only user of transformers' models."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fastlora.attention import ATTENTION
from fastlora.config import ModelConfig
from fastlora.errors import FastloraError
from fastlora.nf4_linear import quantize_projections
from fastlora.packaged_model import PACKAGED_MODELS, packaged_model_folder

ARCHITECTURES = Path(__file__).with_name("architectures")
"""config.json of the published models that the shipped configs name."""


class ModelError(FastloraError):
    """A model that cannot be loaded or served; the message names it and the reason."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A causal LM, its tokenizer and what the rest of the code asks of them."""

    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    """Name as the config gives it; written into adapters."""
    device: torch.device
    context_length: int
    """Tokens."""
    eos_ids: tuple[int, ...]
    """Tokens that end a completion."""
    pad_id: int


def resolve_source(config: ModelConfig) -> str:
    """Folder or hub id to load from; converts a packaged model on first use."""
    return str(packaged_model_folder()) if config.name in PACKAGED_MODELS else config.name


def select_device(config: ModelConfig) -> torch.device:
    """The device that `model.device` means here. Raises ModelError when cuda is asked for and absent."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ModelError("model.device = 'cuda', but torch sees no GPU here; use 'cpu' or 'auto'")
    wanted = "cuda" if config.device == "auto" and torch.cuda.is_available() else config.device
    return torch.device("cpu" if wanted == "auto" else wanted)


def load_base_model(config: ModelConfig) -> BaseModel:
    """Weights, tokenizer and limits of the base model, in eval mode and frozen.

    Raises ModelError: not found, not a causal LM we serve, or weights that are not finite. QuantizationError: see nf4_linear.
    """
    source, device = resolve_source(config), select_device(config)
    dtype = getattr(torch, config.dtype)
    with _named(config.name):
        hf_config = AutoConfig.from_pretrained(source, revision=config.revision)
        refuse_unserved(hf_config, config.name)
        module, report = AutoModelForCausalLM.from_pretrained(
            source, revision=config.revision, dtype=dtype, attn_implementation=ATTENTION, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(source, revision=config.revision)
    if missing := sorted(report["missing_keys"]):  # transformers has filled them with random numbers
        raise ModelError(f"{config.name}: {len(missing)} weights are not in the files, the first is {missing[0]}; load them all again")
    module.to(device).eval().requires_grad_(False)
    _refuse_nonfinite(module, config.name)
    if config.quantization == "nf4":
        quantize_projections(module)
    return wrap_model(module, tokenizer, config.name)


def wrap_model(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str) -> BaseModel:
    """The record for a model that is already in memory; its attention is switched to the packed one."""
    refuse_unserved(module.config, source)
    module.set_attn_implementation(ATTENTION)
    eos_ids = _eos_ids(module, tokenizer)
    pad = tokenizer.pad_token_id
    return BaseModel(
        module=module,
        tokenizer=tokenizer,
        source=source,
        device=next(module.parameters()).device,
        context_length=int(module.config.get_text_config().max_position_embeddings),
        eos_ids=eos_ids,
        pad_id=eos_ids[0] if pad is None else int(pad),
    )


def meta_model(config: ModelConfig) -> PreTrainedModel:
    """The model without weights, for a dry run: its architecture as shipped with fastlora, or else its own config.json."""
    shipped = ARCHITECTURES / f"{config.name.rsplit('/', 1)[-1].lower()}.json"
    with _named(config.name):
        source = str(shipped) if shipped.is_file() else resolve_source(config)
        hf_config = AutoConfig.from_pretrained(source, revision=None if shipped.is_file() else config.revision)
        refuse_unserved(hf_config, config.name)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(hf_config, dtype=getattr(torch, config.dtype), attn_implementation=ATTENTION)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Turns transformers' many ways of not finding a model into one sentence."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"model {name!r} could not be loaded: {first}. Give a local folder, a hub id that is reachable or already "
            f"downloaded, or one of {', '.join(sorted(PACKAGED_MODELS))}"
        ) from error


def refuse_unserved(config: PretrainedConfig, name: str) -> None:
    """Raises ModelError for what the ops do not compute: experts, soft-capped or scaled logits, weights that come quantized."""
    text = config.get_text_config()
    for field in ("num_local_experts", "num_experts", "n_routed_experts"):
        if (getattr(text, field, None) or 0) > 1:
            raise ModelError(f"{name}: {field} = {getattr(text, field)}; mixtures of experts are not supported yet")
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{name} comes with quantized weights; load the original and set model.quantization = 'nf4'")
    for field, neutral in (("final_logit_softcapping", None), ("logit_scale", 1.0), ("logits_scaling", 1.0)):
        value = getattr(text, field, None)
        if value is not None and value != neutral:
            raise ModelError(f"{name}: {field} = {value}; the log-probability op does not apply it")


def _refuse_nonfinite(module: nn.Module, name: str) -> None:
    for parameter_name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter.sum())):
            raise ModelError(f"{name}: weight {parameter_name} holds NaN or Inf; the file is damaged or the dtype overflows")


def _eos_ids(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every eos of the generation config (Qwen has two), or the tokenizer's own."""
    ids = getattr(module.generation_config, "eos_token_id", None)
    ids = tokenizer.eos_token_id if ids is None else ids
    if ids is None:
        raise ModelError("neither the model's generation config nor its tokenizer has an eos token")
    return tuple(ids) if isinstance(ids, list | tuple) else (int(ids),)


def frozen_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight that belongs to the base model, whatever was attached to it."""
    for name, parameter in module.named_parameters():
        yield name.replace(".base.", "."), parameter


def weights_hash(module: nn.Module) -> str:
    """sha256 over the names, shapes and bits of the base weights: equal before and after training, or the base was not frozen."""
    digest = hashlib.sha256()
    for name, parameter in sorted(frozen_parameters(module)):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
