"""Races against other libraries: a LoRA group (gpu_group.py), the output head (gpu_head.py), the optimizer (gpu_optimizer.py)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.gpu_group import group_race
from bench.gpu_head import HeadRaces
from bench.gpu_optimizer import optimizer_race
from bench.gpu_race import Race
from bench.op_cases import Update, cases
from fastlora.ops import linear_logprob, lora_linear


def peer_races(update: Update, dtype: torch.dtype) -> Iterator[Race]:
    """All of them at the sizes of `update`."""
    found = {case.name: case for case in cases(update)}
    for case in found.values():
        if case.spec is lora_linear.SPEC:
            yield group_race(case, found[case.name.replace("lora_linear", "lora_linear_backward")], dtype)
    (head,) = (case for case in found.values() if case.spec is linear_logprob.SPEC)
    yield from HeadRaces(head, update, dtype).all()
    yield optimizer_race(update)
