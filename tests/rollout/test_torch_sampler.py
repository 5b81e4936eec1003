"""The torch sampler against Hugging Face's generate, the trainer's scores and exact nucleus probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fastlora.batches import policy_batch
from fastlora.fused_layers import fuse_layers
from fastlora.model import BaseModel, wrap_model
from fastlora.policy import score
from fastlora.rollout.sampler import SamplingParams
from fastlora.rollout.torch import TorchSampler, choose, most_likely
from fastlora.types import Example, Rollout
from tests.lora.adapters import attach_uneven
from tests.tiny import EOS_ID, TINY_FAMILIES, make_tiny_model
from tests.tolerances import FP32_LOGPROB

PROMPTS = ("a", "What is 2 + 3?", "hello", "0123456789 0123456789 0123456789", "Zz")
EXAMPLES = tuple(Example(index, prompt, "") for index, prompt in enumerate(PROMPTS))
FREQUENT = tuple(range(40, 90))
"""Every third token or so ends a completion: batches shrink and are compacted."""


def _wrap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, eos: Sequence[int] = (EOS_ID,)) -> BaseModel:
    return replace(wrap_model(model, tokenizer, "tiny"), eos_ids=tuple(eos))


def _sample(model: BaseModel, examples: Sequence[Example] = EXAMPLES, *, seed: int = 0, batch_size: int = 64, **params: Any) -> Rollout:
    settings = SamplingParams(**{"num_generations": 1, "max_completion_length": 12, **params})
    return TorchSampler(model, batch_size).sample(examples, settings, seed=seed, adapter_version=3)


def _completions(rollout: Rollout) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(rollout.completion_ids_nt, rollout.completion_mask_nt, strict=True)]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("family", [*TINY_FAMILIES, "mistral, window 6"])
def test_greedy_is_hugging_faces_generate(family: str, adapted: bool, fused: bool, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Ragged prompts, in one row by us and alone by generate of a model that we never touched but for its adapter; several eos tokens."""
    overrides = {"sliding_window": 6} if "window" in family else {}
    model, sampled = (make_tiny_model(family.split(",")[0], **overrides) for _ in range(2))
    wrapped = _wrap(sampled, tiny_tokenizer, FREQUENT)
    if fused:
        fuse_layers(sampled)
    if adapted:
        attach_uneven(model), attach_uneven(sampled)
    rollout = _sample(wrapped, temperature=0.0)
    for n, prompt in enumerate(PROMPTS):
        ids = torch.tensor([tiny_tokenizer.encode(prompt, add_special_tokens=False)])
        mask = torch.ones_like(ids)
        whole = model.generate(
            ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=list(FREQUENT), pad_token_id=EOS_ID
        )
        assert _completions(rollout)[n] == whole[0, ids.shape[1] :].tolist()
        assert rollout.prompt_ids_np[n][rollout.prompt_mask_np[n]].tolist() == ids[0].tolist()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("eos", [(EOS_ID,), FREQUENT], ids=["long", "compacted"])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probabilities_are_the_trainers(
    temperature: float, eos: tuple[int, ...], checkpointing: bool, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Also with gradient checkpointing on, where transformers in train mode would drop the cache without an error."""
    attach_uneven(tiny_model)
    wrapped = _wrap(tiny_model, tiny_tokenizer, eos)
    if checkpointing:
        tiny_model.gradient_checkpointing_enable({"use_reentrant": False})
        tiny_model.train()
    rollout = _sample(wrapped, num_generations=3, temperature=temperature)
    assert tiny_model.training == checkpointing
    batch = policy_batch(rollout, torch.zeros(len(rollout.texts)), mask_truncated=False)
    with torch.no_grad():
        logp_nt, _ = score(tiny_model, batch, temperature, "auto")
        logits = tiny_model(rollout.completion_ids_nt[:, :1]).logits
    difference = (rollout.sampler_logp_nt - logp_nt).abs()
    assert float(difference.max()) < FP32_LOGPROB * float(logits.abs().max()) / temperature
    assert not rollout.sampler_logp_nt[~rollout.completion_mask_nt].any()


def test_the_record(tiny_llama: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Samples of a prompt are adjacent; ids, masks, texts and the finished flag fit each other."""
    rollout = _sample(_wrap(tiny_llama, tiny_tokenizer, FREQUENT), num_generations=4, max_completion_length=5)
    assert rollout.examples == EXAMPLES and rollout.num_generations == 4 and rollout.adapter_version == 3
    assert len(rollout.texts) == 20 and len(set(rollout.texts)) > 10
    completions = _completions(rollout)
    for n, ids in enumerate(completions):
        prompt = rollout.prompt_ids_np[n][rollout.prompt_mask_np[n]]
        assert tiny_tokenizer.decode(prompt) == PROMPTS[n // 4]
        assert rollout.texts[n] == tiny_tokenizer.decode(ids, skip_special_tokens=True)
        assert bool(rollout.finished_n[n]) == (ids[-1] in FREQUENT)
        assert not any(token in FREQUENT for token in ids[:-1]) and 1 <= len(ids) <= 5
        assert len(ids) == 5 or rollout.finished_n[n]
    assert 0 < int(rollout.finished_n.sum()) < 20  # both kinds were there
    assert rollout.completion_ids_nt[~rollout.completion_mask_nt].eq(EOS_ID).all()
    assert rollout.num_tokens == sum(map(len, completions))


def test_seeds(tiny_llama: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """The same seed gives the same bits and leaves torch's global generator alone; another seed other tokens."""
    wrapped = _wrap(tiny_llama, tiny_tokenizer)
    state = torch.get_rng_state()
    first, second, other = (_sample(wrapped, seed=seed, num_generations=2) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert _completions(first) == _completions(second) and torch.equal(first.sampler_logp_nt, second.sampler_logp_nt)
    assert _completions(first) != _completions(other)
    assert _completions(first)[0] != _completions(first)[1]  # samples of a group have numbers of their own


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7, 64])
def test_the_batch_size_changes_no_token(batch_size: int, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Other neighbours, other padding, other moments of compaction: the same tokens (fp64: no rounding flips a choice)."""
    wrapped = _wrap(make_tiny_model("qwen2", dtype=torch.float64), tiny_tokenizer, FREQUENT)
    expected = _completions(_sample(wrapped, num_generations=2))
    assert len({len(ids) for ids in expected}) > 3  # completions leave at different times
    assert _completions(_sample(wrapped, num_generations=2, batch_size=batch_size)) == expected


def test_later_prompts_change_nothing(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """A sample's random numbers depend on the seed and its place in the call."""
    wrapped = _wrap(make_tiny_model("llama", dtype=torch.float64), tiny_tokenizer, FREQUENT)
    everyone = _completions(_sample(wrapped, num_generations=2))
    assert _completions(_sample(wrapped, EXAMPLES[:2], num_generations=2)) == everyone[:4]
    assert _completions(_sample(wrapped, EXAMPLES[:1], num_generations=1)) == everyone[:1]


def test_a_step_costs_what_is_still_running(tiny_llama: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Rows given to the model: the tokens of all prompts, each once for its group, then one for every completion that goes on."""
    rows: list[int] = []
    tiny_llama.get_input_embeddings().register_forward_hook(lambda _, args, __: rows.append(args[0].numel()))
    rollout = _sample(_wrap(tiny_llama, tiny_tokenizer, FREQUENT), num_generations=4)
    lengths = rollout.completion_mask_nt.sum(1)
    assert rows[0] == sum(map(len, PROMPTS)) and len(set(lengths.tolist())) > 5
    assert rows[1:] == [int((lengths > t).sum()) for t in range(1, int(lengths.max()))]


def test_stop_strings(tiny_llama: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """The completion that reaches a stop string ends with it, and is finished; the others go on. Strings of several tokens too."""
    wrapped = _wrap(tiny_llama, tiny_tokenizer)
    free = _sample(wrapped, temperature=0.0)
    stops = (free.texts[1][3:5], free.texts[3][6])
    assert len(stops[0]) == 2 and len(stops[1]) == 1
    stopped = _sample(wrapped, temperature=0.0, stop=stops)
    for before, after, finished in zip(free.texts, stopped.texts, stopped.finished_n.tolist(), strict=True):
        ends = [before.index(stop) + len(stop) for stop in stops if stop in before]
        assert after == before[: min(ends, default=len(before))] and finished == bool(ends)
    assert stopped.finished_n[1] and stopped.finished_n[3]


def test_one_token(tiny_llama: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rollout = _sample(_wrap(tiny_llama, tiny_tokenizer), max_completion_length=1, num_generations=2)
    assert rollout.completion_ids_nt.shape == (10, 1) and rollout.completion_mask_nt.all()


def test_everyone_ends_at_once(tiny_llama: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Every token is an eos: one step, nothing padded, all finished."""
    rollout = _sample(_wrap(tiny_llama, tiny_tokenizer, range(131)))
    assert rollout.completion_ids_nt.shape == (5, 1) and rollout.finished_n.all()


LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.9, -3.0, 0.4, 1.0])
DRAWS = 200_000


@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.6, 0.1])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_frequencies_are_the_nucleus_probabilities(temperature: float, top_p: float) -> None:
    """Against the smallest set of most likely tokens whose probability reaches top_p, made by hand; 200,000 draws."""
    probabilities = torch.softmax(LOGITS.double() / temperature, 0).tolist()
    nucleus, mass = [], 0.0
    for token in sorted(range(len(LOGITS)), key=lambda i: -probabilities[i]):
        if mass < top_p:
            nucleus.append(token)
            mass += probabilities[token]
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(DRAWS, generator=generator, dtype=torch.float64)
    tokens, logp = choose(LOGITS.expand(DRAWS, -1), SamplingParams(1, 1, temperature, top_p), uniforms)
    counts = torch.bincount(tokens, minlength=len(LOGITS)).tolist()
    assert sum(counts[token] for token in nucleus) == DRAWS
    if len(nucleus) > 1:
        expected = [probabilities[token] / mass * DRAWS for token in nucleus]
        assert chisquare([counts[token] for token in nucleus], expected).pvalue > 1e-3
    exact = torch.tensor([probabilities[token] / mass for token in tokens.tolist()]).log()
    assert float((logp - exact).abs().max()) < FP32_LOGPROB


@pytest.mark.parametrize("spread", [0.0, 0.5, 4.0])
@pytest.mark.parametrize("mass", [0.1, 0.95, 1.0])
def test_the_most_likely_are_found_without_sorting_all(spread: float, mass: float) -> None:
    """As a sort has them, of rows that differ in how many they need; no more than are needed by 16 times."""
    generator = torch.Generator().manual_seed(0)
    logits = spread * torch.randn(3, 9001, generator=generator) * torch.tensor([[1.0], [2.0], [0.1]])
    logp_nv = torch.log_softmax(logits, dim=-1)
    logp_nk, tokens_nk = most_likely(logp_nv, mass)
    values, _ = logp_nv.sort(dim=-1, descending=True)
    k = logp_nk.shape[1]
    needed = int((values.double().exp().cumsum(-1) < mass - 1e-4).sum(-1).max()) + 1
    assert min(needed, 9001) <= k <= max(256, 16 * needed)
    assert torch.equal(logp_nk, values[:, :k]) and torch.equal(logp_nv.gather(1, tokens_nk), logp_nk)


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_extreme_uniform_numbers_stay_inside_the_nucleus(top_p: float) -> None:
    uniforms = torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)
    tokens, logp = choose(LOGITS.expand(2, -1), SamplingParams(1, 1, 1.0, top_p), uniforms)
    assert logp.isfinite().all() and tokens[0] == 0


def test_tokens_of_probability_zero_are_never_chosen() -> None:
    logits = torch.full((4, 9), -torch.inf)
    logits[:, 4] = logits[:, 6] = 0.0
    uniforms = torch.tensor([0.0, 0.4999, 0.5, 1.0 - 2**-53], dtype=torch.float64)
    for top_p in (1.0, 0.9):
        tokens, logp = choose(logits, SamplingParams(1, 1, 1.0, top_p), uniforms)
        assert set(tokens.tolist()) == {4, 6} and torch.allclose(logp, torch.tensor(0.5).log())


def test_greedy_reports_the_log_probability_at_temperature_one() -> None:
    tokens, logp = choose(LOGITS[None], SamplingParams(1, 1, 0.0), torch.zeros(1, dtype=torch.float64))
    assert tokens.item() == 0 and logp.item() == pytest.approx(float(torch.log_softmax(LOGITS, 0)[0]), rel=FP32_LOGPROB)
