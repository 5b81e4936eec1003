"""PEFT's layers against ours, on the reference path: logits, and the gradient of every A and B."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastlora.config import LoraConfig
from fastlora.lora.groups import projections
from fastlora.lora.patterns import ModuleSpec
from fastlora.ops.registry import use_implementation
from tests.parity.delta import Delta, compare
from tests.parity.twins import UNEVEN, Twins, make_twins, peft_layers, rank_pattern, specs_for
from tests.tiny import TINY_FAMILIES, VOCAB_SIZE, make_tiny_model

SCALINGS = ("alpha/r", "alpha/sqrt(r)", "constant")
TARGETS = {
    "uneven ranks": {"r": 5, "rank_pattern": UNEVEN, "alpha_pattern": {"v_proj": 2.3}},
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


def make_masks(specs: Sequence[ModuleSpec], model: nn.Module) -> dict[str, Tensor]:
    """Module -> bool [n, r]; half of B trains."""
    generator, layers = torch.Generator().manual_seed(4), projections(model)
    return {s.name: torch.rand(layers[s.name].out_features, s.rank, generator=generator) < 0.5 for s in specs if s.rank}


def masked_twins() -> tuple[Twins, dict[str, Tensor]]:
    """Uneven ranks with a mask on every B; PEFT has no such option, so its twin trains all of B."""
    model, config = make_tiny_model(), lora_config("llama", "uneven ranks", "alpha/r")
    masks = make_masks(specs_for(model, config), model)
    return make_twins(model, config, masks=masks), masks


def masked_delta(twins: Twins, masks: Mapping[str, Tensor]) -> Delta:
    """As `layers_delta`; the oracle of dB is PEFT's gradient times the mask."""
    for name, layer in peft_layers(twins.theirs).items():
        layer.lora_B["default"].weight.register_hook(lambda grad, mask=masks[name]: grad * mask)
    return layers_delta(twins)


def _case(family: str, targets: str, scaling: str) -> Delta:
    return layers_delta(make_twins(make_tiny_model(family), lora_config(family, targets, scaling)))


def cases() -> Iterator[tuple[str, Callable[[], Delta]]]:
    """(name, comparison)."""
    for family, targets, scaling in itertools.product(TINY_FAMILIES, TARGETS, SCALINGS):
        yield (
            f"{family}, {targets}, s = {scaling}",
            lambda family=family, targets=targets, scaling=scaling: _case(family, targets, scaling),
        )
    yield "llama, uneven ranks, half of B masked (PEFT's gradient × mask)", lambda: masked_delta(*masked_twins())
