"""Log-probabilities of sampled tokens under the model, and the loss on them: what the optimizer differentiates.

Two layouts, one result. `score_packed` runs the model on real tokens only, a group's prompt once, and the head on the rows that predict
something. `score_padded` is TRL's layout and order of operations (trl/trainer/grpo_trainer.py,
_get_per_token_logps_and_entropies, and trl/trainer/utils.py, add_fused_lm_head): every position of the rectangle goes through
model and head, so that with the reference ops its bits are TRL's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastlora.attention import PREPARED_MASK
from fastlora.losses.nucleus_logprob import nucleus_logprob
from fastlora.losses.one_pass import LossOf, one_pass_loss, tile_elements
from fastlora.ops.linear_logprob import linear_logprob
from fastlora.packing import PackedTokens, pack
from fastlora.types import TrainBatch


def loss_on(
    model: PreTrainedModel,
    batch: TrainBatch,
    temperature: float,
    implementation: str,
    loss_of: LossOf,
    *,
    token_level: bool,
    top_p: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`loss_of` the scores of a batch: (loss, metrics).

    token_level: dℓ/dlogp of a token depends on no other token, so that packed tokens need one pass over the head instead of two.
    top_p: see `score`.
    """
    if implementation == "reference" or not token_level or not torch.is_grad_enabled() or _head_trains(model):
        return loss_of(*score(model, batch, temperature, implementation, top_p))
    packed = pack(batch)
    if not len(packed.targets_c):
        return loss_of(*_nothing(packed))
    head = model.get_output_embeddings()
    return one_pass_loss(_predictors(model, packed), head.weight, head.bias, packed, temperature, loss_of, top_p)


def score(model: PreTrainedModel, batch: TrainBatch, temperature: float, implementation: str, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """(logp_nt, entropy_nt) in float32, zeros where there is no completion token; implementation: see TrainerConfig.

    top_p < 1: of the distribution renormalised over its nucleus, with the sampled token counted in (ops.nucleus_rows).
    """
    run = score_padded if implementation == "reference" else score_packed
    return run(model, batch, temperature, top_p)


@torch.no_grad()
def score_in_parts(
    model: PreTrainedModel, batch: TrainBatch, parts: int, temperature: float, implementation: str, top_p: float = 1.0
) -> Tensor:
    """logp_nt of a batch, without gradient, in the `parts` micro-batches that train: the same shapes give the same bits. See `score`."""
    return torch.cat([score(model, part, temperature, implementation, top_p)[0] for part in batch.split(parts)])


def score_packed(model: PreTrainedModel, batch: TrainBatch, temperature: float, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """See `score`; cost grows with real tokens."""
    packed = pack(batch)
    if not len(packed.targets_c):
        return _nothing(packed)
    logp_c, entropy_c = _head_logprob(model, _predictors(model, packed), packed.targets_c, temperature, top_p, whole_rows=True)
    return packed.unpack(logp_c), packed.unpack(entropy_c)


def _head_logprob(
    model: PreTrainedModel, hidden_td: Tensor, targets_t: Tensor, temperature: float, top_p: float, *, whole_rows: bool
) -> tuple[Tensor, Tensor]:
    """(logp_t, entropy_t). whole_rows: tiles of logits as one pass makes them; else the chunks of TRL, whose sums have its bits."""
    head, tile = model.get_output_embeddings(), tile_elements(hidden_td.device)
    if top_p < 1:  # a nucleus needs whole rows
        return nucleus_logprob(hidden_td, head.weight, head.bias, targets_t, temperature, top_p, tile)
    v = head.weight.shape[0]
    chunks = {"token_chunk": max(1, tile // v), "vocab_chunk": v} if whole_rows else {}
    return linear_logprob(hidden_td, head.weight, targets_t, bias_v=head.bias, temperature=temperature, **chunks)


def _head_trains(model: PreTrainedModel) -> bool:
    return any(parameter.requires_grad for parameter in model.get_output_embeddings().parameters())


def _nothing(packed: PackedTokens) -> tuple[Tensor, Tensor]:
    zeros = torch.zeros(packed.shape_nt, device=packed.cells_c.device)
    return zeros, zeros


def _predictors(model: PreTrainedModel, packed: PackedTokens) -> Tensor:
    """Hidden states [C, d] of the tokens that predict one."""
    hidden = model.base_model(
        input_ids=packed.input_ids_t[None],
        position_ids=packed.position_ids_t[None],
        attention_mask=PREPARED_MASK,
        use_cache=False,
        cu_seqlens=packed.cu_seqlens,
        roots=packed.roots,
    ).last_hidden_state[0]
    return hidden[packed.predictors_c]


def score_padded(model: PreTrainedModel, batch: TrainBatch, temperature: float, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """See `score`; bit for bit TRL's."""
    input_ids = torch.cat([batch.prompt_ids_np, batch.completion_ids_nt], dim=1)
    attention_mask = torch.cat([batch.prompt_mask_np, batch.completion_mask_nt], dim=1).long()
    hidden = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state[:, :-1]
    first = batch.prompt_ids_np.shape[1] - 1  # the position that predicts the first completion token
    scored = attention_mask[:, 1:].bool()
    scored[:, :first] = False
    targets = input_ids[:, 1:].masked_fill(~scored, 0)
    rows_td, targets_t = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    logp, entropy = _head_logprob(model, rows_td, targets_t, temperature, top_p, whole_rows=False)
    logp_nl, entropy_nl = (values.view(scored.shape).masked_fill(~scored, 0) for values in (logp, entropy))
    return logp_nl[:, first:], entropy_nl[:, first:]


@torch.no_grad()
def next_token_logp(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Tensor:
    """log softmax [p, v] in float32 of the token after each prompt, at temperature 1, by the packed forward pass that trains."""
    ends = torch.tensor([len(prompt) for prompt in prompts]).cumsum(0)
    hidden_td = hidden_states(model, prompts)
    return torch.log_softmax(model.get_output_embeddings()(hidden_td[(ends - 1).to(hidden_td.device)]).float(), dim=-1)


def hidden_states(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> Tensor:
    """[t, d] of all tokens of some sequences (none of them empty), one after another, by the packed forward pass that trains."""
    lengths = [len(sequence) for sequence in sequences]
    device = model.get_output_embeddings().weight.device
    return model.base_model(
        input_ids=torch.tensor([token for sequence in sequences for token in sequence], device=device)[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths]).to(device)[None],
        attention_mask=PREPARED_MASK,
        use_cache=False,
        cu_seqlens=(0, *accumulate(lengths)),
        roots=tuple(range(len(sequences))),
    ).last_hidden_state[0]
