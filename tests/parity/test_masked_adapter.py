"""An adapter trained under a mask on B, A frozen: PEFT loads its files as those of any other, entries outside the mask stay 0."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import torch

from fastlora.config import OptimConfig
from fastlora.lora.groups import projections
from fastlora.lora.peft_format import save_adapter
from fastlora.ops.registry import use_implementation
from fastlora.optim import AdamW
from tests.lora.adapters import UNEVEN, attach_uneven
from tests.parity.peft_cases import left_padded_batch
from tests.tiny import make_tiny_model


def test_peft_serves_a_masked_adapter(tmp_path: Path) -> None:
    """Three optimizer steps; the same logits on the reference path, bit for bit; moments for the k entries of the mask."""
    model = make_tiny_model("llama")
    plain, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    ranks = {name: next((rank for key, rank in UNEVEN.items() if name.endswith(key)), 8) for name in projections(model)}
    masks = {
        name: torch.rand(layer.out_features, ranks[name], generator=generator) < 0.2
        for name, layer in projections(model).items()
        if ranks[name]
    }
    adapter = attach_uneven(model, noise=0.0, freeze_a=True, b_mask_nr=masks, cast_to_input=False)
    drawn = {name: adapter.a_rd(name).clone() for name in adapter.slots}
    optimizer = AdamW(adapter.flat, OptimConfig())
    ids, mask = left_padded_batch()
    with use_implementation("reference"):
        for _ in range(3):
            model(input_ids=ids, attention_mask=mask).logits.square().mean().backward()
            optimizer.step(1e-2)
            adapter.flat.grad.zero_()
        save_adapter(adapter, tmp_path, base_model="tiny", scaling="alpha/r")
        ours = model(input_ids=ids, attention_mask=mask).logits
        theirs = peft.PeftModel.from_pretrained(plain, tmp_path)(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(ours, theirs)
    assert len(optimizer.exp_avg) == len(optimizer.exp_avg_sq) == sum(int(chosen.sum()) for chosen in masks.values())
    for name, chosen in masks.items():
        b_nr = adapter.b_rn(name).t()
        assert torch.equal(adapter.a_rd(name), drawn[name])
        assert not b_nr[~chosen].any() and bool(b_nr[chosen].all())
