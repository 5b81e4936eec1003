"""The records that travel along the training line, and the shape legend of the whole repository.

Shape suffixes (lower case, in the order of the dimensions):

    t tokens (of a completion, or of a packed batch)   n samples, or output features of a projection
    d input features                                   r rank
    v vocabulary                                       p prompt tokens
    g group size (completions of one prompt)           m modules

`completion_ids_nt` is therefore [samples, completion tokens] and `a_rd` is a LoRA A matrix [rank, in].

A stage reads a record and returns a new one; it never writes into the one it was given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a data set, rendered to text."""

    index: int
    """Position in the (unshuffled) split; names the row in every log."""
    prompt: str
    """The full text that the model is given, chat template and prefill included."""
    answer: str
    """Gold answer in the form that the reward expects; empty when the reward needs none."""
    completion: str = ""
    """Target text (SFT only)."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """The row's other columns, untouched."""
    question: str = ""
    """The question as the source has it, without template."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """Completions sampled for one generation batch. Samples of one prompt are adjacent: sample n belongs to `examples[n // g]`."""

    examples: tuple[Example, ...]
    """One per prompt."""
    num_generations: int
    """g, completions per prompt; n = len(examples) * g."""
    prompt_ids_np: Tensor
    """int64, left-padded."""
    prompt_mask_np: Tensor
    """bool, True at real tokens."""
    completion_ids_nt: Tensor
    """int64, right-padded; the eos that ended a completion is part of it."""
    completion_mask_nt: Tensor
    """bool, True at real tokens, the final eos included even when pad = eos."""
    sampler_logp_nt: Tensor
    """float32, log-probability of each sampled token under the sampler's policy at its temperature and top-p; 0 at padding, NaN where the
    sampler could not say."""
    finished_n: Tensor
    """bool, True where the completion ended by eos or a stop string, False where it was truncated."""
    texts: tuple[str, ...]
    """Decoded completions, special tokens removed."""
    adapter_version: int
    """Number of optimizer steps behind the policy that sampled this."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What the sampler measured on the way: seconds of the swap, the canary's finding."""

    @property
    def num_tokens(self) -> int:
        """Sampled tokens in the batch."""
        return int(self.completion_mask_nt.sum())


@dataclass(frozen=True, slots=True)
class Deposits:
    """Rewards of a rollout: where they were put, and how much (the contract of the reward-density study). On the CPU."""

    token_rewards_nt: Tensor
    """float32, the reward deposited at each token; 0 where nothing is deposited."""
    trajectory_rewards_n: Tensor
    """float32, one number per completion for logs and sequence-level advantages; NaN = the reward could not score it."""
    step_reward_mask_nt: Tensor
    """bool, True at the tokens that hold a deposit."""
    dense: bool
    """True when every valid token holds a deposit: the advantage is then the normalised deposit itself, not a return-to-go."""


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """What the loss needs of some samples, in the padded layout; `packing.pack` strips the padding before the model sees it."""

    prompt_ids_np: Tensor
    """int64, left-padded."""
    prompt_mask_np: Tensor
    """bool."""
    completion_ids_nt: Tensor
    """int64, right-padded."""
    completion_mask_nt: Tensor
    """bool, the tokens that exist (attention)."""
    loss_mask_nt: Tensor
    """bool, the tokens that train; a subset of `completion_mask_nt` (truncated completions may be masked out)."""
    advantages_nt: Tensor
    """float32 [n,t], or [n,1] when a sample has one advantage."""
    old_logp_nt: Tensor | None
    """float32, behaviour policy; None = the current policy (first use of an on-policy batch), ratio 1."""
    ref_logp_nt: Tensor | None
    """float32, reference policy (adapter off); None when beta = 0."""
    sampler_logp_nt: Tensor | None
    """float32, what the sampler said, NaN where it could not say; None when it is the trainer itself."""
    num_items_in_batch: int
    """Active tokens of the whole generation batch, all micro-batches together (the dapo normaliser)."""

    def __len__(self) -> int:
        return self.completion_ids_nt.shape[0]

    def split(self, num_parts: int) -> list[TrainBatch]:
        """Equal consecutive parts along samples; raises ValueError when the samples cannot be split evenly."""
        if len(self) % num_parts:
            raise ValueError(f"{len(self)} samples cannot be split into {num_parts} equal micro-batches")
        rows = len(self) // num_parts
        return [self.rows(slice(i * rows, (i + 1) * rows)) for i in range(num_parts)]

    def rows(self, index: slice) -> TrainBatch:
        """The samples of `index`, as views."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: tensor[index] for name, tensor in tensors.items()})
