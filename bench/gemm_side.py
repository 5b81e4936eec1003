"""The matrix products of one LoRA update and nothing else: what the machine's GEMMs take for them, in a contender's clothes.

It runs in turns with our update, so that a neighbour on the machine slows both; timed once at the end, the peak moved by a third within an
hour (LOG.md). Each shape takes torch.mm with the faster layout of its right operand, found while loading, and one set of operands.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig

from bench.contender import Clock, Commands, Contender, Report
from bench.gemm_peak import Group, Model, Work, best_product, full_work, lora_work
from bench.workload import RANK, read_workload
from fastlora.packaged_model import packaged_model_folder
from fastlora.types import Rollout


@torch.no_grad()
def serve(contender: Contender, folder: Path, commands: Commands, report: Report) -> None:
    """See bench.contender.Serve."""
    work, _ = works(read_workload(folder))
    products: list[tuple[Callable[[], Tensor], int]] = [
        (best_product(shape, getattr(torch, contender.dtype)), count) for shape, count in work.gemms.items()
    ]
    for _ in commands:
        start = Clock.now()
        for product, count in products:
            for _ in range(count):
                product()
        start.report_to(report)


def works(rollout: Rollout) -> tuple[Work, Work]:
    """(LoRA's, full fine-tuning's) useful work for one update on this rollout."""
    config = AutoConfig.from_pretrained(packaged_model_folder())
    model = Model(**{name: getattr(config, name) for name in Model.__slots__})
    groups = groups_of(rollout)
    return lora_work(model, groups, RANK), full_work(model, groups)


def groups_of(rollout: Rollout) -> list[Group]:
    """Token counts of each prompt and its completions."""
    prompts = rollout.prompt_mask_np.sum(1).tolist()
    completions = rollout.completion_mask_nt.sum(1).tolist()
    size = rollout.num_generations
    return [Group(prompts[first], tuple(completions[first : first + size])) for first in range(0, len(prompts), size)]
