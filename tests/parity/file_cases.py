"""Adapter files both ways: what fastlora saves, PEFT loads; what PEFT saves, fastlora loads. The logits have the same bits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import peft
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastlora.config import LoraConfig
from fastlora.lora.peft_format import save_adapter
from fastlora.lora.saved import attach_saved
from fastlora.model import wrap_model
from fastlora.ops.registry import use_implementation
from tests.parity.delta import Delta, compare
from tests.parity.peft_cases import SCALINGS, left_padded_batch, lora_config
from tests.parity.twins import make_twins, rank_pattern
from tests.tiny import TINY_FAMILIES, make_tiny_model, make_tiny_tokenizer

LIKE_NAMES = {"layers.1.self_attn.q_proj": 2, "layers.10.self_attn.q_proj": 7, "layers.11.self_attn.q_proj": 11, "layers.10.mlp.up_proj": 0}
"""Layers whose numbers begin alike: a key matched by prefix, or an unescaped regular expression, would confuse them."""

PEFT_STYLE = peft.LoraConfig(
    task_type="CAUSAL_LM",
    r=4,
    lora_alpha=9,
    target_modules=["q_proj", "v_proj", "down_proj"],
    rank_pattern={"v_proj": 3, r"layers\.[01]\.mlp\.down_proj": 17, r"^model\.layers\.0\.self_attn\.q_proj": 1},
    alpha_pattern={"down_proj": 5, r"layers\.1\.self_attn\.q_proj": 2},
)
"""Patterns as people write them: suffixes, regular expressions, anchors."""


@torch.no_grad()
def _logits(model: PreTrainedModel | peft.PeftModel) -> Tensor:
    ids, mask = left_padded_batch()
    with use_implementation("reference"):
        return model(input_ids=ids, attention_mask=mask).logits


def _load_by_peft(model: PreTrainedModel, folder: Path) -> peft.PeftModel:
    return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)


def _load_by_us(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    ours = copy.deepcopy(model)
    attach_saved(wrap_model(ours, make_tiny_tokenizer(), "tiny"), folder)
    return ours


def _saved_by_us(model: PreTrainedModel, config: LoraConfig) -> Delta:
    """We save, PEFT loads and saves again, PEFT and we load that: four models, the same logits."""
    twins = make_twins(model, config)
    with TemporaryDirectory() as name:
        folder, again = Path(name) / "ours", Path(name) / "again"
        save_adapter(twins.adapter, folder, base_model="tiny", scaling=config.scaling)
        loaded = _load_by_peft(model, folder)
        loaded.save_pretrained(again)
        copies = [loaded, _load_by_peft(model, again), _load_by_us(model, again), _load_by_us(model, folder)]
        logits = [_logits(each) for each in copies]
    assert bool((logits[0] != _logits(model)).any()), "the adapter does nothing"
    return compare([_logits(twins.ours)] * len(logits), logits)


def _saved_by_peft(model: PreTrainedModel) -> Delta:
    """PEFT saves an adapter with its own patterns, we load it."""
    theirs = peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(PEFT_STYLE)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05, generator=generator)
    with TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return compare([_logits(_load_by_us(model, Path(folder)))], [_logits(theirs)])


def cases() -> Iterator[tuple[str, Callable[[], Delta]]]:
    """(name, comparison)."""
    for scaling in SCALINGS:
        yield (
            f"saved by fastlora, llama, uneven ranks, s = {scaling}",
            lambda scaling=scaling: _saved_by_us(make_tiny_model(), lora_config("llama", "uneven ranks", scaling)),
        )
    twelve = {"num_hidden_layers": 12}
    yield (
        "saved by fastlora, 12 layers, layers 1, 10 and 11 differ",
        lambda: _saved_by_us(
            make_tiny_model("llama", **twelve),
            LoraConfig(
                r=3,
                lora_alpha=11.0,
                alpha_pattern={"layers.11.self_attn.q_proj": 2.3},
                rank_pattern=rank_pattern(LIKE_NAMES, make_tiny_model("llama", **twelve)),
            ),
        ),
    )
    for family in TINY_FAMILIES:
        yield f"saved by PEFT with its patterns, {family}", lambda family=family: _saved_by_peft(make_tiny_model(family))
