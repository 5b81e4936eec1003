"""Sampling with the Hugging Face model in this process: a KV cache, any device.

The prompt of a group is computed once, and its keys and values are kept once. Completions that have ended leave the batch, so that a step
costs what is still running. Every sample has its own random numbers, drawn before the first step from the seed and
the sample's place in the call: they depend neither on who shares a batch nor on when somebody leaves it. (Logits do, by the
rounding of differently shaped GEMMs; the same call gives the same bits.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastlora.attention import PREPARED_MASK
from fastlora.kv_cache import GroupCache
from fastlora.lora.groups import frozen_adapters
from fastlora.model import BaseModel
from fastlora.ops.sample_rows import inverse_transform, sample_rows
from fastlora.prompt import encode
from fastlora.rollout.assemble import assemble
from fastlora.rollout.sampler import SamplingParams
from fastlora.types import Example, Rollout


class TorchSampler:
    """Implements rollout.sampler.Sampler."""

    def __init__(self, model: BaseModel, batch_size: int) -> None:
        """batch_size: completions decoded together (memory: their KV cache)."""
        self._model, self._batch_size = model, batch_size

    @torch.no_grad()
    def sample(self, examples: Sequence[Example], params: SamplingParams, *, seed: int, adapter_version: int) -> Rollout:
        """See rollout.sampler.Sampler."""
        prompts = [torch.tensor(ids) for ids in encode(self._model.tokenizer, [example.prompt for example in examples])]
        generator = torch.Generator().manual_seed(seed)
        uniforms = torch.rand(len(prompts) * params.num_generations, params.max_completion_length, generator=generator, dtype=torch.float64)
        per_batch = max(1, self._batch_size // params.num_generations)
        completions: list[tuple[Tensor, Tensor, bool]] = []
        with _eval_mode(self._model.module), frozen_adapters(self._model.module):
            for first in range(0, len(prompts), per_batch):
                block = slice(first * params.num_generations, (first + per_batch) * params.num_generations)
                completions += self._decode(prompts[first : first + per_batch], params, uniforms[block])
        return assemble(self._model, examples, prompts, completions, adapter_version)

    def _decode(self, prompts: Sequence[Tensor], params: SamplingParams, uniforms_nt: Tensor) -> list[tuple[Tensor, Tensor, bool]]:
        """(token ids, log-probabilities, finished) of every sample of some prompts."""
        device = self._model.device
        uniforms_nt = uniforms_nt.to(device)
        cache = GroupCache([len(prompt) for prompt in prompts], params.num_generations, params.max_completion_length, device)
        logits = self._prefill(prompts, cache).repeat_interleave(params.num_generations, 0)
        ids = torch.full((len(uniforms_nt), params.max_completion_length), self._model.pad_id, device=device)
        logp = torch.zeros(ids.shape, device=device)
        lengths = torch.zeros(len(ids), dtype=torch.long, device=device)
        finished = torch.zeros(len(ids), dtype=torch.bool, device=device)
        for t in range(params.max_completion_length):
            running = cache.slots_t
            tokens, logp[running, t] = choose(logits, params, uniforms_nt[running, t])
            ids[running, t], lengths[running] = tokens, t + 1
            finished[running] = self._ends(ids[running, : t + 1], params)
            still = ~finished[running]
            if not bool(still.any()) or t + 1 == params.max_completion_length:
                break
            cache.slots_t = running[still]
            logits = self._step(tokens[still], cache)
            cache.own_tokens += 1
        rows = zip(ids.cpu(), logp.cpu(), lengths.tolist(), finished.tolist(), strict=True)
        return [(row[:length], row_logp[:length], done) for row, row_logp, length, done in rows]

    def _prefill(self, prompts: Sequence[Tensor], cache: GroupCache) -> Tensor:
        """Logits [prompts, v] of the first completion token: all prompts as one packed row."""
        positions = torch.cat([torch.arange(len(prompt)) for prompt in prompts])
        hidden_td = self._hidden(torch.cat(list(prompts)), positions, cache)
        last = torch.tensor(cache.cu_seqlens[1:], device=hidden_td.device) - 1
        return self._model.module.get_output_embeddings()(hidden_td[last])

    def _step(self, tokens: Tensor, cache: GroupCache) -> Tensor:
        """Feeds one token to every running completion; logits [rows, v] of the next."""
        return self._model.module.get_output_embeddings()(self._hidden(tokens, cache.position_ids_t, cache))

    def _hidden(self, ids_t: Tensor, position_ids_t: Tensor, cache: GroupCache) -> Tensor:
        """Last hidden states [t, d] of a packed row of tokens."""
        device = self._model.device
        return self._model.module.base_model(
            input_ids=ids_t.to(device)[None],
            position_ids=position_ids_t.to(device)[None],
            attention_mask=PREPARED_MASK,
            use_cache=False,
            cache=cache,
        ).last_hidden_state[0]

    def _ends(self, ids_nt: Tensor, params: SamplingParams) -> Tensor:
        """bool [n], True where the newest token is an eos or completes a stop string."""
        ended = torch.isin(ids_nt[:, -1], torch.tensor(self._model.eos_ids, device=ids_nt.device))
        if params.stop:
            texts = self._model.tokenizer.batch_decode(ids_nt)
            ended |= torch.tensor([any(stop in text for stop in params.stop) for text in texts], device=ids_nt.device)
        return ended


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Sampling under gradient checkpointing: in train mode transformers drops the KV cache, and each token would see itself alone."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def choose(logits_nv: Tensor, params: SamplingParams, uniforms_n: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens int64 [n], their log-probabilities float32 [n] under the distribution sampled from).

    Inverse transform sampling: the first token whose cumulative probability exceeds the uniform number, tokens in order of
    falling probability when there is a nucleus. temperature 0 takes the most likely token and reports its log-probability at temperature 1.
    """
    if params.temperature == 0:
        logp, tokens = torch.log_softmax(logits_nv.float(), dim=-1).max(-1)
        return tokens, logp
    if params.top_p == 1:
        tokens, logp = sample_rows(logits_nv, uniforms_n, params.temperature)
        return tokens, logp.float()
    logp_nk, order_nk = most_likely(torch.log_softmax(logits_nv.float() / params.temperature, dim=-1), params.top_p)
    before = logp_nk.exp().cumsum(-1) - logp_nk.exp()
    logp_nk = logp_nk.masked_fill(before >= params.top_p, -torch.inf).log_softmax(-1)
    index = inverse_transform(logp_nk, uniforms_n)
    return order_nk.gather(1, index).squeeze(1), logp_nk.gather(1, index).squeeze(1)


def most_likely(logp_nv: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """(logp [n, k], tokens [n, k]) in falling order, k large enough that every row's hold `mass` of it.

    Most nuclei of a language model have less than 256 tokens: 16 rows of 49,152 take 1.4 ms on two cores where sorting them takes 32.
    """
    k = 256
    while k < logp_nv.shape[1]:
        values, tokens = logp_nv.topk(k)
        if bool((values.exp().cumsum(-1)[:, -1] >= mass).all()):
            return values, tokens
        k *= 16
    return logp_nv.sort(dim=-1, descending=True)
