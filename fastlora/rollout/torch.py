"""Sampling with the Hugging Face model in this process: a KV cache, any device.

The prompt of a group is computed once and its cache copied to the g completions. Completions that have ended leave the batch, so
that a step costs what is still running. Every sample has its own random numbers, drawn before the first step from the seed and
the sample's place in the call: they depend neither on who shares a batch nor on when somebody leaves it. (Logits do, by the
rounding of differently shaped GEMMs; the same call gives the same bits.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from fastlora.model import BaseModel
from fastlora.prompt import encode
from fastlora.rollout.sampler import SamplingParams, pad_left, pad_right
from fastlora.types import Example, Rollout

COMPACT_BELOW = 0.75
"""The batch is compacted when this share of it is still running: a copy of the cache against smaller steps from then on."""


@dataclass(slots=True)
class _Decoding:
    """The state of the samples in flight; row i of every tensor is sample `samples[i]`."""

    cache: DynamicCache
    attention_mask: Tensor
    """int64 [rows, past + 1]."""
    position_ids: Tensor
    """int64 [rows, 1], of the token to feed next."""
    samples: Tensor
    """int64 [rows], indices into the batch."""

    def keep(self, rows: Tensor) -> None:
        """Drops all but `rows`."""
        self.cache.batch_select_indices(rows)
        self.attention_mask, self.position_ids = self.attention_mask[rows], self.position_ids[rows]
        self.samples = self.samples[rows]


class TorchSampler:
    """Implements rollout.sampler.Sampler."""

    def __init__(self, model: BaseModel, batch_size: int) -> None:
        """batch_size: completions decoded together (memory: their KV cache)."""
        self._model, self._batch_size = model, batch_size

    @property
    def device(self) -> torch.device:
        """Where the tensors of its rollouts are."""
        return self._model.device

    @torch.no_grad()
    def sample(self, examples: Sequence[Example], params: SamplingParams, *, seed: int, adapter_version: int) -> Rollout:
        """See rollout.sampler.Sampler."""
        prompts = [torch.tensor(ids) for ids in encode(self._model.tokenizer, [example.prompt for example in examples])]
        generator = torch.Generator().manual_seed(seed)
        uniforms = torch.rand(len(prompts) * params.num_generations, params.max_completion_length, generator=generator, dtype=torch.float64)
        per_batch = max(1, self._batch_size // params.num_generations)
        completions: list[tuple[Tensor, Tensor, bool]] = []
        with _eval_mode(self._model.module):
            for first in range(0, len(prompts), per_batch):
                block = slice(first * params.num_generations, (first + per_batch) * params.num_generations)
                completions += self._decode(prompts[first : first + per_batch], params, uniforms[block])
        return self._rollout(examples, prompts, completions, params, adapter_version)

    def _decode(self, prompts: Sequence[Tensor], params: SamplingParams, uniforms_nt: Tensor) -> list[tuple[Tensor, Tensor, bool]]:
        """(token ids, log-probabilities, finished) of every sample of some prompts."""
        device = self._model.device
        uniforms_nt = uniforms_nt.to(device)
        logits, state = self._prefill(prompts, params.num_generations)
        num_samples = len(state.samples)
        ids = torch.full((num_samples, params.max_completion_length), self._model.pad_id, device=device)
        logp = torch.zeros(num_samples, params.max_completion_length, device=device)
        lengths = torch.zeros(num_samples, dtype=torch.long, device=device)
        finished = torch.zeros(num_samples, dtype=torch.bool, device=device)
        for t in range(params.max_completion_length):
            tokens, token_logp = choose(logits, params, uniforms_nt[state.samples, t])
            running = (~finished[state.samples]).nonzero().squeeze(1)
            samples = state.samples[running]
            ids[samples, t], logp[samples, t], lengths[samples] = tokens[running], token_logp[running], t + 1
            finished[samples] = self._ends(ids[samples, : t + 1], params)
            running = running[~finished[samples]]
            if not len(running) or t + 1 == params.max_completion_length:
                break
            if len(running) < COMPACT_BELOW * len(state.samples):
                state.keep(running)
                tokens = tokens[running]
            logits = self._step(tokens, state)
        rows = zip(ids.cpu(), logp.cpu(), lengths.tolist(), finished.tolist(), strict=True)
        return [(row[:length], row_logp[:length], done) for row, row_logp, length, done in rows]

    def _prefill(self, prompts: Sequence[Tensor], num_generations: int) -> tuple[Tensor, _Decoding]:
        """Logits [rows, v] of the first completion token, and the state: each prompt once through the model, then copied."""
        ids, mask = (tensor.to(self._model.device) for tensor in pad_left(prompts, self._model.pad_id))
        attention_mask = mask.long()
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self._model.module.config)
        logits = self._last_logits(ids, attention_mask, positions, cache)
        cache.batch_repeat_interleave(num_generations)
        attention_mask = attention_mask.repeat_interleave(num_generations, 0)
        state = _Decoding(
            cache=cache,
            attention_mask=torch.cat([attention_mask, attention_mask.new_ones(len(attention_mask), 1)], dim=1),
            position_ids=attention_mask.sum(1, keepdim=True),
            samples=torch.arange(len(attention_mask), device=self._model.device),
        )
        return logits.repeat_interleave(num_generations, 0), state

    def _step(self, tokens: Tensor, state: _Decoding) -> Tensor:
        """Feeds one token to every row; logits [rows, v] of the next."""
        logits = self._last_logits(tokens[:, None], state.attention_mask, state.position_ids, state.cache)
        state.attention_mask = torch.cat([state.attention_mask, state.attention_mask.new_ones(len(tokens), 1)], dim=1)
        state.position_ids = state.position_ids + 1
        return logits

    def _last_logits(self, ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: DynamicCache) -> Tensor:
        """Logits [rows, v] behind the last column of `ids`.

        Not through the model's own head: on a CPU its 3-d slice [rows, 1, d] makes matmul copy the head once per row (3.4 GB for
        64 rows of SmolLM2).
        """
        module = self._model.module
        hidden = module.base_model(
            input_ids=ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache, use_cache=True
        ).last_hidden_state
        return module.get_output_embeddings()(hidden[:, -1])

    def _ends(self, ids_nt: Tensor, params: SamplingParams) -> Tensor:
        """bool [n], True where the newest token is an eos or completes a stop string."""
        ended = torch.isin(ids_nt[:, -1], torch.tensor(self._model.eos_ids, device=ids_nt.device))
        if params.stop:
            texts = self._model.tokenizer.batch_decode(ids_nt)
            ended |= torch.tensor([any(stop in text for stop in params.stop) for text in texts], device=ids_nt.device)
        return ended

    def _rollout(
        self,
        examples: Sequence[Example],
        prompts: Sequence[Tensor],
        completions: Sequence[tuple[Tensor, Tensor, bool]],
        params: SamplingParams,
        adapter_version: int,
    ) -> Rollout:
        prompt_ids, prompt_mask = pad_left([p for p in prompts for _ in range(params.num_generations)], self._model.pad_id)
        completion_ids, completion_mask = pad_right([ids for ids, _, _ in completions], self._model.pad_id, torch.long)
        sampler_logp, _ = pad_right([logp for _, logp, _ in completions], 0.0, torch.float32)
        texts = self._model.tokenizer.batch_decode([ids for ids, _, _ in completions], skip_special_tokens=True)
        device = self._model.device
        return Rollout(
            examples=tuple(examples),
            num_generations=params.num_generations,
            prompt_ids_np=prompt_ids.to(device),
            prompt_mask_np=prompt_mask.to(device),
            completion_ids_nt=completion_ids.to(device),
            completion_mask_nt=completion_mask.to(device),
            sampler_logp_nt=sampler_logp.to(device),
            finished_n=torch.tensor([done for _, _, done in completions], device=device),
            texts=tuple(texts),
            adapter_version=adapter_version,
        )


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
    greedy = params.temperature == 0
    logp_nv = torch.log_softmax(logits_nv.float() / (1.0 if greedy else params.temperature), dim=-1)
    if greedy:
        logp, tokens = logp_nv.max(-1)
        return tokens, logp
    if params.top_p < 1:
        logp_nv, order = logp_nv.sort(dim=-1, descending=True)
        before = logp_nv.exp().cumsum(-1) - logp_nv.exp()
        logp_nv = logp_nv.masked_fill(before >= params.top_p, -torch.inf).log_softmax(-1)
    cumulative = logp_nv.double().exp().cumsum(-1)
    index = torch.searchsorted(cumulative, uniforms_n[:, None] * cumulative[:, -1:], right=True).clamp(max=logp_nv.shape[1] - 1)
    tokens = index if params.top_p == 1 else order.gather(1, index)
    return tokens.squeeze(1), logp_nv.gather(1, index).squeeze(1)
