"""PEFT's layers against ours, on the reference path: logits, and the gradient of every A and B."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from fastlora.config import LoraConfig
from fastlora.ops.registry import use_implementation
from tests.parity.delta import Delta, compare
from tests.parity.twins import UNEVEN, Twins, make_twins, rank_pattern
from tests.tiny import TINY_FAMILIES, VOCAB_SIZE, make_tiny_model

SCALINGS = ("alpha/r", "alpha/sqrt(r)", "constant")
TARGETS = {
    "uneven ranks": {"r": 5, "rank_pattern": UNEVEN},
    "q and v only": {"r": 3, "target_modules": ("q_proj", "v_proj")},
    "one module": {"r": 1, "target_modules": ("layers.1.mlp.up_proj",)},
}


def lora_config(family: str, targets: str, scaling: str) -> LoraConfig:
    """alpha such that every scale mode gives an s of order one, and is no power of two."""
    settings = dict(TARGETS[targets])
    pattern = rank_pattern(settings.pop("rank_pattern", {}), make_tiny_model(family))
    alpha = {"alpha/r": 11.0, "alpha/sqrt(r)": 3.0, "constant": 1.3}[scaling]
    return LoraConfig.model_validate({**settings, "rank_pattern": pattern, "lora_alpha": alpha, "scaling": scaling})


def left_padded_batch() -> tuple[Tensor, Tensor]:
    """(ids, mask) int64 [3, 17]; rows of 12, 17 and 1 tokens."""
    ids = torch.randint(VOCAB_SIZE, (3, 17), generator=torch.Generator().manual_seed(2))
    return ids, (torch.arange(17) >= torch.tensor([[5], [0], [16]])).long()


def layers_delta(twins: Twins) -> Delta:
    """One forward and one backward pass of each, under the same random dlogits."""
    ids, mask = left_padded_batch()
    dlogits = torch.randn(*ids.shape, VOCAB_SIZE, generator=torch.Generator().manual_seed(3))
    with use_implementation("reference"):
        ours = twins.ours(input_ids=ids, attention_mask=mask).logits
        ours.backward(dlogits)
    theirs = twins.theirs(input_ids=ids, attention_mask=mask).logits
    theirs.backward(dlogits)
    our_gradients, their_gradients = twins.gradients()
    assert all(bool(gradient.any()) for gradient in their_gradients)
    return compare([ours, *our_gradients], [theirs, *their_gradients])


def _case(family: str, targets: str, scaling: str) -> Delta:
    return layers_delta(make_twins(make_tiny_model(family), lora_config(family, targets, scaling)))


def cases() -> dict[str, Callable[[], Delta]]:
    """Name -> comparison."""
    return {
        f"{family}, {targets}, s = {scaling}": lambda family=family, targets=targets, scaling=scaling: _case(family, targets, scaling)
        for family, targets, scaling in itertools.product(TINY_FAMILIES, TARGETS, SCALINGS)
    }
