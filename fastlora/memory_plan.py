"""What a run will need at its peak, counted before it starts.

Resident memory is measured where the plan is made; the rest is counted from the widths of the model, the ranks and the tokens of the
largest batch. w is the size of an activation in bytes, T the packed tokens of a micro-batch (prompts once, each completion without its last
token), C its scored tokens; a layer has width d, H query heads and K key heads of width e, an MLP of width m:

    activations   w T (x of the two norms 2 d; q, k, v and the attention's output 2 H e + 2 K e; gate and up 2 m;
                       inputs of the adapted groups 2 d + m, unless A is frozen; x Aᵀ of all modules Σ r) + 4 T (2 + H) for rstd
                       and log-sum-exp; of the layers from the lowest adapted one on: nothing below it is kept
    adapter       its copy in the dtype of the activations, kept for the backward pass
    weights       4.5 bits each with model.quantization = "nf4" (fastlora/nf4.py), embedding and head apart
    head          two rows [C, d], and one tile of logits twice: losses.one_pass and what oneDNN repacks for it
    sampling      a copy of the adapted weights (lora.groups.frozen_adapters), keys and values of every prompt once and of
                  every completion at full length (kv_cache.GroupCache), the widest rows of the prefill, the logits

These are the tensors that autograd keeps on the fast path. The padded layout of `implementation = "reference"` is not planned.
"""

from __future__ import annotations

import os
import resource
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from fastlora.allocator import GEMM_CACHE_ENTRIES
from fastlora.build import Parts
from fastlora.config import RunConfig
from fastlora.data import batch_indices
from fastlora.lora.groups import input_groups, projections, shapes
from fastlora.lora.patterns import resolve
from fastlora.lora.peft_format import load_b_mask
from fastlora.losses.one_pass import tile_elements
from fastlora.metrics import layer_of
from fastlora.model import meta_model, select_device
from fastlora.nf4 import BYTES_PER_WEIGHT
from fastlora.packaged_model import PACKAGED_MODELS
from fastlora.prompt import encode
from fastlora.rollout.sampler import SamplerError
from fastlora.rollout.vllm.memory import EngineLoad, EngineMemory, engine_card, engine_memory, run_load
from fastlora.rollout.vllm.servers import max_lora_rank
from fastlora.rollout.vllm.shared import shared_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDTH = {"float32": 4, "bfloat16": 2}
"""Bytes."""
FILE_WIDTH = {True: 4, False: 2}
"""Bytes of a weight in the files: the packaged model's are float32, those on the hub bfloat16 as a rule. The files are mapped while
they are converted; without a conversion they stay mapped and are the weights."""
GEMM_BYTES = 400_000
"""Of one compiled GEMM, measured: 20 MB for the 25 shapes that a new number of packed tokens brings, in two caches."""
_GEMM_CACHES = ("compiled GEMMs in the caches of torch and oneDNN", 2 * GEMM_CACHE_ENTRIES * GEMM_BYTES)
LOADED_LATER = 100 * 2**20
"""Tokenizer, modelling code and data, which a dry run does not load: 80 to 110 MiB with SmolLM2 and 64 to 2,048 problems."""


@dataclass(frozen=True, slots=True)
class LargestBatch:
    """Tokens of the largest call of each kind in a run."""

    packed: int
    """T, model tokens of one micro-batch."""
    scored: int
    """C, completion tokens of one micro-batch."""
    decoded: tuple[tuple[int, int], ...]
    """(prompt tokens, completions) of the largest batch that is decoded together: in training, in evaluation, for pass@k. () with vLLM."""


def longest_possible(config: RunConfig) -> LargestBatch:
    """Every prompt at `data.max_prompt_length`, every completion at `rollout.max_completion_length`: before the data are there."""
    prompts = [config.data.max_prompt_length] * config.rollout.num_prompts
    held_out = [config.data.max_prompt_length] * config.eval.num_problems
    completions = [config.rollout.max_completion_length] * len(prompts) if config.objective == "sft" else None
    return _largest(config, [(prompts, completions)], held_out)


def largest_batch(
    config: RunConfig, prompt_lengths: Sequence[int], completion_lengths: Sequence[int] | None, eval_prompt_lengths: Sequence[int]
) -> LargestBatch:
    """The largest batches of the steps that this run will take, which follow from its seed.

    prompt_lengths: tokens of every training prompt. completion_lengths: of every training completion with its eos (SFT), or None: all as
    long as they can get. eval_prompt_lengths: of the held-out prompts.
    """
    steps = []
    for step in range(config.trainer.steps):
        rows = batch_indices(step, config.rollout.num_prompts, len(prompt_lengths), config.seed)
        completions = None if completion_lengths is None else [completion_lengths[row] for row in rows]
        steps.append(([prompt_lengths[row] for row in rows], completions))
    return _largest(config, steps, eval_prompt_lengths)


def _largest(config: RunConfig, steps: Sequence[tuple[list[int], list[int] | None]], held_out: Sequence[int]) -> LargestBatch:
    r, e = config.rollout, config.eval
    group = 1 if config.objective == "sft" else r.num_generations
    packed = [
        micro_batch
        for prompts, completions in steps
        for micro_batch in _micro_batches(
            prompts, completions or [r.max_completion_length] * len(prompts) * group, config.steps_per_generation
        )
    ]
    decoded = [_decoded(held_out, 1, r.batch_size)]
    if e.pass_at_k:
        decoded.append(_decoded(held_out, e.num_samples, r.batch_size))
    if config.objective == "grpo" and r.sampler == "torch":
        decoded += [_decoded(prompts, group, r.batch_size) for prompts, _ in steps]
    if r.sampler == "vllm":  # it evaluates too
        decoded = []
    return LargestBatch(*max(packed), tuple(sorted(set(decoded))))


def _micro_batches(prompts: Sequence[int], completions: Sequence[int], parts: int) -> Iterator[tuple[int, int]]:
    """(T, C) of each of `parts` micro-batches: as `packing.pack` will find them."""
    group, samples = len(completions) // len(prompts), len(completions) // parts
    for first in range(0, len(completions), samples):
        own = range(first, first + samples)
        scored = sum(completions[n] for n in own)
        yield sum(prompts[p] for p in {n // group for n in own}) + scored - samples, scored


def _decoded(prompts: Sequence[int], group: int, batch_size: int) -> tuple[int, int]:
    """(prompt tokens, completions) of the largest batch that TorchSampler decodes at once."""
    together = max(1, batch_size // group)
    blocks = [prompts[first : first + together] for first in range(0, len(prompts), together)]
    return max(((sum(block), len(block) * group) for block in blocks), default=(0, 0))


@dataclass(frozen=True, slots=True)
class _Group:
    """Projections that share an input, at least one of them adapted."""

    in_features: int
    out_features: int
    """Of all members together."""
    rank: int
    """Likewise."""
    b_entries: int
    """Σ r n: B without the zeros between its blocks."""
    reads_attention: bool
    """Its input is the attention's output, which is kept in any case."""
    layer: int


@dataclass(frozen=True, slots=True)
class _Widths:
    """d, H e, K e, m, H, v and the number of layers; see the head of this file."""

    layers: int
    d: int
    query: int
    key: int
    mlp: int
    heads: int
    vocabulary: int
    norms_of_q_and_k: bool


def _widths(model: PreTrainedModel) -> _Widths:
    text = model.config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    key_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return _Widths(
        text.num_hidden_layers,
        text.hidden_size,
        head * text.num_attention_heads,
        head * key_heads,
        text.intermediate_size,
        text.num_attention_heads,
        text.vocab_size,
        any(name.endswith("q_norm") for name, _ in model.named_modules()),
    )


Shares = tuple[tuple[str, int], ...]
"""What holds memory, and how many bytes."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """A run's memory by phase."""

    resident: Shares
    sampling: Shares
    update: Shares
    loading: int
    """Of the process while the weights are read, all in all."""
    engine: EngineMemory | None = None
    """vLLM's, in processes of its own; None = none of ours."""

    @property
    def peak(self) -> int:
        """Bytes of this process. Sampling and update alternate, and each uses what the other has freed."""
        return max(self.loading, self.while_sampling, self.while_updating)

    @property
    def while_sampling(self) -> int:
        return _total(self.resident) + _total(self.sampling)

    @property
    def while_updating(self) -> int:
        return _total(self.resident) + _total(self.update)

    @property
    def peak_with_engine(self) -> int:
        """Bytes of the trainer's device: what the engine holds there included."""
        if self.engine is None or not self.engine.beside:
            return self.peak
        return max(self.peak, self.while_sampling + self.engine.total, self.while_updating + self.engine.at_rest)


def plan_memory(config: RunConfig, model: PreTrainedModel, batch: LargestBatch, measured: int | None = None) -> MemoryPlan:
    """The plan of a run.

    model: without an adapter; its weights may be on the meta device. measured: bytes held once weights, data, adapter and optimizer are
    there (`resident_bytes`); None before that: they are counted, on top of what the process holds now. Raises PatternError as a run would.
    """
    w, base = WIDTH[config.model.dtype], sum(parameter.numel() for parameter in model.parameters())
    widths = _widths(model)
    groups = _groups(config, model) if config.method == "lora" else ()
    trained = sum(g.rank * g.in_features + g.b_entries for g in groups) if config.method == "lora" else base
    loading = 0
    if measured is not None:
        resident = [("held now: libraries, weights, data, trained parameters, moments", measured)]
    else:
        libraries = resident_bytes(torch.device("cpu")) + LOADED_LATER
        resident = [
            ("interpreter, libraries, data", libraries),
            ("trained parameters, gradient, moments", _trained_bytes(config, trained, sum(g.b_entries for g in groups))),
        ]
        if config.method == "lora":
            resident.append(("base weights", _base_bytes(config, model)))
        elif config.loss.beta > 0:
            resident.append(("weights of the reference policy", _base_bytes(config, model)))
        file_width = FILE_WIDTH[config.model.name in PACKAGED_MODELS]
        loading = libraries + base * (w + (file_width if file_width != w else 0))
    on_cpu = select_device(config.model).type == "cpu"
    if on_cpu:
        resident.append(_GEMM_CACHES)
    laid_out = groups if on_cpu and config.model.quantization == "none" else ()
    sampling = [_sampling(widths, laid_out, w, *decoded, config.rollout.max_completion_length) for decoded in batch.decoded]
    update = _update(config, widths, groups, trained, batch)
    return MemoryPlan(tuple(resident), max(sampling, key=_total, default=()), update, loading, plan_engine(config, model))


def plan_engine(config: RunConfig, model: PreTrainedModel) -> EngineMemory | None:
    """vLLM's engine, if this run starts one. Raises SamplerError: a card that is not there, a rank or a share that cannot work."""
    if config.rollout.sampler != "vllm" or config.vllm.servers or shared_folder(config) is not None:
        return None
    card = engine_card(config, select_device(config.model))
    load = plan_load(config, model, on_cpu=card is None)
    return engine_memory(config, model.config, load, None if card is None else machine_bytes(card))


def plan_load(config: RunConfig, model: PreTrainedModel, *, on_cpu: bool) -> EngineLoad:
    """What this run asks of an engine, at the largest rank that it may come to. model: on the meta device will do."""
    ranks = [spec.rank for spec in resolve(shapes(projections(model)), config.lora)] if config.method == "lora" else []
    largest = max([*ranks, config.reallocation.r_max] if config.reallocation.every else ranks, default=1)
    return run_load(config, model.config, max_lora_rank(largest) if ranks else 0, on_cpu=on_cpu)


def announce_engine(config: RunConfig, console: Console) -> None:
    """Prints, before anything is loaded, what an engine of our own takes and how it shares a device with the trainer.

    Raises SamplerError when a GPU is too small for it; a computer that is too small is warned of, as in `announce_peak`.
    """
    model, own = meta_model(config.model), select_device(config.model)
    if (engine := plan_engine(config, model)) is None:
        return
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in engine.parts)
    console.print(f"vLLM's engine: {_gib(engine.total)} GiB: {parts}", highlight=False, soft_wrap=True)
    needed = engine.total
    if engine.beside and config.trainer.implementation != "reference":
        plan = plan_memory(config, model, longest_possible(config))
        needed = plan.peak_with_engine
        sampling, updating = plan.while_sampling + engine.total, plan.while_updating + engine.at_rest
        rest = f"the engine sleeps and keeps {_gib(engine.at_rest)}" if engine.at_rest < engine.total else "the engine keeps all"
        console.print(
            f"with the trainer: {_gib(sampling)} GiB while it samples, {_gib(updating)} while the trainer updates ({rest})",
            highlight=False,
            soft_wrap=True,
        )
    card = engine_card(config, own)
    if needed <= (there := machine_bytes(card or own)):
        return
    message = (
        f"vLLM's engine{' and the trainer need' if engine.beside else ' needs'} {_gib(needed)} GiB, and {card or 'this computer'} has "
        f"{_gib(there)}. Lower rollout.batch_size or vllm.kv_cache_gib (the engine's cache)"
        + (", or use trainer.gradient_checkpointing" if engine.beside else "")
        + (", or give the engine another GPU: vllm.device" if card is not None else "")
    )
    if card is not None:
        raise SamplerError(message)
    console.print(f"[bold yellow]{message}", highlight=False, soft_wrap=True)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def announce_peak(config: RunConfig, parts: Parts, console: Console) -> None:
    """Prints the expected peak of a run that is assembled but has not started, and warns when the machine has less. Raises as
    `plan_memory`."""
    if config.trainer.implementation == "reference":
        return  # TRL's padded layout is not planned
    tokenizer, device = parts.model.tokenizer, parts.model.device
    prompts, held_out = (
        [len(ids) for ids in encode(tokenizer, [e.prompt for e in s])] for s in (parts.train_examples, parts.eval_examples)
    )
    completions = None
    if config.objective == "sft":
        completions = [len(ids) + 1 for ids in tokenizer([e.completion for e in parts.train_examples], add_special_tokens=False).input_ids]
    batch = largest_batch(config, prompts, completions, held_out)
    plan = plan_memory(config, meta_model(config.model), batch, resident_bytes(device))
    console.print(f"expected peak memory: {plan.peak / 2**30:.2f} GiB", highlight=False)
    if plan.peak > (there := machine_bytes(device)):
        console.print(
            f"[bold yellow]This machine has {there / 2**30:.1f} GiB.[/] If the run is killed: more trainer.gradient_accumulation_steps, "
            "trainer.gradient_checkpointing or a smaller rollout.batch_size",
            highlight=False,
        )


def machine_bytes(device: torch.device) -> int:
    """Memory of the GPU, or of the computer."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def resident_bytes(device: torch.device) -> int:
    """Bytes that this process holds now: resident set (CPU), or tensors on the device (GPU)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = Path("/proc/self/statm")
    if not statm.exists():  # not Linux: the largest resident set so far stands in
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(statm.read_text().split()[1]) * resource.getpagesize()


def _base_bytes(config: RunConfig, model: PreTrainedModel) -> int:
    """Of the frozen weights: the decoder's projections may be packed, embedding and head are not."""
    width = WIDTH[config.model.dtype]
    dense = width * sum(parameter.numel() for parameter in model.parameters())
    if config.model.quantization == "none":
        return dense
    packed = sum(layer.in_features * layer.out_features for layer in projections(model).values())
    return dense - round(packed * (width - BYTES_PER_WEIGHT))


def _groups(config: RunConfig, model: PreTrainedModel) -> tuple[_Group, ...]:
    layers = projections(model)
    ranks = {spec.name: spec.rank for spec in resolve(shapes(layers), config.lora)}
    return tuple(
        _Group(
            layers[names[0]].in_features,
            sum(layers[name].out_features for name in names),
            sum(ranks.get(name, 0) for name in names),
            sum(ranks.get(name, 0) * layers[name].out_features for name in names),
            names[0].endswith("o_proj"),
            layer_of(names[0]),
        )
        for names in input_groups(model, layers)
        if any(ranks.get(name) for name in names)
    )


def _trained_bytes(config: RunConfig, trained: int, trained_b: int) -> int:
    """Values and gradients of all entries, both moments of those that the mask lets train, the mask and its index; all float32 or int32."""
    if config.method == "full" or config.lora.b_mask is None:
        return 16 * trained
    k = (0 if config.lora.freeze_a else trained - trained_b) + sum(int(mask.sum()) for mask in load_b_mask(config.lora.b_mask).values())
    return 8 * trained + 12 * k + trained


def _sampling(x: _Widths, groups: Sequence[_Group], w: int, prompt_tokens: int, rows: int, capacity: int) -> Shares:
    """What `TorchSampler` holds while it decodes `rows` completions of prompts with so many tokens."""
    # W and A of the group as one matrix, s B as a block-diagonal one with its zeros.
    frozen = sum(g.in_features * (g.out_features + g.rank) + g.out_features * g.rank for g in groups)
    cached = 2 * x.layers * x.key * (prompt_tokens + rows * capacity)
    # gate and up side by side, each copied for the kernel that wants them contiguous, and their product.
    prefill = prompt_tokens * (2 * x.d + 5 * x.mlp)
    return (
        ("adapted weights, laid out for decoding", w * frozen),
        (f"keys and values of {prompt_tokens:,} prompt tokens and {rows:,} × {capacity:,} sampled ones", w * cached),
        ("prefill", w * prefill),
        ("logits of every row, and their log-softmax", rows * x.vocabulary * (w + 8)),
    )


def _update(config: RunConfig, x: _Widths, groups: Sequence[_Group], trained: int, batch: LargestBatch) -> Shares:
    """What forward and backward pass of one micro-batch hold."""
    w, full = WIDTH[config.model.dtype], config.method == "full"
    kept_inputs = sum(g.rank for g in groups)
    if not config.lora.freeze_a:
        kept_inputs += sum(g.in_features for g in groups if not g.reads_attention)
    if full:
        kept_inputs = x.layers * (2 * x.d + x.mlp)
    copies = 0 if full or w == 4 else w * trained
    if config.trainer.gradient_checkpointing:
        copies //= x.layers
    lowest = 0 if full else max(0, min(g.layer for g in groups))
    return (
        _activations(config, x, x.layers - lowest, kept_inputs, batch.packed),
        ("adapter in the dtype of the activations", copies),
        _in_flight(config, x, batch, head_trains=full),
    )


def plan_probe(config: RunConfig, model: PreTrainedModel, batch: LargestBatch, layers_at_once: int, held: int, reached: int) -> MemoryPlan:
    """The plan of fastlora.probe: base weights of `layers_at_once` layers get a gradient, there is no adapter and no optimizer.

    The worst of its passes is that of the lowest layers: the activations of all layers are kept, and what dW needs of the unfrozen ones.
    When the gradients come, the backward pass has freed the activations above them.
    config, model, batch: as for `plan_memory`. held, reached: bytes of the process now, and at most so far.
    """
    w, x = WIDTH[config.model.dtype], _widths(model)
    unfrozen = min(layers_at_once, x.layers)
    per_layer: Counter[int] = Counter()
    for name, parameter in model.named_parameters():
        per_layer[layer_of(name)] += parameter.numel()
    del per_layer[-1]
    sampling = [_sampling(x, (), w, *decoded, config.rollout.max_completion_length) for decoded in batch.decoded]
    what, activations = _activations(config, x, x.layers, unfrozen * (2 * x.d + x.mlp), batch.packed)
    gradients = w * sum(sorted(per_layer.values())[-unfrozen:])
    update = (
        (f"{what}, or {unfrozen} layers of gradients", max(activations, gradients)),
        _in_flight(config, x, batch, head_trains=False),
    )
    resident = [("held now: libraries, weights, data", held)]
    if select_device(config.model).type == "cpu":
        resident.append(_GEMM_CACHES)
    return MemoryPlan(tuple(resident), max(sampling, key=_total, default=()), update, reached)


def _activations(config: RunConfig, x: _Widths, layers: int, kept_inputs: int, packed: int) -> tuple[str, int]:
    """layers: from the lowest that trains to the last. kept_inputs: width of the inputs kept for weight gradients, all projections."""
    w = WIDTH[config.model.dtype]
    q_and_k = (x.query + x.key) if x.norms_of_q_and_k else 0
    own = layers * (2 * x.d + 2 * x.query + 2 * x.key + q_and_k + 2 * x.mlp)
    per_token = w * (own + kept_inputs) + 4 * layers * (2 + x.heads)
    what = f"activations of {packed:,} packed tokens"
    if config.trainer.gradient_checkpointing:  # the input of every layer, and all of the layer that is being recomputed
        return what + ", one layer at a time", packed * (w * layers * x.d + per_token // layers)
    return what, packed * per_token


def _in_flight(config: RunConfig, x: _Widths, batch: LargestBatch, *, head_trains: bool) -> tuple[str, int]:
    w = WIDTH[config.model.dtype]
    rows = min(batch.scored, max(1, tile_elements(select_device(config.model)) // x.vocabulary))
    # A trained head: its dW as accumulator, product and result, beside the embedding's.
    head = 2 * w * (batch.scored + batch.packed) * x.d + 2 * w * rows * x.vocabulary + (16 * x.vocabulary * x.d if head_trains else 0)
    layer = w * batch.packed * (2 * x.d + 2 * x.mlp)
    return "a tile of logits, or the gradients of one layer", max(head, layer)


def _total(parts: Shares) -> int:
    return sum(size for _, size in parts)
